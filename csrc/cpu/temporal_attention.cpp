#include "cpu/temporal_attention.h"

#include <algorithm>

#include "common/threads.h"
#include "cpu/panels.h"

namespace fastcontrast {
namespace {

// A problem is one position of one group of heads: some dozens of rows at most, that lie far apart, often by a multiple
// of the caches' own period. Each is brought to a place of its own once, so that they do not push each other out.
struct Problem {
    int64_t b, t, g;
};

// Frames of a clip that are valid, and the log counts between them: [block of lanes, key, lane].
struct Table {
    int64_t clip = -1;
    std::vector<int32_t> frames;
    std::vector<float> bias;
    bool plain = true;  // every count is 1
};

int64_t extra_rows(const FrameAttention& c, int64_t frames) { return c.shared ? c.e : c.e * frames; }

int64_t own_frames(const FrameAttention& c, int64_t b) { return c.starts ? c.starts[b + 1] - c.starts[b] : c.f; }

void tabulate(const FrameAttention& c, int64_t b, Table& table) {
    table.clip = b;
    table.frames.clear();
    for (int64_t f = 0; f < own_frames(c, b); ++f)
        if (c.is_valid(b, f)) table.frames.push_back(f);
    const int64_t n = table.frames.size(), rows = n + extra_rows(c, n);
    int64_t width = 0;
    with_lanes(n, [&](auto lanes) { width = decltype(lanes)::value; });
    table.bias.assign((n + width - 1) / width * rows * width, 0.0f);
    table.plain = c.shared || !c.e;
    for (int64_t l = 0; l < n; ++l) {
        float* bias = table.bias.data() + l / width * rows * width + l % width;
        for (int64_t i = 0; i < n; ++i) {
            const int64_t count = c.count_of(b, table.frames[l], table.frames[i]);
            bias[i * width] = count == 1 ? 0.0f : std::log(static_cast<float>(count));
            table.plain &= count == 1;
        }
        if (!c.shared)  // the keys of other frames are not this one's
            for (int64_t x = 0; x < n * c.e; ++x) bias[(n + x) * width] = x / c.e == l ? 0.0f : -INFINITY;
    }
}

// What a thread works in, for up to `frames` frames and `rows` keys.
struct Worker {
    Table table;
    int64_t ld;  // D rounded up to whole vectors
    Scratch memory;
    float *q, *dout, *k, *v, *sums, *dk, *dv;  // [frames or rows, ld]
    float *lanes, *dout_lanes;                 // [D, kMostLanes]
    float *p, *ds;                             // [rows, kMostLanes]
    float *high, *sum, *factor;                // [kMostLanes]
    std::vector<float> extra;                  // gradients of extra k and v: [B, rows, groups, D] twice

    static int64_t size(const FrameAttention& c, bool backward) {
        const int64_t ld = (c.d + kWide - 1) / kWide * kWide, rows = c.f + extra_rows(c, c.f);
        const int64_t times = backward ? 2 : 1;
        return ld * (times * (c.f + 2 * rows) + kMostLanes + times * kMostLanes) + times * rows * kMostLanes +
               3 * kMostLanes;
    }

