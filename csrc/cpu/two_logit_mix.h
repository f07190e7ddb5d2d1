// Two rows of logits to one distribution, and how far apart they are.
#pragma once

#include "cpu/vectors.h"

namespace fastcontrast {

struct LogitPair {
    const void* logits;    // [R, V]
    const void* contrast;  // [R, V]
    int64_t rows, vocabulary, stride, contrast_stride;
    Kind kind;
};

struct MixSettings {
    const float* weight;  // [R], or null: the divergence
    float keep;           // the logits are taken `keep` times; NaN: 1 + weight times
    float floor;          // of the divergence as a weight
    float threshold;      // logits below the largest + threshold are implausible
    bool diverge;         // the divergence is to be computed
};

// out [R, V] = log softmax(keep · logits - weight · contrast); weight, divergence [R], NaN where it is not computed.
void two_logit_mix(const LogitPair&, const MixSettings&, float* out, float* weight, float* divergence, int threads);

}  // namespace fastcontrast
