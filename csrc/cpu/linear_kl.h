// Tile epilogue of linear_kl: the divergence of two distributions whose logits lie beside each other, and its gradient.
// A student's tile and a teacher's of the same shape hold logits; p = softmax of the student's rows, t of the
// teacher's.
#pragma once

#include "cpu/similarity_lse.h"

namespace fastcontrast {

// Sums of whole rows, [M] each: tiles add to them. Null: not wanted.
struct KlSums {
    float* forward = nullptr;  // Σ_j t_j (log t_j - log p_j)
    float* reverse = nullptr;  // Σ_j p_j (log p_j - log t_j)
    float* entropy = nullptr;  // -Σ_j t_j log t_j
};

// Log-sum-exps come as `Softmax`, the upstream gradient of the rows with the student's.
void kl_sums(const Tile& student, const float* teacher, Softmax p, Softmax t, KlSums sums, int threads);

// The student's tile becomes G_ij = factor · gradient_i · (forward · (p - t) + reverse · p · (log p - log t - R_i)) for
// R = sums.reverse, which is complete by then. Forward alone: `sums` are added in the same pass.
void kl_weights(const Tile& student, const float* teacher, Softmax p, Softmax t, float forward, float reverse,
                KlSums sums, float factor, int threads);

}  // namespace fastcontrast
