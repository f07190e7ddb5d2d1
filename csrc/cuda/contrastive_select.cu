#include <algorithm>

#include "contrastive_select.h"
#include "max_cosine.cuh"

namespace fastcontrast::cuda {
namespace {

// --------------------------------------------------------------------------------------------- the k most likely
// tokens

// The largest keys that a warp has met, one a lane, largest first; 0 where there is none yet. Only the first `wanted`
// are kept right.
struct WarpBest {
    uint64_t key = 0;
    int wanted;

    __device__ __forceinline__ explicit WarpBest(int wanted) : wanted(wanted) {}

    __device__ __forceinline__ uint64_t last() const { return from_lane(key, wanted - 1); }

    // Every lane offers one key, 0 for none.
    __device__ __forceinline__ void offer(uint64_t offered) {
        unsigned waiting = __ballot_sync(kAll, offered > last());
        while (waiting) {
            const uint64_t next = from_lane(offered, __ffs(waiting) - 1);
            const int place = __popc(__ballot_sync(kAll, key > next));
            const uint64_t before = __shfl_up_sync(kAll, key, 1);
            if (lane_of_thread() >= place) key = lane_of_thread() == place ? next : before;
            waiting &= waiting - 1;
            waiting &= __ballot_sync(kAll, offered > last());
        }
    }

