"""Losses of pairs of texts with a label each, 6 to 9 of the catalogue.

x, y [P, D] are the two sides as a model gives them, of any length. The order of P scores needs no P × P matrix:

    Σ_{p,r: y_p < y_r} exp(λ (s_p − s_r)) = Σ_r exp(−λ s_r) Σ_{p: y_p < y_r} exp(λ s_p)

whose inner sums are running ones once the labels are sorted. Inside `fastcontrast.distributed.exchange` each takes its
rank's pairs of a batch that lies on all.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcontrast import info_nce
from fastcontrast.distributed._sums import gathered, share
from fastcontrast.ops import _check as check
from fastcontrast.ops._formed import formed
from fastcontrast.ops._precision import float32, without_autocast


def order_loss(scores: Tensor, labels: Tensor, scale: float = 20.0) -> Tensor:  # [P], [P]
    """log(1 + Σ_{p,r: y_p < y_r} exp(λ (s_p − s_r))), λ = scale: one number a batch, 0 where all labels are equal.

    In float64, P log P steps, for scores and λ of any size. Raises ValueError naming what does not fit.
    """
    op = "order_loss"
    check.vector(op, "labels", labels, len(scores), scores, floating=labels.is_floating_point())
    scores, labels = gathered(float32(scores)), gathered(labels)

    def run(inputs, needs):
        order = labels.argsort(stable=True)
        y, logits = labels[order].contiguous(), scale * inputs[0][order].double()
        nothing = logits.new_full((1,), -math.inf)
        lower = torch.cat([nothing, logits.logcumsumexp(0)])[torch.searchsorted(y, y)]
        above = lower - logits  # log Σ_p exp(λ (s_p − s_r)) over the lower labels of each r
        loss = torch.cat([logits.new_zeros(1), above]).logsumexp(0)
        if not needs[0]:
            return loss.to(inputs[0].dtype), (None,)
        higher = torch.cat([(-logits).flip(0).logcumsumexp(0).flip(0), nothing])[torch.searchsorted(y, y, right=True)]
        gradient = torch.empty_like(logits)
        gradient[order] = scale * ((higher + logits - loss).exp() - (above - loss).exp())
        return loss.to(inputs[0].dtype), (gradient.to(inputs[0].dtype),)

    return formed(run, scores, op=op)


def cosine(x: Tensor, y: Tensor) -> Tensor:  # [P, D] each
    """cos(x_p, y_p), [P]; 0 with a row of zeros."""
    return F.cosine_similarity(float32(x), float32(y), dim=-1, eps=1e-12)


def angle(x: Tensor, y: Tensor) -> Tensor:  # [P, D] each
    """|Σ_k ((a c + b d) + (b c − a d))_k| / (|x| |y|), x = (a, b), y = (c, d): complex numbers, divided. [P]."""
    if x.shape[-1] % 2:
        raise ValueError(f"angle: rows must have an even width, got {x.shape[-1]}")
    (a, b), (c, d) = (float32(z).chunk(2, dim=-1) for z in (x, y))
    lengths = float32(x).norm(dim=-1) * float32(y).norm(dim=-1)
    return ((a * c + b * d) + (b * c - a * d)).sum(-1).abs() / lengths.clamp(min=1e-12)


@without_autocast
def cosent_loss(x: Tensor, y: Tensor, labels: Tensor, scale: float = 20.0) -> Tensor:  # [P, D], [P, D], [P]
    """6. CoSENT: `order_loss` of cosines."""
    _check("cosent_loss", x, y, labels)
    return order_loss(cosine(x, y), labels, scale)


@without_autocast
def angle_loss(
    x: Tensor,  # [P, D]
    y: Tensor,  # [P, D]
    labels: Tensor,  # [P]
    scale: float = 20.0,
    *,
    cosent: float = 0.0,
    in_batch: float = 0.0,
) -> Tensor:
    """7. AnglE: `order_loss` of angles; weights of CoSENT and of InfoNCE over the batch (for pairs that are positives),
    which the whole method adds, each with 1."""
    _check("angle_loss", x, y, labels)
    total = order_loss(angle(x, y), labels, scale)
    if cosent:
        total = total + cosent * cosent_loss(x, y, labels, scale)
    if in_batch:
        total = total + in_batch * info_nce(*(F.normalize(float32(z), dim=-1) for z in (x, y)), scale)
    return total


@without_autocast
def cosine_loss(x: Tensor, y: Tensor, labels: Tensor) -> Tensor:  # [P, D], [P, D], [P]
    """8. mean_p (cos(x_p, y_p) − label_p)²."""
    _check("cosine_loss", x, y, labels)
    return share((cosine(x, y) - labels).square().sum(), len(labels))


@without_autocast
def online_pair_loss(
    x: Tensor,  # [P, D]
    y: Tensor,  # [P, D]
    labels: Tensor,  # [P], 1 where a pair belongs together, 0 where not
    margin: float = 0.5,
) -> Tensor:
    """9. Σ d² of the positives farther than the nearest negative + Σ max(0, margin − d)² of the negatives nearer than
    the farthest positive, d = 1 − cos. Where one kind is missing, all of the other count."""
    _check("online_pair_loss", x, y, labels)
    distances, positive = gathered(1 - cosine(x, y)), gathered(labels) > 0
    values = distances.detach()
    nearest = values.masked_fill(positive, math.inf).amin() if not positive.all() else -math.inf
    farthest = values.masked_fill(~positive, -math.inf).amax() if positive.any() else math.inf
    hard = torch.where(positive, values > nearest, values < farthest)
    costs = torch.where(positive, distances, (margin - distances).clamp(min=0)).square()
    return (costs * hard).sum()


def _check(op: str, x: Tensor, y: Tensor, labels: Tensor) -> None:
    check.matrix(op, "x", x)
    if y.shape != x.shape:
        raise ValueError(f"{op}: y must be {list(x.shape)} to match x, got {list(y.shape)}")
    check.vector(op, "labels", labels, len(x), x, floating=labels.is_floating_point())
