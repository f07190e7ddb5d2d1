#include "cpu/maxsim.h"

#include <vector>

#include "common/threads.h"
#include "cpu/lanes.h"

namespace fastcontrast {
namespace {

constexpr int kRows = 32;           // of a tile whose best tokens stay in registers while a document passes by
constexpr int64_t kDocuments = 16;  // whose tokens, or gradients, stay in the second cache while rows pass by

struct Best {
    float value[kRows];
    int32_t token[kRows];
};

// Scores of a document with `rows` rows, kRows or fewer; the first of equals stays, -1 where no score is above -inf.
template <bool Whole>
FC_INLINE void best_tokens(const Scores& s, const float* __restrict x, const bool* real, int rows, Best* best) {
    const int64_t stride = s.queries * s.tokens;
    const int n = Whole ? kRows : rows;
    float high[kRows], odd[kRows] = {};
    int32_t at[kRows];
    std::fill(high, high + kRows, -INFINITY);
    std::fill(at, at + kRows, -1);
    for (int64_t j = 0; j < s.length; ++j) {
        if (!real || real[j]) {
            const float* __restrict row = x + j * stride;
            const int32_t token = static_cast<int32_t>(j);
#pragma omp simd
            for (int l = 0; l < n; ++l) {
                at[l] = row[l] > high[l] ? token : at[l];
                high[l] = row[l] > high[l] ? row[l] : high[l];
                odd[l] += 0.0f * row[l];
            }
        } else if (s.zero) {
#pragma omp simd
            for (int l = 0; l < n; ++l) {
                at[l] = 0.0f > high[l] ? -1 : at[l];
                high[l] = 0.0f > high[l] ? 0.0f : high[l];
            }
        }
    }
    for (int l = 0; l < n; ++l) {
        best->value[l] = high[l], best->token[l] = at[l];
        if (odd[l] == odd[l]) continue;
        // Infinity, which changes nothing, or NaN, which no comparison finds.
        for (int64_t j = s.length; j--;)
            if (const float score = x[j * stride + l]; (!real || real[j]) && score != score)
                best->value[l] = score, best->token[l] = static_cast<int32_t>(j);
    }
}

// Rows [first, last), at most kRows, of a document: what they add to sums goes to `values`.
FC_VECTOR_CLONES void fold_rows(const Scores& s, const Winners& w, int64_t document, int64_t first, int64_t last,
                                float* values) {
    const bool* real = s.document_mask ? s.document_mask + document * s.length : nullptr;
    const float* x = s.data + document * s.length * s.queries * s.tokens + first;
    const int rows = static_cast<int>(last - first);
    Best best;
    if (rows == kRows)
        best_tokens<true>(s, x, real, rows, &best);
    else
        best_tokens<false>(s, x, real, rows, &best);
    if (s.query_mask)
        for (int l = 0; l < rows; ++l)
            if (!s.query_mask[first + l]) best.value[l] = 0.0f, best.token[l] = -1;
    std::copy(best.value, best.value + rows, values);
    if (!w.data) return;
    const int64_t at = document * w.stride + first;
    if (w.wide)
        std::copy(best.token, best.token + rows, static_cast<int32_t*>(w.data) + at);
    else
        for (int l = 0; l < rows; ++l) static_cast<int16_t*>(w.data)[at + l] = static_cast<int16_t>(best.token[l]);
}

template <typename T>
FC_INLINE void add_scaled(float* __restrict out, float factor, const T* __restrict x, int64_t d) {
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) out[j] += factor * widen(x[j]);
}

// Calls fn(row, c, token) for rows [begin, end) and documents [c0, c1) that have a winner, document by document in each
// row, and kDocuments of them at a time.
template <typename Index, typename Function>
FC_INLINE void each_winner(const Index* winners, int64_t stride, int64_t begin, int64_t end, int64_t c0, int64_t c1,
                           Function fn) {
    for (int64_t first = c0; first < c1; first += kDocuments)
        for (int64_t row = begin; row < end; ++row)
            for (int64_t c = first; c < std::min(first + kDocuments, c1); ++c)
                if (const int64_t token = winners[c * stride + row]; token >= 0) fn(row, c, token);
}

template <typename Function>
FC_INLINE void each_winner(const Winners& w, int64_t begin, int64_t end, int64_t c0, int64_t c1, Function fn) {
    if (w.wide) return each_winner(static_cast<const int32_t*>(w.data), w.stride, begin, end, c0, c1, fn);
    each_winner(static_cast<const int16_t*>(w.data), w.stride, begin, end, c0, c1, fn);
}

FC_VECTOR_CLONES void queries_share(const MaxSimGradient& g, const Tokens& documents, float* out, int64_t begin,
                                    int64_t end) {
    std::fill(out + begin * g.d, out + end * g.d, 0.0f);
    with_kind(documents.kind, documents.data, [&](auto* x) FC_INLINE_LAMBDA {
        each_winner(g.winners, begin, end, 0, g.c, [&](int64_t row, int64_t c, int64_t token) FC_INLINE_LAMBDA {
            const float factor = g.gradient[row / g.tq * g.c + c];
            add_scaled(out + row * g.d, factor, x + c * documents.batch + token * documents.row, g.d);
        });
    });
}

FC_VECTOR_CLONES void documents_share(const MaxSimGradient& g, const Tokens& queries, float* out, int64_t begin,
                                      int64_t end) {
    std::fill(out + begin * g.td * g.d, out + end * g.td * g.d, 0.0f);
    with_kind(queries.kind, queries.data, [&](auto* x) FC_INLINE_LAMBDA {
        each_winner(g.winners, 0, g.b * g.tq, begin, end, [&](int64_t row, int64_t c, int64_t token) FC_INLINE_LAMBDA {
            const int64_t b = row / g.tq, i = row % g.tq;
            const float factor = g.gradient[b * g.c + c];
            add_scaled(out + (c * g.td + token) * g.d, factor, x + b * queries.batch + i * queries.row, g.d);
        });
    });
}

}  // namespace

void maxsim_fold(const Scores& s, float* sums, int64_t stride, const Winners& w, int threads) {
    const int64_t rows = s.queries * s.tokens, groups = (rows + kRows - 1) / kRows;
    std::vector<float> values(rows * s.documents);
    in_shares(s.documents * groups, team(threads, rows * s.documents * s.length), [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t document = i / groups, first = i % groups * kRows;
            fold_rows(s, w, document, first, std::min(first + kRows, rows), values.data() + document * rows + first);
        }
    });
    for (int64_t b = 0; b < s.queries; ++b)
        for (int64_t c = 0; c < s.documents; ++c) {
            const float* own = values.data() + c * rows + b * s.tokens;
            double total = 0.0;
            for (int64_t i = 0; i < s.tokens; ++i) total += own[i];
            sums[b * stride + c] += static_cast<float>(total);
        }
}

void maxsim_queries(const MaxSimGradient& g, const Tokens& documents, float* dqueries, int threads) {
    const int64_t rows = g.b * g.tq;
    in_shares(rows, team(threads, rows * g.c * g.d),
              [&](int64_t begin, int64_t end, int) { queries_share(g, documents, dqueries, begin, end); });
}

void maxsim_documents(const MaxSimGradient& g, const Tokens& queries, float* ddocuments, int threads) {
    in_shares(g.c, team(threads, g.b * g.tq * g.c * g.d),
              [&](int64_t begin, int64_t end, int) { documents_share(g, queries, ddocuments, begin, end); });
}

}  // namespace fastcontrast
