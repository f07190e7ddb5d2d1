"""SimCTG: likelihood and contrast of one batch, at GPT-2's size. The paper's batch has 128 texts of 256 tokens, 16 such
micro-batches as eight texts make one; the contrastive term alone is in `token_contrast_margin`, up to 4,096 tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.recipes.simctg import simctg_loss

from .._harness import OURS, Bar, Workload
from ..token_contrast_margin import MARGIN, Shape, make_problem, simctg
from . import against_dense


def inputs(shape: tuple[int, int, int, int]) -> tuple[Tensor, ...]:
    """States, the head, labels."""
    b, s, d, v = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(v, d, generator=generator) / d**0.5
    labels = torch.randint(v, (b, s), generator=generator)
    return make_problem(Shape("simctg", b, s, d)).hidden, weight.requires_grad_(), labels


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return simctg_loss(hidden, weight, labels, margin=MARGIN)


def dense(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten()) + simctg(hidden)


def workloads(quick: bool) -> list[Workload]:
    b, s, d, v = shape = (4, 64, 64, 2000) if quick else (8, 256, 768, 50_257)
    return [
        against_dense(
            f"simctg {b} × {s} tokens × {d}, vocabulary {v}", shape, (2, 32, 32, 512), inputs, ours, dense,
            products=[(b * s, v, d, 3)], compile=not quick, needs=16 * b * s * v, reps=5,
            # Dense torch spends the same three products; what it cannot do is spend them without the logits.
            bars=() if quick else (
                Bar("dense torch", OURS, at_least=4, what="peak_extra_bytes"),
                Bar("dense torch", OURS, at_least=1.0),
                Bar(OURS, "products", at_most=1.25),
            ),
        )
    ]  # fmt: skip
