"""DreamLIP: each of 7 sentences against all images, and 7168 pooled vectors against as many sentences; 49 patches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.recipes.dreamlip import circle_loss, dreamlip_loss

from .._harness import Bar, Workload
from . import MIB, Product, against_dense

Shape = tuple[int, int, int, int]  # B, K, M, E


def inputs(shape: Shape) -> tuple[Tensor, ...]:
    """Features of images, sentences and patches that resemble each other, and the two scales."""
    count, k, m, width = shape
    generator = torch.Generator().manual_seed(0)
    image, texts, patches = (
        torch.randn(count, n, width, generator=generator) + 0.5 * torch.randn(count, 1, width, generator=generator)
        for n in (1, k, m)
    )
    features = [F.normalize(x + image, dim=-1).requires_grad_() for x in (torch.zeros_like(image), texts, patches)]
    image, texts, patches = features
    return image, texts, patches, *(torch.tensor(x).requires_grad_() for x in (1 / 0.07, 1 / 0.07))


def ours(image: Tensor, texts: Tensor, patches: Tensor, scale: Tensor, local_scale: Tensor) -> Tensor:
    return dreamlip_loss(image[:, 0], texts, patches, scale, local_scale)


def dense(image: Tensor, texts: Tensor, patches: Tensor, scale: Tensor, local_scale: Tensor) -> Tensor:
    k = texts.shape[1]
    loss = sum(symmetric(scale * image[:, 0] @ texts[:, i].T) for i in range(k)) / k
    scores = torch.einsum("bke,bme->bkm", texts, patches)
    low, high = scores.min(-1, keepdim=True).values, scores.max(-1, keepdim=True).values
    weights = (scores - low) / (high - low + 1e-10)
    weights = weights / weights.sum(-1, keepdim=True)
    pooled = F.normalize(torch.einsum("bkm,bme->bke", weights, patches), dim=-1)
    return loss + symmetric(local_scale * texts.flatten(0, 1) @ pooled.flatten(0, 1).T)


def symmetric(logits: Tensor) -> Tensor:
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def circle_inputs(shape: Shape) -> tuple[Tensor, ...]:
    image, texts, *_ = inputs(shape)
    return image, texts


def ours_circle(image: Tensor, texts: Tensor) -> Tensor:
    return circle_loss(image[:, 0], texts)


def dense_circle(image: Tensor, texts: Tensor) -> Tensor:
    cosines = torch.einsum("be,nke->bnk", image[:, 0], texts)
    own = torch.eye(len(image), dtype=torch.bool)
    positive = cosines[own]
    pull = (-32 * (1.25 - positive).relu().detach() * (positive - 0.75)).logsumexp(1)
    push = (32 * (cosines + 0.25).relu().detach() * (cosines - 0.25)).masked_fill(own[..., None], float("-inf"))
    return F.softplus(pull + push.flatten(1).logsumexp(1)).mean()


def workloads(quick: bool) -> list[Workload]:
    shape: Shape = (64, 3, 9, 64) if quick else (1024, 7, 49, 512)
    count, k, m, width = shape
    size = f"{count} × {k}, {m} patches × {width}"
    all_pairs, needs = count * k, 8 * 4 * (count * k) ** 2
    # Each one product forward and two backward; those with the patches, 1 % of the work, are left out.
    products: list[Product] = [(count, count, width, 3 * k), (all_pairs, all_pairs, width, 3)]
    bars = (
        Bar("dense torch", "fastcontrast", at_least=1.5),  # which takes about twice the bare products
        Bar("dense torch", "fastcontrast", at_least=4.0, what="peak_extra_bytes"),
    )
    little_bars = (
        Bar("dense torch", "fastcontrast", at_least=1.0),
        Bar("dense torch", "fastcontrast", at_least=10.0, what="peak_extra_bytes"),
    )
    # Its tiny size has two tiles: the first that is computed again in a backward imports what torch needs for that.
    circle_bars = (Bar("dense torch", "fastcontrast", at_least=4.0, what="peak_extra_bytes"),)
    common = {"compile": not quick, "needs": needs}
    more: list[Product] = [(count, count, width, 4 * k), (all_pairs, all_pairs, width, 4)]
    little = against_dense(
        f"dreamlip {size}, in 4 MiB", shape, (16, 2, 5, 32), inputs, ours, dense, products=more, workspace=4 * MIB,
        bars=little_bars, needs=needs, compile=False,
    )  # fmt: skip
    return [
        against_dense(
            f"dreamlip {size}", shape, (16, 2, 5, 32), inputs, ours, dense, products=products,
            bars=() if quick else bars, **common,
        ),
        *([] if quick else [little]),
        against_dense(
            f"dreamlip circle {size}", shape, (160, 2, 5, 32), circle_inputs, ours_circle, dense_circle,
            products=[(count, all_pairs, width, 3)], bars=() if quick else circle_bars, **common,
        ),
    ]  # fmt: skip
