#include "cpu/similarity_softplus.h"

#include <type_traits>

#include "common/threads.h"

namespace fastcontrast {
namespace {

struct Entry {
    float loss, slope;
};

// One entry of the loss. With e = exp(-|L|), both log(1 + e) and sigmoid(-|L|) = e / (1 + e) are taken from it, so that
// nothing cancels: a positive with L = 20 has loss 2e-9 and slope -2e-9, not 0.
// log(1 + e) = 2 artanh(s), s = e / (2 + e) <= 1/3: seven terms are exact to 2e-8. One division serves both.
FC_INLINE Entry sigmoid_loss(float logit, float y) {
    const float e = exp_up_to_88(-std::fabs(logit));
    const float reciprocal = 1.0f / ((1.0f + e) * (2.0f + e));
    const float s = e * (1.0f + e) * reciprocal;
    const float t = e * (2.0f + e) * reciprocal;
    const float s2 = s * s;
    float series = 1.0f / 13.0f;
    series = series * s2 + 1.0f / 11.0f;
    series = series * s2 + 1.0f / 9.0f;
    series = series * s2 + 1.0f / 7.0f;
    series = series * s2 + 1.0f / 5.0f;
    series = series * s2 + 1.0f / 3.0f;
    series = series * s2 + 1.0f;
    const bool positive = logit > 0.0f;
    const float linear = positive ? (1.0f - y) * logit : -y * logit;
    const float slope = positive ? (1.0f - y) - t : t - y;
    const bool masked = logit < -FLT_MAX;
    return {masked ? 0.0f : linear + 2.0f * s * series, masked ? 0.0f : slope};
}

// A row: Σ loss, and with `write` the row becomes weight · slope, whose sum is returned beside it.
template <bool write, typename Target>
FC_INLINE Entry sum_row(std::conditional_t<write, float, const float>* __restrict row, int64_t n, float weight,
                        Target target) {
    float losses[kLanes] = {}, slopes[kLanes] = {};
    const auto add = [&](int64_t j, int l) {
        const Entry entry = sigmoid_loss(row[j], target(j));
        losses[l] += entry.loss;
        if constexpr (write) {
            row[j] = flush(weight * entry.slope);
            slopes[l] += row[j];
        }
    };
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes)
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) add(j + l, l);
    for (int l = 0; j < n; ++j, ++l) add(j, l);
    const auto plus = [](float a, float b) { return a + b; };
    return {fold(losses, plus), write ? fold(slopes, plus) : 0.0f};
}

template <bool write>
FC_INLINE Entry any_row(const Logits& logits, const Tile& tile, const Targets& targets, int64_t i, float weight) {
    float* row = tile.data + i * tile.n;
    const int64_t n = tile.n;
    const float high = targets.high, low = targets.low;
    if (targets.dense) {
        const float* __restrict dense = targets.dense + i * n;
        return sum_row<write>(row, n, weight, [=](int64_t j) { return dense[j]; });
    }
    if (targets.query_labels) {
        const int64_t label = targets.query_labels[tile.i0 + i];
        const int64_t* __restrict labels = targets.key_labels + tile.j0;
        return sum_row<write>(row, n, weight, [=](int64_t j) { return labels[j] == label ? high : low; });
    }
    // The own column is taken out of the loop, where it would cost a comparison an entry, and counted by itself.
    const int64_t own = own_column(logits, tile, i);
    const float own_logit = own >= 0 ? row[own] : 0.0f;
    if (own >= 0) row[own] = -INFINITY;
    Entry sum = sum_row<write>(row, n, weight, [=](int64_t) { return low; });
    if (own >= 0) {
        const Entry entry = sigmoid_loss(own_logit, high);
        row[own] = write ? weight * entry.slope : own_logit;
        sum.loss += entry.loss;
        if (write) sum.slope += row[own];
    }
    return sum;
}

FC_VECTOR_CLONES void softplus_rows(const Logits& logits, const Tile& tile, const Targets& targets, float* sums,
                                    const float* gradient, float* gradient_sums, float factor, int64_t begin,
                                    int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        logits_row(logits, tile, i, tile.data + i * tile.n);
        const int64_t at = tile.i0 + i;
        const Entry sum = gradient ? any_row<true>(logits, tile, targets, i, factor * gradient[at])
                                   : any_row<false>(logits, tile, targets, i, 0.0f);
        sums[at] += sum.loss;
        if (gradient_sums) gradient_sums[at] += sum.slope;
    }
}

}  // namespace

void softplus(const Logits& logits, const Tile& tile, const Targets& targets, float* sums, const float* gradient,
              float* gradient_sums, float factor, int threads) {
    in_shares(tile.m, team(threads, tile.m * tile.n), [&](int64_t begin, int64_t end, int) {
        softplus_rows(logits, tile, targets, sums, gradient, gradient_sums, factor, begin, end);
    });
}

}  // namespace fastcontrast
