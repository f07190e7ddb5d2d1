#include "cpu/triplet_distances.h"

#include <vector>

#include "common/threads.h"

namespace fastcontrast {
namespace {

constexpr int64_t kChunk = 1 << 15;      // numbers of a sample that are one task, whatever the number of threads
constexpr int64_t kGradients = 1 << 10;  // numbers whose up to three gradients find the inputs in the first cache

struct Sums {
    double positive = 0.0, negative = 0.0;
};

// Lanes of kBlock numbers in float32, folded pairwise, and blocks in double.
template <typename T>
FC_INLINE Sums squares(const T* __restrict y, const T* __restrict p, const T* __restrict n, int64_t count) {
    Sums sums;
    for (int64_t begin = 0; begin < count; begin += kBlock) {
        float positive[kLanes] = {}, negative[kLanes] = {};
        in_lanes(std::min(kBlock, count - begin), [&](int64_t j, int l) FC_INLINE_LAMBDA {
            const float target = widen(y[begin + j]);
            const float dp = widen(p[begin + j]) - target, dn = widen(n[begin + j]) - target;
            positive[l] += dp * dp;
            negative[l] += dn * dn;
        });
        const auto add = [](float a, float b) FC_INLINE_LAMBDA { return a + b; };
        sums.positive += fold(positive, add);
        sums.negative += fold(negative, add);
    }
    return sums;
}

FC_VECTOR_CLONES Sums squares_of(const Triplets& t, int64_t sample, int64_t begin, int64_t count) {
    Sums sums;
    with_kind(t.kind, t.target, [&](auto* target) FC_INLINE_LAMBDA {
        using T = decltype(target);
        sums = squares(target + sample * t.target_stride + begin,
                       static_cast<T>(t.positive) + sample * t.positive_stride + begin,
                       static_cast<T>(t.negative) + sample * t.negative_stride + begin, count);
    });
    return sums;
}

template <typename T>
FC_INLINE void gradients_of(const T* __restrict y, const T* __restrict p, const T* __restrict n, float fp, float fn,
                            T* __restrict dy, T* __restrict dp, T* __restrict dn, int64_t count) {
    if (dp)
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) dp[j] = narrow<T>(fp * (widen(p[j]) - widen(y[j])));
    if (dn)
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) dn[j] = narrow<T>(fn * (widen(n[j]) - widen(y[j])));
    if (dy)
#pragma omp simd
        for (int64_t j = 0; j < count; ++j)
            dy[j] = narrow<T>(fp * (widen(y[j]) - widen(p[j])) + fn * (widen(y[j]) - widen(n[j])));
}

FC_VECTOR_CLONES void chunk_gradients(const Triplets& t, float fp, float fn, void* dtarget, void* dpositive,
                                      void* dnegative, int64_t sample, int64_t begin, int64_t end) {
    with_kind(t.kind, t.target, [&](auto* target) FC_INLINE_LAMBDA {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(target)>>;
        const auto at = [&](void* gradient, int64_t j) FC_INLINE_LAMBDA {
            return gradient ? static_cast<T*>(gradient) + sample * t.n + j : nullptr;
        };
        for (int64_t j = begin; j < end; j += kGradients)
            gradients_of(target + sample * t.target_stride + j,
                         static_cast<const T*>(t.positive) + sample * t.positive_stride + j,
                         static_cast<const T*>(t.negative) + sample * t.negative_stride + j, fp, fn, at(dtarget, j),
                         at(dpositive, j), at(dnegative, j), std::min(kGradients, end - j));
    });
}

// Calls fn(task, sample, begin, end) for chunks of samples.
template <typename Function>
void each_chunk(const Triplets& t, int threads, Function fn) {
    const int64_t chunks = (t.n + kChunk - 1) / kChunk;
    in_shares(t.b * chunks, team(threads, t.b * t.n), [&](int64_t first, int64_t last, int) {
        for (int64_t task = first; task < last; ++task) {
            const int64_t begin = task % chunks * kChunk;
            fn(task, task / chunks, begin, std::min(begin + kChunk, t.n));
        }
    });
}

}  // namespace

void triplet_distances(const Triplets& t, float* distances, int threads) {
    const int64_t chunks = (t.n + kChunk - 1) / kChunk;
    std::vector<Sums> parts(t.b * chunks);
    each_chunk(t, threads, [&](int64_t task, int64_t sample, int64_t begin, int64_t end) {
        parts[task] = squares_of(t, sample, begin, end - begin);
    });
    for (int64_t b = 0; b < t.b; ++b) {
        Sums total;
        for (int64_t i = b * chunks; i < (b + 1) * chunks; ++i) {
            total.positive += parts[i].positive;
            total.negative += parts[i].negative;
        }
        const double n = static_cast<double>(std::max<int64_t>(t.n, 1));
        distances[b] = static_cast<float>(total.positive / n);
        distances[t.b + b] = static_cast<float>(total.negative / n);
    }
}

void triplet_distances_backward(const Triplets& t, const float* gradients, void* dtarget, void* dpositive,
                                void* dnegative, int threads) {
    const double factor = 2.0 / static_cast<double>(std::max<int64_t>(t.n, 1));
    each_chunk(t, threads, [&](int64_t, int64_t sample, int64_t begin, int64_t end) {
        const float fp = static_cast<float>(factor * gradients[sample]);
        const float fn = static_cast<float>(factor * gradients[t.b + sample]);
        chunk_gradients(t, fp, fn, dtarget, dpositive, dnegative, sample, begin, end);
    });
}

}  // namespace fastcontrast
