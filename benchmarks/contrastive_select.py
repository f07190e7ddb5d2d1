"""`contrastive_candidates` and `contrastive_select`: what a step of contrastive search does beside the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastcontrast.ops import contrastive_candidates, contrastive_select
from fastcontrast.testing.shapes import Shape

from . import _pytest
from ._harness import Bar, Floor, Provider, Step, Workload

ALPHA = 0.6


class Problem(NamedTuple):
    logits: Tensor  # [B, V]
    hidden: Tensor  # [B, K, D]
    context: Tensor  # [B, T, D]


def maker(v: int, t: int) -> Callable[[Shape], Problem]:
    def make(shape: Shape) -> Problem:
        """Rows (m), candidates (n)."""
        random = torch.Generator().manual_seed(0)
        tiny = shape.name == "tiny"
        logits = 3 * torch.randn(shape.m, 64 if tiny else v, generator=random)
        hidden = torch.randn(shape.m, shape.n, shape.d, generator=random)
        return Problem(logits, hidden, torch.randn(shape.m, 8 if tiny else t, shape.d, generator=random))

    return make


def ours(problem: Problem) -> tuple[Tensor, ...]:
    p, _ = contrastive_candidates(problem.logits, problem.hidden.shape[1])
    return p, contrastive_select(p, problem.hidden, problem.context, alpha=ALPHA).score


def dense(problem: Problem) -> tuple[Tensor, ...]:
    """As `transformers` did: softmax and top-k, the context k times, normalised, one product a candidate."""
    (b, k, d), t = problem.hidden.shape, problem.context.shape[1]
    p, _ = problem.logits.softmax(-1).topk(k)
    context = problem.context.repeat_interleave(k, 0)
    context = context / context.norm(dim=2, keepdim=True)
    hidden = problem.hidden.reshape(b * k, 1, d)
    cosines = torch.matmul(context, (hidden / hidden.norm(dim=2, keepdim=True)).transpose(1, 2)).squeeze(-1)
    penalty = (cosines + cosines.new_zeros(b * k, t)).max(-1).values
    return p, (1 - ALPHA) * p - ALPHA * penalty.view(b, k)


def exact(problem: Problem) -> tuple[Tensor, ...]:
    return dense(Problem(*(x.double() for x in problem)))


def reads(problem: Problem) -> Step:
    def step() -> None:
        problem.logits.sum()
        problem.context.sum()

    return step


def step_of(run: Callable[[Problem], tuple[Tensor, ...]]) -> Callable[[Problem], Step]:
    return lambda problem: lambda: run(problem)


def workload(b: int, k: int, v: int, t: int, d: int) -> Workload:
    providers = {"fastcontrast": Provider(step_of(ours)), "torch, as transformers did": Provider(step_of(dense))}
    bars = (Bar("torch, as transformers did", "fastcontrast", at_least=2.0),)
    name = f"B = {b}, V = {v:,}, T = {t:,}, d = {d}, k = {k}"
    floors = {"one read": Floor({"sums": reads})}
    shape, tiny = Shape("step", b, k, d), Shape("tiny", 1, 2, 16)
    return Workload(name, shape, tiny, maker(v, t), exact, providers, floors, bars, reps=21)


def workloads(quick: bool) -> list[Workload]:
    if quick:
        return [workload(2, 5, 1000, 64, 64)]
    return [workload(1, 5, 50257, 512, 768), workload(1, 8, 128256, 4096, 4096), workload(8, 5, 49152, 1024, 576)]


def pytest_generate_tests(metafunc) -> None:
    _pytest.parametrise(metafunc, workloads)


def test_speed(benchmark, case) -> None:
    _pytest.measure(benchmark, case)
