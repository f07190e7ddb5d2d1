#include <algorithm>

#include "device.h"
#include "max_cosine.cuh"

namespace fastcontrast::cuda {
namespace {

constexpr int kRows = 4;  // context rows of a warp at a time: each load of a candidate serves so many
constexpr float kSmallestNorm = 1e-12f;

__device__ __forceinline__ float norm_of(float squares) {
    const float norm = sqrtf(squares);
    return norm < kSmallestNorm ? kSmallestNorm : norm;  // NaN stays
}

// The sums over a warp of N values a lane, N a power of two: lane l gets that of value l / (32 / N). Halving what is
// exchanged with every step takes N − 1 + log2(32 / N) shuffles in place of 5 N.
template <int N, int Offset = kWarp / 2, int Size>
__device__ __forceinline__ float scatter_sum(float (&x)[Size]) {
    if constexpr (N > 1) {
        const bool upper = lane_of_thread() & Offset;
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            const float kept = upper ? x[i + N / 2] : x[i], given = upper ? x[i] : x[i + N / 2];
            x[i] = kept + __shfl_xor_sync(kAll, given, Offset);
        }
    } else if constexpr (Offset > 0) {
        x[0] += __shfl_xor_sync(kAll, x[0], Offset);
    }
    if constexpr (Offset > 1) return scatter_sum<(N > 1 ? N / 2 : 1), Offset / 2>(x);
    return x[0];
}

// One block for K candidates of a batch entry and one split of its context, and one more for the candidates' norms.
// A team of `parts` warps takes kRows rows at a time. |c| divides only at the end: it does not move the maximum.
template <typename T, bool Wide, int K>
__global__ void __launch_bounds__(kThreads, Wide ? 2 : 1) cosine_partials_kernel(Cosines p,
                                                                                 uint64_t* keys,  // [B, K, splits]
                                                                                 float* norms) {  // [B, K]
    constexpr int n = kVector<T>;
    static_assert(K <= kWarps && K * kRows <= kWarp);
    const int lane = lane_of_thread(), warp = warp_of_thread();
    const int64_t candidate_blocks = (p.k + K - 1) / K, chunks = (p.d + kWarp * n - 1) / (kWarp * n);
    const int split = blockIdx.x % (p.splits + 1);
    const int64_t of_block = blockIdx.x / (p.splits + 1);
    const int64_t b = of_block / candidate_blocks, k0 = of_block % candidate_blocks * K;
    const T* candidates = static_cast<const T*>(p.candidates) + b * p.candidate_batch;

    if (split == p.splits) {
        const int64_t k = k0 + warp;
        if (warp >= K || k >= p.k) return;
        float squares = 0.0f;
#pragma unroll 4
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            float c[n];
            load<T, Wide, kWarp>(candidates + k * p.candidate_row, p.d, chunk, lane, 0.0f, c);
#pragma unroll
            for (int i = 0; i < n; ++i) squares += c[i] * c[i];
        }
        squares = warp_reduce(squares, Add{});
        if (lane == 0) norms[b * p.k + k] = norm_of(squares);
        return;
    }

    const T* context = static_cast<const T*>(p.context) + b * p.context_batch;
    const bool* valid = p.valid ? p.valid + b * p.t : nullptr;
    const int teams = kWarps / p.parts, team = warp / p.parts, part = warp % p.parts;
    const int own_row = lane / (kWarp / (K * kRows)) % kRows;  // of the dot product that scatter_sum leaves here
    const int64_t step = static_cast<int64_t>(teams) * kRows;
    __shared__ float2 partial[kWarps][kWarp];
    uint64_t best = 0;
    for (int64_t first = split * step; first < p.t; first += p.splits * step) {  // the same for the whole block
        const int64_t t0 = first + team * kRows;
        unsigned live = 0;
#pragma unroll
        for (int r = 0; r < kRows; ++r) live |= (t0 + r < p.t && (!valid || valid[t0 + r]) ? 1u : 0u) << r;
        float dots[K * kRows] = {}, squares[kRows] = {};
        for (int64_t chunk = part; chunk < chunks; chunk += p.parts) {
            float x[kRows][n] = {};
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                if (live >> r & 1)
                    load<T, Wide, kWarp, true>(context + (t0 + r) * p.context_row, p.d, chunk, lane, 0.0f, x[r]);
            }
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
#pragma unroll
                for (int i = 0; i < n; ++i) squares[r] += x[r][i] * x[r][i];
            }
#pragma unroll
            for (int j = 0; j < K; ++j) {
                const int64_t k = k0 + j < p.k ? k0 + j : p.k - 1;  // beyond the last one: computed, not kept
                float c[n];
                load<T, Wide, kWarp>(candidates + k * p.candidate_row, p.d, chunk, lane, 0.0f, c);
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
#pragma unroll
                    for (int i = 0; i < n; ++i) dots[j * kRows + r] += x[r][i] * c[i];
                }
            }
        }
        float2 own;
        own.x = scatter_sum<K * kRows>(dots);
        own.y = __shfl_sync(kAll, scatter_sum<kRows>(squares), own_row * (kWarp / kRows));
        if (p.parts > 1) {
            partial[warp][lane] = own;
            __syncthreads();
            own = partial[team * p.parts][lane];
            for (int i = 1; i < p.parts; ++i) {
                const float2 other = partial[team * p.parts + i][lane];
                own.x += other.x;
                own.y += other.y;
            }
            __syncthreads();
        }
        // An infinite entry makes its vector's direction, and with it the cosine, NaN.
        const float cosine = isfinite(own.x) ? own.x / norm_of(own.y) : NAN;
        if (live >> own_row & 1) best = Larger{}(best, key_of(cosine, t0 + own_row));
    }

    // The lanes of one candidate are neighbours; then the teams.
    constexpr int lanes = kWarp / K;
    __shared__ uint64_t bests[kWarps][K];