    Worker(const FrameAttention& c, bool backward) : ld((c.d + kWide - 1) / kWide * kWide), memory(size(c, backward)) {
        const int64_t rows = c.f + extra_rows(c, c.f);
        float* next = memory.data();
        auto take = [&next](int64_t count) {
            float* begin = next;
            next += count;
            return begin;
        };
        q = take(c.f * ld), k = take(rows * ld), v = take(rows * ld);
        sums = take(kMostLanes * ld), lanes = take(kMostLanes * ld), p = take(rows * kMostLanes);
        high = take(kMostLanes), sum = take(kMostLanes), factor = take(kMostLanes);
        dout = dk = dv = dout_lanes = ds = nullptr;
        if (!backward) return;
        dout = take(c.f * ld), dk = take(rows * ld), dv = take(rows * ld);
        dout_lanes = take(kMostLanes * ld), ds = take(rows * kMostLanes);
        extra.assign(2 * c.b * extra_rows(c, c.f) * c.groups * c.d, 0.0f);
    }
};

// The rows of one head in all valid frames, at one position.
void bring(const FrameAttention& c, const View& x, const Worker& w, const Problem& at, int64_t head, float* to) {
    const std::vector<int32_t>& frames = w.table.frames;
    const int64_t n = frames.size();
    if (n && frames[n - 1] - frames[0] == n - 1)  // without a hole: at equal distances
        return read_rows(c.kind, c.at(x, at.b, frames[0], at.t, head), x.frame, n, c.d, to, w.ld);
    for (int64_t i = 0; i < n; ++i)
        read_rows(c.kind, c.at(x, at.b, frames[i], at.t, head), 0, 1, c.d, to + i * w.ld, w.ld);
}

void bring_extra(const FrameAttention& c, const View& x, const Worker& w, const Problem& at, float* to) {
    const int64_t n = w.table.frames.size();
    for (int64_t i = 0; i < extra_rows(c, n); ++i)
        read_rows(c.kind, c.extra_at(x, at.b, c.shared ? 0 : w.table.frames[i / c.e], i % c.e, at.g), 0, 1, c.d,
                  to + i * w.ld, w.ld);
}

void bring_keys(const FrameAttention& c, const Worker& w, const Problem& at) {
    const int64_t n = w.table.frames.size();
    bring(c, c.k, w, at, at.g, w.k), bring(c, c.v, w, at, at.g, w.v);
    if (c.e) bring_extra(c, c.extra_k, w, at, w.k + n * w.ld), bring_extra(c, c.extra_v, w, at, w.v + n * w.ld);
}

// Frames that are padding get zeros.
void clear_padding(const FrameAttention& c, const View& x, const Worker& w, const Problem& at, int64_t head) {
    if (static_cast<int64_t>(w.table.frames.size()) == own_frames(c, at.b)) return;
    for (int64_t f = 0; f < own_frames(c, at.b); ++f)
        if (!c.is_valid(at.b, f)) zero_rows(c.size(), c.at(x, at.b, f, at.t, head), 0, 1, c.d);
}

// p [rows, W] = exp(score − high) of queries l … in lanes, and their high and sum.
template <int W>
FC_INLINE void softmax(const FrameAttention& c, const Worker& w, int64_t l, int64_t rows) {
    score<W>(w.k, w.ld, rows, w.lanes, c.d, w.p);
    if (!w.table.plain) {
        const float* bias = w.table.bias.data() + l * rows;
        float* p = w.p;
#pragma omp simd
        for (int64_t i = 0; i < rows * W; ++i) p[i] += bias[i];
    }
    std::fill(w.high, w.high + W, -INFINITY), std::fill(w.sum, w.sum + W, 0.0f);
    soften<W>(w.p, rows, w.high, w.sum, w.factor);
}

template <int W>
void forward(const FrameAttention& c, const View& out, float* lse, const Worker& w, const Problem& at, int64_t h) {
    const std::vector<int32_t>& frames = w.table.frames;
    const int64_t n = frames.size(), rows = n + extra_rows(c, n);
    for (int64_t l = 0; l < n; l += W) {
        const int64_t count = std::min<int64_t>(W, n - l);
        to_lanes<W>(w.q + l * w.ld, w.ld, count, c.d, c.scale, w.lanes);
        softmax<W>(c, w, l, rows);
        std::fill(w.sums, w.sums + count * w.ld, 0.0f);
        mix({w.p, 1, W}, w.v, w.ld, rows, nullptr, w.sums, w.ld, count, c.d);
        for (int64_t i = 0; i < count; ++i) {
            const float sum = w.sum[i];
            write_rows(c.kind, c.at(out, at.b, frames[l + i], at.t, h), 0, 1, c.d, w.sums + i * w.ld, 0,
                       sum == 0.0f ? 0.0f : 1.0f / sum);
            if (lse)
                lse[(c.row(at.b, frames[l + i]) * c.h + h) * c.t + at.t] =
                    sum == 0.0f ? -INFINITY : w.high[i] + std::log(sum);
        }
    }
}

// From p and ds [rows, W] as the products left them: p = P, ds = scale · P · (⟨dout, v⟩ − δ), δ = Σ P · ⟨dout, v⟩ −
// dlse.
template <int W>
FC_VECTOR_CLONES void gradients(const float* __restrict sum, const float* __restrict dlse, float scale, int64_t rows,
                                float* __restrict p, float* __restrict ds) {
    float inverse[W], delta[W];
#pragma omp simd
    for (int j = 0; j < W; ++j) inverse[j] = sum[j] == 0.0f ? 0.0f : 1.0f / sum[j], delta[j] = -dlse[j];
    for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
        for (int j = 0; j < W; ++j) {
            p[i * W + j] *= inverse[j];
            delta[j] += p[i * W + j] * ds[i * W + j];
        }
    for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
        for (int j = 0; j < W; ++j) ds[i * W + j] = scale * p[i * W + j] * (ds[i * W + j] - delta[j]);
}

// One head; to w.dk and w.dv its share of the group's gradients is added.
template <int W>
void backward(const FrameAttention& c, const View& dq, const float* dlse, const Worker& w, const Problem& at,
              int64_t h) {
    const std::vector<int32_t>& frames = w.table.frames;
    const int64_t n = frames.size(), rows = n + extra_rows(c, n), ld = w.ld;
    for (int64_t l = 0; l < n; l += W) {
        const int64_t count = std::min<int64_t>(W, n - l);
        to_lanes<W>(w.q + l * ld, ld, count, c.d, c.scale, w.lanes);
        to_lanes<W>(w.dout + l * ld, ld, count, c.d, 1.0f, w.dout_lanes);
        softmax<W>(c, w, l, rows);
        score<W>(w.v, ld, rows, w.dout_lanes, c.d, w.ds);
        std::fill(w.factor, w.factor + W, 0.0f);
        for (int64_t i = 0; dlse && i < count; ++i)
            w.factor[i] = dlse[(c.row(at.b, frames[l + i]) * c.h + h) * c.t + at.t];
        gradients<W>(w.sum, w.factor, c.scale, rows, w.p, w.ds);
        std::fill(w.sums, w.sums + count * ld, 0.0f);
        mix({w.ds, 1, W}, w.k, ld, rows, nullptr, w.sums, ld, count, c.d);
        mix({w.ds, W, 1}, w.q + l * ld, ld, count, nullptr, w.dk, ld, rows, c.d);
        mix({w.p, W, 1}, w.dout + l * ld, ld, count, nullptr, w.dv, ld, rows, c.d);
        for (int64_t i = 0; i < count; ++i)
            write_rows(c.kind, c.at(dq, at.b, frames[l + i], at.t, h), 0, 1, c.d, w.sums + i * ld, 0, 1.0f);
    }
}

// Gradients of the extra keys add up over positions: in each thread, and then over the threads.
void add_extra(const FrameAttention& c, Worker& w, const Problem& at) {
    const int64_t n = w.table.frames.size(), all = extra_rows(c, c.f), plane = c.b * all * c.groups * c.d;
    for (int64_t i = 0; i < extra_rows(c, n); ++i) {
        const int64_t row = c.shared ? i : w.table.frames[i / c.e] * c.e + i % c.e;
        float* to = w.extra.data() + ((at.b * all + row) * c.groups + at.g) * c.d;
        for (int64_t j = 0; j < c.d; ++j) to[j] += w.dk[(n + i) * w.ld + j], to[plane + j] += w.dv[(n + i) * w.ld + j];
    }
}

void write_extra(const FrameAttention& c, const FrameGradients& to, const std::vector<std::vector<float>>& parts) {
    const int64_t rows = extra_rows(c, c.f), plane = c.b * rows * c.groups * c.d;
    std::vector<float> total(2 * plane, 0.0f);
    for (const std::vector<float>& part : parts)
        for (size_t j = 0; j < part.size(); ++j) total[j] += part[j];
    for (int64_t b = 0; b < c.b; ++b)
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t f = c.shared ? 0 : row / c.e;
            if (!c.shared && f >= own_frames(c, b)) continue;
            for (int64_t g = 0; g < c.groups; ++g) {
                const float* grad = total.data() + ((b * rows + row) * c.groups + g) * c.d;
                write_rows(c.kind, c.extra_at(to.extra_k, b, f, row % c.e, g), 0, 1, c.d, grad, 0, 1.0f);
                write_rows(c.kind, c.extra_at(to.extra_v, b, f, row % c.e, g), 0, 1, c.d, grad + plane, 0, 1.0f);
            }
        }
}

// Problems in the order of memory: neighbouring heads of a position, or neighbouring positions of a head.
Problem problem(const FrameAttention& c, int64_t i) {
    if (c.k.head > c.k.token) return {i / c.t / c.groups, i % c.t, i / c.t % c.groups};
    return {i / c.groups / c.t, i / c.groups % c.t, i % c.groups};
}

// Calls fn(worker, problem) for all problems, in shares of as many threads as `count`.
template <typename Function>
void solve(const FrameAttention& c, int count, bool backward, Function fn,
           std::vector<std::vector<float>>* extra = nullptr) {
    in_shares(c.b * c.t * c.groups, count, [&](int64_t begin, int64_t end, int thread) {
        if (begin == end) return;
        Worker w(c, backward);
        for (int64_t i = begin; i < end; ++i) {
            const Problem at = problem(c, i);
            if (w.table.clip != at.b) tabulate(c, at.b, w.table);
            fn(w, at);
        }
        if (extra) (*extra)[thread] = std::move(w.extra);
    });
}

}  // namespace

