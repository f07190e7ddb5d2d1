"""UniME's two stages: the batch of the first, 768 at a teacher's width of 4096, and a larger one; hard negatives of
1024 and of 8192 pairs."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.recipes.unime import distillation_loss, hard_negative_loss

from .._harness import OURS, Bar, Workload
from . import against_dense

K, BETA, SCALE = 8, 0.1, 50.0
STAGE_1 = 20.0  # at 50 nearly nothing is left to compare


def features(shape: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """Student and teacher, each in a cone as texts are: of orthogonal rows only the diagonal would be left."""
    rows, *widths = shape
    generator = torch.Generator().manual_seed(0)
    spread = (torch.randn(rows, d, generator=generator) for d in widths)
    student, teacher = (F.normalize(x + 2.0 * x.shape[1] ** 0.5 * F.normalize(x[0], dim=0), dim=1) for x in spread)
    return student.requires_grad_(), teacher


def distil(student: Tensor, teacher: Tensor) -> Tensor:
    return distillation_loss(student, teacher, STAGE_1, reduction="mean")


def dense_distil(student: Tensor, teacher: Tensor) -> Tensor:
    p, t = (F.log_softmax(STAGE_1 * x @ x.T, 1) for x in (student, teacher))
    return F.kl_div(p, t, log_target=True, reduction="batchmean")


def pairs(shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """Queries, and candidates near to them; each fourth is a near copy of another, which the threshold drops. Multiples
    of 2⁻¹², whose products are exact in float32: no rounding decides which negatives are the hardest."""
    generator = torch.Generator().manual_seed(0)
    queries, noise = (F.normalize(torch.randn(shape, generator=generator), dim=1) for _ in range(2))
    candidates = F.normalize(queries + noise, dim=1)
    candidates[3::4] = F.normalize(queries[: len(candidates[3::4])] + 0.3 * noise[3::4], dim=1)
    return tuple(((4096 * x).round() / 4096).requires_grad_() for x in (queries, candidates))


def mine(queries: Tensor, candidates: Tensor) -> Tensor:
    return hard_negative_loss(queries, candidates, SCALE, k=K, beta=BETA)


def dense_mine(queries: Tensor, candidates: Tensor) -> Tensor:
    scores = queries @ candidates.T
    own = scores.diagonal()
    limit = own[:, None] + (BETA + 8 * torch.finfo(torch.float32).eps)  # ours, where that much is rounding
    left = scores.detach().masked_fill(scores > limit, -torch.inf).fill_diagonal_(-torch.inf)
    hardest = scores.gather(1, left.topk(K, dim=1).indices)
    logits = SCALE * torch.cat([own[:, None], hardest], 1)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))


def workloads(quick: bool) -> list[Workload]:
    first = [(256, 64, 96)] if quick else [(768, 4096, 4096), (4096, 4096, 4096)]
    second = [(256, 64)] if quick else [(1024, 4096), (8192, 1024)]
    found = []
    for rows, width, of_teacher in first:
        # Student and teacher once, and the student's gradient: its products from either side are one matrix's.
        products = [(rows, rows, width, 2), (rows, rows, of_teacher, 1)]
        # Features are as wide as logits: their gradients from either side take as much as matrices of dense torch.
        bars = (Bar("dense torch", OURS, at_least=1.0),) if rows > 1024 else ()
        make = partial(against_dense, products=products, bars=bars, needs=10 * 4 * rows * rows, compile=not quick)
        shape = rows, width, of_teacher
        found.append(make(f"unime 1st stage {rows} × {width}", shape, (64, 16, 16), features, distil, dense_distil))
    for rows, width in second:
        # One product and a top-k. The dense backward multiplies a matrix of zeros twice more.
        bars = () if quick else (Bar("dense torch", OURS, at_least=2.0),)
        if rows > 1024:
            bars += (Bar("dense torch", OURS, at_least=10.0, what="peak_extra_bytes"),)
        make = partial(against_dense, products=[(rows, rows, width, 1)], bars=bars, needs=6 * 4 * rows * rows)
        name = f"unime hard negatives {rows} × {width}"
        found.append(make(name, (rows, width), (64, 16), pairs, mine, dense_mine, compile=not quick))
    return found
