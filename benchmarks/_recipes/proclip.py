"""ProCLIP: distances of all pairs against a teacher's, of a gathered batch of the paper, 4096 at width 512."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.recipes.proclip import structure_loss

from .._harness import Bar, Workload
from . import against_dense


def inputs(shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """Student, before it is normalised, and teacher."""
    generator = torch.Generator().manual_seed(0)
    teacher, noise = (F.normalize(torch.randn(shape, generator=generator), dim=1) for _ in range(2))
    return (teacher + noise).requires_grad_(), teacher


def ours(raw: Tensor, teacher: Tensor) -> Tensor:
    return structure_loss(F.normalize(raw, dim=1), teacher)


def distances(x: Tensor) -> Tensor:
    """Of rows of length 1. That of a row to itself, which rounding moves from 0, gets no gradient."""
    squares = (2 - 2 * x @ x.T).clamp(min=0)
    apart = squares > 0
    return torch.where(apart, squares.where(apart, 1.0).sqrt(), 0.0)


def dense(raw: Tensor, teacher: Tensor) -> Tensor:
    above = torch.ones(len(raw), len(raw), dtype=torch.bool).triu(1)
    student = F.normalize(raw, dim=1)
    loss = F.smooth_l1_loss(distances(student), distances(teacher), reduction="none")
    return torch.where(above, loss, 0.0).sum()


def workloads(quick: bool) -> list[Workload]:
    rows, width = (512, 64) if quick else (4096, 512)
    # Above the diagonal alone: both distances, and the student's gradient from either side, 4 halves.
    products = [(rows, rows, width, 2)]
    bars = (
        Bar("dense torch", "fastcontrast", at_least=2.0),
        Bar("dense torch", "fastcontrast", at_least=4.0, what="peak_extra_bytes"),
    )
    return [
        against_dense(
            f"proclip structure {rows} × {width}", (rows, width), (64, 32), inputs, ours, dense,
            products=products, bars=() if quick else bars, needs=12 * 4 * rows * rows, compile=not quick,
        )
    ]  # fmt: skip
