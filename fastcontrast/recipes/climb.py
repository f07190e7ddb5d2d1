"""CLIMB: a masked language model that begins with what is easy: with frequent words, with likely sentences, or with
parts of speech instead of words. Three curricula, one pace.

    f(step) = pace of a line, root, logarithm, …: from 0.1 to 1 while a run goes from 1/16 to 7/8 of its steps
    vocabulary   tokens with id > f·V become unknown, in inputs and labels: ids are in order of merging, rare ones last
    data         examples are drawn from those whose score is at most the percentile 100 f of all scores
    objective    L = Σ over the units active at this step of mean_{masked t} −log softmax(W h_t + b)_{label t}

Labels are words, or classes of parts of speech; h = LayerNorm(GELU(dense(state))). Only the rows that carry a label, 15
to 40 of 100, go through the heads, and their logits are never stored.

FAQ. What happens to special tokens and to labels of speech when the vocabulary is small? Nothing; the released code
maps them too. Which perplexity scores a sentence? That of single words, or the model's own: each token masked alone.
Do two units share a pass through the model? No: each masks for itself.

Source: Martinez et al. 2023, "CLIMB: Curriculum Learning for Infant-inspired Model Building", arXiv 2311.08886.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._parts import climb_data
from ._parts.climb_curricula import PLANS, Examples, Unit, check_plan, pace, restrict, source_ranks, unigram_perplexity
from ._parts.climb_data import MASK, SPECIAL, UNKNOWN
from ._parts.climb_model import Climber, HeadOptimizers, trunk
from ._shared.report import Report, train
from ._shared.texts import split

__all__ = [
    "PLANS", "Climber", "Examples", "HeadOptimizers", "Unit", "check_plan", "pace", "restrict", "run", "source_ranks",
    "trunk", "unigram_perplexity",
]  # fmt: skip

STEPS, BATCH, RATE, LENGTH, VOCABULARY = 150, 32, 2e-3, 64, 4096
SIZE = {"width": 128, "layers": 3, "heads": 4, "hidden": 512}
MODELS = ("no curriculum", "vocabulary", "objective", "data")
TESTED = 16  # blocks
SHAPE = "log"


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Small models of one start learn the sentences of docstrings: without a curriculum, and with each of the three.
    The test is the pseudo-perplexity of blocks that none has seen. In so few steps no curriculum is ahead of none.
    """
    steps = STEPS if steps is None else steps
    report = Report("climb", output, steps=steps, seed=seed, limit=limit, batch=BATCH, length=LENGTH, shape=SHAPE)
    blocks = climb_data.blocks(LENGTH, VOCABULARY, limit)
    seen, held_out = split(len(blocks.ids), TESTED, seed)
    ids, tags, tested = blocks.ids[seen], blocks.tags[seen], blocks.ids[held_out]
    last = len(SPECIAL)
    for label in MODELS:
        torch.manual_seed(seed)
        body = trunk(blocks.vocabulary, LENGTH, **SIZE)
        plan = PLANS["speech, then tokens" if label == "objective" else "tokens"]
        model = Climber(body, plan, width=SIZE["width"], vocabulary=blocks.vocabulary, mask=MASK, special=last)
        heads = HeadOptimizers(model, steps)
        scores = unigram_perplexity(ids) if label == "data" else torch.zeros(len(ids))
        examples = Examples(scores, seed=seed)
        generator = torch.Generator().manual_seed(seed)

        def step(i: int, label=label, model=model, examples=examples, generator=generator) -> Tensor:
            share = pace(i, steps, SHAPE)
            rows = examples.draw(i, share, min(BATCH, int(examples.allowed(share).sum())))
            limits = {"vocabulary": blocks.vocabulary, "unknown": UNKNOWN, "special": last}
            easier = partial(_easier, share=share if label == "vocabulary" else 1.0, **limits)
            return model(ids[rows], tags[rows], i, steps, generator, easier)

        with report.model(label) as found:
            found.losses = train(label, steps, model.trunk, step, rate=RATE, clip=1.0, after=heads.step)
            found.metrics = {"pseudo-perplexity": model.pseudo_perplexity(tested).log().mean().exp().item()}
    return report.close(model)


def _easier(ids: Tensor, tags: Tensor, *, share: float, **limits: int) -> Tensor:
    return restrict(ids, share, **limits)
