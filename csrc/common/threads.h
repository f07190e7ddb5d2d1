// Work on rows, shared among threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastcontrast {

// Below this many entries a thread costs more than it brings.
inline constexpr int64_t kGrain = 1 << 13;

inline int team(int threads, int64_t entries) {
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, entries / kGrain)));
}

// Calls fn(begin, end, t) for contiguous shares of `rows`, one a thread. Shares depend on the thread count alone, so
// that what is merged in their order has the same bits on every run.
template <typename Function>
void in_shares(int64_t rows, int count, Function fn) {
    const int64_t share = (rows + count - 1) / count;
#pragma omp parallel for num_threads(count) schedule(static, 1)
    for (int t = 0; t < count; ++t) fn(std::min(t * share, rows), std::min((t + 1) * share, rows), t);
}

// Calls fn(i, state) for i in [0, tasks), each task taken by the next thread that is free, with the state that make()
// gave that thread. For tasks of unequal length that share nothing that they write.
template <typename Make, typename Function>
void in_turns(int64_t tasks, int count, Make make, Function fn) {
#pragma omp parallel num_threads(count)
    {
        auto state = make();
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < tasks; ++i) fn(i, state);
    }
}

}  // namespace fastcontrast
