#include "cpu/frame_attention.h"

#include <algorithm>

#include "common/threads.h"
#include "cpu/panels.h"

namespace fastcontrast {
namespace {

// A task owns up to kOwned queries (or keys, in the backward), in lanes, and streams what they meet past them: blocks
// of kBlockRows rows that are read once for all lanes.
constexpr int64_t kOwned = 4 * kMostLanes, kBlockRows = 64;

// Rows that lie in the tensors at equal distances, x and y of each: keys and values past queries, queries and their
// outputs' gradients past keys.
struct Segment {
    const char *x, *y;
    int64_t x_stride, y_stride, count;
    float bias;
    const float *lse, *delta;  // of queries, else null
};

struct Task {
    int64_t ld;                       // D rounded up to whole vectors
    std::vector<Segment> segments;    // what streams past
    float *x, *y, *offset, *delta;    // the block of it: [kBlockRows, ld] twice, [kBlockRows] twice
    float *a, *b;                     // what is owned, in lanes: kOwned / kMostLanes times [D, kMostLanes]
    float *lane_offset, *lane_delta;  // [kOwned]
    float *p, *g;                     // [kBlockRows, kMostLanes]
    float *high, *sum, *factor;       // [kOwned], the last [kMostLanes]
    float *to_a, *to_b, *row;         // sums [kOwned, ld] twice; [kMostLanes, ld]
    Scratch memory;

    static int64_t width(int64_t d) { return (d + kWide - 1) / kWide * kWide; }

