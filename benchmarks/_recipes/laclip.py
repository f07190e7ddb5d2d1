"""LaCLIP: CLIP's loss of one drawn version, at B = 8192; LaCLIP-MT: of five versions, at B = 4096; width 512."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast import clip_loss
from fastcontrast.recipes.laclip import laclip_mt_loss

from .._harness import OURS, Bar, Workload
from . import against_dense


def inputs(shape: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """Scale, image [B, E], and V texts of it."""
    versions, *size = shape
    generator = torch.Generator().manual_seed(0)
    image, *noise = (F.normalize(torch.randn(size, generator=generator), dim=1) for _ in range(versions + 1))
    texts = [F.normalize(image + y, dim=1) for y in noise]
    return (torch.tensor(1 / 0.07).requires_grad_(), *(x.requires_grad_() for x in (image, *texts)))


def ours(scale: Tensor, image: Tensor, *texts: Tensor) -> Tensor:
    return laclip_mt_loss(image, texts, scale) if len(texts) > 1 else clip_loss(image, texts[0], scale)


def dense(scale: Tensor, image: Tensor, *texts: Tensor) -> Tensor:
    total, target = 0.0, torch.arange(len(image))
    for text in texts:
        logits = scale * image @ text.T
        total = total + (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return total / len(texts)


def workload(name: str, shape: tuple[int, int, int], products: int, faster: float, **options) -> Workload:
    """`products` for each matrix; `faster` than the dense form."""
    versions, rows, width = shape
    bars = (
        Bar(OURS, "products", at_most=1.25),
        Bar("dense torch", OURS, at_least=faster),
        Bar("dense torch", OURS, at_least=10, what="peak_extra_bytes"),
    )
    return against_dense(
        f"{name} {rows} × {width}", shape, (versions, 64, 32), inputs, ours, dense,
        products=[(rows, rows, width, products * versions)], bars=bars, needs=6 * 4 * versions * rows**2, **options,
    )  # fmt: skip


def workloads(quick: bool) -> list[Workload]:
    many = "laclip MT, 5 versions of"
    if quick:
        return [replace(workload(many, (5, 256, 64), 3, 0, compile=False), bars=())]
    # The logits of 4096 pairs fit into the workspace; of 8192 most are computed again, where dense torch stores them.
    return [workload("laclip", (1, 8192, 512), 4, faster=1.25), workload(many, (5, 4096, 512), 3, faster=1.5, reps=5)]
