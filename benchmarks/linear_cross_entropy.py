"""Cross entropy of a language-model head, mean over tokens: forward and backward to hidden states and vocabulary.

Against three bare products, logits with `F.cross_entropy`, and what else runs on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from fastcontrast.ops import linear_cross_entropy
from fastcontrast.testing.shapes import Shape

from . import _pytest
from . import _rivals as rivals
from ._harness import Bar, Floor, Workload
from ._language import MIB, PINTS, QUICK, SMOLLM2, Tokens, cross_entropy, provider, workload
from ._products import tiled


def ours(tokens: Tokens) -> Tensor:
    return linear_cross_entropy(tokens.hidden, tokens.weight, tokens.targets)


def dense(tokens: Tokens) -> Tensor:
    return _dense(tokens.hidden, tokens.weight, tokens.targets)


def _dense(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets)


def dense_compiled() -> Callable[[Tokens], Tensor]:
    loss = rivals.compiled(_dense)
    return lambda tokens: loss(tokens.hidden, tokens.weight, tokens.targets)


def cut_cross_entropy() -> Callable[[Tokens], Tensor]:
    """The implementation of that package that is not a CUDA kernel."""
    loss = rivals.need("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    return lambda tokens: loss(tokens.hidden, tokens.weight, tokens.targets, impl="torch_compile")


def mean(shape: Shape, *, compile: bool = True, **options) -> Workload:
    rival = partial(provider, needs=16 * shape.m * shape.n)
    providers = {"fastcontrast": provider(lambda: ours), "dense torch": rival(lambda: dense)}
    if compile:
        providers["dense torch, compiled"] = rival(dense_compiled, compiles=True)
        providers["cut-cross-entropy, torch_compile"] = rival(cut_cross_entropy, compiles=True)
    return workload("cross entropy", shape, cross_entropy, 3, providers, **options)


def pints() -> Workload:
    """Once, in its own process. Its floor is that of a sixteenth of the tokens, 16 times."""
    providers = {"fastcontrast": provider(lambda: ours)}
    whole = workload("cross entropy", PINTS, cross_entropy, 3, providers, alone=True)
    floors = {"3 products": Floor({"tiled": partial(tiled, 3, part=16)}, times=16)}
    return Workload(**{**vars(whole), "floors": floors})


def workloads(quick: bool) -> list[Workload]:
    if quick:
        return [mean(QUICK, compile=False)]
    bars = (
        Bar("fastcontrast", "3 products", at_most=1.15),
        Bar("dense torch", "fastcontrast", at_least=1.2),
        Bar("fastcontrast", at_most=128 * MIB, what="peak_extra_bytes"),
    )
    return [mean(SMOLLM2, bars=bars, reps=5), pints()]


def pytest_generate_tests(metafunc) -> None:
    _pytest.parametrise(metafunc, workloads)


def test_speed(benchmark, case) -> None:
    _pytest.measure(benchmark, case)
