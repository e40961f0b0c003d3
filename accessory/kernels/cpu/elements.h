// Rows of float32 or bf16 elements as vectors of floats, and what is made of these. Once per variant (variants.h), as
// vectors.h is, which this includes.
//
// STEP elements are read as two vectors, bf16 ones without a shuffle: a bf16 is the upper half of a float, so of a
// vector that holds pairs of them the shift gives the even ones and the mask the odd ones. `store_step` undoes that.

#include "vectors.h"

constexpr int STEP = 2 * LANES;

struct Pair {
    vf a, b;
};

template <bool BF16> INLINE Pair load_step(const char* from) {
    if (!BF16) return {load<vf>(from), load<vf>(from + VL)};
    const vu pairs = load<vu>(from);
    return {(vf)(pairs << 16), (vf)(pairs & 0xffff0000u)};
}

// The same of `n` elements, fewer than STEP; the others are 0.
template <bool BF16> INLINE Pair load_rest(const char* from, int64_t n) {
    alignas(64) char rest[2 * VL] = {};
    __builtin_memcpy(rest, from, (BF16 ? 2 : 4) * n);
    return load_step<BF16>(rest);
}

// Lanes of two vectors by their numbers, from `at` on: every other one, and those of the one between those of the other.
#if VL == 64
#define EVERY_OTHER(at) \
    at, at + 2, at + 4, at + 6, at + 8, at + 10, at + 12, at + 14, at + 16, at + 18, at + 20, at + 22, at + 24, at + 26, \
        at + 28, at + 30
#define IN_TURN(at) \
    at, at + 16, at + 1, at + 17, at + 2, at + 18, at + 3, at + 19, at + 4, at + 20, at + 5, at + 21, at + 6, at + 22, \
        at + 7, at + 23
#elif VL == 32
#define EVERY_OTHER(at) at, at + 2, at + 4, at + 6, at + 8, at + 10, at + 12, at + 14
#define IN_TURN(at) at, at + 8, at + 1, at + 9, at + 2, at + 10, at + 3, at + 11
#else
#define EVERY_OTHER(at) at, at + 2, at + 4, at + 6
#define IN_TURN(at) at, at + 4, at + 1, at + 5
#endif
#ifdef __clang__
#define SHUFFLE(x, ...) __builtin_shufflevector(x.a, x.b, __VA_ARGS__)
#else
#define SHUFFLE(x, ...) __builtin_shuffle(x.a, x.b, vi{__VA_ARGS__})
#endif

// Of elements in order the even ones and the odd ones, and back.
INLINE Pair split(Pair x) { return {SHUFFLE(x, EVERY_OTHER(0)), SHUFFLE(x, EVERY_OTHER(1))}; }
INLINE Pair join(Pair x) { return {SHUFFLE(x, IN_TURN(0)), SHUFFLE(x, IN_TURN(LANES / 2))}; }

#undef EVERY_OTHER
#undef IN_TURN
#undef SHUFFLE

// The lane sums of LANES vectors, in order. With 16 lanes neighbours are added within each pair of vectors until one is
// left; with fewer that is not faster than one vector after another (GCC 12).
INLINE vf lane_sums(const float* rows) {
#if VL == 64
    vf v[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) v[i] = load<vf>(rows + i * LANES);
#pragma GCC unroll 4
    for (int left = LANES / 2; left; left /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < left; i++) {
            const Pair both = split({v[2 * i], v[2 * i + 1]});
            v[i] = both.a + both.b;
        }
    }
    return v[0];
#else
    float sums[LANES];
    for (int i = 0; i < LANES; i++) sums[i] = lane_sum(load<vf>(rows + i * LANES));
    return load<vf>(sums);
#endif
}

// Rounded to the nearest bf16, ties to even, which stays in the upper half; a NaN must not round to infinity.
INLINE vu upper_half(vf values) {
    const vu bits = (vu)values;
    return values == values ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
}

template <bool BF16> INLINE void store_step(char* to, Pair values) {
    if (BF16) {
        const vu pairs = upper_half(values.a) >> 16 | (upper_half(values.b) & 0xffff0000u);
        __builtin_memcpy(to, &pairs, VL);
    } else {
        __builtin_memcpy(to, &values, 2 * VL);
    }
}

template <bool BF16> INLINE void store_rest(char* to, Pair values, int64_t n) {
    alignas(64) char rest[2 * VL];
    store_step<BF16>(rest, values);
    __builtin_memcpy(to, rest, (BF16 ? 2 : 4) * n);
}

// 2^x to within 2 units of the last place, 0 below -126; x up to 127.
INLINE vf exp2_vector(vf x) {
    const vf magic = vf{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number in the low bits
    const vf shifted = x + magic, f = x - (shifted - magic);
    // Fitted for the least relative error on [-0.5, 0.5], which is 2e-9 before rounding.
    vf p = vf{} + 1.53533721e-4f;
    p = p * f + 1.33988739e-3f;
    p = p * f + 9.61843692e-3f;
    p = p * f + 5.55033237e-2f;
    p = p * f + 2.40226477e-1f;
    p = p * f + 6.93147182e-1f;
    p = p * f + 1.0f;
    const vi exponent = (vi)shifted - (vi)magic + 127;
    return x < -126.0f ? vf{} : p * (vf)(exponent << 23);
}

INLINE vf silu(vf x) {
    const vf power = x * -1.44269504f;  // e^-x as a power of 2; beyond 2^127 silu is 0 to any float
    return x / (exp2_vector(power < 127.0f ? power : vf{} + 127.0f) + 1.0f);
}
