"""CLOC: the loss of regions and their texts, filtered. The paper's R: 32,768 images × 4 regions, E = 512 or 768.

At R = 131,072 and E = 512 a dense form has two matrices of 64 GiB, logits and the texts' cosines, before its backward;
ours needs 256 MiB each for regions, texts and their gradients, and the workspace.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.recipes.cloc import region_text_loss

from .._harness import Bar, Workload
from . import against_dense


def inputs(shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """Regions, texts, scale; each text has another one near to it, most of them nearer than 0.9."""
    generator = torch.Generator().manual_seed(0)
    rows, width = shape
    words = F.normalize(torch.randn((rows + 1) // 2, width, generator=generator), dim=1).repeat(2, 1)[:rows]
    far = torch.linspace(0.05, 0.4, rows)[torch.randperm(rows, generator=generator), None] * width**-0.5
    texts = F.normalize(words + far * torch.randn(rows, width, generator=generator), dim=1)
    regions = F.normalize(texts + 1.5 * width**-0.5 * torch.randn(rows, width, generator=generator), dim=1)
    return regions.requires_grad_(), texts.requires_grad_(), torch.tensor(1 / 0.07).requires_grad_()


def dense(regions: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Logits and texts' cosines, [R, R] both; the mask is written into the logits."""
    logits, target = scale * regions @ texts.T, torch.arange(len(regions))
    with torch.no_grad():
        masked = (texts @ texts.T > 0.9).fill_diagonal_(False)
    logits = logits.masked_fill_(masked, float("-inf"))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def workloads(quick: bool) -> list[Workload]:
    rows, width = (512, 64) if quick else (16384, 512)
    # Memory is what is claimed. Of six products, against the dense form's four, two compute again in the backward what
    # the dense form keeps.
    bars = (Bar("dense torch", "fastcontrast", at_least=10.0, what="peak_extra_bytes"),)
    return [
        against_dense(
            f"cloc {rows} × {width}", (rows, width), (64, 32), inputs, region_text_loss, dense,
            products=[(rows, rows, width, 4)],  # logits, cosines of texts, and two in the backward
            bars=() if quick else bars, needs=5 * 4 * rows * rows, compile=False, reps=None if quick else 2,
        )
    ]  # fmt: skip
