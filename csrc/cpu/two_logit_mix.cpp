#include "cpu/two_logit_mix.h"

#include <vector>

#include "common/threads.h"

namespace fastcontrast {
namespace {

// log(x) to 1 ulp or so for normal x > 0: the Cephes logf polynomial on [sqrt(1/2), sqrt(2)), exponent apart.
FC_INLINE float log_fast(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const int32_t exponent = (bits - 0x3f3504f3) >> 23;  // of sqrt(1/2) and up
    bits -= exponent * (1 << 23);
    float m;
    std::memcpy(&m, &bits, sizeof m);
    const float f = m - 1.0f, n = static_cast<float>(exponent), z = f * f;
    float p = 7.0376836292e-2f;
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    const float y = f * z * p + n * -2.12194440e-4f - 0.5f * z;
    return f + y + n * 0.693359375f;
}

// ½ p log(p / m) + ½ q log(q / m), m = (p + q) / 2: m/2 · h(x) with x = |p - q| / (p + q) and
// h(x) = (1 + x) log(1 + x) + (1 - x) log(1 - x). No term is negative, and equals give 0.
FC_INLINE float divergence_of(float p, float q) {
    const float s = p + q, large = p > q ? p : q, small = p > q ? q : p;
    const float inverse = s == 0.0f ? 0.0f : 1.0f / s;
    const float x = (large - small) * inverse, above = 2.0f * large * inverse, below = 2.0f * small * inverse;
    const float y = x * x;
    float series = 1.0f / 153;
    series = series * y + 1.0f / 120;
    series = series * y + 1.0f / 91;
    series = series * y + 1.0f / 66;
    series = series * y + 1.0f / 45;
    series = series * y + 1.0f / 28;
    series = series * y + 1.0f / 15;
    series = series * y + 1.0f / 6;
    series = (series * y + 1.0f) * y;
    const float direct = above * log_fast(above) + below * log_fast(below < FLT_MIN ? FLT_MIN : below);
    return 0.25f * s * (x < 0.5f ? series : direct);
}

// What a softmax is made of: exp((z - high) - low), 0 throughout where no logit is finite.
struct Offsets {
    float high, low;
};

Offsets offsets(LogSum total) {
    if (total.sum == 0.0f) return {FLT_MAX, 0.0f};
    return {finite(total.high), std::log(total.sum)};
}

struct RowSums {
    LogSum logits, contrast;
    float least = INFINITY;  // finite logit of the contrast
};

// One row as the phases see it.
struct Mixed {
    float keep, weight, least, bar;
};

template <typename T>
FC_INLINE RowSums sums(const T* z1, const T* z0, int64_t n) {
    RowSums found;
    found.logits = log_sum(n, [&](int64_t j) FC_INLINE_LAMBDA { return widen(z1[j]); });
    found.contrast = log_sum(n, [&](int64_t j) FC_INLINE_LAMBDA { return widen(z0[j]); });
    float least[kLanes];
    std::fill(least, least + kLanes, INFINITY);
    in_lanes(n, [&](int64_t j, int l) FC_INLINE_LAMBDA {
        const float z = widen(z0[j]), finite_z = z < -FLT_MAX ? INFINITY : z;
        least[l] = finite_z < least[l] ? finite_z : least[l];
    });
    found.least = fold(least, [](float a, float b) FC_INLINE_LAMBDA { return a < b ? a : b; });
    if (std::isnan(found.contrast.sum)) found.least = NAN;  // comparisons have passed over it
    return found;
}

template <typename T>
FC_INLINE float divergence(const T* z1, const T* z0, int64_t n, Offsets p, Offsets q) {
    float total[kLanes] = {};
    in_lanes(n, [&](int64_t j, int l) FC_INLINE_LAMBDA {
        total[l] +=
            divergence_of(exp_up_to_88((widen(z1[j]) - p.high) - p.low), exp_up_to_88((widen(z0[j]) - q.high) - q.low));
    });
    return fold(total, [](float a, float b) FC_INLINE_LAMBDA { return a + b; });
}

template <typename T>
FC_INLINE LogSum mix(const T* z1, const T* z0, int64_t n, Mixed row, float* __restrict out) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
        const float kept = widen(z1[j]), z = widen(z0[j]), other = z < -FLT_MAX ? row.least : z;
        const float mixed = row.keep * kept - row.weight * other;
        out[j] = kept < -FLT_MAX || kept < row.bar ? -INFINITY : mixed;
    }
    return log_sum(n, [&](int64_t j) FC_INLINE_LAMBDA { return out[j]; });
}

