"""KL divergence of a language-model head from a frozen teacher's of the same width, mean over tokens: forward and
backward to hidden states and vocabulary, against four bare products and `F.kl_div` of dense logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.ops import linear_kl
from fastcontrast.testing.shapes import Shape

from . import _pytest
from . import _rivals as rivals
from ._harness import Bar, Workload
from ._language import MIB, QUICK, SMOLLM2, Tokens, forward_kl, provider, workload


def heads(tokens: Tokens) -> tuple[Tensor, ...]:
    return tokens.hidden, tokens.weight, tokens.teacher_hidden, tokens.teacher_weight


def ours(tokens: Tokens) -> Tensor:
    return linear_kl(*heads(tokens))


def dense(tokens: Tokens) -> Tensor:
    return _dense(*heads(tokens))


def _dense(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    with torch.no_grad():
        teacher = (teacher_hidden @ teacher_weight.T).log_softmax(1)
    return F.kl_div((hidden @ weight.T).log_softmax(1), teacher, log_target=True, reduction="batchmean")


def dense_compiled() -> Callable[[Tokens], Tensor]:
    loss = rivals.compiled(_dense)
    return lambda tokens: loss(*heads(tokens))


def forward(shape: Shape, *, compile: bool = True, **options) -> Workload:
    rival = partial(provider, needs=28 * shape.m * shape.n)
    providers = {"fastcontrast": provider(lambda: ours), "dense torch": rival(lambda: dense)}
    if compile:
        providers["dense torch, compiled"] = rival(dense_compiled, compiles=True)
    return workload("forward KL", shape, forward_kl, 4, providers, **options)


def workloads(quick: bool) -> list[Workload]:
    if quick:
        return [forward(QUICK, compile=False)]
    bars = (
        Bar("fastcontrast", "4 products", at_most=1.2),
        Bar("dense torch", "fastcontrast", at_least=1.2),
        Bar("fastcontrast", at_most=304 * MIB, what="peak_extra_bytes"),
    )
    return [forward(SMOLLM2, bars=bars, reps=5)]


def pytest_generate_tests(metafunc) -> None:
    _pytest.parametrise(metafunc, workloads)


def test_speed(benchmark, case) -> None:
    _pytest.measure(benchmark, case)
