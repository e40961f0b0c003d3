// How the products of many tokens go about their work by the tiles of AMX: see tiles.cpp and tiles_int8.cpp.
//
// A tile is 16 rows of 64 bytes. 16 rows of a weight, 64 bytes of each, are one as they lie in memory. Tokens are laid
// out anew, once for a product, 16 of them across a tile. So a weight is read in place and once for all tokens of its
// expert. Each result is summed in the order of its elements: it does not depend on the other tokens.
#pragma once

#include "amx.h"
#include "schedule.h"
#include "target.h"

#ifdef HAS_TILES
#include <omp.h>

#include <atomic>
#include <memory>

BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma")
namespace {
namespace wide {
#define VL 64
#include "elements.h"
#undef VL
}  // namespace wide
}  // namespace
END_TARGET

namespace {

constexpr int TILE = 16;            // tokens, or rows of a weight
constexpr int64_t BYTES = 1024;     // of a tile
constexpr int ROWS = 2 * TILE;      // of a weight that go through all tokens of a panel together
constexpr int64_t PANEL = 1 << 20;  // bytes of staged tokens that stay in the second cache
constexpr int64_t SHARES = 8;       // for each thread, at least, where there are as many row blocks
constexpr int64_t KEPT = 8 << 20;   // bytes of staged tokens that a thread keeps room for

inline int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// An expert's tokens, in blocks of 16; `block`: how many blocks the groups before it have.
struct Tokens {
    const Group& group;
    int64_t block;
    int64_t blocks() const { return up(group.n, TILE); }
    int64_t in(int64_t b) const { return std::min<int64_t>(TILE, group.n - b * TILE); }
};

// Some outputs' products with a panel of an expert's tokens.
struct Share {
    const Tokens* tokens;
    int64_t row, last_row, block, last_block;
};

inline std::vector<Tokens> tokens_of(const Schedule& schedule) {
    std::vector<Tokens> all;
    int64_t block = 0;
    for (const Group& g : schedule.groups) {
        all.push_back({g, block});
        block += all.back().blocks();
    }
    return all;
}

inline std::vector<Share> shares_of(const std::vector<Tokens>& tokens, int64_t rows, int64_t step, int64_t block_bytes,
                                    int64_t parts) {
    const int64_t panel = std::max<int64_t>(2, PANEL / std::max<int64_t>(1, block_bytes) / 2 * 2);
    const int64_t row_blocks = up(rows, step);
    int64_t all = 0;
    for (const Tokens& t : tokens) all += up(t.blocks(), panel) * row_blocks;
    const int64_t each = step * std::max<int64_t>(1, std::min(all / (SHARES * parts), up(row_blocks, 2)));
    std::vector<Share> shares;
    for (const Tokens& t : tokens)
        for (int64_t block = 0; block < t.blocks(); block += panel)
            for (int64_t row = 0; row < rows; row += each)
                shares.push_back({&t, row, std::min(row + each, rows), block, std::min(block + panel, t.blocks())});
    return shares;
}

// At least so many bytes, unset, that begin a line of the cache. Small ones are kept for the thread's next product:
// memory that comes fresh from the system costs more than what is written to it.
struct Staged {
    explicit Staged(int64_t bytes) {
        thread_local std::unique_ptr<char[]> kept;
        thread_local int64_t size = 0;
        if (bytes > KEPT) own.reset(new char[bytes + 64]);
        else if (bytes > size) kept.reset(new char[(size = bytes) + 64]);
        char* begin = own ? own.get() : kept.get();
        data = begin + (64 - (uintptr_t)begin % 64) % 64;
    }
    std::unique_ptr<char[]> own;
    char* data;
};

// The product of all tokens. `way` has
//   rows               outputs of a weight
//   STEP               of them that `run` makes
//   block_bytes()      of 16 staged tokens
//   stage(t, b, to)    lays out the b-th 16 tokens of an expert
//   ahead(e, row)      where the weights of so many outputs lie that can be read ahead, else null
//   run(share, row, staged, ahead, room)   the outputs from `row` on, for a share's tokens; `room` is the thread's own
template <class Way> TILES_TARGET void multiply_groups(const Way& way, const Schedule& schedule, int threads) {
    const std::vector<Tokens> tokens = tokens_of(schedule);
    if (tokens.empty()) return;
    const int64_t bytes = way.block_bytes(), blocks = tokens.back().block + tokens.back().blocks();
    const Staged staged(blocks * bytes);
    const std::vector<Share> shares = shares_of(tokens, way.rows, Way::STEP, bytes, threads);
    const auto stage = [&](int64_t part, int64_t parts) TILES_TARGET {
        for (const Tokens& t : tokens)
            for (int64_t b = 0; b < t.blocks(); b++)
                if ((t.block + b) % parts == part) way.stage(t, b, staged.data + (t.block + b) * bytes);
    };
    // Few by this thread alone: a barrier costs more, where cores are shared a whole time slice.
    const bool alone = blocks <= 4 * threads;
    if (alone) stage(0, 1);
    std::atomic<size_t> taken{0};
#pragma omp parallel num_threads(threads)
    {
        if (!alone) {
            stage(omp_get_thread_num(), omp_get_num_threads());
#pragma omp barrier
        }
        std::vector<char> own;
        load_config();
        for (size_t at = taken++; at < shares.size();) {  // each thread takes the next share when it has done one
            const Share& s = shares[at];
            at = taken++;
            for (int64_t row = s.row; row < s.last_row; row += Way::STEP) {
                const char* ahead = row + Way::STEP < s.last_row ? way.ahead(s.tokens->group.expert, row + Way::STEP)
                                    : at < shares.size() ? way.ahead(shares[at].tokens->group.expert, shares[at].row)
                                                         : nullptr;
                way.run(s, row, staged.data + s.tokens->block * bytes, ahead, own);
            }
        }
        _tile_release();
    }
}

// Two rows rounded to bf16, each element of one beside that of the other.
TILES_TARGET INLINE_TILES __m512i in_pairs(__m512 even, __m512 odd) {
    alignas(64) static constexpr uint16_t IN_PAIRS[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                          8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(IN_PAIRS), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// Sums of 16 or 32 rows with 16 tokens, a row's together, times their rows' scales (null: 1), to the places that `order`
// gives the first n tokens in y, whose rows are `stride` elements long; `many` rows are wanted.
template <int COUNT>
TILES_TARGET INLINE_TILES void put(const float* low, const float* high, const float* scales, const int64_t* order,
                                   int64_t n, int64_t many, uint16_t* y, int64_t stride) {
    __m512i token[TILE];  // first two neighbouring rows' results of each token
    for (int i = 0; i < ROWS; i += 2) {
        if (i >= COUNT) {
            token[i / 2] = _mm512_setzero_si512();
            continue;
        }
        const float* from = (i < TILE ? low : high) + i % TILE * TILE;
        __m512 even = _mm512_load_ps(from), odd = _mm512_load_ps(from + TILE);
        if (scales) {
            even = _mm512_mul_ps(even, _mm512_set1_ps(scales[i]));
            odd = _mm512_mul_ps(odd, _mm512_set1_ps(scales[i + 1]));
        }
        token[i / 2] = in_pairs(even, odd);
    }
    transpose(token);
    const __mmask32 mask = many < ROWS ? (1u << many) - 1 : ~0u;
    for (int i = 0; i < n; i++) _mm512_mask_storeu_epi16(y + order[i] * stride, mask, token[i]);
}

// A tile of 16 tokens, n of them from `from(i)` on: pairs of the elements that `mask` leaves down, tokens across.
template <class From> TILES_TARGET INLINE_TILES void lay_out(const From& from, int64_t n, __mmask32 mask, char* to) {
    __m512i token[TILE];
    for (int i = 0; i < TILE; i++) token[i] = i < n ? _mm512_maskz_loadu_epi16(mask, from(i)) : _mm512_setzero_si512();
    transpose(token);
    for (int i = 0; i < TILE; i++) _mm512_store_si512(to + 64 * i, token[i]);
}

// Reads `lines` of the cache ahead, the k-th of as many that lie one after another: of weights that are read as one
// stream the machine fetches more by itself.
TILES_TARGET INLINE_TILES void fetch(const char* from, int64_t k, int64_t lines) {
    for (int64_t i = 0; i < lines; i++) _mm_prefetch(from + 64 * (k * lines + i), _MM_HINT_T1);
}

}  // namespace
#endif