    explicit Task(int64_t d)
        : ld(width(d)),
          memory(ld * (2 * kBlockRows + 4 * kOwned + kMostLanes) + 2 * kBlockRows + 2 * kBlockRows * kMostLanes +
                 4 * kOwned + kMostLanes) {
        float* next = memory.data();
        auto take = [&next](int64_t count) {
            float* begin = next;
            next += count;
            return begin;
        };
        x = take(kBlockRows * ld), y = take(kBlockRows * ld);
        a = take(kOwned * ld), b = take(kOwned * ld);
        to_a = take(kOwned * ld), to_b = take(kOwned * ld), row = take(kMostLanes * ld);
        p = take(kBlockRows * kMostLanes), g = take(kBlockRows * kMostLanes);
        offset = take(kBlockRows), delta = take(kBlockRows);
        lane_offset = take(kOwned), lane_delta = take(kOwned), high = take(kOwned), sum = take(kOwned);
        factor = take(kMostLanes);
    }
};

// The next rows of the stream, up to kBlockRows, across the ends of its segments.
struct Cursor {
    size_t segment = 0;
    int64_t row = 0;
};

int64_t next_block(const FrameAttention& c, const Task& task, Cursor& at) {
    int64_t filled = 0;
    while (filled < kBlockRows && at.segment < task.segments.size()) {
        const Segment& s = task.segments[at.segment];
        const int64_t n = std::min(kBlockRows - filled, s.count - at.row);
        read_rows(c.kind, s.x + at.row * s.x_stride * c.size(), s.x_stride, n, c.d, task.x + filled * task.ld, task.ld);
        read_rows(c.kind, s.y + at.row * s.y_stride * c.size(), s.y_stride, n, c.d, task.y + filled * task.ld, task.ld);
        for (int64_t i = 0; i < n; ++i) {
            // A query without a key has lse −inf, and weights of 0.
            task.offset[filled + i] =
                s.lse ? s.lse[at.row + i] == -INFINITY ? -INFINITY : s.bias - s.lse[at.row + i] : s.bias;
            task.delta[filled + i] = s.delta ? s.delta[at.row + i] : 0.0f;
        }
        filled += n, at.row += n;
        if (at.row == s.count) ++at.segment, at.row = 0;
    }
    return filled;
}

// The keys that frame f of clip b attends, of one group of heads.
void stream_keys(const FrameAttention& c, Task& task, int64_t b, int64_t f, int64_t group) {
    task.segments.clear();
    for (int64_t g = 0; g < c.f; ++g)
        if (const int64_t n = c.count_of(b, f, g); n > 0 && c.s)
            task.segments.push_back({c.at(c.k, b, g, 0, group), c.at(c.v, b, g, 0, group), c.k.token, c.v.token, c.s,
                                     n > 1 ? std::log(static_cast<float>(n)) : 0.0f, nullptr, nullptr});
    if (c.e)
        task.segments.push_back({c.extra_at(c.extra_k, b, f, 0, group), c.extra_at(c.extra_v, b, f, 0, group),
                                 c.extra_k.token, c.extra_v.token, c.e, 0.0f, nullptr, nullptr});
}

struct Saved {
    View dout;
    const float *lse, *delta;  // [frames, H, T]
};

// The queries of frame f, of the heads that share a group.
void stream_queries(const FrameAttention& c, const Saved& saved, Task& task, int64_t b, int64_t f, int64_t group,
                    float bias) {
    for (int64_t h = group * c.heads(); h < (group + 1) * c.heads(); ++h) {
        const int64_t place = (c.row(b, f) * c.h + h) * c.t;
        if (c.t)
            task.segments.push_back({c.at(c.q, b, f, 0, h), c.at(saved.dout, b, f, 0, h), c.q.token, saved.dout.token,
                                     c.t, bias, saved.lse + place, saved.delta + place});
    }
}

// Calls fn(lanes, first, count) for the owned in groups of kMostLanes, `lanes` the constant that holds the group.
template <typename Function>
FC_INLINE void in_groups(int64_t owned, Function fn) {
    for (int64_t l = 0; l < owned; l += kMostLanes) {
        const int64_t count = std::min<int64_t>(kMostLanes, owned - l);
        with_lanes(count, [&](auto lanes) FC_INLINE_LAMBDA { fn(lanes, l, count); });
    }
}

template <int W>
FC_INLINE void own(const FrameAttention& c, const Task& task, const char* rows, int64_t stride, int64_t count,
                   float factor, float* lanes) {
    read_rows(c.kind, rows, stride, count, c.d, task.row, task.ld);
    to_lanes<W>(task.row, task.ld, count, c.d, factor, lanes);
}

template <int W>
FC_INLINE void add_bias(float* scores, const float* bias, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        if (bias[i] != 0.0f)
#pragma omp simd
            for (int l = 0; l < W; ++l) scores[i * W + l] += bias[i];
}

FC_VECTOR_CLONES void forward(const FrameAttention& c, const View& out, float* lse, int64_t b, int64_t f, int64_t h,
                              int64_t first, Task& task) {
    const int64_t owned = std::min(kOwned, c.t - first), ld = task.ld;
    char* rows = c.at(out, b, f, first, h);
    float* lse_rows = lse ? lse + (c.row(b, f) * c.h + h) * c.t + first : nullptr;
    stream_keys(c, task, b, f, h / c.heads());
    if (!c.is_valid(b, f) || task.segments.empty()) {
        zero_rows(c.size(), rows, out.token, owned, c.d);
        if (lse) std::fill(lse_rows, lse_rows + owned, -INFINITY);
        return;
    }
    in_groups(owned, [&](auto lanes, int64_t l, int64_t count) FC_INLINE_LAMBDA {
        own<decltype(lanes)::value>(c, task, c.at(c.q, b, f, first + l, h), c.q.token, count, c.scale, task.a + l * ld);
    });
    std::fill(task.high, task.high + kOwned, -INFINITY);
    std::fill(task.sum, task.sum + kOwned, 0.0f);
    std::fill(task.to_a, task.to_a + owned * ld, 0.0f);
    Cursor cursor;
    while (const int64_t n = next_block(c, task, cursor))
        in_groups(owned, [&](auto lanes, int64_t l, int64_t count) FC_INLINE_LAMBDA {
            constexpr int W = decltype(lanes)::value;
            score<W>(task.x, ld, n, task.a + l * ld, c.d, task.p);
            add_bias<W>(task.p, task.offset, n);
            soften<W>(task.p, n, task.high + l, task.sum + l, task.factor);
            mix({task.p, 1, W}, task.y, ld, n, task.factor, task.to_a + l * ld, ld, count, c.d);
        });
    for (int64_t l = 0; l < owned; ++l) {
        const float sum = task.sum[l];
        write_rows(c.kind, rows + l * out.token * c.size(), 0, 1, c.d, task.to_a + l * ld, ld,
                   sum == 0.0f ? 0.0f : 1.0f / sum);
        if (lse) lse_rows[l] = sum == 0.0f ? -INFINITY : task.high[l] + std::log(sum);
    }
}

// Past the owned a and b, in lanes: with P = exp(a · x + offsets) and G = P · (b · y − deltas), to_a += G · x, and
// to_b += P · y if wanted.
template <bool both>
FC_INLINE void stream_gradients(const FrameAttention& c, Task& task, int64_t owned) {
    const int64_t ld = task.ld;
    std::fill(task.to_a, task.to_a + owned * ld, 0.0f);
    if (both) std::fill(task.to_b, task.to_b + owned * ld, 0.0f);
    Cursor cursor;
    while (const int64_t n = next_block(c, task, cursor))
        in_groups(owned, [&](auto lanes, int64_t l, int64_t count) FC_INLINE_LAMBDA {
            constexpr int W = decltype(lanes)::value;
            float* __restrict p = task.p, * __restrict g = task.g;
            const float *lane_offset = task.lane_offset + l, *lane_delta = task.lane_delta + l;
            score<W>(task.x, ld, n, task.a + l * ld, c.d, p);
            score<W>(task.y, ld, n, task.b + l * ld, c.d, g);
            for (int64_t i = 0; i < n; ++i) {
                const float offset = task.offset[i], delta = task.delta[i];
#pragma omp simd
                for (int j = 0; j < W; ++j) {
                    const float e = exp_fast(p[i * W + j] + offset - lane_offset[j]);
                    p[i * W + j] = e;
                    g[i * W + j] = e * (g[i * W + j] - delta - lane_delta[j]);
                }
            }
            mix({g, 1, W}, task.x, ld, n, nullptr, task.to_a + l * ld, ld, count, c.d);
            if (both) mix({p, 1, W}, task.y, ld, n, nullptr, task.to_b + l * ld, ld, count, c.d);
        });
}

FC_VECTOR_CLONES void backward_queries(const FrameAttention& c, const Saved& saved, const View& dq, int64_t b,
                                       int64_t f, int64_t h, int64_t first, Task& task) {
    const int64_t owned = std::min(kOwned, c.t - first), place = (c.row(b, f) * c.h + h) * c.t + first;
    char* rows = c.at(dq, b, f, first, h);
    stream_keys(c, task, b, f, h / c.heads());
    if (!c.is_valid(b, f) || task.segments.empty()) return zero_rows(c.size(), rows, dq.token, owned, c.d);
    in_groups(owned, [&](auto lanes, int64_t l, int64_t count) FC_INLINE_LAMBDA {
        constexpr int W = decltype(lanes)::value;
        own<W>(c, task, c.at(c.q, b, f, first + l, h), c.q.token, count, c.scale, task.a + l * task.ld);
        own<W>(c, task, c.at(saved.dout, b, f, first + l, h), saved.dout.token, count, 1.0f, task.b + l * task.ld);
    });
    std::fill(task.lane_offset, task.lane_offset + kOwned, 0.0f);
    std::fill(task.lane_delta, task.lane_delta + kOwned, 0.0f);
    for (int64_t l = 0; l < owned; ++l) {
        const float lse = saved.lse[place + l];
        task.lane_offset[l] = lse == -INFINITY ? INFINITY : lse, task.lane_delta[l] = saved.delta[place + l];
    }
    stream_gradients<false>(c, task, owned);
    write_rows(c.kind, rows, dq.token, owned, c.d, task.to_a, task.ld, c.scale);
}

// The owners of keys: `k` and `v` are theirs, `dk` and `dv` where their gradients go; task.segments are their queries.
FC_VECTOR_CLONES void backward_keys(const FrameAttention& c, const char* k, int64_t k_stride, const char* v,
                                    int64_t v_stride, char* dk, int64_t dk_stride, char* dv, int64_t dv_stride,
                                    int64_t owned, Task& task) {
    if (task.segments.empty()) {
        zero_rows(c.size(), dk, dk_stride, owned, c.d);
        return zero_rows(c.size(), dv, dv_stride, owned, c.d);
    }
    in_groups(owned, [&](auto lanes, int64_t l, int64_t count) FC_INLINE_LAMBDA {
        constexpr int W = decltype(lanes)::value;
        own<W>(c, task, k + l * k_stride * c.size(), k_stride, count, c.scale, task.a + l * task.ld);
        own<W>(c, task, v + l * v_stride * c.size(), v_stride, count, 1.0f, task.b + l * task.ld);
    });
    std::fill(task.lane_offset, task.lane_offset + kOwned, 0.0f);
    std::fill(task.lane_delta, task.lane_delta + kOwned, 0.0f);
    stream_gradients<true>(c, task, owned);
    write_rows(c.kind, dk, dk_stride, owned, c.d, task.to_a, task.ld, c.scale);
    write_rows(c.kind, dv, dv_stride, owned, c.d, task.to_b, task.ld, 1.0f);
}

// delta = ⟨dout, out⟩ − dlse of one frame.
FC_VECTOR_CLONES void deltas(const FrameAttention& c, const View& out, const View& dout, const float* dlse, int64_t b,
                             int64_t f, float* delta, float* x, float* y) {
    const int64_t place = c.row(b, f) * c.h * c.t;
    for (int64_t h = 0; h < c.h; ++h)
        for (int64_t t = 0; t < c.t; ++t) {
            read_rows(c.kind, c.at(out, b, f, t, h), 0, 1, c.d, x, 0);
            read_rows(c.kind, c.at(dout, b, f, t, h), 0, 1, c.d, y, 0);
            float lanes[kWide] = {};
            int64_t j = 0;
            for (; j + kWide <= c.d; j += kWide)
#pragma omp simd
                for (int l = 0; l < kWide; ++l) lanes[l] += x[j + l] * y[j + l];
            for (int l = 0; j < c.d; ++j, ++l) lanes[l] += x[j] * y[j];
            const int64_t i = place + h * c.t + t;
            delta[i] = sum_lanes(lanes) - (dlse ? dlse[i] : 0.0f);
        }
}

int64_t blocks(int64_t rows) { return (rows + kOwned - 1) / kOwned; }

// Frames of a packed clip that end before the longest one's are another clip's.
bool is_absent(const FrameAttention& c, int64_t b, int64_t f) { return c.starts && c.starts[b] + f >= c.starts[b + 1]; }

}  // namespace

void frame_attention(const FrameAttention& c, const View& out, float* lse, int threads) {
    const int64_t parts = blocks(c.t), tasks = c.b * c.f * c.h * parts;
    const int count = team(threads, tasks * std::min(c.t, kOwned) * (c.s + c.e) * c.d);
    in_turns(
        tasks, count, [&] { return Task(c.d); },
        [&](int64_t i, Task& task) {
            // Neighbours in time read the same keys: first the parts of a frame, then the frames, then the heads.
            const int64_t part = i % parts, f = i / parts % c.f, h = i / parts / c.f % c.h, b = i / parts / c.f / c.h;
            if (!is_absent(c, b, f)) forward(c, out, lse, b, f, h, part * kOwned, task);
        });
}

void frame_attention_backward(const FrameAttention& c, const View& out, const View& dout, const FrameGradients& to,
                              const float* lse, const float* dlse, int threads) {
    std::vector<float> delta(c.rows() * c.h * c.t);
    const Saved saved{dout, lse, delta.data()};
    const int64_t q_parts = blocks(c.t), k_parts = blocks(c.s), e_parts = blocks(c.e), extras = c.shared ? 1 : c.f;
    const int64_t q_tasks = c.b * c.f * c.h * q_parts, k_tasks = c.b * c.groups * c.f * k_parts;
    const int64_t e_tasks = c.b * c.groups * extras * e_parts;
    const int count = team(threads, q_tasks * std::min(c.t, kOwned) * (c.s + c.e) * c.d);
    const auto make = [&] { return Task(c.d); };
    in_turns(c.b * c.f, count, make, [&](int64_t i, Task& task) {
        const int64_t b = i / c.f, f = i % c.f;
        if (!is_absent(c, b, f) && c.is_valid(b, f)) deltas(c, out, dout, dlse, b, f, delta.data(), task.x, task.y);
    });
    // Owners of keys first: under some rules those of one frame have all the work.
    in_turns(k_tasks + e_tasks + q_tasks, count, make, [&](int64_t i, Task& task) {
        if (i < k_tasks) {
            const int64_t part = i % k_parts, g = i / k_parts % c.f, group = i / k_parts / c.f % c.groups;
            const int64_t b = i / k_parts / c.f / c.groups, first = part * kOwned;
            if (is_absent(c, b, g)) return;
            task.segments.clear();
            for (int64_t f = 0; f < c.f; ++f)
                if (const int64_t n = c.count_of(b, f, g); n > 0)
                    stream_queries(c, saved, task, b, f, group, n > 1 ? std::log(static_cast<float>(n)) : 0.0f);
            backward_keys(c, c.at(c.k, b, g, first, group), c.k.token, c.at(c.v, b, g, first, group), c.v.token,
                          c.at(to.k, b, g, first, group), to.k.token, c.at(to.v, b, g, first, group), to.v.token,
                          std::min(kOwned, c.s - first), task);
        } else if ((i -= k_tasks) < e_tasks) {
            const int64_t part = i % e_parts, x = i / e_parts % extras, group = i / e_parts / extras % c.groups;
            const int64_t b = i / e_parts / extras / c.groups, first = part * kOwned;
            if (!c.shared && is_absent(c, b, x)) return;
            task.segments.clear();
            for (int64_t f = c.shared ? 0 : x; f < (c.shared ? c.f : x + 1); ++f)
                if (!is_absent(c, b, f) && c.is_valid(b, f)) stream_queries(c, saved, task, b, f, group, 0.0f);
            backward_keys(c, c.extra_at(c.extra_k, b, x, first, group), c.extra_k.token,
                          c.extra_at(c.extra_v, b, x, first, group), c.extra_v.token,
                          c.extra_at(to.extra_k, b, x, first, group), to.extra_k.token,
                          c.extra_at(to.extra_v, b, x, first, group), to.extra_v.token, std::min(kOwned, c.e - first),
                          task);
        } else {
            i -= e_tasks;
            const int64_t part = i % q_parts, f = i / q_parts % c.f, h = i / q_parts / c.f % c.h;
            const int64_t b = i / q_parts / c.f / c.h;
            if (!is_absent(c, b, f)) backward_queries(c, saved, to.q, b, f, h, part * kOwned, task);
        }
    });
}

}  // namespace fastcontrast
