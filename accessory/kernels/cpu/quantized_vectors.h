// Vectors of 8-bit and 4-bit codes: dot products, values and scales. Part of quantized_row.h, once per variant.

#include "vectors.h"

typedef uint16_t vh __attribute__((vector_size(VL / 2)));

#if VL == 64
#define QUARTERS(a, b, c, d) {a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d}
#elif VL == 32
#define QUARTERS(a, b, c, d) {a, a, b, b, c, c, d, d}
#else
#define QUARTERS(a, b, c, d) {a, b, c, d}
#endif

// ---- 8-bit dot products: each 32-bit lane adds 4 bytes of w times 4 of x ----------------------------------

#if DOTS
INLINE vi dot_unsigned(vi sum, vu w, const char* x) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, load<__m512i>(x));
}
// What makes signed bytes unsigned: each is then 128 more, and each product has 128 times the activations too many.
constexpr uint32_t FLIP = 0x80808080u;
// The staged token's shift is -128 times its sum.
INLINE vi dot_signed(vi sum, vu w, const char* x) { return dot_unsigned(sum, w ^ FLIP, x); }
// For w that has been flipped already; the caller takes off what is too many.
INLINE vi dot_flipped(vi sum, vu w, const char* x) { return dot_unsigned(sum, w, x); }
#elif VL == 64
INLINE vi pair_sums(vi sum, __m512i w, __m512i x) {
    return sum + (vi)_mm512_madd_epi16(_mm512_maddubs_epi16(w, x), _mm512_set1_epi16(1));
}
INLINE vi dot_unsigned(vi sum, vu w, const char* x) { return pair_sums(sum, (__m512i)w, load<__m512i>(x)); }
// |w| times x with w's sign: as w and x are within 127, two products fit 16 bits.
INLINE vi dot_signed(vi sum, vu w, const char* x) {
    const __m512i xs = load<__m512i>(x);
    const __m512i turned = _mm512_mask_sub_epi8(xs, _mm512_movepi8_mask((__m512i)w), _mm512_setzero_si512(), xs);
    return pair_sums(sum, _mm512_abs_epi8((__m512i)w), turned);
}
#elif VL == 32
INLINE vi pair_sums(vi sum, __m256i w, __m256i x) {
    return sum + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1));
}
INLINE vi dot_unsigned(vi sum, vu w, const char* x) { return pair_sums(sum, (__m256i)w, load<__m256i>(x)); }
INLINE vi dot_signed(vi sum, vu w, const char* x) {
    return pair_sums(sum, _mm256_abs_epi8((__m256i)w), _mm256_sign_epi8(load<__m256i>(x), (__m256i)w));
}
#else
template <class Byte> INLINE vi byte_sums(vi sum, vu w, const char* x) {
    Byte bytes[VL];
    __builtin_memcpy(bytes, &w, VL);
    for (int j = 0; j < VL; j++) sum[j / 4] += bytes[j] * (int8_t)x[j];
    return sum;
}
INLINE vi dot_unsigned(vi sum, vu w, const char* x) { return byte_sums<uint8_t>(sum, w, x); }
INLINE vi dot_signed(vi sum, vu w, const char* x) { return byte_sums<int8_t>(sum, w, x); }
#endif

#if !DOTS  // signed bytes are multiplied as they are
constexpr uint32_t FLIP = 0;
INLINE vi dot_flipped(vi sum, vu w, const char* x) { return dot_signed(sum, w, x); }
#endif

INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }

// LANES bytes as floats. (For these, GCC's __builtin_convertvector takes one byte at a time.)
template <class Byte> INLINE vf widen(const void* from) {
    constexpr bool is_signed = Byte(-1) < Byte(0);
#if VL == 64
    const __m128i bytes = load<__m128i>(from);
    return to_float((vi)(is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes)));
#elif VL == 32
    const __m128i bytes = _mm_loadl_epi64((const __m128i*)from);
    return to_float((vi)(is_signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes)));
#else
    constexpr int to_top = 24;
    vu lanes;
    for (int j = 0; j < LANES; j++) lanes[j] = (uint8_t)((const char*)from)[j];
    return is_signed ? to_float((vi)(lanes << to_top) >> to_top) : to_float((vi)lanes);
#endif
}

// ---- tables and scales ------------------------------------------------------------------------------------

// Entries of a table of 16 floats, by the low 4 bits of each lane.
INLINE vf look_up(const float* table, vu index) {
#if VL == 64
    return (vf)_mm512_permutexvar_ps((__m512i)index, load<__m512>(table));  // takes the index modulo 16
#elif VL == 32
    const __m256 low = _mm256_permutevar8x32_ps(load<__m256>(table), (__m256i)index);
    const __m256 high = _mm256_permutevar8x32_ps(load<__m256>(table + 8), (__m256i)index);
    return (vf)_mm256_blendv_ps(low, high, (__m256)(index << 28));
#else
    vf v;
    for (int j = 0; j < LANES; j++) v[j] = table[index[j] & 15];
    return v;
#endif
}