void temporal_attention(const FrameAttention& c, const View& out, float* lse, int threads) {
    const int count = team(threads, c.b * c.t * c.h * c.f * c.d);
    solve(c, count, false, [&](Worker& w, const Problem& at) {
        bring_keys(c, w, at);
        for (int64_t h = at.g * c.heads(); h < (at.g + 1) * c.heads(); ++h) {
            bring(c, c.q, w, at, h, w.q);
            with_lanes(w.table.frames.size(),
                       [&](auto lanes) { forward<decltype(lanes)::value>(c, out, lse, w, at, h); });
            clear_padding(c, out, w, at, h);
            if (lse && !c.starts)
                for (int64_t f = 0; f < c.f; ++f)
                    if (!c.is_valid(at.b, f)) lse[(c.row(at.b, f) * c.h + h) * c.t + at.t] = -INFINITY;
        }
    });
}

void temporal_attention_backward(const FrameAttention& c, const View&, const View& dout, const FrameGradients& to,
                                 const float*, const float* dlse, int threads) {
    const int count = team(threads, c.b * c.t * c.h * c.f * c.d);
    std::vector<std::vector<float>> extra(count);
    solve(
        c, count, true,
        [&](Worker& w, const Problem& at) {
            const int64_t n = w.table.frames.size(), rows = n + extra_rows(c, n);
            bring_keys(c, w, at);
            std::fill(w.dk, w.dk + rows * w.ld, 0.0f), std::fill(w.dv, w.dv + rows * w.ld, 0.0f);
            for (int64_t h = at.g * c.heads(); h < (at.g + 1) * c.heads(); ++h) {
                bring(c, c.q, w, at, h, w.q), bring(c, dout, w, at, h, w.dout);
                with_lanes(n, [&](auto lanes) { backward<decltype(lanes)::value>(c, to.q, dlse, w, at, h); });
                clear_padding(c, to.q, w, at, h);
            }
            for (int64_t i = 0; i < n; ++i) {
                const int64_t f = w.table.frames[i];
                write_rows(c.kind, c.at(to.k, at.b, f, at.t, at.g), 0, 1, c.d, w.dk + i * w.ld, 0, 1.0f);
                write_rows(c.kind, c.at(to.v, at.b, f, at.t, at.g), 0, 1, c.d, w.dv + i * w.ld, 0, 1.0f);
            }
            clear_padding(c, to.k, w, at, at.g), clear_padding(c, to.v, w, at, at.g);
            if (c.e) add_extra(c, w, at);
        },
        &extra);
    if (c.e) write_extra(c, to, extra);
}

}  // namespace fastcontrast
