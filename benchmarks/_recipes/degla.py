"""DeGLA's four terms. The paper's batch is 256 with four corruptions a text, width 512."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.recipes.degla import Features, degla_loss

from .._harness import Bar, Workload
from . import against_dense

Shape = tuple[int, int, int]


def inputs(shape: Shape) -> tuple[Tensor, ...]:
    """Image, text, corruptions of the student, then of the teacher; scale."""
    generator, (b, k, d) = torch.Generator().manual_seed(0), shape

    def near(x: Tensor) -> Tensor:
        return F.normalize(x + F.normalize(torch.randn(x.shape, generator=generator), dim=-1), dim=-1)

    image = near(torch.zeros(b, d))
    text = near(image)
    student = image, text, near(text[:, None].expand(b, k, d))
    teacher = [near(x) for x in student]
    return (*(x.requires_grad_() for x in student), *teacher, torch.tensor(1 / 0.07).requires_grad_())


def ours(*given: Tensor) -> Tensor:
    return degla_loss(Features(*given[:3]), Features(*given[3:6]), given[6])


def dense(*given: Tensor) -> Tensor:
    """As the source: matrices [B, B + B·K], −inf where a term has no corruption."""
    (v, t, n, v_star, t_star, n_star), scale = given[:6], given[6]
    b, k = n.shape[:2]
    target, flat = torch.arange(b), n.flatten(0, 1)
    of_images, of_texts = v @ torch.cat([t, flat]).T, t @ torch.cat([t_star, flat]).T
    others = torch.cat([target != target[:, None], (torch.arange(b * k) // k) != target[:, None]], 1)
    base = F.cross_entropy(scale * of_images, target) + F.cross_entropy(scale * (t @ v.T), target)
    local = [F.cross_entropy((s * x).masked_fill(others, float("-inf")), target)
             for s, x in ((scale, of_images), (10.0, of_texts))]  # fmt: skip
    apart = sum((x - y).square().sum() for x, y in ((v, v_star), (t, t_star), (n, n_star)))
    return base / 2 + 0.1 * sum(local) + 0.005 * apart


def workloads(quick: bool) -> list[Workload]:
    bars = {
        256: (),
        2048: (
            Bar("dense torch", "fastcontrast", at_least=2.0),
            Bar("dense torch", "fastcontrast", at_least=4.0, what="peak_extra_bytes"),
        ),
    }
    return [
        against_dense(
            f"degla {b} × {k}", (b, k, d), (16, 2, 32), inputs, ours, dense,
            products=[(b, b * (1 + k), d, 3)],  # one forward, two backward
            bars=() if quick else bars[b], needs=12 * 4 * b * b * (1 + k), compile=not quick,
        )
        for b, k, d in ([(64, 4, 64)] if quick else [(256, 4, 512), (2048, 4, 512)])
    ]  # fmt: skip
