// Tokens as the rows' products read them, and the plain values of a row. Part of quantized_row.h, once per variant.

// ---- staging of one token; x is padded with zeros to whole blocks -----------------------------------------

// Where element i of a token goes, among those of its vector of 4-bit codes.
INLINE int float_place(int i) { return i / (2 * VL) * (2 * VL) + (i % 8 ^ 1) * LANES + i % (2 * VL) / 8; }

// 8 bits for each activation, and a scale for each block of them: its largest becomes 127.
template <int GROUP> void stage_dots(const float* x, int64_t blocks, const Staged& to) {
    for (int64_t b = 0; b < blocks; b++, x += BLOCK) {
        uint32_t bits[BLOCK], most = 0;  // the bits of non-negative floats order as they do; a NaN is above all
        __builtin_memcpy(bits, x, sizeof bits);
        for (int i = 0; i < BLOCK; i++) most = (bits[i] & 0x7fffffff) > most ? bits[i] & 0x7fffffff : most;
        const float largest = load<float>(&most);
        const bool finite = most < 0x7f800000;
        const float inverse = finite && largest > TINY ? 127 / largest : 0;
        to.scale[b] = finite ? largest / 127 : __builtin_nanf("");
        int8_t codes[BLOCK];
        int sum = 0;
        for (int i = 0; i < BLOCK; i++) codes[i] = finite ? (int)__builtin_rintf(x[i] * inverse) : 0;
        for (int i = 0; i < BLOCK; i++) sum += codes[i];
        to.shift[b] = DOTS && !GROUP ? -128 * sum : 0;
        char* out = to.x + b * BLOCK;
        if (GROUP) {
            for (int i = 0; i < BLOCK; i += 2 * VL) {  // even and odd ones apart, in loops that become shuffles
                for (int j = 0; j < VL; j++) out[i + j] = codes[i + 2 * j];
                for (int j = 0; j < VL; j++) out[i + VL + j] = codes[i + 2 * j + 1];
            }
        } else {
            __builtin_memcpy(out, codes, BLOCK);
        }
        if constexpr (GROUP) {
            for (int g = 0; g < BLOCK / GROUP; g++) {
                int part = 0;
                for (int i = 0; i < GROUP; i++) part += codes[g * GROUP + i];
                to.sums[b * (BLOCK / GROUP) + g] = part * to.scale[b];
            }
        }
    }
}

// Float activations; GROUP 0: in order, 1: as 4-bit codes want them, beyond: their sums as well.
template <int GROUP> void stage_floats(const float* x, int64_t blocks, const Staged& to) {
    float* out = (float*)to.x;
    for (int64_t b = 0; b < blocks; b++, x += BLOCK, out += BLOCK) {
        for (int i = 0; i < BLOCK; i++) out[GROUP ? float_place(i) : i] = x[i];
        if constexpr (GROUP > 1) {
            for (int g = 0; g < BLOCK / GROUP; g++) {
                vf part = {};
                for (int i = 0; i < GROUP; i += LANES) part += load<vf>(x + g * GROUP + i);
                to.sums[b * (BLOCK / GROUP) + g] = lane_sum(part);
            }
        }
    }
}

// ---- the plain values of a row ----------------------------------------------------------------------------

INLINE void put(char* to, bool bf16, int64_t at, vf values) {
    if (bf16) {
        const vu bits = (vu)values;
        const vh halves = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, vh);
        __builtin_memcpy(to + 2 * at, &halves, sizeof halves);
    } else {
        __builtin_memcpy(to + 4 * at, &values, VL);
    }
}

void expand_int8(const Row& row, int64_t d, bool bf16, char* to) {
    const float scale = load<float>(row.scale);
    int64_t at = 0;
    for (; at + LANES <= d; at += LANES)
        put(to, bf16, at, widen<int8_t>(row.codes + at) * scale);
    if (at < d) {
        char rest[LANES] = {}, values[VL];
        __builtin_memcpy(rest, row.codes + at, d - at);
        put(values, bf16, 0, widen<int8_t>(rest) * scale);
        __builtin_memcpy(to + (bf16 ? 2 : 4) * at, values, (bf16 ? 2 : 4) * (d - at));
    }
}

// LANES codes from place `at`, each in the low 4 bits of its lane.
INLINE vu unpack(const char* codes, int64_t at) {
#if VL == 64
    constexpr vu shifts = {4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24};
    constexpr vi first = QUARTERS(-1, -1, 0, 0);
    const char* from = codes + at / 2;
    return (first ? vu{} + load<uint32_t>(from) : vu{} + load<uint32_t>(from + 4)) >> shifts;
#elif VL == 32
    constexpr vu shifts = {4, 0, 12, 8, 20, 16, 28, 24};
    return (vu{} + load<uint32_t>(codes + at / 2)) >> shifts;
#else
    constexpr vu shifts = {4, 0, 12, 8};
    return (vu{} + load<uint16_t>(codes + at / 2)) >> shifts;
#endif
}

template <class Scale> INLINE float load_scale(const Row& row, int64_t g) {
    if constexpr (sizeof(Scale) == 4) return load<float>(row.scale + 4 * g);
    const uint32_t bits = (uint32_t)load<uint16_t>(row.scale + 2 * g) << 16;
    return load<float>(&bits);
}

template <int GROUP> void expand_int4(const Row& row, int64_t d, bool bf16, char* to) {
    for (int64_t g = 0; g < d / GROUP; g++) {
        const float scale = load_scale<uint16_t>(row, g), zero = (uint8_t)row.zero[g] * 0.0625f;
#pragma GCC unroll 16
        for (int j = 0; j < GROUP; j += LANES)
            put(to, bf16, g * GROUP + j, (look_up(row.levels->values, unpack(row.codes, g * GROUP + j)) - zero) * scale);
    }
}

template <int GROUP, class Scale> void expand_table(const Row& row, int64_t d, bool bf16, char* to) {
    for (int64_t g = 0; g < d / GROUP; g++) {
        const float scale = load_scale<Scale>(row, g);
#pragma GCC unroll 16
        for (int j = 0; j < GROUP; j += LANES)
            put(to, bf16, g * GROUP + j, look_up(row.levels->values, unpack(row.codes, g * GROUP + j)) * scale);
    }
}
