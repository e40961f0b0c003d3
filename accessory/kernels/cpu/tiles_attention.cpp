// Attention of a prompt on CPU by the tiles of AMX (tiles.h): the new tokens of one sequence in bf16, each over what is
// there up to itself.
//
// Keys are multiplied as they lie, 16 rows a tile, with 16 queries of a head across a tile. So the logits of a query lie
// below one another: its largest one, its sum and its weights are those of a lane. Values are laid out anew, so that a
// tile has 32 keys of 16 of their elements. 128 keys at a time, as Dao et al., 2022, https://arxiv.org/abs/2205.14135,
// have it: what was added up before is scaled to the largest logit so far. These blocks are counted from the sequence's
// first key, so a token's result depends on no other query and not on where the prompt was cut.

#include "tiles.h"

#ifdef HAS_TILES
namespace {

using namespace wide;

constexpr int DEPTH = 32;     // elements of a tile's row, and the keys of a tile of values
constexpr int KEYS = 128;     // at a time
constexpr int WIDEST = 256;   // head

struct Prompt {
    const uint16_t *q, *k, *v;
    uint16_t* out;
    int64_t tokens, start, heads, kv_heads, width;
    int64_t q_token, k_token, k_head, v_token, v_head;  // strides, in elements

    int64_t keys() const { return start + tokens; }
    int64_t value_blocks() const { return up(keys(), DEPTH); }
    int64_t value_bytes() const { return value_blocks() * DEPTH * width * 2; }  // of a head
    int64_t head_bytes() const { return value_bytes() + TILE * width * 2; }     // its values, and its last keys
    int64_t blocks() const { return up(tokens, TILE); }

    // 32 keys' values, and with the last of them the last 16 keys or fewer: zeros behind the sequence.
    TILES_TARGET void stage(int64_t head, int64_t block, char* room) const {
        const int64_t first = block * DEPTH;
        for (int64_t d = 0; d < width; d += TILE) {
            __m512i pair[TILE];
            for (int i = 0; i < TILE; i++) {
                const int64_t key = first + 2 * i;
                pair[i] = _mm512_or_si512(value(head, key, d), _mm512_slli_epi32(value(head, key + 1, d), 16));
            }
            transpose(pair);
            char* to = room + head * head_bytes() + (block * width + d) * 64;
            for (int i = 0; i < TILE; i++) _mm512_store_si512(to + 64 * i, pair[i]);
        }
        const int64_t last = keys() / TILE * TILE;
        if (block != value_blocks() - 1) return;
        char* to = room + head * head_bytes() + value_bytes();
        memset(to, 0, TILE * width * 2);
        for (int64_t i = 0; last + i < keys(); i++)
            memcpy(to + i * width * 2, k + (last + i) * k_token + head * k_head, width * 2);
    }

