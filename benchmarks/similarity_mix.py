"""`similarity_mix`: soft retrieval and attention of one head, against bare products, dense torch and torch's kernel.

A *product* is one matrix product of 2·M·N·D FLOP, D being also the width of the values. The forward needs 2; forward
and backward to queries, keys and values 7, as nothing of size M × N is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.ops import similarity_mix
from fastcontrast.testing.shapes import Shape, named

from . import _pytest
from . import _rivals as rivals
from ._harness import Bar, Floor, Provider, Step, Workload
from ._products import floor, tiled, whole
from ._rivals import SCALE

MIB = 1 << 20
TINY = Shape("tiny", 64, 64, 32)


class Problem(NamedTuple):
    queries: Tensor  # [M, D]
    keys: Tensor  # [N, D]
    values: Tensor  # [N, D]
    upstream: Tensor  # [M, D], of the mix

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self[:3]


def make_problem(shape: Shape, bank: bool = False) -> Problem:
    """Unit vectors, half of the queries near a key; of a bank the values are the keys, and nothing needs a gradient."""
    random = torch.Generator().manual_seed(0)
    q, k, v, upstream = (torch.randn(rows, shape.d, generator=random) for rows in (shape.m, shape.n, shape.n, shape.m))
    k = F.normalize(k, dim=1)
    near = min(shape.m // 2, shape.n)
    q[:near] = q[:near] / shape.d**0.5 + k[:near]
    q = F.normalize(q, dim=1)
    if bank:
        return Problem(q, k, k, upstream)
    return Problem(*(x.requires_grad_() for x in (q, k, v)), upstream)


def truth(problem: Problem, gradients: bool = True) -> tuple[Tensor, ...]:
    """Dense float64, some rows at a time."""
    q, k, v = (x.detach().double().requires_grad_(gradients) for x in problem.leaves)
    outs = []
    for rows in range(0, len(q), 512):
        block = slice(rows, rows + 512)
        out = torch.softmax(SCALE * q[block] @ k.T, 1) @ v
        if gradients:
            (out * problem.upstream[block]).sum().backward()
        outs.append(out.detach())
    return (torch.cat(outs), *((q.grad, k.grad, v.grad) if gradients else ()))


# ----------------------------------------------------------------------------------------------------------- providers


def dense(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return torch.softmax(SCALE * queries @ keys.T, 1) @ values


def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(queries[None, None], keys[None, None], values[None, None], scale=SCALE)[0, 0]


def ours(queries: Tensor, keys: Tensor, values: Tensor, **options) -> Tensor:
    return similarity_mix(queries, keys, values, SCALE, **options)


def provider(mix: Callable[[], Callable], gradients: bool, **options) -> Provider:
    def make(problem: Problem) -> Step:
        function = mix()

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(*problem.leaves),)

        def both() -> tuple[Tensor, ...]:
            out = function(*problem.leaves)
            return (out.detach(), *torch.autograd.grad(out, problem.leaves, problem.upstream))

        return both if gradients else forward

    return Provider(make, **options)


def seven(variant: Callable, problem: Problem) -> Step:
    """Logits and means; logits again with the gradients of queries and keys; slopes with the gradient of the values."""
    steps = [variant(2, problem), variant(3, problem), variant(2, problem)]
    return lambda: [step() for step in steps] and None


# ----------------------------------------------------------------------------------------------------------- workloads


def workload(label: str, shape: Shape, gradients: bool, bars: tuple[Bar, ...], compile: bool, **options) -> Workload:
    weights = 4 * shape.m * shape.n
    make = partial(provider, gradients=gradients)
    rival = partial(make, memory=True, needs=4 * weights)
    providers = {
        "fastcontrast": make(lambda: ours, memory=True),
        "F.scaled_dot_product_attention": make(lambda: attention, memory=True),
        "dense torch": rival(lambda: dense),
    }
    if compile:
        providers["dense torch, compiled"] = rival(lambda: rivals.compiled(dense), compiles=True)
    floors = floor(2)
    if gradients:
        bare = {"tiled": partial(tiled, kept=False), "whole": whole}
        floors = {"7 products": Floor({name: partial(seven, variant) for name, variant in bare.items()})}
    exact = partial(truth, gradients=gradients)
    options = {"inputs": make_problem, **options}
    return Workload(label, shape, TINY, truth=exact, providers=providers, floors=floors, bars=bars, **options)


def forward(name: str, bars: tuple[Bar, ...] = (), compile: bool = True, **options) -> Workload:
    shape = named(name)
    return workload(f"mix, forward {shape.n}", shape, False, bars, compile, **options)


def both(name: str, bars: tuple[Bar, ...] = (), compile: bool = True, **options) -> Workload:
    shape = named(name)
    return workload(f"mix {shape.n}", shape, True, bars, compile, **options)


def bank(n: int, bars: tuple[Bar, ...] = (), **options) -> Workload:
    """uCLIP's retrieval: a batch of 512 texts against a bank of features, each of which is also its own value."""
    shape = Shape(f"bank_{n}", 512, n, 512)
    return workload(f"bank {n}", shape, False, bars, False, inputs=partial(make_problem, bank=True), **options)


def workloads(quick: bool) -> list[Workload]:
    if quick:
        return [forward("batch_2048", compile=False), both("batch_2048", compile=False), bank(20_000)]
    name, never_slower = "fastcontrast", (Bar("fastcontrast", "dense torch", at_most=1.0),)
    memory = Bar(name, at_most=100 * MIB, what="peak_extra_bytes")
    return [
        forward("batch_8192", (Bar(name, "2 products", at_most=1.15), memory), reps=5),
        both("batch_8192", (Bar(name, "7 products", at_most=1.15), memory), reps=5),
        bank(200_000, (Bar(name, "2 products", at_most=1.15), *never_slower, memory), reps=5),
        *(run(f"batch_{n}", compile=False, reps=15) for run in (forward, both) for n in (128, 512)),
        *(
            run("batch_2048", (Bar(name, "dense torch", at_most=1.1),), compile=False, reps=15)
            for run in (forward, both)
        ),
    ]


def pytest_generate_tests(metafunc) -> None:
    _pytest.parametrise(metafunc, workloads)


def test_speed(benchmark, case) -> None:
    _pytest.measure(benchmark, case)
