"""CLIP-Refine's HyCD: student against teacher and identity, raw features. The paper's batch is 512, width 512."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.recipes.clip_refine import hycd_loss

from .._harness import Bar, Workload
from . import against_dense

ALPHA = 0.5


def inputs(shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """Image and text of the student, then of the teacher; of length 5."""
    generator = torch.Generator().manual_seed(0)

    def near(x: Tensor, by: float) -> Tensor:
        return 5 * F.normalize(x + by * F.normalize(torch.randn(shape, generator=generator), dim=1), dim=1)

    image = near(torch.zeros(shape), 1.0)
    text = near(image, 12.0)  # logits of 10 for pairs, others around 0
    return image.requires_grad_(), text.requires_grad_(), *(near(x.detach(), 2.0) for x in (image, text))


def ours(image: Tensor, text: Tensor, teacher_image: Tensor, teacher_text: Tensor) -> Tensor:
    return hycd_loss(image, text, teacher_image, teacher_text, alpha=ALPHA)


def dense(image: Tensor, text: Tensor, teacher_image: Tensor, teacher_text: Tensor) -> Tensor:
    logits, of_teacher, total = image @ text.T, teacher_image @ teacher_text.T, 0.0
    for x, y in ((logits, of_teacher), (logits.T, of_teacher.T)):
        target = (1 - ALPHA) * y.softmax(1)
        target.diagonal().add_(ALPHA)
        total = total + F.kl_div(x.log_softmax(1), target, reduction="batchmean") / 2
    return total


def workloads(quick: bool) -> list[Workload]:
    bars = {
        512: (),
        4096: (Bar("dense torch", "fastcontrast", at_least=10.0, what="peak_extra_bytes"),),
    }
    return [
        against_dense(
            f"clip_refine {rows} × {width}", (rows, width), (64, 32), inputs, ours, dense,
            products=[(rows, rows, width, 6)],  # both matrices twice, without a place to keep them, and two gradients
            bars=() if quick else bars[rows], needs=12 * 4 * rows * rows, compile=not quick,
        )
        for rows, width in ([(256, 64)] if quick else [(512, 512), (4096, 512)])
    ]  # fmt: skip
