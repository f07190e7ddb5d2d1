#include "cpu/similarity_lse.h"

#include <algorithm>
#include <type_traits>

#include "common/simd.h"
#include "common/threads.h"

namespace fastcontrast {
namespace {

// Rows handled together by one thread: their logits (16 · 2048 floats) stay in the second-level cache between the row
// pass and the column pass, and the column state is rescaled once for all of them.
constexpr int64_t kRows = 16;

// NaN entries are passed over here: they reach the result through the sum.
FC_INLINE float max_row(const float* __restrict row, int64_t n) {
    float lanes[kLanes];
    for (int l = 0; l < kLanes; ++l) lanes[l] = -FLT_MAX;
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes)
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) lanes[l] = row[j + l] > lanes[l] ? row[j + l] : lanes[l];
    for (int l = 0; j < n; ++j, ++l) lanes[l] = row[j] > lanes[l] ? row[j] : lanes[l];
    return fold(lanes, [](float a, float b) { return b > a ? b : a; });
}

// Σ exp(row - offset); with `keep` the row becomes exp(row - offset). Lanes that are added pairwise, rather than a
// reduction: the rounding is then the same in every build, also where the compiler does not vectorise.
template <bool keep>
FC_INLINE float exp_sum(std::conditional_t<keep, float, const float>* __restrict row, int64_t n, float offset) {
    float lanes[kLanes] = {};
    const auto add = [&](int64_t j, int l) {
        const float e = exp_fast(row[j] - offset);
        if constexpr (keep) row[j] = e;
        lanes[l] += e;
    };
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes)
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) add(j + l, l);
    for (int l = 0; j < n; ++j, ++l) add(j, l);
    return fold(lanes, [](float a, float b) { return a + b; });
}

// Columns of one group of rows: maxima first, then one rescaling and the exponentials against the new maxima.
struct ColumnState {
    std::vector<float> max, sum, part;
    std::vector<int64_t> best;
    ColumnState(int64_t n, bool wants_best)
        : max(n, -FLT_MAX), sum(n, 0.0f), part(n), best(wants_best ? n : 0, INT64_MAX) {}
};

FC_INLINE void column_max(const float* __restrict row, float* __restrict max, int64_t n) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) max[j] = row[j] > max[j] ? row[j] : max[j];
}

FC_INLINE void column_best(const float* __restrict row, const float* __restrict max, int64_t* __restrict best,
                           int64_t i, int64_t n) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) best[j] = row[j] > max[j] ? i : best[j];
}

FC_VECTOR_CLONES void lse_rows(const Logits& logits, const Tile& tile, int64_t begin, int64_t end, Online rows,
                               float* own, float* rescale, bool without_own, ColumnState* columns) {
    const int64_t n = tile.n;
    std::vector<float> previous(columns ? n : 0);
    for (int64_t group = begin; group < end; group += kRows) {
        const int64_t last = std::min(group + kRows, end);
        if (columns) previous = columns->max;
        for (int64_t i = group; i < last; ++i) {
            float* row = tile.data + i * tile.n;
            logits_row(logits, tile, i, row);
            const int64_t own_at = own_column(logits, tile, i);
            if (own && own_at >= 0) own[tile.i0 + i] = row[own_at];
            if (columns) {
                if (!columns->best.empty()) column_best(row, columns->max.data(), columns->best.data(), tile.i0 + i, n);
                column_max(row, columns->max.data(), n);
            }
            if (rows.max) {
                const int64_t at = tile.i0 + i;
                const float before = rows.max[at];
                const float here = max_row(row, n);
                if (here > before) {
                    rows.max[at] = here;
                    if (rows.best) rows.best[at] = tile.j0 + (std::find(row, row + n, here) - row);
                }
                const float offset = finite(rows.max[at]);
                const float factor = exp_fast(finite(before) - offset);
                const float sum = rescale ? exp_sum<true>(row, n, offset) : exp_sum<false>(row, n, offset);
                rows.sum[at] = rows.sum[at] * factor + sum;
                if (rescale) rescale[i] = factor;
                if (without_own && own_at >= 0) row[own_at] = 0.0f;
            }
        }
        if (columns) {
            const float* __restrict old = previous.data();
            const float* __restrict max = columns->max.data();
            float* __restrict part = columns->part.data();
            float* __restrict sum = columns->sum.data();
            std::fill_n(part, n, 0.0f);
            for (int64_t i = group; i < last; ++i) {
                const float* __restrict row = tile.data + i * tile.n;
#pragma omp simd
                for (int64_t j = 0; j < n; ++j) part[j] += exp_fast(row[j] - finite(max[j]));
            }
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) sum[j] = sum[j] * exp_fast(finite(old[j]) - finite(max[j])) + part[j];
        }
    }
}

