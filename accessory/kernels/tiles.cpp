// The products of many tokens on CPU: y[p, r] = sum_d x[p, d] * w[e(p), r, d] in bf16, summed in float32, by the tiles
// of AMX.
//
// A tile is 16 rows of 64 bytes. 16 rows of a weight, 32 elements of each, are one as they lie in memory. Tokens are
// laid out anew, once for a product: pairs of elements down, tokens across. So a weight is read in place and once for
// all tokens of its expert, where oneDNN would reorder it at every call. Each result is summed in the order of its
// elements: it does not depend on the other tokens.

#include "amx.h"
#include "quantized_weight.h"

#ifdef HAS_TILES
#include <omp.h>

#include <algorithm>
#include <memory>
#include <vector>

namespace {

constexpr int TILE = 16;                   // tokens, or rows of a weight
constexpr int DEPTH = 32;                  // elements of a row
constexpr int64_t BYTES = 1024;            // of a tile
constexpr int ROWS = 2 * TILE;             // of a weight that go through all tokens of a panel together
constexpr int64_t PANEL = 512 << 10;       // bytes of staged tokens, and of rows, that stay in the second cache
constexpr int64_t ROW_COST = 2;            // reading a row costs about as much as the arithmetic of so many tiles

int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// The tokens [first, first + n) of an expert; their tiles begin at `staged`.
struct Group {
    int64_t expert, first, n, staged, cost_before;
    int64_t blocks() const { return up(n, TILE); }
};

// A weight of (rows, depth) for each expert: plain, with strides in elements, or quantized.
struct Weight {
    const uint16_t* plain;
    int64_t rows, depth, expert_stride, row_stride;
    const accessory_quantized_weight* quantized;
    const char* variant;  // of what makes quantized rows plain

    // 32 rows from `row` on, `stride` bytes apart: where they lie, or a copy in `room` that zeros fill up.
    const char* tiles(int64_t expert, int64_t row, std::vector<char>& room, int64_t& stride) const {
        const int64_t many = std::min<int64_t>(ROWS, rows - row);
        const uint16_t* from = plain + expert * expert_stride + row * row_stride;
        stride = 2 * row_stride;
        if (!quantized && many == ROWS && depth % DEPTH == 0) return (const char*)from;
        stride = up(depth, DEPTH) * 2 * DEPTH;
        if (many < ROWS || depth % DEPTH) room.assign(ROWS * stride, 0);
        room.resize(ROWS * stride);
        if (quantized) accessory_expand_rows(variant, quantized, expert, row, many, room.data(), stride);
        for (int64_t i = 0; !quantized && i < many; i++)
            memcpy(room.data() + i * stride, from + i * row_stride, 2 * depth);
        return room.data();
    }
};

struct Product {
    const uint16_t* x;
    const Weight& w;
    uint16_t* y;
    std::vector<Group> groups;
    char* staged;
    int64_t cost;

    int64_t depths() const { return up(w.depth, DEPTH); }
    int64_t row_blocks() const { return up(w.rows, ROWS); }

    // Tiles of 16 tokens, one for each 32 elements.
    TILES_TARGET void stage(const Group& g, int64_t block) const {
        const int64_t n = std::min<int64_t>(TILE, g.n - block * TILE);
        char* to = staged + g.staged + block * depths() * BYTES;
        for (int64_t at = 0; at < w.depth; at += DEPTH, to += BYTES) {
            const __mmask32 mask = w.depth - at < DEPTH ? (1u << (w.depth - at)) - 1 : ~0u;
            __m512i token[TILE];
            for (int i = 0; i < TILE; i++) {
                const uint16_t* from = x + (g.first + block * TILE + i) * w.depth + at;
                token[i] = i < n ? _mm512_maskz_loadu_epi16(mask, from) : _mm512_setzero_si512();
            }
            transpose(token);
            for (int i = 0; i < TILE; i++) _mm512_store_si512(to + 64 * i, token[i]);
        }
    }

    // One row block through the tiles [from, to) of a group's tokens. `a`: its rows, `stride` bytes apart.
    TILES_TARGET void run(const Group& g, int64_t row, const char* a, int64_t stride, int64_t from, int64_t to,
                          bool ahead) const {
        const int64_t many = std::min<int64_t>(ROWS, w.rows - row);
        alignas(64) float sums[4][TILE * TILE];
        for (int64_t block = from; block < to; block += 2) {
            const char* b = staged + g.staged + block * depths() * BYTES;
            const bool two = block + 1 < to;
            if (two)
                multiply<true>(a, stride, b, ahead && block == from);
            else
                multiply<false>(a, stride, b, ahead && block == from);
            store_tiles(sums, two);
            for (int half = 0; half < 1 + two; half++)
                for (int part = 0; part * TILE < many; part++)
                    put(g, block + half, row + part * TILE, sums[2 * part + half]);
        }
    }

