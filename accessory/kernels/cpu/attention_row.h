// Attention of the query heads that share a key/value head over the positions of one slot, in float32; included once
// per variant (variants.h).
//
// A block of positions at a time: its scores, what the softmax makes of them beside those of the blocks before, and the
// weighted sum of its values. Nothing depends on what other slots hold.

#include "elements.h"

INLINE float lane_max(vf v) {
    float largest = v[0];
    for (int i = 1; i < LANES; i++) largest = v[i] > largest ? v[i] : largest;
    return largest;
}

// A head's elements lie far from those of the next position, which the CPU's own prefetching does not see.
INLINE void fetch_ahead(const char* from, int64_t stride, int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + FETCHED * stride + line);
}

// What N query heads know after some positions: rows of `width` floats in the order of load_step.
struct Partial {
    float* queries;
    float* sums;    // of the values, by their weights relative to `most`
    float* scores;  // POSITIONS of each head
    int64_t width;
    float most[TOKENS], weight[TOKENS];  // the largest score so far, and the sum of the weights
};

// Products of N queries with J keys, whose lanes are not yet summed: `lanes` holds LANES keys of each query.
template <bool BF16, int N, int J>
INLINE void multiply(const Partial& p, const Span& span, const char* key, float* lanes) {
    constexpr int bytes = BF16 ? 2 : 4;
    const int64_t whole = span.width / STEP * STEP;
    vf s[J][N] = {};
    for (int j = 0; j < J; j++) fetch_ahead(key + j * span.key_stride, span.key_stride, bytes * span.width);
    const auto step = [&](int64_t d, auto read) {
        Pair k[J];
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) k[j] = read(key + j * span.key_stride + bytes * d);
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) {
            const Pair q = load_step<false>((const char*)(p.queries + i * p.width + d));
#pragma GCC unroll 4
            for (int j = 0; j < J; j++) s[j][i] += k[j].a * q.a;
#pragma GCC unroll 4
            for (int j = 0; j < J; j++) s[j][i] += k[j].b * q.b;
        }
    };
    for (int64_t d = 0; d < whole; d += STEP) step(d, [](const char* from) { return load_step<BF16>(from); });
    const int64_t rest = span.width - whole;
    if (rest) step(whole, [=](const char* from) { return load_rest<BF16>(from, rest); });
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) __builtin_memcpy(lanes + (i * LANES + j) * LANES, &s[j][i], VL);
    }
}

template <bool BF16, int N> INLINE void score(const Partial& p, const Span& span, int64_t begin, int n) {
    alignas(64) float lanes[N * LANES * LANES];
    for (int j = 0; j < n; j += LANES) {
        const char* key = span.keys + (begin + j) * span.key_stride;
        const int here = n - j < LANES ? n - j : LANES;
        int l = 0;
        for (; l + 4 <= here; l += 4) multiply<BF16, N, 4>(p, span, key + l * span.key_stride, lanes + l * LANES);
        for (; l < here; l++) multiply<BF16, N, 1>(p, span, key + l * span.key_stride, lanes + l * LANES);
        for (int i = 0; i < N; i++) {
            for (int k = here * LANES; k < LANES * LANES; k++) lanes[i * LANES * LANES + k] = 0;
            const vf s = lane_sums(lanes + i * LANES * LANES);
            __builtin_memcpy(p.scores + i * POSITIONS + j, &s, VL);
        }
    }
}

// Scores become weights; what is known of the positions before is brought to the new largest score.
template <int N> INLINE void weigh(Partial& p, int n) {
    for (int i = 0; i < N; i++) {
        float* scores = p.scores + i * POSITIONS;
        for (int j = n; j % LANES; j++) scores[j] = -__builtin_inff();
        vf most = vf{} + p.most[i];
        for (int j = 0; j < n; j += LANES) {
            const vf s = load<vf>(scores + j);
            most = s > most ? s : most;
        }
        const float largest = lane_max(most);
        vf weight = {};
        for (int j = 0; j < n; j += LANES) {
            const vf w = exp2_vector(load<vf>(scores + j) - largest);
            __builtin_memcpy(scores + j, &w, VL);
            weight += w;
        }
        const float factor = exp2_vector(vf{} + (p.most[i] - largest))[0];
        p.weight[i] = p.weight[i] * factor + lane_sum(weight);
        p.most[i] = largest;
        if (factor != 1) {
            float* sums = p.sums + i * p.width;
            for (int64_t d = 0; d < p.width; d += LANES) {
                const vf s = load<vf>(sums + d) * factor;
                __builtin_memcpy(sums + d, &s, VL);
            }
        }
    }
}

