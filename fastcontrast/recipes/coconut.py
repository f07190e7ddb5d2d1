"""COCONUT: a speech model learns new intents, task after task. On the few replayed samples of old ones it is held near
what it was, and a contrast of speech with text keeps the new ones apart.

With unit features h_i of speech by the model, h*_i by the model as it was at the end of the last task, frozen, over a
batch I of new samples and replayed ones R, and P(k) = {p ∈ I : y_p = y_k}, k among them,

    L_NSPT = mean_{k ∈ R} −1/|P(k)| Σ_{p ∈ P(k)} log( exp(⟨h_k, h*_p⟩ / τ) / Σ_{i ≠ k} exp(⟨h_k, h_i⟩ / τ) )
    L_MM   = Σ_{k ∉ R} −1/|P(k)| Σ_{p ∈ P(k)} (log softmax_i(⟨a_k, t_i⟩ / τ)_p + log softmax_i(⟨t_k, a_i⟩ / τ)_p)
    L      = CE of the tokens that the decoder writes + λ_MM L_MM + λ_NSPT L_NSPT

Positives are the teacher's and negatives the student's: numerator and denominator come from different banks, so L_NSPT
may be negative. a and t are projections of speech and of text, the mean of the decoder's own input embeddings.

FAQ. What does the denominator of L_NSPT hold? The student's features of all but the anchor (`bank="student"`), or the
teacher's of P(k) and the student's of other classes ("mixed"); "teacher" is the ablation NTPT. The paper's symbols are
known from its reviews alone. Is k its own positive? With `include_own_teacher`. Who anchors L_MM? New samples, and with
`anchors=None` all. A sample that no longer has a teacher? Give the teacher's rows of R alone: then the others are never
positives.

Source: Cappellazzo et al. 2023, "Continual Contrastive Spoken Language Understanding", arXiv 2310.02699.
"""

from __future__ import annotations

import copy
import os
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastcontrast.distributed._lse import similarity_lse
from fastcontrast.distributed._sums import numbers, positive_sums
from fastcontrast.losses._common import features, reduce
from fastcontrast.ops import _check as check
from fastcontrast.ops._precision import float32, without_autocast
from fastcontrast.ops._segments import against_positives

from ._parts.coconut_loop import Coconut
from ._parts.coconut_memory import Rehearsal
from ._parts.coconut_model import SpeechToIntent
from ._parts.coconut_run import learn
from ._parts.coconut_speech import Speech
from ._shared.report import Report

__all__ = ["Coconut", "Rehearsal", "SpeechToIntent", "mm_loss", "nspt_loss", "run"]

STEPS, BATCH, REPLAYED, RATE = 80, 32, 16, 2e-3  # steps of each task
CLASSES, EACH, TASKS = 12, 30, 4
KEPT = 24  # of a task's 270 samples: as many a class as 1 % of the paper's data leaves
MODELS = {
    "experience replay": {"of_mm": 0.0, "of_nspt": 0.0},
    "COCONUT, teacher's text": {"of_written": 0.1},
    "COCONUT": {},
}