    template <bool TWO>
    TILES_TARGET void multiply(const char* a, int64_t stride, const char* b, bool ahead) const {
        const int64_t count = depths();
        const char* next = b + count * BYTES;
        _tile_zero(0);
        _tile_zero(2);
        if (TWO) {
            _tile_zero(1);
            _tile_zero(3);
        }
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
            if (ahead)
                for (int i = 0; i < ROWS; i++) _mm_prefetch(a + (ROWS + i) * stride + 64 * k, _MM_HINT_T1);
        }
    }

    TILES_TARGET static void store_tiles(float (*sums)[TILE * TILE], bool two) {
        _tile_stored(0, sums[0], 64);
        _tile_stored(2, sums[2], 64);
        if (!two) return;
        _tile_stored(1, sums[1], 64);
        _tile_stored(3, sums[3], 64);
    }

    // 16 rows' sums with 16 tokens.
    TILES_TARGET void put(const Group& g, int64_t block, int64_t row, const float* sums) const {
        __m512i token[TILE];
        for (int i = 0; i < TILE; i++) token[i] = _mm512_load_si512(sums + TILE * i);
        transpose(token);
        const int64_t left = w.rows - row, n = std::min<int64_t>(TILE, g.n - block * TILE);
        const __mmask16 mask = left < TILE ? (1u << left) - 1 : 0xffff;
        for (int i = 0; i < n; i++) {
            const __m256i halves = (__m256i)_mm512_cvtneps_pbh((__m512)token[i]);
            _mm256_mask_storeu_epi16(y + (g.first + block * TILE + i) * w.rows + row, mask, halves);
        }
    }

    TILES_TARGET void share(int64_t part, int64_t parts) const {
        const int64_t begin = cost * part / parts, end = cost * (part + 1) / parts;
        const int64_t padded = depths() * 64;
        const int64_t panel = std::max<int64_t>(2, PANEL / padded / TILE / 2 * 2);
        const int64_t chunk = std::max<int64_t>(1, PANEL / padded / ROWS);
        std::vector<char> room;
        load_config();
        for (const Group& g : groups) {
            const int64_t each = ROW_COST + g.blocks();
            const auto block_at = [&](int64_t c) {
                return std::clamp<int64_t>(up(c - g.cost_before, each), 0, row_blocks());
            };
            const int64_t last = block_at(end);
            for (int64_t first = block_at(begin); first < last; first += chunk)
                for (int64_t from = 0; from < g.blocks(); from += panel)
                    for (int64_t r = first; r < std::min(last, first + chunk); r++) {
                        int64_t stride;
                        const char* a = w.tiles(g.expert, r * ROWS, room, stride);
                        const bool ahead = from == 0 && a != room.data();
                        run(g, r * ROWS, a, stride, from, std::min(g.blocks(), from + panel), ahead);
                    }
        }
        _tile_release();
    }
};

}  // namespace
#endif

// x (pairs, depth) and y (pairs, rows) contiguous, bf16. The rows of x before offsets[0] are expert 0's, those from there
// to offsets[1] expert 1's, and so on. w (experts, rows, depth) has unit stride along depth; it is null where `quantized`
// is the weight, which a variant of its own expands. Returns 0, or -1 where there are no tiles.
extern "C" int64_t accessory_tiled_linear(const char* variant, const accessory_quantized_weight* quantized,
                                          const void* x, const void* w, const int32_t* offsets, void* y,
                                          int64_t experts, int64_t rows, int64_t depth, int64_t expert_stride,
                                          int64_t row_stride, int threads) {
#ifdef HAS_TILES
    if (!tiles_serve()) return -1;
    const Weight weight{(const uint16_t*)w, rows, depth, expert_stride, row_stride, quantized, variant};
    Product product{(const uint16_t*)x, weight, (uint16_t*)y};
    int64_t bytes = 0;
    for (int64_t e = 0, first = 0; e < experts; first = offsets[e++]) {
        const Group g{e, first, offsets[e] - first, bytes, product.cost};
        if (g.n <= 0) continue;
        product.groups.push_back(g);
        bytes += g.blocks() * product.depths() * BYTES;
        product.cost += product.row_blocks() * (ROW_COST + g.blocks());
    }
    if (product.groups.empty()) return 0;
    const std::unique_ptr<char[]> room(new char[bytes + 64]);  // not filled: a thread writes what it stages
    product.staged = room.get() + (64 - (uintptr_t)room.get() % 64) % 64;
#pragma omp parallel num_threads(threads)
    {
        const int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
        int64_t block = 0;
        for (const Group& g : product.groups)
            for (int64_t b = 0; b < g.blocks(); b++)
                if (block++ % parts == part) product.stage(g, b);
#pragma omp barrier
        product.share(part, parts);
    }
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
