"""`maxsim`, late interaction, against the dense form: scores of all pairs of tokens, their maximum, its sum.

The floor is the bare product of all query tokens with all document tokens, which nobody can do without; the backward
needs no other. Tokens are multiples of 1/128, so that every score is exact in float32: otherwise the rounding of a few
of these millions of maxima puts another token first than float64 does, and each is an error of 1e-3 in a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastcontrast.ops import maxsim
from fastcontrast.testing.shapes import COLBERT, Interaction

from . import _pytest
from . import _rivals as rivals
from ._harness import Bar, Floor, Provider, Step, Workload

TINY = Interaction("tiny", 2, 3, 4, 20, 8)
ROWS = 2048  # document tokens of the floor's tiles
OURS, DENSE, COMPILED, FLOOR = "fastcontrast", "dense torch", "dense torch, compiled", "one product"


class Problem(NamedTuple):
    queries: Tensor  # [B, Tq, D]
    documents: Tensor  # [C, Td, D]
    upstream: Tensor  # [B, C]


def make_problem(shape: Interaction) -> Problem:
    random = torch.Generator().manual_seed(0)
    sizes = ((shape.b, shape.tq, shape.d), (shape.c, shape.td, shape.d))
    tokens = [(128 * torch.randn(size, generator=random)).round() / 128 for size in sizes]
    return Problem(*tokens, torch.randn(shape.b, shape.c, generator=random))


def dense(queries: Tensor, documents: Tensor) -> Tensor:
    """With `max`, whose backward goes to one token and is faster than that of `amax`, which divides among equals."""
    return torch.einsum("bid,cjd->bcij", queries, documents).max(3).values.sum(2)


def outputs(function: Callable, problem: Problem, backward: bool) -> tuple[Tensor, ...]:
    if not backward:
        with torch.no_grad():
            return (function(problem.queries, problem.documents),)
    leaves = [x.detach().requires_grad_() for x in problem[:2]]
    scores = function(*leaves)
    return scores.detach(), *torch.autograd.grad(scores, leaves, problem.upstream.to(scores.dtype))


def provider(make: Callable[[], Callable], backward: bool, **options) -> Provider:
    def step_of(problem: Problem) -> Step:
        function = make()
        return lambda: outputs(function, problem, backward)

    return Provider(step_of, memory=1, **options)


def exact(problem: Problem, backward: bool) -> tuple[Tensor, ...]:
    """Dense float64, a document at a time."""
    queries, documents, upstream = (x.double() for x in problem)
    scores, dq, dd = [], torch.zeros_like(queries), []
    for document, g in zip(documents.split(1), upstream.T, strict=True):
        found = outputs(dense, Problem(queries, document, g[:, None]), backward)
        scores.append(found[0])
        if backward:
            dq += found[1]
            dd.append(found[2])
    return torch.cat(scores, 1), *((dq, torch.cat(dd)) if backward else ())


def product(problem: Problem, tiles: int | None = None) -> Step:
    """A tile after another in the same memory, or the whole at once."""
    rows, columns = problem.documents.flatten(0, 1), problem.queries.flatten(0, 1).T
    parts = rows.split(tiles or len(rows))
    out = rows.new_empty(len(parts[0]), columns.shape[1])

    def run() -> None:
        for part in parts:
            torch.mm(part, columns, out=out[: len(part)])

    return run


def workload(shape: Interaction, backward: bool, bars: tuple[Bar, ...], compile: bool = True, **options) -> Workload:
    scores = 4 * shape.b * shape.tq * shape.c * shape.td
    rival = partial(provider, backward=backward, needs=4 * scores)
    providers = {OURS: provider(lambda: maxsim, backward), DENSE: rival(lambda: dense)}
    if compile:
        providers[COMPILED] = rival(lambda: rivals.compiled(dense), compiles=True)
    floors = {FLOOR: Floor({"tiled": partial(product, tiles=ROWS), "whole": product})}
    name = f"{shape.name} {shape.b} × {shape.tq}, {shape.c} × {shape.td}{'' if backward else ', scores alone'}"
    truth = partial(exact, backward=backward)
    return Workload(name, shape, TINY, make_problem, truth, providers, floors, bars, **options)


def faster(times: float, compiled: float) -> tuple[Bar, ...]:
    return Bar(DENSE, OURS, at_least=times), Bar(COMPILED, OURS, at_least=compiled)


def smaller(times: float) -> Bar:
    return Bar(DENSE, OURS, at_least=times, what="peak_extra_bytes")


def workloads(quick: bool) -> list[Workload]:
    if quick:
        return [workload(Interaction("colbert", 8, 32, 8, 60, 128), True, (), compile=False)]
    colbert, documents, search = COLBERT
    return [
        workload(colbert, True, (*faster(2.0, 2.0), smaller(10.0))),
        workload(documents, True, (*faster(2.0, 2.0), smaller(10.0)), reps=5),
        workload(colbert, False, ()),
        workload(search, False, (smaller(10.0),), reps=3),
    ]


def pytest_generate_tests(metafunc) -> None:
    _pytest.parametrise(metafunc, workloads)


def test_speed(benchmark, case) -> None:
    _pytest.measure(benchmark, case)
