"""Batches of pairs for the similarity benchmarks, and the float64 truth of the losses on them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.testing.shapes import Shape

from ._rivals import SCALE

BIAS = -10.0  # of the sigmoid loss
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
    bias: Tensor


def make_batch(shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Batch:
    random = torch.Generator().manual_seed(0)
    base = next(size for size in range(min(shape.n, BASE), 0, -1) if shape.n % size == 0)
    queries = F.normalize(torch.randn(base, shape.d, generator=random), dim=1)
    # cos(query, key) is about 0.45: neither a solved batch nor one without signal
    keys = F.normalize(queries + 2 * F.normalize(torch.randn(base, shape.d, generator=random), dim=1), dim=1)
    ids = torch.randperm(base, generator=random) // 2
    index = torch.randperm(shape.n, generator=random) % base
    queries, keys, ids, index = queries.to(device, dtype), keys.to(device, dtype), ids.to(device), index.to(device)
    q, k = queries[index].requires_grad_(), keys[index].requires_grad_()
    scale, bias = (torch.tensor(x, device=device, requires_grad=True) for x in (SCALE, BIAS))
    return Batch(q, k, scale, ids[index], (queries, keys, ids), index, shape.n // base, bias)


def make_views(shape: Shape) -> Batch:
    """Two views, together as many rows as the shape says."""
    return make_batch(Shape(shape.name, shape.m // 2, shape.n // 2, shape.d))


def truth(
    kind: str, batch: Batch, *, scale: bool = True, normalise: bool = False, keys: bool = True, at: float = SCALE
) -> tuple:
    """Loss and gradients in float64: dense over the small batch, entries counted as often as the whole has them."""
    copies = batch.copies
    leaves = [x.double().requires_grad_() for x in batch.small[:2]]
    s = torch.tensor(at, dtype=torch.float32, device=batch.index.device).double().requires_grad_()
    q, k = (F.normalize(x, dim=1) for x in leaves) if normalise else leaves
    count = len(q)
    own = torch.eye(count, dtype=torch.float64, device=q.device)
    ids = batch.small[2]
    if kind in ("nt_xent", "supcon"):
        rows = candidates = torch.cat([q, k]) if kind == "nt_xent" else q
        times = copies - torch.eye(len(rows), dtype=torch.float64, device=q.device)
    else:
        rows, candidates = q, k
        times = torch.full((count, count), float(copies), dtype=torch.float64, device=q.device)
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


def siglip_truth(batch: Batch, *, at: float = SCALE) -> tuple:
    """The sigmoid loss and its gradients to queries, keys, scale and bias in float64. Of the copies of a row's own key
    one is its positive, the others negatives: softplus(−L) = softplus(L) − L, so every copy counts and L goes once."""
    q, k = leaves = [x.double().requires_grad_() for x in batch.small[:2]]
    leaves += [torch.tensor(x, dtype=torch.float32, device=q.device).double().requires_grad_() for x in (at, BIAS)]
    logits = leaves[2] * q @ k.T + leaves[3]
    loss = (batch.copies * F.softplus(logits).sum(1) - logits.diagonal()).mean()
    gradients = torch.autograd.grad(loss, leaves)
    return (loss.detach(), *(g[batch.index] / batch.copies if g.ndim else g for g in gradients))
