"""The sigmoid (SigLIP) loss: forward and backward to features, scale and bias; three bare products, and rivals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast import siglip_loss
from fastcontrast.testing.shapes import Shape, named

from . import _pytest
from . import _rivals as rivals
from ._harness import Bar, Floor, Provider, Step, Workload
from ._pairs import Batch, make_batch, siglip_truth
from ._products import floor, tiled

MIB = 1 << 20
TINY = Shape("tiny", 64, 64, 32)


def provider(loss: Callable[[], Callable], **options) -> Provider:
    """`loss()(queries, keys, scale, bias)` forward and backward."""

    def make(batch: Batch) -> Step:
        function, inputs = loss(), [batch.queries, batch.keys, batch.scale, batch.bias]

        def step() -> tuple[Tensor, ...]:
            value = function(*inputs)
            return (value.detach(), *torch.autograd.grad(value, inputs))

        return step

    return Provider(make, **options)


def dense(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * queries @ keys.T + bias
    return F.softplus(logits).sum() / len(queries) - logits.diagonal().mean()


def siglip(name: str, *, bars: tuple[Bar, ...] = (), compile: bool = True, **options) -> Workload:
    shape = named(name)
    logits = 4 * shape.m * shape.n
    rival = partial(provider, memory=True, needs=6 * logits)
    providers = {
        "fastcontrast": provider(lambda: siglip_loss, memory=True),
        "open_clip.SigLipLoss": rival(rivals.open_clip_siglip),
        "dense torch": rival(lambda: dense),
    }
    if compile:
        providers["dense torch, compiled"] = rival(lambda: rivals.compiled(dense), compiles=True)
    return Workload(
        f"siglip {shape.n}", shape, TINY, make_batch, siglip_truth, providers, floor(3, kept=False), bars, **options
    )


def pre_training_65536() -> Workload:
    """Once, in its own process: minutes a step. Its floor is that of a sixteenth of the rows, 16 times."""
    shape = named("batch_65536")
    floors = {"3 products": Floor({"tiled": partial(tiled, 3, part=16, kept=False)}, times=16)}
    bars = (Bar("fastcontrast", at_most=64 * MIB, what="peak_extra_bytes"),)
    providers = {"fastcontrast": provider(lambda: siglip_loss)}
    return Workload("siglip 65536", shape, TINY, make_batch, siglip_truth, providers, floors, bars, alone=True)


def workloads(quick: bool) -> list[Workload]:
    if quick:
        return [siglip(f"batch_{n}", compile=False) for n in (128, 2048)]
    ours = "fastcontrast"
    large = (Bar(ours, "3 products", at_most=1.15), Bar("open_clip.SigLipLoss", ours, at_least=2.0))
    small = (Bar(ours, "dense torch", at_most=1.0),)
    return [
        siglip("batch_8192", bars=large, reps=5),
        siglip("batch_16384", bars=large[:1], compile=False, reps=3),
        *(siglip(f"batch_{n}", bars=small, compile=False, reps=15) for n in (128, 256, 512, 1024, 2048)),
        pre_training_65536(),
    ]


def pytest_generate_tests(metafunc) -> None:
    _pytest.parametrise(metafunc, workloads)


def test_speed(benchmark, case) -> None:
    _pytest.measure(benchmark, case)
