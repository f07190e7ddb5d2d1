"""MEND: a small model reads demonstrations and says them again in a few vectors, which stand before a frozen language
model in their place. It learns that the language model shall predict alike behind the one and behind the other.

With S = G([D; P]), the last states of a small model G at learned prompts P behind demonstrations D, and the N tokens of
a query x and its answer y, whose states in the frozen model are h_n behind S and h*_n behind D, through one head W:

    L_distill = 1/N Σ_n KL(t_n ‖ p_n),   p_n = softmax(W h_n / T),   t_n = softmax(W h*_n / T)
    L_pred    = mean over the tokens of y of −log p(y_t | S, x, y_<t)
    first on plain text, whose last fifth is the query:  L_distill;      then on tasks:  L_pred + λ L_distill

Only G, P and, between different widths, tanh(Linear) learn; the logits [N, V] of neither side are stored.

FAQ. Is there a factor T²? No. Which tokens count in L_distill? All of x and y; of y alone in L_pred.
What if teacher and student were cut differently? `align` refuses; a query without tokens costs 0.
How long are demonstrations? Once they are vectors, each query costs L_v positions, whatever they were.

Source: Li et al. 2024, "MEND: Meta dEmonstratioN Distillation for Efficient and Effective In-Context Learning", arXiv
2403.06914.
"""

from __future__ import annotations

import copy
import os
import random
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastcontrast.distributed._sums import share
from fastcontrast.ops import linear_cross_entropy, linear_kl
from fastcontrast.smollm2 import early_exit

from ._parts.mend_distiller import Batch, Distiller, Example, align, behind, classify, collate, halves
from ._parts.mend_judge import judge
from ._parts.mend_tasks import language_model, load_world
from ._shared.language import IGNORED, states
from ._shared.report import Report, train

__all__ = ["Batch", "Distiller", "Example", "align", "behind", "classify", "collate", "halves", "mend_loss", "run"]

STEPS, BATCH, RATE = 120, 32, 1e-3
START_STEPS, START_BATCH, START_RATE = 400, 32, 3e-3  # of the frozen language model
PRETRAINING = 0.5  # as many steps on plain text, of those on tasks
SHAPE = {"width": 128, "layers": 3, "heads": 4}
READER, VECTORS, DEMONSTRATIONS = 2, 8, 16  # layers of G, L_v, and lines of a task


def mend_loss(
    student: Tensor,  # [N, D]
    teacher: Tensor,  # [N, Dt]
    weight: Tensor,  # [V, D]
    targets: Tensor | None = None,  # [N]
    *,
    distill: float = 1.0,
    temperature: float = 1.0,
    teacher_weight: Tensor | None = None,  # [V, Dt]
) -> Tensor:
    """L_pred + distill · L_distill of states of the same tokens; without targets L_distill alone, as in pre-training.

    Targets are ids of the tokens that follow, `IGNORED` (−100) for those that are none of the answer; L_pred has no
    temperature. Without `teacher_weight` the teacher has the student's head. Both are 0 for no tokens. Inside
    `exchange` both means are those of all ranks' tokens. Raises ValueError naming what does not fit.
    """
    if len(student) != len(teacher):
        raise ValueError(f"mend_loss: teacher must have a row a token, {len(student)}, got {len(teacher)}")
    total = student.new_zeros(())
    if distill or targets is None:
        head = weight if teacher_weight is None else teacher_weight
        apart = linear_kl(student, weight, teacher, head, temperature=temperature, reduction="sum")
        total = total + (1.0 if targets is None else distill) * share(apart, len(student))
    if targets is not None:
        missed = linear_cross_entropy(student, weight, targets, ignore_index=IGNORED, reduction="sum")
        total = total + share(missed, (targets != IGNORED).sum())
    return total


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Lines such as "big bigger" tell one of 28 tasks. The frozen model is a small Llama that first learns them all,
    and docstrings; a distiller of its first layers then says sixteen lines in eight vectors, also of tasks that it was
    never trained to distil. Beside it the demonstrations themselves and none, and vectors that have read nothing.
    """
    start_steps = START_STEPS if steps is None else min(steps, START_STEPS)
    steps = STEPS if steps is None else steps
    report = Report(
        "mend", output, steps=steps, seed=seed, limit=limit, batch=BATCH, demonstrations=DEMONSTRATIONS, vectors=VECTORS
    )
    world = load_world(limit)
    with report.model(f"{DEMONSTRATIONS} demonstrations") as found:
        model, found.losses = language_model(world, start_steps, START_BATCH, START_RATE, seed, **SHAPE)
        found.metrics = judge(model, world, DEMONSTRATIONS, seed, lambda x: states(model, x.whole)[x.whole_mask])
    with report.model("no demonstrations") as found:
        found.metrics = judge(model, world, DEMONSTRATIONS, seed, lambda x: states(model, x.query)[x.mask])
    head = model.get_output_embeddings().weight
    for label in ("vectors alone", "MEND"):
        torch.manual_seed(seed)
        distiller = Distiller(early_exit(copy.deepcopy(model), READER), VECTORS).requires_grad_(True)
        draws = random.Random(seed)

        def answers(batch: Batch, distiller=distiller, label=label) -> Tensor:
            read = batch.lengths if label == "MEND" else 0 * batch.lengths
            return behind(model, distiller(batch.demonstrations, read), batch.query)

        def step(_: int, answers=answers, draws=draws, task=True) -> Tensor:
            one = (lambda: world.example(world.seen, DEMONSTRATIONS, draws)) if task else (lambda: world.plain(draws))
            batch = collate([one() for _ in range(BATCH)])
            with torch.no_grad():
                teacher = states(model, batch.whole)
            rows = align(answers(batch), batch.mask, teacher, batch.whole_mask)
            return mend_loss(*rows, head, batch.targets[batch.mask] if task else None)

        with report.model(label) as found:
            first = max(int(PRETRAINING * steps), 1)
            train(f"{label}, plain text", first, distiller, partial(step, task=False), rate=RATE, clip=1.0)
            found.losses = train(label, steps, distiller, step, rate=RATE, clip=1.0)
            found.metrics = judge(model, world, DEMONSTRATIONS, seed, lambda x, answers=answers: answers(x)[x.mask])
    return report.close(distiller)
