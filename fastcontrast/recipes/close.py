"""CLOSE: a language model learns a task about images from text alone. It reads the text vector of a contrastive model,
with noise so wide that the image's vector, which it reads in the test, lies no further away.

With N(x) = x / ‖x‖ and ε ~ N(0, 1) in each coordinate, in training

    x'     = N(N(u) + w·ε)
    prefix = x' Wᵀ + b, cut into 4 tokens
    L      = mean over the tokens y of all texts of −log p(y_t | prefix, y_<t)

and in the test x' = N(v), v the image's vector. W and the language model learn; no gradient reaches u. `Noise` is this;
`Shift`, `Linear` and `Covariance` first move text vectors to where image vectors are known to lie.

FAQ. How far is w·ε? About w·√E: for w = 0.08 and E = 768 that is 2.2, more than the vector it is added to.
Several captions of an image? Average their vectors before N, `mean_of_groups`; several targets of an input? Index its
prefix, `prefix[inputs]`, and gradients add up. A question as well? Append its embeddings to the prefix, and give
`prefix_loss` a mask where questions differ in length.

Source: Gu et al. 2022, "I Can't Believe There's No Images! Learning Visual Tasks Using only Language Supervision",
arXiv 2211.09778.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcontrast.ops import _check as check
from fastcontrast.ops._precision import float32
from fastcontrast.towers import encode

from . import _icons
from ._close_fits import covariance, least_squares, mean_shift, random_shift, unit
from ._namer import Namer, spread
from ._noise import batch_noise
from ._prefix import Prefix
from ._report import Report, train

STEPS, BATCH, RATE = 120, 64, 3e-3
TOKENS = 4  # of the prefix
WIDTH = 0.07  # w of the run: with E = 256 the noise is as long as with the least of the paper's, 0.04, and E = 768


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


def mean_of_groups(text: Tensor, groups: Tensor, count: int) -> Tensor:  # [n, E], [n] integer
    """Means [count, E] of vectors as they are, row g of those with groups == g, in any order. Raises ValueError for a
    group outside [0, count), or without a row."""
    check.matrix("mean_of_groups", "text", text)
    check.vector("mean_of_groups", "groups", groups, len(text), text, floating=False)
    check.within("mean_of_groups", "groups", groups, 0, count)
    sizes = torch.bincount(groups, minlength=count)
    if not sizes.all():
        raise ValueError(f"mean_of_groups: every group in [0, {count}) must have a row, got none of {sizes.argmin()}")
    text = float32(text)
    return text.new_zeros(count, text.shape[1]).index_add(0, groups.long(), text) / sizes[:, None]


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Says the names of icons: learned on image vectors of a CLIP of icons, as a bound from above; and on text vectors
    alone, without noise and with it. W learns, and so do two layers of SmolLM2. The claim does not show: icons and
    names of this CLIP lie so close together that noise only slows the learning down.
    """
    steps = STEPS if steps is None else steps
    report = Report("close", output, steps=steps, seed=seed, limit=limit, batch=BATCH, w=WIDTH)
    icons = _icons.load(limit)
    clip = icons.clip(seed)
    text, image = encode(clip.name_tower, icons.texts), unit(encode(clip.item_tower, icons.glyphs))
    for label in ("on images", "no noise", "CLOSE"):
        torch.manual_seed(seed)
        namer = Namer(icons)
        prefix = Prefix(text.shape[1], namer.width, TOKENS)
        adapter, batches = Noise(WIDTH if label == "CLOSE" else 0.0, seed), icons.batches(BATCH, seed)

        def prefix_of(rows: Tensor, prefix=prefix) -> Tensor:
            return prefix(spread(image[rows]))

        def step(_: int, label=label, prefix=prefix, adapter=adapter, batches=batches, namer=namer) -> Tensor:
            rows = next(batches)
            x = image[rows] if label == "on images" else adapter(text[icons.ids[rows]])
            return namer.loss(prefix(spread(x)), rows)

        with report.model(label) as found:
            learned = [*prefix.parameters(), *namer.learned]
            found.losses = train(label, steps, learned, step, rate=RATE, clip=1.0)
            found.metrics = namer.metrics(prefix_of, seed)
    weights = nn.ModuleDict({"prefix": prefix, "layers": namer.model.model.layers, "norm": namer.model.model.norm})
    return report.close(weights, namer.picture(prefix_of, seed))
