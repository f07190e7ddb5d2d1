"""SALT: a large language model learns first from a smaller one that is already trained, then goes on as usual.

With p of the student, q ∝ P_teacher^ρ, a constant, and y the token that really came:

    stage 1, n_KD steps:  L = mean over tokens of (1 − ω)·(−log p(y)) + ω·(−Σ_v q(v) log p(v))
    stage 2:              L = mean over tokens of −log p(y)

Same optimiser, same schedule of its rate. The teacher is given as states and vocabulary, as logits, or as its K best
tokens; of the student's logits [N, V] there is never more than a chunk of tokens. SALT_DS also has the teacher choose
what stage 1 reads, texts that are hard but not beyond it:

    score = median over tokens of [y among the teacher's k best] · −log P_teacher(y);  the highest scores are kept

FAQ. Divergence or cross entropy? Cross entropy: it is more by the entropy of q, which has no gradient. No factor T².
Is ρ a temperature? Its inverse: ρ < 1 makes q flatter. The student has none.
What becomes of tokens outside the k best? They count as 0; with `mask="drop"` not at all: the paper allows both.
What decays in "ratio"? ω / (1 − ω), the weight of the teacher over that of the data, linearly to 0.

Source: Rawat et al. 2024, "A Little Help Goes a Long Way: Efficient LLM Training by Leveraging Small LMs",
arXiv 2410.18779.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastcontrast.distributed._sums import share
from fastcontrast.ops import _check as check
from fastcontrast.ops import linear_cross_entropy
from fastcontrast.ops._tokens import head, per_token

from ._parts.salt_blend import blend
from ._parts.salt_scores import score_sequences, select, top_k
from ._parts.salt_source import blocks_of_source, most_instructive
from ._parts.salt_stages import OMEGA, omega_at
from ._parts.salt_teacher import IGNORED, REST, Heads, Logits, Teacher, TopK, fit
from ._shared.encoder import batches
from ._shared.language import llama, perplexity, states
from ._shared.report import Report, train

__all__ = ["Heads", "TopK", "omega_at", "run", "salt_loss", "score_sequences", "select", "top_k"]

STEPS, BATCH, RATE = 160, 8, 3e-3
VOCABULARY, LENGTH, TESTED = 2048, 128, 64  # tokens of a block; blocks that perplexity is measured on
TEACHER, STUDENT = {"width": 128, "layers": 2}, {"width": 192, "layers": 4}
LONGER = 2.5  # the teacher's steps, for each of a student's
TAUGHT = 0.35  # share of the steps in stage 1; the paper's 36,000 of 208,000 are 0.17
POOL = 2  # texts that are scored, for each that stage 1 reads


def salt_loss(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [...] integer
    teacher: Teacher | Callable[[], Teacher] | None,
    omega: float = OMEGA,
    rho: float = 1.0,
    *,
    rest: str = "renormalise",
    vocabulary: int | None = None,
) -> Tensor:
    """mean over tokens of (1 − ω)·(−log p(y)) + ω·(−Σ_v q(v) log p(v)), p = softmax(hidden @ weight.T).

    Targets of −100 do not count; 0 where none does. Inside `fastcontrast.distributed.exchange` the mean is over the
    tokens of all ranks.

    Args:
        teacher: `Heads(hidden [..., Dt], weight [V, Dt])`, logits [..., V], or `TopK`; without gradient. Or a function
            that gives one of them: with omega = 0 it is not called, and may be None.
        rho: exponent of the teacher's probabilities. `TopK` has it in it.
        rest: what becomes of the probability outside `TopK`: "renormalise" leaves it out, "tail" spreads it evenly.
        vocabulary: entries that exist, where both vocabularies are padded: the columns behind them take no part.
    """
    op = "salt_loss"
    rows = head(op, hidden, weight, None)
    gold = per_token(op, "targets", targets, hidden, floating=False)
    check.one_of(op, "rest", rest, REST)
    if vocabulary is not None and not 1 <= vocabulary <= len(weight):
        raise ValueError(f"{op}: vocabulary must lie in [1, {len(weight)}], got {vocabulary}")
    if not 0 <= omega <= 1:
        raise ValueError(f"{op}: omega must lie in [0, 1], got {omega}")
    if not (rho > 0 and math.isfinite(rho)):
        raise ValueError(f"{op}: rho must be positive, got {rho}")
    weight = weight[:vocabulary]
    if not omega:
        total = linear_cross_entropy(rows, weight, gold, reduction="sum")
    else:
        with torch.no_grad():
            teacher = teacher() if callable(teacher) else teacher
        if isinstance(teacher, TopK) and rho != 1:
            raise ValueError(f"{op}: rho must be 1 with TopK, which was made with its own, got {rho}")
        check.within(op, "targets", gold[gold != IGNORED], 0, len(weight))
        teacher = fit(op, teacher, hidden.shape[:-1], len(weight), padded=vocabulary is not None)
        total = blend(rows, weight, gold.long(), Logits(teacher, len(weight), rho, rest), omega)
    return share(total, (gold != IGNORED).sum())


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Perplexity on files of the standard library that no model has read. A student learns its source by itself, under
    the teacher all the time (RKD), and as SALT does, without and with chosen texts: each as many steps, from one start.
    The first stage helps, more so on chosen texts; in so few steps the teacher stays ahead, and RKD is best.
    """
    steps = STEPS if steps is None else steps
    taught = max(1, round(TAUGHT * steps))
    report = Report("salt", output, steps=steps, seed=seed, limit=limit, batch=BATCH, taught=taught)
    learned, held_out = blocks_of_source(VOCABULARY, LENGTH, TESTED, limit)
    torch.manual_seed(seed)
    teacher, start = (llama(VOCABULARY, **size) for size in (TEACHER, STUDENT))

    def heads(inputs: Tensor) -> Heads:
        return Heads(states(teacher, inputs), teacher.lm_head.weight)

    for label, stage in (("teacher", 0), ("student alone", 0), ("RKD", steps), ("SALT_DS", taught), ("SALT", taught)):
        small = label == "teacher"
        model, order = teacher if small else copy.deepcopy(start), batches(len(learned), BATCH, seed + small)
        best, first = learned, order
        with report.model(label) as found:
            if label == "SALT_DS":
                pool = batches(len(learned), POOL * taught * BATCH, seed)
                best = most_instructive(heads, learned[next(pool)], taught * BATCH)
                first = batches(len(best), BATCH, seed)

            def step(i: int, stage=stage, model=model, order=order, best=best, first=first) -> Tensor:
                blocks = best[next(first)] if i < stage else learned[next(order)]
                inputs, targets = blocks[:, :-1], blocks[:, 1:]
                omega = omega_at(i, stage)
                return salt_loss(states(model, inputs), model.lm_head.weight, targets, lambda: heads(inputs), omega)

            count, rate = (round(LONGER * steps), 2 * RATE) if small else (steps, RATE)
            found.losses = train(label, count, model, step, rate=rate, decay=0.1, clip=1.0)
            found.metrics = {"perplexity, held out": perplexity(model, held_out)}
        model.eval()
    return report.close(model)
