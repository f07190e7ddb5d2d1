#include "cpu/similarity_topk.h"

#include <algorithm>
#include <functional>

#include "common/simd.h"
#include "common/threads.h"

namespace fastcontrast {
namespace {

// A key orders as the pair (value, -column) does: the value's bits, made monotone, above the column's complement.
// -0 counts as +0, every NaN as the largest value, and 0 is less than any key.
FC_INLINE uint64_t pack(float value, int64_t column) {
    value += 0.0f;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = value != value ? UINT32_MAX : bits >> 31 ? ~bits : bits | 0x80000000u;
    return static_cast<uint64_t>(bits) << 32 | (UINT32_MAX - static_cast<uint32_t>(column));
}

FC_INLINE float value_of(uint64_t key) {
    uint32_t bits = static_cast<uint32_t>(key >> 32);
    bits = bits >> 31 ? bits & 0x7fffffffu : ~bits;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

FC_INLINE int64_t column_of(uint64_t key) { return UINT32_MAX - static_cast<uint32_t>(key); }

// Bit l is set where entry l of 64 may be better than `bar`. NaN may be, and beside a bar of NaN everything may.
FC_INLINE uint64_t better(const float* __restrict row, float sign, float bar) {
    unsigned char flags[kLanes];
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) flags[l] = !(sign * row[l] <= bar);
    uint64_t groups[kLanes / 8], any = 0, mask = 0;
    std::memcpy(groups, flags, sizeof groups);
    for (uint64_t group : groups) any |= group;
    if (any)  // the multiplication gathers the lowest bits of the eight bytes of a little-endian group in its highest
        for (int g = 0; g < kLanes / 8; ++g) mask |= (groups[g] * 0x0102040810204080u >> 56) << 8 * g;
    return mask;
}

// Calls offer(j) for the entries of a row that may be better than `bar`, which offer may raise. A loop over set bits,
// as a branch for each entry of a block with a hit would be mispredicted as often.
template <typename Offer>
FC_INLINE void scan(const float* row, int64_t n, float sign, const float& bar, Offer offer) {
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes)
        for (uint64_t mask = better(row + j, sign, bar); mask; mask &= mask - 1) offer(j + __builtin_ctzll(mask));
    for (; j < n; ++j)
        if (!(sign * row[j] <= bar)) offer(j);
}

// Moves the k best of more than k keys to the front and returns the least of them. Bisection, since counting the keys
// above a number takes a few vector instructions: a tenth of the time of std::nth_element on 180 keys.
FC_VECTOR_CLONES uint64_t keep_best(uint64_t* keys, int64_t count, int64_t k) {
    uint64_t low = UINT64_MAX, high = 0;
    for (int64_t i = 0; i < count; ++i) {
        low = std::min(low, keys[i]);
        high = std::max(high, keys[i]);
    }
    uint64_t bar = high;
    for (int64_t above = 1; above != k;) {
        bar = low + (high - low) / 2;
        above = 0;
#pragma omp simd reduction(+ : above)
        for (int64_t i = 0; i < count; ++i) above += keys[i] >= bar;
        (above > k ? low : high) = bar;
    }
    uint64_t least = UINT64_MAX;
    for (int64_t i = 0, kept = 0; i < count; ++i) {
        const uint64_t key = keys[i];
        keys[kept] = key;
        kept += key >= bar;
        least = key >= bar ? std::min(least, key) : least;
    }
    return least;
}

}  // namespace

Best::Best(int64_t rows, int64_t k, int64_t columns, bool largest)
    : k_(k),
      capacity_(std::min(columns, k + std::max<int64_t>(k, kLanes))),
      sign_(largest ? 1.0f : -1.0f),
      rows_(rows),
      keys_(rows * capacity_) {}

FC_VECTOR_CLONES void Best::fold_rows(const Tile& tile, const Candidates& candidates, int64_t begin, int64_t end) {
    const float sign = sign_;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t at = tile.i0 + i;
        const float* row = tile.data + i * tile.n;
        const int64_t* ids = candidates.key_ids ? candidates.key_ids + tile.j0 : nullptr;
        const int64_t id = ids ? candidates.query_ids[at] : 0;
        const float limit = candidates.limit ? sign * candidates.limit[at] : INFINITY;
        Row& state = rows_[i];
        uint64_t* keys = keys_.data() + i * capacity_;
        float bar = state.bar ? value_of(state.bar) : NAN;
        scan(row, tile.n, sign, bar, [&](int64_t j) {
            const float value = sign * row[j];
            if (value > limit || (ids && ids[j] == id)) return;
            const uint64_t key = pack(value, tile.j0 + j);
            if (key <= state.bar) return;
            keys[state.count++] = key;
            if (state.count < capacity_ || state.count == k_) return;
            state.bar = keep_best(keys, state.count, k_);
            state.count = k_;
            bar = value_of(state.bar);
        });
    }
}

void Best::finish_rows(float* values, int64_t* indices, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        uint64_t* keys = keys_.data() + i * capacity_;
        Row& state = rows_[i];
        if (state.count > k_) keep_best(keys, state.count, k_);
        const int64_t found = std::min(k_, state.count);
        std::sort(keys, keys + found, std::greater<uint64_t>());
        for (int64_t s = 0; s < k_; ++s) {
            values[i * k_ + s] = sign_ * (s < found ? value_of(keys[s]) : -INFINITY) + 0.0f;
            indices[i * k_ + s] = s < found ? column_of(keys[s]) : -1;
        }
        state = {};
    }
}

void Best::fold(const Tile& tile, const Candidates& candidates, int threads) {
    in_shares(tile.m, team(threads, tile.m * tile.n),
              [&](int64_t begin, int64_t end, int) { fold_rows(tile, candidates, begin, end); });
}

void Best::finish(float* values, int64_t* indices, int64_t rows, int threads) {
    in_shares(rows, team(threads, rows * capacity_),
              [&](int64_t begin, int64_t end, int) { finish_rows(values, indices, begin, end); });
}

}  // namespace fastcontrast
