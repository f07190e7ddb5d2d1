"""MEND: the loss of fine-tuning over GPT-2's vocabulary, 1024 tokens of queries, a sixteenth of them in answers. The
head is frozen: gradients go to the student's states alone."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.recipes._shared.language import IGNORED
from fastcontrast.recipes.mend import mend_loss

from .._harness import OURS, Bar, Workload
from . import MIB, against_dense

ANSWERS = 16  # one token of so many


def inputs(shape: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """States of student and teacher, which half agree, the head, and the tokens that follow."""
    tokens, entries, width = shape
    generator = torch.Generator().manual_seed(0)
    student, other = (torch.randn(tokens, width, generator=generator) for _ in range(2))
    weight = torch.randn(entries, width, generator=generator) * 2 / width**0.5
    targets = torch.full((tokens,), IGNORED)
    targets[::ANSWERS] = torch.randint(entries, targets[::ANSWERS].shape, generator=generator)
    return student.requires_grad_(), (student.detach() + other) / 2**0.5, weight, targets


def dense(student: Tensor, teacher: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits, taught = student @ weight.T, (teacher @ weight.T).log_softmax(1)
    distill = F.kl_div(logits.log_softmax(1), taught, log_target=True, reduction="batchmean")
    return F.cross_entropy(logits, targets) + distill


def workloads(quick: bool) -> list[Workload]:
    tokens, entries, width = shape = (64, 1003, 64) if quick else (1024, 50_257, 1280)
    make = partial(
        against_dense, shape=shape, tiny=(32, 128, 32), inputs=inputs, ours=mend_loss, dense=dense, reps=3,
        products=[(tokens, entries, width, 3), (tokens // ANSWERS, entries, width, 2)], needs=24 * tokens * entries,
    )  # fmt: skip
    name = f"mend {tokens} tokens × {width}, vocabulary {entries}"
    # Dense torch has the logits of both terms at once, and no product that we lack: time can only be equal.
    speed = Bar(OURS, "products", at_most=1.3), Bar("dense torch", OURS, at_least=1.0)
    whole = make(name, compile=not quick, bars=() if quick else speed)
    if quick:
        return [whole]
    smaller = (Bar("dense torch", OURS, at_least=10, what="peak_extra_bytes"),)
    return [whole, make(f"{name}, in 32 MiB", workspace=32 * MIB, compile=False, bars=smaller)]
