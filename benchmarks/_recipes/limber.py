"""LiMBeR: the loss of GPT-J's vocabulary behind 144 tokens of a frozen model, whose head needs no gradient."""

from __future__ import annotations

from .._harness import Workload
from .close import workload


def workloads(quick: bool) -> list[Workload]:
    shape = (8, 9, 16, 64, 4096) if quick else (64, 144, 32, 1024, 50_258)
    return [workload("limber", shape, 2, quick, frozen=True)]
