// Tile epilogue of similarity_softplus: sums of the sigmoid loss, and its derivative by the logits.
#pragma once

#include "cpu/tile.h"

namespace fastcontrast {

// y_ij, in [0, 1]: the tile's `dense` values if given; else `high` where the labels are equal, or where there are none
// at row i's own column (`Logits::positives`); else `low`. A masked entry counts for nothing.
struct Targets {
    const int64_t* query_labels;  // [M], or null
    const int64_t* key_labels;    // [N]
    const float* dense;           // [m, n] of the tile, contiguous, or null
    float high, low;
};

// sums_i += Σ_j max(L, 0) - y L + log(1 + exp(-|L|)), which is y softplus(-L) + (1 - y) softplus(L).
// With `gradient` [M] the tile becomes G_ij = factor · gradient_i · (sigmoid(L) - y), and gradient_sums_i += Σ_j G_ij
// unless null; without, it is left with logits.
void softplus(const Logits&, const Tile&, const Targets&, float* sums, const float* gradient, float* gradient_sums,
              float factor, int threads);

}  // namespace fastcontrast
