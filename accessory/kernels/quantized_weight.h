// A quantized weight, as quantized_native.py hands it over.
#pragma once

#include <cstdint>

// What each 4-bit code stands for; for nf4 with 8-bit activations steps * step.
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
    int32_t kind;  // 0: int8, 1: int4 in groups of 32, 2: int4 in groups of 64, 3: nf4
};

// Writes rows [row, row + n) of an expert in bf16, `stride` bytes apart. The variant must be one that this CPU runs.
extern "C" void accessory_expand_rows(const char* variant_name, const accessory_quantized_weight* weight,
                                      int64_t expert, int64_t row, int64_t n, char* to, int64_t stride);
