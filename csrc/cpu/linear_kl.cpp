#include "cpu/linear_kl.h"

#include "common/simd.h"
#include "common/threads.h"

namespace fastcontrast {
namespace {

// p · (e^-d - 1 + d) for d = log p - log q and q = p · e^-d given. Summed over a row of two distributions it is
// Σ p (log p - log q), since Σ q = Σ p; but no term is negative, so that nothing cancels between near equals, and what
// both logarithms have wrong in common drops out. 0 · infinity counts as 0.
FC_INLINE float excess(float p, float q, float d) {
    float series = 1.0f / 40320;
    series = series * -d + 1.0f / 5040;
    series = series * -d + 1.0f / 720;
    series = series * -d + 1.0f / 120;
    series = series * -d + 1.0f / 24;
    series = series * -d + 1.0f / 6;
    series = series * -d + 1.0f / 2;
    const float direct = (q - p) + (p > 0.0f ? p * d : 0.0f);
    return std::fabs(d) < 0.5f ? p * (d * d) * series : direct;
}

// Log-sum-exps of one row of both.
struct Offsets {
    float p_high, p_low, t_high, t_low;
};

struct Terms {
    float p, t, log_p, log_t;
};

FC_INLINE Terms terms(float student, float teacher, Offsets lse) {
    const float log_p = (student - lse.p_high) - lse.p_low, log_t = (teacher - lse.t_high) - lse.t_low;
    return {exp_up_to_88(log_p), exp_up_to_88(log_t), log_p, log_t};
}

// A row with nothing left has lse -inf; against FLT_MAX each of its probabilities is 0.
FC_INLINE float unless_empty(float lse) { return lse < -FLT_MAX ? FLT_MAX : lse; }

FC_INLINE Offsets offsets(Softmax p, Softmax t, int64_t at) {
    return {unless_empty(p.high[at]), p.low[at], unless_empty(t.high[at]), t.low[at]};
}

// The sums of a row in lanes that are added pairwise; with `weights` the student's row becomes scale · (p - t).
template <bool forward, bool reverse, bool weights>
FC_INLINE void sum_row(float* __restrict student, const float* __restrict teacher, int64_t n, Offsets lse, int64_t at,
                       KlSums sums, float scale) {
    float f[kLanes] = {}, r[kLanes] = {}, e[kLanes] = {};
    const auto add = [&](int64_t j, int l) {
        const Terms x = terms(student[j], teacher[j], lse);
        if constexpr (forward) f[l] += excess(x.t, x.p, x.log_t - x.log_p);
        if constexpr (reverse) r[l] += excess(x.p, x.t, x.log_p - x.log_t);
        // Not "t > 0 ? … : 0" as in `excess`: of the same condition twice GCC 12 makes branches, and no vector loop.
        e[l] -= x.t * (x.log_t > -FLT_MAX ? x.log_t : -FLT_MAX);
        if constexpr (weights) student[j] = flush(scale * (x.p - x.t));
    };
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes)
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) add(j + l, l);
    for (int l = 0; j < n; ++j, ++l) add(j, l);
    const auto plus = [](float a, float b) { return a + b; };
    if constexpr (forward) sums.forward[at] += fold(f, plus);
    if constexpr (reverse) sums.reverse[at] += fold(r, plus);
    if (sums.entropy) sums.entropy[at] += fold(e, plus);
}

FC_VECTOR_CLONES void sum_rows(const Tile& tile, const float* teacher, Softmax p, Softmax t, KlSums sums, int64_t begin,
                               int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const int64_t n = tile.n, at = tile.i0 + i;
        const Offsets lse = offsets(p, t, at);
        float* student = tile.data + i * n;
        if (sums.forward && sums.reverse)
            sum_row<true, true, false>(student, teacher + i * n, n, lse, at, sums, 0.0f);
        else if (sums.forward)
            sum_row<true, false, false>(student, teacher + i * n, n, lse, at, sums, 0.0f);
        else
            sum_row<false, true, false>(student, teacher + i * n, n, lse, at, sums, 0.0f);
    }
}

FC_VECTOR_CLONES void weight_rows(const Tile& tile, const float* teacher, Softmax p, Softmax t, float forward,
                                  float reverse, KlSums sums, float factor, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const int64_t n = tile.n, at = tile.i0 + i;
        const Offsets lse = offsets(p, t, at);
        const float scale = factor * p.gradient[at];
        float* __restrict out = tile.data + i * n;
        const float* __restrict source = teacher + i * n;
        if (reverse == 0.0f) {
            sum_row<true, false, true>(out, source, n, lse, at, sums, scale * forward);
            continue;
        }
        const float mean = sums.reverse[at];
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
            const Terms x = terms(out[j], source[j], lse);
            // p itself where it is 0 or NaN
            const float pulled = x.p > 0.0f ? x.p * ((x.log_p - x.log_t) - mean) : x.p;
            out[j] = flush(scale * (forward * (x.p - x.t) + reverse * pulled));
        }
    }
}

}  // namespace

void kl_sums(const Tile& student, const float* teacher, Softmax p, Softmax t, KlSums sums, int threads) {
    in_shares(student.m, team(threads, student.m * student.n),
              [&](int64_t begin, int64_t end, int) { sum_rows(student, teacher, p, t, sums, begin, end); });
}

void kl_weights(const Tile& student, const float* teacher, Softmax p, Softmax t, float forward, float reverse,
                KlSums sums, float factor, int threads) {
    in_shares(student.m, team(threads, student.m * student.n), [&](int64_t begin, int64_t end, int) {
        weight_rows(student, teacher, p, t, forward, reverse, sums, factor, begin, end);
    });
}

}  // namespace fastcontrast
