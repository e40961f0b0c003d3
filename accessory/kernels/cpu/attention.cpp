// Attention of decoding on CPU: one new token of each sequence over what its slot of the cache holds, see attention.py.
// It goes about its variants as products.cpp does.

#include <omp.h>

#include <cmath>

#include "schedule.h"

// Keys, or values: (layers, slots, length, heads, width). Strides count bytes; a head's elements have none between them.
struct accessory_cached_part {
    char* data;
    int64_t layer, slot, position, head;  // strides
};

struct accessory_cache {
    accessory_cached_part keys, values;
    int64_t layers, slots, length, heads, width;
    int32_t bf16;
};

namespace {

constexpr int POSITIONS = 128;  // whose scores are known before their values are read

constexpr int FETCHED = 16;     // positions between the one in use and the one being fetched

// What the heads of a group read: keys and values of one key/value head in one slot.
struct Span {
    const char *keys, *values;
    int64_t key_stride, value_stride;  // bytes between positions
    int64_t count, width;              // positions, elements of a head
    float scale;                       // of a query
};

struct Variant {
    using Attend = void (*)(const char* q, int64_t heads, const Span& span, char* room, char* out);
    Attend bf16, f32;
    int64_t (*room_bytes)(int64_t width);
};

}  // namespace

#define ROW_HEADER "attention_row.h"
#include "variants.h"

// Writes each new token's keys and values to its place in a layer, and attends to the positions up to it.
// q and out (tokens, groups * heads, width), k and v (tokens, heads, width): contiguous, but for q, k and v with strides
// in bytes between tokens. slots: one per token, distinct; null: the first ones in order.
// Returns 0, or 1 + the first token whose place does not exist, or -1 where the variant does not.
extern "C" int64_t accessory_attend_slots(const char* variant_name, const accessory_cache* cache, int64_t layer,
                                          const char* q, const char* k, const char* v, const int64_t* slots,
                                          const int64_t* positions, char* out, int64_t tokens, int64_t groups,
                                          int64_t q_stride, int64_t k_stride, int64_t v_stride, int threads) {
    const accessory_cache& c = *cache;
    const Variant* variant = find_variant(variant_name);
    if (!variant) return -1;
    const auto attend = c.bf16 ? variant->bf16 : variant->f32;
    const int64_t head_bytes = c.width * (c.bf16 ? 2 : 4);
    const auto slot_of = [=](int64_t t) { return slots ? slots[t] : t; };
    const auto place = [&](const accessory_cached_part& part, int64_t t, int64_t position, int64_t head) {
        return part.data + layer * part.layer + slot_of(t) * part.slot + position * part.position + head * part.head;
    };
    std::vector<int64_t> before(tokens + 1);  // positions read for the tokens before
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t slot = slot_of(t), position = positions[t];
        if (slot < 0 || slot >= c.slots || position < 0 || position >= c.length) return 1 + t;
        before[t + 1] = before[t] + position + 1;
    }
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t head = 0; head < c.heads; head++) {
            const int64_t from = head * head_bytes;
            memcpy(place(c.keys, t, positions[t], head), k + t * k_stride + from, head_bytes);
            memcpy(place(c.values, t, positions[t], head), v + t * v_stride + from, head_bytes);
        }
    }
    const float scale = 1.4426950408889634 / std::sqrt((double)c.width);  // log2(e), as weights are powers of 2
    const int64_t all = before[tokens] * c.heads;
#pragma omp parallel num_threads(2 * all * head_bytes < ONE_THREAD ? 1 : threads)
    {
        // A thread's share: the heads whose positions begin in it.
        const int64_t parts = omp_get_num_threads(), part = omp_get_thread_num();
        const int64_t from = (all * part + parts - 1) / parts, to = (all * (part + 1) + parts - 1) / parts;
        std::vector<char> room(variant->room_bytes(c.width) + 64);
        char* aligned = room.data() + (64 - (uintptr_t)room.data() % 64) % 64;
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t count = positions[t] + 1;
            for (int64_t head = 0; head < c.heads; head++) {
                const int64_t begin = before[t] * c.heads + head * count, first = head * groups * head_bytes;
                if (begin < from || begin >= to) continue;
                const Span span{place(c.keys, t, 0, head), place(c.values, t, 0, head),
                                c.keys.position,           c.values.position,
                                count,                     c.width,
                                scale};
                attend(q + t * q_stride + first, groups, span, aligned,
                       out + t * groups * c.heads * head_bytes + first);
            }
        }
    }
    return 0;
}
