"""SPACE-2, ten views with soft positives: 128 dialogs, the paper's batch, make 2B = 256 rows of width 768; and 4096."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.recipes.space2 import tree_loss

from .._harness import OURS, Bar, Workload
from . import against_dense

Shape = tuple[int, int, int]


def inputs(shape: Shape) -> tuple[Tensor, Tensor]:
    """Rows of two copies [2B, views, D], near each other; weights [views, B, B], four of five 0."""
    generator, (rows, views, width) = torch.Generator().manual_seed(0), shape
    half = torch.randn(rows // 2, views, width, generator=generator)
    z = torch.cat([half + torch.randn(half.shape, generator=generator) for _ in range(2)])
    w = (torch.rand(views, rows // 2, rows // 2, generator=generator) * 5 - 4).clamp(min=0)
    w = torch.maximum(w, w.mT)
    w.diagonal(dim1=1, dim2=2).fill_(1)
    return F.normalize(z, dim=-1).requires_grad_(), w


def dense(z: Tensor, weights: Tensor) -> Tensor:
    """Logits of all views at once, as the source."""
    own = torch.eye(len(z), dtype=torch.bool)
    logits = (torch.einsum("rvd,svd->vrs", z, z) / 0.07).masked_fill(own, float("-inf"))
    w = weights.repeat(1, 2, 2).masked_fill(own, 0.0)
    logs = logits.log_softmax(2).masked_fill(own, 0.0)
    return -((w * logs).sum(2) / w.sum(2)).mean()


def workloads(quick: bool) -> list[Workload]:
    shapes = [(64, 3, 32)] if quick else [(256, 10, 768), (4096, 10, 768)]
    bars = {
        # A matrix of 256² fits in a cache, and dense torch is little more than its products, 1 ms each: the product
        # that a symmetric sweep saves pays for its calls, and no more.
        256: (Bar("dense torch", OURS, at_least=0.8),),
        4096: (
            Bar("dense torch", OURS, at_least=2.0),
            # What ten views and their gradients take, either has.
            Bar("dense torch", OURS, at_least=5.0, what="peak_extra_bytes"),
        ),
    }
    return [
        against_dense(
            f"space2 {rows} × {views} views × {width}", (rows, views, width), (16, 2, 16), inputs, tree_loss, dense,
            # Half of the symmetric logits, the gradient; Σ w z of the copies' sums, and its gradient.
            products=[(rows // 2, rows, width, views), (rows, rows, width, views),
                      (rows // 2, rows // 2, width, 2 * views)],
            bars=bars.get(rows, ()), needs=8 * 4 * views * rows * rows, compile=not quick,
        )
        for rows, views, width in shapes
    ]  # fmt: skip
