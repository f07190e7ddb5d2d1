#include "cpu/few_rows.h"

#include <algorithm>

#include "common/threads.h"
#include "cpu/lanes.h"

namespace fastcontrast {
namespace {

// Two rows of weights, of which the second may be the first again, with M rows of x: a library's product for so few
// rows takes up to 1.5 times as long as for one. Sums stay in registers, and the rows after these are fetched
// meanwhile.
template <int M>
FC_INLINE void two_weights(const float* __restrict x, const float* __restrict v, const float* __restrict w, int64_t d,
                           int64_t ahead, float* __restrict xv, float* __restrict xw) {
    float a[M][kWide] = {}, b[M][kWide] = {};
    const int64_t whole = d / kWide * kWide;
    for (int64_t j = 0; j < whole; j += kWide) {
        __builtin_prefetch(v + ahead + j);
        __builtin_prefetch(w + ahead + j);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i)
#pragma omp simd
            for (int l = 0; l < kWide; ++l) a[i][l] += x[i * d + j + l] * v[j + l];
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i)
#pragma omp simd
            for (int l = 0; l < kWide; ++l) b[i][l] += x[i * d + j + l] * w[j + l];
    }
    for (int i = 0; i < M; ++i) {
        xv[i] = sum_lanes(a[i]);
        xw[i] = sum_lanes(b[i]);
        for (int64_t j = whole; j < d; ++j) xv[i] += x[i * d + j] * v[j], xw[i] += x[i * d + j] * w[j];
    }
}

template <int M>
FC_INLINE void some_weights(const float* x, const float* weight, const float* bias, float* out, int64_t n, int64_t d,
                            int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; o += 2) {
        const int64_t next = std::min(o + 1, end - 1);
        float xv[M], xw[M];
        two_weights<M>(x, weight + o * d, weight + next * d, d, 2 * d, xv, xw);
        for (int i = 0; i < M; ++i) {
            out[i * n + o] = xv[i] + (bias ? bias[o] : 0.0f);
            out[i * n + next] = (next == o ? xv[i] : xw[i]) + (bias ? bias[next] : 0.0f);
        }
    }
}

FC_VECTOR_CLONES void share(const float* x, const float* weight, const float* bias, float* out, int64_t m, int64_t n,
                            int64_t d, int64_t begin, int64_t end) {
    with_count<kFewRows>(m, [&](auto count) FC_INLINE_LAMBDA {
        some_weights<decltype(count)::value>(x, weight, bias, out, n, d, begin, end);
    });
}

constexpr int64_t kStripe = 2 * kWide, kBlockRows = 16;

// out [M, n] += x [M, rows] · weight [rows, n], n a stripe: its sums stay in registers, and the block after this one,
// as many rows further, is fetched meanwhile: pieces of rows are too short for the machine to foresee the next.
template <int M>
FC_INLINE void stripe_of_block(const float (*__restrict x)[M], const float* __restrict weight, int64_t rows, int64_t n,
                               float* __restrict out) {
    float a[M][kWide], b[M][kWide];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
#pragma omp simd
        for (int l = 0; l < kWide; ++l) a[i][l] = out[i * n + l];
#pragma omp simd
        for (int l = 0; l < kWide; ++l) b[i][l] = out[i * n + kWide + l];
    }
    for (int64_t r = 0; r < rows; ++r) {
        const float* w = weight + r * n;
        __builtin_prefetch(w + kBlockRows * n);
        __builtin_prefetch(w + kBlockRows * n + kWide);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
#pragma omp simd
            for (int l = 0; l < kWide; ++l) a[i][l] += x[r][i] * w[l];
#pragma omp simd
            for (int l = 0; l < kWide; ++l) b[i][l] += x[r][i] * w[kWide + l];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
#pragma omp simd
        for (int l = 0; l < kWide; ++l) out[i * n + l] = a[i][l];
#pragma omp simd
        for (int l = 0; l < kWide; ++l) out[i * n + kWide + l] = b[i][l];
    }
}

template <int M>
FC_INLINE void some_columns(const float* x, const float* weight, const float* bias, float* out, int64_t n, int64_t d,
                            int64_t begin, int64_t end) {
    for (int i = 0; i < M; ++i)
        for (int64_t c = begin; c < end; ++c) out[i * n + c] = bias ? bias[c] : 0.0f;
    for (int64_t j = 0; j < d; j += kBlockRows) {
        const int64_t rows = std::min(kBlockRows, d - j);
        float block[kBlockRows][M];
        for (int64_t r = 0; r < rows; ++r)
            for (int i = 0; i < M; ++i) block[r][i] = x[i * d + j + r];
        int64_t c = begin;
        for (; c + kStripe <= end; c += kStripe) stripe_of_block<M>(block, weight + j * n + c, rows, n, out + c);
        for (int64_t r = 0; r < rows; ++r)
            for (int i = 0; i < M; ++i)
                for (int64_t l = c; l < end; ++l) out[i * n + l] += block[r][i] * weight[(j + r) * n + l];
    }
}

FC_VECTOR_CLONES void share_of_columns(const float* x, const float* weight, const float* bias, float* out, int64_t m,
                                       int64_t n, int64_t d, int64_t begin, int64_t end) {
    with_count<kFewRows>(m, [&](auto count) FC_INLINE_LAMBDA {
        some_columns<decltype(count)::value>(x, weight, bias, out, n, d, begin, end);
    });
}

FC_INLINE float silu(float x) { return x / (1.0f + exp_fast(-x)); }

template <int M>
FC_INLINE void some_gates(const float* x, const float* gate, const float* up, const float* gate_bias,
                          const float* up_bias, float* out, int64_t n, int64_t d, int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
        float g[M], u[M];
        two_weights<M>(x, gate + o * d, up + o * d, d, d, g, u);
        for (int i = 0; i < M; ++i)
            out[i * n + o] = silu(g[i] + (gate_bias ? gate_bias[o] : 0.0f)) * (u[i] + (up_bias ? up_bias[o] : 0.0f));
    }
}

FC_VECTOR_CLONES void gated_share(const float* x, const float* gate, const float* up, const float* gate_bias,
                                  const float* up_bias, float* out, int64_t m, int64_t n, int64_t d, int64_t begin,
                                  int64_t end) {
    with_count<kFewRows>(m, [&](auto count) FC_INLINE_LAMBDA {
        some_gates<decltype(count)::value>(x, gate, up, gate_bias, up_bias, out, n, d, begin, end);
    });
}

}  // namespace

void few_rows_gated(const float* x, const float* gate, const float* up, const float* gate_bias, const float* up_bias,
                    float* out, int64_t m, int64_t n, int64_t d, int threads) {
    in_shares(n, team(threads, 2 * n * d), [&](int64_t begin, int64_t end, int) {
        if (begin < end) gated_share(x, gate, up, gate_bias, up_bias, out, m, n, d, begin, end);
    });
}

void few_rows(const float* x, const float* weight, const float* bias, float* out, int64_t m, int64_t n, int64_t d,
              int threads) {
    in_shares(n, team(threads, n * d), [&](int64_t begin, int64_t end, int) {
        if (begin < end) share(x, weight, bias, out, m, n, d, begin, end);
    });
}

void few_rows_by_input(const float* x, const float* weight, const float* bias, float* out, int64_t m, int64_t n,
                       int64_t d, int threads) {
    in_shares((n + kStripe - 1) / kStripe, team(threads, n * d), [&](int64_t begin, int64_t end, int) {
        if (begin < end) share_of_columns(x, weight, bias, out, m, n, d, begin * kStripe, std::min(n, end * kStripe));
    });
}

}  // namespace fastcontrast
