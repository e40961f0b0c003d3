// Products of few tokens with quantized weights, and the plain values of such weights: see quantized.py, which loads
// this with ctypes and describes the formats. It goes about its work as products.cpp does for plain weights.

#include <omp.h>

#include "quantized_weight.h"
#include "schedule.h"

namespace {

using Levels = accessory_levels;

constexpr int KINDS = 5;

struct Row {
    const char *codes, *scale, *zero;
    const Levels* levels;
};

// A token as the rows' products read it.
struct Staged {
    char* x;
    float* scale;    // of 8-bit activations, one for each block
    int32_t* shift;  // what the integer sum of each block starts with
    float* sums;     // of the activations of each group
};

struct Variant {
    struct Way {
        void (*dot)(const Row& row, const Staged* tokens, int n, int64_t d, int64_t ahead, float* y);
        void (*stage)(const float* x, int64_t blocks, const Staged& to);
    };
    Way dots[KINDS], floats[KINDS];  // with 8-bit and with float activations
    void (*expand[KINDS])(const Row& row, int64_t d, bool bf16, char* to);
    int tokens;  // at most, of one call of dot
};

}  // namespace

#define ROW_HEADER "quantized_row.h"
#include "variants.h"

namespace {

Row row_at(const accessory_quantized_weight& w, int64_t expert, int64_t row) {
    return {w.codes + expert * w.codes_expert + row * w.codes_row, w.scale + expert * w.scale_expert + row * w.scale_row,
            w.zero ? w.zero + expert * w.zero_expert + row * w.zero_row : nullptr, w.levels};
}

// The staged tokens, in the order of the schedule.
class Tokens {
   public:
    Tokens(const Variant::Way& way, bool bf16, const char* x, int64_t depth, const Schedule& schedule) {
        const int64_t blocks = (depth + BLOCK - 1) / BLOCK, padded = blocks * BLOCK;
        const int64_t sums = padded / 32 + 16;  // the last vector of them may be read beyond its groups
        const int64_t each = (4 * padded + 8 * blocks + 4 * sums + 63) / 64 * 64;
        room.resize(each * schedule.order.size() + 64);
        char* at = room.data() + (64 - (uintptr_t)room.data() % 64) % 64;
        std::vector<float> plain(padded);
        for (const int64_t p : schedule.order) {
            for (int64_t i = 0; i < depth; i++) plain[i] = bf16 ? from_bf16(x, p * depth + i) : 0;
            if (!bf16) memcpy(plain.data(), x + 4 * p * depth, 4 * depth);
            float* scale = (float*)(at + 4 * padded);
            tokens.push_back({at, scale, (int32_t*)(scale + blocks), scale + 2 * blocks});
            way.stage(plain.data(), blocks, tokens.back());
            at += each;
        }
    }
    const Staged* operator+(int64_t place) const { return tokens.data() + place; }

   private:
    static float from_bf16(const char* x, int64_t place) {
        const uint32_t bits = (uint32_t)((const uint16_t*)x)[place] << 16;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
    std::vector<char> room;
    std::vector<Staged> tokens;
};

}  // namespace

// y[p, r] = sum_d x[p, d] * w[e(p), r, d]; x (tokens, depth) and y (tokens, rows) contiguous, in float32 or bf16.
// expert: one per token, negative for a row of zeros; null: all are expert 0. dots: with 8-bit activations.
// Returns 0, or 1 + the first token whose expert does not exist, or -1 where the variant does not.
extern "C" int64_t accessory_quantized_linear(const char* variant_name, const accessory_quantized_weight* weight,
                                              int dots, int bf16, const void* x, const int64_t* expert, void* y,
                                              int64_t tokens, int threads) {
    const accessory_quantized_weight& w = *weight;
    const Variant* variant = find_variant(variant_name);
    if (!variant) return -1;
    const Variant::Way& way = dots ? variant->dots[w.kind] : variant->floats[w.kind];
    const int64_t bad = check_experts(expert, tokens, w.experts, (char*)y, w.rows * (bf16 ? 2 : 4));
    if (bad) return bad;
    const Schedule schedule(expert, tokens, w.rows);
    if (schedule.groups.empty()) return 0;
    const Tokens staged(way, bf16, (const char*)x, w.depth, schedule);
    const auto run_rows = [&](const Group& g, int64_t begin, int64_t end) {
        float sums[MAX_TOKENS];
        for (int64_t first = 0; first < g.n; first += variant->tokens) {
            const int n = std::min<int64_t>(g.n - first, variant->tokens);
            for (int64_t r = begin; r < end; r++) {
                way.dot(row_at(w, g.expert, r), staged + (g.first + first), n, w.depth, first ? 0 : AHEAD, sums);
                for (int i = 0; i < n; i++)
                    store((char*)y, bf16, schedule.order[g.first + first + i] * w.rows + r, sums[i]);
            }
        }
    };
#pragma omp parallel num_threads(schedule.threads(w.codes_row, threads))
    schedule.share(omp_get_thread_num(), omp_get_num_threads(), w.codes_row, run_rows);
    return 0;
}

// The plain values (experts, rows, depth), contiguous, in float32 or bf16. Returns 0, or -1 without the variant.
extern "C" int64_t accessory_dequantize(const char* variant_name, const accessory_quantized_weight* weight, int bf16,
                                        void* to, int threads) {
    const accessory_quantized_weight& w = *weight;
    const Variant* variant = find_variant(variant_name);
    if (!variant) return -1;
    const int64_t all = w.experts * w.rows;
#pragma omp parallel for num_threads(all * w.depth < ONE_THREAD ? 1 : threads)
    for (int64_t r = 0; r < all; r++)
        variant->expand[w.kind](row_at(w, r / w.rows, r % w.rows), w.depth, bf16,
                                (char*)to + r * w.depth * (bf16 ? 2 : 4));
    return 0;
}
