// What attention on a CPU is made of: products of rows with a few lanes, a softmax down the lanes, and sums of rows by
// weights that lie in lanes. Lanes are queries (or keys, in a backward), so that no sum crosses a vector.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/simd.h"
#include "cpu/lanes.h"

namespace fastcontrast {

inline constexpr int kRows = 8;  // rows whose sums stay in registers

// out [count, W] = rows · lanes, where lanes is [D, W]. fetch(i, r) may prefetch what follows row i + r.
template <int W, typename Fetch>
FC_INLINE void dots(const float* __restrict rows, int64_t stride, int64_t count, const float* __restrict lanes,
                    int64_t d, float* __restrict out, Fetch fetch) {
    for (int64_t i = 0; i < count; i += kRows) {
        const float* row[kRows];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            row[r] = rows + std::min(i + r, count - 1) * stride;
            fetch(i, r);
        }
        float a[kRows][W];  // indexed by constants alone, or it would live in memory
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
#pragma omp simd
            for (int l = 0; l < W; ++l) a[r][l] = 0.0f;
        for (int64_t j = 0; j < d; ++j)
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                const float x = row[r][j];
#pragma omp simd
                for (int l = 0; l < W; ++l) a[r][l] += x * lanes[j * W + l];
            }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
            if (i + r < count)
#pragma omp simd
                for (int l = 0; l < W; ++l) out[(i + r) * W + l] = a[r][l];
    }
}

template <int W>
FC_INLINE void dots(const float* rows, int64_t stride, int64_t count, const float* lanes, int64_t d, float* out) {
    dots<W>(rows, stride, count, lanes, d, out, [](int64_t, int) FC_INLINE_LAMBDA {});
}

// Scores become exp(score − maximum so far); the factor that what was summed before is worth by now comes out.
template <int W>
FC_INLINE void exponentials(float* __restrict scores, int64_t count, float* __restrict high, float* __restrict sum,
                            float* __restrict factor) {
    float m[W], offset[W], s[W] = {};
#pragma omp simd
    for (int l = 0; l < W; ++l) m[l] = high[l];
    for (int64_t t = 0; t < count; ++t)
#pragma omp simd
        for (int l = 0; l < W; ++l) m[l] = scores[t * W + l] > m[l] ? scores[t * W + l] : m[l];
#pragma omp simd
    for (int l = 0; l < W; ++l) offset[l] = finite(m[l]);
    for (int64_t t = 0; t < count; ++t)
#pragma omp simd
        for (int l = 0; l < W; ++l) {
            const float p = exp_fast(scores[t * W + l] - offset[l]);
            scores[t * W + l] = p;
            s[l] += p;
        }
#pragma omp simd
    for (int l = 0; l < W; ++l) {
        factor[l] = exp_fast(finite(high[l]) - offset[l]);
        sum[l] = sum[l] * factor[l] + s[l];
        high[l] = m[l];
    }
}

// Weights of rows: w(r, i) = data[r · row + i · step].
struct Weights {
    const float* data;
    int64_t row, step;
};

// out [R, L] = out · factor + Σ_i w(r, i) · x_i, for L columns.
template <int R, int L>
FC_INLINE void add_block(Weights w, const float* __restrict x, int64_t stride, int64_t count, const float* factor,
                         float* __restrict out, int64_t out_stride) {
    float a[R][L];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        const float f = factor ? factor[r] : 1.0f;
#pragma omp simd
        for (int l = 0; l < L; ++l) a[r][l] = out[r * out_stride + l] * f;
    }
    for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const float p = w.data[r * w.row + i * w.step];
#pragma omp simd
            for (int l = 0; l < L; ++l) a[r][l] += p * x[i * stride + l];
        }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma omp simd
        for (int l = 0; l < L; ++l) out[r * out_stride + l] = a[r][l];
}

