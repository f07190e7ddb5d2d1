#include "cpu/temporal_attention.h"

#include <algorithm>

#include "common/threads.h"
#include "cpu/panels.h"

namespace fastcontrast {
namespace {

// A problem is one position of one head: at most some dozens of frames. Its rows lie far apart, often by a multiple of
// the cache's own period, so that they would push each other out: a block of neighbouring positions and heads is
// brought to a stage of this many bytes first, in the order of memory.
constexpr int64_t kStage = 384 << 10;

// What a block of a clip covers: positions [t, t + ts), groups of heads [g, g + gs).
struct Block {
    int64_t b, t, ts, g, gs;
};

struct Stage {
    int64_t frame = 0, token = 0;  // strides; heads are D apart
    float* data = nullptr;

    float* at(int64_t i, int64_t t, int64_t head, int64_t d) const { return data + i * frame + t * token + head * d; }
};

// Frames of a clip that are valid, and log counts between them, [block of lanes, key, lane].
struct Table {
    int64_t clip = -1, lanes = 8;
    std::vector<int32_t> frames;
    std::vector<float> bias;
    bool plain = true;  // every count is 1
};

struct Worker {
    Table table;
    std::vector<float> memory;
    std::vector<float> extra_grads;  // of k and v: [B, rows of extra keys, groups, D] twice
};

int64_t extra_rows(const FrameAttention& c, int64_t frames) { return c.shared ? c.e : c.e * frames; }

void tabulate(const FrameAttention& c, int64_t b, Table& table) {
    if (table.clip == b) return;
    table.clip = b;
    table.frames.clear();
    const int64_t own = c.starts ? c.starts[b + 1] - c.starts[b] : c.f;
    for (int64_t f = 0; f < own; ++f)
        if (c.is_valid(b, f)) table.frames.push_back(f);
    const int64_t n = table.frames.size(), rows = n + extra_rows(c, n);
    with_lanes(n, [&](auto lanes) { table.lanes = decltype(lanes)::value; });
    const int64_t width = table.lanes, parts = (n + width - 1) / width;
    table.bias.assign(parts * rows * width, 0.0f);
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

// One frame of a block: [ts, heads, D] at `stage`. Copied in as long pieces as the layout has.
template <typename Copy>
FC_INLINE void pieces(const FrameAttention& c, const View& x, int64_t ts, int64_t heads, Copy copy) {
    const int64_t d = c.d, line = heads * d;
    if (x.head != d && heads > 1) {
        for (int64_t t = 0; t < ts; ++t) copy(t * x.token, t * line, x.head, heads, d);
    } else if (x.token == line) {
        copy(0, 0, 0, 1, ts * line);
    } else {
        copy(0, 0, x.token, ts, line);
    }
}

FC_INLINE void bring(const FrameAttention& c, const View& x, const Table& table, const Block& at, int64_t head,
                     int64_t heads, const Stage& stage) {
    for (size_t i = 0; i < table.frames.size(); ++i) {
        const char* from = c.at(x, at.b, table.frames[i], at.t, head);
        pieces(c, x, at.ts, heads,
               [&](int64_t place, int64_t to, int64_t stride, int64_t count, int64_t width) FC_INLINE_LAMBDA {
                   read_rows(c.kind, from + place * c.size(), stride, count, width, stage.data + i * stage.frame + to,
                             width);
               });
    }
}

// Frames that are padding get zeros.
FC_INLINE void take(const FrameAttention& c, const View& x, const Table& table, const Block& at, int64_t head,
                    int64_t heads, const Stage& stage) {
    size_t i = 0;
    const int64_t own = c.starts ? c.starts[at.b + 1] - c.starts[at.b] : c.f;
    for (int64_t f = 0; f < own; ++f) {
        const bool valid = i < table.frames.size() && table.frames[i] == f;
        char* to = c.at(x, at.b, f, at.t, head);
        pieces(c, x, at.ts, heads,
               [&](int64_t place, int64_t from, int64_t stride, int64_t count, int64_t width) FC_INLINE_LAMBDA {
                   if (valid)
                       write_rows(c.kind, to + place * c.size(), stride, count, width,
                                  stage.data + i * stage.frame + from, width, 1.0f);
                   else
                       zero_rows(c.size(), to + place * c.size(), stride, count, width);
               });
        i += valid;
    }
}

// While a problem is computed, its rows of the next block of positions are fetched.
FC_INLINE void fetch(const FrameAttention& c, const View& x, const Table& table, const Block& at, int64_t t,
                     int64_t head) {
    if (at.t + at.ts + t >= c.t) return;
    for (const int32_t f : table.frames) {
        const char* row = c.at(x, at.b, f, at.t + at.ts + t, head);
        for (int64_t j = 0; j < c.d * c.size(); j += 64) __builtin_prefetch(row + j, 0, 2);
    }
}

// The softmax of a problem's queries in lanes: p [rows, W] = exp(score − high) of frames and extra keys, sum apart.
template <int W>
FC_INLINE void softmax(const FrameAttention& c, const Table& table, int64_t part, const float* keys, int64_t key_stride,
                       const float* extra, int64_t extra_stride, const float* lanes, float* p, float* high,
                       float* sum) {
    const int64_t n = table.frames.size(), x = extra_rows(c, n);
    dots<W>(keys, key_stride, n, lanes, c.d, p);
    if (x) dots<W>(extra, extra_stride, x, lanes, c.d, p + n * W);
    if (!table.plain) {
        const float* bias = table.bias.data() + part * (n + x) * W;
#pragma omp simd
        for (int64_t i = 0; i < (n + x) * W; ++i) p[i] += bias[i];
    }
    float factor[W];
    for (int l = 0; l < W; ++l) high[l] = -INFINITY, sum[l] = 0.0f;
    exponentials<W>(p, n + x, high, sum, factor);
}

struct Plan {
    int64_t ts, gs, t_blocks, g_blocks;

    // `tensors` of q's size, and as many of k's, are on the stage together.
    Plan(const FrameAttention& c, int64_t tensors, int threads) {
        const int64_t group = (c.heads() + 1) * tensors * std::max<int64_t>(c.f, 1) * c.d * sizeof(float);
        gs = std::clamp<int64_t>(2 * kStage / std::max<int64_t>(group, 1), 1, c.groups);
        ts = std::clamp<int64_t>(kStage / std::max<int64_t>(group * gs, 1), 1, std::max<int64_t>(c.t, 1));
        const int64_t fair = (c.b * c.t + 2 * threads - 1) / (2 * threads);  // positions, so that each thread has some
        ts = std::min(ts, std::max<int64_t>(fair, 1));
        t_blocks = (c.t + ts - 1) / ts, g_blocks = (c.groups + gs - 1) / gs;
    }
    int64_t tasks(const FrameAttention& c) const { return c.b * g_blocks * t_blocks; }
    Block block(const FrameAttention& c, int64_t i) const {
        const int64_t t = i % t_blocks * ts, g = i / t_blocks % g_blocks * gs;
        return {i / t_blocks / g_blocks, t, std::min(ts, c.t - t), g, std::min(gs, c.groups - g)};
    }
};

// Memory of a thread, grown when a block needs more.
struct Arena {
    std::vector<float>& memory;
    int64_t used = 0;

    static int64_t whole(int64_t count) { return (count + kWide - 1) / kWide * kWide; }
    float* take(int64_t count) {
        float* begin = memory.data() + used;
        used += whole(count);
        return begin;
    }
    Stage stage(const Block& at, int64_t n, int64_t heads, int64_t d) {
        Stage s{whole(at.ts * heads * d) + kWide, heads * d, nullptr};
        s.data = take(n * s.frame);
        return s;
    }
};

int64_t stage_size(const Block& at, int64_t n, int64_t heads, int64_t d) {
    return n * (Arena::whole(at.ts * heads * d) + kWide);
}

void bring_extra(const FrameAttention& c, const View& x, const Table& table, const Block& at, float* to) {
    const int64_t n = table.frames.size(), rows = extra_rows(c, n);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t g = 0; g < at.gs; ++g)
            read_rows(c.kind, c.extra_at(x, at.b, c.shared ? 0 : table.frames[i / c.e], i % c.e, at.g + g), 0, 1, c.d,
                      to + (i * at.gs + g) * c.d, 0);
}

FC_VECTOR_CLONES void forward(const FrameAttention& c, const View& out, float* lse, const Block& at, Worker& worker) {
    tabulate(c, at.b, worker.table);
    const Table& table = worker.table;
    const int64_t n = table.frames.size(), x = extra_rows(c, n), heads = c.heads(), d = c.d, head = at.g * heads;
    const int64_t size = stage_size(at, n, at.gs * heads, d) + 2 * stage_size(at, n, at.gs, d) +
                         2 * Arena::whole(x * at.gs * d) + (2 * d + n + x + 2) * kMostLanes;
    if (static_cast<int64_t>(worker.memory.size()) < size + kWide) worker.memory.resize(size + kWide);
    Arena arena{worker.memory};
    const Stage q = arena.stage(at, n, at.gs * heads, d), k = arena.stage(at, n, at.gs, d);
    const Stage v = arena.stage(at, n, at.gs, d);
    float *extra_k = arena.take(x * at.gs * d), *extra_v = arena.take(x * at.gs * d);
    float *lanes = arena.take(d * kMostLanes), *sums = arena.take(d * kMostLanes);
    float *p = arena.take((n + x) * kMostLanes), *high = arena.take(kMostLanes), *sum = arena.take(kMostLanes);
    bring(c, c.q, table, at, head, at.gs * heads, q);
    bring(c, c.k, table, at, at.g, at.gs, k);
    bring(c, c.v, table, at, at.g, at.gs, v);
    if (x) bring_extra(c, c.extra_k, table, at, extra_k), bring_extra(c, c.extra_v, table, at, extra_v);
    for (int64_t t = 0; t < at.ts; ++t)
        for (int64_t h = 0; h < at.gs * heads; ++h) {
            const int64_t g = h / heads;
            fetch(c, c.q, table, at, t, head + h);
            if (h % heads == 0) fetch(c, c.k, table, at, t, at.g + g), fetch(c, c.v, table, at, t, at.g + g);
            with_lanes(n, [&](auto width) FC_INLINE_LAMBDA {
                constexpr int W = decltype(width)::value;
                for (int64_t l = 0; l < n; l += W) {
                    const int64_t count = std::min<int64_t>(W, n - l);
                    float* rows = q.at(l, t, h, d);
                    to_lanes<W>(rows, q.frame, count, d, c.scale, lanes);
                    softmax<W>(c, table, l / W, k.at(0, t, g, d), k.frame, extra_k + g * d, at.gs * d, lanes, p, high,
                               sum);
                    std::fill(sums, sums + count * d, 0.0f);
                    add_rows({p, 1, W}, v.at(0, t, g, d), v.frame, n, nullptr, sums, d, count, d);
                    if (x) add_rows({p + n * W, 1, W}, extra_v + g * d, at.gs * d, x, nullptr, sums, d, count, d);
                    for (int64_t i = 0; i < count; ++i) {  // in the place of the queries, which are in lanes by now
                        const float factor = sum[i] == 0.0f ? 0.0f : 1.0f / sum[i];
#pragma omp simd
                        for (int64_t j = 0; j < d; ++j) rows[i * q.frame + j] = factor * sums[i * d + j];
                    }
                    if (lse)
                        for (int64_t i = 0; i < count; ++i)
                            lse[(c.row(at.b, table.frames[l + i]) * c.h + head + h) * c.t + at.t + t] =
                                sum[i] == 0.0f ? -INFINITY : high[i] + std::log(sum[i]);
                }
            });
        }
    take(c, out, table, at, head, at.gs * heads, q);
    if (lse && !c.starts && n < c.f)
        for (int64_t f = 0; f < c.f; ++f)
            if (!c.is_valid(at.b, f))
                for (int64_t h = head; h < head + at.gs * heads; ++h)
                    std::fill_n(lse + (c.row(at.b, f) * c.h + h) * c.t + at.t, at.ts, -INFINITY);
}

FC_VECTOR_CLONES void backward(const FrameAttention& c, const View& dout, const FrameGradients& to, const float* dlse,
                               const Block& at, Worker& worker) {
    tabulate(c, at.b, worker.table);
    const Table& table = worker.table;
    const int64_t n = table.frames.size(), x = extra_rows(c, n), heads = c.heads(), d = c.d, head = at.g * heads;
    const int64_t size = 2 * stage_size(at, n, at.gs * heads, d) + 4 * stage_size(at, n, at.gs, d) +
                         2 * Arena::whole(x * at.gs * d) + (3 * d + 2 * (n + x) + 2) * kMostLanes;
    if (static_cast<int64_t>(worker.memory.size()) < size + kWide) worker.memory.resize(size + kWide);
    Arena arena{worker.memory};
    const Stage q = arena.stage(at, n, at.gs * heads, d), o = arena.stage(at, n, at.gs * heads, d);
    const Stage k = arena.stage(at, n, at.gs, d), v = arena.stage(at, n, at.gs, d);
    const Stage dk = arena.stage(at, n, at.gs, d), dv = arena.stage(at, n, at.gs, d);
    float *extra_k = arena.take(x * at.gs * d), *extra_v = arena.take(x * at.gs * d);
    float *lanes = arena.take(d * kMostLanes), *o_lanes = arena.take(d * kMostLanes);
    float *sums = arena.take(d * kMostLanes), *high = arena.take(kMostLanes), *sum = arena.take(kMostLanes);
    float *p = arena.take((n + x) * kMostLanes), *ds = arena.take((n + x) * kMostLanes);
    bring(c, c.q, table, at, head, at.gs * heads, q);
    bring(c, dout, table, at, head, at.gs * heads, o);
    bring(c, c.k, table, at, at.g, at.gs, k);
    bring(c, c.v, table, at, at.g, at.gs, v);
    if (x) bring_extra(c, c.extra_k, table, at, extra_k), bring_extra(c, c.extra_v, table, at, extra_v);
    std::fill(dk.data, dk.data + n * dk.frame, 0.0f);
    std::fill(dv.data, dv.data + n * dv.frame, 0.0f);
    for (int64_t t = 0; t < at.ts; ++t)
        for (int64_t h = 0; h < at.gs * heads; ++h) {
            const int64_t g = h / heads;
            fetch(c, c.q, table, at, t, head + h), fetch(c, dout, table, at, t, head + h);
            if (h % heads == 0) fetch(c, c.k, table, at, t, at.g + g), fetch(c, c.v, table, at, t, at.g + g);
            with_lanes(n, [&](auto width) FC_INLINE_LAMBDA {
                constexpr int W = decltype(width)::value;
                for (int64_t l = 0; l < n; l += W) {
                    const int64_t count = std::min<int64_t>(W, n - l);
                    float *q_rows = q.at(l, t, h, d), *o_rows = o.at(l, t, h, d);
                    const float *keys = k.at(0, t, g, d), *values = v.at(0, t, g, d);
                    to_lanes<W>(q_rows, q.frame, count, d, c.scale, lanes);
                    to_lanes<W>(o_rows, o.frame, count, d, 1.0f, o_lanes);
                    softmax<W>(c, table, l / W, keys, k.frame, extra_k + g * d, at.gs * d, lanes, p, high, sum);
                    dots<W>(values, v.frame, n, o_lanes, d, ds);
                    if (x) dots<W>(extra_v + g * d, at.gs * d, x, o_lanes, d, ds + n * W);
                    float inverse[W], delta[W] = {};
                    for (int i = 0; i < W; ++i) inverse[i] = i >= count || sum[i] == 0.0f ? 0.0f : 1.0f / sum[i];
                    for (int64_t i = 0; i < n + x; ++i)
#pragma omp simd
                        for (int j = 0; j < W; ++j) {
                            p[i * W + j] *= inverse[j];
                            delta[j] += p[i * W + j] * ds[i * W + j];
                        }
                    if (dlse)
                        for (int64_t i = 0; i < count; ++i)
                            delta[i] -= dlse[(c.row(at.b, table.frames[l + i]) * c.h + head + h) * c.t + at.t + t];
                    for (int64_t i = 0; i < n + x; ++i)
#pragma omp simd
                        for (int j = 0; j < W; ++j) ds[i * W + j] = c.scale * p[i * W + j] * (ds[i * W + j] - delta[j]);
                    std::fill(sums, sums + count * d, 0.0f);
                    add_rows({ds, 1, W}, keys, k.frame, n, nullptr, sums, d, count, d);
                    add_rows({ds, W, 1}, q_rows, q.frame, count, nullptr, dk.at(0, t, g, d), dk.frame, n, d);
                    add_rows({p, W, 1}, o_rows, o.frame, count, nullptr, dv.at(0, t, g, d), dv.frame, n, d);
                    if (x) {
                        // Gradients of the clip's own keys add up over its positions: in each thread, and then all.
                        const int64_t rows = extra_rows(c, c.f), plane = c.b * rows * c.groups * d;
                        add_rows({ds + n * W, 1, W}, extra_k + g * d, at.gs * d, x, nullptr, sums, d, count, d);
                        for (int64_t i = 0; i < x; ++i) {
                            const int64_t row = c.shared ? i : table.frames[i / c.e] * c.e + i % c.e;
                            float* grad = worker.extra_grads.data() + ((at.b * rows + row) * c.groups + at.g + g) * d;
                            add_rows({ds + (n + i) * W, W, 1}, q_rows, q.frame, count, nullptr, grad, d, 1, d);
                            add_rows({p + (n + i) * W, W, 1}, o_rows, o.frame, count, nullptr, grad + plane, d, 1, d);
                        }
                    }
                    for (int64_t i = 0; i < count; ++i)
                        std::copy(sums + i * d, sums + (i + 1) * d, q_rows + i * q.frame);
                }
            });
        }
    take(c, to.q, table, at, head, at.gs * heads, q);
    take(c, to.k, table, at, at.g, at.gs, dk);
    take(c, to.v, table, at, at.g, at.gs, dv);
}

// The gradients of the extra keys: those of all threads, in their order.
void write_extra(const FrameAttention& c, const FrameGradients& to, std::vector<Worker>& workers) {
    const int64_t rows = extra_rows(c, c.f), plane = c.b * rows * c.groups * c.d;
    std::vector<float>& total = workers.front().extra_grads;
    for (size_t i = 1; i < workers.size(); ++i)
        for (int64_t j = 0; j < 2 * plane; ++j) total[j] += workers[i].extra_grads[j];
    for (int64_t b = 0; b < c.b; ++b)
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t f = c.shared ? 0 : row / c.e;
            if (!c.shared && c.starts && c.starts[b] + f >= c.starts[b + 1]) continue;
            for (int64_t g = 0; g < c.groups; ++g) {
                const float* grad = total.data() + ((b * rows + row) * c.groups + g) * c.d;
                write_rows(c.kind, c.extra_at(to.extra_k, b, f, row % c.e, g), 0, 1, c.d, grad, 0, 1.0f);
                write_rows(c.kind, c.extra_at(to.extra_v, b, f, row % c.e, g), 0, 1, c.d, grad + plane, 0, 1.0f);
            }
        }
}

}  // namespace

