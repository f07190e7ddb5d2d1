"""CLOC: image tokens that can be asked. A prompter, one transformer layer over a box (or a text) and the tokens of an
image, gives the embedding of that region. Boxes and their captions get a contrastive loss of their own, in which texts
that say nearly the same do not compete; from a text the prompter finds the box again.

B images with captions and tokens F; R regions in all, 0 … M an image. Region r, of image i, has a box b_r and a text:

    z_r = Prompter(box b_r, F_i),   t_r = Prompter(text w_r, F_i),   u = N(z), w = N(text tower),   N(x) = x / |x|
    allowed(r, q)  where q = r, or ⟨w_r, w_q⟩ ≤ 0.9 (no gradient);   L_rq = s·⟨u_r, w_q⟩
    L_CLOC = 1/R Σ_r (½ log Σ_{q allowed} exp L_rq + ½ log Σ_{q allowed} exp L_qr − L_rr)
    L_G    = 1/(4R) Σ_r |b_r − Head(t_r)|²
    L      = L_CLIP + λ (L_CLOC + L_G),   λ = share of the images that have regions,   s = 1 / temperature of both

The prompter is pre-norm with a single head: X = [prompt; F_i], Y = X + A(LN X), z = P · mean(Y + FFN(LN Y)).

The filter is a second product of the same tiles, so nothing of size R² is kept. At the paper's R = 131,072 one matrix
of logits has 64 GiB and the filter's as many; here u, w and their gradients, at E = 512, have 256 MiB each, in float32.

FAQ. Is R the paper's M·N? It counts the regions that are there: images may have fewer, or none. Which tokens does the
prompter pool? The paper does not say: here all, or the prompt's. Do the two losses share a temperature? Here they do.
In half precision? Products of texts are summed in float32, but w itself was rounded: a bfloat16 cosine is off by up to
2⁻⁷, and pairs that near to 0.9 may change sides.

Source: Chen et al. 2024, "Contrastive Localized Language-Image Pre-Training", arXiv 2410.02746.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from fastcontrast import clip_loss, info_nce
from fastcontrast.distributed._sums import share
from fastcontrast.ops import _check as check
from fastcontrast.ops._precision import float32

from ._parts import cloc_pages
from ._parts.cloc_model import Asked, found_boxes, measure
from ._parts.cloc_prompter import Prompter, spots
from ._shared.icons import load_icons
from ._shared.report import Report, Scale, train

__all__ = ["Prompter", "cloc_loss", "grounding_loss", "region_text_loss", "run"]

STEPS, BATCH, RATE = 1000, 64, 4e-3
POOL = "prompt"  # a step of "all" takes four times as long here


def region_text_loss(
    regions: Tensor,  # [R, E]
    texts: Tensor,  # [R, E]
    scale: float | Tensor,
    threshold: float = 0.9,
) -> Tensor:
    """L_CLOC of unit features, 0 without regions; a threshold of 2 leaves all texts in. Raises ValueError."""
    op = "region_text_loss"
    check.matrix(op, "regions", regions)
    check.matrix(op, "texts", texts, regions.shape[1], like="regions")
    if len(texts) != len(regions):
        raise ValueError(f"{op}: texts must be as many as regions, {len(regions)}, got {len(texts)}")
    both, guide = ("query_to_key", "key_to_query"), texts.detach()
    return info_nce(regions, texts, scale, directions=both, joint=False, guide=(guide, guide, threshold))


def grounding_loss(boxes: Tensor, found: Tensor) -> Tensor:  # [R, 4] each
    """L_G, 0 without regions. Raises ValueError unless both are [R, 4]."""
    if boxes.shape != found.shape or boxes.shape[1:] != (4,):
        raise ValueError(
            f"grounding_loss: boxes and found must be [R, 4], got {list(boxes.shape)} and {list(found.shape)}"
        )
    return share((float32(boxes) - float32(found)).square().sum(), boxes.numel())


def cloc_loss(
    image: Tensor,  # [B, E]
    caption: Tensor,  # [B, E]
    regions: Tensor,  # [R, E]
    texts: Tensor,  # [R, E]
    boxes: Tensor,  # [R, 4]
    found: Tensor,  # [R, 4]
    there: Tensor,  # [B, M] bool
    scale: float | Tensor,
    *,
    threshold: float = 0.9,
    weight: float = 1.0,
) -> Tensor:
    """L_CLIP + weight · λ · (L_CLOC + L_G); features of length 1. Regions in the order of `there`'s True entries: slots
    that are empty have no row. Raises ValueError naming what does not fit."""
    rows = spots("cloc_loss", there, len(image))
    if not len(rows[0]) == len(regions) == len(boxes):
        got = f"{len(regions)} regions and {len(boxes)} boxes"
        raise ValueError(f"cloc_loss: there says {len(rows[0])} regions, got {got}")
    whole = clip_loss(image, caption, scale)
    local = region_text_loss(regions, texts, scale, threshold) + grounding_loss(boxes, found)
    having = share(there.any(1).double().sum(), len(there)).to(whole.dtype)
    return whole + weight * having * local


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Pages of up to five icons with their names as caption, boxes and names known for three quarters of them. Plain
    CLIP, whose region is the mean of the tokens in a box, and CLOC, both measured on pages of names that no training
    page has: each region asks for its name, each name for its regions, each page for its caption, and each name for its
    box on the page, of which a box that never moves would miss 22 % of a side.

    The claim shows in part: regions and pages are a little ahead of CLIP's, boxes are found no better than by the one
    that never moves. Boxes here are cells, whose mean has nothing to learn, while the prompter has to learn what a box
    is.
    """
    steps = STEPS if steps is None else steps
    report = Report(
        "cloc", output, steps=steps, seed=seed, limit=limit, batch=BATCH, pool=POOL, labelled=cloc_pages.LABELLED
    )
    data = cloc_pages.Data(load_icons(limit), seed)
    for label in ("CLIP", "CLOC"):
        torch.manual_seed(seed)
        model, scale, batches = Asked(POOL), Scale(), data.batches(BATCH, seed)
        model.texts.mean.copy_(data.seen_texts.mean(0))

        def step(_: int, label=label, model=model, scale=scale, batches=batches) -> Tensor:
            batch = next(batches)
            tokens = model.pages(batch.images)
            image, caption = model.pages.pool(tokens), model.texts(batch.captions)
            if label == "CLIP":
                return clip_loss(image, caption, scale())
            texts, there = model.texts(batch.texts), batch.there
            regions, found = model.regions(batch.boxes, tokens, there), model.find(texts, tokens, there)
            return cloc_loss(image, caption, regions, texts, batch.boxes, found, there, scale())

        with report.model(label) as found:
            learned = [*model.parameters(), *scale.parameters()]
            found.losses = train(label, steps, learned, step, rate=RATE, decay=0.1, clip=1.0, after=scale.clamp)
            found.metrics = measure(model, data, asked=label == "CLOC")
    return report.close(model, lambda figure: cloc_pages.draw(figure, data, found_boxes(model, data.test)))
