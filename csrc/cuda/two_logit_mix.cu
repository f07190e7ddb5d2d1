#include "common.cuh"
#include "two_logit_mix.h"

namespace fastcontrast::cuda {
namespace {

// Of a row, or of one block's share of it.
struct Stats {
    Sum one, zero;  // of z1, z0
    float least;    // finite entry of z0; +inf: none; NaN if z0 has one
};

__device__ __forceinline__ float nan_min(float a, float b) { return b < a || b != b ? b : a; }

struct MergeStats {
    __device__ __forceinline__ Stats operator()(const Stats& a, const Stats& b) const {
        return {MergeSums{}(a.one, b.one), MergeSums{}(a.zero, b.zero), nan_min(a.least, b.least)};
    }
};

struct Workspace {
    Stats* stats;  // [R, splits]
    float* terms;  // [R, splits]: sums of the divergence
    Sum* mixed;    // [R, splits]
};

// The merge of what the blocks of a row have left, in the same order in every warp that asks.
template <typename V, typename Merge>
__device__ __forceinline__ V of_row(const V* partial, int64_t row, int splits, V total, Merge merge) {
    for (int i = lane_of_thread(); i < splits; i += kWarp) total = merge(total, partial[row * splits + i]);
    return warp_reduce(total, merge);
}

__device__ __forceinline__ Stats stats_of_row(const Stats* stats, int64_t row, int splits) {
    return of_row(stats, row, splits, Stats{{-INFINITY, 0.0f}, {-INFINITY, 0.0f}, INFINITY}, MergeStats{});
}

// Calls fn(z1, z0, chunk) for the chunks of this block's share.
template <typename T, bool Wide, typename Function>
__device__ __forceinline__ void each_chunk(const Mixture& p, int64_t row, Function fn) {
    constexpr int n = kVector<T>;
    const T* z1 = static_cast<const T*>(p.z1) + row * p.stride1;
    const T* z0 = static_cast<const T*>(p.z0) + row * p.stride0;
    const int64_t chunks = (p.v + kThreads * n - 1) / (kThreads * n);
    for (int64_t chunk = blockIdx.x % p.splits; chunk < chunks; chunk += p.splits) {
        float x1[n], x0[n];
        load<T, Wide, kThreads>(z1, p.v, chunk, threadIdx.x, -INFINITY, x1);
        load<T, Wide, kThreads>(z0, p.v, chunk, threadIdx.x, -INFINITY, x0);
        fn(x1, x0, chunk);
    }
}

template <typename T, bool Wide>
__global__ void __launch_bounds__(kThreads) stats_kernel(Mixture p, Workspace w) {
    constexpr int n = kVector<T>;
    Stats stats{{-INFINITY, 0.0f}, {-INFINITY, 0.0f}, INFINITY};
    each_chunk<T, Wide>(p, blockIdx.x / p.splits, [&](const float (&z1)[n], const float (&z0)[n], int64_t) {
        add(stats.one, z1);
        add(stats.zero, z0);
#pragma unroll
        for (int i = 0; i < n; ++i) stats.least = nan_min(stats.least, z0[i] == -INFINITY ? INFINITY : z0[i]);
    });
    __shared__ Stats shared[kWarps];
    stats = block_reduce(stats, MergeStats{}, shared);
    if (threadIdx.x == 0) w.stats[blockIdx.x] = stats;
}

// ½ [(1 + x) ln(1 + x) + (1 − x) ln(1 − x)], on [−1, 1]. Never negative, 0 only at 0; near it the logarithms cancel and
// the series Σ x²ⁿ / (2n (2n − 1)) takes over.
__device__ __forceinline__ float entropy_gap(float x) {
    const float square = x * x;
    if (square < 0.0625f)
        return square *
               (0.5f + square * (1.0f / 12 + square * (1.0f / 30 + square * (1.0f / 56 + square * (1.0f / 90)))));
    const float above = 1.0f + x, below = 1.0f - x;
    return 0.5f * ((above == 0.0f ? 0.0f : above * log1pf(x)) + (below == 0.0f ? 0.0f : below * log1pf(-x)));
}

template <typename T, bool Wide>
__global__ void __launch_bounds__(kThreads) divergence_kernel(Mixture p, Workspace w) {
    constexpr int n = kVector<T>;
    const int64_t row = blockIdx.x / p.splits;
    const Stats stats = stats_of_row(w.stats, row, p.splits);
    const float high1 = shift(stats.one.high), high0 = shift(stats.zero.high);
    const float factor1 = stats.one.sum == 0.0f ? 0.0f : 1.0f / stats.one.sum;
    const float factor0 = stats.zero.sum == 0.0f ? 0.0f : 1.0f / stats.zero.sum;
    float terms = 0.0f;
    each_chunk<T, Wide>(p, row, [&](const float (&z1)[n], const float (&z0)[n], int64_t) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
            // Rounded before they are compared: a fused product would leave the rounding of its equal.
            const float one = __fmul_rn(factor1, expf(z1[i] - high1)), zero = __fmul_rn(factor0, expf(z0[i] - high0));
            const float both = one + zero;
            if (both != 0.0f) terms += 0.5f * both * entropy_gap((one - zero) / both);
        }
    });
    __shared__ float shared[kWarps];
    terms = block_reduce(terms, Add{}, shared);
    if (threadIdx.x == 0) w.terms[blockIdx.x] = terms;
}

