"""What a teacher says of texts before a student reads them: its best tokens, and how hard a text is that it knows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast.ops import _check as check
from fastcontrast.ops._tokens import per_token

from .salt_teacher import IGNORED, Heads, Logits, TopK, chunks, entries_of, fit


@torch.no_grad()
def top_k(teacher: Heads | Tensor, k: int, rho: float = 1.0) -> TopK:
    """The k likeliest tokens of each position and their log q, q = softmax(ρ · logits) over the whole vocabulary: what
    is kept of a teacher that ran before. `mass` of the result says how much of q that is."""
    vocabulary = entries_of(teacher)
    if not 1 <= k <= vocabulary:
        raise ValueError(f"top_k: k must lie in [1, {vocabulary}], got {k}")
    shape = (teacher.hidden if isinstance(teacher, Heads) else teacher).shape[:-1]
    logits = Logits(fit("top_k", teacher, shape, vocabulary), vocabulary, rho)
    found = []
    for part in chunks(torch.arange(shape.numel(), device=teacher[0].device), vocabulary):
        z = logits.rows(part)
        values, ids = z.topk(k, dim=1)
        found.append((ids, values - z.logsumexp(1, keepdim=True)))
    return TopK(*(torch.cat(x).view(*shape, k) for x in zip(*found, strict=True)))


@torch.no_grad()
def score_sequences(
    teacher: Heads | Tensor,  # of [B, T] tokens
    targets: Tensor,  # [B, T] integer
    k: int = 10,
    *,
    mask: str = "zero",
) -> Tensor:
    """median over tokens of −log P_teacher(y), where tokens outside the teacher's k best count as 0, [B].

    A token is inside where fewer than k logits are greater than its own: counted, nothing is sorted. With
    `mask="drop"` tokens outside are left out of the median; where none remains the score is −∞. Targets of −100 are
    left out of both; a text without any other scores 0, or −∞. Of an even number the median is the mean of the middle
    two. One pass over the teacher's logits, a chunk of tokens at a time.
    """
    op = "score_sequences"
    check.one_of(op, "mask", mask, ("zero", "drop"))
    if k < 1:
        raise ValueError(f"{op}: k must be at least 1, got {k}")
    if targets.ndim != 2:
        raise ValueError(f"{op}: targets must be [B, T], got {list(targets.shape)}")
    vocabulary = entries_of(teacher)
    logits = Logits(fit(op, teacher, targets.shape, vocabulary), vocabulary)
    first = teacher.hidden if isinstance(teacher, Heads) else teacher
    gold = per_token(op, "targets", targets, first, floating=False).long()
    check.within(op, "targets", gold[gold != IGNORED], 0, vocabulary)
    losses = torch.full(gold.shape, torch.inf, dtype=torch.float64 if first.dtype == torch.float64 else torch.float32)
    losses = losses.to(gold.device)  # infinite: left out
    for part in chunks((gold != IGNORED).nonzero()[:, 0], vocabulary):
        z = logits.rows(part)
        own = z.gather(1, gold[part, None])
        inside = (z > own).sum(1) < k
        loss = z.logsumexp(1) - own[:, 0]
        losses[part] = torch.where(inside, loss, 0.0 if mask == "zero" else torch.inf)
    losses = losses.view(targets.shape).sort(dim=1).values
    count = losses.isfinite().sum(1, keepdim=True)
    middle = [losses.gather(1, i.clamp(min=0)) for i in ((count - 1) // 2, count // 2)]
    nothing = 0.0 if mask == "zero" else -torch.inf
    return torch.where(count > 0, (middle[0] + middle[1]) / 2, nothing)[:, 0]


def select(scores: Tensor, count: int) -> Tensor:  # [B]
    """Indices of the `count` highest scores, highest first, of equal ones the first first; never of −∞."""
    order = scores.sort(descending=True, stable=True).indices[:count]
    return order[scores[order] > -torch.inf]
