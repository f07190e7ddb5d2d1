#pragma once

#include <cstdint>

namespace fastcontrast::cuda {

struct Cosines {
    const void* candidates;  // [B, K, D]
    const void* context;     // [B, T, D]
    const bool* valid;       // [B, T]; null: all are
    int64_t b, k, t, d;
    int64_t candidate_batch, candidate_row, context_batch, context_row;  // strides
    int dtype;
    // How the chip is shared, found by `plan`.
    bool wide = false;  // 128-bit loads
    int parts = 1;      // warps among which a row of the context is split
    int splits = 1;     // blocks among which the T rows are split

    void plan(int multiprocessors);
    // int64 words between the two launches: the best key of each split [B, K, splits], the norms [B, K]
    int64_t workspace() const { return b * k * splits + (b * k + 1) / 2; }
};

// The first of two launches: for each candidate and split the largest ⟨c, x⟩ / |x|, and |c|.
int cosine_partials(const Cosines& problem, uint64_t* workspace, void* stream);

int max_cosine(const Cosines& problem, uint64_t* workspace,
               float* values,     // [B, K]
               int64_t* indices,  // [B, K]
               void* stream);

}  // namespace fastcontrast::cuda
