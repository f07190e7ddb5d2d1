#include "cpu/sibling_attention.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/threads.h"
#include "cpu/panels.h"

namespace fastcontrast {
namespace {

constexpr int64_t kBlockKeys = 64;  // keys and values that stay in the first-level cache

// What one thread makes of some keys of one group. Row l, a query, is lane l of the scores, so that maxima and sums
// over keys are lane by lane.
struct Share {
    int64_t width, columns;  // lanes, and Dv rounded up to whole vectors
    float* query;            // [D, width]
    float* scores;           // [kBlockKeys, width]
    float *high, *sum;       // [width]
    float* out;              // [width, columns]

    static int64_t size(int64_t width, int64_t d, int64_t columns) { return width * (d + kBlockKeys + 2 + columns); }

    Share(float* memory, int64_t width, int64_t d, int64_t columns) : width(width), columns(columns) {
        query = memory;
        scores = query + d * width;
        high = scores + kBlockKeys * width;
        sum = high + width;
        out = sum + width;
    }
};

// scores [count, W] = keys · query for up to kBlockKeys keys; the values of these keys are fetched meanwhile.
template <int W>
FC_INLINE void score_keys(const float* keys, int64_t stride, const float* values, int64_t value_stride, int64_t count,
                          const float* query, int64_t d, int64_t dv, float* scores) {
    dots<W>(keys, stride, count, query, d, scores, [&](int64_t t, int i) FC_INLINE_LAMBDA {
        for (int64_t j = 0; j < d; j += kWide) __builtin_prefetch(keys + (t + kRows + i) * stride + j);
        for (int64_t j = 0; j < dv; j += kWide) __builtin_prefetch(values + (t + i) * value_stride + j);
    });
}

// Most blocks of keys are open to every query: of the others alone the mask is added.
FC_INLINE void add_mask(const Siblings& s, const float* mask, int64_t count, const Share& c) {
    int64_t closed = 0;
    for (int64_t j = 0; j < s.siblings; ++j)
#pragma omp simd reduction(+ : closed)
        for (int64_t t = 0; t < count; ++t) closed += mask[j * s.mask_row + t] != 0.0f;
    if (!closed) return;
    for (int64_t l = 0; l < s.heads * s.siblings; ++l)
        for (int64_t t = 0; t < count; ++t) c.scores[t * c.width + l] += mask[l % s.siblings * s.mask_row + t];
}

template <int W>
FC_INLINE void attend(const Siblings& s, const Share& c, int64_t b, int64_t g, int64_t begin, int64_t end) {
    const int64_t rows = s.heads * s.siblings;
    std::fill(c.query, c.out + W * c.columns, 0.0f);
    std::fill(c.high, c.high + W, -INFINITY);
    for (int64_t l = 0; l < rows; ++l) {
        const int64_t head = g * s.heads + l / s.siblings;
        const float* q = s.q + b * s.q_batch + head * s.q_head + l % s.siblings * s.q_row;
        for (int64_t j = 0; j < s.d; ++j) c.query[j * W + l] = q[j] * s.scale;
    }
    const float *keys = s.k + b * s.k_batch + g * s.k_group, *values = s.v + b * s.v_batch + g * s.v_group;
    float factor[W];
    for (int64_t t = begin; t < end; t += kBlockKeys) {
        const int64_t count = std::min(kBlockKeys, end - t);
        score_keys<W>(keys + t * s.k_row, s.k_row, values + t * s.v_row, s.v_row, count, c.query, s.d, s.dv, c.scores);
        add_mask(s, s.mask + b * s.mask_batch + t, count, c);
        exponentials<W>(c.scores, count, c.high, c.sum, factor);
        add_rows<From::factors>({c.scores, 1, W}, values + t * s.v_row, s.v_row, count, factor, c.out, c.columns, rows,
                                s.dv);
    }
}

FC_VECTOR_CLONES void attend_share(const Siblings& s, const Share& c, int64_t b, int64_t g, int64_t begin,
                                   int64_t end) {
    if (c.width == 8) return attend<8>(s, c, b, g, begin, end);
    if (c.width == 16) return attend<16>(s, c, b, g, begin, end);
    attend<kMostQueries>(s, c, b, g, begin, end);
}

// Shares have maximum, sum and output against maxima of their own; together they are the result.
FC_VECTOR_CLONES void merge(const Siblings& s, const Share* shares, int64_t splits, int64_t b, int64_t g, float* out) {
    for (int64_t l = 0; l < s.heads * s.siblings; ++l) {
        const int64_t head = g * s.heads + l / s.siblings, sibling = l % s.siblings;
        float* row = out + ((b * s.siblings + sibling) * s.groups * s.heads + head) * s.dv;
        float high = -INFINITY, sum = 0.0f;
        for (int64_t i = 0; i < splits; ++i) high = std::max(high, shares[i].high[l]);
        std::fill(row, row + s.dv, 0.0f);
        for (int64_t i = 0; i < splits; ++i) {
            const float factor = exp_fast(finite(shares[i].high[l]) - finite(high));
            sum += shares[i].sum[l] * factor;
            const float* part = shares[i].out + l * shares[i].columns;
#pragma omp simd
            for (int64_t j = 0; j < s.dv; ++j) row[j] += part[j] * factor;
        }
        const float inverse = 1.0f / sum;
#pragma omp simd
        for (int64_t j = 0; j < s.dv; ++j) row[j] *= inverse;
    }
}

}  // namespace

void sibling_attention(const Siblings& s, float* out, int threads) {
    const int64_t rows = s.heads * s.siblings, width = rows <= 8 ? 8 : rows <= 16 ? 16 : kMostQueries;
    const int64_t columns = (s.dv + kWide - 1) / kWide * kWide, size = Share::size(width, s.d, columns);
    const int64_t pairs = s.b * s.groups;
    if (!pairs) return;
    // As many shares of a group's keys as keep every thread busy; fewer heads than threads are common.
    const int count = team(threads, pairs * s.t * (s.d + s.dv));
    const int64_t splits = count / std::gcd<int64_t>(count, pairs);
    const int64_t keys = ((s.t + splits - 1) / splits + kRows - 1) / kRows * kRows;
    Scratch scratch(pairs * splits * size);
    std::vector<Share> shares;
    shares.reserve(pairs * splits);
    for (int64_t i = 0; i < pairs * splits; ++i) shares.emplace_back(scratch.data() + i * size, width, s.d, columns);
    in_shares(pairs * splits, count, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t pair = i / splits, first = std::min(i % splits * keys, s.t);
            attend_share(s, shares[i], pair / s.groups, pair % s.groups, first, std::min(first + keys, s.t));
        }
    });
    for (int64_t i = 0; i < pairs; ++i) merge(s, shares.data() + i * splits, splits, i / s.groups, i % s.groups, out);
}

}  // namespace fastcontrast
