"""ALIP: two weighted CLIP losses that share the images. The paper's batch: 4096 on 16 GPUs, width 512."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.recipes.alip import alip_loss

from .._harness import OURS, Bar, Workload
from . import MIB, against_dense


def inputs(shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """Features of image, text and caption, weights, scale."""
    generator = torch.Generator().manual_seed(0)
    image, text, caption = (F.normalize(torch.randn(shape, generator=generator), dim=1) for _ in range(3))
    pairs = [F.normalize(image + y, dim=1) for y in (text, caption)]
    weights = torch.rand(2, shape[0], generator=generator)
    return (*(x.requires_grad_() for x in (image, *pairs)), *weights, torch.tensor(1 / 0.07).requires_grad_())


def ours(image: Tensor, text: Tensor, caption: Tensor, of_text: Tensor, of_caption: Tensor, scale: Tensor) -> Tensor:
    return alip_loss(image, text, caption, (of_text, of_caption), scale)


def dense(image: Tensor, text: Tensor, caption: Tensor, of_text: Tensor, of_caption: Tensor, scale: Tensor) -> Tensor:
    total, target = 0.0, torch.arange(len(image))
    for y, weights in ((text, of_text), (caption, of_caption)):
        logits = scale * image @ y.T
        rows, columns = (F.cross_entropy(x, target, reduction="none") for x in (logits, logits.T))
        total = total + (weights * (rows + columns)).mean() / 2
    return total


def workloads(quick: bool) -> list[Workload]:
    rows, width = (512, 64) if quick else (4096, 512)
    make = partial(
        against_dense, shape=(rows, width), tiny=(64, 32), inputs=inputs, dense=dense, needs=12 * 4 * rows * rows
    )
    name = f"alip {rows} × {width}"
    whole = make(
        name, ours=ours, products=[(rows, rows, width, 6)], compile=not quick,
        # Dense torch takes about twice the bare products, which no form can go below.
        bars=() if quick else (Bar(OURS, "products", at_most=1.25), Bar("dense torch", OURS, at_least=1.5)),
    )  # fmt: skip
    if quick:
        return [whole]
    smaller = Bar("dense torch", OURS, at_least=10, what="peak_extra_bytes")
    little = make(
        f"{name}, in 4 MiB", ours=ours, workspace=4 * MIB, products=[(rows, rows, width, 8)], compile=False,
        bars=(smaller, Bar("dense torch", OURS, at_least=1.0)),
    )  # fmt: skip
    return [whole, little]
