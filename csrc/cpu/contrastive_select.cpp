#include "cpu/contrastive_select.h"

#include <vector>

#include "common/threads.h"
#include "cpu/similarity_topk.h"

namespace fastcontrast {
namespace {

FC_VECTOR_CLONES void widen_row(const void* row, Kind kind, int64_t n, float* out) {
    with_kind(kind, row, [&](auto* x) FC_INLINE_LAMBDA {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) out[j] = widen(x[j]);
    });
}

FC_VECTOR_CLONES LogSum log_sum_of(const float* row, int64_t n) {
    return log_sum(n, [&](int64_t j) FC_INLINE_LAMBDA { return row[j]; });
}

}  // namespace

void contrastive_candidates(const void* logits, Kind kind, int64_t rows, int64_t vocabulary, int64_t stride, int64_t k,
                            float* probabilities, int64_t* tokens, int threads) {
    const int64_t size = kind == Kind::f32 ? 4 : 2;
    in_shares(rows, team(threads, rows * vocabulary), [&](int64_t begin, int64_t end, int) {
        std::vector<float> wide(kind == Kind::f32 || begin == end ? 0 : vocabulary);
        Best best(1, k, vocabulary, true);
        for (int64_t i = begin; i < end; ++i) {
            const char* source = static_cast<const char*>(logits) + i * stride * size;
            float* row = const_cast<float*>(reinterpret_cast<const float*>(source));  // a tile that is only read
            if (kind != Kind::f32) widen_row(source, kind, vocabulary, row = wide.data());
            best.fold(Tile{row, 0, 1, 0, vocabulary, nullptr}, Candidates{}, 1);
            best.finish(probabilities + i * k, tokens + i * k, 1, 1);
            const LogSum total = log_sum_of(row, vocabulary);
            for (float* p = probabilities + i * k; p < probabilities + (i + 1) * k; ++p)
                *p = total.sum == 0.0f ? 0.0f : std::exp(*p - total.high) / total.sum;
        }
    });
}

void contrastive_select(const float* probabilities, const Cosines& c, float alpha, int64_t* choice, float* score,
                        float* degeneration, int64_t* nearest, int threads) {
    max_cosine(c, degeneration, nearest, threads);
    for (int64_t b = 0; b < c.b; ++b) {
        const int64_t row = b * c.k;
        int64_t best = 0;
        for (int64_t k = 0; k < c.k; ++k) {
            const float p = probabilities[row + k], penalty = nearest[row + k] < 0 ? 0.0f : degeneration[row + k];
            const float s = p == 0.0f ? -INFINITY : (1.0f - alpha) * p - alpha * penalty;
            score[row + k] = s;
            if (s > score[row + best] || (s != s && score[row + best] == score[row + best])) best = k;
        }
        choice[b] = best;
    }
}

}  // namespace fastcontrast
