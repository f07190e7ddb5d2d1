// For each candidate the largest cosine to its row's context, in one read of the context.
#pragma once

#include <cstdint>

#include "cpu/vectors.h"

namespace fastcontrast {

// Strides in elements; the last dimension has no gaps.
struct Cosines {
    const void* candidates;  // [B, K, D]
    const void* context;     // [B, T, D]
    const bool* valid;       // [B, T] without gaps, or null
    int64_t b, k, t, d;
    int64_t candidate_batch, candidate_row, context_batch, context_row;
    Kind kind;
};

// values, indices [B, K]: the first position of the largest cosine, NaN counting as the largest; -inf and -1 where no
// position is valid.
void max_cosine(const Cosines&, float* values, int64_t* indices, int threads);

}  // namespace fastcontrast