    TILES_TARGET INLINE_TILES __m512i value(int64_t head, int64_t key, int64_t d) const {
        if (key >= keys()) return _mm512_setzero_si512();
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(v + key * v_token + head * v_head + d)));
    }

    // 16 tokens of a query head.
    TILES_TARGET void run(int64_t head, int64_t block, const char* room) const {
        const int64_t kv = head / (heads / kv_heads), first = block * TILE, n = std::min<int64_t>(TILE, tokens - first);
        const char *values = room + kv * head_bytes(), *last_keys = values + value_bytes();
        alignas(64) char queries[WIDEST / DEPTH * BYTES], weights[KEYS / DEPTH * BYTES];
        alignas(64) float logits[KEYS * TILE], sums[WIDEST * TILE];
        for (int64_t d = 0; d < width; d += DEPTH)
            lay_out([&](int i) TILES_TARGET { return q + (first + i) * q_token + head * width + d; }, n, ~0u,
                    queries + d / DEPTH * BYTES);
        memset(sums, 0, width * TILE * sizeof(float));
        vf most = vf{} - __builtin_inff(), total = {};
        const int64_t position = start + first, end = position + n;
        for (int64_t key = 0; key < end; key += KEYS) {
            const int64_t count = std::min<int64_t>(KEYS, end - key);
            for (int64_t i = 0; i < count; i += TILE) {
                const bool whole = key + i + TILE <= keys();
                const void* rows = whole ? (const void*)(k + (key + i) * k_token + kv * k_head) : last_keys;
                _tile_zero(0);
                for (int64_t d = 0; d < width; d += DEPTH) {
                    _tile_loadd(4, (const char*)rows + 2 * d, whole ? 2 * k_token : 2 * width);
                    _tile_loadd(6, queries + d / DEPTH * BYTES, 64);
                    _tile_dpbf16ps(0, 4, 6);
                }
                _tile_stored(0, logits + i * TILE, 64);
            }
            const vf before = most;
            most = weigh(logits, count, key - position, most, total, weights);
            scale(sums, exp2_vector(before - most));
            for (int64_t d = 0; d < width; d += 2 * TILE) {
                _tile_loadd(0, sums + d * TILE, 64);
                _tile_loadd(1, sums + (d + TILE) * TILE, 64);
                for (int64_t i = 0; i < count; i += DEPTH) {
                    const char* tile = values + ((key + i) / DEPTH * width + d) * 64;
                    _tile_loadd(6, weights + i / DEPTH * BYTES, 64);
                    _tile_loadd(4, tile, 64);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_loadd(5, tile + BYTES, 64);
                    _tile_dpbf16ps(1, 5, 6);
                }
                _tile_stored(0, sums + d * TILE, 64);
                _tile_stored(1, sums + (d + TILE) * TILE, 64);
            }
        }
        scale(sums, 1.0f / total);
        int64_t places[TILE];
        for (int i = 0; i < TILE; i++) places[i] = first + i;
        for (int64_t d = 0; d < width; d += ROWS)
            put<ROWS>(sums + d * TILE, sums + (d + TILE) * TILE, nullptr, places, n, ROWS, out + head * width + d,
                      heads * width);
    }

    // Of logits the weights that tiles read, and their sum added to `total`, which is scaled first; returns the largest
    // logits so far. `ahead`: how far the first key is behind the first query; keys behind a query weigh nothing.
    TILES_TARGET INLINE_TILES vf weigh(float* logits, int64_t count, int64_t ahead, vf before, vf& total,
                                       char* weights) const {
        const float factor = 1.44269504f / __builtin_sqrtf((float)width);
        vf most = before;
        for (int64_t i = 0; i < count; i++) {
            vf logit = load<vf>(logits + i * TILE) * factor;
            if (ahead + i > 0) {
                const __mmask16 seen = ahead + i < TILE ? 0xffff << (ahead + i) : 0;
                logit = (vf)_mm512_mask_mov_ps((__m512)(vf{} - __builtin_inff()), seen, (__m512)logit);
            }
            most = logit > most ? logit : most;
            memcpy(logits + i * TILE, &logit, sizeof logit);
        }
        total = total * exp2_vector(before - most);
        for (int64_t i = 0; i < (count + DEPTH - 1) / DEPTH * DEPTH; i += 2) {
            const vf even = i < count ? exp2_vector(load<vf>(logits + i * TILE) - most) : vf{};
            const vf odd = i + 1 < count ? exp2_vector(load<vf>(logits + (i + 1) * TILE) - most) : vf{};
            total = total + even;
            total = total + odd;
            _mm512_store_si512(weights + i * 32, in_pairs((__m512)even, (__m512)odd));
        }
        return most;
    }

    TILES_TARGET INLINE_TILES void scale(float* sums, vf by) const {
        for (int64_t d = 0; d < width; d++) {
            const vf scaled = load<vf>(sums + d * TILE) * by;
            memcpy(sums + d * TILE, &scaled, sizeof scaled);
        }
    }
};

TILES_TARGET void attend(const Prompt& prompt, int threads) {
    const Staged staged(prompt.kv_heads * prompt.head_bytes());
    const int64_t blocks = prompt.value_blocks(), units = prompt.heads * prompt.blocks();
    std::atomic<int64_t> taken{0};
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t i = 0; i < prompt.kv_heads * blocks; i++) prompt.stage(i / blocks, i % blocks, staged.data);
        load_config();
        for (int64_t unit = taken++; unit < units; unit = taken++)  // the last tokens, which see the most, first
            prompt.run(unit % prompt.heads, prompt.blocks() - 1 - unit / prompt.heads, staged.data);
        _tile_release();
    }
}

}  // namespace
#endif

// out (tokens, heads, width) contiguous = attention of q over k and v, (start + tokens, kv_heads, width), whose last rows
// are the tokens' own; bf16, strides in elements, of tokens and of heads. Returns 0, or -1 where there are no tiles or
// no way for such a width.
extern "C" int64_t accessory_attend_prompt(const void* q, const void* k, const void* v, void* out, int64_t tokens,
                                           int64_t start, int64_t heads, int64_t kv_heads, int64_t width,
                                           int64_t q_token, int64_t k_token, int64_t k_head, int64_t v_token,
                                           int64_t v_head, int threads) {
#ifdef HAS_TILES
    if (!tiles_serve() || width % DEPTH || width > WIDEST || width < DEPTH) return -1;
    const Prompt prompt{(const uint16_t*)q, (const uint16_t*)k, (const uint16_t*)v, (uint16_t*)out, tokens,  start,
                        heads,              kv_heads,           width,              q_token,        k_token, k_head,
                        v_token,            v_head};
    attend(prompt, threads);
    return 0;
#else
    return -1;
#endif
}
