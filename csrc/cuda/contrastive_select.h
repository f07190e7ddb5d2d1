#pragma once

#include <cstdint>

#include "max_cosine.h"

namespace fastcontrast::cuda {

// int64 words between the launches of contrastive_candidates
int64_t candidates_workspace(int64_t rows, int splits);

int contrastive_candidates(const void* logits,    // [B, V]
                           float* probabilities,  // [B, k]
                           int64_t* tokens,       // [B, k]
                           uint64_t* workspace, int64_t b, int64_t v, int64_t k, int64_t stride, int splits, int dtype,
                           void* stream);

int contrastive_select(const Cosines& problem,
                       const float* probabilities,  // [B, K]
                       uint64_t* workspace,
                       int64_t* choice,      // [B]
                       float* score,         // [B, K]
                       float* degeneration,  // [B, K]
                       float keep, float alpha, void* stream);

}  // namespace fastcontrast::cuda