#pragma unroll
    for (int offset = lanes / 2; offset; offset /= 2) best = Larger{}(best, shuffle_xor(best, offset));
    if (part == 0 && lane % lanes == 0) bests[team][lane / lanes] = best;
    __syncthreads();
    const int64_t k = k0 + threadIdx.x;
    if (threadIdx.x >= K || k >= p.k) return;
    for (int i = 0; i < teams; ++i) best = i ? Larger{}(best, bests[i][threadIdx.x]) : bests[0][threadIdx.x];
    keys[(b * p.k + k) * p.splits + split] = best;
}

__global__ void __launch_bounds__(kThreads) max_cosine_kernel(const uint64_t* keys,  // [B · K, splits]
                                                              const float* norms,    // [B · K]
                                                              int64_t count, int splits,
                                                              float* values,       // [B · K]
                                                              int64_t* indices) {  // [B · K]
    const int64_t candidate = static_cast<int64_t>(blockIdx.x) * kWarps + warp_of_thread();
    if (candidate >= count) return;
    const Nearest found = nearest(keys, norms, candidate, splits);
    if (lane_of_thread() == 0) {
        values[candidate] = found.cosine;
        indices[candidate] = found.index;
    }
}

int candidates_a_block(const Cosines& p) { return !p.wide || p.k > 4 ? 8 : p.k > 1 ? 4 : 1; }

}  // namespace

void Cosines::plan(int multiprocessors) {
    const int64_t bytes = bytes_of(dtype), vector = 16 / bytes;
    wide = aligned(candidates, k, candidate_row, bytes) && aligned(candidates, b, candidate_batch, bytes) &&
           aligned(context, t, context_row, bytes) && aligned(context, b, context_batch, bytes);
    const int64_t candidate_blocks = ceil_div(k, candidates_a_block(*this));
    const int64_t wanted = std::max<int64_t>(1, 2 * multiprocessors / std::max<int64_t>(1, b * candidate_blocks));
    const int64_t groups = ceil_div(t, kRows), chunks = ceil_div(d, kWarp * vector);
    // Where rows are few, several warps share one, so that the whole chip still loads.
    parts = 1;
    while (parts < kWarps && parts < chunks && ceil_div(groups, kWarps / parts) < wanted) parts *= 2;
    splits = static_cast<int>(std::clamp<int64_t>(ceil_div(groups, kWarps / parts), 1, wanted));
}

int cosine_partials(const Cosines& p, uint64_t* workspace, void* stream) {
    float* norms = reinterpret_cast<float*>(workspace + p.b * p.k * p.splits);
    const int a_block = candidates_a_block(p);
    const int64_t blocks = p.b * ceil_div(p.k, a_block) * (p.splits + 1);
    return by_dtype(p.dtype, p.wide, [&](auto element, auto wide) {
        using T = decltype(element);
        auto* kernel = cosine_partials_kernel<T, wide, 8>;
        if constexpr (wide) {
            if (a_block == 4) kernel = cosine_partials_kernel<T, true, 4>;
            if (a_block == 1) kernel = cosine_partials_kernel<T, true, 1>;
        }
        return launch(kernel, blocks, stream, p, workspace, norms);
    });
}

int max_cosine(const Cosines& p, uint64_t* workspace, float* values, int64_t* indices, void* stream) {
    if (const int status = cosine_partials(p, workspace, stream)) return status;
    const float* norms = reinterpret_cast<const float*>(workspace + p.b * p.k * p.splits);
    return launch(max_cosine_kernel, ceil_div(p.b * p.k, kWarps), stream, workspace, norms, p.b * p.k, p.splits, values,
                  indices);
}

int use_device(int device) { return cudaSetDevice(device); }

int probe(int device) {
    if (const int status = cudaSetDevice(device)) return status;
    cudaFuncAttributes found;
    const int status = cudaFuncGetAttributes(&found, max_cosine_kernel);
    cudaGetLastError();  // the answer is no error of a later call
    return status;
}

const char* error_string(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

int64_t row_splits(int64_t rows, int64_t count, int dtype, int multiprocessors) {
    const int64_t chunks = ceil_div(count, kThreads * (16 / bytes_of(dtype)));
    const int64_t wanted = std::max<int64_t>(1, 4 * multiprocessors / std::max<int64_t>(1, rows));
    return std::clamp<int64_t>(chunks, 1, wanted);
}

}  // namespace fastcontrast::cuda
