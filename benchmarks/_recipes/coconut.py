"""COCONUT's two contrasts, of speech and text, and of replayed speech with a teacher: a batch as small as the paper's,
and a large one. A quarter of a batch is replayed; the mixed bank is the one that needs three sweeps."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.recipes.coconut import mm_loss, nspt_loss

from .._harness import OURS, Bar, Workload
from . import against_dense


def inputs(shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """The student's features of speech, text, those of the teacher, labels, and which rows are replayed."""
    generator, (rows, width) = torch.Generator().manual_seed(0), shape
    student = torch.randn(rows, width, generator=generator)
    others = [student + torch.randn(rows, width, generator=generator) for _ in range(2)]
    student, text, teacher = (F.normalize(x, dim=1) for x in (student, *others))
    labels = torch.randint(30, (rows,), generator=generator)
    return student.requires_grad_(), text.requires_grad_(), teacher, labels, torch.arange(rows) < rows // 4


def ours(student: Tensor, text: Tensor, teacher: Tensor, labels: Tensor, replayed: Tensor, bank: str) -> Tensor:
    nspt = nspt_loss(student, teacher[replayed], labels, replayed, bank=bank)
    return mm_loss(student, text, labels, ~replayed, reduction="mean") + nspt


def dense(student: Tensor, text: Tensor, teacher: Tensor, labels: Tensor, replayed: Tensor, bank: str) -> Tensor:
    """Gram matrices and boolean masks."""
    alike = labels[:, None] == labels
    share = alike / alike.sum(1, keepdim=True)
    matches = student @ text.T / 0.1
    mm = -((matches.log_softmax(1) + matches.T.log_softmax(1)) * share).sum(1)[~replayed].mean()
    anchors, known = student[replayed], alike[replayed][:, replayed]
    positives, others = anchors @ teacher[replayed].T / 0.1, anchors @ student.T / 0.1
    if bank == "student":
        own = torch.eye(len(labels), dtype=torch.bool)[replayed]
        lse = others.masked_fill(own, float("-inf")).logsumexp(1)
    else:
        both = (others, alike[replayed]), (positives, ~known)
        lse = torch.cat([x.masked_fill(mask, float("-inf")) for x, mask in both], 1).logsumexp(1)
    return mm + (lse - (positives * known).sum(1) / known.sum(1)).mean()


def workloads(quick: bool) -> list[Workload]:
    shapes = [(64, 32)] if quick else [(32, 256), (4096, 256)]
    bars = {
        4096: (
            Bar("dense torch", OURS, at_least=2.0),
            Bar("dense torch", OURS, at_least=3.0, what="peak_extra_bytes"),  # our workspace is 64 MiB
        ),
    }
    return [
        against_dense(
            f"coconut {rows} × {width}, {bank}", (rows, width), (16, 16), inputs,
            partial(ours, bank=bank), partial(dense, bank=bank),
            # Speech against text in both directions, and the replayed against all; forward, and two backward.
            products=[(rows, rows, width, 3), (rows // 4, rows, width, 3)],
            bars=bars.get(rows, ()), needs=12 * 4 * rows * rows, compile=not quick,
        )
        for rows, width in shapes for bank in ("student", "mixed")
    ]  # fmt: skip
