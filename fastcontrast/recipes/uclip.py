"""uCLIP: foreign languages for an English CLIP without a single pair of image and foreign text. Two small heads join a
frozen CLIP and a frozen multilingual encoder; what is missing is retrieved softly from two banks.

For an English text, e_i of the multilingual encoder and c_i of CLIP's, unit rows as are all here, N(x) = x / ‖x‖:

    p_i = N(Σ_m softmax_m(⟨c_i, I_m⟩ / T) I_m),   f_i = N(Σ_m softmax_m(⟨e_i, F_m⟩ / T) F_m)      T = 0.01
    z(x) = N(H(N(x + σ ε))),  ε ~ N(0, 1),   H = H_A for e and f, H_B for c and p                 σ² = 0.004
    L = CLIP(z(e), z(c)) + CLIP(z(f), z(p)) + 0.1 · ½ mean_i (‖z(f_i) − z(e_i)‖ + ‖z(c_i) − z(p_i)‖)

I is a bank of image features, F one of foreign texts' features, of any size: no matrix of all weights exists. What is
retrieved carries no gradient, so that only the heads learn. At inference a foreign text goes through H_A, an image
through H_B; there is neither bank nor noise.

FAQ. Is the batch local? Yes, unless one asks: inside `fastcontrast.distributed.exchange` all three terms are those of
the whole batch, with the gradients of one process; the released code's third term loses its gradient on several.
Which statistics has the BatchNorm of a head? Each call its own; the running ones see both, in the order e, c, f, p.

Source: Chung et al. 2025, "uCLIP: Parameter-Efficient Multilingual Extension of Vision-Language Models with Unpaired
Data", arXiv 2511.13036.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcontrast import clip_loss
from fastcontrast.distributed._sums import share

from ._parts import uclip_data
from ._parts.uclip_picture import draw
from ._parts.uclip_retrieval import look_up, merge, retrieve
from ._shared.report import Report, train

__all__ = ["Heads", "look_up", "merge", "noisy", "retrieve", "run", "uclip_loss"]

STEPS, BATCH, RATE, WIDTH = 150, 512, 3e-3, 256
ENCODER_STEPS, NOISE = 30, 0.02  # the paper's noise is as long as the features, and its captions are millions
SIGMA = 0.004**0.5


def noisy(x: Tensor, sigma: float = SIGMA, generator: torch.Generator | None = None) -> Tensor:  # [B, D]
    """N(x + σ ε)."""
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return F.normalize(x + sigma * noise, dim=-1)


class Heads(nn.Module):
    """H_A for a multilingual encoder's features, H_B for CLIP's: Linear, BatchNorm, ReLU, Linear; unit rows come out.

    Args:
        multilingual, clip: widths of the two spaces; a head's hidden layer is twice as wide. width: of the joint one.
    """

    def __init__(self, multilingual: int, clip: int, width: int = 512):
        super().__init__()
        self.of_text, self.of_clip = (
            nn.Sequential(nn.Linear(n, 2 * n), nn.BatchNorm1d(2 * n), nn.ReLU(), nn.Linear(2 * n, width))
            for n in (multilingual, clip)
        )

    def text(self, x: Tensor) -> Tensor:  # [B, multilingual]
        return self._through(self.of_text, x)

    def clip(self, x: Tensor) -> Tensor:  # [B, clip]
        return self._through(self.of_clip, x)

    def forward(self, e: Tensor, c: Tensor, f: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z(e), z(c), z(f), z(p). Raises ValueError for a single row in training: BatchNorm needs two."""
        return self.text(e), self.clip(c), self.text(f), self.clip(p)

    def _through(self, head: nn.Module, x: Tensor) -> Tensor:
        if self.training and len(x) < 2:
            raise ValueError(f"Heads: in training a batch must have at least 2 rows, got {len(x)}")
        return F.normalize(head(x), dim=-1)


def uclip_loss(
    e: Tensor,  # [B, D], z of an English text through the multilingual encoder
    c: Tensor,  # [B, D], and through CLIP's
    f: Tensor,  # [B, D], z of the pseudo foreign text
    p: Tensor,  # [B, D], and of the pseudo image
    scale: float | Tensor = 100.0,
    *,
    text: float = 1.0,
    pseudo: float = 1.0,
    intra: float = 0.1,
) -> Tensor:
    """text · CLIP(e, c) + pseudo · CLIP(f, p) + intra · ½ mean_i (‖f_i − e_i‖ + ‖c_i − p_i‖); a weight of 0 leaves a
    term out. Norms are of the difference + 1e-6, which gives them a gradient at 0.

    Raises ValueError naming what does not fit.
    """
    for name, x in (("c", c), ("f", f), ("p", p)):
        if x.shape != e.shape:
            raise ValueError(f"uclip_loss: {name} must be {list(e.shape)} to match e, got {list(x.shape)}")
    total = e.new_zeros(())
    if text:
        total = total + text * clip_loss(e, c, scale)
    if pseudo:
        total = total + pseudo * clip_loss(f, p, scale)
    if intra:
        apart = (f - e + 1e-6).norm(dim=-1) + (c - p + 1e-6).norm(dim=-1)
        total = total + intra * share(apart.sum() / 2, len(e))
    return total


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """The icons' CLIP learns five languages from English texts alone, names of icons and those of Django's interface,
    with banks of icons and of Django's foreign texts.

    No multilingual encoder comes in a package, so the run first trains a small one, on text alone: on Django's texts in
    six languages, those of the test among them, as the paper's encoder knows the words that it is asked. It never sees
    an icon. The test: foreign texts whose English is the name of an icon ("Domů", home) ask all icons; a hundred or so
    in all. Beside uCLIP what there is without banks, from the same start: the first term alone. The two differ by
    about what another seed changes.
    """
    steps = STEPS if steps is None else steps
    report = Report("uclip", output, steps=steps, seed=seed, limit=limit, batch=BATCH, noise=NOISE)
    world = uclip_data.load(limit, seed, ENCODER_STEPS)
    torch.manual_seed(seed)
    start = Heads(world.e.shape[1], world.c.shape[1], WIDTH)
    with report.model("CLIP, asked in English") as found:
        found.metrics = world.scores(world.asked_in_english, world.gallery)
    for label, terms in (("first term alone", {"pseudo": 0.0, "intra": 0.0}), ("uCLIP", {})):
        with report.model(label) as found:
            heads, generator = copy.deepcopy(start), torch.Generator().manual_seed(seed)
            # Encoders and banks are frozen and noise comes later: what a text retrieves is the same in every step.
            known = world.e, world.c, retrieve(world.e, world.foreign), retrieve(world.c, world.images)

            def step(_: int, heads=heads, generator=generator, known=known, terms=terms) -> Tensor:
                rows = world.batch(BATCH, generator)
                return uclip_loss(*heads(*(noisy(x[rows], NOISE, generator) for x in known)), **terms)

            found.losses = train(label, steps, heads, step, rate=RATE, decay=0.01)
            with torch.no_grad():
                heads.eval()
                answers = heads.text(world.asked), heads.clip(world.gallery)
            found.metrics = world.scores(*answers)
    counts = Counter(language for language, *_ in world.questions)
    return report.close(heads, partial(draw, world, *answers), questions=counts)
