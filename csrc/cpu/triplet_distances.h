// Mean squared distances of samples to a positive and a negative, in one pass over the three.
#pragma once

#include <cstdint>

#include "cpu/vectors.h"

namespace fastcontrast {

// Strides of samples in elements; a sample has no gaps.
struct Triplets {
    const void *target, *positive, *negative;  // [B, n]
    int64_t b, n, target_stride, positive_stride, negative_stride;
    Kind kind;
};

// distances [2, B]: mean (positive - target)² of each sample, then mean (negative - target)²; 0 for n = 0.
void triplet_distances(const Triplets&, float* distances, int threads);

// Of `gradients` [2, B] of the distances; [B, n] without gaps and of the inputs' kind, null where not wanted.
void triplet_distances_backward(const Triplets&, const float* gradients, void* dtarget, void* dpositive,
                                void* dnegative, int threads);

}  // namespace fastcontrast
