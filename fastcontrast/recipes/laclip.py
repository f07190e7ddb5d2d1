"""LaCLIP: every caption was rewritten M times beforehand, and a step shows one of the versions, drawn anew at each
visit. LaCLIP-MT shows them all.

With unit features v_i of images and t_i^r of version r of their texts, r = 0 the original, V = M + 1 versions:

    LaCLIP      L = CLIP's loss of the pairs (v_i, t_i^{r_i}),  r_i uniform in 0 … M, for each sample on its own;
                    a drawn rewrite of fewer than two words gives way to the original
    LaCLIP-MT   L = 1/V Σ_r L^r,  L^r = CLIP's loss of the pairs (v_i, t_i^r): only texts of one version compete

    MT where versions are missing (R_i are those of image i; l_i^r is among the images that have version r):
                L = 1/B Σ_i 1/|R_i| Σ_{r ∈ R_i} l_i^r,  l_i^r = CLIP's loss of pair i, half from either side

FAQ. Is MT what LaCLIP is on average? Only if all samples of a batch drew the same version: else negatives mix versions.
Do equal texts of two images compete? Yes, as in CLIP, which is LaCLIP without rewrites.

Source: Fan et al. 2023, "Improving CLIP Training with Language Rewrites", arXiv 2305.20088. The last equation is ours.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastcontrast import clip_loss
from fastcontrast.demo.recall import evaluate
from fastcontrast.distributed._sums import count_over_ranks
from fastcontrast.minilm import minilm_features
from fastcontrast.ops import _check as check

from ._parts.laclip_draw import Draw, enough_words
from ._parts.laclip_in_turn import sum_in_turn
from ._shared.icons import load_icons, rewrites_of
from ._shared.report import Report, Scale, train

__all__ = ["Draw", "enough_words", "laclip_mt_loss", "run"]

STEPS, BATCH, RATE = 80, 1024, 2e-3


def laclip_mt_loss(
    image: Tensor,  # [B, D]
    texts: Sequence[Tensor],  # V of [B, D]
    scale: float | Tensor,
    valid: Tensor | None = None,  # [B, V] bool
) -> Tensor:
    """1/B Σ_i 1/|R_i| Σ_{r ∈ R_i} l_i^r: CLIP's loss once a version; features of length 1.

    Args:
        valid: which versions there are, of each image at least one; rows of `texts` elsewhere take no part.

    Raises ValueError naming what does not fit.
    """
    op = "laclip_mt_loss"
    check.matrix(op, "image", image)
    count, width = image.shape
    if not len(texts):
        raise ValueError(f"{op}: texts must be of at least one version, got none")
    for r, text in enumerate(texts):
        check.matrix(op, f"texts[{r}]", text, width, like="image")
        if len(text) != count:
            raise ValueError(f"{op}: texts[{r}] must have a row an image, {count}, got {len(text)}")
    if valid is not None and (valid.shape != (count, len(texts)) or valid.dtype != torch.bool):
        got = f"{valid.dtype} {list(valid.shape)}"
        raise ValueError(f"{op}: valid must be bool [{count}, {len(texts)}], got {got}")
    if valid is not None and not valid.any(1).all():
        raise ValueError(f"{op}: valid must be of at least one version of each image, got an image with none")
    scale = check.scalar(op, "scale", scale, image)
    return sum_in_turn([partial(_of_version, r, valid) for r in range(len(texts))], image, scale, *texts)


def _of_version(r: int, valid: Tensor | None, image: Tensor, scale: Tensor, *texts: Tensor) -> Tensor:
    """What version r adds."""
    if valid is None:
        return clip_loss(image, texts[r], scale) / len(texts)
    rows = valid[:, r].nonzero()[:, 0]
    whole = max(1, count_over_ranks(len(image), image.device))
    weights = 1 / (whole * valid[rows].sum(1).to(torch.promote_types(image.dtype, torch.float32)))
    return clip_loss(image[rows], texts[r][rows], scale, weights=weights, reduction="sum")


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Icons, whose names have four versions: themselves and three rewrites. Unseen names are asked for in the words of
    a fourth rewrite, in which no text of the training is; and as they are. CLIP sees the names alone.
    """
    steps = STEPS if steps is None else steps
    report = Report("laclip", output, steps=steps, seed=seed, limit=limit, batch=BATCH)
    icons = load_icons(limit)
    *rewrites, held_out = ([*texts] for texts in zip(*map(rewrites_of, icons.names), strict=True))
    features = torch.stack([icons.texts, *map(minilm_features, rewrites)])  # [V, K, 384]
    in_other_words, mask = minilm_features(held_out), enough_words([icons.names, *rewrites])
    for label in ("CLIP", "LaCLIP", "LaCLIP-MT"):
        model, scale, draw = icons.towers(seed), Scale(), Draw(seed)
        batches = icons.batches(BATCH, seed)

        def step(_: int, label=label, model=model, scale=scale, draw=draw, batches=batches) -> Tensor:
            rows = next(batches)
            image, ids = model.item_tower(icons.glyphs[rows]), icons.ids[rows]
            if label == "LaCLIP-MT":
                texts = [model.name_tower(x[ids]) for x in features]
                return laclip_mt_loss(image, texts, scale(), mask[ids])
            drawn = draw(mask[ids]) if label == "LaCLIP" else torch.zeros_like(ids)
            return clip_loss(image, model.name_tower(features[drawn, ids]), scale())

        with report.model(label) as found:
            learned = [*model.parameters(), *scale.parameters()]
            found.losses = train(label, steps, learned, step, rate=RATE, decay=0.1, after=scale.clamp)
            asked = evaluate(model, icons.glyphs, in_other_words, icons.pairs)
            found.metrics = {
                "other words → icon R@1, %": 100 * asked["name_to_item"]["1"],
                "icon → other words R@1, %": 100 * asked["item_to_name"]["1"],
                **icons.recall(model),
            }
    return report.close(model)
