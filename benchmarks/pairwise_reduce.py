"""`pairwise_reduce` on ProCLIP's structure loss, Σ_{i<j} h(d(a_i, a_j) − d(e_i, e_j)), against the same function dense.

Of the distances below the diagonal neither side needs any, but only tiles can leave them out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.ops import pairwise_reduce
from fastcontrast.testing.shapes import Shape

from . import _pytest
from . import _rivals as rivals
from ._harness import Bar, Provider, Step, Workload
from ._products import floor

MIB = 1 << 20
TINY = Shape("tiny", 1100, 1100, 32)  # more than a tile: the first checkpoint of a process imports much


class Problem(NamedTuple):
    queries: Tensor  # [N, D], the student
    keys: Tensor  # [N, D], the teacher


def make_problem(shape: Shape) -> Problem:
    random = torch.Generator().manual_seed(0)
    teacher, noise = (F.normalize(torch.randn(shape.n, shape.d, generator=random), dim=1) for _ in range(2))
    return Problem(F.normalize(teacher + noise, dim=1).requires_grad_(), teacher)


def distances(a: Tensor, b: Tensor) -> Tensor:
    squares = (2 - 2 * a @ b.T).clamp(min=0)
    apart = squares > 0
    return torch.where(apart, squares.where(apart, 1.0).sqrt(), 0.0)


def structure(teacher: Tensor, a: Tensor, b: Tensor, i: Tensor, j: Tensor) -> Tensor:
    difference = distances(a, b) - distances(teacher[i], teacher[j])
    loss = F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none")
    return torch.where(j > i[:, None], loss, 0.0).sum()


def tiled(student: Tensor, teacher: Tensor, **options) -> Tensor:
    return pairwise_reduce(partial(structure, teacher), student, student, **options)


def dense(student: Tensor, teacher: Tensor) -> Tensor:
    index = torch.arange(len(student))
    return structure(teacher, student, student, index, index)


def provider(loss: Callable[[], Callable], **options) -> Provider:
    def make(problem: Problem) -> Step:
        function = loss()

        def step() -> tuple[Tensor, ...]:
            value = function(*problem)
            return (value.detach(), *torch.autograd.grad(value, problem.queries))

        return step

    return Provider(make, memory=True, **options)


def truth(problem: Problem) -> tuple[Tensor, ...]:
    """Float64 of the same sum, by blocks."""
    student, teacher = problem.queries.detach().double().requires_grad_(), problem.keys.double()
    value = tiled(student, teacher, block=512)
    return (value.detach(), *torch.autograd.grad(value, student))


def proclip(n: int, bars: tuple[Bar, ...] = (), compile: bool = True, **options) -> Workload:
    shape = Shape(f"proclip_{n}", n, n, 512)
    rival = partial(provider, needs=12 * 4 * n * n)
    providers = {
        "fastcontrast": provider(lambda: tiled),
        "fastcontrast, upper": provider(lambda: partial(tiled, upper=True)),
        "dense torch": rival(lambda: dense),
    }
    if compile:
        providers["dense torch, compiled"] = rival(lambda: rivals.compiled(dense), compiles=True)
    # Both distances twice, and the student's gradient from either side: 6 halves.
    return Workload(
        f"structure {n}", shape, TINY, make_problem, truth, providers, floor(3, kept=False), bars, **options
    )


def workloads(quick: bool) -> list[Workload]:
    if quick:
        return [proclip(1024, compile=False)]
    upper = "fastcontrast, upper"
    return [
        proclip(
            4096,
            (
                Bar("dense torch", "fastcontrast", at_least=1.2),
                Bar("dense torch", upper, at_least=2.0),
                Bar(upper, at_most=128 * MIB, what="peak_extra_bytes"),
            ),
            reps=5,
        ),
        proclip(512, (Bar("fastcontrast", "dense torch", at_most=1.1),), compile=False, reps=15),
    ]


def pytest_generate_tests(metafunc) -> None:
    _pytest.parametrise(metafunc, workloads)


def test_speed(benchmark, case) -> None:
    _pytest.measure(benchmark, case)
