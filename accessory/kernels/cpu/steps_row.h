// The small steps between a layer's products, for one token or pair, in float32 and rounded once; included once per
// variant (variants.h).

#include "elements.h"

// STEP elements of a row, or the last ones of it, fewer than STEP.
template <bool BF16> struct Whole {
    INLINE Pair read(const char* from) const { return load_step<BF16>(from); }
    INLINE Pair read_floats(const float* from) const { return load_step<false>((const char*)from); }
    INLINE void write(char* to, Pair values) const { store_step<BF16>(to, values); }
};

template <bool BF16> struct Rest {
    int64_t n;
    INLINE Pair read(const char* from) const { return load_rest<BF16>(from, n); }
    INLINE Pair read_floats(const float* from) const { return load_rest<false>((const char*)from, n); }
    INLINE void write(char* to, Pair values) const { store_rest<BF16>(to, values, n); }
};

// Calls step(byte of the elements, their number, one of the above) for all of a row of n elements.
template <bool BF16, class Step> INLINE void each_step(int64_t n, const Step& step) {
    constexpr int bytes = BF16 ? 2 : 4;
    int64_t at = 0;
    for (; at + STEP <= n; at += STEP) step(bytes * at, at, Whole<BF16>{});
    if (at < n) step(bytes * at, at, Rest<BF16>{n - at});
}

template <bool BF16> void rms_norm(const char* x, const char* weight, int64_t d, float eps, char* y) {
    Pair sums = {};
    each_step<BF16>(d, [&](int64_t byte, int64_t, auto part) {
        const Pair v = part.read(x + byte);
        sums.a += v.a * v.a, sums.b += v.b * v.b;
    });
    const float scale = 1 / __builtin_sqrtf(lane_sum(sums.a + sums.b) / d + eps);
    each_step<BF16>(d, [&](int64_t byte, int64_t, auto part) {
        const Pair v = part.read(x + byte), w = part.read(weight + byte);
        part.write(y + byte, {v.a * scale * w.a, v.b * scale * w.b});
    });
}

// In place. Each pair of elements has its cosine twice, and its sine negative for the first of them.
template <bool BF16> void rotate(char* x, int64_t heads, int64_t h, const float* cosines, const float* sines) {
    for (; heads > 0; heads--, x += (BF16 ? 2 : 4) * h) {
        each_step<BF16>(h, [&](int64_t byte, int64_t at, auto part) {
            const Pair read = part.read(x + byte), v = BF16 ? read : split(read);
            const vf c = split(part.read_floats(cosines + at)).a, s = split(part.read_floats(sines + at)).b;
            const Pair turned = {v.a * c - v.b * s, v.b * c + v.a * s};
            part.write(x + byte, BF16 ? turned : join(turned));
        });
    }
}

template <bool BF16> void gate(const char* both, int64_t f, char* y) {
    const char* up = both + (BF16 ? 2 : 4) * f;
    each_step<BF16>(f, [&](int64_t byte, int64_t, auto part) {
        const Pair g = part.read(both + byte), u = part.read(up + byte);
        part.write(y + byte, {silu(g.a) * u.a, silu(g.b) * u.b});
    });
}

template <bool BF16> void weighted_sum(const char* rows, const float* weights, int64_t count, int64_t d, char* y) {
    const int64_t row = (BF16 ? 2 : 4) * d;
    each_step<BF16>(d, [&](int64_t byte, int64_t, auto part) {
        Pair sum = {};
        for (int64_t k = 0; k < count; k++) {
            const Pair v = part.read(rows + k * row + byte);
            sum.a += v.a * weights[k], sum.b += v.b * weights[k];
        }
        part.write(y + byte, sum);
    });
}

const Variant variant = {{rms_norm<true>, rotate<true>, gate<true>, weighted_sum<true>},
                         {rms_norm<false>, rotate<false>, gate<false>, weighted_sum<false>}};