// A table of 16 bytes, and its bytes by those of an index, each below 16.
#if VL == 64
INLINE vu byte_table(const int8_t* table) { return (vu)_mm512_broadcast_i32x4(load<__m128i>(table)); }
INLINE vu look_up_bytes(vu table, vu index) { return (vu)_mm512_shuffle_epi8((__m512i)table, (__m512i)index); }
#elif VL == 32
INLINE vu byte_table(const int8_t* table) { return (vu)_mm256_broadcastsi128_si256(load<__m128i>(table)); }
INLINE vu look_up_bytes(vu table, vu index) { return (vu)_mm256_shuffle_epi8((__m256i)table, (__m256i)index); }
#else
INLINE vu byte_table(const int8_t* table) { return load<vu>(table); }
INLINE vu look_up_bytes(vu table, vu index) {
    uint8_t levels[VL], bytes[VL];
    __builtin_memcpy(levels, &table, VL);
    __builtin_memcpy(bytes, &index, VL);
    for (int j = 0; j < VL; j++) bytes[j] = levels[bytes[j]];
    return load<vu>(bytes);
}
#endif

// The scales of the weights in vector v of a block's codes, each in the lanes of its group.
template <int GROUP> INLINE vf spread_bf16(const char* scale, int v) {
    constexpr int groups = 2 * VL / GROUP;
    const char* at = scale + 2 * (v * 2 * VL / GROUP);
    if constexpr (groups <= 1) {
        return (vf)(vu{} + ((uint32_t)load<uint16_t>(at) << 16));
    } else if constexpr (groups == 2) {
        constexpr vu shifts = QUARTERS(16, 16, 0, 0);
        return (vf)(((vu{} + load<uint32_t>(at)) << shifts) & 0xffff0000u);
    } else {
        constexpr vu shifts = QUARTERS(16, 0, 16, 0);
        constexpr vi first = QUARTERS(-1, -1, 0, 0);
        const vu pairs = first ? vu{} + load<uint32_t>(at) : vu{} + load<uint32_t>(at + 4);
        return (vf)((pairs << shifts) & 0xffff0000u);
    }
}

INLINE vf spread_f32(const char* scale, int v) {  // groups of 64
    const char* at = scale + 4 * (v * 2 * VL / 64);
    if constexpr (VL < 64) {
        return (vf)(vu{} + load<uint32_t>(at));  // as integers: floats would be added to the zeros
    } else {
        constexpr vi first = QUARTERS(-1, -1, 0, 0);
        return (vf)(first ? vu{} + load<uint32_t>(at) : vu{} + load<uint32_t>(at + 4));
    }
}

template <int GROUP, class Scale> INLINE vf spread(const char* scale, int v) {
    if constexpr (sizeof(Scale) == 2)
        return spread_bf16<GROUP>(scale, v);
    else
        return spread_f32(scale, v);
}

// Those of groups g to g + LANES of a row, zeros behind the last.
template <class Scale> INLINE vf scales_of(const Row& row, int64_t g, int64_t groups) {
    const char* from = row.scale + sizeof(Scale) * g;
    char rest[sizeof(Scale) * LANES] = {};
    if (groups - g < LANES) {
        __builtin_memcpy(rest, from, sizeof(Scale) * (groups - g));
        from = rest;
    }
    if constexpr (sizeof(Scale) == 2)
        return (vf)(__builtin_convertvector(load<vh>(from), vu) << 16);
    else
        return load<vf>(from);
}

// s -= by * scale * (sum of the group's activations), over all groups of a row.
template <int N, class Scale> INLINE void take_offset(vf* s, const Row& row, const Staged* t, int64_t groups, float by) {
    for (int64_t g = 0; g < groups; g += LANES) {
        const vf offsets = scales_of<Scale>(row, g, groups) * -by;
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) s[i] += offsets * load<vf>(t[i].sums + g);
    }
}

// s -= scale * zero / 16 * (sum of the group's activations), over all groups of a row.
template <int N> INLINE void take_zeros(vf* s, const Row& row, const Staged* t, int64_t groups) {
    for (int64_t g = 0; g < groups; g += LANES) {
        const char* zero = row.zero + g;
        char rest[LANES] = {};
        if (groups - g < LANES) {
            __builtin_memcpy(rest, zero, groups - g);
            zero = rest;
        }
        const vf offsets = scales_of<uint16_t>(row, g, groups) * (widen<uint8_t>(zero) * -0.0625f);
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) s[i] += offsets * load<vf>(t[i].sums + g);
    }
}
