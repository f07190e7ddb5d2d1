// The product of a few rows with a matrix of weights, at the speed at which the weights can be read.
#pragma once

#include <cstdint>

namespace fastcontrast {

inline constexpr int64_t kFewRows = 8;

// out [M, N] = x [M, D] · weight [N, D]ᵀ + bias [N], all without gaps; bias may be null; M at most kFewRows.
void few_rows(const float* x, const float* weight, const float* bias, float* out, int64_t m, int64_t n, int64_t d,
              int threads);

// out [M, N] = x [M, D] · weight [D, N] + bias [N], the weight as GPT-2's layers hold it.
void few_rows_by_input(const float* x, const float* weight, const float* bias, float* out, int64_t m, int64_t n,
                       int64_t d, int threads);

// out [M, N] = silu(x · gateᵀ + gate_bias) * (x · upᵀ + up_bias), as few_rows has it.
void few_rows_gated(const float* x, const float* gate, const float* up, const float* gate_bias, const float* up_bias,
                    float* out, int64_t m, int64_t n, int64_t d, int threads);

}  // namespace fastcontrast