// Adds C * STEP elements of the values from element d on; REST: the last ones of them, fewer than STEP.
template <bool BF16, int N, int C, bool REST>
INLINE void add_values(const Partial& p, const Span& span, int64_t begin, int n, int64_t d) {
    constexpr int bytes = BF16 ? 2 : 4;
    vf a[N][C], b[N][C];
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
#pragma GCC unroll 2
        for (int c = 0; c < C; c++) {
            a[i][c] = load<vf>(p.sums + i * p.width + d + c * STEP);
            b[i][c] = load<vf>(p.sums + i * p.width + d + c * STEP + LANES);
        }
    }
    for (int j = 0; j < n; j++) {
        const char* from = span.values + (begin + j) * span.value_stride + bytes * d;
        fetch_ahead(from, span.value_stride, bytes * C * STEP);
#pragma GCC unroll 2
        for (int c = 0; c < C; c++) {
            const Pair v = REST ? load_rest<BF16>(from, span.width - d) : load_step<BF16>(from + c * bytes * STEP);
#pragma GCC unroll 4
            for (int i = 0; i < N; i++) {
                a[i][c] += v.a * p.scores[i * POSITIONS + j];
                b[i][c] += v.b * p.scores[i * POSITIONS + j];
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
#pragma GCC unroll 2
        for (int c = 0; c < C; c++) {
            __builtin_memcpy(p.sums + i * p.width + d + c * STEP, &a[i][c], VL);
            __builtin_memcpy(p.sums + i * p.width + d + c * STEP + LANES, &b[i][c], VL);
        }
    }
}

template <bool BF16, int N> void attend_heads(const char* q, const Span& span, char* room, char* out) {
    constexpr int bytes = BF16 ? 2 : 4;
    const int64_t h = span.width, whole = h / STEP * STEP, width = (h + STEP - 1) / STEP * STEP;
    Partial p;
    p.queries = (float*)room, p.sums = p.queries + N * width, p.scores = p.sums + N * width, p.width = width;
    __builtin_memset(p.sums, 0, 4 * N * width);
    for (int i = 0; i < N; i++) {
        p.most[i] = -__builtin_inff(), p.weight[i] = 0;
        for (int64_t d = 0; d < width; d += STEP) {
            const char* from = q + bytes * (i * h + d);
            Pair x = d < whole ? load_step<BF16>(from) : load_rest<BF16>(from, h - d);
            x.a *= span.scale, x.b *= span.scale;
            __builtin_memcpy(p.queries + i * width + d, &x, 2 * VL);
        }
    }
    for (int64_t begin = 0; begin < span.count; begin += POSITIONS) {
        const int n = span.count - begin < POSITIONS ? span.count - begin : POSITIONS;
        score<BF16, N>(p, span, begin, n);
        weigh<N>(p, n);
        int64_t d = 0;
        for (; d + 2 * STEP <= h; d += 2 * STEP) add_values<BF16, N, 2, false>(p, span, begin, n, d);
        if (d + STEP <= h) add_values<BF16, N, 1, false>(p, span, begin, n, d), d += STEP;
        if (d < h) add_values<BF16, N, 1, true>(p, span, begin, n, d);
    }
    for (int i = 0; i < N; i++) {
        for (int64_t d = 0; d < width; d += STEP) {
            Pair y = load_step<false>((const char*)(p.sums + i * width + d));
            y.a /= p.weight[i], y.b /= p.weight[i];
            char* to = out + bytes * (i * h + d);
            d < whole ? store_step<BF16>(to, y) : store_rest<BF16>(to, y, h - d);
        }
    }
}

// q and out: `heads` rows of span.width elements. room: see room_bytes.
template <bool BF16> void attend(const char* q, int64_t heads, const Span& span, char* room, char* out) {
    const int64_t row = (BF16 ? 2 : 4) * span.width;
    for (; heads >= TOKENS; heads -= TOKENS, q += TOKENS * row, out += TOKENS * row)
        attend_heads<BF16, TOKENS>(q, span, room, out);
    for (; heads > 0; heads--, q += row, out += row) attend_heads<BF16, 1>(q, span, room, out);
}

int64_t room_bytes(int64_t width) { return 4 * TOKENS * (2 * ((width + STEP - 1) / STEP * STEP) + POSITIONS); }

const Variant variant = {attend<true>, attend<false>, room_bytes};
