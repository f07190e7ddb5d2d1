"""DenseCLIP: every pixel is compared with the classes' names. The K maps of cosines go into the decoder beside CLIP's
features, and learn themselves, through a loss of their own.

z [B, C, H, W] is CLIP's last map, g its pooled embedding, T the K names' embeddings; with V = [g; z]

    T̂ = T + γ D(T, V)                                        post-model prompting: γ learned, from 1e-4
    s[b, k, h, w] = ⟨ z[b, :, h, w] / |·|, T̂[b, k] / |·| ⟩
    segmentation  L = CE(head([x; s]), y) + 0.4 · CE(up(s/τ), y)        means over the pixels that are labelled
    detection     L = … + Σ BCE(sigmoid(up(s/τ)), target) / number      over positions inside a box, head([x; s/τ])

`up` is bilinear, to the labels' size, and happens inside the loss: [B, K, 512, 512] never exists. τ = 0.07 is constant.

FAQ. Why two scales of s? What the head reads needs none: its first convolution learns one; the loss needs 1/τ.
Pixels without a label? They do not count; `reduction="all"` divides by their number too, as the code's toolbox did.
The sum over boxes is divided by positions, though K channels are summed? Yes; `"entries"` divides by both.
Pre-model prompting? `PreModelPrompt`: what the image says stands before the names, and the encoder reads B·K texts.

Source: Rao et al. 2021, "DenseCLIP: Language-Guided Dense Prediction with Context-Aware Prompting", arXiv 2112.01518.
"""

from __future__ import annotations

import os
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from fastcontrast.distributed._sums import share
from fastcontrast.ops import _check as check
from fastcontrast.ops import upsampled_binary_cross_entropy, upsampled_cross_entropy

from ._parts.denseclip_boxes import box_targets
from ._parts.denseclip_model import AttentionPool, PostModelPrompt, PreModelPrompt, PromptedText, cut, score_maps
from ._parts.denseclip_pages import IGNORED, Classes, draw, mean_iou
from ._parts.denseclip_start import Segmenter, pretrained
from ._shared.report import Report, train

__all__ = [
    "AttentionPool",
    "PostModelPrompt",
    "PreModelPrompt",
    "PromptedText",
    "box_targets",
    "cut",
    "detection_loss",
    "run",
    "score_maps",
    "segmentation_loss",
]

TAU, AUXILIARY = 0.07, 0.4
START_STEPS = 100  # of the CLIP that both models are at first
STEPS, BATCH, RATE = 300, 24, 1e-3
BACKBONE = 0.1  # its rate, of the others'


def segmentation_loss(
    logits: Tensor,  # [B, K, h', w']
    scores: Tensor,  # [B, K, h, w]
    labels: Tensor,  # [B, H, W] integer
    *,
    tau: float = TAU,
    auxiliary: float = AUXILIARY,
    ignore_index: int = IGNORED,
    reduction: str = "valid",
) -> Tensor:
    """CE(up(logits), labels) + auxiliary · CE(up(scores / tau), labels), of the decoder's logits and the score maps.

    "valid" divides by the pixels that are labelled, 0 without any; "all" by all. On several ranks: by those of all.
    Raises ValueError naming what does not fit.
    """
    check.one_of("segmentation_loss", "reduction", reduction, ("valid", "all"))
    options = {"ignore_index": ignore_index, "reduction": "sum"}
    total = upsampled_cross_entropy(logits, labels, **options)
    total = total + auxiliary * upsampled_cross_entropy(scores, labels, 1 / tau, **options)
    return share(total, (labels != ignore_index).sum() if reduction == "valid" else labels.numel())


def detection_loss(
    scores: Tensor,  # [B, K, h, w]
    targets: Tensor,  # [B, K, H, W] bool
    mask: Tensor,  # [B, H, W] bool
    *,
    tau: float = TAU,
    reduction: str = "positions",
) -> Tensor:
    """What a detector's losses are added to: BCE of sigmoid(up(scores / tau)) inside the boxes; see `box_targets`.

    "positions" divides the sum by the positions inside, 0 without any; "entries" by K times that. On several ranks: by
    those of all. Raises ValueError naming what does not fit.
    """
    check.one_of("detection_loss", "reduction", reduction, ("positions", "entries"))
    total = upsampled_binary_cross_entropy(scores, targets, mask, 1 / tau, reduction="sum")
    return share(total, mask.sum() * (scores.shape[1] if reduction == "entries" else 1))


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Pages of icons, each inside its frame labelled with one of 48 names. A CLIP of single icons becomes a DenseCLIP,
    and, without score maps and their loss, plain fine-tuning of the same start.

    Half of a name's drawings are for the test: no training sees them. T is MiniLM's, through CLIP's linear head, and
    frozen: MiniLM takes no learned contexts. CLIP's other weights learn at a tenth of the rate, in both models; the
    decoder reads one scale of features, where the paper's reads four. The claim does not show: the two end alike.
    """
    start_steps = START_STEPS if steps is None else min(steps, START_STEPS)
    steps = STEPS if steps is None else steps
    report = Report("denseclip", output, steps=steps, seed=seed, limit=limit, batch=BATCH, start_steps=start_steps)
    classes = Classes.load(limit, seed)
    icons, models = classes.icons, {}
    start = pretrained(icons, classes.seen, seed, start_steps)
    with torch.no_grad():
        text = start.text(icons.texts[: classes.count])
    for label in ("CLIP, fine-tuned", "DenseCLIP"):
        torch.manual_seed(seed)
        models[label] = model = Segmenter(deepcopy(start), classes.count, text if label == "DenseCLIP" else None)
        pages = classes.pages(BATCH, seed)

        def step(_: int, model=model, pages=pages) -> Tensor:
            page, labels = next(pages)
            logits, scores = model(page.images)
            if scores is None:
                return upsampled_cross_entropy(logits, labels)
            return segmentation_loss(logits, scores, labels)

        model.clip.text.requires_grad_(False)
        others = [p for name, p in model.named_parameters() if not name.startswith("clip.")]
        learned = {"params": others}, {"params": [*model.clip.parameters()], "lr": BACKBONE * RATE}
        with report.model(label) as found:
            found.losses = train(label, steps, learned, step, rate=RATE, decay=1e-4, clip=1.0)
            found.metrics = mean_iou(model, classes)
    names = icons.names[: classes.count]
    return report.close(model, lambda place: draw(place, classes, models), classes=names)
