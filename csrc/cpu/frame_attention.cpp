#include "cpu/frame_attention.h"

#include <algorithm>

#include "common/threads.h"
#include "cpu/panels.h"

namespace fastcontrast {
namespace {

// A task owns up to kOwned queries, in lanes, and streams keys and values past them: blocks of kBlockRows rows that are
// read once for all lanes.
constexpr int64_t kOwned = 8 * kMostLanes, kBlockRows = 64;

// Queries of a frame in parts of about equal length, whole groups of lanes but for the last.
int64_t part_of(int64_t queries) {
    const int64_t parts = (queries + kOwned - 1) / kOwned;
    return parts ? ((queries + parts - 1) / parts + kMostLanes - 1) / kMostLanes * kMostLanes : kOwned;
}

// Keys and values that lie in the tensors at equal distances, and the place of their gradients among those of a clip.
struct Segment {
    const char *k, *v;
    int64_t k_stride, v_stride, count;
    float bias;
    int64_t place;
};

// Where the stream is.
struct Cursor {
    size_t segment = 0;
    int64_t row = 0;
};

// What a thread works in.
struct Worker {
    int64_t ld;  // D rounded up to whole vectors
    std::vector<Segment> segments;
    std::vector<int64_t> places;              // [kBlockRows]
    float *k, *v, *bias;                      // the block: [kBlockRows, ld] twice, [kBlockRows]
    float *q, *lanes, *sums;                  // what is owned: [kOwned, ld], in lanes, and what becomes of it
    float *p, *high, *sum, *factor;           // [kBlockRows, kMostLanes], [kOwned] twice, [kMostLanes]
    float *dout, *dout_lanes, *ds, *dk, *dv;  // of the backward, as q, lanes, p, k and v
    Scratch memory;

