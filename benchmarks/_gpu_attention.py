"""Attention across frames on a CUDA device, in bfloat16: the workloads of the CPU's benchmarks, and rivals of a GPU.

Of temporal attention the floor is one pass over q, k, v and out. Frame attention stands against torch and xformers on
concatenated keys, torch on a view where a rule has one, and FlexAttention where a mask says all of a rule.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fastcontrast.ops.frame_rules import count_matrix
from fastcontrast.testing.shapes import Clips, video

from . import _rivals as rivals
from . import frame_attention, temporal_attention
from ._harness import OURS, Bar, Provider, Step, Workload
from ._video import CHUNKS, Problem, concatenate, concatenated, make_problem, provider, rule_of, tiny

TOLERANCE = 2e-2  # of bfloat16: results are rounded to 8 bits
STREAMED = 8 << 20  # elements of q from which a floor is the memory's: smaller ones lie in a cache, or are all launch
BANDWIDTH = 0.65  # of it is reached
MOST_SECONDS = {"timesformer": 28e-6, "animatediff_l0": 120e-6}
# How many times the seconds of the best of the flash paths on concatenated keys are at least ours.
LEAST = {"tune_l0": 1.1, "tune_l1": 1.4, "tune_l2": 3.0, "tune_mid": 5.0}
FLASH, XFORMERS, FLEX = "torch, concatenated, flash", "xformers, concatenated", "FlexAttention"
FRAMES = (*LEAST, *(shape.name for shape in frame_attention.SHAPES if shape.name not in LEAST))


def on(device: str, workload: Workload, **changes) -> Workload:
    """`workload` in bfloat16 on the device."""
    inputs = partial(make_problem, device=device, dtype=torch.bfloat16)
    return replace(workload, inputs=inputs, device=device, tolerance=TOLERANCE, reps=7, **changes)


def temporal(device: str, shape: Clips, backward: bool) -> Workload:
    bars = []
    if not backward and shape.elements >= STREAMED:
        bars.append(Bar(OURS, temporal_attention.PASS, at_most=1 / BANDWIDTH))
    if not backward and shape.name in MOST_SECONDS:
        bars.append(Bar(OURS, at_most=MOST_SECONDS[shape.name]))
    return on(device, temporal_attention.workload(shape, backward, bars=False), bars=tuple(bars))


# -------------------------------------------------------------------------------------------------------------- rivals


def flash(problem: Problem) -> Tensor:
    """Torch on concatenated keys, where it may choose nothing but its flash kernel."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return concatenated(problem)


def xformers(backward: bool) -> Provider:
    def make(problem: Problem) -> Step:
        attend = rivals.need("xformers.ops", "xformers").memory_efficient_attention

        def run(problem: Problem) -> Tensor:
            k = concatenate(problem, problem.k, problem.extra[:1]).flatten(0, 1)
            v = concatenate(problem, problem.v, problem.extra[1:]).flatten(0, 1)
            return attend(problem.q.flatten(0, 1), k, v).reshape(problem.q.shape)

        return provider(run, backward).make(problem)

    return Provider(make)


def masked(count: Tensor) -> bool:
    """The counts [F, F] of each frame are 0 and one other number: then a mask says all of them."""
    return bool(((count == 0) | (count == count.amax(1, keepdim=True))).all())


def flex(problem: Problem) -> Step:
    """The frames of a clip in one row, under the blocks of the rule. Forward alone: each size is compiled for seconds,
    and torch has no backward of it on a CPU."""
    problem = problem._replace(q=problem.q.detach(), k=problem.k.detach(), v=problem.v.detach())
    attends = count_matrix(problem.options["rule"], problem.q.shape[1], device=problem.q.device) > 0
    t, rows = problem.q.shape[2], problem.q.shape[1] * problem.q.shape[2]
    make_mask, attend = create_block_mask, flex_attention
    if problem.q.is_cuda:  # uncompiled both would write all pairs of tokens
        make_mask, attend = rivals.compiled(create_block_mask), rivals.compiled(flex_attention)
    mask = make_mask(lambda b, h, i, j: attends[i // t, j // t], None, None, rows, rows, device=str(problem.q.device))

    def run(problem: Problem) -> Tensor:
        q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in problem.inputs)  # [B, H, F·T, D]
        return attend(q, k, v, block_mask=mask).transpose(1, 2).reshape(problem.q.shape)

    return provider(run, backward=False).make(problem)


def rivals_of(shape: Clips, backward: bool) -> dict[str, Provider]:
    found = {}
    if shape.rule != CHUNKS:
        found = {FLASH: provider(flash, backward, memory=not backward), XFORMERS: xformers(backward)}
    if not (backward or shape.extra) and masked(count_matrix(rule_of(shape.rule), shape.f)):
        found[FLEX] = Provider(flex, compiles=True)
    return found


# ----------------------------------------------------------------------------------------------------- frame attention


def frame(device: str, shape: Clips, backward: bool) -> Workload:
    bars = []
    if not backward and shape.name in LEAST:
        bars = [Bar(name, OURS, at_least=LEAST[shape.name]) for name in (frame_attention.CONCATENATED, FLASH, XFORMERS)]
    whole = frame_attention.workload(shape, backward, bars=False)
    providers = {**whole.providers, **rivals_of(shape, backward)}
    return on(device, whole, providers=providers, floors={}, bars=tuple(bars), alone=False)


# ----------------------------------------------------------------------------------------------------------- workloads


def workloads(op: str, quick: bool, device: str) -> list[Workload]:
    """Of one operation, most telling first; [] if it is neither."""
    if op == "temporal_attention":
        if quick:
            names, passes = ("clip4clip", "animatediff_l2"), (False, True)
            return [temporal(device, tiny(video(name)), backward) for name in names for backward in passes]
        names = sorted(temporal_attention.SHAPES, key=lambda name: name not in MOST_SECONDS)
        return [temporal(device, video(name), backward) for backward in (False, True) for name in names]
    if op == "frame_attention":
        if quick:
            shapes = {shape.rule: tiny(shape) for shape in frame_attention.SHAPES}.values()
            return [*(frame(device, shape, False) for shape in shapes), frame(device, tiny(video("tune_mid")), True)]
        return [frame(device, video(name), backward) for backward in (False, True) for name in FRAMES]
    return []
