#pragma once

#include <cstdint>

namespace fastcontrast::cuda {

struct Mixture {
    const void* z1;       // [R, V]
    const void* z0;       // [R, V]
    const float* weight;  // [R]; null: the divergence, at least `floor`
    float* out;           // [R, V]
    float* a;             // [R]
    float* divergence;    // [R]; NaN where it was not asked for
    int64_t rows, v, stride1, stride0;
    float keep;  // of z1; NaN: 1 + a
    float floor;
    float threshold;  // tokens with z1 < max z1 + threshold are left out
    bool diverge;
    int dtype, splits;
};

int64_t mixture_workspace(int64_t rows, int splits);  // floats between the launches

int two_logit_mix(const Mixture& problem, float* workspace, void* stream);

}  // namespace fastcontrast::cuda
