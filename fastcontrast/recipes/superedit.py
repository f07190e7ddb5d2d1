"""SuperEdit: a denoiser that edits images by instruction learns from wrong instructions too. Its prediction under the
right one must be nearer to the noise than its prediction under a wrong one, which differs by a word.

z_t is the noisy edited image, y the target (the noise, or the velocity), y⁺ and y⁻ the network's predictions from z_t,
the original image and the right or a wrong instruction, at one t and one noise. Of sample b, over its n numbers:

    d⁺_b = mean (y⁺_b − y_b)²,   d⁻_b = mean (y⁻_b − y_b)²,   h_b = max(0, d⁺_b − d⁻_b + m),  0 where below a threshold
    L    = mean_b d⁺_b + λ Σ_b M_b h_b / Σ_b M_b          λ = 0 before its first step; M_b = 1 where both conditions are

Both distances come from one pass over the three tensors. Text or image of a sample are dropped now and then, so that
sampling can be guided by either: `drop_conditions`, `guided`.

FAQ. Does the triplet push y⁻ away without bound? No: h is 0, and has no gradient, once y⁻ is worse by the margin.
Which samples are masked? Those without text or without image; the released expression keeps the samples that lack
the image: `triplet_mask(..., "official")`.
Which step starts the triplet? The global one; the released code counts within an epoch, of which it has too few.
No sample left? L's second term is 0 and still has a graph, so that ranks stay in step.

Source: Li et al. 2025, "SuperEdit: Rectifying and Facilitating Supervision for Instruction-Based Image Editing", arXiv
2505.02370.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcontrast import EMATeacher
from fastcontrast.distributed._sums import share
from fastcontrast.ops import _check as check
from fastcontrast.ops import triplet_distances

from ._parts.superedit_diffusion import Network, Schedule, UNet, guided
from ._parts.superedit_edits import load_edits
from ._parts.superedit_judge import draw, judge
from ._shared.report import Report, train

__all__ = [
    "Schedule",
    "UNet",
    "both_branches",
    "drop_conditions",
    "guided",
    "run",
    "superedit_loss",
    "triplet_mask",
    "triplet_weight",
]

STEPS, BATCH, RATE, DROPPED = 200, 64, 1e-3, 0.05
START = 1 / 3  # of the steps pass before the triplet sets in, as in the paper
MARGIN = 0.02  # the code's own default; the paper's 5e-4 suits a network that has learned for long
MOMENTUM = 0.95  # of the weights that are tested: about the last 20 steps


def superedit_loss(
    target: Tensor,  # [B, ...]
    positive: Tensor,  # [B, ...]
    negative: Tensor,  # [B, ...]
    mask: Tensor | None = None,  # [B] bool
    *,
    weight: float = 1.0,
    margin: float = 5e-4,
    threshold: float = 0.0,
    stop_pos_grad: bool = False,
) -> Tensor:
    """mean_b d⁺_b + weight · Σ_b M_b h_b / Σ_b M_b; distances and hinges in float32. All samples are in the first mean.

    With `stop_pos_grad` the hinge pushes only y⁻. Inside `exchange` both means are those of all ranks' samples. Raises
    ValueError naming what does not fit.
    """
    if mask is not None and (mask.shape != target.shape[:1] or mask.dtype != torch.bool):
        got = f"{list(mask.shape)} of {mask.dtype}"
        raise ValueError(f"superedit_loss: mask must be bool [{len(target)}], one a sample, got {got}")
    precise = torch.promote_types(target.dtype, positive.dtype)  # a network under autocast answers in half precision
    near, far = triplet_distances(*(x.to(precise) for x in (target, positive, negative)))
    hinge = F.relu((near.detach() if stop_pos_grad else near) - far + margin)
    if mask is None:
        mask = torch.ones_like(hinge, dtype=torch.bool)
    hinges = hinge.where(mask & (hinge >= threshold), 0.0).sum()
    return share(near.sum(), len(near)) + weight * share(hinges, mask.sum())  # by at least 1, where the code adds 1e-8


def triplet_weight(step: int, start: int, weight: float = 1.0) -> float:
    """λ of a global step, counted from 0: `weight` from step `start` on, 0 before."""
    return weight if step >= start else 0.0


def drop_conditions(u: Tensor, p: float = DROPPED) -> tuple[Tensor, Tensor]:  # [B] uniform in [0, 1)
    """(text dropped, image kept), bool [B]: the text alone where u < p, both where p ≤ u < 2p, the image alone where
    2p ≤ u < 3p. A dropped text is the one of no words, for the right and the wrong instruction alike; an image zeros.
    """
    return u < 2 * p, (u < p) | (u >= 3 * p)


def triplet_mask(text_dropped: Tensor, image_kept: Tensor, which: str = "both_present") -> Tensor:  # [B] bool each
    """M, bool [B]: samples with text and image; "official", as released: all but those whose text alone is dropped;
    or "none" masked."""
    check.one_of("triplet_mask", "which", which, ("both_present", "official", "none"))
    if which == "none":
        return torch.ones_like(text_dropped)
    return ~(text_dropped & image_kept) if which == "official" else ~text_dropped & image_kept


def both_branches(
    network: Network, noisy: Tensor, t: Tensor, image: Tensor, right: Tensor, wrong: Tensor
) -> tuple[Tensor, Tensor]:
    """y⁺ and y⁻, under the texts `right` and `wrong` [B, E], in one batch of twice the size."""
    doubled = (torch.cat([x, x]) for x in (noisy, t, image))
    return network(*doubled, torch.cat([right, wrong])).chunk(2)


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Icons that differ by one word of their names, such as "bell" and "bell outline", and an instruction that says so
    by rule; the wrong ones say another word, or "remove" for "add". A small U-Net learns the edits from noise, four
    pixels a position in place of a VAE's latents, and predicts velocities: with the triplet, and without, from the same
    start.

    What is tested: the average over steps of the weights, on names that training left out.
    """
    steps = STEPS if steps is None else steps
    report = Report("superedit", output, steps=steps, seed=seed, limit=limit, batch=BATCH, margin=MARGIN)
    edits, schedule = load_edits(limit), Schedule()
    torch.manual_seed(seed)
    start = UNet(4, edits.texts.shape[1])
    for label in ("denoising alone", "SuperEdit"):
        network, draws = copy.deepcopy(start), torch.Generator().manual_seed(seed)
        averaged = EMATeacher(network, MOMENTUM)

        def step(i: int, label=label, network=network, draws=draws) -> Tensor:
            rows = edits.train[torch.randint(len(edits.train), (BATCH,), generator=draws)]
            clean, image, *said = edits.of(rows, draws)
            noisy, t, target = schedule.draw(clean, draws)
            dropped, kept = drop_conditions(torch.rand(BATCH, generator=draws))
            right, wrong = (edits.texts[x.masked_fill(dropped, 0)] for x in said)
            image = image * kept[:, None, None, None]
            weight = triplet_weight(i, int(START * steps)) if label == "SuperEdit" else 0.0
            if not weight:
                return F.mse_loss(network(noisy, t, image, right), target)
            predictions = both_branches(network, noisy, t, image, right, wrong)
            return superedit_loss(target, *predictions, triplet_mask(dropped, kept), weight=weight, margin=MARGIN)

        def follow(_: int, network=network, averaged=averaged) -> None:
            averaged.update_parameters(network)

        with report.model(label) as found:
            found.losses = train(label, steps, network, step, rate=RATE, clip=1.0, after=follow)
            found.metrics = judge(averaged, edits, schedule, seed)
    return report.close(averaged.module, lambda panel: draw(panel, averaged, edits, schedule, seed))
