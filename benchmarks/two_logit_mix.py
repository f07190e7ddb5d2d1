"""`two_logit_mix`: AdaCAD's mix of two rows of logits, against the torch chain that it replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.ops import two_logit_mix
from fastcontrast.testing.shapes import Shape

from . import _pytest
from ._harness import Bar, Floor, Provider, Step, Workload


class Pair(NamedTuple):
    logits: Tensor  # [R, V]
    contrast: Tensor  # [R, V]


def make_pair(shape: Shape) -> Pair:
    """Rows (m), vocabulary (n)."""
    random = torch.Generator().manual_seed(0)
    z1, noise = (torch.randn(shape.m, shape.n, generator=random) for _ in range(2))
    return Pair(3 * z1, 3 * z1 + noise)


def ours(pair: Pair) -> tuple[Tensor, ...]:
    mix = two_logit_mix(*pair)
    return mix.log_probabilities, mix.divergence


def chain(pair: Pair) -> tuple[Tensor, ...]:
    """Two softmaxes, their mean, its logarithm, two divergences, the mix, its softmax."""
    z1, z0 = pair
    p, q = z1.softmax(-1), z0.softmax(-1)
    log_mean = (0.5 * (p + q)).log()
    divergences = (F.kl_div(log_mean, x, reduction="none").sum(-1) for x in (p, q))
    a = 0.5 * sum(divergences)
    return ((1 + a)[:, None] * z1 - a[:, None] * z0).log_softmax(-1), a


def fixed(mix: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Pair], tuple[Tensor, ...]]:
    return lambda pair: (mix(*pair),)


def exact(run: Callable[[Pair], tuple[Tensor, ...]]) -> Callable[[Pair], tuple[Tensor, ...]]:
    return lambda pair: run(Pair(*(z.double() for z in pair)))


def step_of(run: Callable[[Pair], tuple[Tensor, ...]], compiled: bool = False) -> Callable[[Pair], Step]:
    def make(pair: Pair) -> Step:
        function = torch.compile(run) if compiled else run
        return lambda: function(pair)

    return make


def copies(pair: Pair) -> Step:
    """Reads both, writes one."""
    out = torch.empty_like(pair.logits)

    def step() -> None:
        torch.add(*pair, out=out)

    return step


FLOORS = {"read two, write one": Floor({"add": copies})}


def adacad(rows: int, vocabulary: int, bars: bool = True) -> Workload:
    providers = {
        "fastcontrast": Provider(step_of(ours), memory=True),
        "torch chain": Provider(step_of(chain), memory=True),
        "torch chain, compiled": Provider(step_of(chain, compiled=True), compiles=True),
    }
    claims = (
        Bar("torch chain", "fastcontrast", at_least=3.0),
        Bar("torch chain, compiled", "fastcontrast", at_least=1.0),
    )
    return Workload(f"AdaCAD, R = {rows}, V = {vocabulary:,}", Shape("pair", rows, vocabulary, 1),
                    Shape("tiny", 2, 64, 1), make_pair, exact(chain), providers, FLOORS, claims if bars else (),
                    reps=21)  # fmt: skip


def cad(rows: int, vocabulary: int, bars: bool = True) -> Workload:
    def dense(z1: Tensor, z0: Tensor) -> Tensor:
        return (1.5 * z1 - 0.5 * z0).log_softmax(-1)

    providers = {
        "fastcontrast": Provider(step_of(fixed(lambda z1, z0: two_logit_mix(z1, z0, 0.5).log_probabilities))),
        "torch chain": Provider(step_of(fixed(dense))),
    }
    claims = (Bar("torch chain", "fastcontrast", at_least=1.0),)
    return Workload(f"CAD, R = {rows}, V = {vocabulary:,}", Shape("pair", rows, vocabulary, 1), Shape("tiny", 2, 64, 1),
                    make_pair, exact(fixed(dense)), providers, FLOORS, claims if bars else (), reps=21)  # fmt: skip


def workloads(quick: bool) -> list[Workload]:
    if quick:
        return [adacad(2, 1000, bars=False), cad(2, 1000, bars=False)]
    return [adacad(1, 128256), adacad(1, 49152), adacad(16, 128256), cad(1, 128256)]


def pytest_generate_tests(metafunc) -> None:
    _pytest.parametrise(metafunc, workloads)


def test_speed(benchmark, case) -> None:
    _pytest.measure(benchmark, case)