void temporal_attention(const FrameAttention& c, const View& out, float* lse, int threads) {
    const int count = team(threads, c.b * c.t * c.h * c.f * c.d);
    const Plan plan(c, 1, count);
    const int64_t tasks = c.d ? plan.tasks(c) : 0;
    in_shares(tasks, count, [&](int64_t begin, int64_t end, int) {
        Worker own;
        for (int64_t i = begin; i < end; ++i) forward(c, out, lse, plan.block(c, i), own);
    });
}

void temporal_attention_backward(const FrameAttention& c, const View&, const View& dout, const FrameGradients& to,
                                 const float*, const float* dlse, int threads) {
    const int count = team(threads, c.b * c.t * c.h * c.f * c.d);
    const Plan plan(c, 2, count);
    const int64_t tasks = c.d ? plan.tasks(c) : 0;
    std::vector<Worker> workers(count);
    for (Worker& own : workers) own.extra_grads.assign(2 * c.b * extra_rows(c, c.f) * c.groups * c.d, 0.0f);
    in_shares(tasks, count, [&](int64_t begin, int64_t end, int t) {
        for (int64_t i = begin; i < end; ++i) backward(c, dout, to, dlse, plan.block(c, i), workers[t]);
    });
    if (c.e) write_extra(c, to, workers);
}

}  // namespace fastcontrast
