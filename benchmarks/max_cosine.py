"""`max_cosine`: the degeneration penalty of a decoding step, against one read of the context and what torch does.

Between two steps the model's weights go through the caches, so that a context comes from memory each time: here each
call takes the next of as many contexts as fill half a gigabyte.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.ops import max_cosine
from fastcontrast.testing.shapes import Shape

from . import _pytest
from ._harness import Bar, Floor, Provider, Step, Workload

BYTES = 512 << 20


class Problem(NamedTuple):
    candidates: Tensor  # [1, K, D]
    contexts: list[Tensor]  # each [1, T, D]


def make_problem(shape: Shape) -> Problem:
    """K candidates (m), T positions (n)."""
    random = torch.Generator().manual_seed(0)
    count = max(1, BYTES // (4 * shape.n * shape.d)) if shape.n > 64 else 1
    contexts = [torch.randn(1, shape.n, shape.d, generator=random) for _ in range(count)]
    return Problem(torch.randn(1, shape.m, shape.d, generator=random), contexts)


def over_contexts(run: Callable[[Problem, Tensor], tuple[Tensor, ...] | None]) -> Callable[[Problem], Step]:
    """A step that takes the next context at each call; the first call, which is checked, the first."""

    def make(problem: Problem) -> Step:
        contexts = itertools.cycle(problem.contexts)
        return lambda: run(problem, next(contexts))

    return make


def ours(problem: Problem, context: Tensor) -> tuple[Tensor, ...]:
    return (max_cosine(problem.candidates, context)[0],)


def dense(problem: Problem, context: Tensor) -> tuple[Tensor, ...]:
    """As `transformers` ranked candidates: the context normalised anew in each step, then a product."""
    unit = context / context.norm(dim=2, keepdim=True)
    return ((F.normalize(problem.candidates, dim=2) @ unit.mT).amax(2),)


def product(problem: Problem, context: Tensor) -> tuple[Tensor, ...]:
    """Torch's best: the product with the context as it is, norms apart."""
    cosines = F.normalize(problem.candidates, dim=2) @ context.mT / torch.linalg.vector_norm(context, dim=2)[:, None]
    return (cosines.amax(2),)


def reads(function: Callable[[Tensor], Tensor]) -> Callable[[Problem, Tensor], None]:
    def run(problem: Problem, context: Tensor) -> None:
        function(context)

    return run


def exact(problem: Problem) -> tuple[Tensor, ...]:
    a, b = problem.candidates.double(), problem.contexts[0].double()
    return ((F.normalize(a, dim=2) @ F.normalize(b, dim=2).mT).amax(2),)


def workload(k: int, t: int, d: int, bars: bool = True) -> Workload:
    read = Floor({"sum": over_contexts(reads(torch.sum)), "largest": over_contexts(reads(torch.max))})
    providers = {
        "fastcontrast": Provider(over_contexts(ours)),
        "torch, product and norms": Provider(over_contexts(product)),
        "torch, as transformers did": Provider(over_contexts(dense)),
    }
    claims = (
        Bar("fastcontrast", "one read", at_most=1.3),
        Bar("torch, product and norms", "fastcontrast", at_least=1.0),
        Bar("torch, as transformers did", "fastcontrast", at_least=1.5),
    )
    shape = Shape(f"context_{t}", k, t, d)
    name = f"T = {t:,}, d = {d}, k = {k}"
    return Workload(name, shape, Shape("tiny", 2, 8, 16), make_problem, exact, providers, {"one read": read},
                    claims if bars else (), reps=101)  # fmt: skip


def workloads(quick: bool) -> list[Workload]:
    if quick:
        return [workload(5, 128, 64, bars=False)]
    return [workload(5, 512, 768), workload(8, 1024, 768), workload(5, 512, 576), workload(8, 4096, 4096)]


def pytest_generate_tests(metafunc) -> None:
    _pytest.parametrise(metafunc, workloads)


def test_speed(benchmark, case) -> None:
    _pytest.measure(benchmark, case)
