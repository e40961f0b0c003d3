// How the products of few tokens share their work: tokens grouped by expert, each thread a share of the rows.
//
// Such a product is bound by reading the weights. So each needed row is read from memory once for all tokens of
// its expert, and each thread walks through its share of the rows as one sequential stream (reading several rows at
// once measured 1.6-3 times slower: short rows break the prefetcher's streams).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int BLOCK = 128;            // weights per step of a row; staged tokens are padded to a multiple
constexpr int AHEAD = 2048;           // bytes between the weights in use and those being fetched
constexpr int MAX_TOKENS = 4;         // of one pass over a row, in any variant
constexpr int ROW_BLOCK = 128 << 10;  // bytes of rows that all tokens pass over before the next rows
constexpr int ONE_THREAD = 32 << 10;  // bytes that one thread reads while a team would be woken

// The tokens of one expert: places [first, first + n) of Schedule::order, and where their work begins.
struct Group {
    int64_t expert, first, n, cost_before;
    int64_t row_cost() const { return 8 + n; }  // reading a row costs about as much as 8 tokens' arithmetic
};

struct Schedule {
    int64_t rows;
    std::vector<int64_t> order;  // tokens by expert, those without one left out
    std::vector<Group> groups;
    int64_t cost = 0;

    // expert: one per token, negative for none; null: all are expert 0.
    Schedule(const int64_t* expert, int64_t tokens, int64_t rows) : rows(rows) {
        int64_t experts = 1;
        for (int64_t p = 0; expert && p < tokens; p++) experts = std::max(experts, expert[p] + 1);
        std::vector<int64_t> place(experts + 1);  // where the next token of each expert goes; its own after the last one's
        for (int64_t p = 0; p < tokens; p++)
            if (!expert || expert[p] >= 0) place[(expert ? expert[p] : 0) + 1]++;
        for (int64_t e = 0; e < experts; e++) {
            if (const int64_t n = place[e + 1]) {
                groups.push_back({e, place[e], n, cost});
                cost += rows * groups.back().row_cost();
            }
            place[e + 1] += place[e];
        }
        order.resize(place[experts]);
        for (int64_t p = 0; p < tokens; p++)
            if (!expert || expert[p] >= 0) order[place[expert ? expert[p] : 0]++] = p;
    }

    // Threads that pay for rows of so many bytes.
    int threads(int64_t row_bytes, int wanted) const {
        return (int64_t)groups.size() * rows * row_bytes < ONE_THREAD ? 1 : wanted;
    }

    // Part `part` of `parts` of all work: calls run_rows(group, first row, row behind the last) for one expert after
    // another, in blocks of rows that stay in the cache while all tokens of the expert pass over them.
    template <class RunRows> void share(int64_t part, int64_t parts, int64_t row_bytes, const RunRows& run_rows) const {
        const int64_t from = cost * part / parts, to = cost * (part + 1) / parts;
        const int64_t block = std::max<int64_t>(1, ROW_BLOCK / std::max<int64_t>(row_bytes, 1));
        for (const Group& g : groups) {
            const auto row_at = [&](int64_t c) {
                return std::clamp<int64_t>((c - g.cost_before + g.row_cost() - 1) / g.row_cost(), 0, rows);
            };
            const int64_t end = to <= g.cost_before ? 0 : row_at(to);
            for (int64_t r = from <= g.cost_before ? 0 : row_at(from); r < end; r += block)
                run_rows(g, r, std::min(end, r + block));
        }
    }
};

// The first token whose expert does not exist, plus 1; else 0, and the results of tokens without one are zeroed.
inline int64_t check_experts(const int64_t* expert, int64_t tokens, int64_t experts, char* y, int64_t y_bytes) {
    for (int64_t p = 0; expert && p < tokens; p++) {
        if (expert[p] >= experts) return 1 + p;
        if (expert[p] < 0) memset(y + p * y_bytes, 0, y_bytes);
    }
    return 0;
}

inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return (bits >> 16) | 0x40;  // a NaN must not round to infinity
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline void store(char* y, bool bf16, int64_t place, float value) {
    if (bf16)
        ((uint16_t*)y)[place] = to_bf16(value);
    else
        ((float*)y)[place] = value;
}

}  // namespace