@without_autocast
def nspt_loss(
    student: Tensor,  # [N, D]
    teacher: Tensor,  # [N, D] or [R, D]
    labels: Tensor,  # [N] integer
    replayed: Tensor,  # [N] bool, R of them
    tau: float = 0.1,
    *,
    bank: str = "student",
    include_own_teacher: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """L_NSPT above, of features of length 1. The teacher takes no gradient; a student that is no anchor has its own
    through the denominator alone.

    An anchor without a positive or a denominator gives 0 and does not count in the mean; without anchors all is 0.

    Args:
        teacher: of all samples, or of the replayed ones in their order; others are then no positives.
        bank: the denominator's: "student", "mixed" or "teacher", see FAQ.
        include_own_teacher: whether k is in P(k), and in a denominator of the teacher's features.
        reduction: "mean" over anchors, "sum", or "none" for [R].

    Raises: ValueError or TypeError naming the argument, what was expected and what came.
    """
    op = "nspt_loss"
    check.one_of(op, "bank", bank, ("student", "mixed", "teacher"))
    student, teacher = features(op, student, teacher.detach(), ("student", "teacher"))
    check.vector(op, "labels", labels, len(student), student, floating=False)
    check_mask(op, "replayed", replayed, len(labels))
    index = numbers(len(student), student.device)
    anchors, own, classes = student[replayed], index[replayed], labels[replayed]
    scale = check.scalar(op, "1 / tau", 1 / tau, student)
    taught, known = (index, labels) if len(teacher) == len(student) else (own, classes)
    if len(teacher) != len(taught) or (bank == "teacher" and taught is own):
        least = "" if bank == "teacher" else f" or {len(own)}"
        raise ValueError(f"{op}: teacher must have {len(student)}{least} rows, got {len(teacher)}")
    # Equal ids do not meet: an anchor and its own teacher, unless it is included.
    ids = {"query_ids": own, "key_ids": -1 - taught if include_own_teacher else taught}
    total, count = positive_sums(float32(anchors), float32(teacher), scale, None, classes, known, *ids.values())
    if bank == "student":
        lse = similarity_lse(anchors, student, scale, query_ids=own, key_ids=index, positives=-1)
    elif bank == "teacher":
        lse = similarity_lse(anchors, teacher, scale, **ids, positives=-1)
    else:
        others = similarity_lse(anchors, student, scale, query_ids=classes, key_ids=labels, positives=-1)
        alike = similarity_lse(anchors, teacher, scale, **ids, positives=-1, guide=same_class(classes, known))
        lse = torch.logaddexp(others.masked_fill(count == 0, 0.0), alike)  # of −inf twice the gradient would be NaN
    losses, valid = against_positives(lse, total, count.masked_fill(torch.isneginf(lse), 0))
    return reduce(op, losses, None, reduction, valid.sum(), like=student)


def check_mask(op: str, name: str, x: Tensor, rows: int) -> None:
    if x.dtype != torch.bool or x.shape != (rows,):
        raise ValueError(f"{op}: {name} must be bool [{rows}], got {x.dtype} {list(x.shape)}")


def same_class(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, float]:  # [A], [N] integer
    """A guide of `similarity_lse` that leaves equal labels alone: of the 64 bits as ±1, ⟨b, b'⟩ = 64 only if b = b'."""
    bits = torch.arange(64, device=queries.device)
    of_queries, of_keys = (((x.long()[:, None] >> bits & 1) * 2 - 1).float() for x in (queries, keys))
    return -of_queries, of_keys, -63.0


@without_autocast
def mm_loss(
    audio: Tensor,  # [N, D]
    text: Tensor,  # [N, D]
    labels: Tensor,  # [N] integer
    anchors: Tensor | None = None,  # [N] bool
    tau: float = 0.1,
    *,
    hard: bool = False,
    reduction: str = "sum",
) -> Tensor:
    """L_MM above, of features of length 1: both directions in one sweep, over the anchors (None: all). With `hard`,
    P(k) = {k}. Reduction "mean" is over anchors, "none" gives a value an anchor.

    Raises: ValueError or TypeError naming the argument, what was expected and what came.
    """
    op = "mm_loss"
    audio, text = features(op, audio, text, ("audio", "text"))
    check.vector(op, "labels", labels, len(audio), audio, floating=False)
    if len(text) != len(audio):
        raise ValueError(f"{op}: text must have {len(audio)} rows like audio, got {len(text)}")
    if anchors is not None:
        check_mask(op, "anchors", anchors, len(audio))
    scale = check.scalar(op, "1 / tau", 1 / tau, audio)
    classes = numbers(len(labels), labels.device) if hard else labels
    swept = similarity_lse(audio, text, scale, dim="both", positives=-1)
    sums = (positive_sums(float32(x), float32(y), scale, None, classes, classes, None, None)
            for x, y in ((audio, text), (text, audio)))  # fmt: skip
    losses = sum(against_positives(lse, *found)[0] for lse, found in zip(swept, sums, strict=True))
    return reduce(op, losses if anchors is None else losses[anchors], None, reduction, like=audio)


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Twelve packages in four tasks, to be told from sentences of their docstrings that are spoken: by espeak-ng where
    it is installed, else as sounds of their letters. From the same start and with the same memory: experience replay,
    COCONUT that also learns what its teacher writes, and COCONUT. All forget most of their first task.
    """
    steps = STEPS if steps is None else steps
    speech = Speech(CLASSES, EACH, limit, seed)
    settings = {"batch": BATCH, "replayed": REPLAYED, "kept": KEPT, "spoken_by": speech.spoken_by}
    report = Report("coconut", output, steps=steps, seed=seed, limit=limit, **settings)
    tasks = list(torch.arange(len(speech.names)).tensor_split(TASKS))
    torch.manual_seed(seed)
    start = SpeechToIntent(speech.tokenizer.get_vocab_size())
    for label, terms in MODELS.items():
        mm = partial(mm_loss, reduction="mean")  # λ then depends on no batch
        coconut = Coconut(copy.deepcopy(start), KEPT * TASKS, mm, nspt_loss, seed=seed, **terms)
        with report.model(label) as found:
            found.losses, found.metrics = learn(
                label, coconut, speech, tasks, steps, KEPT, batch=BATCH, replayed=REPLAYED, rate=RATE, seed=seed
            )
    return report.close(coconut.model, intents=speech.names)
