// The few-token product of decoding on CPU: y[p, r] = sum_d x[p, d] * w[e(p), r, d], summed in float32.
//
// It is bound by reading the weights. So tokens are grouped by expert, each needed row is read from memory
// once for all tokens of its expert, and each thread walks through its share of the rows as one sequential stream
// (reading several rows at once measured 1.6-3 times slower: short rows break the prefetcher's streams).
//
// A plain C interface, loaded with ctypes (native.py): no torch or Python headers. row_dot.h is compiled once
// per variant and the caller names the variant, so the one library runs on every CPU of its architecture.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int BLOCK = 128;            // weights per step of a row; staged tokens are padded to a multiple
constexpr int AHEAD = 2048;           // bytes between the weights in use and those being fetched
constexpr int MAX_TOKENS = 4;         // of one pass over a row, in any variant
constexpr int ROW_BLOCK = 128 << 10;  // bytes of rows that all tokens pass over before the next rows

struct Variant {
    using RowDot = void (*)(const char* w, const char* const* x, int n, int64_t d, int64_t ahead, float* y);
    RowDot bf16, f32;
    void (*stage_bf16)(const uint16_t* x, int64_t d, char* to);
    int staged_bytes;  // of one element of a staged bf16 token
    int tokens;        // at most, of one call of RowDot
};

}  // namespace

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_X86_VARIANTS 1
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace {
namespace avx2 {
#define VL 32
#define TOKENS 2
#define DPBF16 0
#include "row_dot.h"
}  // namespace avx2
}  // namespace
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx2,fma")
namespace {
namespace avx512 {
#define VL 64
#define TOKENS 4
#define DPBF16 0
#include "row_dot.h"
}  // namespace avx512
}  // namespace
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma")
namespace {
namespace avx512_bf16 {
#define VL 64
#define TOKENS 4
#define DPBF16 1
#include "row_dot.h"
}  // namespace avx512_bf16
}  // namespace
#pragma GCC pop_options
#endif

namespace {

namespace portable {
#define VL 16
#define TOKENS 2
#define DPBF16 0
#include "row_dot.h"
}  // namespace portable

const Variant* find_variant(const char* name) {
#ifdef HAS_X86_VARIANTS
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (!strcmp(name, "avx512_bf16"))
        return has_avx512 && __builtin_cpu_supports("avx512bf16") ? &avx512_bf16::variant : nullptr;
    if (!strcmp(name, "avx512")) return has_avx512 ? &avx512::variant : nullptr;
    if (!strcmp(name, "avx2")) return has_avx2 ? &avx2::variant : nullptr;
#endif
    return strcmp(name, "portable") ? nullptr : &portable::variant;
}

uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return (bits >> 16) | 0x40;  // a NaN must not round to infinity
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// The tokens of one expert: places [first, first + n) of the order below, and where their work begins.
struct Group {
    int64_t expert, first, n, cost_before;
    int64_t row_cost() const { return 8 + n; }  // reading a row costs about as much as 8 tokens' arithmetic
};

struct Product {
    const Variant& variant;
    bool bf16;
    const char *x, *w;
    char* y;
    int64_t tokens, rows, depth, expert_stride, row_stride;  // strides in elements
    std::vector<int64_t> order;                              // tokens by expert, those without one left out
    std::vector<Group> groups;
    int64_t cost = 0;

    int width() const { return bf16 ? 2 : 4; }

    void group(const int64_t* expert) {
        for (int64_t p = 0; p < tokens; p++)
            if (!expert || expert[p] >= 0) order.push_back(p);
        if (expert)
            std::stable_sort(order.begin(), order.end(),
                             [=](int64_t a, int64_t b) { return expert[a] < expert[b]; });
        for (int64_t i = 0; i < (int64_t)order.size(); i++) {
            const int64_t e = expert ? expert[order[i]] : 0;
            if (groups.empty() || groups.back().expert != e) groups.push_back({e, i, 0, 0});
            groups.back().n++;
        }
        for (Group& g : groups) {
            g.cost_before = cost;
            cost += rows * g.row_cost();
        }
    }

    // The share [from, to) of all work, as rows of one expert after another.
    void run(int64_t from, int64_t to, const char* const* staged) const {
        const int64_t block = std::max<int64_t>(1, ROW_BLOCK / std::max<int64_t>(row_stride * width(), 1));
        for (const Group& g : groups) {
            const auto row_at = [&](int64_t c) {
                return std::clamp<int64_t>((c - g.cost_before + g.row_cost() - 1) / g.row_cost(), 0, rows);
            };
            const int64_t end = to <= g.cost_before ? 0 : row_at(to);
            for (int64_t r = from <= g.cost_before ? 0 : row_at(from); r < end; r += block)
                run_rows(g, r, std::min(end, r + block), staged);
        }
    }

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
                for (int i = 0; i < n; i++) store(order[g.first + first + i] * rows + r, sums[i]);
            }
        }
    }

    void store(int64_t place, float sum) const {
        if (bf16)
            ((uint16_t*)y)[place] = to_bf16(sum);
        else
            ((float*)y)[place] = sum;
    }

    void compute(int threads) const {
        const int64_t padded = (depth + BLOCK - 1) / BLOCK * BLOCK;
        const int64_t token_bytes = padded * (bf16 ? variant.staged_bytes : 4);
        std::vector<char> room(order.size() * token_bytes);
        std::vector<const char*> staged;
        // By this thread alone: a barrier before the rows costs more, where cores are shared a whole time slice.
        for (const int64_t p : order) {
            char* to = room.data() + staged.size() * token_bytes;
            const char* from = x + p * depth * width();
            if (bf16)
                variant.stage_bf16((const uint16_t*)from, depth, to);
            else
                memcpy(to, from, 4 * depth);
            staged.push_back(to);
        }
#pragma omp parallel num_threads(threads)
        {
            const int64_t t = omp_get_thread_num(), team = omp_get_num_threads();
            run(cost * t / team, cost * (t + 1) / team, staged.data());
        }
    }
};

}  // namespace

// Raised whenever the functions below change: native.py refuses a library of another number.
extern "C" int accessory_kernels_abi() { return 2; }

// 1 where this library has the variant and this CPU can run it.
extern "C" int accessory_has_variant(const char* name) { return find_variant(name) != nullptr; }

// x (tokens, depth) and y (tokens, rows) contiguous; w (experts, rows, depth) with unit stride along depth.
// expert: one per token, negative for a row of zeros; null: all are expert 0.
// Returns 0, or 1 + the first token whose expert does not exist, or -1 where the variant does not.
extern "C" int64_t accessory_gathered_linear(const char* variant_name, int bf16, const void* x, const void* w,
                                             const int64_t* expert, void* y, int64_t tokens, int64_t experts,
                                             int64_t rows, int64_t depth, int64_t expert_stride,
                                             int64_t row_stride, int threads) {
    const Variant* variant = find_variant(variant_name);
    if (!variant) return -1;
    Product product{*variant,      bf16 != 0, (const char*)x, (const char*)w, (char*)y, tokens, rows, depth,
                    expert_stride, row_stride, {}, {}};
    for (int64_t p = 0; expert && p < tokens; p++) {
        if (expert[p] >= experts) return 1 + p;
        if (expert[p] < 0) memset((char*)y + p * rows * product.width(), 0, rows * product.width());
    }
    product.group(expert);
    // Waking a team costs microseconds, as much as one thread needs to read 32 KB.
    const int64_t bytes = (int64_t)product.groups.size() * rows * depth * product.width();
    if (!product.groups.empty()) product.compute(bytes < 32768 ? 1 : threads);
    return 0;
}
