"""`frame_attention`: frames attend frames of their clip, against gathering and concatenating keys, and torch's best.

Float32, forward, and forward and backward with gradients to all inputs. Rivals are `scaled_dot_product_attention` on
keys that are gathered and concatenated for each frame, as models ship it, and, where a rule has one, on views.

The floor is the matrix products of distinct pairs of frames, at the speed of one large square product: two forward,
five more backward (of which the scores once again). It has no softmax in it, and nothing narrow.

`vggt_32` and `selfforcing`, of which a step takes half a minute, run once each, forward.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastcontrast.ops import frame_attention
from fastcontrast.ops.frame_rules import count_matrix
from fastcontrast.testing.shapes import VIDEO, Clips

from . import _pytest
from ._harness import OURS, Bar, Floor, Provider, Step, Workload
from ._video import (
    CHUNKS,
    TOLERANCE,
    Problem,
    by_chunks,
    concatenated,
    frame_truth,
    joined,
    make_problem,
    provider,
    rule_of,
    tiny,
)

MIB = 1 << 20
SIDE = 1024  # of the square product that is the floor
LONG, LONGEST = 60e9, 2e12  # FLOP forward from which a step takes a second, and half a minute
CONCATENATED, GATHERED, COPY_FREE, APPENDED, CHUNKED = (
    "torch, concatenated", "torch, gathered", "torch, copy-free", "torch, message appended", "torch, by chunks",
)  # fmt: skip
# Which rivals a rule has, and how many times their seconds are at least ours.
RIVALS = {
    "first_previous": {CONCATENATED: (concatenated, 1.25)},
    "first": {COPY_FREE: (joined, 1.0), GATHERED: (concatenated, 1.1)},
    "self": {APPENDED: (concatenated, 1.1)},
    "swap": {GATHERED: (concatenated, None)},
    "all": {COPY_FREE: (joined, 1.0)},
    CHUNKS: {CHUNKED: (by_chunks, 1.0)},
}


def ours(problem: Problem) -> Tensor:
    return frame_attention(problem.q, problem.k, problem.v, **problem.options)


def pairs(shape: Clips) -> int:
    """Distinct pairs of a frame and a key frame, of all clips."""
    return shape.b * int((count_matrix(rule_of(shape.rule), shape.f) > 0).sum())


def forward_flop(shape: Clips) -> int:
    return 4 * shape.h * shape.d * shape.t**2 * pairs(shape)


def product(problem: Problem) -> Step:
    a, b, out = (torch.ones(SIDE, SIDE) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


def floor(shape: Clips, backward: bool) -> dict[str, Floor]:
    flop = forward_flop(shape) * (3.5 if backward else 1)
    return {"7 products" if backward else "2 products": Floor({"at mm's rate": product}, times=flop / (2 * SIDE**3))}


def workload(shape: Clips, backward: bool, bars: bool = True) -> Workload:
    rivals = RIVALS[shape.rule]
    providers: dict[str, Provider] = {OURS: provider(ours, backward, memory=not backward)}
    providers |= {name: provider(attend, backward, memory=not backward) for name, (attend, _) in rivals.items()}
    # Heads wider than 128 go to torch on the view, if there is one: the same call on both sides.
    same = {COPY_FREE} if shape.d > 128 else set()
    least = {name: value for name, (_, value) in rivals.items() if value is not None and name not in same}
    claims = [Bar(name, OURS, at_least=value) for name, value in least.items()]
    if not backward:
        claims.append(Bar(OURS, at_most=8 * MIB, what="peak_extra_bytes"))
    return Workload(
        shape.name if backward else f"{shape.name}, forward",
        shape,
        tiny(shape),
        make_problem,
        partial(frame_truth, backward=backward),
        providers,
        floor(shape, backward),
        tuple(claims) if bars else (),
        reps=3 if forward_flop(shape) > LONG else 7,
        tolerance=TOLERANCE,
        alone=forward_flop(shape) > LONGEST,
    )


SHAPES = tuple(shape for shape in VIDEO if shape.rule in RIVALS)


def workloads(quick: bool) -> list[Workload]:
    if quick:
        shapes = {shape.rule: tiny(shape) for shape in SHAPES}.values()
        return [workload(shape, backward, bars=False) for shape in shapes for backward in (False, True)]
    whole = [workload(shape, backward) for shape in SHAPES for backward in (False, True)]
    return [w for w in whole if not w.alone or w.name.endswith(", forward")]


def pytest_generate_tests(metafunc) -> None:
    _pytest.parametrise(metafunc, workloads)


def test_speed(benchmark, case) -> None:
    _pytest.measure(benchmark, case)
