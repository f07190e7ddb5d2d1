"""Log-probabilities of targets under a language-model head, for any upstream gradient of each: forward and backward to
hidden states and vocabulary, against four bare products and dense code. (The gradient that comes is that of a mean, so
that truth is a cross entropy; nothing here knows that.)"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from fastcontrast.ops import linear_logprob
from fastcontrast.testing.shapes import Shape

from . import _pytest
from . import _rivals as rivals
from ._harness import Bar, Workload
from ._language import MIB, QUICK, SMOLLM2, Tokens, cross_entropy, provider, workload


def ours(tokens: Tokens) -> Tensor:
    return -linear_logprob(tokens.hidden, tokens.weight, tokens.targets).mean()


def dense(tokens: Tokens) -> Tensor:
    return _dense(tokens.hidden, tokens.weight, tokens.targets)


def _dense(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -(hidden @ weight.T).log_softmax(1).gather(1, targets[:, None]).mean()


def dense_compiled() -> Callable[[Tokens], Tensor]:
    loss = rivals.compiled(_dense)
    return lambda tokens: loss(tokens.hidden, tokens.weight, tokens.targets)


def each(shape: Shape, *, compile: bool = True, **options) -> Workload:
    rival = partial(provider, needs=20 * shape.m * shape.n)
    providers = {"fastcontrast": provider(lambda: ours), "dense torch": rival(lambda: dense)}
    if compile:
        providers["dense torch, compiled"] = rival(dense_compiled, compiles=True)
    return workload("log-probabilities", shape, cross_entropy, 4, providers, **options)


def workloads(quick: bool) -> list[Workload]:
    if quick:
        return [each(QUICK, compile=False)]
    bars = (
        Bar("fastcontrast", "4 products", at_most=1.15),
        Bar("dense torch", "fastcontrast", at_least=1.2),
        Bar("fastcontrast", at_most=128 * MIB, what="peak_extra_bytes"),
    )
    return [each(SMOLLM2, bars=bars, reps=5)]


def pytest_generate_tests(metafunc) -> None:
    _pytest.parametrise(metafunc, workloads)


def test_speed(benchmark, case) -> None:
    _pytest.measure(benchmark, case)
