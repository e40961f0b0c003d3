// Functions for a part of the CPUs of an architecture, in a library that runs on all of them.
#pragma once

#define INLINE inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_X86_VARIANTS 1
// What stands between these two is compiled for a target with such features.
#define PRAGMA(...) _Pragma(#__VA_ARGS__)
#ifdef __clang__
#include <immintrin.h>
#define BEGIN_TARGET(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC before 13 says it of its own header
#include <immintrin.h>
#pragma GCC diagnostic pop
#define BEGIN_TARGET(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define END_TARGET PRAGMA(GCC pop_options)
#endif
#endif
