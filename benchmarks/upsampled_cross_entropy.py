"""`upsampled_cross_entropy`, forward and backward, against F.interpolate followed by torch's losses.

The floor is one softmax a pixel, by tiles that stay in the cache: the exponentials that nobody can do without.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.ops import upsampled_binary_cross_entropy, upsampled_cross_entropy

from . import _pytest
from . import _rivals as rivals
from ._harness import OURS, Bar, Floor, Provider, Step, Workload

MIB = 1 << 20
SCALE = 1 / 0.07
TILE = 1 << 18  # logits


class Shape(NamedTuple):
    name: str
    b: int
    k: int
    side: int  # of the score maps
    size: int  # of the labels
    binary: bool = False


class Problem(NamedTuple):
    scores: Tensor  # [B, K, h, h]
    target: tuple[Tensor, ...]  # labels [B, H, H], a tenth of them ignored; or targets [B, K, H, H] and a mask


TINY = {False: Shape("tiny", 2, 20, 4, 200), True: Shape("tiny", 2, 20, 4, 200, True)}


def make_problem(shape: Shape) -> Problem:
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(shape.b, shape.k, shape.side, shape.side, generator=random).mul_(0.3).requires_grad_()
    hidden = torch.rand(shape.b, shape.size, shape.size, generator=random) < 0.1
    if shape.binary:
        targets = torch.rand(shape.b, shape.k, shape.size, shape.size, generator=random) < 0.02
        return Problem(scores, (targets, ~hidden))
    labels = torch.randint(shape.k, hidden.shape, generator=random)
    return Problem(scores, (labels.masked_fill_(hidden, 255),))


def ours(scores: Tensor, *target: Tensor) -> Tensor:
    return (upsampled_cross_entropy if len(target) == 1 else upsampled_binary_cross_entropy)(scores, *target, SCALE)


def dense(scores: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    logits = F.interpolate(SCALE * scores, target.shape[-2:], mode="bilinear", align_corners=False)
    if mask is None:
        return F.cross_entropy(logits, target, ignore_index=255)
    weights = mask[:, None].to(logits.dtype).expand_as(logits)
    losses = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), weights, reduction="sum")
    return losses / mask.sum()


def results(function: Callable, scores: Tensor, target: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    value = function(scores, *target)
    return (value.detach(), *torch.autograd.grad(value, scores))


def provider(loss: Callable[[], Callable], **options) -> Provider:
    def make(problem: Problem) -> Step:
        function = loss()
        return lambda: results(function, *problem)

    return Provider(make, memory=1, **options)


def truth(problem: Problem) -> tuple[Tensor, ...]:
    return results(dense, problem.scores.detach().double().requires_grad_(), problem.target)


def softmax_of_tiles(problem: Problem) -> Step:
    k = problem.scores.shape[1]
    pixels = problem.target[0].numel() // (k if len(problem.target) > 1 else 1)
    tile = torch.randn(TILE // k, k)

    def run() -> None:
        for start in range(0, pixels, len(tile)):
            part = tile[: pixels - start]
            part.softmax(1) if len(problem.target) == 1 else part.sigmoid()

    return run


def workload(shape: Shape, bars: tuple[Bar, ...] = (), compile: bool = True, **options) -> Workload:
    numbers = shape.b * shape.k * shape.size**2
    rival = partial(provider, needs=5 * 4 * numbers)
    providers = {OURS: provider(lambda: ours), "dense torch": rival(lambda: dense)}
    if compile:
        providers["dense torch, compiled"] = rival(lambda: rivals.compiled(dense), compiles=True)
    floors = {"exponentials": Floor({"by tiles": softmax_of_tiles})}
    return Workload(
        f"{shape.name} {shape.k} × {shape.side}² → {shape.size}²", shape, TINY[shape.binary], make_problem, truth,
        providers, floors, bars, **options,
    )  # fmt: skip


def workloads(quick: bool) -> list[Workload]:
    if quick:
        return [workload(Shape("softmax", 2, 20, 8, 128), compile=False)]
    bars = (Bar("dense torch", OURS, at_least=2.0), Bar("dense torch", OURS, at_least=10, what="peak_extra_bytes"))
    return [
        workload(Shape("softmax", 2, 150, 16, 512), bars, reps=5),
        workload(Shape("sigmoid", 2, 80, 42, 336, True), bars, compile=False, reps=5),
    ]


def pytest_generate_tests(metafunc) -> None:
    _pytest.parametrise(metafunc, workloads)


def test_speed(benchmark, case) -> None:
    _pytest.measure(benchmark, case)