template <int R>
FC_INLINE void add_columns(Weights w, const float* x, int64_t stride, int64_t count, const float* factor, float* out,
                           int64_t out_stride, int64_t d) {
    int64_t j = 0;
    for (; j + 2 * kWide <= d; j += 2 * kWide)
        add_block<R, 2 * kWide>(w, x + j, stride, count, factor, out + j, out_stride);
    if (j + kWide <= d) add_block<R, kWide>(w, x + j, stride, count, factor, out + j, out_stride), j += kWide;
    if (j + kWide / 2 <= d)
        add_block<R, kWide / 2>(w, x + j, stride, count, factor, out + j, out_stride), j += kWide / 2;
    for (; j < d; ++j)
        for (int r = 0; r < R; ++r) {
            float a = out[r * out_stride + j] * (factor ? factor[r] : 1.0f);
            for (int64_t i = 0; i < count; ++i) a += w.data[r * w.row + i * w.step] * x[i * stride + j];
            out[r * out_stride + j] = a;
        }
}

// out [rows, D] = out · factor + Σ_i w(r, i) · x_i, factor [rows] or null for 1.
FC_INLINE void add_rows(Weights w, const float* x, int64_t stride, int64_t count, const float* factor, float* out,
                        int64_t out_stride, int64_t rows, int64_t d) {
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows)
        add_columns<kRows>({w.data + r * w.row, w.row, w.step}, x, stride, count, factor ? factor + r : nullptr,
                           out + r * out_stride, out_stride, d);
    for (; r + 4 <= rows; r += 4)
        add_columns<4>({w.data + r * w.row, w.row, w.step}, x, stride, count, factor ? factor + r : nullptr,
                       out + r * out_stride, out_stride, d);
    for (; r < rows; ++r)
        add_columns<1>({w.data + r * w.row, w.row, w.step}, x, stride, count, factor ? factor + r : nullptr,
                       out + r * out_stride, out_stride, d);
}

// Calls fn with the number of lanes, a constant, that holds n queries: 8, 16 or 32.
inline constexpr int kMostLanes = 32;

template <typename Function>
FC_INLINE void with_lanes(int64_t n, Function fn) {
    if (n <= 8) return fn(std::integral_constant<int, 8>());
    if (n <= 16) return fn(std::integral_constant<int, 16>());
    fn(std::integral_constant<int, kMostLanes>());
}

// The same as functions of their own: inside of a large one the compiler runs out of registers, which costs them half
// of their speed. A file has its own copies.
namespace {

template <int W>
FC_VECTOR_CLONES void score(const float* rows, int64_t stride, int64_t count, const float* lanes, int64_t d,
                            float* out) {
    dots<W>(rows, stride, count, lanes, d, out);
}

template <int W>
FC_VECTOR_CLONES void soften(float* scores, int64_t count, float* high, float* sum, float* factor) {
    exponentials<W>(scores, count, high, sum, factor);
}

[[maybe_unused]] FC_VECTOR_CLONES void mix(Weights w, const float* x, int64_t stride, int64_t count,
                                           const float* factor, float* out, int64_t out_stride, int64_t rows,
                                           int64_t d) {
    add_rows(w, x, stride, count, factor, out, out_stride, rows, d);
}

// lanes [D, W] = factor · rows [count, ld] the other way round; lanes that are left are 0. Four rows at a time: so the
// compiler shuffles vectors, four times as fast as number by number.
template <int W>
FC_VECTOR_CLONES void to_lanes(const float* __restrict rows, int64_t ld, int64_t count, int64_t d, float factor,
                               float* __restrict lanes) {
    if (count < W) std::fill(lanes, lanes + d * W, 0.0f);
    int64_t l = 0;
    for (; l + 4 <= count; l += 4) {
        const float* row = rows + l * ld;
        int64_t j = 0;
        for (; j + kWide <= d; j += kWide) {
            float fours[4 * kWide];
#pragma omp simd
            for (int i = 0; i < kWide; ++i)
                for (int r = 0; r < 4; ++r) fours[4 * i + r] = factor * row[r * ld + j + i];
#pragma GCC unroll 16
            for (int i = 0; i < kWide; ++i) std::memcpy(lanes + (j + i) * W + l, fours + 4 * i, 4 * sizeof(float));
        }
        for (; j < d; ++j)
            for (int r = 0; r < 4; ++r) lanes[j * W + l + r] = factor * row[r * ld + j];
    }
    for (; l < count; ++l)
        for (int64_t j = 0; j < d; ++j) lanes[j * W + l] = factor * rows[l * ld + j];
}

}  // namespace

}  // namespace fastcontrast
