// The products of many tokens with plain weights on CPU: y[p, r] = sum_d x[p, d] * w[e(p), r, d] in bf16, summed in
// float32, by the tiles of AMX (tiles.h). oneDNN would reorder a weight at every call.

#include "tiles.h"

#ifdef HAS_TILES
namespace {

constexpr int DEPTH = 32;  // elements of a tile's row

struct Plain {
    const uint16_t* x;
    const uint16_t* w;
    uint16_t* y;
    int64_t rows, depth, expert_stride, row_stride;  // of w, in elements

    int64_t depths() const { return up(depth, DEPTH); }
    int64_t block_bytes() const { return depths() * BYTES; }

    const char* at(int64_t expert, int64_t row) const {
        return (const char*)(w + expert * expert_stride + row * row_stride);
    }
    const char* ahead(int64_t expert, int64_t row) const { return row + ROWS > rows ? nullptr : at(expert, row); }

    // Tiles of 16 tokens, one for each 32 elements: pairs of elements down, tokens across.
    TILES_TARGET void stage(const Group& g, int64_t block, char* to) const {
        const int64_t n = std::min<int64_t>(TILE, g.n - block * TILE);
        for (int64_t d = 0; d < depth; d += DEPTH, to += BYTES) {
            const __mmask32 mask = depth - d < DEPTH ? (1u << (depth - d)) - 1 : ~0u;
            __m512i token[TILE];
            for (int i = 0; i < TILE; i++) {
                const uint16_t* from = x + (g.first + block * TILE + i) * depth + d;
                token[i] = i < n ? _mm512_maskz_loadu_epi16(mask, from) : _mm512_setzero_si512();
            }
            transpose(token);
            for (int i = 0; i < TILE; i++) _mm512_store_si512(to + 64 * i, token[i]);
        }
    }

    TILES_TARGET void run(const Share& s, int64_t row, const char* staged, const char* ahead,
                          std::vector<char>& room) const {
        const int64_t many = std::min<int64_t>(ROWS, rows - row), passes = up(s.last_block - s.block, 2);
        int64_t stride = 2 * row_stride;
        const char* a = at(s.group->expert, row);
        if (many < ROWS || depth % DEPTH) {  // filled up with zeros
            const char* from = a;
            room.assign(ROWS * depths() * 64, 0);
            for (int64_t i = 0; i < many; i++) memcpy(room.data() + i * depths() * 64, from + i * stride, 2 * depth);
            a = room.data(), stride = depths() * 64;
        }
        alignas(64) float sums[4][TILE * TILE];
        for (int64_t block = s.block, pass = 0; block < s.last_block; block += 2, pass++) {
            const int64_t begin = ROWS * pass / passes, fetched = ahead ? ROWS * (pass + 1) / passes - begin : 0;
            const char* next = ahead + begin * 2 * row_stride;
            const char* b = staged + block * block_bytes();
            const bool two = block + 1 < s.last_block;
            if (two)
                multiply<true>(a, stride, b, next, fetched);
            else
                multiply<false>(a, stride, b, next, fetched);
            _tile_stored(0, sums[0], 64);
            _tile_stored(1, sums[1], 64);
            _tile_stored(2, sums[2], 64);
            _tile_stored(3, sums[3], 64);
            for (int half = 0; half < 1 + two; half++) {
                const int64_t token = (block + half) * TILE, n = std::min<int64_t>(TILE, s.group->n - token);
                put(sums[half], sums[2 + half], nullptr, n, many, y + (s.group->first + token) * rows + row, rows);
            }
        }
    }

    // 32 rows with the 16 or 32 tokens at `b`, while so many rows of the next ones are read ahead.
    template <bool TWO>
    TILES_TARGET void multiply(const char* a, int64_t stride, const char* b, const char* ahead, int64_t fetched) const {
        const int64_t count = depths();
        const char* next = b + count * BYTES;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < count; k++) {
            _tile_loadd(4, a + 64 * k, stride);
            _tile_loadd(6, b + BYTES * k, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, a + TILE * stride + 64 * k, stride);
            _tile_dpbf16ps(2, 5, 6);
            if (TWO) {
                _tile_loadd(7, next + BYTES * k, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
            for (int64_t i = 0; i < fetched; i++) _mm_prefetch(ahead + i * 2 * row_stride + 64 * k, _MM_HINT_T1);
        }
    }
};

}  // namespace
#endif

// x (pairs, depth) and y (pairs, rows) contiguous, bf16. The rows of x before offsets[0] are expert 0's, those from there
// to offsets[1] expert 1's, and so on. w (experts, rows, depth) has unit stride along depth, the others in elements.
// Returns 0, or -1 where there are no tiles.
extern "C" int64_t accessory_tiled_linear(const void* x, const void* w, const int32_t* offsets, void* y,
                                          int64_t experts, int64_t rows, int64_t depth, int64_t expert_stride,
                                          int64_t row_stride, int threads) {
#ifdef HAS_TILES
    if (!tiles_serve()) return -1;
    const Plain way{(const uint16_t*)x, (const uint16_t*)w, (uint16_t*)y, rows, depth, expert_stride, row_stride};
    multiply_groups(way, groups_of(offsets, experts), threads);
    return 0;
#else
    return -1;
#endif
}

// 1 where this process may use tiles.
extern "C" int accessory_has_tiles() {
#ifdef HAS_TILES
    return tiles_serve();
#else
    return 0;
#endif
}
