// A quantized weight, as quantized.py hands it over.
#pragma once

#include <cstdint>

constexpr float TINY = 1e-36f;  // activations below it count as 0: the inverse of their scale overflows

// What each 4-bit code stands for; of a table, with 8-bit activations steps * step.
struct accessory_levels {
    float values[16];
    int8_t steps[16];
    float step;
};

// A weight (experts, rows, depth). Strides count bytes; along a row, codes, scales and zeros have none between them.
struct accessory_quantized_weight {
    const char *codes, *scale, *zero;
    const accessory_levels* levels;
    int64_t experts, rows, depth;
    int64_t codes_expert, codes_row, scale_expert, scale_row, zero_expert, zero_row;
    int32_t kind;  // 0: int8, 1: int4 in groups of 32, 2: int4 in groups of 64, 3: nf4, 4: mxfp4
};
