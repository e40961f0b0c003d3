// The products with plain weights on CPU by the tiles of AMX (tiles.h), for any number of tokens:
// y[p, r] = sum_d x[p, d] * w[e(p), r, d] in bf16, summed in float32. oneDNN would reorder a weight at every call.

#include "tiles.h"

#ifdef HAS_TILES
namespace {

constexpr int DEPTH = 32;  // elements of a tile's row

// GATED: w has two halves of `rows` rows, and y is silu(the first's product) * the second's, of products rounded to bf16.
template <bool GATED> struct Plain {
    static constexpr int STEP = GATED ? TILE : ROWS;

    const uint16_t* x;
    const uint16_t* w;
    uint16_t* y;
    int64_t rows, depth, expert_stride, row_stride;  // of w, in elements
    const int64_t* order;
    int64_t each;  // row of x stands for so many tokens one after another

    int64_t depths() const { return up(depth, DEPTH); }
    int64_t block_bytes() const { return depths() * BYTES; }
    // From the rows of one tile to those of the other, in bytes.
    int64_t between() const { return 2 * row_stride * (GATED ? rows : TILE); }

    const char* at(int64_t expert, int64_t row) const {
        return (const char*)(w + expert * expert_stride + row * row_stride);
    }
    const char* ahead(int64_t expert, int64_t row) const { return row + STEP > rows ? nullptr : at(expert, row); }

    // Tiles of 16 tokens, one for each 32 elements: pairs of elements down, tokens across.
    TILES_TARGET void stage(const Tokens& t, int64_t block, char* to) const {
        const int64_t n = t.in(block), *own = order + t.group.first + block * TILE;
        const uint16_t* from[TILE];
        for (int i = 0; i < n; i++) from[i] = x + own[i] / each * depth;
        for (int64_t d = 0; d < depth; d += DEPTH, to += BYTES) {
            const __mmask32 mask = depth - d < DEPTH ? (1u << (depth - d)) - 1 : ~0u;
            lay_out([&](int i) TILES_TARGET { return from[i] + d; }, n, mask, to);
        }
    }

    TILES_TARGET void run(const Share& s, int64_t row, const char* staged, const char* ahead,
                          std::vector<char>& room) const {
        const Tokens& t = *s.tokens;
        const int64_t many = std::min<int64_t>(STEP, rows - row), passes = up(s.last_block - s.block, 2);
        int64_t stride = 2 * row_stride, apart = between();
        const char* a = at(t.group.expert, row);
        if (many < STEP || depth % DEPTH) {  // filled up with zeros
            room.assign(ROWS * depths() * 64, 0);
            for (int64_t i = 0; i < ROWS; i++)
                if ((GATED ? i % TILE : i) < many)
                    memcpy(room.data() + i * depths() * 64, a + i / TILE * apart + i % TILE * stride, 2 * depth);
            a = room.data(), stride = depths() * 64, apart = TILE * stride;
        }
        alignas(64) float sums[4][TILE * TILE];
        const int64_t lines = ahead ? up(TILE, passes) : 0;
        for (int64_t block = s.block; block < s.last_block; block += 2, ahead += lines * depths() * 64) {
            const char* b = staged + block * block_bytes();
            const bool two = block + 1 < s.last_block;
            if (two)
                multiply<true>(a, stride, apart, b, ahead, lines);
            else
                multiply<false>(a, stride, apart, b, ahead, lines);
            _tile_stored(0, sums[0], 64);
            _tile_stored(1, sums[1], 64);
            _tile_stored(2, sums[2], 64);
            _tile_stored(3, sums[3], 64);
            for (int half = 0; half < 1 + two; half++) {
                if (GATED) gate(sums[half], sums[2 + half]);
                put<STEP>(sums[half], sums[2 + half], nullptr, order + t.group.first + (block + half) * TILE,
                          t.in(block + half), many, y + row, rows);
            }
        }
    }

    // 16 rows and the 16 others with the 16 or 32 tokens at `b`, while so many lines of the next of each are read ahead.
    template <bool TWO>
    TILES_TARGET void multiply(const char* a, int64_t stride, int64_t apart, const char* b, const char* ahead,
                               int64_t lines) const {
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
            _tile_loadd(5, a + apart + 64 * k, stride);
            _tile_dpbf16ps(2, 5, 6);
            if (TWO) {
                _tile_loadd(7, next + BYTES * k, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
            fetch(ahead, k, lines);
            fetch(ahead + between(), k, lines);
        }
    }

    TILES_TARGET static INLINE_TILES void gate(float* first, const float* second) {
        using namespace wide;
        for (int i = 0; i < TILE * TILE; i += TILE) {
            const vf g = (vf)(upper_half(load<vf>(first + i)) & 0xffff0000u);
            const vf u = (vf)(upper_half(load<vf>(second + i)) & 0xffff0000u);
            const vf gated = silu(g) * u;
            memcpy(first + i, &gated, sizeof gated);
        }
    }
};

template <bool GATED>
int64_t multiply(const void* x, const void* w, const int64_t* expert, void* y, int64_t tokens, int64_t experts,
                 int64_t rows, int64_t depth, int64_t expert_stride, int64_t row_stride, int64_t each, int threads) {
    if (!tiles_serve()) return -1;
    const int64_t bad = check_experts(expert, tokens, experts, (char*)y, 2 * rows);
    if (bad) return bad;
    const Schedule schedule(expert, tokens, rows);
    const Plain<GATED> way{(const uint16_t*)x, (const uint16_t*)w, (uint16_t*)y,   rows,
                           depth,              expert_stride,      row_stride, schedule.order.data(), each};
    const bool many = schedule.order.size() > 4 * TILE;  // tokens, which pay for a team by themselves
    multiply_groups(way, schedule, many ? threads : schedule.threads(2 * depth, threads));
    return 0;
}

}  // namespace
#endif

// As accessory_gathered_linear, in bf16. Returns -1, too, where there are no tiles.
int64_t tiled_linear(const void* x, const void* w, const int64_t* expert, void* y, int64_t tokens, int64_t experts,
                     int64_t rows, int64_t depth, int64_t expert_stride, int64_t row_stride, int threads) {
#ifdef HAS_TILES
    return multiply<false>(x, w, expert, y, tokens, experts, rows, depth, expert_stride, row_stride, 1, threads);
#else
    return -1;
#endif
}

// y (tokens, f) = silu(first half) * second half of the products with w (experts, 2 f, depth), where each row of x stands
// for so many tokens one after another; the rest as above.
extern "C" int64_t accessory_gathered_gate(int64_t each, const void* x, const void* w, const int64_t* expert, void* y,
                                           int64_t tokens, int64_t experts, int64_t f, int64_t depth,
                                           int64_t expert_stride, int64_t row_stride, int threads) {
#ifdef HAS_TILES
    return multiply<true>(x, w, expert, y, tokens, experts, f, depth, expert_stride, row_stride, each, threads);
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
