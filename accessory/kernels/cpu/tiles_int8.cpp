// The products of many tokens with quantized weights on CPU, by the tiles of AMX (tiles.h): products of 8-bit integers.
//
// Activations are taken in 8 bits as for few tokens (quantized.cpp): BLOCK neighbours share a scale, by which the integer
// sum of each such block is multiplied. A row of a weight needs one scale, then. int8 has it; rows in 4 bits are rounded
// once more on their way to the tiles, to 127 steps each way of the row's largest possible value.

#include "quantized_weight.h"
#include "tiles.h"

#ifdef HAS_TILES
namespace {

constexpr int DEPTH = 64;                // codes of a tile's row
constexpr int64_t BLOCK_BYTES = 2 * BYTES + 64;  // of 16 tokens: two tiles, and the scales
constexpr float LARGEST = 127;

// 32 rows as tiles read them, `stride` bytes apart, and each row's scale.
struct Rows {
    const char* codes;
    int64_t stride;
    alignas(64) float scales[ROWS];
};

// The levels of a table in 16 bits, twice, the largest as 127 * 16 steps.
struct Steps {
    alignas(64) int16_t levels[32];
    float top = 0;

    explicit Steps(const accessory_levels& of) {
        for (const float level : of.values) top = std::max(top, std::abs(level));
        for (int i = 0; i < 32; i++)
            levels[i] = top > 0 ? (int16_t)__builtin_rintf(of.values[i % 16] / top * 16 * LARGEST) : 0;
    }
};

struct Quantized {
    static constexpr int STEP = ROWS;

    const uint16_t* x;
    const accessory_quantized_weight& w;
    uint16_t* y;
    int64_t rows;
    const int64_t* order;
    const Steps steps{*w.levels};

    int64_t block_bytes() const { return up(w.depth, BLOCK) * BLOCK_BYTES; }
    int64_t row_bytes() const { return w.kind ? w.depth / 2 : w.depth; }
    const char* at(int64_t expert, int64_t row) const { return w.codes + expert * w.codes_expert + row * w.codes_row; }
    const char* ahead(int64_t expert, int64_t row) const { return row + ROWS > rows ? nullptr : at(expert, row); }

    // For each block of 128 activations two tiles, in which each 4 of a token lie below one another, and 16 scales.
    TILES_TARGET void stage(const Tokens& t, int64_t block, char* to) const {
        const int64_t n = t.in(block), *own = order + t.group.first + block * TILE;
        alignas(64) int8_t codes[TILE][BLOCK];
        for (int64_t d = 0; d < w.depth; d += BLOCK, to += BLOCK_BYTES) {
            float* scales = (float*)(to + 2 * BYTES);
            for (int i = 0; i < TILE; i++) {
                scales[i] = i < n ? round_block(x + own[i] * w.depth + d, w.depth - d, codes[i]) : 0;
                if (i >= n) memset(codes[i], 0, BLOCK);
            }
            for (int half = 0; half < 2; half++) {
                __m512i token[TILE];
                for (int i = 0; i < TILE; i++) token[i] = _mm512_load_si512(codes[i] + 64 * half);
                transpose(token);
                for (int i = 0; i < TILE; i++) _mm512_store_si512(to + half * BYTES + 64 * i, token[i]);
            }
        }
    }

