// The second half of max_cosine, which contrastive_select has in its own last kernel.
#pragma once

#include "common.cuh"
#include "max_cosine.h"

namespace fastcontrast::cuda {

struct Nearest {
    float cosine;
    int64_t index;
};

// A whole warp calls it.
__device__ __forceinline__ Nearest nearest(const uint64_t* keys,  // [B · K, splits]
                                           const float* norms,    // [B · K]
                                           int64_t candidate, int splits) {
    uint64_t best = 0;
    for (int i = lane_of_thread(); i < splits; i += kWarp) best = Larger{}(best, keys[candidate * splits + i]);
    best = warp_reduce(best, Larger{});
    if (best == 0) return {-INFINITY, -1};
    return {value_of(best) / norms[candidate], index_of(best)};
}

}  // namespace fastcontrast::cuda
