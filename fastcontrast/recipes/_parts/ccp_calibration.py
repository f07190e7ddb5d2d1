"""CCP's calibration: languages are shifted, scaled and turned onto each other, without a parallel text."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcontrast.ops import _check as check
from fastcontrast.ops import similarity_topk

EPS = 1e-6  # below it a dimension's deviation is rounding: such a dimension becomes 0


class Calibration(nn.Module):
    """x ↦ R ((x − μ) / σ) of one language: its mean and deviation (over n, not n − 1), and an orthogonal R.

    All is in `state_dict`; fresh, it changes nothing. `fit` sets μ and σ, `turn_towards` R.
    """

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.register_buffer("rotation", torch.eye(width))

    def forward(self, x: Tensor) -> Tensor:  # [N, D]
        return ((x - self.mean) / self.deviation) @ self.rotation.T

    @torch.no_grad()
    def fit(self, x: Tensor) -> Calibration:  # [N, D]
        """By the embeddings of a language. Raises ValueError without a row."""
        check.matrix("Calibration.fit", "x", x, len(self.mean), like="the calibration")
        if not len(x):
            raise ValueError("Calibration.fit: x must have at least 1 row, got 0")
        self.mean.copy_(x.mean(0))
        deviation = x.std(0, correction=0)
        self.deviation.copy_(torch.where(deviation > EPS, deviation, torch.inf))
        return self

    @torch.no_grad()
    def turn_towards(self, x: Tensor, pivot: Tensor, rounds: int = 5) -> Calibration:  # [N, D], [M, D]
        """R by Procrustes over `mutual_pairs` of embeddings x and of calibrated ones of a pivot language, found anew
        after each turn."""
        for _ in range(rounds):
            own, other = mutual_pairs(self(x), pivot)
            self.rotation.copy_(procrustes(self(x[own]), pivot[other]) @ self.rotation)
        return self


def mutual_pairs(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # [N, D], [M, D]
    """Rows of x and of y that are each other's most similar by cosine: what stands in for translations."""
    x, y = (F.normalize(a, dim=-1) for a in (x, y))
    there, back = (similarity_topk(a, b, 1)[1][:, 0] for a, b in ((x, y), (y, x)))
    own = (back[there] == torch.arange(len(x), device=x.device)).nonzero()[:, 0]
    return own, there[own]


def procrustes(x: Tensor, y: Tensor) -> Tensor:  # [P, D], [P, D]
    """R = U Vᵀ with U S Vᵀ = svd(Yᵀ X): the orthogonal matrix [D, D] that minimises ‖X Rᵀ − Y‖."""
    if x.shape != y.shape:
        raise ValueError(f"procrustes: y must be {list(x.shape)} to match x, got {list(y.shape)}")
    u, _, v = torch.linalg.svd(y.T @ x)
    return u @ v
