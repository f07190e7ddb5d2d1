// One layer of Llama's form, for the few rows of a step of look-ahead.
#pragma once

#include <cstdint>

namespace fastcontrast {

struct Linear {
    const float *weight, *bias;  // [out, in], [out] or null
};

struct LlamaLayer {
    Linear q, k, v, o, gate, up, down;
    const float *attention_norm, *mlp_norm;  // [hidden]
    float attention_eps, mlp_eps, scale;
    int64_t hidden, inner, heads, groups, width;  // `heads` of `width`, which share the keys of `groups`
};

// b texts of k siblings each, all of one position.
struct LlamaStep {
    const float* x;          // [b, k, hidden]
    const float *cos, *sin;  // [b, k, width] or, if rotation_batch is 0, [k, width]
    float *keys, *values;    // [b, groups, slots, width]
    const float* mask;       // [b, k, start + k], added to the scores
    int64_t b, k, start, rotation_batch, slots_batch, slots_group, mask_batch, mask_row;
};

// y = x + o(attention(norm(x))), out = y + down(silu(gate(norm(y))) * up(norm(y))), both [b, k, hidden]. Writes keys
// and values of the siblings to slots start ... start + k - 1. b · k is at most kFewRows, heads / groups · k
// kMostQueries.
void llama_layer(const LlamaLayer& layer, const LlamaStep& step, float* out, int threads);

}  // namespace fastcontrast
