// Late interaction on tiles of the scores of query tokens and document tokens.
#pragma once

#include <cstdint>

#include "cpu/vectors.h"

namespace fastcontrast {

// Columns are `tokens` tokens of each of `queries` queries, rows `length` tokens of each of `documents` documents: the
// best of a document's tokens is then sought in many lanes at once, and a masked token is a row left out.
struct Scores {
    const float* data;  // [documents · length, queries · tokens] contiguous
    int64_t queries, tokens, documents, length;
    const bool* query_mask;     // [queries, tokens], or null
    const bool* document_mask;  // [documents, length], or null
    bool zero;                  // a masked token of a document has score 0, and no gradient; else it never wins
};

// Of each document and query token the best token, -1 where none gets a gradient; int32 if `wide`, else int16.
struct Winners {
    void* data;  // [documents, query tokens], or null
    int64_t stride;
    bool wide;
};

// Adds to sums [queries, documents], of rows `stride` apart, the largest score of each query token and document. NaN
// counts as the largest, the first of equals wins.
void maxsim_fold(const Scores&, float* sums, int64_t stride, const Winners&, int threads);

// Tokens [count, length, D]; strides in elements, the last dimension has no gaps.
struct Tokens {
    const void* data;
    int64_t batch, row;
    Kind kind;
};

struct MaxSimGradient {
    Winners winners;        // [C, B · Tq] without gaps
    const float* gradient;  // [B, C]
    int64_t b, tq, c, td, d;
};

// Both write all of their result, in float32 and in an order that threads do not change.
void maxsim_queries(const MaxSimGradient&, const Tokens& documents, float* dqueries, int threads);    // [B, Tq, D]
void maxsim_documents(const MaxSimGradient&, const Tokens& queries, float* ddocuments, int threads);  // [C, Td, D]

}  // namespace fastcontrast