    // The best of the block's warps, in the first one.
    __device__ __forceinline__ void gather(uint64_t (&shared)[kWarps][kWarp]) {
        shared[warp_of_thread()][lane_of_thread()] = key;
        __syncthreads();
        if (warp_of_thread()) return;
        for (int i = 1; i < kWarps; ++i) offer(shared[i][lane_of_thread()]);
    }
};

template <typename T, bool Wide>
__global__ void __launch_bounds__(kThreads)
    candidates_partials_kernel(const T* logits,  // [B, V]
                               int64_t stride, int64_t v, int splits, int wanted,
                               const uint64_t* found,  // [B]: only what comes after these keys; null: everything
                               uint64_t* keys,         // [B, splits, 32]
                               Sum* sums) {            // [B, splits]
    constexpr int n = kVector<T>;
    const int64_t row = blockIdx.x / splits, chunks = (v + kThreads * n - 1) / (kThreads * n);
    const uint64_t largest = found ? found[row] - 1 : ~uint64_t{0};
    logits += row * stride;
    WarpBest best(wanted);
    Sum sum{-INFINITY, 0.0f};
    for (int64_t chunk = blockIdx.x % splits; chunk < chunks; chunk += splits) {
        float x[n];
        load<T, Wide, kThreads>(logits, v, chunk, threadIdx.x, -INFINITY, x);
        add(sum, x);
        // Once the list is full, hardly any value gets past this.
        const uint64_t last = best.last();
        const float limit = last ? value_of(last) : NAN;
        bool any = false;
#pragma unroll
        for (int i = 0; i < n; ++i) any |= !(x[i] < limit);
        if (!__any_sync(kAll, any)) continue;
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const int64_t token = position<T, Wide, kThreads>(chunk, threadIdx.x, i);
            const uint64_t key = token < v ? key_of(x[i], token) : 0;
            best.offer(key <= largest ? key : 0);
        }
    }
    __shared__ Sum warp_sums[kWarps];
    __shared__ uint64_t warp_keys[kWarps][kWarp];
    sum = block_reduce(sum, MergeSums{}, warp_sums);
    best.gather(warp_keys);
    if (warp_of_thread() == 0) keys[static_cast<int64_t>(blockIdx.x) * kWarp + lane_of_thread()] = best.key;
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    candidates_kernel(const uint64_t* keys,  // [B, splits, 32]
                      const Sum* sums,       // [B, splits]
                      int splits, int wanted, int64_t k,
                      uint64_t* found,       // [B]: the last key, for the next pass
                      float* probabilities,  // [B, k], from this pass's first rank on
                      int64_t* tokens) {     // [B, k], likewise
    const int64_t row = blockIdx.x;
    WarpBest best(wanted);
    for (int i = warp_of_thread(); i < splits; i += kWarps)
        best.offer(keys[(row * splits + i) * kWarp + lane_of_thread()]);
    Sum sum{-INFINITY, 0.0f};
    for (int i = threadIdx.x; i < splits; i += kThreads) sum = MergeSums{}(sum, sums[row * splits + i]);
    __shared__ Sum warp_sums[kWarps];
    __shared__ uint64_t warp_keys[kWarps][kWarp];
    sum = block_reduce(sum, MergeSums{}, warp_sums);
    best.gather(warp_keys);
    const int rank = threadIdx.x;
    if (rank >= wanted) return;  // the first warp is left
    const int64_t at = row * k + rank;
    probabilities[at] = sum.sum == 0.0f ? 0.0f : expf(value_of(best.key) - sum.high) / sum.sum;
    tokens[at] = index_of(best.key);
    if (rank == wanted - 1) found[row] = best.key;
}

// ----------------------------------------------------------------------------------------------------------- the
// choice

__global__ void __launch_bounds__(kThreads) select_kernel(const uint64_t* keys,        // [B, K, splits]
                                                          const float* norms,          // [B, K]
                                                          const float* probabilities,  // [B, K]
                                                          int64_t k, int splits, float keep, float alpha,
                                                          int64_t* choice,        // [B]
                                                          float* score,           // [B, K]
                                                          float* degeneration) {  // [B, K]
    const int64_t row = blockIdx.x;
    uint64_t best = 0;
    for (int64_t rank = warp_of_thread(); rank < k; rank += kWarps) {
        const int64_t candidate = row * k + rank;
        const float cosine = nearest(keys, norms, candidate, splits).cosine;
        const float p = probabilities[candidate], penalty = cosine == -INFINITY ? 0.0f : cosine;
        const float value = p == 0.0f ? -INFINITY : keep * p - alpha * penalty;
        best = Larger{}(best, key_of(value, rank));
        if (lane_of_thread() == 0) {
            score[candidate] = value;
            degeneration[candidate] = cosine;
        }
    }
    __shared__ uint64_t warp_best[kWarps];
    best = block_reduce(best, Larger{}, warp_best);
    if (threadIdx.x == 0) choice[row] = index_of(best);
}

}  // namespace

int64_t candidates_workspace(int64_t rows, int splits) { return rows * (splits * (kWarp + 1) + 1); }

int contrastive_candidates(const void* logits, float* probabilities, int64_t* tokens, uint64_t* workspace, int64_t b,
                           int64_t v, int64_t k, int64_t stride, int splits, int dtype, void* stream) {
    uint64_t* keys = workspace;
    Sum* sums = reinterpret_cast<Sum*>(keys + b * splits * kWarp);
    uint64_t* found = reinterpret_cast<uint64_t*>(sums + b * splits);
    // A lane keeps one key, so that more than 32 take several passes, each of what comes after the one before.
    for (int64_t rank = 0; rank < k; rank += kWarp) {
        const int wanted = static_cast<int>(std::min<int64_t>(kWarp, k - rank));
        const uint64_t* after = rank ? found : nullptr;
        int status = by_dtype(dtype, aligned(logits, b, stride, bytes_of(dtype)), [&](auto element, auto wide) {
            using T = decltype(element);
            return launch(candidates_partials_kernel<T, wide>, b * splits, stream, static_cast<const T*>(logits),
                          stride, v, splits, wanted, after, keys, sums);
        });
        if (status) return status;
        status = launch(candidates_kernel, b, stream, keys, sums, splits, wanted, k, found, probabilities + rank,
                        tokens + rank);
        if (status) return status;
    }
    return 0;
}

int contrastive_select(const Cosines& p, const float* probabilities, uint64_t* workspace, int64_t* choice, float* score,
                       float* degeneration, float keep, float alpha, void* stream) {
    if (const int status = cosine_partials(p, workspace, stream)) return status;
    const float* norms = reinterpret_cast<const float*>(workspace + p.b * p.k * p.splits);
    return launch(select_kernel, p.b, stream, workspace, norms, probabilities, p.k, p.splits, keep, alpha, choice,
                  score, degeneration);
}

}  // namespace fastcontrast::cuda
