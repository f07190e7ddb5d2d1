#include "cpu/temporal_attention.h"

#include <algorithm>

#include "common/threads.h"
#include "cpu/panels.h"

namespace fastcontrast {
namespace {

// A problem is one position of one group of heads: some dozens of rows that lie far apart. Rows that are read more than
// once are brought to a place of their own first.
struct Problem {
    int64_t b, t, g;
};

// What is read, and what is written: `out` by the forward, the gradients by the backward.
struct Tensors {
    View q, k, v, dout, out, dq, dk, dv;
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

struct Rows {
    const float* data;
    int64_t ld;
};

// The rows of one head in all valid frames, at one position: copied to `to`, unless they are wanted `once` and lie at
// equal distances.
Rows bring(const FrameAttention& c, const View& x, const Worker& w, const Problem& at, int64_t head, float* to,
           bool once = false) {
    const std::vector<int32_t>& frames = w.table.frames;
    const int64_t n = frames.size();
    if (n && frames[n - 1] - frames[0] == n - 1) {  // without a hole
        const char* rows = c.at(x, at.b, frames[0], at.t, head);
        if (once && c.kind == Kind::f32) return {reinterpret_cast<const float*>(rows), x.frame};
        read_rows(c.kind, rows, x.frame, n, c.d, to, w.ld);
    } else {
        for (int64_t i = 0; i < n; ++i)
            read_rows(c.kind, c.at(x, at.b, frames[i], at.t, head), 0, 1, c.d, to + i * w.ld, w.ld);
    }
    return {to, w.ld};
}

// Frames l … l + count − 1 of the valid ones = rows of x, each times its factor if there are any.
void put(const FrameAttention& c, const View& to, const Worker& w, const Problem& at, int64_t head, int64_t l,
         int64_t count, const float* x, const float* factors = nullptr) {
    const int32_t* frames = w.table.frames.data() + l;
    if (frames[count - 1] - frames[0] == count - 1)
        return write_rows(c.kind, c.at(to, at.b, frames[0], at.t, head), to.frame, count, c.d, x, w.ld, factors);
    for (int64_t i = 0; i < count; ++i)
        write_rows(c.kind, c.at(to, at.b, frames[i], at.t, head), 0, 1, c.d, x + i * w.ld, 0,
                   factors ? factors + i : nullptr);
}

void bring_extra(const FrameAttention& c, const View& x, const Worker& w, const Problem& at, float* to) {
    const int64_t n = w.table.frames.size();
    for (int64_t i = 0; i < extra_rows(c, n); ++i)
        read_rows(c.kind, c.extra_at(x, at.b, c.shared ? 0 : w.table.frames[i / c.e], i % c.e, at.g), 0, 1, c.d,
                  to + i * w.ld, w.ld);
}

// Values go to w.v, and keys to w.k where they are read more than once.
Rows bring_keys(const FrameAttention& c, const Tensors& x, const Worker& w, const Problem& at, bool once) {
    const int64_t n = w.table.frames.size();
    const Rows keys = bring(c, x.k, w, at, at.g, w.k, once && !c.e && c.heads() == 1 && n <= kMostLanes);
    bring(c, x.v, w, at, at.g, w.v);
    if (c.e) bring_extra(c, c.extra_k, w, at, w.k + n * w.ld), bring_extra(c, c.extra_v, w, at, w.v + n * w.ld);
    return keys;
}

// Frames that are padding get zeros.
void clear_padding(const FrameAttention& c, const View& x, const Worker& w, const Problem& at, int64_t head) {
    if (static_cast<int64_t>(w.table.frames.size()) == own_frames(c, at.b)) return;
    for (int64_t f = 0; f < own_frames(c, at.b); ++f)
        if (!c.is_valid(at.b, f)) zero_rows(c.size(), c.at(x, at.b, f, at.t, head), 0, 1, c.d);
}

// p [rows, W] = exp(score − high) of queries l … in lanes, and their high and sum.
template <int W>
FC_INLINE void softmax(const FrameAttention& c, const Worker& w, Rows keys, int64_t l, int64_t rows) {
    score<W>(keys.data, keys.ld, rows, w.lanes, c.d, w.p);
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
void forward(const FrameAttention& c, const Tensors& x, float* lse, const Worker& w, Rows keys, const Problem& at,
             int64_t h) {
    const Rows q = bring(c, x.q, w, at, h, w.q, true);
    const std::vector<int32_t>& frames = w.table.frames;
    const int64_t n = frames.size(), rows = n + extra_rows(c, n);
    for (int64_t l = 0; l < n; l += W) {
        const int64_t count = std::min<int64_t>(W, n - l);
        to_lanes<W>(q.data + l * q.ld, q.ld, count, c.d, c.scale, w.lanes);
        softmax<W>(c, w, keys, l, rows);
        std::fill(w.sums, w.sums + count * w.ld, 0.0f);
        mix({w.p, 1, W}, w.v, w.ld, rows, nullptr, w.sums, w.ld, count, c.d);
        for (int64_t i = 0; i < count; ++i) {
            const float sum = w.sum[i];
            if (lse)
                lse[(c.row(at.b, frames[l + i]) * c.h + h) * c.t + at.t] =
                    sum == 0.0f ? -INFINITY : w.high[i] + std::log(sum);
            w.factor[i] = sum == 0.0f ? 0.0f : 1.0f / sum;
        }
        put(c, x.out, w, at, h, l, count, w.sums, w.factor);
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
void backward(const FrameAttention& c, const Tensors& x, const float* dlse, const Worker& w, const Problem& at,
              int64_t h) {
    const std::vector<int32_t>& frames = w.table.frames;
    const int64_t n = frames.size(), rows = n + extra_rows(c, n), ld = w.ld;
    for (int64_t l = 0; l < n; l += W) {
        const int64_t count = std::min<int64_t>(W, n - l);
        to_lanes<W>(w.q + l * ld, ld, count, c.d, c.scale, w.lanes);
        to_lanes<W>(w.dout + l * ld, ld, count, c.d, 1.0f, w.dout_lanes);
        softmax<W>(c, w, {w.k, ld}, l, rows);
        score<W>(w.v, ld, rows, w.dout_lanes, c.d, w.ds);
        std::fill(w.factor, w.factor + W, 0.0f);
        for (int64_t i = 0; dlse && i < count; ++i)
            w.factor[i] = dlse[(c.row(at.b, frames[l + i]) * c.h + h) * c.t + at.t];
        gradients<W>(w.sum, w.factor, c.scale, rows, w.p, w.ds);
        std::fill(w.sums, w.sums + count * ld, 0.0f);
        mix({w.ds, 1, W}, w.k, ld, rows, nullptr, w.sums, ld, count, c.d);
        mix({w.ds, W, 1}, w.q + l * ld, ld, count, nullptr, w.dk, ld, rows, c.d);
        mix({w.p, W, 1}, w.dout + l * ld, ld, count, nullptr, w.dv, ld, rows, c.d);
        put(c, x.dq, w, at, h, l, count, w.sums);
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
                write_rows(c.kind, c.extra_at(to.extra_k, b, f, row % c.e, g), 0, 1, c.d, grad, 0);
                write_rows(c.kind, c.extra_at(to.extra_v, b, f, row % c.e, g), 0, 1, c.d, grad + plane, 0);
            }
        }
}

// ------------------------------------------------------------------------------------------------------------ schedule

// Frames at a multiple of this many bytes share the few places that caches and page tables have for them: each row then
// costs a walk through the page tables. There a block of positions, all heads, is copied to a stage as it lies.
constexpr int64_t kPeriod = 128 << 10, kStage = 384 << 10, kFewFrames = 4;

bool is_periodic(const FrameAttention& c, const View& x) {
    return c.f > kFewFrames && x.head < x.token && x.frame && x.frame * c.size() % kPeriod == 0;
}

// Fetches the rows of a problem, of `heads` heads in each group, while another is computed.
void fetch(const FrameAttention& c, const View& x, const Worker& w, const Problem& at, int64_t heads) {
    for (const int32_t f : w.table.frames)
        for (int64_t h = at.g * heads; h < (at.g + 1) * heads; ++h) {
            const char* row = c.at(x, at.b, f, at.t, h);
            for (int64_t j = 0; j < c.d * c.size(); j += 64) __builtin_prefetch(row + j, 0, 2);
        }
}

// A view of a copy of positions [t, t + ts) of clip b, with the indices of the whole.
struct Stage {
    int64_t b, t, ts;
    char* memory;

    View place(const FrameAttention& c, int64_t heads) {
        const int64_t lines = (ts * heads * c.d * c.size() + 63) / 64 | 1;  // odd: frames do not share their places
        View x{memory, 0, lines * 64 / c.size(), heads * c.d, c.d};
        memory += own_frames(c, b) * x.frame * c.size();
        x.data -= ((c.starts ? c.starts[b] * x.frame : 0) + t * x.token) * c.size();
        return x;
    }

    // Copies as long pieces as the layout has.
    void copy(const FrameAttention& c, const View& from, const View& to, int64_t heads) const {
        const int64_t line = heads * c.d * c.size();
        for (int64_t f = 0; f < own_frames(c, b); ++f) {
            if (from.head == c.d && to.head == c.d && from.token == to.token && from.token == heads * c.d) {
                std::memcpy(c.at(to, b, f, t, 0), c.at(from, b, f, t, 0), ts * line);
                continue;
            }
            for (int64_t i = t; i < t + ts; ++i) {
                if (from.head == c.d && to.head == c.d) {
                    std::memcpy(c.at(to, b, f, i, 0), c.at(from, b, f, i, 0), line);
                    continue;
                }
                for (int64_t h = 0; h < heads; ++h)
                    std::memcpy(c.at(to, b, f, i, h), c.at(from, b, f, i, h), c.d * c.size());
            }
        }
    }
};

// Calls fn(worker, tensors, problem) for all problems, in shares of `threads` threads that keep to the order of memory:
// neighbouring heads of a position, or neighbouring positions of a head.
template <typename Function>
void solve(const FrameAttention& c, const Tensors& x, bool backward, int threads, Function fn,
           std::vector<std::vector<float>>* extra = nullptr) {
    const int64_t tensors = backward ? 7 : 4, bytes = tensors * c.f * c.h * c.d * c.size();
    const bool staged = is_periodic(c, x.q) || is_periodic(c, x.k) || is_periodic(c, x.v);
    const int64_t ts = staged ? std::clamp<int64_t>(kStage / std::max<int64_t>(bytes, 1), 1, c.t) : 1;
    const bool far = c.b * c.t * bytes > kStage;  // more than stays near a core
    const bool by_heads = !staged && x.k.head > x.k.token;
    const int64_t blocks = (c.t + ts - 1) / ts;
    const auto number = [&](int64_t i) {
        return by_heads ? Problem{i / c.t / c.groups, i % c.t, i / c.t % c.groups}
                        : Problem{i / c.groups / c.t, i / c.groups % c.t, i % c.groups};
    };
    in_shares(staged ? c.b * blocks : c.b * c.t * c.groups, threads, [&](int64_t begin, int64_t end, int thread) {
        if (begin == end) return;
        Worker w(c, backward);
        std::vector<char> memory(staged ? tensors * c.f * (ts * c.h * c.d * c.size() + 256) + 64 : 0);
        for (int64_t i = begin; i < end; ++i) {
            if (!staged) {
                const Problem at = number(i);
                if (w.table.clip != at.b) tabulate(c, at.b, w.table);
                if (const Problem next = number(i + 1); far && i + 1 < end && next.b == at.b) {
                    fetch(c, x.q, w, next, c.heads()), fetch(c, x.k, w, next, 1), fetch(c, x.v, w, next, 1);
                    if (backward) fetch(c, x.dout, w, next, c.heads());
                }
                fn(w, x, at);
                continue;
            }
            const int64_t b = i / blocks, t = i % blocks * ts;
            if (w.table.clip != b) tabulate(c, b, w.table);
            char* aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
            Stage stage{b, t, std::min(ts, c.t - t), aligned};
            Tensors on{stage.place(c, c.h), stage.place(c, c.groups), stage.place(c, c.groups), {}, {}, {}, {}, {}};
            stage.copy(c, x.q, on.q, c.h), stage.copy(c, x.k, on.k, c.groups), stage.copy(c, x.v, on.v, c.groups);
            if (backward) {
                on.dout = stage.place(c, c.h), on.dq = stage.place(c, c.h);
                on.dk = stage.place(c, c.groups), on.dv = stage.place(c, c.groups);
                stage.copy(c, x.dout, on.dout, c.h);
            } else {
                on.out = stage.place(c, c.h);
            }
            for (int64_t p = 0; p < stage.ts * c.groups; ++p) fn(w, on, Problem{b, t + p / c.groups, p % c.groups});
            if (backward)
                stage.copy(c, on.dq, x.dq, c.h), stage.copy(c, on.dk, x.dk, c.groups),
                    stage.copy(c, on.dv, x.dv, c.groups);
            else
                stage.copy(c, on.out, x.out, c.h);
        }
        if (extra) (*extra)[thread] = std::move(w.extra);
    });
}

}  // namespace

void temporal_attention(const FrameAttention& c, const View& out, float* lse, int threads) {
    const Tensors all{c.q, c.k, c.v, {}, out, {}, {}, {}};
    solve(c, all, false, team(threads, c.b * c.t * c.h * c.f * c.d),
          [&](Worker& w, const Tensors& x, const Problem& at) {
              const Rows keys = bring_keys(c, x, w, at, true);
              for (int64_t h = at.g * c.heads(); h < (at.g + 1) * c.heads(); ++h) {
                  with_lanes(w.table.frames.size(),
                             [&](auto lanes) { forward<decltype(lanes)::value>(c, x, lse, w, keys, at, h); });
                  clear_padding(c, x.out, w, at, h);
                  if (lse && !c.starts)
                      for (int64_t f = 0; f < c.f; ++f)
                          if (!c.is_valid(at.b, f)) lse[(c.row(at.b, f) * c.h + h) * c.t + at.t] = -INFINITY;
              }
          });
}

void temporal_attention_backward(const FrameAttention& c, const View&, const View& dout, const FrameGradients& to,
                                 const float*, const float* dlse, int threads) {
    const int count = team(threads, c.b * c.t * c.h * c.f * c.d);
    const Tensors all{c.q, c.k, c.v, dout, {}, to.q, to.k, to.v};
    std::vector<std::vector<float>> extra(count);
    solve(
        c, all, true, count,
        [&](Worker& w, const Tensors& x, const Problem& at) {
            const int64_t n = w.table.frames.size(), rows = n + extra_rows(c, n);
            bring_keys(c, x, w, at, false);
            std::fill(w.dk, w.dk + rows * w.ld, 0.0f), std::fill(w.dv, w.dv + rows * w.ld, 0.0f);
            for (int64_t h = at.g * c.heads(); h < (at.g + 1) * c.heads(); ++h) {
                bring(c, x.q, w, at, h, w.q), bring(c, x.dout, w, at, h, w.dout);
                with_lanes(n, [&](auto lanes) { backward<decltype(lanes)::value>(c, x, dlse, w, at, h); });
                clear_padding(c, x.dq, w, at, h);
            }
            if (n) put(c, x.dk, w, at, at.g, 0, n, w.dk), put(c, x.dv, w, at, at.g, 0, n, w.dv);
            clear_padding(c, x.dk, w, at, at.g), clear_padding(c, x.dv, w, at, at.g);
            if (c.e) add_extra(c, w, at);
        },
        &extra);
    if (c.e) write_extra(c, to, extra);
}

}  // namespace fastcontrast
