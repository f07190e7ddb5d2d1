#include "cpu/max_cosine.h"

#include <vector>

#include "common/threads.h"
#include "cpu/lanes.h"

namespace fastcontrast {
namespace {

constexpr int kGroup = 8;      // candidates whose sums stay in registers, for two rows of context at a time
constexpr int64_t kPanel = 8;  // rows of context that the next group of candidates finds in the cache
constexpr float kSmallest = 1e-12f;

struct Best {
    float value = -INFINITY;
    int64_t index = -1;

    // NaN is larger than any number; of equals the first stays.
    FC_INLINE void offer(float v, int64_t i) {
        if (v > value || (v != v && value == value)) value = v, index = i;
    }
};

FC_INLINE float inverse_norm(float squares) {
    const float norm = std::sqrt(squares);
    return 1.0f / (norm < kSmallest ? kSmallest : norm);
}

// Rows of unit length in float32, filled with zeros to a width that is a multiple of kWide.
template <typename T>
FC_INLINE void unit_rows(const T* rows, int64_t stride, int64_t count, int64_t d, int64_t width, float* out) {
    for (int64_t i = 0; i < count; ++i, rows += stride, out += width) {
        float squares[kWide] = {};
        std::fill(out, out + width, 0.0f);
        for (int64_t j = 0; j < d; ++j) out[j] = widen(rows[j]);
        for (int64_t j = 0; j < width; j += kWide)
#pragma omp simd
            for (int l = 0; l < kWide; ++l) squares[l] += out[j + l] * out[j + l];
        const float factor = inverse_norm(sum_lanes(squares));
#pragma omp simd
        for (int64_t j = 0; j < d; ++j) out[j] *= factor;
    }
}

// Two rows of context, of which the second may be the first again, against K unit vectors. Written as one function with
// its sums in arrays of its own: so the compiler keeps them in registers, and in memory if they are handed on.
template <int K, typename T>
FC_INLINE void fold_rows(const T* __restrict x, const T* __restrict y, const float* __restrict unit, int64_t width,
                         int64_t d, int64_t ahead, int64_t position, Best* best) {
    float xu[K][kWide] = {}, yu[K][kWide] = {}, xx[kWide] = {}, yy[kWide] = {};
    const int64_t whole = d / kWide * kWide;
    for (int64_t j = 0; j < whole; j += kWide) {
        // The next two rows: without, a context that comes from memory takes 1.7 times as long as reading it.
        __builtin_prefetch(x + ahead + j);
        __builtin_prefetch(y + ahead + j);
#pragma omp simd
        for (int l = 0; l < kWide; ++l) xx[l] += widen(x[j + l]) * widen(x[j + l]);
#pragma omp simd
        for (int l = 0; l < kWide; ++l) yy[l] += widen(y[j + l]) * widen(y[j + l]);
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k)
#pragma omp simd
            for (int l = 0; l < kWide; ++l) xu[k][l] += widen(x[j + l]) * unit[k * width + j + l];
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k)
#pragma omp simd
            for (int l = 0; l < kWide; ++l) yu[k][l] += widen(y[j + l]) * unit[k * width + j + l];
    }
    float xs = sum_lanes(xx), ys = sum_lanes(yy);
    for (int64_t j = whole; j < d; ++j) xs += widen(x[j]) * widen(x[j]), ys += widen(y[j]) * widen(y[j]);
    const float x_factor = inverse_norm(xs), y_factor = inverse_norm(ys);
    for (int k = 0; k < K; ++k) {
        float xp = sum_lanes(xu[k]), yp = sum_lanes(yu[k]);
        for (int64_t j = whole; j < d; ++j)
            xp += widen(x[j]) * unit[k * width + j], yp += widen(y[j]) * unit[k * width + j];
        best[k].offer(xp * x_factor, position);
        if (x != y) best[k].offer(yp * y_factor, position + 1);
    }
}

// One row of a batch: its context, and what is sought there.
template <typename T>
struct Search {
    const float* unit;  // [K, width]
    int64_t k, width, d;
    const T* context;  // [T, D]
    int64_t stride;
    const bool* valid;  // [T], or null
};

template <int K, typename T>
FC_INLINE void fold_panel(const Search<T>& s, int64_t first, int64_t begin, int64_t end, Best* best) {
    for (int64_t t = begin; t < end;) {
        if (s.valid && !s.valid[t]) {
            ++t;
            continue;
        }
        const T* row = s.context + t * s.stride;
        const bool two = t + 1 < end && (!s.valid || s.valid[t + 1]);
        fold_rows<K>(row, two ? row + s.stride : row, s.unit + first * s.width, s.width, s.d, 2 * s.stride, t,
                     best + first);
        t += two ? 2 : 1;
    }
}

template <typename T>
FC_INLINE void fold_share(const Search<T>& s, int64_t begin, int64_t end, Best* best) {
    const int64_t panel = s.k <= kGroup ? end - begin : kPanel;
    for (int64_t t = begin; t < end; t += panel) {
        const int64_t stop = std::min(t + panel, end);
        for (int64_t first = 0; first < s.k; first += kGroup)
            with_count<kGroup>(s.k - first, [&](auto count) FC_INLINE_LAMBDA {
                fold_panel<decltype(count)::value>(s, first, t, stop, best);
            });
    }
}

FC_VECTOR_CLONES void unit_candidates(const Cosines& c, int64_t width, float* out) {
    with_kind(c.kind, c.candidates, [&](auto* x) FC_INLINE_LAMBDA {
        for (int64_t b = 0; b < c.b; ++b)
            unit_rows(x + b * c.candidate_batch, c.candidate_row, c.k, c.d, width, out + b * c.k * width);
    });
}

FC_VECTOR_CLONES void share_of_row(const Cosines& c, int64_t width, const float* unit, int64_t b, int64_t begin,
                                   int64_t end, Best* best) {
    with_kind(c.kind, c.context, [&](auto* x) FC_INLINE_LAMBDA {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
        const bool* valid = c.valid ? c.valid + b * c.t : nullptr;
        fold_share(Search<T>{unit + b * c.k * width, c.k, width, c.d, x + b * c.context_batch, c.context_row, valid},
                   begin, end, best);
    });
}

}  // namespace

void max_cosine(const Cosines& c, float* values, int64_t* indices, int threads) {
    const int64_t width = (c.d + kWide - 1) / kWide * kWide;
    Scratch scratch(c.b * c.k * width);
    float* unit = scratch.data();
    unit_candidates(c, width, unit);
    const int count = team(threads, c.b * c.t * c.d);
    const int64_t splits = c.b ? std::max<int64_t>(1, count / c.b) : 1, share = (c.t + splits - 1) / splits;
    std::vector<Best> best(c.b * splits * c.k);
    in_shares(c.b * splits, count, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t first = std::min(i % splits * share, c.t), last = std::min(first + share, c.t);
            share_of_row(c, width, unit, i / splits, first, last, best.data() + i * c.k);
        }
    });
    for (int64_t b = 0; b < c.b; ++b)
        for (int64_t k = 0; k < c.k; ++k) {
            Best found = best[b * splits * c.k + k];
            for (int64_t s = 1; s < splits; ++s) {
                const Best& later = best[(b * splits + s) * c.k + k];
                found.offer(later.value, later.index);
            }
            values[b * c.k + k] = found.value;
            indices[b * c.k + k] = found.index;
        }
}

}  // namespace fastcontrast
