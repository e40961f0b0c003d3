// How the products of many tokens go about their work by the tiles of AMX: see tiles.cpp and tiles_int8.cpp.
//
// A tile is 16 rows of 64 bytes. 16 rows of a weight, 64 bytes of each, are one as they lie in memory. Tokens are laid
// out anew, once for a product, 16 of them across a tile. So a weight is read in place and once for all tokens of its
// expert. Each result is summed in the order of its elements: it does not depend on the other tokens.
#pragma once

#include "amx.h"

#ifdef HAS_TILES
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

namespace {

constexpr int TILE = 16;            // tokens, or rows of a weight
constexpr int64_t BYTES = 1024;     // of a tile
constexpr int ROWS = 2 * TILE;      // of a weight that go through all tokens of a panel together
constexpr int64_t PANEL = 1 << 20;  // bytes of staged tokens that stay in the second cache
constexpr int64_t SHARES = 8;       // for each thread, at least, where there are as many row blocks

inline int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// The tokens [first, first + n) of an expert; `block`: how many blocks of 16 tokens the groups before it have.
struct Group {
    int64_t expert, first, n, block;
    int64_t blocks() const { return up(n, TILE); }
};

// Some rows' products with a panel of a group's tokens.
struct Share {
    const Group* group;
    int64_t row, last_row, block, last_block;
};

inline std::vector<Group> groups_of(const int32_t* offsets, int64_t experts) {
    std::vector<Group> groups;
    int64_t blocks = 0;
    for (int64_t e = 0, first = 0; e < experts; first = offsets[e++]) {
        if (offsets[e] <= first) continue;
        groups.push_back({e, first, offsets[e] - first, blocks});
        blocks += groups.back().blocks();
    }
    return groups;
}

inline std::vector<Share> shares_of(const std::vector<Group>& groups, int64_t rows, int64_t block_bytes, int64_t parts) {
    const int64_t panel = std::max<int64_t>(2, PANEL / std::max<int64_t>(1, block_bytes) / 2 * 2);
    const int64_t row_blocks = up(rows, ROWS);
    int64_t all = 0;
    for (const Group& g : groups) all += up(g.blocks(), panel) * row_blocks;
    const int64_t each = ROWS * std::max<int64_t>(1, std::min(all / (SHARES * parts), up(row_blocks, 2)));
    std::vector<Share> shares;
    for (const Group& g : groups)
        for (int64_t block = 0; block < g.blocks(); block += panel)
            for (int64_t row = 0; row < rows; row += each)
                shares.push_back({&g, row, std::min(row + each, rows), block, std::min(block + panel, g.blocks())});
    return shares;
}

// The product of all groups. `way` has
//   rows               of a weight
//   block_bytes()      of 16 staged tokens
//   stage(g, b, to)    lays out the b-th 16 tokens of a group
//   ahead(e, row)      where 32 rows of an expert lie that can be read ahead, else null
//   run(share, row, staged, ahead, room)   32 rows with a share's tokens; `room` is the thread's own
template <class Way> TILES_TARGET void multiply_groups(const Way& way, const std::vector<Group>& groups, int threads) {
    if (groups.empty()) return;
    const int64_t bytes = way.block_bytes(), blocks = groups.back().block + groups.back().blocks();
    const std::unique_ptr<char[]> room(new char[blocks * bytes + 64]);  // not filled: a thread writes what it stages
    char* staged = room.get() + (64 - (uintptr_t)room.get() % 64) % 64;
    const std::vector<Share> shares = shares_of(groups, way.rows, bytes, threads);
    std::atomic<size_t> taken{0};
#pragma omp parallel num_threads(threads)
    {
        for (const Group& g : groups)
            for (int64_t b = 0; b < g.blocks(); b++)
                if ((g.block + b) % omp_get_num_threads() == omp_get_thread_num())
                    way.stage(g, b, staged + (g.block + b) * bytes);
#pragma omp barrier
        std::vector<char> own;
        load_config();
        for (size_t at = taken++; at < shares.size();) {  // each thread takes the next share when it has done one
            const Share& s = shares[at];
            at = taken++;
            for (int64_t row = s.row; row < s.last_row; row += ROWS) {
                const char* ahead = row + ROWS < s.last_row ? way.ahead(s.group->expert, row + ROWS)
                                    : at < shares.size()    ? way.ahead(shares[at].group->expert, shares[at].row)
                                                            : nullptr;
                way.run(s, row, staged + s.group->block * bytes, ahead, own);
            }
        }
        _tile_release();
    }
}

// Sums of 32 rows with 16 tokens, a row's together, times their rows' scales (null: 1), to the first n tokens' results
// from `y` on, `stride` elements apart; `many` rows are wanted.
TILES_TARGET INLINE_TILES void put(const float* low, const float* high, const float* scales, int64_t n,
                                   int64_t many, uint16_t* y, int64_t stride) {
    alignas(64) static constexpr uint16_t IN_PAIRS[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                          8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i in_pairs = _mm512_load_si512(IN_PAIRS);
    __m512i token[TILE];  // first two neighbouring rows' results of each token
    for (int i = 0; i < ROWS; i += 2) {
        const float* from = (i < TILE ? low : high) + i % TILE * TILE;
        __m512 even = _mm512_load_ps(from), odd = _mm512_load_ps(from + TILE);
        if (scales) {
            even = _mm512_mul_ps(even, _mm512_set1_ps(scales[i]));
            odd = _mm512_mul_ps(odd, _mm512_set1_ps(scales[i + 1]));
        }
        token[i / 2] = _mm512_permutexvar_epi16(in_pairs, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
    }
    transpose(token);
    const __mmask32 mask = many < ROWS ? (1u << many) - 1 : ~0u;
    for (int i = 0; i < n; i++) _mm512_mask_storeu_epi16(y + i * stride, mask, token[i]);
}

}  // namespace
#endif
