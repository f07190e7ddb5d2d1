"""Batches of pairs for the similarity benchmarks, and the float64 truth of the losses on them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.testing.shapes import Shape

SCALE = 1 / 0.07
BASE = 2048  # rows of a batch whose float64 truth is computed densely


class Batch(NamedTuple):
    """Pairs of unit vectors: shuffled copies of a smaller batch, whose float64 truth is that of the whole, rescaled.

    With every row there `copies` times, each exp(L_ij) of the small batch appears `copies` times in a sum.
    """

    queries: Tensor  # [N, D]
    keys: Tensor  # [N, D]
    scale: Tensor
    ids: Tensor  # [N]; two rows of the small batch share each
    small: tuple[Tensor, Tensor, Tensor]  # queries, keys, ids
    index: Tensor  # [N] into the small batch
    copies: int


def make_batch(shape: Shape) -> Batch:
    random = torch.Generator().manual_seed(0)
    base = next(size for size in range(min(shape.n, BASE), 0, -1) if shape.n % size == 0)
    queries = F.normalize(torch.randn(base, shape.d, generator=random), dim=1)
    # cos(query, key) is about 0.45: neither a solved batch nor one without signal
    keys = F.normalize(queries + 2 * F.normalize(torch.randn(base, shape.d, generator=random), dim=1), dim=1)
    ids = torch.randperm(base, generator=random) // 2
    index = torch.randperm(shape.n, generator=random) % base
    scale = torch.tensor(SCALE, requires_grad=True)
    q, k = queries[index].requires_grad_(), keys[index].requires_grad_()
    return Batch(q, k, scale, ids[index], (queries, keys, ids), index, shape.n // base)


def make_views(shape: Shape) -> Batch:
    """Two views, together as many rows as the shape says."""
    return make_batch(Shape(shape.name, shape.m // 2, shape.n // 2, shape.d))


def truth(
    kind: str, batch: Batch, *, scale: bool = True, normalise: bool = False, keys: bool = True, at: float = SCALE
) -> tuple:
    """Loss and gradients in float64: dense over the small batch, entries counted as often as the whole has them."""
    copies = batch.copies
    leaves = [x.double().requires_grad_() for x in batch.small[:2]]
    s = torch.tensor(at, dtype=torch.float32).double().requires_grad_()
    q, k = (F.normalize(x, dim=1) for x in leaves) if normalise else leaves
    count = len(q)
    own = torch.eye(count, dtype=torch.float64)
    ids = batch.small[2]
    if kind in ("nt_xent", "supcon"):
        rows = candidates = torch.cat([q, k]) if kind == "nt_xent" else q
        times = copies - torch.eye(len(rows), dtype=torch.float64)
    else:
        rows, candidates = q, k
        times = torch.full((count, count), float(copies), dtype=torch.float64)
        if kind == "clip_ids":
            times = torch.where(ids[:, None] == ids, own, times)
    logits = s * rows @ candidates.T
    counted = logits + times.log()
    if kind == "supcon":
        positive = (ids[:, None] == ids) * times
        sums = (positive * logits).sum(1) / positive.sum(1)
    else:
        sums = s * (q * k).sum(1).repeat(len(rows) // count)
    loss = counted.logsumexp(1) - sums
    if kind.startswith("clip"):
        loss = (loss + counted.logsumexp(0) - sums) / 2
    wanted = [leaves[0], *([leaves[1]] if keys else []), *([s] if scale else [])]
    loss = loss.mean()
    gradients = torch.autograd.grad(loss, wanted)
    return (loss.detach(), *(g[batch.index] / copies if g.ndim else g for g in gradients))
