// Attention across the frames of clips: the problem that both of its kernels take, and how its tensors are read.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/vectors.h"

namespace fastcontrast {

// A tensor [B, F, T, H, D] without gaps in its last dimension; strides count its elements.
struct View {
    char* data = nullptr;
    int64_t batch = 0, frame = 0, token = 0, head = 0;
};

// Packed clips lie behind one another: clip b owns frames starts[b] … starts[b + 1] − 1, and there is no batch stride.
struct FrameAttention {
    View q, k, v, extra_k, extra_v;
    int64_t b, f, t, s, h, groups, d,
        e;                 // clips, frames of the longest, queries and keys of a frame, heads, extra keys
    const int32_t* count;  // [F, F], `count_batch` apart for each clip: 0 where a frame is padding
    int64_t count_batch;
    const bool* valid;      // [B, F], or null: false where a query frame is padding
    const int32_t* starts;  // [B + 1], or null
    bool shared;            // the extra keys are those of the clip
    float scale;
    Kind kind;

    int64_t size() const { return kind == Kind::f32 ? 4 : 2; }
    int64_t heads() const { return h / groups; }  // that share one of `groups`
    bool is_valid(int64_t clip, int64_t frame) const { return !valid || valid[clip * f + frame]; }
    int64_t count_of(int64_t clip, int64_t query, int64_t key) const {
        return count[clip * count_batch + query * f + key];
    }
    // Frames of all clips in the order of memory, for what is [frames, ...] without gaps.
    int64_t row(int64_t clip, int64_t frame) const { return starts ? starts[clip] + frame : clip * f + frame; }
    int64_t rows() const { return starts ? starts[b] : b * f; }

    char* at(const View& x, int64_t clip, int64_t frame, int64_t token, int64_t head) const {
        const int64_t place = starts ? (starts[clip] + frame) * x.frame : clip * x.batch + frame * x.frame;
        return x.data + (place + token * x.token + head * x.head) * size();
    }
    // Row `i` of the extra keys that frame `frame` sees.
    char* extra_at(const View& x, int64_t clip, int64_t frame, int64_t i, int64_t head) const {
        const int64_t place = shared   ? clip * x.batch
                              : starts ? (starts[clip] + frame) * x.frame
                                       : clip * x.batch + frame * x.frame;
        return x.data + (place + i * x.token + head * x.head) * size();
    }
};

struct FrameGradients {
    View q, k, v, extra_k, extra_v;
};

namespace {

// out [count, ld] = rows of D elements, `stride` elements apart, in float32.
[[maybe_unused]] FC_VECTOR_CLONES void read_rows(Kind kind, const char* rows, int64_t stride, int64_t count, int64_t d,
                                                 float* out, int64_t ld) {
    with_kind(kind, rows, [&](auto* x) FC_INLINE_LAMBDA {
        for (int64_t i = 0; i < count; ++i)
#pragma omp simd
            for (int64_t j = 0; j < d; ++j) out[i * ld + j] = widen(x[i * stride + j]);
    });
}

// rows, `stride` elements apart, = x [count, ld], each times its factor if there are any, rounded to their type.
[[maybe_unused]] FC_VECTOR_CLONES void write_rows(Kind kind, char* rows, int64_t stride, int64_t count, int64_t d,
                                                  const float* x, int64_t ld, const float* factors = nullptr) {
    with_kind(kind, rows, [&](auto* typed) FC_INLINE_LAMBDA {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
        T* out = const_cast<T*>(typed);
        for (int64_t i = 0; i < count; ++i) {
            const float factor = factors ? factors[i] : 1.0f;
#pragma omp simd
            for (int64_t j = 0; j < d; ++j) out[i * stride + j] = narrow<T>(factor * x[i * ld + j]);
        }
    });
}

[[maybe_unused]] void zero_rows(int64_t size, char* rows, int64_t stride, int64_t count, int64_t d) {
    for (int64_t i = 0; i < count; ++i) std::memset(rows + i * stride * size, 0, d * size);
}

}  // namespace

}  // namespace fastcontrast
