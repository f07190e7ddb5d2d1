"""log softmax of two mixed rows of logits, and the Jensen–Shannon divergence that may say how they are mixed.

    rows     maximum and Σ exp(z − maximum) of both rows, and the smallest finite logit of the second
    gaps     Σ of the terms of the divergence
    mixed    maximum and Σ exp(x − maximum) of the mix x
    write    x − log Σ exp(x)

A program takes a split of a row, and adds up what the programs of the kernel before left of all its splits, in order.
The rows are read four times; a decoding step's logits lie in the second-level cache from the first on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Case, Launch, meta
from .contrastive_select import offset_of
from .max_cosine import PROGRAMS

BLOCK = 1024  # logits at a time

# Planes of the parts, [PLANES, rows, splits] fp32
FIRST, SECOND, LEAST, GAP, MIX = (tl.constexpr(i) for i in (0, 2, 4, 5, 6))  # FIRST, SECOND, MIX: maximum, then sum
PLANES = 8


@triton.jit
def _logits(z, row, stride, o, mask):
    return tl.load(z + row * stride + o, mask=mask, other=-float("inf")).to(tl.float32)


@triton.jit
def _fold(z, high, total):
    """Maximum of the numbers and Σ exp(z − maximum), NaN if one is NaN, with one more block."""
    largest = tl.maximum(high, tl.max(tl.where(z == z, z, -float("inf")), 0))
    offset = offset_of(largest)
    return largest, total * tl.exp(offset_of(high) - offset) + tl.sum(tl.exp(z - offset), 0)


@triton.jit
def _parts(parts, plane, rows, row, splits, other, SP: tl.constexpr):
    """One plane of all splits of a row."""
    i = tl.arange(0, SP)
    return tl.load(parts + (row + rows * plane) * splits + i, mask=i < splits, other=other)


@triton.jit
def _reduce(parts, plane: tl.constexpr, rows, row, splits, SP: tl.constexpr):
    """Of a whole row: the maximum, the offset, and log Σ exp(z − offset), 0 where nothing is finite."""
    highs = _parts(parts, plane, rows, row, splits, -float("inf"), SP)
    sums = _parts(parts, plane + 1, rows, row, splits, 0.0, SP)
    high = tl.max(highs, 0)
    offset = offset_of(high)
    # The selection keeps products and sums from being fused, so that equal rows have equal totals.
    total = tl.sum(tl.where(sums == 0.0, 0.0, sums * tl.exp(highs - offset)), 0)
    return high, offset, tl.where(total == 0.0, 0.0, tl.log(total))


@triton.jit
def _relative_entropy(d):
    """½ [(1 + x) ln(1 + x) + (1 − x) ln(1 − x)] for x = tanh(d / 2) = (p − q) / (p + q), d = ln p − ln q; never < 0."""
    s = d * d * 0.25
    series = 31.0 / 1575
    series = 17.0 / 360 - series * s
    series = 1.0 / 9 - series * s
    series = 1.0 / 4 - series * s
    series = s * (1.0 / 2 - series * s)
    d = tl.minimum(tl.abs(d), 100.0)
    e = tl.exp(-d)
    direct = 0.6931471805599453 - tl.log(1.0 + e) - d * (e / (1.0 + e))
    return tl.where(d < 0.5, series, direct)


@triton.jit
def _where_split(vocabulary, splits, per_split, BV: tl.constexpr):
    """Row, split, and the split's first entry and what follows its last."""
    pid = tl.program_id(0)
    start = pid % splits * per_split * BV
    return (pid // splits).to(tl.int64), pid % splits, start, tl.minimum(start + per_split * BV, vocabulary)


@triton.jit(do_not_specialize=["rows", "vocabulary", "splits", "per_split"])
def rows_kernel(
    z1, z0, parts, rows, vocabulary, splits, per_split, stride1, stride0, BV: tl.constexpr
):  # fmt: skip
    row, i_s, start, stop = _where_split(vocabulary, splits, per_split, BV)
    high1, high0, total1, total0 = -float("inf"), -float("inf"), 0.0, 0.0
    least, bad = tl.full((BV,), float("inf"), tl.float32), tl.zeros((BV,), tl.int32)
    for v in range(start, stop, BV):
        o = v + tl.arange(0, BV)
        mask = o < stop
        a, b = _logits(z1, row, stride1, o, mask), _logits(z0, row, stride0, o, mask)
        high1, total1 = _fold(a, high1, total1)
        high0, total0 = _fold(b, high0, total0)
        least = tl.minimum(least, tl.where((b == -float("inf")) | (b != b), float("inf"), b))
        bad |= (b != b).to(tl.int32)
    step = rows.to(tl.int64) * splits
    at = parts + row * splits + i_s
    tl.store(at + FIRST * step, high1)
    tl.store(at + (FIRST + 1) * step, total1)
    tl.store(at + SECOND * step, high0)
    tl.store(at + (SECOND + 1) * step, total0)
    tl.store(at + LEAST * step, tl.where(tl.max(bad, 0) != 0, float("nan"), tl.min(least, 0)))


@triton.jit(do_not_specialize=["rows", "vocabulary", "splits", "per_split"])
def gaps_kernel(
    z1, z0, parts, rows, vocabulary, splits, per_split, stride1, stride0, BV: tl.constexpr, SP: tl.constexpr
):  # fmt: skip
    row, i_s, start, stop = _where_split(vocabulary, splits, per_split, BV)
    _, offset1, log1 = _reduce(parts, FIRST, rows, row, splits, SP)
    _, offset0, log0 = _reduce(parts, SECOND, rows, row, splits, SP)
    shift = (offset1 - offset0) + (log1 - log0)
    gap = tl.zeros((BV,), tl.float32)
    for v in range(start, stop, BV):
        o = v + tl.arange(0, BV)
        mask = o < stop
        a, b = _logits(z1, row, stride1, o, mask), _logits(z0, row, stride0, o, mask)
        both = tl.exp((a - offset1) - log1) + tl.exp((b - offset0) - log0)
        # From the difference of logits, which of near rows has digits that p − q has lost.
        gap += 0.5 * both * _relative_entropy(tl.where(both > 0.0, (a - b) - shift, 0.0))
    tl.store(parts + (row + rows.to(tl.int64) * GAP) * splits + i_s, tl.sum(gap, 0))


@triton.jit
def _mix_of(parts, weight, rows, row, splits, keep, floor, DIVERGE: tl.constexpr, KEEP: tl.constexpr, SP: tl.constexpr):
    """The divergence, a, and how many times the first row counts."""
    divergence = tl.full((), float("nan"), tl.float32)
    if DIVERGE:
        divergence = tl.sum(_parts(parts, GAP, rows, row, splits, 0.0, SP), 0)
    a = tl.load(weight + row) if weight is not None else tl.where(divergence < floor, floor, divergence)
    return divergence, a, keep if KEEP else 1.0 + a


@triton.jit
def _bounds(parts, rows, row, splits, threshold, SP: tl.constexpr):
    """Whether the first row is −inf alone, the logit from which on its tokens are plausible, and what −inf counts as in
    the second."""
    high = tl.max(_parts(parts, FIRST, rows, row, splits, -float("inf"), SP), 0)
    nothing = tl.max((_parts(parts, FIRST + 1, rows, row, splits, 0.0, SP) != 0.0).to(tl.int32), 0) == 0
    least = _parts(parts, LEAST, rows, row, splits, float("inf"), SP)
    bad, least = tl.max((least != least).to(tl.int32), 0), tl.min(tl.where(least == least, least, float("inf")), 0)
    least = tl.where(bad != 0, float("nan"), tl.where(least == float("inf"), 0.0, least))
    return nothing, high + threshold, least


@triton.jit
def _mixed(a, b, weight, times, bar, least):
    x = times * a - weight * tl.where(b == -float("inf"), least, b)
    return tl.where((a == -float("inf")) | (a < bar), -float("inf"), x)


@triton.jit(do_not_specialize=["rows", "vocabulary", "splits", "per_split"])
def mix_kernel(
    z1, z0, weight, parts, out, weights, divergences, rows, vocabulary, splits, per_split, stride1, stride0,
    keep, floor, threshold,
    DIVERGE: tl.constexpr, KEEP: tl.constexpr, WRITE: tl.constexpr, BV: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """Without WRITE the parts of the mix, else the results from them."""
    row, i_s, start, stop = _where_split(vocabulary, splits, per_split, BV)
    divergence, a_row, times = _mix_of(parts, weight, rows, row, splits, keep, floor, DIVERGE, KEEP, SP)
    nothing, bar, least = _bounds(parts, rows, row, splits, threshold, SP)
    high, total = -float("inf"), 0.0
    if WRITE:
        high, _, total = _reduce(parts, MIX, rows, row, splits, SP)
        if i_s == 0:
            tl.store(weights + row, a_row)
            tl.store(divergences + row, divergence)
    for v in range(start, stop, BV):
        o = v + tl.arange(0, BV)
        mask = o < stop
        a, b = _logits(z1, row, stride1, o, mask), _logits(z0, row, stride0, o, mask)
        x = _mixed(a, b, a_row, times, bar, least)
        if WRITE:
            # A mix of −inf alone that is not so by `nothing` makes −inf − −inf, NaN, as in torch.
            x = tl.where(nothing, x, (x - high) - total)
            tl.store(out + row * vocabulary + o, x, mask=mask)
        else:
            high, total = _fold(x, high, total)
    if not WRITE:
        at = parts + (row + rows.to(tl.int64) * MIX) * splits + i_s
        tl.store(at, high)
        tl.store(at + rows.to(tl.int64) * splits, total)


def launches(z1: Tensor, z0: Tensor, weight: Tensor | None, settings: Any) -> tuple[list[Launch], tuple[Tensor, ...]]:
    """In order, and what they fill: log probabilities [R, V], a [R], divergence [R]."""
    rows, vocabulary = z1.shape
    block = min(BLOCK, max(64, triton.next_power_of_2(vocabulary)))
    blocks = triton.cdiv(vocabulary, block)
    per_split = triton.cdiv(blocks, min(max(1, blocks), triton.cdiv(PROGRAMS, max(1, rows))))
    splits = max(1, triton.cdiv(blocks, max(1, per_split)))
    parts, out, weights, divergences = (
        torch.empty(shape, dtype=torch.float32, device=z1.device)
        for shape in ((PLANES, rows, splits), (rows, vocabulary), (rows,), (rows,))
    )
    sizes = rows, vocabulary, splits, per_split, z1.stride(0), z0.stride(0)
    tile = {"BV": block, "SP": max(16, triton.next_power_of_2(splits))}
    options, grid = {"num_warps": 4}, (rows * splits,)
    sums = [
        Launch(rows_kernel, grid, (z1, z0, parts, *sizes), {"BV": block}, options),
        Launch(gaps_kernel, grid, (z1, z0, parts, *sizes), tile, options),
    ]
    given = not math.isnan(settings.keep)
    arguments = (
        z1, z0, weight, parts, out, weights, divergences, *sizes,
        settings.keep if given else 0.0, settings.floor, settings.threshold,
    )  # fmt: skip
    constants = {"DIVERGE": settings.diverge, "KEEP": given, **tile}
    mixes = [Launch(mix_kernel, grid, arguments, {**constants, "WRITE": write}, options) for write in (False, True)]
    return [*(sums if settings.diverge else sums[:1]), *mixes], (out, weights, divergences)


def two_logit_mix(z1: Tensor, z0: Tensor, weight: Tensor | None, settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`settings` as `ops.two_logit_mix.Settings`; logits without gaps in a row, weight [R] fp32 without gaps."""
    steps, results = launches(z1.detach(), z0.detach(), None if weight is None else weight.detach(), settings)
    for step in steps:
        step.run()
    return results


def compile_cases(capability: tuple[int, int]) -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):  # float16 takes the registers that bfloat16 takes
        for rows, vocabulary in ((1, 50257), (64, 128256)):
            logits = meta(rows, vocabulary, dtype=dtype)
            for kind, weight, keep in (("divergence", None, math.nan), ("given", meta(rows), 1.0)):
                settings = SimpleNamespace(keep=keep, floor=0.3, threshold=-2.3, diverge=weight is None)
                for i, launch in enumerate(launches(logits, logits, weight, settings)[0]):
                    name = f"{i} {launch.kernel.fn.__name__} {kind}"
                    yield Case(f"{name} {str(dtype).removeprefix('torch.')} {rows}x{vocabulary}", launch, False)
