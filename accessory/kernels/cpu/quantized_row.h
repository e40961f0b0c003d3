// The product of one row of quantized weights with the tokens of its expert; included once per variant (variants.h).
// The formats are described in kernels/cpu/quantized.py.
//
// A vector of VL bytes of 4-bit codes is 2 * VL weights, the even ones in the upper halves of its bytes and the odd
// ones in the lower. Nothing is put in order: the staged tokens stand as the codes are unpacked, for each vector
//   with 8-bit activations  the VL even ones, then the VL odd ones
//   with float activations  8 vectors, of which the k-th multiplies the k-th 4 bits of each 32
//
// Every token has the same accumulators, filled in the same order, whatever its neighbours are: its result does not
// depend on the batch.

#include "quantized_vectors.h"

// ---- the formats: `block` adds BLOCK weights to each token's sums, `finish` what remains to be done for a row --

struct Int8Dots {
    static constexpr int code_bytes = BLOCK, scale_bytes = 0;
    template <int N> static INLINE void block(vf* s, const char* w, const Row&, const char*, const Staged* t, int64_t b) {
        vi sums[N] = {};
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) sums[i][0] = t[i].shift[b];
#pragma GCC unroll 8
        for (int j = 0; j < BLOCK; j += VL) {
            const vu codes = load<vu>(w + j);
#pragma GCC unroll 4
            for (int i = 0; i < N; i++) sums[i] = dot_signed(sums[i], codes, t[i].x + b * BLOCK + j);
        }
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) s[i] += to_float(sums[i]) * t[i].scale[b];
    }
    template <int N> static INLINE void finish(vf* s, const Row& row, const Staged*, int64_t) {
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) s[i] *= load<float>(row.scale);
    }
};

struct Int8Float {
    static constexpr int code_bytes = BLOCK, scale_bytes = 0;
    template <int N> static INLINE void block(vf* s, const char* w, const Row&, const char*, const Staged* t, int64_t b) {
        vf even[N] = {}, odd[N] = {};
#pragma GCC unroll 32
        for (int j = 0; j < BLOCK; j += LANES) {
            const vf weights = widen<int8_t>(w + j);
#pragma GCC unroll 4
            for (int i = 0; i < N; i++)
                (j / LANES % 2 ? odd : even)[i] += weights * load<vf>(t[i].x + 4 * (b * BLOCK + j));
        }
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) s[i] += even[i] + odd[i];
    }
    template <int N> static INLINE void finish(vf* s, const Row& row, const Staged* t, int64_t d) {
        Int8Dots::finish<N>(s, row, t, d);
    }
};

template <int GROUP> struct Int4Dots {
    static constexpr int code_bytes = BLOCK / 2, scale_bytes = 2 * BLOCK / GROUP;
    template <int N>
    static INLINE void block(vf* s, const char* w, const Row&, const char* scale, const Staged* t, int64_t b) {
#pragma GCC unroll 4
        for (int v = 0; v < BLOCK / 2 / VL; v++) {
            const vu codes = load<vu>(w + v * VL), odd = codes & 0x0f0f0f0fu, even = (codes >> 4) & 0x0f0f0f0fu;
            const vf scales = spread_bf16<GROUP>(scale, v);
#pragma GCC unroll 4
            for (int i = 0; i < N; i++) {
                const char* x = t[i].x + b * BLOCK + 2 * v * VL;
                const vi sums = dot_unsigned(dot_unsigned(vi{}, even, x), odd, x + VL);
                s[i] += to_float(sums) * (scales * t[i].scale[b]);
            }
        }
    }
    template <int N> static INLINE void finish(vf* s, const Row& row, const Staged* t, int64_t d) {
        take_zeros<N>(s, row, t, d / GROUP);
    }
};

template <int N>
INLINE void table_block(vf* s, const char* w, const float* table, const Staged* t, int64_t at, vf scales) {
    const vu codes = load<vu>(w);
    vf even[N] = {}, odd[N] = {};
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) {
        const vf weights = look_up(table, codes >> (4 * k));
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) (k % 2 ? odd : even)[i] += weights * load<vf>(t[i].x + 4 * at + k * VL);
    }
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) s[i] += (even[i] + odd[i]) * scales;
}

