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

// What sums begin with.
enum class From { zero, out, factors };

// out [R, L] = begin + Σ_i w(r, i) · x_i, for L columns; the begin is 0, out, or out · factor.
template <From from, int R, int L>
FC_INLINE void add_block(Weights w, const float* __restrict x, int64_t stride, int64_t count, const float* factor,
                         float* __restrict out, int64_t out_stride) {
    float a[R][L];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        const float f = from == From::factors ? factor[r] : 1.0f;
#pragma omp simd
        for (int l = 0; l < L; ++l) a[r][l] = from == From::zero ? 0.0f : out[r * out_stride + l] * f;
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

template <From from, int L>
FC_INLINE void add_columns(Weights w, const float* x, int64_t stride, int64_t count, const float* factor, float* out,
                           int64_t out_stride, int64_t rows) {
    const auto block = [&](auto height, int64_t r) FC_INLINE_LAMBDA {
        add_block<from, decltype(height)::value, L>({w.data + r * w.row, w.row, w.step}, x, stride, count,
                                                    from == From::factors ? factor + r : nullptr, out + r * out_stride,
                                                    out_stride);
    };
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows) block(std::integral_constant<int, kRows>(), r);
    for (; r + 4 <= rows; r += 4) block(std::integral_constant<int, 4>(), r);
    for (; r < rows; ++r) block(std::integral_constant<int, 1>(), r);
}

// out [rows, D] = begin + Σ_i w(r, i) · x_i. Columns outside: the few columns of x that are read for all rows stay in
// the nearest cache, wherever x lies.
template <From from>
FC_INLINE void add_rows(Weights w, const float* x, int64_t stride, int64_t count, const float* factor, float* out,
                        int64_t out_stride, int64_t rows, int64_t d) {
    int64_t j = 0;
    for (; j + 2 * kWide <= d; j += 2 * kWide)
        add_columns<from, 2 * kWide>(w, x + j, stride, count, factor, out + j, out_stride, rows);
    if (j + kWide <= d)
        add_columns<from, kWide>(w, x + j, stride, count, factor, out + j, out_stride, rows), j += kWide;
    if (j + kWide / 2 <= d)
        add_columns<from, kWide / 2>(w, x + j, stride, count, factor, out + j, out_stride, rows), j += kWide / 2;
    for (; j < d; ++j) add_columns<from, 1>(w, x + j, stride, count, factor, out + j, out_stride, rows);
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

template <From from>
FC_VECTOR_CLONES void mix(Weights w, const float* x, int64_t stride, int64_t count, float* out, int64_t out_stride,
                          int64_t rows, int64_t d, const float* factor = nullptr) {
    add_rows<from>(w, x, stride, count, factor, out, out_stride, rows, d);
}

// Eight numbers, for shuffles that compilers do not find by themselves.
using Eight = float __attribute__((vector_size(32)));
#if defined(__clang__)
#define FC_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
using EightPlaces = int __attribute__((vector_size(32)));
#define FC_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, EightPlaces{__VA_ARGS__})
#endif

// lanes [D, W] = factor · rows [count, ld] the other way round; lanes that are left repeat the last row.
template <int W>
FC_VECTOR_CLONES void to_lanes(const float* __restrict rows, int64_t ld, int64_t count, int64_t d, float factor,
                               float* __restrict lanes) {
    for (int64_t l = 0; l < W; l += 8) {
        const float* row[8];
        for (int r = 0; r < 8; ++r) row[r] = rows + std::min(l + r, count - 1) * ld;
        int64_t j = 0;
        for (; j + 8 <= d; j += 8) {
            Eight x[8], y[8];
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
                Eight a, b;
                std::memcpy(&a, row[r] + j, sizeof a), std::memcpy(&b, row[r + 4] + j, sizeof b);
                a *= factor, b *= factor;
                x[r] = FC_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
                x[r + 4] = FC_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
            }
#pragma GCC unroll 2
            for (int h = 0; h < 8; h += 4) {
                const Eight a = FC_SHUFFLE(x[h], x[h + 1], 0, 8, 1, 9, 4, 12, 5, 13);
                const Eight b = FC_SHUFFLE(x[h + 2], x[h + 3], 0, 8, 1, 9, 4, 12, 5, 13);
                const Eight e = FC_SHUFFLE(x[h], x[h + 1], 2, 10, 3, 11, 6, 14, 7, 15);
                const Eight f = FC_SHUFFLE(x[h + 2], x[h + 3], 2, 10, 3, 11, 6, 14, 7, 15);
                y[h] = FC_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
                y[h + 1] = FC_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
                y[h + 2] = FC_SHUFFLE(e, f, 0, 1, 8, 9, 4, 5, 12, 13);
                y[h + 3] = FC_SHUFFLE(e, f, 2, 3, 10, 11, 6, 7, 14, 15);
            }
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) std::memcpy(lanes + (j + i) * W + l, &y[i], sizeof(Eight));
        }
        for (; j < d; ++j)
            for (int r = 0; r < 8; ++r) lanes[j * W + l + r] = factor * row[r][j];
    }
}

}  // namespace

}  // namespace fastcontrast
