"""`token_contrast_margin`, SimCTG's contrastive term, forward and backward, against the published dense form.

The floor is bare matrix products, of unit vectors made beforehand: of each sequence half of the cosines, which are
symmetric, and one product for the gradient, tiled as the operation tiles them (tiles on the diagonal are whole); or two
products over the whole matrix. Dense autograd takes three.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.ops import token_contrast_margin

from . import _pytest
from . import _rivals as rivals
from ._harness import Bar, Floor, Provider, Step, Workload

MIB = 1 << 20
MARGIN = 0.5
EDGE = 512  # of the floor's tiles
CLUSTERS = 8


class Shape(NamedTuple):
    name: str
    b: int
    s: int
    d: int


TINY = Shape("tiny", 2, 530, 256)  # more than a tile


class Problem(NamedTuple):
    hidden: Tensor  # [B, S, D]
    unit: Tensor  # [B, S, D], of the floor


def make_problem(shape: Shape) -> Problem:
    """Tokens about eight directions a sequence: cosines near 0.8 within a cluster, an eighth of all, and near 0.

    None is near the hinge at 0.5. In a continuum of cosines float32 puts a few of these millions of pairs on its other
    side than float64 does, and each is an error of 1e-4 in the gradient of whoever is measured.
    """
    random = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(shape.b, CLUSTERS, shape.d, generator=random)
    own = torch.randint(CLUSTERS, (shape.b, shape.s, 1), generator=random).expand(-1, -1, shape.d)
    hidden = centres.gather(1, own) + torch.randn(shape.b, shape.s, shape.d, generator=random)
    return Problem(hidden.requires_grad_(), F.normalize(hidden.detach(), dim=2))


def simctg(hidden: Tensor) -> Tensor:
    """As published, step by step, without the mask of padding: normalise, multiply, diagonal, relu, mask, sum."""
    unit = hidden / hidden.norm(dim=2, keepdim=True)
    scores = torch.matmul(unit, unit.transpose(1, 2))
    gold = torch.diagonal(scores, offset=0, dim1=1, dim2=2).unsqueeze(-1)
    losses = F.relu(MARGIN - (gold - scores))
    mask = torch.ones(losses.shape[1:], device=hidden.device) - torch.eye(losses.shape[1], device=hidden.device)
    return (losses * mask).sum() / (mask.sum() * hidden.shape[0])


def provider(loss: Callable[[], Callable], backward: bool = True, **options) -> Provider:
    def make(problem: Problem) -> Step:
        function = loss()

        def step() -> tuple[Tensor, ...]:
            with torch.set_grad_enabled(backward):
                value = function(problem.hidden)
            return (value.detach(), *(torch.autograd.grad(value, problem.hidden) if backward else ()))

        return step

    return Provider(make, memory=True, **options)


def truth(problem: Problem) -> tuple[Tensor, ...]:
    """Dense float64, a sequence at a time."""
    total, gradients = 0.0, []
    for text in problem.hidden.detach().double().split(1):
        loss = simctg(text.requires_grad_()) / len(problem.hidden)
        total += loss.detach()
        gradients.append(torch.autograd.grad(loss, text)[0])
    return torch.as_tensor(total), torch.cat(gradients)


def tiled(problem: Problem, gradient: bool = True) -> Step:
    unit = problem.unit
    s, out = unit.shape[1], torch.empty_like(unit)
    step = -(-s // -(-s // EDGE))
    blocks = [slice(i, min(i + step, s)) for i in range(0, s, step)]
    buffer = torch.empty(step * step)

    def run() -> None:
        for u, g in zip(unit, out, strict=True):
            for n, i in enumerate(blocks):
                for j in blocks[n:]:
                    rows, columns = i.stop - i.start, j.stop - j.start
                    tile = torch.mm(u[i], u[j].T, out=buffer[: rows * columns].view(rows, columns))
                    if gradient:
                        torch.addmm(g[i], tile, u[j], beta=float(j.start > 0), out=g[i])
                        if i != j:
                            torch.addmm(g[j], tile.T, u[i], beta=float(i.start > 0), out=g[j])

    return run


def whole(problem: Problem, gradient: bool = True) -> Step:
    unit = problem.unit
    scores, out = torch.empty(unit.shape[1], unit.shape[1]), torch.empty_like(unit)

    def run() -> None:
        for u, g in zip(unit, out, strict=True):
            torch.mm(u, u.T, out=scores)
            if gradient:
                torch.mm(scores, u, out=g)

    return run


FLOOR = {"1.5 products": Floor({"tiled": tiled, "whole": whole})}
HALF = {"0.5 products": Floor({"tiled": partial(tiled, gradient=False), "whole": partial(whole, gradient=False)})}
OURS = "fastcontrast"


def contrast(b: int, s: int, d: int = 768, bars: tuple[Bar, ...] = (), compile: bool = True, **options) -> Workload:
    shape = Shape(f"simctg_{b}_{s}", b, s, d)
    rival = partial(provider, needs=6 * 4 * b * s * s)
    providers = {
        OURS: provider(lambda: partial(token_contrast_margin, margin=MARGIN)),
        "dense torch": rival(lambda: simctg),
    }
    if compile:
        providers["dense torch, compiled"] = rival(lambda: rivals.compiled(simctg), compiles=True)
    return Workload(f"simctg {b} × {s}", shape, TINY, make_problem, truth, providers, FLOOR, bars, **options)


def value_alone(b: int, s: int, d: int = 768) -> Workload:
    shape = Shape(f"simctg_value_{b}_{s}", b, s, d)
    providers = {
        OURS: provider(lambda: partial(token_contrast_margin, margin=MARGIN), backward=False),
        "dense torch": provider(lambda: simctg, backward=False, needs=4 * 4 * b * s * s),
    }
    return Workload(
        f"simctg {b} × {s}, value alone", shape, TINY, make_problem, lambda problem: truth(problem)[:1], providers, HALF
    )


def workloads(quick: bool) -> list[Workload]:
    if quick:
        return [contrast(4, 512, 256, compile=False)]
    compiled = "dense torch, compiled"
    return [
        contrast(
            8,
            1024,
            bars=(
                Bar(OURS, "1.5 products", at_most=1.3),
                Bar("dense torch", OURS, at_least=2.0),
                Bar(compiled, OURS, at_least=1.5),
                Bar(OURS, at_most=16 * MIB, what="peak_extra_bytes"),
            ),
        ),
        contrast(
            8,
            4096,
            bars=(
                Bar(OURS, "1.5 products", at_most=1.2),
                Bar("dense torch", OURS, at_least=2.0),
                Bar(compiled, OURS, at_least=1.5),
                Bar(OURS, at_most=32 * MIB, what="peak_extra_bytes"),
            ),
            reps=5,
        ),
        contrast(128, 256, bars=(Bar("dense torch", OURS, at_least=1.5),), compile=False),
        value_alone(8, 1024),
    ]


def pytest_generate_tests(metafunc) -> None:
    _pytest.parametrise(metafunc, workloads)


def test_speed(benchmark, case) -> None:
    _pytest.measure(benchmark, case)
