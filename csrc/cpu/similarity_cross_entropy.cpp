#include "cpu/similarity_cross_entropy.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/simd.h"
#include "common/threads.h"

namespace fastcontrast {

double loss_sum(const float* own, const float* rows, const float* rows_low, const float* columns,
                const float* columns_low, int64_t count) {
    double sum = 0.0;
    for (int64_t i = 0; i < count; ++i) {
        // The differences first: near a solved row lse and own logit agree in almost all digits.
        sum += (static_cast<double>(rows[i]) - own[i]) + rows_low[i];
        if (columns) sum += (static_cast<double>(columns[i]) - own[i]) + columns_low[i];
    }
    return columns ? sum / 2 : sum;
}

namespace {

// Views into the state of a small loss.
template <typename T>
struct SmallState {
    T *high, *low, *share, *each;   // of rows: log-sum-exp, weight of the row, and of each of its positives
    T *columns_high, *columns_low;  // of columns
    SmallState(T* state, int64_t m, int64_t n)
        : high(state),
          low(state + m),
          share(state + 2 * m),
          each(state + 3 * m),
          columns_high(state + 4 * m),
          columns_low(state + 4 * m + n) {}
};

FC_INLINE bool is_positive(int64_t label, int64_t other, float logit) { return label == other && logit != -INFINITY; }

FC_VECTOR_CLONES double positives_sum(const float* __restrict row, const int64_t* __restrict labels, int64_t label,
                                      int64_t n, int64_t& count) {
    double sum = 0.0;
    int64_t found = 0;
#pragma omp simd reduction(+ : sum, found)
    for (int64_t j = 0; j < n; ++j) {
        const bool hit = is_positive(label, labels[j], row[j]);
        found += hit;
        sum += hit ? row[j] : 0.0f;
    }
    count = found;
    return sum;
}

// Takes the positives' share from rows of the target, and returns Σ target · logits; what is masked has weight 0.
FC_VECTOR_CLONES double finish_rows(const Logits& problem, Labels labels, const float* logits, float* target,
                                    int64_t begin, int64_t end, int64_t n, const float* each, const float* mirrored,
                                    float factor) {
    double sum = 0.0;
    for (int64_t i = begin; i < end; ++i) {
        const float* __restrict row = logits + i * n;
        float* __restrict out = target + i * n;
        const float own = each[i];
        if (labels.queries) {
            const int64_t label = labels.queries[i];
#pragma omp simd
            for (int64_t j = 0; j < n; ++j)
                out[j] -= is_positive(label, labels.keys[j], row[j]) ? factor * (own + mirrored[j]) : 0.0f;
        } else if (const int64_t j = problem.positives[i]; j >= 0 && j < n) {
            out[j] -= factor * (own + mirrored[j]);
        }
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n; ++j) sum += static_cast<double>(out[j]) * (out[j] == 0.0f ? 0.0f : row[j]);
    }
    return sum;
}

double label_loss(Labels labels, const float* logits, int64_t m, int64_t n, SmallState<float> state, int threads) {
    const int count = team(threads, m * n);
    std::vector<double> sums(count, 0.0), counted(count, 0.0);
    in_shares(m, count, [&](int64_t begin, int64_t end, int t) {
        for (int64_t i = begin; i < end; ++i) {
            int64_t found;
            const double own = positives_sum(logits + i * n, labels.keys, labels.queries[i], n, found);
            state.share[i] = found ? 1.0f : 0.0f;
            state.each[i] = found ? 1.0f / found : 0.0f;
            if (!found) continue;
            counted[t] += 1.0;
            sums[t] += (state.high[i] - own / found) + state.low[i];
        }
    });
    const double rows = std::max(1.0, std::accumulate(counted.begin(), counted.end(), 0.0));
    for (int64_t i = 0; i < m; ++i) {
        state.share[i] /= static_cast<float>(rows);
        state.each[i] /= static_cast<float>(rows);
    }
    return std::accumulate(sums.begin(), sums.end(), 0.0) / rows;
}

}  // namespace

double small_loss(const Logits& problem, Labels labels, float* logits, int64_t m, int64_t n, bool both, float* state,
                  int threads) {
    const SmallState<float> s(state, m, n);
    Running rows(m, false), columns(both ? n : 0, false);
    std::vector<float> own(m, -INFINITY);
    lse(problem, Tile{logits, 0, m, 0, n, nullptr}, rows.online(), both ? columns.online() : Online{}, own.data(),
        nullptr, false, threads);
    rows.finish(s.high, s.low, nullptr, nullptr);
    columns.finish(s.columns_high, s.columns_low, nullptr, nullptr);
    if (labels.queries) return label_loss(labels, logits, m, n, s, threads);
    std::fill_n(s.share, m, 1.0f / m);
    std::fill_n(s.each, m, 1.0f / m);
    return loss_sum(own.data(), s.high, s.low, both ? s.columns_high : nullptr, s.columns_low, m) / m;
}

double small_gradient(const Logits& problem, Labels labels, const float* logits, float* target, int64_t m, int64_t n,
                      bool both, bool symmetric, const float* state, float gradient, int threads) {
    const SmallState<const float> s(state, m, n);
    std::vector<float> share(s.share, s.share + m), mirrored(n, 0.0f);
    for (float& x : share) x *= both ? gradient / 2 : gradient;
    if (symmetric) std::copy_n(s.each, n, mirrored.data());
    const Softmax rows{share.data(), s.high, s.low};
    const Softmax columns = symmetric ? rows : both ? Softmax{share.data(), s.columns_high, s.columns_low} : Softmax{};
    const Tile tile{target, 0, m, 0, n, nullptr};
    weights(problem, tile, logits, rows, columns, nullptr, problem.scale, threads);
    const int count = team(threads, m * n);
    std::vector<double> sums(count);
    in_shares(m, count, [&](int64_t begin, int64_t end, int t) {
        sums[t] = finish_rows(problem, labels, logits, target, begin, end, n, s.each, mirrored.data(),
                              problem.scale * gradient);
    });
    return std::accumulate(sums.begin(), sums.end(), 0.0);
}

}  // namespace fastcontrast
