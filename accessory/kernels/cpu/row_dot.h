// The product of one weight row with the tokens of its expert, in float32; included once per variant (variants.h).
//
// Every token has the same 4 accumulators, filled in the same order, whatever TOKENS or its neighbours are:
// its result does not depend on the batch.

#include "vectors.h"

// Accumulators as named members: GCC keeps an indexed array of them in memory.
struct Sums {
    vf a, b, c, d;
    INLINE float total() const { return lane_sum((a + b) + (c + d)); }
};

// ---- float32: BLOCK weights are 4 * LANES at a time, one vector per accumulator -------------------------

template <int N> INLINE void block_f32(Sums* s, const char* w, const char* const* x, int64_t at) {
#pragma GCC unroll 8
    for (int j = 0; j < BLOCK; j += 4 * LANES) {
        const vf wa = load<vf>(w + 4 * j), wb = load<vf>(w + 4 * j + VL);
        const vf wc = load<vf>(w + 4 * j + 2 * VL), wd = load<vf>(w + 4 * j + 3 * VL);
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) {
            const char* t = x[i] + 4 * (at + j);
            s[i].a += wa * load<vf>(t);
            s[i].b += wb * load<vf>(t + VL);
            s[i].c += wc * load<vf>(t + 2 * VL);
            s[i].d += wd * load<vf>(t + 3 * VL);
        }
    }
}

// ---- bf16 -----------------------------------------------------------------------------------------------

#if DOTS
INLINE vf dp(vf sum, vu w, const void* x) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)load<vu>(x));
}

template <int N> INLINE void block_bf16(Sums* s, const char* w, const char* const* x, int64_t at) {
    const vu wa = load<vu>(w), wb = load<vu>(w + VL), wc = load<vu>(w + 2 * VL), wd = load<vu>(w + 3 * VL);
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
        const char* t = x[i] + 2 * at;
        s[i].a = dp(s[i].a, wa, t);
        s[i].b = dp(s[i].b, wb, t + VL);
        s[i].c = dp(s[i].c, wc, t + 2 * VL);
        s[i].d = dp(s[i].d, wd, t + 3 * VL);
    }
}
#else
// A bf16 is the upper half of a float: of a vector that holds pairs of them, the shift gives the even ones and
// the mask the odd ones. Tokens are staged in that order, LANES even ones and then LANES odd ones.
template <int N> INLINE void block_bf16(Sums* s, const char* w, const char* const* x, int64_t at) {
#pragma GCC unroll 8
    for (int j = 0; j < BLOCK; j += 4 * LANES) {
        const vu lo = load<vu>(w + 2 * j), hi = load<vu>(w + 2 * j + VL);
        const vf wa = (vf)(lo << 16), wb = (vf)(lo & 0xffff0000u);
        const vf wc = (vf)(hi << 16), wd = (vf)(hi & 0xffff0000u);
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) {
            const char* t = x[i] + 4 * (at + j);
            s[i].a += wa * load<vf>(t);
            s[i].b += wb * load<vf>(t + VL);
            s[i].c += wc * load<vf>(t + 2 * VL);
            s[i].d += wd * load<vf>(t + 3 * VL);
        }
    }
}
#endif

// ---- a row ----------------------------------------------------------------------------------------------

// `ahead` is how many bytes beyond the weights in use the next ones are fetched, on into the rows that follow;
// 0 where an earlier pass has fetched these rows.
template <bool BF16, int N>
INLINE void pass(const char* w, const char* const* x, int64_t d, int64_t ahead, float* y) {
    constexpr int bytes = BF16 ? 2 * BLOCK : 4 * BLOCK;
    Sums s[N] = {};
    int64_t at = 0;
    for (; at + BLOCK <= d; at += BLOCK, w += bytes) {
        if (ahead) {
#pragma GCC unroll 8
            for (int line = 0; line < bytes; line += 64) __builtin_prefetch(w + ahead + line);
        }
        BF16 ? block_bf16<N>(s, w, x, at) : block_f32<N>(s, w, x, at);
    }
    if (at < d) {  // the row's remainder, padded with zeros as the staged tokens are
        alignas(64) char rest[bytes] = {};
        __builtin_memcpy(rest, w, (BF16 ? 2 : 4) * (d - at));
        BF16 ? block_bf16<N>(s, rest, x, at) : block_f32<N>(s, rest, x, at);
    }
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) y[i] = s[i].total();
}

template <bool BF16>
void row_dot(const char* w, const char* const* x, int n, int64_t d, int64_t ahead, float* y) {
    switch (n) {
        case 1: return pass<BF16, 1>(w, x, d, ahead, y);
        case 2: return pass<BF16, 2>(w, x, d, ahead, y);
#if TOKENS == 4
        case 3: return pass<BF16, 3>(w, x, d, ahead, y);
        case 4: return pass<BF16, 4>(w, x, d, ahead, y);
#endif
    }
}

// Lays one bf16 token out as block_bf16 reads it; `to` has room for d rounded up to BLOCK, all zeros.
void stage_bf16(const uint16_t* x, int64_t d, char* to) {
#if DOTS
    __builtin_memcpy(to, x, 2 * d);
#else
    for (int64_t at = 0; at < d; at += 2 * LANES) {
        uint16_t part[2 * LANES] = {};
        __builtin_memcpy(part, x + at, 2 * (d - at < 2 * LANES ? d - at : 2 * LANES));
        const vu pairs = load<vu>(part), even = pairs << 16, odd = pairs & 0xffff0000u;
        __builtin_memcpy(to + 4 * at, &even, VL);
        __builtin_memcpy(to + 4 * at + VL, &odd, VL);
    }
#endif
}

const Variant variant = {row_dot<true>, row_dot<false>, stage_bf16, DOTS ? 2 : 4, TOKENS};