    // Up to 128 activations in 8 bits, zeros behind them; their scale, NaN where one of them is not finite.
    TILES_TARGET static float round_block(const uint16_t* from, int64_t count, int8_t* codes) {
        __m512 values[BLOCK / 16];
        __m512i most = _mm512_setzero_si512();  // the bits of non-negative floats order as they do
        for (int v = 0; v < BLOCK / 16; v++) {
            const int64_t left = count - 16 * v;
            const __mmask16 mask = left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
            const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + 16 * v));
            values[v] = (__m512)_mm512_slli_epi32(bits, 16);
            most = _mm512_max_epi32(most, _mm512_and_si512((__m512i)values[v], _mm512_set1_epi32(0x7fffffff)));
        }
        const int32_t bits = _mm512_reduce_max_epi32(most);
        float largest;
        memcpy(&largest, &bits, 4);
        const bool finite = bits < 0x7f800000;
        const __m512 inverse = _mm512_set1_ps(finite && largest > TINY ? LARGEST / largest : 0);
        for (int v = 0; v < BLOCK / 16; v++) {
            const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(values[v], inverse));
            _mm_store_si128((__m128i*)(codes + 16 * v), _mm512_cvtepi32_epi8(finite ? whole : _mm512_setzero_si512()));
        }
        return finite ? largest / LARGEST : __builtin_nanf("");
    }

    TILES_TARGET void run(const Share& s, int64_t row, const char* staged, const char* ahead,
                          std::vector<char>& room) const {
        const Tokens& t = *s.tokens;
        const int64_t many = std::min<int64_t>(ROWS, rows - row), passes = up(s.last_block - s.block, 2);
        const Rows a = rows_at(t.group.expert, row, many, room);
        alignas(64) float sums[4][TILE * TILE];
        const int64_t count = up(w.depth, DEPTH), lines = ahead ? up(ROWS * up(row_bytes(), 64), passes * count) : 0;
        for (int64_t block = s.block; block < s.last_block; block += 2, ahead += lines * count * 64) {
            const char* b = staged + block * block_bytes();
            const bool two = block + 1 < s.last_block;
            if (two)
                multiply<true>(a, b, ahead, lines, sums);
            else
                multiply<false>(a, b, ahead, lines, sums);
            for (int half = 0; half < 1 + two; half++)
                put<ROWS>(sums[half], sums[2 + half], a.scales, order + t.group.first + (block + half) * TILE,
                          t.in(block + half), many, y + row, rows);
        }
    }

    // 32 rows with the 16 or 32 tokens at `b`, while so many lines of the next ones are read ahead for each tile.
    template <bool TWO>
    TILES_TARGET void multiply(const Rows& a, const char* b, const char* ahead, int64_t lines,
                               float (*sums)[TILE * TILE]) const {
        const char* next = b + block_bytes();
        const int64_t tiles = up(w.depth, DEPTH), blocks = up(tiles, 2);
        // While the tiles make one block's integers, those of the two before it are added up.
        alignas(64) int32_t whole[4][4][TILE * TILE];
        for (int64_t block = 0; block < blocks; block++) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t k = 2 * block; k < std::min(tiles, 2 * block + 2); k++) {
                const char* tokens = b + block * BLOCK_BYTES + k % 2 * BYTES;
                _tile_loadd(4, a.codes + 64 * k, a.stride);
                _tile_loadd(6, tokens, 64);
                _tile_dpbssd(0, 4, 6);
                _tile_loadd(5, a.codes + TILE * a.stride + 64 * k, a.stride);
                _tile_dpbssd(2, 5, 6);
                if (TWO) {
                    _tile_loadd(7, tokens + block_bytes(), 64);
                    _tile_dpbssd(1, 4, 7);
                    _tile_dpbssd(3, 5, 7);
                }
                fetch(ahead, k, lines);
            }
            _tile_stored(0, whole[block % 4][0], 64);
            _tile_stored(2, whole[block % 4][2], 64);
            if (TWO) {
                _tile_stored(1, whole[block % 4][1], 64);
                _tile_stored(3, whole[block % 4][3], 64);
            }
            if (block % 2 == 0 && block) add_two<TWO>(sums, whole, block - 2, b, next);
        }
        if (blocks % 2 == 0)
            add_two<TWO>(sums, whole, blocks - 2, b, next);
        else
            add_one<TWO>(sums, whole, blocks - 1, b, next);
    }

    using Whole = int32_t[4][4][TILE * TILE];  // of up to four blocks, the sums of each tile
    using Sums = float (*)[TILE * TILE];

    // A block's integers, times each token's scale, and those of the block behind it.
    template <bool TWO>
    TILES_TARGET static INLINE_TILES void add_two(Sums sums, const Whole& whole, int64_t block, const char* b,
                                                  const char* next) {
        for (int tile = 0; tile < 4; tile += TWO ? 1 : 2) {
            const char* own = tile % 2 ? next : b;
            const __m512 scale = scales_of(own, block), behind = scales_of(own, block + 1);
            const int32_t *first = whole[block % 4][tile], *second = whole[(block + 1) % 4][tile];
            for (int i = 0; i < TILE * TILE; i += TILE) {
                __m512 sum = block ? _mm512_load_ps(sums[tile] + i) : _mm512_setzero_ps();
                sum = _mm512_fmadd_ps(floats(first + i), scale, sum);
                _mm512_store_ps(sums[tile] + i, _mm512_fmadd_ps(floats(second + i), behind, sum));
            }
        }
    }

    template <bool TWO>
    TILES_TARGET static INLINE_TILES void add_one(Sums sums, const Whole& whole, int64_t block, const char* b,
                                                  const char* next) {
        for (int tile = 0; tile < 4; tile += TWO ? 1 : 2) {
            const __m512 scale = scales_of(tile % 2 ? next : b, block);
            for (int i = 0; i < TILE * TILE; i += TILE) {
                const __m512 sum = block ? _mm512_load_ps(sums[tile] + i) : _mm512_setzero_ps();
                _mm512_store_ps(sums[tile] + i, _mm512_fmadd_ps(floats(whole[block % 4][tile] + i), scale, sum));
            }
        }
    }

    TILES_TARGET static INLINE_TILES __m512 scales_of(const char* b, int64_t block) {
        return _mm512_load_ps((const float*)(b + block * BLOCK_BYTES + 2 * BYTES));
    }

    TILES_TARGET static INLINE_TILES __m512 floats(const int32_t* whole) {
        return _mm512_cvtepi32_ps(_mm512_load_si512(whole));
    }

    TILES_TARGET Rows rows_at(int64_t expert, int64_t row, int64_t many, std::vector<char>& room) const {
        Rows to{at(expert, row), w.codes_row, {}};
        const char *scale = w.scale + expert * w.scale_expert + row * w.scale_row, *from = to.codes;
        const char* zero = w.zero ? w.zero + expert * w.zero_expert + row * w.zero_row : nullptr;
        if (w.kind || many < ROWS || w.depth % DEPTH) {
            to.stride = up(w.depth, DEPTH) * DEPTH + 64;  // not a power of two: rows would meet in few sets of the cache
            room.resize(ROWS * to.stride);
            to.codes = room.data();
            if (many < ROWS || w.depth % DEPTH) memset(room.data(), 0, room.size());
        }
        for (int64_t i = 0; i < many; i++, from += w.codes_row, scale += w.scale_row) {
            char* own = room.data() + i * to.stride;
            if (w.kind == 0) {
                if (to.codes == room.data()) memcpy(own, from, w.depth);
                memcpy(to.scales + i, scale, 4);
            } else if (w.kind == 3) {
                to.scales[i] = expand_table<64>(from, (const float*)scale, own);
            } else if (w.kind == 4) {
                to.scales[i] = expand_table<32>(from, (const uint16_t*)scale, own);
            } else {
                const auto expand = w.kind == 1 ? &Quantized::expand_int4<32> : &Quantized::expand_int4<64>;
                to.scales[i] = (this->*expand)(from, (const uint16_t*)scale, (const uint8_t*)zero + i * w.zero_row, own);
            }
        }
        return to;
    }

    // A product of 16-bit integers keeps their upper half: codes in sixteenths of a step, times the group's share of the
    // row's scale in 2**-15.
    template <int GROUP>
    TILES_TARGET float expand_int4(const char* codes, const uint16_t* scale, const uint8_t* zero, char* to) const {
        const int64_t groups = w.depth / GROUP;
        __m512 most = _mm512_setzero_ps(), limit = most;
        for (int64_t g = 0; g < groups; g += 16) {
            const __mmask16 mask = left_of(groups, g);
            const __m512 scales = wide(scale + g, mask);
            const __m512i zeros = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, zero + g));
            const __m512i reach = _mm512_max_epi32(zeros, _mm512_sub_epi32(_mm512_set1_epi32(240), zeros));
            most = _mm512_max_ps(most, scales);
            limit = _mm512_max_ps(limit, _mm512_mul_ps(scales, _mm512_cvtepi32_ps(reach)));
        }
        const float whole = std::max(_mm512_reduce_max_ps(limit) / LARGEST, _mm512_reduce_max_ps(most) * (32768.f / 32767));
        const __m512 inverse = _mm512_set1_ps(whole > 0 ? 32768 / whole : 0);
        const __m512i low = _mm512_set1_epi16(0x0f), high = _mm512_set1_epi16(0xf0);
        alignas(32) int16_t shares[17] = {};
        for (int64_t g = 0; g < groups; g += DEPTH / GROUP, codes += DEPTH / 2, to += DEPTH) {
            const bool whole_row = g + DEPTH / GROUP <= groups;  // else half of it, one group of 32
            const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(whole_row ? ~0u : 0xffff, codes));
            const __m512i share = share_of(scale, groups, g, inverse, shares, GROUP == 32 && whole_row);
            __m512i zeros = _mm512_set1_epi16(zero[g]);
            if (GROUP == 32 && whole_row) zeros = _mm512_mask_set1_epi16(zeros, 0xffff0000, zero[g + 1]);
            const __m512i even = _mm512_sub_epi16(_mm512_and_si512(pairs, high), zeros);
            const __m512i odd = _mm512_sub_epi16(_mm512_slli_epi16(_mm512_and_si512(pairs, low), 4), zeros);
            store_pairs(to, _mm512_mulhrs_epi16(even, share), _mm512_mulhrs_epi16(odd, share));
        }
        return whole / 16;
    }

    // The same with the levels of a table, the largest 127 * 16 steps, and shares in 2**-11.
    template <int GROUP, class Scale>
    TILES_TARGET float expand_table(const char* codes, const Scale* scale, char* to) const {
        const int64_t groups = w.depth / GROUP;
        __m512 largest = _mm512_setzero_ps();
        for (int64_t g = 0; g < groups; g += 16) largest = _mm512_max_ps(largest, wide(scale + g, left_of(groups, g)));
        const float most = _mm512_reduce_max_ps(largest);
        const __m512 inverse = _mm512_set1_ps(most > 0 ? 2048 / most : 0);
        const __m512i table = _mm512_load_si512(steps.levels);
        alignas(32) int16_t shares[17] = {};
        for (int64_t g = 0; g < groups; g += DEPTH / GROUP, codes += DEPTH / 2, to += DEPTH) {
            const bool whole_row = g + DEPTH / GROUP <= groups;  // else half of it, one group of 32
            const __m512i share = share_of(scale, groups, g, inverse, shares, GROUP == 32 && whole_row);
            const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(whole_row ? ~0u : 0xffff, codes));
            const __m512i even = _mm512_permutexvar_epi16(_mm512_srli_epi16(pairs, 4), table);
            const __m512i odd = _mm512_permutexvar_epi16(pairs, table);  // by the lowest 5 bits: the table stands twice
            store_pairs(to, _mm512_mulhrs_epi16(even, share), _mm512_mulhrs_epi16(odd, share));
        }
        return most * steps.top / LARGEST;
    }

    // What the 64 codes from group g on are multiplied by; 16 groups are converted at a time, into `shares`.
    template <class Scale>
    TILES_TARGET static INLINE_TILES __m512i share_of(const Scale* scale, int64_t groups, int64_t g, __m512 inverse,
                                                      int16_t* shares, bool two) {
        if (g % 16 == 0) {
            const __m512i share = _mm512_cvtps_epi32(_mm512_mul_ps(wide(scale + g, left_of(groups, g)), inverse));
            _mm256_store_si256((__m256i*)shares, _mm512_cvtsepi32_epi16(share));
        }
        const __m512i share = _mm512_set1_epi16(shares[g % 16]);
        return two ? _mm512_mask_set1_epi16(share, 0xffff0000, shares[g % 16 + 1]) : share;
    }

    static __mmask16 left_of(int64_t groups, int64_t g) { return groups - g < 16 ? (1u << (groups - g)) - 1 : 0xffff; }

    // The lower bytes of 32 even and of 32 odd elements, in their order.
    TILES_TARGET static INLINE_TILES void store_pairs(char* to, __m512i even, __m512i odd) {
        const __m512i low = _mm512_and_si512(even, _mm512_set1_epi16(0xff));
        _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi16(odd, 8)));
    }

    TILES_TARGET static INLINE_TILES __m512 wide(const float* scale, __mmask16 mask) {
        return _mm512_maskz_loadu_ps(mask, scale);
    }

    TILES_TARGET static INLINE_TILES __m512 wide(const uint16_t* bf16, __mmask16 mask) {
        return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, bf16)), 16);
    }
};

}  // namespace
#endif

// x (tokens, depth) and y (tokens, rows) contiguous, bf16; expert and what is returned as for accessory_gathered_linear.
extern "C" int64_t accessory_tiled_quantized_linear(const accessory_quantized_weight* weight, const void* x,
                                                    const int64_t* expert, void* y, int64_t tokens, int threads) {
#ifdef HAS_TILES
    if (!tiles_serve()) return -1;
    const int64_t bad = check_experts(expert, tokens, weight->experts, (char*)y, 2 * weight->rows);
    if (bad) return bad;
    const Schedule schedule(expert, tokens, weight->rows);
    const Quantized way{(const uint16_t*)x, *weight, (uint16_t*)y, weight->rows, schedule.order.data()};
    multiply_groups(way, schedule, threads);
    return 0;
#else
    return -1;
#endif
}
