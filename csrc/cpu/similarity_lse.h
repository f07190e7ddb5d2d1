// Tile epilogues of similarity_lse; every array below is indexed by the whole problem's i or j.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/tile.h"

namespace fastcontrast {

// Running maximum, Σ exp(L - maximum), and the first index of the maximum, of each row (or column).
struct Online {
    float* max = nullptr;  // null: this direction is not wanted
    float* sum = nullptr;
    int64_t* best = nullptr;  // or null
};

// Turns the tile into logits in place and folds it into the running state of its rows and columns.
// `rescale` [m]: when given, the tile becomes exp(L - maximum) instead, and rescale_i is what a sum kept under the
// old maximum must be multiplied by. `own` [M]: when given, receives the logit of each row's own column. `without_own`:
// what the tile holds of that column in the end is 0.
void lse(const Logits&, const Tile&, Online rows, Online columns, float* own, float* rescale, bool without_own,
         int threads);

// One direction's share of the weights: gradient_i · exp(L_ij - lse_i), lse = high + low.
struct Softmax {
    const float* gradient = nullptr;  // null: this direction has none
    const float* high = nullptr;
    const float* low = nullptr;
};

// target_ij = factor · (rows' + columns' share + own_gradient_i where j is row i's own column). `source` [m, n] holds
// logits kept from `lse`, and may be the target itself; if it is null, the target holds raw products. Each share may be
// absent.
void weights(const Logits&, const Tile& target, const float* source, Softmax rows, Softmax columns,
             const float* own_gradient, float factor, int threads);

// Σ_i a_i · b_i in double.
double dot(const float* a, const float* b, int64_t count);

// The running state of a whole direction. It lives here rather than in tensors: for a small batch the allocations of
// five tensors would take as long as the sweep.
class Running {
  public:
    Running(int64_t count, bool best);
    Online online() { return {max_.data(), sum_.data(), best_.empty() ? nullptr : best_.data()}; }
    // high + low = max + log(sum), computed in double and split in two floats. `sum` or null.
    void finish(float* high, float* low, int64_t* best, float* sum) const;

  private:
    std::vector<float> max_, sum_;
    std::vector<int64_t> best_;
};

}  // namespace fastcontrast
