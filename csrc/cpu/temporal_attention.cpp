#include "cpu/temporal_attention.h"

#include <algorithm>
#include <memory>

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

// Where rows are written: in their tensor, or in a place of the worker's, from where `put` takes them there.
struct Place {
    float* data;
    int64_t ld;
    bool there;
};

// Frames l … l + count − 1 of the valid ones lie at equal distances.
bool is_regular(const Worker& w, int64_t l, int64_t count) {
    return count && w.table.frames[l + count - 1] - w.table.frames[l] == count - 1;
}

// The rows of one head in all valid frames, at one position. They stay where they are if they may, and lie at equal
// distances in float32; else they are copied to `own`.
Rows bring(const FrameAttention& c, const View& x, const Worker& w, const Problem& at, int64_t head, float* own,
           bool may_stay = true) {
    const std::vector<int32_t>& frames = w.table.frames;
    const int64_t n = frames.size();
    if (is_regular(w, 0, n)) {
        const char* rows = c.at(x, at.b, frames[0], at.t, head);
        if (may_stay && c.kind == Kind::f32) return {reinterpret_cast<const float*>(rows), x.frame};
        read_rows(c.kind, rows, x.frame, n, c.d, own, w.ld);
    } else {
        for (int64_t i = 0; i < n; ++i)
            read_rows(c.kind, c.at(x, at.b, frames[i], at.t, head), 0, 1, c.d, own + i * w.ld, w.ld);
    }
    return {own, w.ld};
}

Place place(const FrameAttention& c, const View& to, const Worker& w, const Problem& at, int64_t head, int64_t l,
            int64_t count, float* own, bool may_stay = true) {
    if (!may_stay || c.kind != Kind::f32 || !is_regular(w, l, count)) return {own, w.ld, false};
    return {reinterpret_cast<float*>(c.at(to, at.b, w.table.frames[l], at.t, head)), to.frame, true};
}

void put(const FrameAttention& c, const View& to, const Worker& w, const Problem& at, int64_t head, int64_t l,
         int64_t count, const Place& from) {
    if (from.there) return;
    const int32_t* frames = w.table.frames.data() + l;
    if (is_regular(w, l, count))
        return write_rows(c.kind, c.at(to, at.b, frames[0], at.t, head), to.frame, count, c.d, from.data, from.ld);
    for (int64_t i = 0; i < count; ++i)
        write_rows(c.kind, c.at(to, at.b, frames[i], at.t, head), 0, 1, c.d, from.data + i * from.ld, 0);
}

void bring_extra(const FrameAttention& c, const View& x, const Worker& w, const Problem& at, float* to) {
    const int64_t n = w.table.frames.size();
    for (int64_t i = 0; i < extra_rows(c, n); ++i)
        read_rows(c.kind, c.extra_at(x, at.b, c.shared ? 0 : w.table.frames[i / c.e], i % c.e, at.g), 0, 1, c.d,
                  to + i * w.ld, w.ld);
}

struct Keys {
    Rows k, v;
};

// One block of lanes and one head read them, and no others stand behind them.
bool is_alone(const FrameAttention& c, const Worker& w) {
    return !c.e && c.heads() == 1 && static_cast<int64_t>(w.table.frames.size()) <= kMostLanes;
}

Keys bring_keys(const FrameAttention& c, const Tensors& x, const Worker& w, const Problem& at) {
    const int64_t n = w.table.frames.size();
    const bool alone = is_alone(c, w);
    const Keys keys{bring(c, x.k, w, at, at.g, w.k, alone), bring(c, x.v, w, at, at.g, w.v, alone)};
    if (c.e) bring_extra(c, c.extra_k, w, at, w.k + n * w.ld), bring_extra(c, c.extra_v, w, at, w.v + n * w.ld);
    return keys;
}

// Frames that are padding get zeros.
void clear_padding(const FrameAttention& c, const View& x, const Worker& w, const Problem& at, int64_t head) {
    if (static_cast<int64_t>(w.table.frames.size()) == own_frames(c, at.b)) return;
    for (int64_t f = 0; f < own_frames(c, at.b); ++f)
        if (!c.is_valid(at.b, f)) zero_rows(c.size(), c.at(x, at.b, f, at.t, head), 0, 1, c.d);
}

// p [rows, W] *= 1 / sum, or 0 where the sum is.
template <int W>
FC_VECTOR_CLONES void normalise(const float* __restrict sum, int64_t rows, float* __restrict p) {
    float inverse[W];
#pragma omp simd
    for (int j = 0; j < W; ++j) inverse[j] = sum[j] == 0.0f ? 0.0f : 1.0f / sum[j];
    for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
        for (int j = 0; j < W; ++j) p[i * W + j] *= inverse[j];
}