    Worker(int64_t d, bool backward)
        : ld((d + kWide - 1) / kWide * kWide),
          places(kBlockRows),
          memory((backward ? 2 : 1) * (ld * (2 * kBlockRows + 3 * kOwned) + kBlockRows * kMostLanes) + kBlockRows +
                 2 * kOwned + kMostLanes) {
        float* next = memory.data();
        auto take = [&next](int64_t count) {
            float* begin = next;
            next += count;
            return begin;
        };
        k = take(kBlockRows * ld), v = take(kBlockRows * ld), p = take(kBlockRows * kMostLanes);
        q = take(kOwned * ld), lanes = take(kOwned * ld), sums = take(kOwned * ld);
        bias = take(kBlockRows), high = take(kOwned), sum = take(kOwned), factor = take(kMostLanes);
        dout = dout_lanes = ds = dk = dv = nullptr;
        if (!backward) return;
        dk = take(kBlockRows * ld), dv = take(kBlockRows * ld), ds = take(kBlockRows * kMostLanes);
        dout = take(kOwned * ld), dout_lanes = take(kOwned * ld);
    }
};

// Rows of a clip's gradients of k or v, those of extra keys behind.
int64_t gradient_rows(const FrameAttention& c) { return c.f * c.s + (c.shared ? 1 : c.f) * c.e; }

// The keys that frame f of clip b attends, of one group of heads.
void stream_keys(const FrameAttention& c, Worker& w, int64_t b, int64_t f, int64_t group) {
    w.segments.clear();
    for (int64_t g = 0; g < c.f; ++g)
        if (const int64_t n = c.count_of(b, f, g); n > 0 && c.s)
            w.segments.push_back({c.at(c.k, b, g, 0, group), c.at(c.v, b, g, 0, group), c.k.token, c.v.token, c.s,
                                  n > 1 ? std::log(static_cast<float>(n)) : 0.0f, g * c.s});
    if (c.e)
        w.segments.push_back({c.extra_at(c.extra_k, b, f, 0, group), c.extra_at(c.extra_v, b, f, 0, group),
                              c.extra_k.token, c.extra_v.token, c.e, 0.0f, c.f * c.s + (c.shared ? 0 : f * c.e)});
}

// The next rows of the stream, up to kBlockRows, across the ends of its segments. Returns their number.
int64_t next_block(const FrameAttention& c, Worker& w, Cursor& at) {
    int64_t filled = 0;
    while (filled < kBlockRows && at.segment < w.segments.size()) {
        const Segment& s = w.segments[at.segment];
        const int64_t n = std::min(kBlockRows - filled, s.count - at.row);
        read_rows(c.kind, s.k + at.row * s.k_stride * c.size(), s.k_stride, n, c.d, w.k + filled * w.ld, w.ld);
        read_rows(c.kind, s.v + at.row * s.v_stride * c.size(), s.v_stride, n, c.d, w.v + filled * w.ld, w.ld);
        for (int64_t i = 0; i < n; ++i) w.bias[filled + i] = s.bias, w.places[filled + i] = s.place + at.row + i;
        filled += n, at.row += n;
        if (at.row == s.count) ++at.segment, at.row = 0;
    }
    return filled;
}

// Calls fn(lanes, first, count) for the owned in groups of kMostLanes, `lanes` the constant that holds the group.
template <typename Function>
void in_groups(int64_t owned, Function fn) {
    for (int64_t l = 0; l < owned; l += kMostLanes) {
        const int64_t count = std::min<int64_t>(kMostLanes, owned - l);
        with_lanes(count, [&](auto lanes) { fn(lanes, l, count); });
    }
}

// Rows of one head from token `first` on, as they are and in lanes.
void own(const FrameAttention& c, const View& x, int64_t b, int64_t f, int64_t first, int64_t h, int64_t owned,
         float factor, int64_t ld, float* rows, float* lanes) {
    read_rows(c.kind, c.at(x, b, f, first, h), x.token, owned, c.d, rows, ld);
    in_groups(owned, [&](auto width, int64_t l, int64_t count) {
        to_lanes<decltype(width)::value>(rows + l * ld, ld, count, c.d, factor, lanes + l * ld);
    });
}

template <int W>
FC_VECTOR_CLONES void add_bias(float* scores, const float* bias, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        if (bias[i] != 0.0f)
#pragma omp simd
            for (int l = 0; l < W; ++l) scores[i * W + l] += bias[i];
}

// Sums of a group of owned, [D, W]: what they were is worth `factor` by now, 1 unless a maximum grew.
template <int W>
FC_VECTOR_CLONES void rescale(const float* __restrict factor, int64_t d, float* __restrict sums) {
    bool same = true;
    for (int l = 0; l < W; ++l) same &= factor[l] == 1.0f;
    if (same) return;
    for (int64_t j = 0; j < d; ++j)
#pragma omp simd
        for (int l = 0; l < W; ++l) sums[j * W + l] *= factor[l];
}

// Sums in lanes become rows [owned, ld], each times its factor.
void to_rows(const float* sums, int64_t ld, int64_t owned, int64_t d, const float* factors, float* rows) {
    in_groups(owned, [&](auto width, int64_t l, int64_t count) {
        constexpr int W = decltype(width)::value;
        for (int64_t i = 0; i < count; ++i)
            for (int64_t j = 0; j < d; ++j)
                rows[(l + i) * ld + j] = (factors ? factors[l + i] : 1.0f) * sums[l * ld + j * W + i];
    });
}

void forward(const FrameAttention& c, const View& out, float* lse, int64_t b, int64_t f, int64_t h, int64_t first,
             Worker& w) {
    const int64_t owned = std::min(part_of(c.t), c.t - first), ld = w.ld;
    float* lse_rows = lse ? lse + (c.row(b, f) * c.h + h) * c.t + first : nullptr;
    stream_keys(c, w, b, f, h / c.heads());
    if (!c.is_valid(b, f) || w.segments.empty()) {
        zero_rows(c.size(), c.at(out, b, f, first, h), out.token, owned, c.d);
        if (lse) std::fill(lse_rows, lse_rows + owned, -INFINITY);
        return;
    }
    own(c, c.q, b, f, first, h, owned, c.scale, ld, w.q, w.lanes);
    std::fill(w.high, w.high + kOwned, -INFINITY), std::fill(w.sum, w.sum + kOwned, 0.0f);
    std::fill(w.sums, w.sums + kOwned * ld, 0.0f);
    Cursor cursor;
    while (const int64_t n = next_block(c, w, cursor))
        in_groups(owned, [&](auto width, int64_t l, int64_t) {
            constexpr int W = decltype(width)::value;
            score<W>(w.k, ld, n, w.lanes + l * ld, c.d, w.p);
            add_bias<W>(w.p, w.bias, n);
            soften<W>(w.p, n, w.high + l, w.sum + l, w.factor);
            rescale<W>(w.factor, c.d, w.sums + l * ld);
            mix<From::out>({w.v, 1, ld}, w.p, W, n, w.sums + l * ld, W, c.d, W);
        });
    for (int64_t l = 0; l < owned; ++l) {
        const float sum = w.sum[l];
        if (lse) lse_rows[l] = sum == 0.0f ? -INFINITY : w.high[l] + std::log(sum);
        w.sum[l] = sum == 0.0f ? 0.0f : 1.0f / sum;
    }
    to_rows(w.sums, ld, owned, c.d, w.sum, w.q);
    write_rows(c.kind, c.at(out, b, f, first, h), out.token, owned, c.d, w.q, ld);
}

// From the products q · k and dout · v: p = exp(score + bias − lse) and ds = scale · p · (⟨dout, v⟩ − delta).
template <int W>
FC_VECTOR_CLONES void gradients(const float* __restrict bias, const float* __restrict lse,
                                const float* __restrict delta, float scale, int64_t count, float* __restrict p,
                                float* __restrict ds) {
    for (int64_t i = 0; i < count; ++i)
#pragma omp simd
        for (int l = 0; l < W; ++l) {
            const float e = exp_fast(p[i * W + l] + bias[i] - lse[l]);
            p[i * W + l] = e;
            ds[i * W + l] = scale * e * (ds[i * W + l] - delta[l]);
        }
}

// ⟨dout, out⟩ − dlse of the owned, from their rows.
FC_VECTOR_CLONES void deltas(const float* dout, const float* out, int64_t ld, int64_t owned, int64_t d,
                             const float* dlse, float* delta) {
    for (int64_t i = 0; i < owned; ++i) {
        const float *x = dout + i * ld, *y = out + i * ld;
        float lanes[kWide] = {};
        int64_t j = 0;
        for (; j + kWide <= d; j += kWide)
#pragma omp simd
            for (int l = 0; l < kWide; ++l) lanes[l] += x[j + l] * y[j + l];
        for (int l = 0; j < d; ++j, ++l) lanes[l] += x[j] * y[j];
        delta[i] = sum_lanes(lanes) - (dlse ? dlse[i] : 0.0f);
    }
}

FC_VECTOR_CLONES void add_places(const float* rows, int64_t ld, const std::vector<int64_t>& places, int64_t count,
                                 int64_t d, float* to) {
    for (int64_t i = 0; i < count; ++i)
#pragma omp simd
        for (int64_t j = 0; j < d; ++j) to[places[i] * ld + j] += rows[i * ld + j];
}

struct Saved {
    View out, dout;
    const float *lse, *dlse;  // [frames, H, T]
};

// Writes dq of the owned queries and adds what they give to dk and dv, [gradient_rows, ld].
void backward(const FrameAttention& c, const Saved& saved, const View& dq, int64_t b, int64_t f, int64_t h,
              int64_t first, Worker& w, float* dk, float* dv) {
    const int64_t owned = std::min(part_of(c.t), c.t - first), ld = w.ld, place = (c.row(b, f) * c.h + h) * c.t + first;
    stream_keys(c, w, b, f, h / c.heads());
    if (!c.is_valid(b, f) || w.segments.empty())
        return zero_rows(c.size(), c.at(dq, b, f, first, h), dq.token, owned, c.d);
    float *lse = w.high, *delta = w.sum;
    own(c, c.q, b, f, first, h, owned, c.scale, ld, w.q, w.lanes);
    own(c, saved.dout, b, f, first, h, owned, 1.0f, ld, w.dout, w.dout_lanes);
    std::fill(lse, lse + kOwned, 0.0f), std::fill(delta, delta + kOwned, 0.0f);
    read_rows(c.kind, c.at(saved.out, b, f, first, h), saved.out.token, owned, c.d, w.sums, ld);
    deltas(w.dout, w.sums, ld, owned, c.d, saved.dlse ? saved.dlse + place : nullptr, delta);
    // A query without a key has lse −inf, and weights of 0.
    for (int64_t l = 0; l < owned; ++l) lse[l] = saved.lse[place + l] == -INFINITY ? INFINITY : saved.lse[place + l];
    std::fill(w.sums, w.sums + kOwned * ld, 0.0f);
    Cursor cursor;
    while (const int64_t n = next_block(c, w, cursor)) {
        std::fill(w.dk, w.dk + n * ld, 0.0f), std::fill(w.dv, w.dv + n * ld, 0.0f);
        in_groups(owned, [&](auto width, int64_t l, int64_t count) {
            constexpr int W = decltype(width)::value;
            score<W>(w.k, ld, n, w.lanes + l * ld, c.d, w.p);
            score<W>(w.v, ld, n, w.dout_lanes + l * ld, c.d, w.ds);
            gradients<W>(w.bias, lse + l, delta + l, c.scale, n, w.p, w.ds);
            mix<From::out>({w.k, 1, ld}, w.ds, W, n, w.sums + l * ld, W, c.d, W);
            mix<From::out>({w.ds, W, 1}, w.q + l * ld, ld, count, w.dk, ld, n, c.d);
            mix<From::out>({w.p, W, 1}, w.dout + l * ld, ld, count, w.dv, ld, n, c.d);
        });
        add_places(w.dk, ld, w.places, n, c.d, dk), add_places(w.dv, ld, w.places, n, c.d, dv);
    }
    to_rows(w.sums, ld, owned, c.d, nullptr, w.q);
    write_rows(c.kind, c.at(dq, b, f, first, h), dq.token, owned, c.d, w.q, ld);
}

// Frames of a packed clip that end before the longest one's are another clip's.
bool is_absent(const FrameAttention& c, int64_t b, int64_t f) { return c.starts && c.starts[b] + f >= c.starts[b + 1]; }

// Gradients of one group of heads in one clip, [gradient_rows, ld].
void write_keys(const FrameAttention& c, const FrameGradients& to, int64_t b, int64_t group, const float* dk,
                const float* dv, int64_t ld) {
    for (int64_t g = 0; g < c.f; ++g) {
        if (is_absent(c, b, g)) continue;
        write_rows(c.kind, c.at(to.k, b, g, 0, group), to.k.token, c.s, c.d, dk + g * c.s * ld, ld);
        write_rows(c.kind, c.at(to.v, b, g, 0, group), to.v.token, c.s, c.d, dv + g * c.s * ld, ld);
    }
    for (int64_t x = 0; c.e && x < (c.shared ? 1 : c.f); ++x) {
        if (!c.shared && is_absent(c, b, x)) continue;
        const int64_t place = (c.f * c.s + x * c.e) * ld;
        write_rows(c.kind, c.extra_at(to.extra_k, b, x, 0, group), to.extra_k.token, c.e, c.d, dk + place, ld);
        write_rows(c.kind, c.extra_at(to.extra_v, b, x, 0, group), to.extra_v.token, c.e, c.d, dv + place, ld);
    }
}

}  // namespace

void frame_attention(const FrameAttention& c, const View& out, float* lse, int threads) {
    const int64_t part = part_of(c.t), parts = (c.t + part - 1) / part, tasks = c.b * c.f * c.h * parts;
    const int count = team(threads, tasks * part * (c.s + c.e) * c.d);
    const auto make = [&] { return Worker(c.d, false); };
    in_turns(tasks, count, make, [&](int64_t i, Worker& w) {
        // Neighbours in time read the same keys: first the parts of a frame, then the frames, then the heads.
        const int64_t f = i / parts % c.f, h = i / parts / c.f % c.h, b = i / parts / c.f / c.h;
        if (!is_absent(c, b, f)) forward(c, out, lse, b, f, h, i % parts * part, w);
    });
}

void frame_attention_backward(const FrameAttention& c, const View& out, const View& dout, const FrameGradients& to,
                              const float* lse, const float* dlse, int threads) {
    const Saved saved{out, dout, lse, dlse};
    // The keys' gradients of a group have one owner, which walks its queries. Where there are fewer groups than
    // threads, query frames are shared among several owners, whose sums are added in their order.
    const int count = team(threads, c.b * c.f * c.h * c.t * (c.s + c.e) * c.d);
    const int64_t groups = c.b * c.groups, ld = (c.d + kWide - 1) / kWide * kWide, size = 2 * gradient_rows(c) * ld;
    const int64_t splits = groups ? std::clamp<int64_t>(count / groups, 1, std::max<int64_t>(c.f, 1)) : 1;
    std::vector<float> parts(splits > 1 ? groups * splits * size : 0);
    struct Owner {
        Worker worker;
        std::vector<float> gradients;
    };
    const auto make = [&] { return Owner{Worker(c.d, true), std::vector<float>(splits > 1 ? 0 : size)}; };
    in_turns(groups * splits, count, make, [&](int64_t i, Owner& own) {
        const int64_t split = i % splits, group = i / splits % c.groups, b = i / splits / c.groups;
        float* dk = splits > 1 ? parts.data() + i * size : own.gradients.data();
        float* dv = dk + size / 2;
        std::fill(dk, dk + size, 0.0f);
        for (int64_t f = split; f < c.f; f += splits) {
            if (is_absent(c, b, f)) continue;
            for (int64_t h = group * c.heads(); h < (group + 1) * c.heads(); ++h)
                for (int64_t t = 0; t < c.t; t += part_of(c.t))
                    backward(c, saved, to.q, b, f, h, t, own.worker, dk, dv);
        }
        if (splits == 1) write_keys(c, to, b, group, dk, dv, ld);
    });
    if (splits == 1) return;
    in_shares(groups, count, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) {
            float* sum = parts.data() + i * splits * size;
            for (int64_t split = 1; split < splits; ++split)
#pragma omp simd
                for (int64_t j = 0; j < size; ++j) sum[j] += sum[split * size + j];
            write_keys(c, to, i / c.groups, i % c.groups, sum, sum + size / 2, ld);
        }
    });
}

}  // namespace fastcontrast
