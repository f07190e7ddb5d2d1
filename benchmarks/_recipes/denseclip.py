"""DenseCLIP: cosines of pixels and classes, and the two losses over upsampled maps. The paper's sizes on ADE20K: RN50
with 512 × 512 pixels, ViT-B/16 with 640 × 640, 150 classes; two images where the paper has four a GPU."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.recipes.denseclip import AUXILIARY, TAU, score_maps, segmentation_loss

from .._harness import OURS, Bar, Workload
from . import against_dense


class Shape(NamedTuple):
    k: int
    c: int
    side: int  # of z
    size: int  # of the labels; the decoder's logits have a quarter


def inputs(shape: Shape) -> tuple[Tensor, ...]:
    """The decoder's logits, z, T̂, and labels, of which a tenth is ignored."""
    generator = torch.Generator().manual_seed(0)
    k, c, side, size = shape
    drawn = ((2, k, size // 4, size // 4), (2, c, side, side), (2, k, c))
    labels = torch.randint(k, (2, size, size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    return (*(torch.randn(x, generator=generator).requires_grad_() for x in drawn), labels)


def ours(logits: Tensor, z: Tensor, text: Tensor, labels: Tensor) -> Tensor:
    return segmentation_loss(logits, score_maps(z, text), labels)


def dense(logits: Tensor, z: Tensor, text: Tensor, labels: Tensor) -> Tensor:
    scores = torch.einsum("bkc,bchw->bkhw", F.normalize(text, dim=2), F.normalize(z, dim=1))
    total = 0.0
    for maps, weight in ((logits, 1.0), (scores / TAU, AUXILIARY)):
        up = F.interpolate(maps, labels.shape[1:], mode="bilinear", align_corners=False)
        total = total + weight * F.cross_entropy(up, labels, ignore_index=255)
    return total


def workloads(quick: bool) -> list[Workload]:
    shapes = [Shape(20, 64, 4, 128)] if quick else [Shape(150, 1024, 16, 512), Shape(150, 512, 40, 640)]
    bars = Bar("dense torch", OURS, at_least=2.0), Bar("dense torch", OURS, at_least=10, what="peak_extra_bytes")
    make = partial(
        against_dense, tiny=Shape(20, 64, 4, 128), inputs=inputs, ours=ours, dense=dense, reps=3,
        bars=() if quick else bars,
    )  # fmt: skip
    return [
        make(
            f"denseclip {x.k} × {x.side}² → {x.size}²", x, products=[(x.k, x.side**2, x.c, 6)],
            needs=10 * 4 * 2 * x.k * x.size**2, compile=x.size == 512,
        ) for x in shapes
    ]  # fmt: skip
