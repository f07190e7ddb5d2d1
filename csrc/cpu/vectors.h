// Sixteen numbers at a time: loads that widen half precision, and the loops over a row of logits.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/simd.h"
#include "cpu/tile.h"

namespace fastcontrast {

// What a tensor holds, as Python names it.
enum class Kind : int { f32 = 0, bf16 = 1, f16 = 2 };

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

FC_INLINE float widen(float x) { return x; }

FC_INLINE float widen(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

// The exponent is moved by a multiplication, which brings denormals right too; infinity and NaN get theirs by hand.
FC_INLINE float widen(Float16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
    uint32_t bits = rest << 13;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    y *= 5.192296858534828e33f;  // 2^112
    std::memcpy(&bits, &y, sizeof bits);
    bits = (rest >= 0x7c00u ? 0x7f800000u | (rest & 0x3ffu) << 13 : bits) | sign;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

// The nearest number of the type, of two the even one.
template <typename T>
FC_INLINE T narrow(float x);

template <>
FC_INLINE float narrow<float>(float x) {
    return x;
}

template <>
FC_INLINE BFloat16 narrow<BFloat16>(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1u), quiet = bits | 0x400000u;
    return {static_cast<uint16_t>((x != x ? quiet : rounded) >> 16)};
}

// Numbers of float16's range lose 13 bits; below it, adding 0.5 leaves 24 bits after the point, of which the last are
// cut; above it there is infinity.
template <>
FC_INLINE Float16 narrow<Float16>(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    const uint32_t normal = (size + 0xc8000fffu + (size >> 13 & 1u)) >> 13;
    float shifted;
    std::memcpy(&shifted, &size, sizeof shifted);
    shifted += 0.5f;
    uint32_t small;
    std::memcpy(&small, &shifted, sizeof small);
    small -= 0x3f000000u;
    const uint32_t large = size > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t rest = size < 0x38800000u ? small : size >= 0x47800000u ? large : normal;
    return {static_cast<uint16_t>(rest | sign)};
}

// Calls fn with a pointer of the type that `kind` names.
template <typename Function>
FC_INLINE void with_kind(Kind kind, const void* data, Function fn) {
    switch (kind) {
        case Kind::f32:
            return fn(static_cast<const float*>(data));
        case Kind::bf16:
            return fn(static_cast<const BFloat16*>(data));
        case Kind::f16:
            return fn(static_cast<const Float16*>(data));
    }
}

// Calls step(j, l) for j in [0, n), l the lane that it belongs to.
template <typename Step>
FC_INLINE void in_lanes(int64_t n, Step step) {
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes)
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) step(j + l, l);
    for (int l = 0; j < n; ++j, ++l) step(j, l);
}

// Maximum and sum of exponentials against it, of what has been seen; NaN makes the sum NaN.
struct LogSum {
    float high = -INFINITY, sum = 0.0f;

    FC_INLINE void add(LogSum other) {
        const float largest = std::max(high, other.high), offset = finite(largest);
        sum = sum * exp_fast(finite(high) - offset) + other.sum * exp_fast(finite(other.high) - offset);
        high = largest;
    }
};

inline constexpr int64_t kBlock = 4096;  // entries that two passes over them find in the first-level cache

// of f(j) for j in [0, n); f is called twice for each.
template <typename F>
FC_INLINE LogSum log_sum(int64_t n, F f) {
    LogSum total;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
        const int64_t count = std::min(kBlock, n - begin);
        float high[kLanes], sum[kLanes] = {};
        std::fill(high, high + kLanes, -INFINITY);
        in_lanes(count, [&](int64_t j, int l) FC_INLINE_LAMBDA {
            const float x = f(begin + j);
            high[l] = x > high[l] ? x : high[l];
        });
        LogSum block;
        block.high = fold(high, [](float a, float b) FC_INLINE_LAMBDA { return a > b ? a : b; });
        const float offset = finite(block.high);
        in_lanes(count, [&](int64_t j, int l) FC_INLINE_LAMBDA { sum[l] += exp_fast(f(begin + j) - offset); });
        block.sum = fold(sum, [](float a, float b) FC_INLINE_LAMBDA { return a + b; });
        total.add(block);
    }
    return total;
}

}  // namespace fastcontrast
