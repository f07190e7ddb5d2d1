// The mean loss on top of similarity_lse.
#pragma once

#include "cpu/similarity_lse.h"

namespace fastcontrast {

// Σ_i (r_i - own_i) / 2 + (c_i - own_i) / 2 in double, or Σ_i r_i - own_i if there are no columns. lse = high + low.
double loss_sum(const float* own, const float* rows, const float* rows_low, const float* columns,
                const float* columns_low, int64_t count);

// A whole small mean loss in one call each way: what a batch of 128 spends on anything but its three products is mostly
// calls. Row i is held against its own column, or, with labels, against the mean of the columns of its label that are
// not masked; a row of which there are none does not count.

// Either both or none.
struct Labels {
    const int64_t* queries = nullptr;  // [M]
    const int64_t* keys = nullptr;     // [N]
};

// mean_i (r_i - p_i), or with `both` mean_i (r_i / 2 + c_i / 2 - p_i). `logits` [m, n] holds raw products and becomes
// logits; `state` [4m + 2n] receives what the gradient needs.
double small_loss(const Logits&, Labels, float* logits, int64_t m, int64_t n, bool both, float* state, int threads);

// target = scale · G, for `gradient` of the loss. `symmetric`: rows and columns are one set and neither masks nor
// labels tell (i, j) from (j, i); target = scale · (G + Gᵀ). Returns Σ target · logits.
double small_gradient(const Logits&, Labels, const float* logits, float* target, int64_t m, int64_t n, bool both,
                      bool symmetric, const float* state, float gradient, int threads);

}  // namespace fastcontrast
