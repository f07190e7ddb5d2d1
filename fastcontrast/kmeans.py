"""K-means without the matrix of distances between rows and centroids.

argmin_k |x_i − c_k|² = argmax_k ⟨x_i, c_k⟩ − |c_k|² / 2: the largest inner product of [x_i, 1] and [c_k, −|c_k|² / 2].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops import _check as check
from .ops import similarity_topk
from .ops._precision import float32


class Clusters(NamedTuple):
    """What `kmeans` found: centroids [K, D]; the cluster of each row [N]; Σ_i |x_i − its centroid|², float64."""

    centroids: Tensor
    labels: Tensor
    inertia: Tensor


@torch.no_grad()
def kmeans(x: Tensor, k: int, *, iterations: int = 20, restarts: int = 3, seed: int = 0) -> Clusters:  # [N, D]
    """label_i = argmin_k |x_i − c_k|², then c_k = mean of the rows with label k, again and again; at last the labels.

    Of several restarts the one of least inertia. A restart begins with K different rows of x; of equally near centroids
    a row takes the first; a centroid that lost all its rows stays where it is. Memory: a copy of x, and a tile.

    Args:
        x: [N, D], finite; half precision counts as float32 (float64: dense reference). Products are summed in float32:
            subtract a mean much longer than the differences of rows.
        k: 1 … N.
        iterations: most sets of new centroids in a restart, which ends earlier where no label changed.

    Raises: ValueError or TypeError naming the argument, what was expected and what came.
    """
    check.matrix("kmeans", "x", x)
    n = x.shape[0]
    if not 1 <= k <= n:
        raise ValueError(f"kmeans: k must lie in [1, {n}], the number of rows, got {k}")
    for name, value, least in (("iterations", iterations, 0), ("restarts", restarts, 1)):
        if value < least:
            raise ValueError(f"kmeans: {name} must be at least {least}, got {value}")
    if not x.isfinite().all():
        raise ValueError("kmeans: x must be finite, got NaN or infinity")
    generator = torch.Generator().manual_seed(seed)
    first = (torch.randperm(n, generator=generator)[:k].to(x.device) for _ in range(restarts))
    return min((_lloyd(float32(x), rows, iterations) for rows in first), key=lambda found: found.inertia)


def _lloyd(x: Tensor, first: Tensor, iterations: int) -> Clusters:  # [N, D], [K]
    centroids = x[first]
    labels = nearest(x, centroids)
    for _ in range(iterations):
        means, counts = segment_mean(x, labels, len(centroids))
        centroids = torch.where(counts[:, None] > 0, means, centroids)
        before, labels = labels, nearest(x, centroids)
        if torch.equal(before, labels):
            break
    parts = zip(x.split(1 << 14), labels.split(1 << 14), strict=True)
    inertia = sum((rows - centroids[own]).square_().sum(dtype=torch.float64) for rows, own in parts)
    return Clusters(centroids, labels, inertia)


def nearest(x: Tensor, centroids: Tensor) -> Tensor:  # [N, D], [K, D]
    """Index of each row's nearest centroid [N]; of equals the first."""
    half = centroids.square().sum(1, keepdim=True) / 2
    return similarity_topk(F.pad(x, (0, 1), value=1.0), torch.cat([centroids, -half], 1), 1)[1][:, 0]


def segment_mean(x: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:  # [N, D], [N] in 0 … k − 1
    """The mean of the rows of each label [k, D], zeros where it has none; and how many it has [k]."""
    check.matrix("segment_mean", "x", x)
    check.vector("segment_mean", "labels", labels, x.shape[0], x, floating=False)
    check.within("segment_mean", "labels", labels, 0, k)
    x, labels = float32(x), labels.long()
    counts = torch.bincount(labels, minlength=k)
    return x.new_zeros(k, x.shape[1]).index_add(0, labels, x) / counts.clamp(min=1)[:, None], counts
