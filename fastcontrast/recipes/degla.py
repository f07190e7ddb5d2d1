"""DeGLA: a CLIP learns to tell a text from corruptions of it, and stays near to its own moving average.

With unit features v_i, t_i, n_ik of image, text and its K corruptions, starred those of an EMA teacher, s learned:

    L_base = ½ (image → text: the image's text against all texts and all corruptions) + ½ (text → image: in the batch)
    L_IGC  = mean_i −log e^{s⟨v_i, t_i⟩} / (e^{s⟨v_i, t_i⟩} + Σ_k e^{s⟨v_i, n_ik⟩})
    L_TGC  = mean_i −log e^{10⟨t_i, t*_i⟩} / (e^{10⟨t_i, t*_i⟩} + Σ_k e^{10⟨t_i, n_ik⟩})
    L_D    = Σ_i ‖v_i − v*_i‖² + Σ_i ‖t_i − t*_i‖² + Σ_ik ‖n_ik − n*_ik‖²
    L      = L_base + 0.1 L_IGC + 0.1 L_TGC + 0.005 L_D

After each step of the optimiser θ* ← 0.9996 θ* + 0.0004 θ, the scale too: `EMATeacher(model, 0.9996, buffers="own")`.

FAQ. Which corruptions stand in L_base? Those of all samples, as in the released code; the paper's equation has only the
row's own: `base="own"`. And in L_TGC? The row's own. The released code mixes up two orders and takes those at i, B + i,
2B + i, … of a list n_11, n_12, …, mostly other samples': `tgc="released"`. Does L_D depend on the batch? It is a sum:
0.005 goes with 256 pairs. A text of which fewer corruptions are known? A mask.

Source: Hu et al. 2025, "Decoupled Global-Local Alignment for Improving Compositional Understanding", arXiv 2504.16801.
"""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastcontrast import EMATeacher, clip_loss, info_nce
from fastcontrast.demo import training
from fastcontrast.distributed._sums import share, whole_sum
from fastcontrast.ops._precision import float32

from ._parts.degla_corruptions import corrupted, told_apart
from ._parts.degla_features import Features, checked, released_order
from ._shared.icons import load_icons
from ._shared.report import Report, Scale, train

__all__ = ["Features", "base_loss", "degla_loss", "distance", "local_loss", "run"]

STEPS, BATCH, RATE = 150, 256, 3e-4
NAMES = 3000  # of several words and with corruptions, all unseen ones of that kind among them
MOMENTUM = 0.98  # the paper's 0.9996 has a half-life of 1,733 steps


def degla_loss(
    student: Features,
    teacher: Features,
    scale: float | Tensor,
    mask: Tensor | None = None,  # [B, K] bool
    *,
    of_igc: float = 0.1,
    of_tgc: float = 0.1,
    of_distance: float = 0.005,
    tgc_scale: float = 10.0,
    base: str = "all",
    tgc: str = "own",
) -> Tensor:
    """L_base + of_igc · L_IGC + of_tgc · L_TGC + of_distance · L_D, see above; the teacher gets no gradient.

    Args:
        student, teacher: features of the same images and texts; K = 0 leaves CLIP's loss and the distance.
        mask: corruptions that are there. Others count nowhere, whatever stands in their place.
        base: whose corruptions compete for an image: of "all" samples, or its "own".
        tgc: "own" corruptions, or those that the "released" code takes.

    Raises: ValueError or TypeError naming what does not fit.
    """
    student, teacher = checked(student, teacher, mask, base, tgc)
    image, text, corruptions = student
    loss = base_loss(image, text, corruptions, scale, mask, base=base)
    if of_igc:
        loss = loss + of_igc * local_loss(image, text, corruptions, scale, mask)
    if of_tgc:
        if tgc == "released":
            corruptions = released_order(corruptions)
            mask = mask if mask is None else released_order(mask.byte()).bool()
        loss = loss + of_tgc * local_loss(text, teacher.text, corruptions, tgc_scale, mask)
    if of_distance:
        loss = loss + of_distance * distance(student, teacher)
    return loss


