"""`triplet_distances`, both mean squared distances of a batch of latents, against what torch does with them.

All of it is memory: the floors are bare reads of the three tensors, and for a training step a second read and bare
writes of two gradients (those of the two predictions; the noise has none).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastcontrast.ops import triplet_distances
from fastcontrast.testing.shapes import LATENTS

from . import _pytest
from . import _rivals as rivals
from ._harness import Bar, Floor, Provider, Step, Workload

OURS, EAGER, COMPILED = "fastcontrast", "torch", "torch, compiled"


class Problem(NamedTuple):
    target: Tensor  # [B, ...]
    positive: Tensor  # [B, ...]
    negative: Tensor  # [B, ...]
    upstream: Tensor  # [2, B]


def make_problem(shape: tuple[int, ...]) -> Problem:
    random = torch.Generator().manual_seed(0)
    target, *noises = (torch.randn(shape, generator=random) for _ in range(3))
    upstream = torch.randn(2, shape[0], generator=random)
    return Problem(target, target + 0.1 * noises[0], target + 0.12 * noises[1], upstream)


def squares(target: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    return tuple((x - target).square().flatten(1).mean(1) for x in (positive, negative))


def losses(target: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """As recipes write it."""
    mse = torch.nn.functional.mse_loss
    return tuple(mse(x, target, reduction="none").mean(tuple(range(1, x.ndim))) for x in (positive, negative))


def outputs(function: Callable, problem: Problem, backward: bool) -> tuple[Tensor, ...]:
    if not backward:
        return tuple(function(*problem[:3]))
    leaves = [x.detach().requires_grad_() for x in problem[1:3]]
    distances = function(problem.target, *leaves)
    upstream = [g.to(x.dtype) for g, x in zip(problem.upstream, distances, strict=True)]
    return *(x.detach() for x in distances), *torch.autograd.grad(distances, leaves, upstream)


def provider(make: Callable[[], Callable], backward: bool, **options) -> Provider:
    def step_of(problem: Problem) -> Step:
        function = make()
        return lambda: outputs(function, problem, backward)

    return Provider(step_of, memory=1, **options)


def reads(problem: Problem, backward: bool, reduce: Callable = torch.sum) -> Step:
    gradients = [torch.empty_like(x) for x in problem[1:3]]

    def run() -> None:
        for x in problem[:3]:
            reduce(x)
        if backward:
            reduce(problem.target)
            for gradient, x in zip(gradients, problem[1:3], strict=True):
                gradient.copy_(x)

    return run


def workload(shape: tuple[int, ...], backward: bool, bars: tuple[Bar, ...], compile: bool = True) -> Workload:
    name = f"{' × '.join(map(str, shape))}{'' if backward else ', distances alone'}"
    providers = {OURS: provider(lambda: triplet_distances, backward), EAGER: provider(lambda: squares, backward)}
    providers["torch, mse_loss"] = provider(lambda: losses, backward)
    if compile:
        providers[COMPILED] = provider(lambda: rivals.compiled(squares), backward, compiles=True)
    bare = {
        "sum": lambda problem: reads(problem, backward),
        "largest": lambda problem: reads(problem, backward, torch.max),
    }
    floors = {"reads and writes" if backward else "three reads": Floor(bare)}

    def exact(problem: Problem) -> tuple[Tensor, ...]:
        return outputs(squares, Problem(*(x.double() for x in problem)), backward)

    return Workload(name, shape, (2, 4, 3, 3), make_problem, exact, providers, floors, bars, reps=31)


def workloads(quick: bool) -> list[Workload]:
    if quick:
        return [workload((8, 4, 32, 32), True, (), compile=False)]
    return [
        workload(
            LATENTS,
            True,
            (
                Bar(EAGER, OURS, at_least=2.0),
                Bar(EAGER, OURS, at_least=10.0, what="peak_extra_bytes"),
                Bar(OURS, "reads and writes", at_most=1.5),
            ),
        ),
        workload(LATENTS, False, (Bar(EAGER, OURS, at_least=2.0), Bar(OURS, "three reads", at_most=1.5))),
    ]


def pytest_generate_tests(metafunc) -> None:
    _pytest.parametrise(metafunc, workloads)


def test_speed(benchmark, case) -> None:
    _pytest.measure(benchmark, case)
