"""MultiCSR: a batch of thousands of triplets at BERT's width, 768, with the guide's mask; the paper's has 128 a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.recipes.multicsr import multicsr_loss

from .._harness import OURS, Bar, Workload
from . import against_dense

SCALE, LIMIT = 20.0, 0.95


def inputs(shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """Features of sentence, entailed and contradicting one, and the guide's. Each sentence comes twice, so that there
    is something to mask."""
    rows, width = shape
    generator = torch.Generator().manual_seed(0)
    once, *noise = (torch.randn(n, width, generator=generator) for n in (rows // 2, *[rows] * 6))
    sentence = once.repeat(2, 1)
    learned = [sentence + share * x for share, x in zip((1.0, 1.0, 1.5), noise, strict=False)]
    guide = [sentence + share * x for share, x in zip((0.1, 0.1, 1.0), noise[3:], strict=True)]
    return *(F.normalize(x, dim=1).requires_grad_() for x in learned), *(F.normalize(x, dim=1) for x in guide)


def ours(a: Tensor, p: Tensor, n: Tensor, *guide: Tensor) -> Tensor:
    return multicsr_loss(a, p, n, guide, SCALE, limit=LIMIT)


def dense(a: Tensor, p: Tensor, n: Tensor, ga: Tensor, gp: Tensor, gn: Tensor) -> Tensor:
    logits = SCALE * a @ torch.cat([p, n]).T
    own = torch.eye(*logits.shape, dtype=torch.bool)
    logits = logits.masked_fill((ga @ torch.cat([gp, gn]).T > LIMIT) & ~own, 0.0)
    return F.binary_cross_entropy(logits.softmax(1), own.to(logits.dtype))


def workloads(quick: bool) -> list[Workload]:
    rows, width = (256, 64) if quick else (4096, 768)
    # Four products of this width are most of the time of either form: twice as fast is out of reach.
    bars = (
        Bar("dense torch", OURS, at_least=1.0),
        Bar("dense torch", OURS, at_least=10.0, what="peak_extra_bytes"),
    )
    return [
        against_dense(
            f"multicsr {rows} × {2 * rows}, {width}", (rows, width), (64, 32), inputs, ours, dense,
            products=[(rows, 2 * rows, width, 4)], bars=() if quick else bars, needs=12 * 4 * 2 * rows * rows,
            compile=not quick,
        )
    ]  # fmt: skip