// w.p [rows, W] = weights of the keys for queries l … in lanes; w.high and w.sum are those of their scores.
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
    normalise<W>(w.sum, rows, w.p);
}

template <int W>
void forward(const FrameAttention& c, const Tensors& x, float* lse, const Worker& w, const Keys& keys,
             const Problem& at, int64_t h) {
    const Rows q = bring(c, x.q, w, at, h, w.q);
    const std::vector<int32_t>& frames = w.table.frames;
    const int64_t n = frames.size(), rows = n + extra_rows(c, n);
    for (int64_t l = 0; l < n; l += W) {
        const int64_t count = std::min<int64_t>(W, n - l);
        to_lanes<W>(q.data + l * q.ld, q.ld, count, c.d, c.scale, w.lanes);
        softmax<W>(c, w, keys.k, l, rows);
        for (int64_t i = 0; lse && i < count; ++i)
            lse[(c.row(at.b, frames[l + i]) * c.h + h) * c.t + at.t] =
                w.sum[i] == 0.0f ? -INFINITY : w.high[i] + std::log(w.sum[i]);
        const Place out = place(c, x.out, w, at, h, l, count, w.sums);
        mix<From::zero>({w.p, 1, W}, keys.v.data, keys.v.ld, rows, out.data, out.ld, count, c.d);
        put(c, x.out, w, at, h, l, count, out);
    }
}

// ds [rows, W] = scale · P · (⟨dout, v⟩ − δ) from ⟨dout, v⟩, where δ = Σ P · ⟨dout, v⟩ − dlse.
template <int W>
FC_VECTOR_CLONES void gradients(const float* __restrict p, const float* __restrict dlse, float scale, int64_t rows,
                                float* __restrict ds) {
    float delta[W];
#pragma omp simd
    for (int j = 0; j < W; ++j) delta[j] = -dlse[j];
    for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
        for (int j = 0; j < W; ++j) delta[j] += p[i * W + j] * ds[i * W + j];
    for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
        for (int j = 0; j < W; ++j) ds[i * W + j] = scale * p[i * W + j] * (ds[i * W + j] - delta[j]);
}

// One head; dk and dv are its share of the group's gradients.
template <From from, int W>
void backward(const FrameAttention& c, const Tensors& x, const float* dlse, const Worker& w, const Keys& keys,
              const Place& dk, const Place& dv, const Problem& at, int64_t h) {
    const Rows q = bring(c, x.q, w, at, h, w.q), dout = bring(c, x.dout, w, at, h, w.dout);
    const std::vector<int32_t>& frames = w.table.frames;
    const int64_t n = frames.size(), rows = n + extra_rows(c, n);
    for (int64_t l = 0; l < n; l += W) {
        const int64_t count = std::min<int64_t>(W, n - l);
        const float *q_rows = q.data + l * q.ld, *dout_rows = dout.data + l * dout.ld;
        to_lanes<W>(q_rows, q.ld, count, c.d, c.scale, w.lanes);
        to_lanes<W>(dout_rows, dout.ld, count, c.d, 1.0f, w.dout_lanes);
        softmax<W>(c, w, keys.k, l, rows);
        score<W>(keys.v.data, keys.v.ld, rows, w.dout_lanes, c.d, w.ds);
        std::fill(w.factor, w.factor + W, 0.0f);
        for (int64_t i = 0; dlse && i < count; ++i)
            w.factor[i] = dlse[(c.row(at.b, frames[l + i]) * c.h + h) * c.t + at.t];
        gradients<W>(w.p, w.factor, c.scale, rows, w.ds);
        const Place dq = place(c, x.dq, w, at, h, l, count, w.sums);
        mix<From::zero>({w.ds, 1, W}, keys.k.data, keys.k.ld, rows, dq.data, dq.ld, count, c.d);
        put(c, x.dq, w, at, h, l, count, dq);
        mix<from>({w.ds, W, 1}, q_rows, q.ld, count, dk.data, dk.ld, rows, c.d);
        mix<from>({w.p, W, 1}, dout_rows, dout.ld, count, dv.data, dv.ld, rows, c.d);
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

// Each row of a problem lies in a place of its own, far from the others. Where these are more than kPlaces, a touch of
// one costs more than what is done with it, unless rows are longer than kLong bytes. Then a block of positions, all
// heads, is copied to a stage first, in long pieces and each piece once.
constexpr int64_t kStage = 384 << 10, kPlaces = 48, kLong = 384;

bool is_scattered(const View& x) { return x.head < x.token && x.token < x.frame; }

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
        const bool rows = from.head == c.d && to.head == c.d;
        const bool all = rows && from.token == to.token && from.token == heads * c.d;
        const int64_t tokens = all ? ts : 1, of_heads = rows ? heads : 1, bytes = tokens * of_heads * c.d * c.size();
        for (int64_t f = 0; f < own_frames(c, b); ++f)
            for (int64_t i = t; i < t + ts; i += tokens)
                for (int64_t h = 0; h < heads; h += of_heads) {
                    const int64_t after = std::min(f + 1, own_frames(c, b) - 1);
                    const char *next = c.at(from, b, after, i, h), *place = c.at(to, b, after, i, h);
                    for (int64_t j = 0; j < bytes; j += 64)
                        __builtin_prefetch(next + j, 0, 2), __builtin_prefetch(place + j, 1, 2);
                    std::memcpy(c.at(to, b, f, i, h), c.at(from, b, f, i, h), bytes);
                }
    }
};

