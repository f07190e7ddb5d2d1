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

from fastcontrast.ops import _check as check
from fastcontrast.ops._precision import float32
from fastcontrast.towers import encode

from ._parts.close_adapters import Covariance, Linear, Noise, Shift, unit
from ._shared.icons import load_icons
from ._shared.namer import Namer, spread
from ._shared.prefix import Prefix, prefix_loss
from ._shared.report import Report, train

__all__ = ["Covariance", "Linear", "Noise", "Prefix", "Shift", "mean_of_groups", "prefix_loss", "run"]

STEPS, BATCH, RATE = 120, 64, 3e-3
TOKENS = 4  # of the prefix
WIDTH = 0.07  # w of the run: with E = 256 the noise is as long as with the least of the paper's, 0.04, and E = 768


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
    icons = load_icons(limit)
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
