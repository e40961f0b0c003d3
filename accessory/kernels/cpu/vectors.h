// Vectors of VL bytes, for the row products. Included once per variant (variants.h), so without an include guard.

typedef float vf __attribute__((vector_size(VL)));
typedef uint32_t vu __attribute__((vector_size(VL)));
typedef int32_t vi __attribute__((vector_size(VL)));
typedef float v4 __attribute__((vector_size(16)));

constexpr int LANES = VL / 4;

template <class V> INLINE V load(const void* from) {
    V v;
    __builtin_memcpy(&v, from, sizeof(V));
    return v;
}

INLINE float lane_sum(vf v) {
    float lanes[LANES];
    __builtin_memcpy(lanes, &v, sizeof v);
    v4 s = load<v4>(lanes);
    for (int i = 4; i < LANES; i += 4) s += load<v4>(lanes + i);
    return (s[0] + s[2]) + (s[1] + s[3]);
}
