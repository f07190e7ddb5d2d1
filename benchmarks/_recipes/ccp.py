"""CCP: a batch of pairs against its language's bank, XLM-R's width 768. A bank takes no gradient: two products do."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.recipes.ccp import SCALE, ccp_loss

from .._harness import OURS, Bar, Workload
from . import against_dense

Shape = tuple[int, int, int]  # B, K, D


def inputs(shape: Shape) -> tuple[Tensor, ...]:
    """Centres, contexts near them, and a bank."""
    pairs, size, width = shape
    generator = torch.Generator().manual_seed(0)
    centre, other, bank = (torch.randn(n, width, generator=generator) for n in (pairs, pairs, size))
    centre, context, bank = (F.normalize(x, dim=1) for x in (centre, centre + other, bank))
    return centre.requires_grad_(), context.requires_grad_(), bank


def ours(centre: Tensor, context: Tensor, bank: Tensor) -> Tensor:
    return ccp_loss(centre, context, bank)


def dense(centre: Tensor, context: Tensor, bank: Tensor) -> Tensor:
    positive, label = (centre * context).sum(1, keepdim=True), torch.zeros(len(centre), dtype=torch.long)
    logits = (torch.cat([positive, side @ bank.T], 1) * SCALE for side in (centre, context))
    return sum(F.cross_entropy(x, label) for x in logits) / 2


def workloads(quick: bool) -> list[Workload]:
    shapes = [(128, 300, 32)] if quick else [(256, 4096, 768), (4096, 4096, 768), (1024, 65_536, 768)]
    return [workload(shape, quick) for shape in shapes]


def workload(shape: Shape, quick: bool) -> Workload:
    pairs, size, width = shape
    # Either form does two products; what dense torch adds are passes over the logits, of which much memory is made.
    smaller = 10.0 if size > 4096 else 2.5  # of so few logits our workspace, 64 MiB, is a fourth
    bars = Bar("dense torch", OURS, at_least=1.2), Bar("dense torch", OURS, at_least=smaller, what="peak_extra_bytes")
    return against_dense(
        f"ccp {pairs} pairs, bank {size} × {width}", shape, (64, 128, 32), inputs, ours, dense,
        products=[(2 * pairs, size, width, 2)], compile=not quick, needs=32 * pairs * size,
        bars=() if quick else bars[: 1 if pairs == 256 else 2],
    )  # fmt: skip
