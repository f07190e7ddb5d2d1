"""SuperEdit: the loss of a device's batch of 64 latents, 4 × 64 × 64. No matrix product: the floor is traffic alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.recipes.superedit import superedit_loss

from .._harness import OURS, Bar, Floor, Step, Workload
from . import against_dense

MARGIN, READS = 0.02, "read six, write two"


def inputs(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The target, two predictions of which now one, now the other is nearer, and a mask that keeps most."""
    generator = torch.Generator().manual_seed(0)
    target, *errors = (torch.randn(shape, generator=generator) for _ in range(3))
    predictions = [(target + 0.3 * error).requires_grad_() for error in errors]
    return target, *predictions, torch.rand(shape[0], generator=generator) < 0.85


def ours(target: Tensor, positive: Tensor, negative: Tensor, mask: Tensor) -> Tensor:
    return superedit_loss(target, positive, negative, mask, margin=MARGIN)


def dense(target: Tensor, positive: Tensor, negative: Tensor, mask: Tensor) -> Tensor:
    near, far = ((x - target).square().mean((1, 2, 3)) for x in (positive, negative))
    hinge = F.relu(near - far + MARGIN) * mask
    return F.mse_loss(positive, target) + hinge.sum() / (mask.sum() + 1e-8)


def traffic(problem: tuple[Tensor, ...]) -> Step:
    """What forward and backward cannot do without: the distances' reads, and two gradients, new, from three tensors."""
    target, positive, negative = (x.detach() for x in problem[:3])

    def step() -> tuple[Tensor, ...]:
        for x in (target, positive, negative):
            x.sum()
        return target + positive, negative * 2.0

    return step


def workloads(quick: bool) -> list[Workload]:
    shape = (8, 4, 16, 16) if quick else (64, 4, 64, 64)
    bars = (
        Bar("dense torch", OURS, at_least=2.0),
        Bar("dense torch", OURS, at_least=10, what="peak_extra_bytes"),
        # Tensors of 4 MiB stay in the cache: the floor is 0.3 ms, and steps on 64 numbers cost nearly as much.
        Bar(OURS, READS, at_most=5.0),
    )
    name = f"superedit {' × '.join(map(str, shape))}"
    whole = against_dense(
        name, shape, (2, 4, 8, 8), inputs, ours, dense, products=(), compile=not quick, bars=() if quick else bars
    )
    return [replace(whole, floors={READS: Floor({"sums, add and mul": traffic})})]
