// The small steps between a layer's products on CPU, each in one call: see steps.py. For one token what PyTorch
// spends on its operations is many times what these take.
//
// Rows are contiguous, of float32 or bf16; a row's result does not depend on the others. All return 0, or -1 where the
// variant does not exist.

#include <omp.h>

#include <cmath>
#include <cstdint>

namespace {

constexpr int64_t ONE_THREAD = 256 << 10;  // bytes of rows in the cache that one thread is through with while others wake

struct Variant {
    struct Way {
        void (*rms_norm)(const char* x, const char* weight, int64_t d, float eps, char* y);
        void (*rotate)(char* x, int64_t heads, int64_t h, const float* cosines, const float* sines);
        void (*gate)(const char* both, int64_t f, char* y);
        void (*weighted_sum)(const char* rows, const float* weights, int64_t count, int64_t d, char* y);
    } bf16, f32;
};

}  // namespace

#define ROW_HEADER "steps_row.h"
#include "variants.h"

namespace {

// Calls run(way, row) for every row of so many bytes.
template <class Run> int64_t each_row(const char* name, int bf16, int64_t rows, int64_t bytes, int threads, Run run) {
    const Variant* variant = find_variant(name);
    if (!variant) return -1;
    const Variant::Way& way = bf16 ? variant->bf16 : variant->f32;
#pragma omp parallel for num_threads(rows * bytes < ONE_THREAD ? 1 : threads)
    for (int64_t r = 0; r < rows; r++) run(way, r);
    return 0;
}

}  // namespace

// y = x / rms(x) * weight, for rows of d elements.
extern "C" int64_t accessory_rms_norm(const char* variant, int bf16, const char* x, const char* weight, char* y,
                                      int64_t rows, int64_t d, float eps, int threads) {
    const int64_t row = d * (bf16 ? 2 : 4);
    return each_row(variant, bf16, rows, row, threads, [=](const Variant::Way& way, int64_t r) {
        way.rms_norm(x + r * row, weight, d, eps, y + r * row);
    });
}

// What a router makes of logits (tokens, experts): them and their softmax in float32, the `count` most probable experts,
// the most probable first, and their weights, which are their share of their own sum. asked: the experts, but -1 where
// active is given and false.
extern "C" int64_t accessory_choose_experts(int bf16, const void* logits, const bool* active, float* wide, float* probs,
                                            float* weights, int64_t* chosen, int64_t* asked, int64_t tokens,
                                            int64_t experts, int64_t count, int threads) {
#pragma omp parallel for num_threads(tokens * experts * 16 < ONE_THREAD ? 1 : threads)
    for (int64_t t = 0; t < tokens; t++) {
        float *x = wide + t * experts, *p = probs + t * experts, *w = weights + t * count;
        int64_t* e = chosen + t * count;
        float most = -INFINITY, all = 0, share = 0;
        for (int64_t i = 0; i < experts; i++) {
            const uint32_t bits = bf16 ? (uint32_t)((const uint16_t*)logits)[t * experts + i] << 16 : 0;
            bf16 ? memcpy(x + i, &bits, 4) : memcpy(x + i, (const float*)logits + t * experts + i, 4);
            most = x[i] > most ? x[i] : most;
        }
        for (int64_t i = 0; i < experts; i++) all += p[i] = std::exp(x[i] - most);
        for (int64_t i = 0; i < experts; i++) p[i] /= all;
        for (int64_t k = 0; k < count; k++) {
            e[k] = -1;
            for (int64_t i = 0; i < experts; i++) {  // distinct experts even of probabilities that are no numbers
                bool taken = false;
                for (int64_t j = 0; j < k; j++) taken |= e[j] == i;
                if (!taken && (e[k] < 0 || p[i] > p[e[k]])) e[k] = i;
            }
            share += w[k] = p[e[k]];
        }
        for (int64_t k = 0; k < count; k++) {
            w[k] /= share;
            asked[t * count + k] = active && !active[t] ? -1 : e[k];
        }
    }
    return 0;
}

// Turns the pairs of elements of q (tokens, q_heads, h) and k (tokens, k_heads, h) in place. Strides between tokens, in
// bytes; cosines and sines (tokens, h).
extern "C" int64_t accessory_rotate(const char* variant, int bf16, char* q, char* k, const float* cosines,
                                    const float* sines, int64_t tokens, int64_t q_heads, int64_t k_heads, int64_t h,
                                    int64_t q_stride, int64_t k_stride, int threads) {
    const int64_t row = (q_heads + k_heads) * h * (bf16 ? 2 : 4);
    return each_row(variant, bf16, tokens, row, threads, [=](const Variant::Way& way, int64_t t) {
        way.rotate(q + t * q_stride, q_heads, h, cosines + t * h, sines + t * h);
        way.rotate(k + t * k_stride, k_heads, h, cosines + t * h, sines + t * h);
    });
}

// y (rows, f) = silu(first half) * second half of both (rows, 2 f).
extern "C" int64_t accessory_gate(const char* variant, int bf16, const char* both, char* y, int64_t rows, int64_t f,
                                  int threads) {
    const int64_t row = f * (bf16 ? 2 : 4);
    return each_row(variant, bf16, rows, 3 * row, threads,
                    [=](const Variant::Way& way, int64_t r) { way.gate(both + 2 * r * row, f, y + r * row); });
}

// y (tokens, d): the rows of x (tokens, count, d) by their weights (tokens, count).
extern "C" int64_t accessory_weighted_sum(const char* variant, int bf16, const char* x, const float* weights, char* y,
                                          int64_t tokens, int64_t count, int64_t d, int threads) {
    const int64_t row = d * (bf16 ? 2 : 4);
    return each_row(variant, bf16, tokens, (count + 1) * row, threads, [=](const Variant::Way& way, int64_t t) {
        way.weighted_sum(x + t * count * row, weights + t * count, count, d, y + t * row);
    });
}
