"""What CLOSE's adapters are made of: where image vectors lie, seen from text vectors, in pairs of another task.

All take vectors as CLIP gives them, and measure between those of length 1; but a mean over captions comes before that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast.ops import _check as check
from fastcontrast.ops._precision import float32

from ._noise import WORD, seeded_normal


def unit(x: Tensor) -> Tensor:  # [B, E]
    """N(x) = x / ‖x‖, in float32 at least; a row of zeros stays one."""
    return torch.nn.functional.normalize(float32(x), dim=-1, eps=1e-12)


def _pairs(op: str, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    check.matrix(op, "text", text)
    check.matrix(op, "image", image, text.shape[1], like="text")
    if len(image) != len(text) or len(text) < 2:
        raise ValueError(f"{op}: image and text must be two pairs or more, got {len(image)} and {len(text)} rows")
    return unit(image.detach()), unit(text.detach())


def mean_shift(image: Tensor, text: Tensor, scale: float = 1.0) -> Tensor:  # [n, E] each
    """scale · (mean N(image) − mean N(text)), [E]."""
    image, text = _pairs("mean_shift", image, text)
    return scale * (image.mean(0) - text.mean(0))


def random_shift(width: int, magnitude: float, seed: int = 0) -> Tensor:
    """A vector [width] of random direction, of length `magnitude`; drawn as of the last step, where no noise gets."""
    return magnitude * unit(seeded_normal(1, width, seed, WORD))[0]


def least_squares(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:  # [n, E] each
    """C [E, E], b [E] of least Σ ‖C N(text) + b − N(image)‖², the smallest C where pairs leave it open."""
    image, text = _pairs("least_squares", image, text)
    matrix = (torch.linalg.pinv(text - text.mean(0)) @ (image - image.mean(0))).T
    return matrix, image.mean(0) - matrix @ text.mean(0)


def covariance(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:  # [n, E] each
    """Mean μ [E] of N(image) − N(text), and L [E, E] with L Lᵀ = Σ (over n − 1), which may be singular: L is
    V √λ of its eigenvectors, not Cholesky's."""
    image, text = _pairs("covariance", image, text)
    d = image - text
    values, vectors = torch.linalg.eigh(d.T.cov())
    return d.mean(0), vectors * values.clamp(min=0).sqrt()
