"""CLOSE's adapters: noise alone, or after text vectors moved to where image vectors lie, as pairs of another task
tell.

All take vectors as CLIP gives them, and measure between those of length 1; but a mean over captions comes before that.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcontrast.ops import _check as check
from fastcontrast.ops._precision import float32

from .._shared.noise import WORD, batch_noise, seeded_normal


def unit(x: Tensor) -> Tensor:  # [B, E]
    """N(x) = x / ‖x‖, in float32 at least; a row of zeros stays one."""
    return F.normalize(float32(x), dim=-1, eps=1e-12)


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


class Noise(nn.Module):
    """x' = N(move(N(u)) + w·ε) in training, move(N(u)) in eval; here nothing moves. `steps` counts batches, and is in
    `state_dict`: a row of the whole batch has the same noise on any number of ranks, in each step another.

    Args:
        w: standard deviation of the noise in each coordinate.
        seed: of the noise.
    """

    draws = 1  # numbers of noise a coordinate

    def __init__(self, w: float = 0.08, seed: int = 0):
        super().__init__()
        self.w, self.seed = w, seed
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def move(self, x: Tensor) -> Tensor:  # [B, E]
        return x

    def scatter(self, x: Tensor, eps: Tensor) -> Tensor:  # [B, E], [B, draws·E]
        return x + self.w * eps

    def forward(self, text: Tensor, eps: Tensor | None = None) -> Tensor:  # [B, E], [B, draws·E]
        """Of text vectors as CLIP gives them; `eps` replaces the noise. Raises ValueError naming what does not fit."""
        check.matrix("close", "text", text)
        x = self.move(unit(text.detach()))
        if not self.training:
            return x
        rows, columns = len(x), self.draws * x.shape[1]
        if eps is None:
            eps = batch_noise(rows, columns, self.seed, self.steps, x)
            self.steps += 1
        elif eps.shape != (rows, columns):
            raise ValueError(f"close: eps must be [{rows}, {columns}], got {list(eps.shape)}")
        return unit(self.scatter(x, eps))


class Shift(Noise):
    """move(x) = x + d, or N of it with `renormalise`."""

    def __init__(self, shift: Tensor, *, renormalise: bool = False, **settings: Any):  # [E]
        super().__init__(**settings)
        self.renormalise = renormalise
        self.register_buffer("shift", shift)

    @classmethod
    def of_pairs(cls, image: Tensor, text: Tensor, scale: float = 1.0, **settings: Any) -> Shift:  # [n, E] each
        """d = scale · (mean N(image) − mean N(text))."""
        return cls(mean_shift(image, text, scale), **settings)

    @classmethod
    def random(cls, width: int, magnitude: float, **settings: Any) -> Shift:
        """d of random direction, of length `magnitude`: what any shift would do."""
        return cls(random_shift(width, magnitude, settings.get("seed", 0)), **settings)

    def move(self, x: Tensor) -> Tensor:
        x = x + self.shift
        return unit(x) if self.renormalise else x


class Linear(Noise):
    """move(x) = N(C x + b)."""

    def __init__(self, matrix: Tensor, bias: Tensor, **settings: Any):  # [E, E], [E]
        super().__init__(**settings)
        self.register_buffer("matrix", matrix)
        self.register_buffer("bias", bias)

    @classmethod
    def of_pairs(cls, image: Tensor, text: Tensor, **settings: Any) -> Linear:  # [n, E] each
        """C and b of ordinary least squares, N(image) on N(text)."""
        return cls(*least_squares(image, text), **settings)

    def move(self, x: Tensor) -> Tensor:
        return unit(F.linear(x, self.matrix, self.bias))


class Covariance(Noise):
    """x' = N(x + μ + 3·L ξ + w·ε) in training, ξ ~ N(0, 1); the 3 is the released code's."""

    draws = 2

    def __init__(self, mean: Tensor, factor: Tensor, **settings: Any):  # [E], [E, E]
        super().__init__(**settings)
        self.register_buffer("mean", mean)
        self.register_buffer("factor", factor)

    @classmethod
    def of_pairs(cls, image: Tensor, text: Tensor, **settings: Any) -> Covariance:  # [n, E] each
        """μ and L Lᵀ of N(image) − N(text): mean and covariance, which may be singular."""
        return cls(*covariance(image, text), **settings)

    def scatter(self, x: Tensor, eps: Tensor) -> Tensor:
        eps, xi = eps.chunk(2, 1)
        return x + self.mean + 3 * F.linear(xi, self.factor) + self.w * eps
