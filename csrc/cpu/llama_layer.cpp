#include "cpu/llama_layer.h"

#include <cmath>
#include <memory>

#include "common/threads.h"
#include "cpu/few_rows.h"
#include "cpu/lanes.h"
#include "cpu/sibling_attention.h"

namespace fastcontrast {
namespace {

// out = weight * x / sqrt(mean(x²) + eps), by rows.
FC_VECTOR_CLONES void rms_norm(const float* x, const float* weight, float* out, int64_t rows, int64_t d, float eps) {
    for (int64_t i = 0; i < rows; ++i, x += d, out += d) {
        float squares[kWide] = {};
        int64_t j = 0;
        for (; j + kWide <= d; j += kWide)
#pragma omp simd
            for (int l = 0; l < kWide; ++l) squares[l] += x[j + l] * x[j + l];
        float sum = sum_lanes(squares);
        for (; j < d; ++j) sum += x[j] * x[j];
        const float factor = 1.0f / std::sqrt(sum / static_cast<float>(d) + eps);
#pragma omp simd
        for (int64_t l = 0; l < d; ++l) out[l] = weight[l] * (x[l] * factor);
    }
}

// Pairs of numbers half a head apart turn by an angle; `out` may be `x`.
FC_INLINE void rotate(const float* x, const float* cos, const float* sin, int64_t width, float* out) {
    for (int64_t j = 0, h = width / 2; j < h; ++j) {
        const float a = x[j], b = x[j + h];
        out[j] = a * cos[j] - b * sin[j];
        out[j + h] = b * cos[j + h] + a * sin[j + h];
    }
}

void place(const LlamaLayer& l, const LlamaStep& s, float* q, const float* k, const float* v) {
    for (int64_t b = 0; b < s.b; ++b)
        for (int64_t j = 0; j < s.k; ++j) {
            const int64_t row = b * s.k + j, turn = b * s.rotation_batch + j * l.width;
            for (int64_t h = 0; h < l.heads; ++h) {
                float* head = q + (row * l.heads + h) * l.width;
                rotate(head, s.cos + turn, s.sin + turn, l.width, head);
            }
            for (int64_t g = 0; g < l.groups; ++g) {
                const int64_t from = (row * l.groups + g) * l.width;
                const int64_t to = b * s.slots_batch + g * s.slots_group + (s.start + j) * l.width;
                rotate(k + from, s.cos + turn, s.sin + turn, l.width, s.keys + to);
                std::copy(v + from, v + from + l.width, s.values + to);
            }
        }
}

FC_VECTOR_CLONES void add(const float* x, const float* y, float* out, int64_t n) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) out[j] = x[j] + y[j];
}

}  // namespace

void llama_layer(const LlamaLayer& l, const LlamaStep& s, float* out, int threads) {
    const int64_t rows = s.b * s.k, queries = l.heads * l.width, stored = l.groups * l.width;
    const int64_t sizes[] = {l.hidden, queries, stored, stored, queries, l.inner};
    int64_t total = 0;
    for (int64_t size : sizes) total += rows * size;
    const std::unique_ptr<float[]> memory(new float[total]);
    float* parts[6];
    float* next = memory.get();
    for (int i = 0; i < 6; ++i) parts[i] = next, next += rows * sizes[i];
    auto [x, q, k, v, attended, inner] = parts;
    const auto product = [&](const Linear& linear, const float* from, float* to, int64_t n, int64_t d) {
        few_rows(from, linear.weight, linear.bias, to, rows, n, d, threads);
    };

    rms_norm(s.x, l.attention_norm, x, rows, l.hidden, l.attention_eps);
    product(l.q, x, q, queries, l.hidden);
    product(l.k, x, k, stored, l.hidden);
    product(l.v, x, v, stored, l.hidden);
    place(l, s, q, k, v);
    const Siblings siblings{q,
                            s.keys,
                            s.values,
                            s.mask,
                            s.b,
                            l.groups,
                            l.heads / l.groups,
                            s.k,
                            s.start + s.k,
                            l.width,
                            l.width,
                            s.k * queries,
                            l.width,
                            queries,
                            s.slots_batch,
                            s.slots_group,
                            l.width,
                            s.slots_batch,
                            s.slots_group,
                            l.width,
                            s.mask_batch,
                            s.mask_row,
                            l.scale};
    sibling_attention(siblings, attended, threads);
    product(l.o, attended, x, l.hidden, queries);
    add(s.x, x, out, rows * l.hidden);

    rms_norm(out, l.mlp_norm, x, rows, l.hidden, l.mlp_eps);
    few_rows_gated(x, l.gate.weight, l.up.weight, l.gate.bias, l.up.bias, inner, rows, l.inner, l.hidden, threads);
    product(l.down, inner, x, l.hidden, l.inner);
    add(out, x, out, rows * l.hidden);
}

}  // namespace fastcontrast
