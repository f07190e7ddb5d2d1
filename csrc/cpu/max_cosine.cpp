#include "cpu/max_cosine.h"

#include <vector>

#include "common/threads.h"
#include "cpu/lanes.h"

namespace fastcontrast {
namespace {

constexpr int kGroup = 8;         // candidates whose sums stay in registers, for two rows of context at a time
constexpr int64_t kPanel = 8;     // rows of context that the next group, or slice, of candidates finds in the cache
constexpr int64_t kSlice = 1024;  // entries of a row at a time: a group of candidates stays in the first cache
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

// Of a row of context: its square, and its products with K candidates.
template <int K>
struct Sums {
    float square, products[K];
};

// Adds entries [begin, end), whole vectors, of two rows. Written as one function with its sums in arrays of its own: so
// the compiler keeps them in registers, and in memory if they are handed on.
template <int K, typename T>
FC_INLINE void add_slice(const T* __restrict x, const T* __restrict y, const T* next_x, const T* next_y,
                         const float* __restrict unit, int64_t width, int64_t begin, int64_t end, Sums<K>* sums) {
    float xu[K][kWide] = {}, yu[K][kWide] = {}, xx[kWide] = {}, yy[kWide] = {};
    for (int64_t j = begin; j < end; j += kWide) {
        // The next two rows: without, a context that comes from memory takes 1.7 times as long as reading it.
        __builtin_prefetch(next_x + j);
        __builtin_prefetch(next_y + j);
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
    sums[0].square += sum_lanes(xx), sums[1].square += sum_lanes(yy);
    for (int k = 0; k < K; ++k) sums[0].products[k] += sum_lanes(xu[k]), sums[1].products[k] += sum_lanes(yu[k]);
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

// Rows of context at `positions`, an even number, of which the last two may be one, against K candidates.
template <int K, typename T>
FC_INLINE void fold_panel(const Search<T>& s, int64_t first, const int64_t* positions, int count, Best* best) {
    Sums<K> sums[kPanel] = {};
    const float* unit = s.unit + first * s.width;
    const int64_t whole = s.d / kWide * kWide;
    const T* rows[kPanel + 2];
    for (int i = 0; i < count; ++i) rows[i] = s.context + positions[i] * s.stride;
    for (int64_t begin = 0, end; begin < whole; begin = end) {
        end = std::min(begin + kSlice, whole);
        // Behind the last two rows comes the next slice of the first two, or what follows the panel.
        for (int i = 0; i < 2; ++i)
            rows[count + i] = end < whole ? rows[i] + kSlice : rows[count - 2 + i] + 2 * s.stride - begin;
        for (int i = 0; i < count; i += 2)
            add_slice<K>(rows[i], rows[i + 1], rows[i + 2], rows[i + 3], unit, s.width, begin, end, sums + i);
    }
    for (int i = 0; i < count; ++i) {
        Sums<K>& own = sums[i];
        for (int64_t j = whole; j < s.d; ++j) {
            own.square += widen(rows[i][j]) * widen(rows[i][j]);
            for (int k = 0; k < K; ++k) own.products[k] += widen(rows[i][j]) * unit[k * s.width + j];
        }
        const float factor = inverse_norm(own.square);
        for (int k = 0; k < K; ++k) best[first + k].offer(own.products[k] * factor, positions[i]);
    }
}

template <typename T>
FC_INLINE void fold_share(const Search<T>& s, int64_t begin, int64_t end, Best* best) {
    int64_t positions[kPanel];
    for (int64_t t = begin; t < end;) {
        int count = 0;
        for (; t < end && count < kPanel; ++t)
            if (!s.valid || s.valid[t]) positions[count++] = t;
        if (!count) break;
        // Of two equal rows the second changes nothing: of equals the first stays.
        if (count % 2) positions[count] = positions[count - 1], ++count;
        for (int64_t first = 0; first < s.k; first += kGroup)
            with_count<kGroup>(s.k - first, [&](auto group) FC_INLINE_LAMBDA {
                fold_panel<decltype(group)::value>(s, first, positions, count, best);
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
