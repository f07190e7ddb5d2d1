"""UniME's second stage: a softmax over the positive and the hardest negatives that are not too near."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast.distributed._sums import gathered, numbers, share
from fastcontrast.ops import _check as check
from fastcontrast.ops import similarity_topk
from fastcontrast.ops._precision import float32, without_autocast


@without_autocast
def hard_negative_loss(
    queries: Tensor,  # [n, D]
    candidates: Tensor,  # [n, D]
    scale: float | Tensor = 50.0,
    *,
    k: int = 8,
    beta: float = 0.1,
    underfull: str = "duplicate",
) -> Tensor:
    """L of the 2nd stage, of unit features; scale = 1 / τ. Gradients go through s_ii and the chosen s_ij alone.

    Inside `fastcontrast.distributed.exchange` negatives are mined among the candidates of all ranks, which every rank
    gathers, also in a "ring".

    Args:
        k, beta: how many negatives, and by how much one may be nearer than the positive. Below 0 some that are true
            are left out too.
        underfull: a row with m < k negatives has them again ("duplicate"; the free slots in order of hardness), or a
            softmax over 1 + m ("mask"). "official": as a top-k over scores set to −inf does, it fills up with
            candidates that were left out, perhaps the positive itself; here in order of their index.

    A row without any negative gives 0, and counts in n ("official" has none such). Raises ValueError naming what does
    not fit; k must be less than the number of candidates, of all ranks.
    """
    op = "hard_negative_loss"
    check.matrix(op, "queries", queries)
    check.matrix(op, "candidates", candidates, queries.shape[1])
    if len(candidates) != len(queries):
        raise ValueError(f"{op}: candidates must be as many as queries, {len(queries)}, got {len(candidates)}")
    check.one_of(op, "underfull", underfull, tuple(UNDERFULL))
    scale = check.scalar(op, "scale", scale, queries)
    index = numbers(len(queries), queries.device)
    own = torch.linalg.vecdot(float32(queries), float32(candidates))
    every = gathered(candidates)
    if not 1 <= k < len(every):
        raise ValueError(f"{op}: k must lie in [1, {len(every)}), for that many candidates, got {k}")
    # A duplicate of the positive is as near as it, not nearer; but a dot product and a matrix product differ by
    # rounding.
    limit = own.detach() + (beta + 8 * torch.finfo(own.dtype).eps)
    ids = torch.arange(len(every), device=queries.device)
    values, chosen = similarity_topk(queries, every, k, query_ids=index, key_ids=ids, limit=limit)
    # 0 for what is missing: −inf times the gradient to a learned scale would be NaN.
    negatives, there = UNDERFULL[underfull](values.masked_fill(chosen < 0, 0.0), chosen, queries, every)
    above = (scale * (negatives - own[:, None])).masked_fill(~there, -torch.inf)  # less than the logits: more digits
    losses = torch.cat([torch.zeros_like(own)[:, None], above], 1).logsumexp(1)
    return share(losses.sum(), len(losses))


def _duplicate(values: Tensor, chosen: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    """Slot r has the negative of rank r mod m."""
    m, slot = _count(chosen)
    return values.gather(1, slot % m.clamp(min=1)), (m > 0).expand_as(chosen)


def _mask(values: Tensor, chosen: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return values, chosen >= 0


def _official(values: Tensor, chosen: Tensor, queries: Tensor, every: Tensor) -> tuple[Tensor, Tensor]:
    """A row with m < k negatives has all of them in `chosen`: of the first k candidates, k − m or more are none."""
    m, slot = _count(chosen)
    among_first = (chosen[:, :, None] == slot[0]).any(1)  # [n, k], whether candidate 0 … k − 1 is a negative
    others = among_first.to(torch.uint8).argsort(dim=1, stable=True)  # those first that are none, in order of index
    scores = float32(queries) @ float32(every[: chosen.shape[1]]).T
    scores = scores.gather(1, others.gather(1, (slot - m).clamp(min=0)))
    return torch.where(slot < m, values, scores), torch.ones_like(among_first)


def _count(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """m of each row [n, 1], and the numbers of the slots [n, k]."""
    slot = torch.arange(chosen.shape[1], device=chosen.device)
    return (chosen >= 0).sum(1, keepdim=True), slot.expand_as(chosen)


UNDERFULL = {"duplicate": _duplicate, "mask": _mask, "official": _official}
