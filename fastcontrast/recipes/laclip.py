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
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastcontrast import clip_loss
from fastcontrast.demo.recall import evaluate
from fastcontrast.distributed._exchange import active
from fastcontrast.distributed._sums import count_over_ranks, numbers
from fastcontrast.minilm import minilm_features
from fastcontrast.ops import _check as check
from fastcontrast.ops._formed import formed
from fastcontrast.ops._precision import float32, for_products

from . import _icons
from ._report import Report, Scale, train

STEPS, BATCH, RATE = 80, 1024, 2e-3

# ---------------------------------------------------------------------------------------------------------- objective


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


def sum_in_turn(terms: Sequence[Callable[..., Tensor]], *inputs: Tensor) -> Tensor:
    """Σ term(*inputs), each differentiated as soon as it is known: the logits of no more than one are ever kept."""
    if active() is not None:  # where none keeps logits; and where a second backward would have to find the same ranks
        return torch.stack([term(*inputs) for term in terms]).sum()

    def run(inputs: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        leaves = [for_products(x).detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
        wanted = [i for i, need in enumerate(needs) if need]
        total, gradients = 0.0, [None] * len(inputs)
        for term in terms:
            with torch.set_grad_enabled(any(needs)):
                loss = term(*leaves)
            total = total + loss.detach()
            found = torch.autograd.grad(loss, [leaves[i] for i in wanted], allow_unused=True) if wanted else ()
            for i, g in zip(wanted, found, strict=True):
                if g is not None:
                    gradients[i] = float32(g) if gradients[i] is None else gradients[i] + float32(g)
        return total, tuple(gradients)

    return formed(run, *inputs, op="laclip_mt_loss")


# --------------------------------------------------------------------------------------------------------------- draws


class Draw(nn.Module):
    """Which version each sample of a step shows: r [B], uniform over all V, each on its own.

    Depends on `seed` and on the number of the call alone, which are in `state_dict`. Inside `exchange` it is drawn for
    the whole batch, of which every rank takes its rows.
    """

    def __init__(self, seed: int = 0):
        super().__init__()
        self.register_buffer("seed_and_step", torch.tensor([seed, 0]))

    @torch.no_grad()
    def forward(self, usable: Tensor) -> Tensor:  # [B, V] bool -> [B]
        """Where the drawn version is not usable (see `enough_words`), 0, the original."""
        count, versions = usable.shape
        seed, step = self.seed_and_step.tolist()
        self.seed_and_step[1] += 1
        whole = count_over_ranks(count, usable.device)
        draws = torch.tensor(random.Random(f"{seed}, {step}").choices(range(versions), k=whole), device=usable.device)
        drawn = draws[numbers(count, usable.device)]
        return torch.where(usable.gather(1, drawn[:, None])[:, 0], drawn, 0)


def enough_words(versions: Sequence[Sequence[str]]) -> Tensor:
    """[K, V] of V lists of K texts, the originals first: False where a rewrite has fewer than two words.

    Raises ValueError where a list is not aligned with the originals.
    """
    lengths = [len(texts) for texts in versions]
    if len({*lengths}) != 1:
        raise ValueError(f"enough_words: versions must be lists of as many texts, got {lengths}")
    mask = torch.tensor([[len(text.split()) > 1 for text in texts] for texts in versions]).T
    mask[:, 0] = True
    return mask


# ----------------------------------------------------------------------------------------------------------------- run


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Icons, whose names have four versions: themselves and three rewrites. Unseen names are asked for in the words of
    a fourth rewrite, in which no text of the training is; and as they are. CLIP sees the names alone.
    """
    steps = STEPS if steps is None else steps
    report = Report("laclip", output, steps=steps, seed=seed, limit=limit, batch=BATCH)
    icons = _icons.load(limit)
    *rewrites, held_out = ([*texts] for texts in zip(*map(_icons.rewrites, icons.names), strict=True))
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