FC_VECTOR_CLONES void merge_columns(const Tile& tile, Online into, const ColumnState& from, int64_t begin,
                                    int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
        const int64_t at = tile.j0 + j;
        const float before = into.max[at], here = from.max[j];
        if (here > before) {
            into.max[at] = here;
            if (into.best) into.best[at] = from.best[j];
        }
        const float offset = finite(into.max[at]);
        into.sum[at] = into.sum[at] * exp_fast(finite(before) - offset) + from.sum[j] * exp_fast(finite(here) - offset);
    }
}

// A row with nothing left has lse -inf; against FLT_MAX each of its weights is 0, where -inf - -inf would be NaN.
FC_INLINE float unless_empty(float lse) { return lse < -FLT_MAX ? FLT_MAX : lse; }

FC_VECTOR_CLONES void weights_rows(const Logits& logits, const Tile& tile, const float* source, int64_t begin,
                                   int64_t end, Softmax rows, Softmax columns, const float* own_gradient,
                                   float factor) {
    const int64_t n = tile.n;
    std::vector<float> h(columns.gradient ? n : 0), c(h.size());
    for (size_t j = 0; j < h.size(); ++j) {
        h[j] = factor * columns.gradient[tile.j0 + j];
        c[j] = unless_empty(columns.high[tile.j0 + j]);
    }
    const float* __restrict c_low = columns.gradient ? columns.low + tile.j0 : nullptr;
    for (int64_t i = begin; i < end; ++i) {
        float* __restrict out = tile.data + i * n;
        if (source) {
            if (source + i * n != out) std::copy_n(source + i * n, n, out);
        } else {
            logits_row(logits, tile, i, out);
        }
        const int64_t at = tile.i0 + i;
        const float g = rows.gradient ? factor * rows.gradient[at] : 0.0f;
        const float r = rows.gradient ? unless_empty(rows.high[at]) : 0.0f;
        const float r_low = rows.gradient ? rows.low[at] : 0.0f;
        // Differences first against `high`, which is exact near the maximum, then against `low`: at scale 100 the
        // rounding of the log-sum-exp itself would otherwise cost two digits of the gradient. No logit is larger than
        // its log-sum-exp.
        if (rows.gradient && columns.gradient) {
#pragma omp simd
            for (int64_t j = 0; j < n; ++j)
                out[j] =
                    flush(g * exp_up_to_88((out[j] - r) - r_low) + h[j] * exp_up_to_88((out[j] - c[j]) - c_low[j]));
        } else if (rows.gradient) {
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) out[j] = flush(g * exp_up_to_88((out[j] - r) - r_low));
        } else if (columns.gradient) {
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) out[j] = flush(h[j] * exp_up_to_88((out[j] - c[j]) - c_low[j]));
        } else {
            std::fill_n(out, n, 0.0f);
        }
        if (own_gradient) {
            const int64_t column = own_column(logits, tile, i);
            if (column >= 0) out[column] += factor * own_gradient[at];
        }
    }
}

}  // namespace

void lse(const Logits& logits, const Tile& tile, Online rows, Online columns, float* own, float* rescale,
         bool without_own, int threads) {
    const int count = team(threads, tile.m * tile.n);
    std::vector<ColumnState> states(columns.max ? count : 0, ColumnState(columns.max ? tile.n : 0, columns.best));
    in_shares(tile.m, count, [&](int64_t begin, int64_t end, int t) {
        lse_rows(logits, tile, begin, end, rows, own, rescale, without_own, columns.max ? &states[t] : nullptr);
    });
    if (!columns.max) return;
    for (const ColumnState& state : states) merge_columns(tile, columns, state, 0, tile.n);
}

void weights(const Logits& logits, const Tile& target, const float* source, Softmax rows, Softmax columns,
             const float* own_gradient, float factor, int threads) {
    in_shares(target.m, team(threads, target.m * target.n), [&](int64_t begin, int64_t end, int) {
        weights_rows(logits, target, source, begin, end, rows, columns, own_gradient, factor);
    });
}

FC_VECTOR_CLONES double dot(const float* a, const float* b, int64_t count) {
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(a[i]) * b[i];
    return sum;
}

Running::Running(int64_t count, bool best) : max_(count, -FLT_MAX), sum_(count, 0.0f), best_(best ? count : 0, -1) {}

void Running::finish(float* high, float* low, int64_t* best, float* sum) const {
    for (size_t i = 0; i < max_.size(); ++i) {
        const double lse = static_cast<double>(max_[i]) + std::log(static_cast<double>(sum_[i]));
        high[i] = static_cast<float>(lse);
        low[i] = std::isfinite(lse) ? static_cast<float>(lse - high[i]) : 0.0f;
    }
    if (best) std::copy(best_.begin(), best_.end(), best);
    if (sum) std::copy(sum_.begin(), sum_.end(), sum);
}

}  // namespace fastcontrast