struct Mixer {
    float keep, a, filler, limit;

    __device__ __forceinline__ Mixer(const Mixture& p, const Stats& stats, float a)
        : keep(isnan(p.keep) ? 1.0f + a : p.keep),
          a(a),
          filler(stats.least == INFINITY ? 0.0f : stats.least),
          limit(stats.one.high + p.threshold) {}

    __device__ __forceinline__ float operator()(float z1, float z0) const {
        const float mixed = keep * z1 - a * (z0 == -INFINITY ? filler : z0);
        return z1 == -INFINITY || z1 < limit ? -INFINITY : mixed;
    }
};

template <typename T, bool Wide>
__global__ void __launch_bounds__(kThreads) mixed_kernel(Mixture p, Workspace w) {
    constexpr int n = kVector<T>;
    const int64_t row = blockIdx.x / p.splits;
    const float divergence = p.diverge ? of_row(w.terms, row, p.splits, 0.0f, Add{}) : NAN;
    const float a = p.weight ? p.weight[row] : divergence < p.floor ? p.floor : divergence;  // NaN stays
    const Mixer mix(p, stats_of_row(w.stats, row, p.splits), a);
    Sum sum{-INFINITY, 0.0f};
    each_chunk<T, Wide>(p, row, [&](const float (&z1)[n], const float (&z0)[n], int64_t) {
        float mixed[n];
#pragma unroll
        for (int i = 0; i < n; ++i) mixed[i] = mix(z1[i], z0[i]);
        add(sum, mixed);
    });
    __shared__ Sum shared[kWarps];
    sum = block_reduce(sum, MergeSums{}, shared);
    if (threadIdx.x) return;
    w.mixed[blockIdx.x] = sum;
    if (blockIdx.x % p.splits == 0) {
        p.a[row] = a;
        p.divergence[row] = divergence;
    }
}

template <typename T, bool Wide>
__global__ void __launch_bounds__(kThreads) write_kernel(Mixture p, Workspace w) {
    constexpr int n = kVector<T>;
    const int64_t row = blockIdx.x / p.splits;
    const Stats stats = stats_of_row(w.stats, row, p.splits);
    const Mixer mix(p, stats, p.a[row]);
    const Sum sum = of_row(w.mixed, row, p.splits, Sum{-INFINITY, 0.0f}, MergeSums{});
    const bool nothing = stats.one.high == -INFINITY;  // no token is left
    const float rest = logf(sum.sum);
    float* out = p.out + row * p.v;
    each_chunk<T, Wide>(p, row, [&](const float (&z1)[n], const float (&z0)[n], int64_t chunk) {
        float value[n];
#pragma unroll
        for (int i = 0; i < n; ++i) value[i] = nothing ? -INFINITY : mix(z1[i], z0[i]) - sum.high - rest;
        const int64_t first = position<T, Wide, kThreads>(chunk, threadIdx.x, 0);
        if (Wide && first + n <= p.v) {
#pragma unroll
            for (int i = 0; i < n; i += 4)
                *reinterpret_cast<float4*>(out + first + i) =
                    make_float4(value[i], value[i + 1], value[i + 2], value[i + 3]);
            return;
        }
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const int64_t at = position<T, Wide, kThreads>(chunk, threadIdx.x, i);
            if (at < p.v) out[at] = value[i];
        }
    });
}

}  // namespace

int64_t mixture_workspace(int64_t rows, int splits) { return rows * splits * 8; }

int two_logit_mix(const Mixture& p, float* workspace, void* stream) {
    static_assert(sizeof(Stats) == 5 * sizeof(float) && sizeof(Sum) == 2 * sizeof(float));
    const int64_t blocks = p.rows * p.splits, bytes = bytes_of(p.dtype);
    const Workspace w{reinterpret_cast<Stats*>(workspace), workspace + 5 * blocks,
                      reinterpret_cast<Sum*>(workspace + 6 * blocks)};
    const bool wide = aligned(p.z1, p.rows, p.stride1, bytes) && aligned(p.z0, p.rows, p.stride0, bytes) &&
                      aligned(p.out, p.rows, p.v, sizeof(float));
    return by_dtype(p.dtype, wide, [&](auto element, auto wide) {
        using T = decltype(element);
        int status = launch(stats_kernel<T, wide>, blocks, stream, p, w);
        if (!status && p.diverge) status = launch(divergence_kernel<T, wide>, blocks, stream, p, w);
        if (!status) status = launch(mixed_kernel<T, wide>, blocks, stream, p, w);
        if (!status) status = launch(write_kernel<T, wide>, blocks, stream, p, w);
        return status;
    });
}

}  // namespace fastcontrast::cuda
