"""SimCTG: a language model whose tokens do not all look alike, so that contrastive search can tell repetition from
progress. Beside the likelihood of a text, training pushes the states of its tokens apart.

    L    = L_mle + L_cl
    L_cl = 1/Z Σ_b Σ_{i≠j} max(0, ρ − s_ii + s_ij),   s_ij = cos(h_bi, h_bj),   Z = Σ_b L_b (L_b − 1)

h are the last layer's states, those that the head multiplies; L_b counts the tokens of text b that are no padding. The
decoder is `fastcontrast.generate(model, ...)`: of the k likeliest tokens v it takes the one with the largest
(1 − α) p(v) − α max_i cos(h_v, h_i). Isotropy is 1 minus the mean of s_ij over all pairs i ≠ j.

FAQ. Which mean? L_mle is over the tokens, L_cl over the pairs of all texts together: a long text weighs more in both.
Do both tokens of a pair learn? Yes, nothing is detached, and there is no weight between the two terms.
When is the gradient clipped? In the released code after every micro-step, while it still adds up: `accumulate`.

Source: Su et al. 2022, "A Contrastive Framework for Neural Text Generation", arXiv 2202.06417; Su and Collier 2022,
"Contrastive Search Is What You Need For Neural Text Generation", arXiv 2210.14140.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastcontrast import generate, token_contrast_margin
from fastcontrast.decoding.measures import diversity, isotropy, rep_n
from fastcontrast.distributed._sums import share
from fastcontrast.ops import linear_cross_entropy

from ._parts import simctg_run
from ._parts.simctg_run import self_similarity
from ._shared.encoder import batches
from ._shared.language import IGNORED, states
from ._shared.report import Report, train

__all__ = [
    "accumulate", "diversity", "generate", "isotropy", "linear_rate", "rep_n", "run", "self_similarity", "shift",
    "simctg_loss",
]  # fmt: skip

STEPS, BATCH, RATE = 60, 16, 5e-4
START_STEPS, START_RATE = 240, 2e-3  # of the language model that both begin with
MARGIN = 0.5


def simctg_loss(
    hidden: Tensor,  # [B, S, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [B, S] integer
    lengths: Tensor | None = None,  # [B] integer
    *,
    margin: float = 0.5,
    contrast: float = 1.0,
) -> Tensor:
    """L_mle + contrast · L_cl, without logits [B, S, V] and without cosines [B, S, S].

    Args:
        hidden: states that the head multiplies. weight: the head.
        labels: the next token of each, −100 for none, as `shift` makes them. No label at all: L_mle = 0.
        lengths: tokens of each text before its padding; None: all S.
        margin: ρ. contrast: weight of the second term, 1 in the paper; 0 leaves it out.

    Inside `exchange` both means are over the texts of all ranks. Raises ValueError or TypeError naming the argument.
    """
    total = linear_cross_entropy(hidden, weight, labels, reduction="sum")
    loss = share(total, (labels != IGNORED).sum())
    return loss + contrast * token_contrast_margin(hidden, lengths, margin=margin) if contrast else loss


def shift(ids: Tensor, pad: int | None = None) -> tuple[Tensor, Tensor, Tensor]:  # [B, S + 1] integer
    """Inputs [B, S], labels [B, S] with −100 at padding, and the inputs' lengths [B]; padding is on the right."""
    inputs, labels = ids[:, :-1], ids[:, 1:]
    if pad is None:
        return inputs, labels, torch.full((len(ids),), inputs.shape[1], device=ids.device)
    real = inputs != pad
    if (real.diff(dim=1) & real[:, 1:]).any():
        raise ValueError("shift: padding must be on the right, got a token behind it")
    return inputs, labels.masked_fill(labels == pad, IGNORED), real.sum(1)


def accumulate(
    losses: Iterable[Tensor], count: int, parameters: Iterable[Tensor], clip: float = 1.0, *, each: bool = True
) -> float:
    """Adds up the gradient of the mean of `count` losses, a micro-step each; returns that mean. The norm of what has
    added up is clipped after each of them, as in the released code; `each=False`: after the last."""
    parameters, total = [*parameters], 0.0
    for i, loss in enumerate(losses, 1):
        (loss / count).backward()
        total += loss.item() / count
        if each or i == count:
            nn.utils.clip_grad_norm_(parameters, clip)
    return total


def linear_rate(step: int, steps: int, warmup: float = 0.1) -> float:
    """The learning rate's factor in step 0 … steps − 1: up over the first tenth, then straight down to 0."""
    first = warmup * steps
    return step / first if step < first else (steps - step) / max(steps - first, 1)


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """A small Llama learns the library's docstrings, then goes on, with the likelihood alone or with SimCTG's loss,
    from the same start on the same blocks. All write on from texts held out, greedily and by contrastive search. The
    loss spreads the states a little, at the same perplexity.
    """
    steps = STEPS if steps is None else steps
    report = Report("simctg", output, steps=steps, seed=seed, limit=limit, batch=BATCH, margin=MARGIN)
    world = simctg_run.load(limit, seed)
    start, models, written = world.llama(seed), {}, {}
    for label, contrast in (("start", 0.0), ("MLE", 0.0), ("SimCTG", 1.0)):
        first = label == "start"
        model, draws = start if first else copy.deepcopy(start), batches(len(world.train), BATCH, seed + (not first))

        def step(_: int, model=model, draws=draws, contrast=contrast) -> Tensor:
            inputs, labels, lengths = shift(world.train[next(draws)])
            hidden = states(model, inputs)
            return simctg_loss(hidden, model.lm_head.weight, labels, lengths, margin=MARGIN, contrast=contrast)

        with report.model(label) as found:
            count, rate = (min(START_STEPS, 4 * steps), START_RATE) if first else (steps, RATE)
            down = partial(linear_rate, steps=count)
            found.losses = train(label, count, model, step, rate=rate, decay=0.01, clip=1.0, schedule=down)
            found.metrics, written[label] = simctg_run.judge(model, world, start)
            models[label] = model
    return report.close(model, partial(simctg_run.draw, world, models, written), written=written)
