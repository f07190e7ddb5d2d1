// The k best entries of each row of queries · keysᵀ, of which a tile at a time is there.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/tile.h"

namespace fastcontrast {

// What may be selected; arrays are indexed by the whole problem's i or j, and a null pointer switches a condition off.
struct Candidates {
    const int64_t* query_ids;  // [M]  equal ids are no candidates
    const int64_t* key_ids;    // [N]
    const float* limit;        // [M]  nor is what is better than it
};

// The candidates of a block of rows seen so far. Better is larger (or smaller); NaN is better than any number; of
// equals the lower column is better, whatever the order of the tiles.
class Best {
  public:
    Best(int64_t rows, int64_t k, int64_t columns, bool largest);
    void fold(const Tile&, const Candidates&, int threads);
    // Best first, [rows, k]. Where fewer are there: the worst infinity, and index -1. The next tile starts anew.
    void finish(float* values, int64_t* indices, int64_t rows, int threads);

  private:
    void fold_rows(const Tile&, const Candidates&, int64_t begin, int64_t end);
    void finish_rows(float* values, int64_t* indices, int64_t begin, int64_t end);

    // A row's candidates, unordered, as 64-bit keys: whenever `capacity_` of them are there, all but the k best go.
    // Appending costs less than keeping a heap of k in order.
    struct Row {
        int64_t count = 0;
        uint64_t bar = 0;  // the k-th best key when last there were k: no worse one is of interest
    };
    int64_t k_, capacity_;
    float sign_;
    std::vector<Row> rows_;
    std::vector<uint64_t> keys_;  // [rows, capacity]
};

}  // namespace fastcontrast
