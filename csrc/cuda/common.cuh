// What the CUDA kernels share: loads, the order of values, softmax sums, reductions and launches. Every reduction has a
// fixed order, so that the same inputs give the same bits.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace fastcontrast::cuda {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarp * kWarps;  // of every block
constexpr unsigned kAll = 0xffffffffu;

// ---------------------------------------------------------------------------------------------------------------- host

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, void* stream, Arguments... arguments) {
    if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
    return cudaGetLastError();
}

// Its own type, because the header of CUDA's costs seconds of compilation and only its width is needed.
struct BFloat16 {
    uint16_t bits;
};

inline int64_t bytes_of(int dtype) { return dtype == 0 ? 4 : 2; }

// Whether all rows begin where a 128-bit load may.
inline bool aligned(const void* data, int64_t rows, int64_t stride, int64_t bytes) {
    return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(rows > 1 ? stride * bytes : 0)) % 16 == 0;
}

// f(an element, whether loads are wide) for the dtype code of fastcontrast/ops.
template <typename Function>
int by_dtype(int dtype, bool wide, Function f) {
    const auto go = [&](auto element) { return wide ? f(element, std::true_type{}) : f(element, std::false_type{}); };
    return dtype == 0 ? go(float{}) : dtype == 1 ? go(BFloat16{}) : go(__half{});
}

// --------------------------------------------------------------------------------------------------------------- loads

__device__ __forceinline__ int lane_of_thread() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp_of_thread() { return threadIdx.x / kWarp; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
constexpr int kVector = 16 / sizeof(T);  // elements of a 128-bit load

// A row is read in chunks of Workers · kVector<T> elements. Where in the row the i-th of a worker's elements lies:
// neighbours for a wide load, else a stride apart so that narrow loads of neighbouring threads are neighbours.
template <typename T, bool Wide, int Workers>
__device__ __forceinline__ int64_t position(int64_t chunk, int worker, int i) {
    constexpr int n = kVector<T>;
    return chunk * (Workers * n) + (Wide ? worker * n + i : i * Workers + worker);
}

// A worker's elements of a chunk, `absent` beyond the end of the row. Stream: they are not wanted again soon.
template <typename T, bool Wide, int Workers, bool Stream = false>
__device__ __forceinline__ void load(const T* row, int64_t count, int64_t chunk, int worker, float absent,
                                     float (&x)[kVector<T>]) {
    constexpr int n = kVector<T>;
    const int64_t first = position<T, Wide, Workers>(chunk, worker, 0);
    if (Wide && first + n <= count) {
        const uint4* source = reinterpret_cast<const uint4*>(row + first);
        const uint4 packed = Stream ? __ldcs(source) : __ldg(source);
        T values[n];
        memcpy(values, &packed, sizeof packed);
#pragma unroll
        for (int i = 0; i < n; ++i) x[i] = to_float(values[i]);
        return;
    }
#pragma unroll
    for (int i = 0; i < n; ++i) {
        const int64_t at = position<T, Wide, Workers>(chunk, worker, i);
        x[i] = at < count ? to_float(row[at]) : absent;
    }
}

// --------------------------------------------------------------------------------------------------------------- order

// One number for a value and where it stands: a larger key is a larger value or, among equals, a lower index. NaN is
// the largest value, 0 the key of nothing. Indices are below 2³².
__device__ __forceinline__ uint64_t key_of(float value, int64_t index) {
    const uint32_t bits = __float_as_uint(value + 0.0f);  // −0 becomes 0, its equal
    const uint32_t number = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    const uint32_t order = value != value ? 0xffffffffu : number;
    return static_cast<uint64_t>(order) << 32 | static_cast<uint32_t>(~index);
}

__device__ __forceinline__ float value_of(uint64_t key) {
    const uint32_t order = static_cast<uint32_t>(key >> 32);
    return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

__device__ __forceinline__ int64_t index_of(uint64_t key) { return static_cast<uint32_t>(~key); }

struct Larger {
    __device__ __forceinline__ uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};

// The larger; NaN if either is, as in torch and unlike fmaxf.
__device__ __forceinline__ float nan_max(float a, float b) { return b > a || b != b ? b : a; }

// ---------------------------------------------------------------------------------------------------------- reductions

template <typename V>
__device__ __forceinline__ V shuffle_xor(V value, int offset) {
    static_assert(sizeof(V) % 4 == 0);
    uint32_t words[sizeof(V) / 4];
    memcpy(words, &value, sizeof(V));
#pragma unroll
    for (uint32_t& word : words) word = __shfl_xor_sync(kAll, word, offset);
    memcpy(&value, words, sizeof(V));
    return value;
}

template <typename V>
__device__ __forceinline__ V from_lane(V value, int lane) {
    static_assert(sizeof(V) % 4 == 0);
    uint32_t words[sizeof(V) / 4];
    memcpy(words, &value, sizeof(V));
#pragma unroll
    for (uint32_t& word : words) word = __shfl_sync(kAll, word, lane);
    memcpy(&value, words, sizeof(V));
    return value;
}

// The merge of the 32 values of a warp, the same bits in every lane even where merge(a, b) and merge(b, a) differ in
// the last one.
template <typename V, typename Merge>
__device__ __forceinline__ V warp_reduce(V value, Merge merge) {
#pragma unroll
    for (int offset = kWarp / 2; offset; offset /= 2) value = merge(value, shuffle_xor(value, offset));
    return from_lane(value, 0);
}

// The merge of a block's values, in every thread. `shared` serves one call.
template <typename V, typename Merge>
__device__ __forceinline__ V block_reduce(V value, Merge merge, V (&shared)[kWarps]) {
    value = warp_reduce(value, merge);
    if (lane_of_thread() == 0) shared[warp_of_thread()] = value;
    __syncthreads();
    value = shared[0];
    for (int i = 1; i < kWarps; ++i) value = merge(value, shared[i]);
    return value;
}

struct Add {
    __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

// ------------------------------------------------------------------------------------------------------------- softmax

// Σ exp(x − high) with high = max x. Nothing, or −inf alone: high −inf, sum 0. A NaN or +inf: sum NaN. Roundings are
// spelled out, so that wherever the compiler puts this code equal rows have equal sums.
struct Sum {
    float high;
    float sum;
};

// What is subtracted from x before exp: −inf − −inf would be NaN.
__device__ __forceinline__ float shift(float high) { return high == -INFINITY ? 0.0f : high; }

struct MergeSums {
    __device__ __forceinline__ Sum operator()(Sum a, Sum b) const {
        const float high = nan_max(a.high, b.high);
        return {high, __fmaf_rn(a.sum, expf(a.high - shift(high)), __fmul_rn(b.sum, expf(b.high - shift(high))))};
    }
};

template <int N>
__device__ __forceinline__ void add(Sum& total, const float (&x)[N]) {
    float high = total.high;
#pragma unroll
    for (int i = 0; i < N; ++i) high = nan_max(high, x[i]);
    if (high != total.high) total = {high, __fmul_rn(total.sum, expf(total.high - shift(high)))};
#pragma unroll
    for (int i = 0; i < N; ++i) total.sum += expf(x[i] - shift(high));
}

}  // namespace fastcontrast::cuda
