"""PHF: a language model learns from the start what people want of its text, from scores of segments of what it reads.

With lp_t = log p(x_t | x_<t), the score s_t of the segment that x_t belongs to (0 is good), a threshold, and means over
all positions:

    MLE             mean(−lp)
    filtering       MLE of those documents whose average score is at most the threshold
    conditional     MLE of text with <|aligned|> before each segment of a score up to the threshold, <|misaligned|>
                    before others, none before some; who samples begins with <|aligned|>
    unlikelihood    mean(−c·lp − a·(1 − c)·log(1 − p)),  c = [s ≤ threshold],  or 1 − s for a threshold of 0
    AWR             α·mean(−w·lp) + (1 − α)·mean((r − V)²),  r = −s,  V_t = −sigmoid(⟨v, h_t⟩),
                    w = min(exp((r − V)/β), 1000), a constant
    RWR             AWR with α = 1: V stays −½, a constant factor

All are functions of lp alone: one operation gives it, without logits [N, V], and takes any gradient of it.

FAQ. Why is c soft at a threshold of 0? The released code asks whether the threshold is true; `zero_threshold="hard"`
has the comparison. 1 − p is −expm1(lp): it differs from the released subtraction only next to p = 1.
Why does RWR keep V? So do those who released it; `baseline=0` is the textbook's exp(r/β).
A batch of which nothing is left? Its loss is 0: skip the step.

Source: Korbak et al. 2023, "Pretraining Language Models with Human Preferences", arXiv 2302.08582.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastcontrast.ops import _check as check
from fastcontrast.ops import linear_logprob

from ._parts.phf_awr import ValueHead, awr_loss, mean_over, positions, rwr_loss
from ._parts.phf_run import Corpus, draw, share_of_bad
from ._parts.phf_text import Control, Segment, add_control_tokens, average, code, keep, pack_segments, sample, shuffled
from ._shared.encoder import batches
from ._shared.language import llama, states
from ._shared.report import Report, train

__all__ = [
    "Control", "Segment", "ValueHead", "add_control_tokens", "average", "awr_loss", "code", "keep", "mle_loss",
    "pack_segments", "run", "rwr_loss", "sample", "shuffled", "unlikelihood_loss",
]  # fmt: skip

STEPS, BATCH, LENGTH, RATE = 240, 8, 128, 6e-3
VOCABULARY, SIZE = 1024, {"width": 128, "layers": 2}
DOCUMENTS, TESTED, SAMPLES, LONGEST = 2500, 48, 512, 40  # functions and classes; blocks; lines, and their tokens
UNLIKELY, ALPHA, BETA = 0.1, 0.5, 0.25


def mle_loss(logprobs: Tensor, *, valid: Tensor | None = None) -> Tensor:  # [...], [...] bool
    """mean(−lp) over positions, those that are `valid` if given; 0 where there is none. `logprobs` of `linear_logprob`.

    All means here are such, inside `fastcontrast.distributed.exchange` over all ranks.
    """
    (logprobs,) = positions("mle_loss", valid, logprobs)
    return mean_over(-logprobs)


def unlikelihood_loss(
    logprobs: Tensor,  # [...]
    scores: Tensor,  # [...]
    threshold: float,
    weight: float = 1.0,
    *,
    zero_threshold: str = "soft",
    valid: Tensor | None = None,  # [...] bool
) -> Tensor:
    """mean(−c·lp − weight·(1 − c)·log(max(1 − p, 1e-20))), c = [s ≤ threshold].

    With a threshold of 0 and zero_threshold "soft" c = 1 − s, for scores in [0, 1]; "hard" compares there too. Where
    1 − p falls below 1e-20 the second part has no gradient.
    """
    op = "unlikelihood_loss"
    logprobs, scores = positions(op, valid, logprobs, scores=scores)
    check.one_of(op, "zero_threshold", zero_threshold, ("soft", "hard"))
    if threshold or zero_threshold == "hard":
        likely = (scores <= threshold).to(logprobs.dtype)
    else:
        if ((scores < 0) | (scores > 1)).any():
            raise ValueError(f"{op}: scores must lie in [0, 1] for a threshold of 0 that is soft")
        likely = 1 - scores.to(logprobs.dtype)
    unlikely = (-torch.expm1(logprobs)).clamp(min=1e-20).log()
    return mean_over(-likely * logprobs - weight * (1 - likely) * unlikely)


OBJECTIVES = {  # what is not among them is MLE, of other text
    "unlikelihood": lambda logprobs, scores, values: unlikelihood_loss(logprobs, scores, 0.0, UNLIKELY),
    "RWR": partial(rwr_loss, beta=BETA),
    "AWR": partial(awr_loss, alpha=ALPHA, beta=BETA),
}


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Models of code, from one start and in as many steps, on functions and classes of the standard library; a line is
    bad if it breaks one of a few rules, as two in nine do. How many bad lines a model writes, each after the beginning
    of a document that it has not read; then the perplexity of the good lines of those documents. The conditional model
    reads both as it learned to, behind its tokens, and is asked for an aligned line: its perplexity knows the labels.
    All write fewer bad lines than MLE. Only two of them also read as well: the conditional model, and filtering, which
    here is better in both.
    """
    steps = STEPS if steps is None else steps
    report = Report("phf", output, steps=steps, seed=seed, limit=limit, batch=BATCH)
    corpus, written = Corpus(VOCABULARY, LENGTH, TESTED, min(DOCUMENTS, limit or DOCUMENTS)), {}
    for label in ("MLE", "filtering", *OBJECTIVES, "conditional"):
        torch.manual_seed(seed)
        model, value = llama(VOCABULARY, **SIZE), ValueHead(SIZE["width"])
        documents, control = corpus.learned, None
        if label == "filtering":
            documents = keep(documents, corpus.median)
        elif label == "conditional":
            control = Control(*add_control_tokens(model, corpus.tokenizer, seed), seed=seed)
        ids, scores = pack_segments(corpus.tokenizer, documents, LENGTH, control)
        order = batches(len(ids), BATCH, seed)

        def step(_: int, label=label, model=model, value=value, ids=ids, scores=scores, order=order) -> Tensor:
            rows = next(order)
            hidden = states(model, ids[rows, :-1])
            logprobs = linear_logprob(hidden, model.lm_head.weight, ids[rows, 1:])
            if label not in OBJECTIVES:
                return mle_loss(logprobs)
            return OBJECTIVES[label](logprobs, scores[rows, 1:], value(hidden))

        with report.model(label) as found:
            learned = [*model.parameters(), *value.parameters()]
            found.losses = train(label, steps, learned, step, rate=RATE, decay=0.1, clip=1.0)
            written[label] = corpus.write(model, control, SAMPLES, LONGEST, seed)
            found.metrics = {
                "bad lines written, %": share_of_bad(written[label]),
                "perplexity of good lines": corpus.perplexity(model, control),
            }
    return report.close(model, partial(draw, {label: written[label] for label in ("MLE", "conditional")}))