// Levels of a table, times float32 or bf16 scales: nf4, mxfp4.
template <int GROUP, class Scale> struct TableDots {
    static constexpr int code_bytes = BLOCK / 2, scale_bytes = sizeof(Scale) * BLOCK / GROUP;
    template <int N>
    static INLINE void block(vf* s, const char* w, const Row& row, const char* scale, const Staged* t, int64_t b) {
        const vu steps = byte_table(row.levels->steps) ^ FLIP;
#pragma GCC unroll 4
        for (int v = 0; v < BLOCK / 2 / VL; v++) {
            const vu codes = load<vu>(w + v * VL);
            const vu odd = look_up_bytes(steps, codes & 0x0f0f0f0fu);
            const vu even = look_up_bytes(steps, (codes >> 4) & 0x0f0f0f0fu);
            const vf scales = spread<GROUP, Scale>(scale, v);
#pragma GCC unroll 4
            for (int i = 0; i < N; i++) {
                const char* x = t[i].x + b * BLOCK + 2 * v * VL;
                const vi sums = dot_flipped(dot_flipped(vi{}, even, x), odd, x + VL);
                s[i] += to_float(sums) * (scales * t[i].scale[b]);
            }
        }
    }
    template <int N> static INLINE void finish(vf* s, const Row& row, const Staged* t, int64_t d) {
        if constexpr (FLIP != 0) take_offset<N, Scale>(s, row, t, d / GROUP, 128);  // flipped steps are 128 more
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) s[i] *= row.levels->step;
    }
};

template <int GROUP, class Scale> struct TableFloat {
    static constexpr int code_bytes = BLOCK / 2, scale_bytes = sizeof(Scale) * BLOCK / GROUP;
    template <int N>
    static INLINE void block(vf* s, const char* w, const Row& row, const char* scale, const Staged* t, int64_t b) {
#pragma GCC unroll 4
        for (int v = 0; v < BLOCK / 2 / VL; v++)
            table_block<N>(s, w + v * VL, row.levels->values, t, b * BLOCK + 2 * v * VL, spread<GROUP, Scale>(scale, v));
    }
    template <int N> static INLINE void finish(vf*, const Row&, const Staged*, int64_t) {}
};

template <int GROUP> struct Int4Float : TableFloat<GROUP, uint16_t> {
    template <int N> static INLINE void finish(vf* s, const Row& row, const Staged* t, int64_t d) {
        take_zeros<N>(s, row, t, d / GROUP);
    }
};

// ---- a row ------------------------------------------------------------------------------------------------

template <class Format, int N>
INLINE void pass(const Row& row, const Staged* t, int64_t d, int64_t ahead, float* y) {
    vf s[N] = {};
    const char *w = row.codes, *scale = row.scale;
    int64_t b = 0;
    for (; (b + 1) * BLOCK <= d; b++, w += Format::code_bytes, scale += Format::scale_bytes) {
        if (ahead) {
#pragma GCC unroll 4
            for (int line = 0; line < Format::code_bytes; line += 64) __builtin_prefetch(w + ahead + line);
        }
        Format::template block<N>(s, w, row, scale, t, b);
    }
    if (b * BLOCK < d) {  // the row's remainder, padded as the staged tokens are: there with zeros
        const int64_t part = d - b * BLOCK;
        alignas(64) char codes[BLOCK] = {}, scales[32] = {};
        __builtin_memcpy(codes, w, part * Format::code_bytes / BLOCK);
        __builtin_memcpy(scales, scale, part * Format::scale_bytes / BLOCK);
        Format::template block<N>(s, codes, row, scales, t, b);
    }
    Format::template finish<N>(s, row, t, d);
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) y[i] = lane_sum(s[i]);
}

template <class Format>
void row_dot(const Row& row, const Staged* t, int n, int64_t d, int64_t ahead, float* y) {
    switch (n) {
        case 1: return pass<Format, 1>(row, t, d, ahead, y);
        case 2: return pass<Format, 2>(row, t, d, ahead, y);
#if TOKENS == 4
        case 3: return pass<Format, 3>(row, t, d, ahead, y);
        case 4: return pass<Format, 4>(row, t, d, ahead, y);
#endif
    }
}

#include "quantized_stage.h"

const Variant variant = {
    {{row_dot<Int8Dots>, stage_dots<0>},
     {row_dot<Int4Dots<32>>, stage_dots<32>},
     {row_dot<Int4Dots<64>>, stage_dots<64>},
     {row_dot<TableDots<64, float>>, stage_dots<64>},
     {row_dot<TableDots<32, uint16_t>>, stage_dots<32>}},
    {{row_dot<Int8Float>, stage_floats<0>},
     {row_dot<Int4Float<32>>, stage_floats<32>},
     {row_dot<Int4Float<64>>, stage_floats<64>},
     {row_dot<TableFloat<64, float>>, stage_floats<1>},
     {row_dot<TableFloat<32, uint16_t>>, stage_floats<1>}},
    {expand_int8, expand_int4<32>, expand_int4<64>, expand_table<64, float>, expand_table<32, uint16_t>},
    TOKENS,
};

#undef QUARTERS
