"""ProtoCLIP at the sizes of its paper: K = 20,000 prototypes of width 128, batch 512.

A step takes the targets T as they are made once an episode; the dense form makes its B × K targets in every step. What
making T costs is the second workload: an episode has 390 steps. The third is one assignment of K-means.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.kmeans import nearest
from fastcontrast.recipes._parts.protoclip_episode import soft_targets
from fastcontrast.recipes.protoclip import proto_loss

from .._harness import Bar, Workload
from . import against_dense

TAU = 0.01
BLOCK = 1024  # rows of a float64 truth that would not fit as a whole


def clusters(k: int, d: int) -> tuple[Tensor, Tensor]:
    """Prototypes and centroids: shorter than 1, as means of unit rows are; the latter so much that targets are soft."""
    generator = torch.Generator().manual_seed(0)
    prototypes, teacher = (F.normalize(torch.randn(k, d, generator=generator), dim=1) for _ in range(2))
    return 0.7 * prototypes, 0.3 * teacher


def step_inputs(shape: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """Features, scale, prototypes, targets, centroids, labels."""
    rows, k, d = shape
    prototypes, teacher = clusters(k, d)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(k, (rows,), generator=generator)
    features = F.normalize(prototypes[labels] + 0.1 * torch.randn(rows, d, generator=generator), dim=1)
    scale = torch.tensor(1 / 0.07).requires_grad_()
    return features.requires_grad_(), scale, prototypes, soft_targets(teacher, prototypes, TAU), teacher, labels


def ours(features: Tensor, scale: Tensor, prototypes: Tensor, targets: Tensor, _: Tensor, labels: Tensor) -> Tensor:
    return proto_loss(features, prototypes, labels, scale, targets=targets)


def dense(features: Tensor, scale: Tensor, prototypes: Tensor, _: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    q = (teacher[labels] @ teacher.T / TAU).softmax(1)
    return F.cross_entropy(scale * features @ prototypes.T, q)


def dense_targets(prototypes: Tensor, teacher: Tensor) -> Tensor:
    return (teacher @ teacher.T / TAU).softmax(1) @ prototypes


def true_targets(prototypes: Tensor, teacher: Tensor) -> Tensor:
    return torch.cat([(rows @ teacher.T / TAU).softmax(1) @ prototypes for rows in teacher.split(BLOCK)])


def of_nearest(x: Tensor, centroids: Tensor, index: Tensor) -> Tensor:
    """Distances, since of two centroids that are equally near to rounding either is right."""
    return (x - centroids[index]).norm(dim=1)


def true_nearest(x: Tensor, centroids: Tensor) -> Tensor:
    return torch.cat([torch.cdist(rows, centroids).amin(1) for rows in x.split(BLOCK)])


def workloads(quick: bool) -> list[Workload]:
    rows, k, d = (64, 700, 32) if quick else (512, 20_000, 128)
    tiny, matrix = (64, 32), 4 * k * k
    bars = (
        Bar("dense torch", "fastcontrast", at_least=2.0),
        Bar("dense torch", "fastcontrast", at_least=10.0, what="peak_extra_bytes"),
    )
    shown = () if quick else bars
    return [
        against_dense(
            f"protoclip step {rows} × {k}", (rows, k, d), (64, *tiny), step_inputs, ours, dense,
            products=[(rows, k, d, 2)], bars=shown, needs=8 * 4 * rows * k, compile=not quick,
        ),
        against_dense(
            f"protoclip targets {k}", (k, d), tiny, lambda shape: clusters(*shape),
            lambda prototypes, teacher: soft_targets(teacher, prototypes, TAU), dense_targets, truth=true_targets,
            products=[(k, k, d, 2)], bars=shown[1:], needs=3 * matrix, compile=False,
        ),
        against_dense(
            f"protoclip assign {k} × {k}", (k, d), tiny, lambda shape: clusters(*shape),
            lambda x, centroids: of_nearest(x, centroids, nearest(x, centroids)),
            lambda x, centroids: of_nearest(x, centroids, torch.cdist(x, centroids).argmin(1)), truth=true_nearest,
            products=[(k, k, d, 1)], bars=shown[1:], needs=3 * matrix, compile=False,
        ),
    ]  # fmt: skip
