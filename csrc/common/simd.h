// What the CPU kernels share: run-time choice of the vector width, and an exp that compilers vectorise.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

// One source, one binary, the widest vectors of the machine it runs on. Elsewhere the same loops get the baseline's.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(FASTCONTRAST_NO_CLONES)
#define FC_VECTOR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FC_VECTOR_CLONES
#endif

#define FC_INLINE inline __attribute__((always_inline))
// On a lambda that holds a kernel's loops: left apart, it would be compiled for the baseline's vectors.
#define FC_INLINE_LAMBDA __attribute__((always_inline))

namespace fastcontrast {

// exp(x) to 1 ulp or so on [-87.3, 88]; exactly 0 below (so that -inf gives 0), +inf above, NaN for NaN.
// Written out rather than std::exp: it needs neither -ffast-math nor a vector maths library, and runs at about ten
// instructions a vector. x = n·ln 2 + f, the polynomial is the Cephes expf one on |f| <= ln 2 / 2.
// For x known not to lie above 88, `exp_up_to_88` saves the last comparison.
FC_INLINE float exp_up_to_88(float x) {
    constexpr float round_magic = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer kept in the low bits
    const float shifted = x * 1.44269504088896341f + round_magic;
    const float n = shifted - round_magic;
    float f = x - n * 0.693359375f;
    f = f - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127u) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    const float y = p * power;
    return x < -87.3f ? 0.0f : y;
}

FC_INLINE float exp_fast(float x) { return x > 88.0f ? INFINITY : exp_up_to_88(x); }

// The offset that makes exp(x - offset) safe when the maximum is infinite: exp(-inf + FLT_MAX) = 0 and
// exp(+inf - FLT_MAX) = inf, where -inf - -inf and inf - inf would be NaN.
FC_INLINE float finite(float x) {
    x = x < -FLT_MAX ? -FLT_MAX : x;
    return x > FLT_MAX ? FLT_MAX : x;
}

}  // namespace fastcontrast