// Pointers to column `begin` of row i of both, whatever they hold.
template <typename Function>
FC_INLINE void with_row(const LogitPair& pair, int64_t i, int64_t begin, Function fn) {
    with_kind(pair.kind, pair.logits, [&](auto* z1) FC_INLINE_LAMBDA {
        const auto* z0 = static_cast<decltype(z1)>(pair.contrast);
        fn(z1 + i * pair.stride + begin, z0 + i * pair.contrast_stride + begin);
    });
}

FC_VECTOR_CLONES RowSums sums_of(const LogitPair& pair, int64_t i, int64_t begin, int64_t end) {
    RowSums found;
    with_row(pair, i, begin, [&](auto* z1, auto* z0) FC_INLINE_LAMBDA { found = sums(z1, z0, end - begin); });
    return found;
}

FC_VECTOR_CLONES float divergence_part(const LogitPair& pair, int64_t i, int64_t begin, int64_t end, Offsets p,
                                       Offsets q) {
    float found = 0.0f;
    with_row(pair, i, begin,
             [&](auto* z1, auto* z0) FC_INLINE_LAMBDA { found = divergence(z1, z0, end - begin, p, q); });
    return found;
}

FC_VECTOR_CLONES LogSum mix_part(const LogitPair& pair, int64_t i, int64_t begin, int64_t end, Mixed row, float* out) {
    LogSum found;
    with_row(pair, i, begin,
             [&](auto* z1, auto* z0) FC_INLINE_LAMBDA { found = mix(z1, z0, end - begin, row, out + begin); });
    return found;
}

FC_VECTOR_CLONES void subtract(float* out, int64_t begin, int64_t end, Offsets lse) {
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) out[j] = (out[j] - lse.high) - lse.low;
}

// A row in four phases, each shared among `count` threads; what the shares found is put together in their order.
void mix_row(const LogitPair& pair, const MixSettings& settings, int64_t i, float* out, float* weight,
             float* divergence, int count) {
    const int64_t n = pair.vocabulary;
    std::vector<RowSums> parts(count);
    in_shares(n, count, [&](int64_t begin, int64_t end, int t) { parts[t] = sums_of(pair, i, begin, end); });
    RowSums row = parts[0];
    for (int t = 1; t < count; ++t) {
        row.logits.add(parts[t].logits);
        row.contrast.add(parts[t].contrast);
        row.least = parts[t].least < row.least || std::isnan(parts[t].least) ? parts[t].least : row.least;
    }

    *divergence = NAN;
    if (settings.diverge) {
        const Offsets p = offsets(row.logits), q = offsets(row.contrast);
        std::vector<float> found(count);
        in_shares(n, count,
                  [&](int64_t begin, int64_t end, int t) { found[t] = divergence_part(pair, i, begin, end, p, q); });
        *divergence = 0.0f;
        for (float part : found) *divergence += part;
    }
    *weight = settings.weight ? settings.weight[i] : *divergence < settings.floor ? settings.floor : *divergence;

    const Mixed mixed{std::isnan(settings.keep) ? 1.0f + *weight : settings.keep, *weight,
                      row.least == INFINITY ? 0.0f : row.least, row.logits.high + settings.threshold};
    std::vector<LogSum> totals(count);
    in_shares(n, count,
              [&](int64_t begin, int64_t end, int t) { totals[t] = mix_part(pair, i, begin, end, mixed, out); });
    for (int t = 1; t < count; ++t) totals[0].add(totals[t]);
    const Offsets lse = offsets(totals[0]);
    in_shares(n, count, [&](int64_t begin, int64_t end, int) { subtract(out, begin, end, lse); });
}

}  // namespace

void two_logit_mix(const LogitPair& pair, const MixSettings& settings, float* out, float* weight, float* divergence,
                   int threads) {
    const auto row = [&](int64_t i, int count) {
        mix_row(pair, settings, i, out + i * pair.vocabulary, weight + i, divergence + i, count);
    };
    const int count = team(threads, pair.rows * pair.vocabulary);
    if (pair.rows >= count)  // a row a thread: nothing to put together
        in_shares(pair.rows, count, [&](int64_t begin, int64_t end, int) {
            for (int64_t i = begin; i < end; ++i) row(i, 1);
        });
    else
        for (int64_t i = 0; i < pair.rows; ++i) row(i, count);
}

}  // namespace fastcontrast