def base_loss(image: Tensor, text: Tensor, corruptions: Tensor, scale, mask: Tensor | None, *, base: str) -> Tensor:
    """L_base of features as in `degla_loss`."""
    if base == "own":
        rows = info_nce(image, text, scale, hard_negatives=corruptions, hard_negatives_mask=mask)
        return (rows + info_nce(text, image, scale)) / 2
    # One sweep: the columns of the texts, which its other direction needs, are among those of the rows.
    keys, ids = torch.cat([text, corruptions.flatten(0, 1)]), {}
    if mask is not None:  # equal ids do not compete
        key_ids = torch.cat([mask.new_zeros(len(text)), ~mask.flatten()]).long()
        ids = {"query_ids": key_ids.new_ones(len(image)), "key_ids": key_ids}
    return info_nce(image, keys, scale, directions=("query_to_key", "key_to_query"), joint=False, **ids)


def local_loss(
    anchor: Tensor,  # [B, D]
    positive: Tensor,  # [B, D]
    negatives: Tensor,  # [B, K, D]
    scale: float | Tensor,
    mask: Tensor | None = None,  # [B, K] bool
) -> Tensor:
    """mean_i log(1 + Σ_k exp(scale·⟨a_i, n_ik⟩ − scale·⟨a_i, p_i⟩)): L_IGC, L_TGC. A row without negatives gives 0."""
    anchor, positive, negatives = float32(anchor), float32(positive), float32(negatives)
    own = torch.linalg.vecdot(anchor, positive)
    ahead = scale * (torch.einsum("bd,bkd->bk", anchor, negatives) - own[:, None])
    if mask is not None:
        ahead = ahead.masked_fill(~mask, float("-inf"))
    losses = torch.cat([ahead.new_zeros(len(ahead), 1), ahead], 1).logsumexp(1)
    return share(losses.sum(), len(losses))


def distance(student: Features, teacher: Features) -> Tensor:
    """L_D: the sum of all squared differences."""
    return whole_sum(sum((float32(x) - float32(y)).square().sum() for x, y in zip(student, teacher, strict=True)))


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """A CLIP of icons as it is, trained on with names of several words, and by DeGLA with corruptions of these as well:
    how often an unseen icon prefers its name to four corruptions of it, then retrieval among all unseen names.
    """
    steps = STEPS if steps is None else steps
    report = Report("degla", output, steps=steps, seed=seed, limit=limit, batch=BATCH, momentum=MOMENTUM)
    icons = load_icons(limit)
    start = icons.clip(seed)
    wrong, there = corrupted(icons, NAMES, seed)
    known = there.any(1)
    seen = replace(icons.pairs, unseen=icons.pairs.unseen | ~known)  # what batches leave out
    for label in ("CLIP, the start", "CLIP, trained on", "DeGLA"):
        model = nn.ModuleDict({"towers": copy.deepcopy(start), "scale": Scale()})
        teacher, batches = EMATeacher(model, MOMENTUM, buffers="own"), training.batches(seen, BATCH, seed)

        def step(_: int, label=label, model=model, teacher=teacher, batches=batches) -> Tensor:
            rows = next(batches)
            glyphs, ids = icons.glyphs[rows], icons.ids[rows]
            if label != "DeGLA":
                towers = model["towers"]
                return clip_loss(towers.item_tower(glyphs), towers.name_tower(icons.texts[ids]), model["scale"]())
            inputs = glyphs, icons.texts[ids], wrong[ids]
            with torch.no_grad():
                anchor = features(teacher.module["towers"], *inputs)
            return degla_loss(features(model["towers"], *inputs), anchor, model["scale"](), there[ids])

        def after(_: int, model=model, teacher=teacher) -> None:
            teacher.update_parameters(model)
            model["scale"].clamp()

        with report.model(label) as found:
            if label != "CLIP, the start":
                found.losses = train(label, steps, model, step, rate=RATE, decay=0.1, after=after)
            told = told_apart(model["towers"], icons, wrong, there)
            found.metrics = {"name or corruption, %": told, **icons.recall(model["towers"])}
    return report.close(model["towers"], names=int(known.sum()))


def features(towers: nn.Module, glyphs: Tensor, texts: Tensor, wrong: Tensor) -> Features:
    """Names and corruptions go through the tower together."""
    of_texts = towers.name_tower(torch.cat([texts, wrong.flatten(0, 1)]))
    text, corruptions = of_texts.split([len(texts), len(of_texts) - len(texts)])
    return Features(towers.item_tower(glyphs), text, corruptions.unflatten(0, (len(texts), -1)))
