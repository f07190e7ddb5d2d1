"""SaHa: clusters of 16,384 queries, 1,536 wide, and of 65,536, 384 wide, each of 90 candidates; and the loss of a batch
of 2,048.

The dense form of the sampler retrieves for all queries at once, from the whole matrix, and then does the same. That of
65,536 rows would be 16 GiB: there it is made a block of queries at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.recipes._parts.saha_clusters import Sampler
from fastcontrast.recipes.saha import saha_clusters, saha_loss

from .._harness import OURS, Bar, Workload
from . import against_dense

HARD, MULTIPLIER = 15, 3
SCALE = 50.0


def vectors(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Of integers so small that products are exact in float32: no rounding decides which of two comes first."""
    generator = torch.Generator().manual_seed(0)
    largest = round(150 * (1536 / shape[1]) ** 0.5)
    queries, noise = (torch.randint(-largest, largest + 1, shape, generator=generator).float() for _ in range(2))
    return queries, queries + noise


def numbered(clusters: tuple[list[list[int]], list[list[int]]], count: int) -> Tensor:
    """The number of the last cluster that each row is in, −1 without one."""
    found = torch.full((count,), -1.0)
    for number, cluster in enumerate(clusters[0] + clusters[1]):
        found[cluster] = float(number)
    return found


def ours(queries: Tensor, candidates: Tensor) -> Tensor:
    rows = torch.arange(len(queries))
    return numbered(saha_clusters(queries, candidates, rows, rows, HARD, MULTIPLIER), len(queries))


class All(Sampler):
    """Every query retrieves, `part` of them at once."""

    part: int

    def retrieve(self, rows: Iterable[int], done: set[int]) -> Iterator[tuple[int, list[int]]]:
        parts = self.queries.split(self.part)
        best = [row for part in parts for row in (part @ self.candidates.T).topk(self.pool)[1].tolist()]
        for row in rows:
            if self.query_of[row] not in done:
                yield row, best[self.query_of[row]]


def dense(queries: Tensor, candidates: Tensor, part: int | None = None) -> Tensor:
    rows = [*range(len(queries))]
    sampler = All(queries, candidates, rows, rows, HARD, MULTIPLIER)
    sampler.part = part or len(queries)
    return numbered(sampler.clusters(), len(queries))


def pairs(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Candidates a little nearer to their own queries, so that there is much left to learn."""
    generator = torch.Generator().manual_seed(0)
    queries, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    return tuple(F.normalize(x, dim=1).requires_grad_() for x in (queries, queries + 8 * noise))


def dense_loss(queries: Tensor, candidates: Tensor) -> Tensor:
    return F.cross_entropy(SCALE * queries @ candidates.T, torch.arange(len(queries)))


def mining(rows: int, width: int, part: int | None = None, **options) -> Workload:
    return against_dense(
        f"saha clusters {rows} × {width}", (rows, width), (200, 32), vectors, ours, partial(dense, part=part),
        # as many queries retrieve, at least, as there are clusters of a query and 15 others
        products=[(rows // (HARD + 1), rows, width, 1)], compile=False, **options,
    )  # fmt: skip


def workloads(quick: bool) -> list[Workload]:
    rows, batch, width = (600, 256, 64) if quick else (16_384, 2048, 1536)
    faster = Bar("dense torch", OURS, at_least=2.0)
    smaller = Bar("dense torch", OURS, at_least=10.0, what="peak_extra_bytes")
    found = [
        mining(rows, width, bars=() if quick else (faster, smaller), needs=3 * 4 * rows * rows),
        against_dense(
            f"saha loss {batch} × {width}", (batch, width), (64, 32), pairs, saha_loss, dense_loss,
            products=[(batch, batch, width, 3)], compile=not quick,
            # Three products of this width are nearly all of the time, dense or not, and 16 MiB of logits are little.
            bars=() if quick else (Bar(OURS, "products", at_most=1.3), Bar("dense torch", OURS, at_least=1.0)),
        ),
    ]  # fmt: skip
    if not quick:
        found.append(_once(mining(65_536, 384, part=2048, bars=(faster,), reps=3)))
    return found


def _once(workload: Workload) -> Workload:
    """Dense torch takes a minute: the call that is checked is the one that is timed, and its memory is not measured."""
    once = replace(workload.providers["dense torch"], reps=1, memory=0)
    return replace(workload, providers=workload.providers | {"dense torch": once})
