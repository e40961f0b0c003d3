// The tiles of AMX: whether this process may use them, and what is done with vectors beside them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __has_include(<amxbf16intrin.h>)
#define HAS_TILES 1
#include <cerrno>
#include <cpuid.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC before 13 says it of its own header
#include <immintrin.h>
#pragma GCC diagnostic pop

#define TILES_TARGET __attribute__((target("amx-tile,amx-bf16,amx-int8,avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma")))

#define INLINE_TILES inline __attribute__((always_inline))

namespace {

// 8 tiles of 16 rows, 64 bytes each.
TILES_TARGET inline void load_config() {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
}

// 16 vectors of 16 times 32 bits.
TILES_TARGET INLINE_TILES void transpose(__m512i* v) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            t[i + j] = _mm512_shuffle_i32x4(v[i + j], v[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_i32x4(v[i + j], v[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        v[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
        v[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
    }
}

TILES_TARGET inline bool try_tiles() {
    alignas(64) uint16_t ones[16 * 32];
    alignas(64) float sums[16 * 16];
    for (auto& one : ones) one = 0x3f80;
    load_config();
    _tile_zero(0);
    _tile_loadd(1, ones, 64);
    _tile_loadd(2, ones, 64);
    _tile_dpbf16ps(0, 1, 2);
    _tile_stored(0, sums, 64);
    _tile_zero(0);
    _tile_dpbssd(0, 1, 2);
    _tile_release();
    return sums[0] == 32 && sums[255] == 32;
}

inline bool find_tiles() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool bf16 = d >> 22 & 1, tile = d >> 24 & 1, int8 = d >> 25 & 1;
    if (!bf16 || !tile || !int8 || !__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512bw")) return false;
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // Linux gives a process the tiles' state when it asks
    if (syscall(SYS_arch_prctl, REQUEST, TILE_DATA)) return false;
    // Some virtual machines show AMX and trap on it: tried where a signal ends nothing else.
    const pid_t child = fork();
    if (child == 0) _exit(try_tiles() ? 0 : 1);
    int status = 1;
    while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    return child > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

inline bool tiles_serve() {
    static const bool serve = find_tiles();
    return serve;
}

}  // namespace
#endif