// Calls fn(worker, tensors, problem) for all problems, in shares of `threads` threads that keep to the order of memory:
// neighbouring heads of a position, or neighbouring positions of a head.
template <typename Function>
void solve(const FrameAttention& c, const Tensors& x, bool backward, int threads, Function fn,
           std::vector<std::vector<float>>* extra = nullptr) {
    const int64_t tensors = backward ? 7 : 4, bytes = tensors * c.f * c.h * c.d * c.size();
    const bool far = c.b * c.t * bytes > kStage;  // more than stays near a core
    const bool crowded = tensors * c.f * kLong > kPlaces * std::max(kLong, c.d * c.size());
    const bool staged = far && crowded && is_scattered(x.q) && is_scattered(x.k) && is_scattered(x.v);
    const int64_t ts = staged ? std::clamp<int64_t>(kStage / std::max<int64_t>(bytes, 1), 1, c.t) : 1;
    const bool by_heads = !staged && x.k.head > x.k.token;
    const int64_t blocks = (c.t + ts - 1) / ts;
    const auto number = [&](int64_t i) {
        return by_heads ? Problem{i / c.t / c.groups, i % c.t, i / c.t % c.groups}
                        : Problem{i / c.groups / c.t, i / c.groups % c.t, i % c.groups};
    };
    in_shares(staged ? c.b * blocks : c.b * c.t * c.groups, threads, [&](int64_t begin, int64_t end, int thread) {
        if (begin == end) return;
        Worker w(c, backward);
        const std::unique_ptr<char[]> memory(
            new char[staged ? tensors * c.f * (ts * c.h * c.d * c.size() + 256) + 64 : 0]);
        for (int64_t i = begin; i < end; ++i) {
            if (!staged) {
                const Problem at = number(i);
                if (w.table.clip != at.b) tabulate(c, at.b, w.table);
                fn(w, x, at);
                continue;
            }
            const int64_t b = i / blocks, t = i % blocks * ts;
            if (w.table.clip != b) tabulate(c, b, w.table);
            char* aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
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
              const Keys keys = bring_keys(c, x, w, at);
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
            const Keys keys = bring_keys(c, x, w, at);
            // Sums of several heads or blocks of lanes, and rows of extra keys, come together in the worker's memory.
            const bool alone = is_alone(c, w);
            const Place dk = place(c, x.dk, w, at, at.g, 0, n, w.dk, alone);
            const Place dv = place(c, x.dv, w, at, at.g, 0, n, w.dv, alone);
            if (!alone) std::fill(w.dk, w.dk + rows * w.ld, 0.0f), std::fill(w.dv, w.dv + rows * w.ld, 0.0f);
            for (int64_t h = at.g * c.heads(); h < (at.g + 1) * c.heads(); ++h) {
                with_lanes(n, [&](auto lanes) {
                    constexpr int W = decltype(lanes)::value;
                    alone ? backward<From::zero, W>(c, x, dlse, w, keys, dk, dv, at, h)
                          : backward<From::out, W>(c, x, dlse, w, keys, dk, dv, at, h);
                });
                clear_padding(c, x.dq, w, at, h);
            }
            put(c, x.dk, w, at, at.g, 0, n, dk), put(c, x.dv, w, at, at.g, 0, n, dv);
            clear_padding(c, x.dk, w, at, at.g), clear_padding(c, x.dv, w, at, at.g);
            if (c.e) add_extra(c, w, at);
        },
        &extra);
    if (c.e) write_extra(c, to, extra);
}

}  // namespace fastcontrast
