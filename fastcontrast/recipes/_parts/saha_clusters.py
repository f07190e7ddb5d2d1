"""SaHa's sampler: a model's own vectors say which queries are hard for each other; a cluster is a query and K of them.

A query q retrieves candidates; each stands for its owner, the query that it is the answer to; of the owners those stay
that are least like q. A candidate that q takes for its answer, and whose query is unlike q, is a hard negative; where
the queries are alike it may as well be right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from fastcontrast.ops import _check as check
from fastcontrast.ops import similarity_topk
from fastcontrast.ops._precision import float32

BLOCK = 1024  # queries that retrieve at once


def saha_clusters(
    queries: Tensor,  # [Q, D]
    candidates: Tensor,  # [C, D]
    query_of: Tensor,  # [R] integer
    candidate_of: Tensor,  # [R] integer
    hard: int = 15,
    multiplier: int = 3,
    *,
    classification: bool = False,
) -> tuple[list[list[int]], list[list[int]]]:
    """Clusters of rows, the first row of each its anchor: those of phase 1, which share no query, and those of phase 2,
    for queries that phase 1 left over.

    Row r says that candidate candidate_of[r] answers query query_of[r]. Phase 1, over rows in order whose query is in
    no cluster yet: of the 2 · hard · multiplier candidates with the largest ⟨q, c⟩, but the row's own, take owners that
    are in no cluster yet and not q, of several the one with the largest ⟨q, owner⟩, until hard · multiplier are found;
    keep the `hard` of smallest ⟨q, owner⟩. Phase 2: the same with twice as many owners, which may be in clusters of
    phase 1. A query that finds nobody stays without a cluster. An owner enters with the first row that led to it.

    Args:
        queries, candidates: distinct ones, as the model embeds them before training. Of equal products the lower index
            comes first.
        classification: keep the owners of the hardest candidates: where many queries share an answer, their likeness
            says nothing.

    Only queries that are in no cluster when their turn is near retrieve: some hard + 1 times fewer products than all
    queries would take. Raises ValueError or TypeError naming what does not fit.
    """
    op = "saha_clusters"
    check.matrix(op, "queries", queries)
    check.matrix(op, "candidates", candidates, queries.shape[1])
    for name, value in (("hard", hard), ("multiplier", multiplier)):
        if value < 1:
            raise ValueError(f"{op}: {name} must be at least 1, got {value}")
    for name, index, count in (("query_of", query_of, len(queries)), ("candidate_of", candidate_of, len(candidates))):
        check.vector(op, name, index, len(query_of), queries, floating=False)
        check.within(op, name, index, 0, count)
    rows = query_of.tolist(), candidate_of.tolist()
    vectors = (float32(x.detach()) for x in (queries, candidates))
    return Sampler(*vectors, *rows, hard, multiplier, classification).clusters()


class Sampler:
    """`saha_clusters`, once its arguments are checked."""

    def __init__(
        self, queries: Tensor, candidates: Tensor, query_of: list[int], candidate_of: list[int],
        hard: int, multiplier: int, classification: bool = False,
    ):  # fmt: skip
        self.queries, self.candidates = queries, candidates
        self.query_of, self.candidate_of = query_of, candidate_of
        self.hard, self.first, self.classification = hard, hard * multiplier, classification
        self.pool = min(2 * self.first, len(candidates))
        self.owners: list[dict[int, int]] = [{} for _ in range(len(candidates))]  # {query: its first row}
        for row, (q, c) in enumerate(zip(query_of, candidate_of, strict=True)):
            self.owners[c].setdefault(q, row)

    def clusters(self) -> tuple[list[list[int]], list[list[int]]]:
        rows, used = range(len(self.query_of)), set()
        first = self._phase(rows, self.first, used, used)
        leftovers = [row for row in rows if self.query_of[row] not in used]
        return first, self._phase(leftovers, 2 * self.first, set(), set())

    def retrieve(self, rows: Iterable[int], done: set[int]) -> Iterator[tuple[int, list[int]]]:
        """Rows in order whose query is not done when it is their turn, and the candidates of each, best first."""
        waiting = iter(rows)
        while block := [*islice((row for row in waiting if self.query_of[row] not in done), BLOCK)]:
            asking = torch.tensor([self.query_of[row] for row in block], device=self.queries.device)
            best = similarity_topk(self.queries[asking], self.candidates, self.pool)[1].tolist()
            for row, retrieved in zip(block, best, strict=True):
                if self.query_of[row] not in done:
                    yield row, retrieved

    def _phase(self, rows: Iterable[int], count: int, done: set[int], taken: set[int]) -> list[list[int]]:
        """`done` queries get no cluster, `taken` ones are no owners; both grow, and in phase 1 they are one set."""
        clusters = []
        for row, retrieved in self.retrieve(rows, done):
            q = self.query_of[row]
            found = self._owners(q, [c for c in retrieved if c != self.candidate_of[row]], count, taken)
            if not found:
                continue
            order = [*found]
            if not self.classification:
                order = [order[i] for i in self._products(q, order).argsort(stable=True).tolist()]
            clusters.append([row, *(found[owner] for owner in order[: self.hard])])
            done.add(q)
            taken.update(order[: self.hard])
        return clusters

    def _owners(self, q: int, retrieved: list[int], count: int, taken: set[int]) -> dict[int, int]:
        """{owner: its row} of at most `count` queries, in the order of the candidates that led to them."""
        found: dict[int, int] = {}
        for c in retrieved:
            free = [owner for owner in self.owners[c] if owner not in taken and owner != q]
            if free:
                owner = free[0] if len(free) == 1 else free[int(self._products(q, free).argmax())]
                found.setdefault(owner, self.owners[c][owner])
                if len(found) == count:
                    break
        return found

    def _products(self, q: int, others: list[int]) -> Tensor:
        return self.queries[torch.tensor(others, device=self.queries.device)] @ self.queries[q]
