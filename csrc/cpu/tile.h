// A tile holds rows [i0, i0 + m) by columns [j0, j0 + n) of queries · keysᵀ, as a matrix product left it; what every
// epilogue does to it first: scale, bias and masks. Other arrays are indexed by the whole problem's i or j.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/simd.h"

namespace fastcontrast {

// L_ij = scale · tile_ij + key_bias_j, and -inf where (i, j) is masked. Null pointers switch a term off.
struct Logits {
    float scale;
    const float* key_bias;     // [N]
    const int64_t* query_ids;  // [M]  equal ids are masked
    const int64_t* key_ids;    // [N]
    const float* guide_limit;  // [M]  guide tile above it is masked
    const int64_t* positives;  // [M]  row i's own column, never masked; outside [0, N): none
};

struct Tile {
    float* data;  // [m, n] contiguous
    int64_t i0, m, j0, n;
    const float* guide;  // [m, n], or null
};

// Sums go in lanes that are added pairwise: the rounding is then the same in every build.
inline constexpr int kLanes = 64;

template <typename Combine>
FC_INLINE float fold(float* lanes, Combine combine) {
    for (int half = kLanes / 2; half; half /= 2)
#pragma omp simd
        for (int l = 0; l < half; ++l) lanes[l] = combine(lanes[l], lanes[l + half]);
    return lanes[0];
}

// A product of denormals is a hundred times slower, and they contribute nothing.
FC_INLINE float flush(float x) { return std::fabs(x) < FLT_MIN ? 0.0f : x; }

// Row i's own column within the tile, or -1.
FC_INLINE int64_t own_column(const Logits& logits, const Tile& tile, int64_t i) {
    const int64_t own = logits.positives ? logits.positives[tile.i0 + i] - tile.j0 : -1;
    return own < tile.n ? own : -1;
}

FC_INLINE void logits_row(const Logits& logits, const Tile& tile, int64_t i, float* __restrict row) {
    const int64_t n = tile.n;
    const float scale = logits.scale;
    if (logits.key_bias) {
        const float* __restrict bias = logits.key_bias + tile.j0;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) row[j] = scale * row[j] + bias[j];
    } else {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) row[j] = scale * row[j];
    }
    if (!logits.query_ids && !tile.guide) return;

    const int64_t own = own_column(logits, tile, i);
    const float kept = own >= 0 ? row[own] : 0.0f;
    if (logits.query_ids) {
        const int64_t id = logits.query_ids[tile.i0 + i];
        const int64_t* __restrict ids = logits.key_ids + tile.j0;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) row[j] = ids[j] == id ? -INFINITY : row[j];
    }
    if (tile.guide) {
        const float limit = logits.guide_limit[tile.i0 + i];
        const float* __restrict guide = tile.guide + i * n;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) row[j] = guide[j] > limit ? -INFINITY : row[j];
    }
    if (own >= 0) row[own] = kept;
}

}  // namespace fastcontrast
