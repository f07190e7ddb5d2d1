// Attention of a few queries over one stored prefix, at the speed at which its keys and values can be read.
#pragma once

#include <cstdint>

namespace fastcontrast {

inline constexpr int kMostQueries = 32;  // heads · siblings of one group

// Strides count floats; the last dimension of everything has none.
struct Siblings {
    const float *q, *k, *v, *mask;
    int64_t b, groups, heads, siblings, t, d, dv;  // `heads` queries share the keys of one of `groups`
    int64_t q_batch, q_head, q_row;                // q [B, groups · heads, siblings, D]
    int64_t k_batch, k_group, k_row;               // k [B, groups, T, D]
    int64_t v_batch, v_group, v_row;               // v [B, groups, T, Dv]
    int64_t mask_batch, mask_row;                  // added to the scores, [B, siblings, T]
    float scale;
};

// out [B, siblings, groups · heads, Dv] = softmax(scale · q · kᵀ + mask) · v, without gaps.
void sibling_attention(const Siblings& s, float* out, int threads);

}  // namespace fastcontrast
