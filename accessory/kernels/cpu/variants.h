// Compiles ROW_HEADER once per variant of the vector unit, each in a namespace and under a target of its own, and
// finds a variant by its name. A source file includes this once, after it has declared `struct Variant` and set
// ROW_HEADER to a header that ends by defining `const Variant variant`. That header may use
//   VL      bytes of a vector register
//   TOKENS  tokens that share one pass over a row (their accumulators must fit the registers)
//   DOTS    1 where the CPU has dot products of bf16 (AVX512_BF16) and of 8-bit integers (AVX512_VNNI)
// It has no include guard, and must not use std::: a template of the standard library that is instantiated under a
// wide target could be the copy that the linker keeps for everyone.

#include <cstdint>
#include <cstring>

#include "target.h"

#ifdef HAS_X86_VARIANTS
BEGIN_TARGET("avx2,fma")
namespace {
namespace avx2 {
#define VL 32
#define TOKENS 2
#define DOTS 0
#include ROW_HEADER
#undef VL
#undef TOKENS
#undef DOTS
}  // namespace avx2
}  // namespace
END_TARGET

BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx2,fma")
namespace {
namespace avx512 {
#define VL 64
#define TOKENS 4
#define DOTS 0
#include ROW_HEADER
#undef VL
#undef TOKENS
#undef DOTS
}  // namespace avx512
}  // namespace
END_TARGET

BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni,avx2,fma")
namespace {
namespace avx512_bf16 {
#define VL 64
#define TOKENS 4
#define DOTS 1
#include ROW_HEADER
#undef VL
#undef TOKENS
#undef DOTS
}  // namespace avx512_bf16
}  // namespace
END_TARGET
#endif

namespace {

namespace portable {
#define VL 16
#define TOKENS 2
#define DOTS 0
#include ROW_HEADER
#undef VL
#undef TOKENS
#undef DOTS
}  // namespace portable

inline const Variant* find_variant(const char* name) {
#ifdef HAS_X86_VARIANTS
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    const bool has_dots =
        has_avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    if (!strcmp(name, "avx512_bf16")) return has_dots ? &avx512_bf16::variant : nullptr;
    if (!strcmp(name, "avx512")) return has_avx512 ? &avx512::variant : nullptr;
    if (!strcmp(name, "avx2")) return has_avx2 ? &avx2::variant : nullptr;
#endif
    return strcmp(name, "portable") ? nullptr : &portable::variant;
}

}  // namespace
