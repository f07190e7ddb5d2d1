// Sums of sixteen lanes, one vector of the widest machines, and memory that such vectors are at home in.
#pragma once

#include <type_traits>
#include <vector>

#include "common/simd.h"

namespace fastcontrast {

inline constexpr int kWide = 16;

// Calls fn with the constant that n is, of 1 ... Most: numbers of rows whose sums are to stay in registers.
template <int Most, typename Function>
FC_INLINE void with_count(int64_t n, Function fn) {
    if constexpr (Most > 1)
        if (n < Most) return with_count<Most - 1>(n, fn);
    fn(std::integral_constant<int, Most>());
}

// Floats to work in, at the begin of a line of the cache: a vector that straddles two lines takes two loads.
class Scratch {
  public:
    explicit Scratch(int64_t count) : memory_(count + kWide) {}
    float* data() {
        constexpr uintptr_t line = kWide * sizeof(float);
        return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_.data()) + line - 1) / line * line);
    }

  private:
    std::vector<float> memory_;
};

FC_INLINE float sum_lanes(const float* lanes) {
    float b[kWide / 2], c[kWide / 4];
#pragma omp simd
    for (int l = 0; l < kWide / 2; ++l) b[l] = lanes[l] + lanes[l + kWide / 2];
#pragma omp simd
    for (int l = 0; l < kWide / 4; ++l) c[l] = b[l] + b[l + kWide / 4];
    return (c[0] + c[2]) + (c[1] + c[3]);
}

}  // namespace fastcontrast
