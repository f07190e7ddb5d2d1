// The two halves of a step of contrastive search: the k most likely tokens, and the choice among them.
#pragma once

#include "cpu/max_cosine.h"

namespace fastcontrast {

// probabilities, tokens [rows, k]: the k largest of each row's softmax, largest first, equals by lower token.
void contrastive_candidates(const void* logits, Kind, int64_t rows, int64_t vocabulary, int64_t stride, int64_t k,
                            float* probabilities, int64_t* tokens, int threads);

// score = (1 - alpha) p - alpha · degeneration, [B, K], and each row's first best, [B].
void contrastive_select(const float* probabilities, const Cosines&, float alpha, int64_t* choice, float* score,
                        float* degeneration, int64_t* nearest, int threads);

}  // namespace fastcontrast
