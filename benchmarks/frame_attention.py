"""`frame_attention`: frames attend frames of their clip, against gathering and concatenating keys, and torch's best.

Float32, forward, and forward and backward with gradients to all inputs. Rivals are `scaled_dot_product_attention` on
keys that are gathered and concatenated for each frame, as models ship it, and, where a rule has one, on views.

The floor is the matrix products of distinct pairs of frames, at the speed of one large square product: two forward,
five more backward (of which the scores once again). It has no softmax in it, and nothing narrow.

Left out, so that the whole stays under six minutes on two cores: the largest levels forward and backward (`tune_l0`,
`vggt_8`), `t2v_zero_l0` and `controlvideo_l1`, which are the same kernels for minutes a step.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastcontrast.ops import frame_attention
from fastcontrast.testing.shapes import VIDEO, Clips, video

from . import _pytest
from ._harness import OURS, Bar, Floor, Provider, Step, Workload
from ._video import TOLERANCE, Problem, concatenated, frame_truth, gathered_frames, joined, make_problem, provider, tiny

MIB = 1 << 20
SIDE = 1024  # of the square product that is the floor
LONG = 60e9  # FLOP forward from which a step takes a second
CONCATENATED, GATHERED, COPY_FREE, APPENDED = (
    "torch, concatenated", "torch, gathered", "torch, copy-free", "torch, message appended",
)  # fmt: skip
# Which rivals a rule has, and how many times their seconds are at least ours.
RIVALS = {
    "first_previous": {CONCATENATED: (concatenated, 1.25)},
    "first": {COPY_FREE: (joined, 1.0), GATHERED: (concatenated, 1.1)},
    "self": {APPENDED: (concatenated, 1.1)},
    "swap": {GATHERED: (concatenated, None)},
    "all": {COPY_FREE: (joined, None)},
}


def ours(problem: Problem) -> Tensor:
    return frame_attention(problem.q, problem.k, problem.v, **problem.options)


def pairs(shape: Clips) -> int:
    """Distinct pairs of a frame and a key frame, of all clips."""
    return shape.b * sum(len({*frames}) for frames in zip(*gathered_frames(shape.rule, shape.f), strict=True))


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
    )


FORWARD_ONLY = ("tune_l0", "vggt_8")
BOTH = ("tune_l1", "tune_l2", "tune_mid", "t2v_zero_l1", "t2v_zero_l2", "xclip_frame", "dust3r")


def workloads(quick: bool) -> list[Workload]:
    if quick:
        shapes = {shape.rule: tiny(shape) for shape in VIDEO if shape.rule in RIVALS}.values()
        return [workload(shape, backward, bars=False) for shape in shapes for backward in (False, True)]
    both = [workload(video(name), backward) for name in BOTH for backward in (False, True)]
    return [*(workload(video(name), False) for name in FORWARD_ONLY), *both]


def pytest_generate_tests(metafunc) -> None:
    _pytest.parametrise(metafunc, workloads)


def test_speed(benchmark, case) -> None:
    _pytest.measure(benchmark, case)
