// The few-token product of decoding on CPU: y[p, r] = sum_d x[p, d] * w[e(p), r, d], summed in float32.
//
// A plain C interface, loaded with ctypes (library.py): no torch or Python headers. row_dot.h is compiled once
// per variant and the caller names the variant, so the one library runs on every CPU of its architecture.

#include <omp.h>

#include "schedule.h"

namespace {

struct Variant {
    using RowDot = void (*)(const char* w, const char* const* x, int n, int64_t d, int64_t ahead, float* y);
    RowDot bf16, f32;
    void (*stage_bf16)(const uint16_t* x, int64_t d, char* to);
    int staged_bytes;  // of one element of a staged bf16 token
    int tokens;        // at most, of one call of RowDot
};

}  // namespace

#define ROW_HEADER "row_dot.h"
#include "variants.h"

int64_t tiled_linear(const void* x, const void* w, const int64_t* expert, void* y, int64_t tokens, int64_t experts,
                     int64_t rows, int64_t depth, int64_t expert_stride, int64_t row_stride, int threads);

namespace {

struct Product {
    const Variant& variant;
    bool bf16;
    const char *x, *w;
    char* y;
    int64_t rows, depth, expert_stride, row_stride;  // strides in elements
    const Schedule& schedule;

    int width() const { return bf16 ? 2 : 4; }

    // Tokens a few at a time, so that they stay in the first cache while a block of rows goes by.
    void run_rows(const Group& g, int64_t begin, int64_t end, const char* const* staged) const {
        const auto row_dot = bf16 ? variant.bf16 : variant.f32;
        float sums[MAX_TOKENS];
        for (int64_t first = 0; first < g.n; first += variant.tokens) {
            const int n = std::min<int64_t>(g.n - first, variant.tokens);
            const int64_t ahead = first ? 0 : AHEAD;
            for (int64_t r = begin; r < end; r++) {
                const char* row = w + width() * (g.expert * expert_stride + r * row_stride);
                row_dot(row, staged + g.first + first, n, depth, ahead, sums);
                for (int i = 0; i < n; i++) store(y, bf16, schedule.order[g.first + first + i] * rows + r, sums[i]);
            }
        }
    }

    void compute(int threads) const {
        const int64_t padded = (depth + BLOCK - 1) / BLOCK * BLOCK;
        const int64_t token_bytes = padded * (bf16 ? variant.staged_bytes : 4);
        std::vector<char> room(schedule.order.size() * token_bytes);
        std::vector<const char*> staged;
        // By this thread alone: a barrier before the rows costs more, where cores are shared a whole time slice.
        for (const int64_t p : schedule.order) {
            char* to = room.data() + staged.size() * token_bytes;
            const char* from = x + p * depth * width();
            if (bf16)
                variant.stage_bf16((const uint16_t*)from, depth, to);
            else
                memcpy(to, from, 4 * depth);
            staged.push_back(to);
        }
        const auto rows_done = [&](const Group& g, int64_t begin, int64_t end) {
            run_rows(g, begin, end, staged.data());
        };
#pragma omp parallel num_threads(schedule.threads(depth* width(), threads))
        schedule.share(omp_get_thread_num(), omp_get_num_threads(), row_stride * width(), rows_done);
    }
};

}  // namespace

// Raised whenever a function of this library changes: library.py refuses a library of another number.
extern "C" int accessory_kernels_abi() { return 10; }

// 1 where this library has the variant and this CPU can run it.
extern "C" int accessory_has_variant(const char* name) { return find_variant(name) != nullptr; }

// x (tokens, depth) and y (tokens, rows) contiguous; w (experts, rows, depth) with unit stride along depth.
// expert: one per token, negative for a row of zeros; null: all are expert 0.
// The variant "tiles" (tiles.cpp) multiplies bf16 alone.
// Returns 0, or 1 + the first token whose expert does not exist, or -1 where the variant does not.
extern "C" int64_t accessory_gathered_linear(const char* variant_name, int bf16, const void* x, const void* w,
                                             const int64_t* expert, void* y, int64_t tokens, int64_t experts,
                                             int64_t rows, int64_t depth, int64_t expert_stride,
                                             int64_t row_stride, int threads) {
    if (bf16 && !strcmp(variant_name, "tiles"))
        return tiled_linear(x, w, expert, y, tokens, experts, rows, depth, expert_stride, row_stride, threads);
    const Variant* variant = find_variant(variant_name);
    if (!variant) return -1;
    const int64_t bad = check_experts(expert, tokens, experts, (char*)y, rows * (bf16 ? 2 : 4));
    if (bad) return bad;
    const Schedule schedule(expert, tokens, rows);
    const Product product{*variant, bf16 != 0, (const char*)x, (const char*)w, (char*)y,
                          rows,     depth,     expert_stride,  row_stride,     schedule};
    if (!schedule.groups.empty()) product.compute(threads);
    return 0;
}
