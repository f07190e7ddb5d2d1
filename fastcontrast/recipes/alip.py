"""ALIP: pairs that do not fit count less. Two gates turn the similarities of an image, its raw text from the web and a
synthetic caption into weights of its losses.

With unit features x_i, t_i, c_i of image, text and caption, and running means H of S_tc = ⟨t, c⟩, S_xt, S_xc:

    W^s_i = exp(γ_s (S_tc,i − H_tc)) where S_tc,i ≤ H_tc, else 1
    W^t_i = exp(γ_p (S_xt,i − H_xt)),  W^c_i = exp(γ_p (S_xc,i − H_xc)) where W^s_i < 1, else both 1
    L     = 1/N Σ_i W^s_i (W^t_i l_i(t) + W^c_i l_i(c)),  l_i(y) = CLIP's loss of pair i, half from either side

H ← m·H + (1 − m)·mean(S) over the whole batch, before the weights use it; weights carry no gradient.

FAQ. Why is the loss so small at first? H starts at 1, above every similarity: all pairs count little for some 0.99ⁿ.
Is the sum divided by the weights' sum? No: by N, as the released code does (the paper writes a plain sum).

Source: Yang et al. 2023, "ALIP: Adaptive Language-Image Pre-training with Synthetic Caption", arXiv 2308.08428.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from fastcontrast import clip_loss
from fastcontrast.distributed._sums import share
from fastcontrast.ops import _check as check

from ._parts.alip_texts import shuffled_texts, synthetic_captions
from ._shared.icons import load_icons
from ._shared.report import Report, Scale, train

__all__ = ["Gates", "alip_loss", "run"]

STEPS, BATCH, RATE = 100, 1024, 2e-3
SHUFFLED = 0.5  # share of the training names whose raw text is another's
MOMENTUM = 0.9  # the paper's 0.99 has a half-life of 69 steps, of many thousand; a run here has a hundred


class Gates(nn.Module):
    """The weights of a batch's pairs, and the running means H that they need: in `state_dict`, equal on all ranks.

    Args:
        momentum: m. gamma_s, gamma_p: sharpness of the gates of language consistency and of description.
    """

    def __init__(self, momentum: float = 0.99, gamma_s: float = 2.0, gamma_p: float = 2.0):
        super().__init__()
        self.momentum, self.gamma_s, self.gamma_p = momentum, gamma_s, gamma_p
        self.register_buffer("means", torch.ones(3))  # of S_tc, S_xt, S_xc

    @torch.no_grad()
    def forward(self, image: Tensor, text: Tensor, caption: Tensor) -> tuple[Tensor, Tensor]:  # [N, D] each
        """W^s·W^t and W^s·W^c, [N] each, after the means moved. Rows that are not finite raise, and the means stay:
        one of them would poison all later weights."""
        _check("Gates", image, text, caption)
        image, text, caption = (x.to(self.means.dtype) for x in (image, text, caption))  # half would round the means
        pairs = (text, caption), (image, text), (image, caption)
        similarities = torch.stack([torch.linalg.vecdot(a, b) for a, b in pairs])  # [3, N]
        now = torch.stack([share(s.sum(), s.shape[0]) for s in similarities])
        if not now.isfinite().all():
            raise FloatingPointError("alip: features must be finite, got a batch with a mean similarity that is not")
        self.means.lerp_(now, 1 - self.momentum)
        s_tc, s_xt, s_xc = similarities
        h_tc, h_xt, h_xc = self.means
        consistent = (self.gamma_s * (s_tc - h_tc)).clamp(max=0).exp()
        below = consistent < 1
        of_text, of_caption = (
            torch.where(below, (self.gamma_p * (s - h)).exp(), 1.0) for s, h in ((s_xt, h_xt), (s_xc, h_xc))
        )
        return consistent * of_text, consistent * of_caption


def alip_loss(
    image: Tensor,  # [N, D]
    text: Tensor,  # [N, D]
    caption: Tensor,  # [N, D]
    weights: tuple[Tensor, Tensor],  # [N] each
    scale: float | Tensor,
) -> Tensor:
    """1/N Σ_i (w_i l_i(text) + u_i l_i(caption)), (w, u) = `Gates()(image, text, caption)`; features of length 1.

    Raises ValueError naming what does not fit.
    """
    _check("alip_loss", image, text, caption)
    of_text, of_caption = (clip_loss(image, y, scale, weights=w) for y, w in zip((text, caption), weights, strict=True))
    return of_text + of_caption


def _check(op: str, image: Tensor, text: Tensor, caption: Tensor) -> None:
    check.matrix(op, "image", image)
    for name, x in (("text", text), ("caption", caption)):
        check.matrix(op, name, x, image.shape[1], like="image")
        if len(x) != len(image):
            raise ValueError(f"{op}: {name} must have a row an image, {len(image)}, got {len(x)}")


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Icons whose raw text is another's in half of the cases, and synthetic captions that are always right but say
    less: a random half of the name's words. ALIP, the same sum without weights, and CLIP on the raw texts alone.
    """
    steps = STEPS if steps is None else steps
    report = Report("alip", output, steps=steps, seed=seed, limit=limit, batch=BATCH, shuffled=SHUFFLED)
    icons = load_icons(limit)
    raw, wrong = shuffled_texts(icons, SHUFFLED, seed)
    captions = synthetic_captions(icons, seed)
    for label in ("CLIP", "CLIP, two texts", "ALIP"):
        model, scale, gates = icons.towers(seed), Scale(), Gates(MOMENTUM)
        batches = icons.batches(BATCH, seed)

        def step(_: int, label=label, model=model, scale=scale, gates=gates, batches=batches) -> Tensor:
            rows = next(batches)
            image = model.item_tower(icons.glyphs[rows])
            text, caption = (model.name_tower(x[icons.ids[rows]]) for x in (raw, captions))
            if label == "CLIP":
                return clip_loss(image, text, scale())
            even = torch.ones(2, len(rows))
            return alip_loss(image, text, caption, gates(image, text, caption) if label == "ALIP" else even, scale())

        with report.model(label) as found:
            learned = [*model.parameters(), *scale.parameters()]
            found.losses = train(label, steps, learned, step, rate=RATE, decay=0.1, clip=1.0, after=scale.clamp)
            found.metrics = icons.recall(model)
    return report.close(model, wrong_texts=wrong)
