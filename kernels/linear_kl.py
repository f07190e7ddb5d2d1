"""Rows of linear_kl: from the logits of two heads, in workspace, to their divergence and its gradient.

    kl      one program a token: log-sum-exps of both rows, online over the vocabulary; then the row sums; then
            G = factor · gradient · (forward · (p − t) + reverse · p · (log p − log t − KL(p ‖ t)))
            The forward divergence alone needs no value first: its sums and G come from one pass.

The products that make the logits and use G are the library's. Each pass reads both rows once, and a row of 50,257 is
200 KB: what the second and third read comes mostly from the second-level cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import FLT_MAX, Case, Launch, factor_of, finite
from ._operands import SLOTS

# Weights in float16: |p − t| ≤ 1 and |p (log p − log t − KL)| seldom above 100; the largest gradient counts as < 2.
HALF_UNIT = 2.0**8


class Head(NamedTuple):
    """What turns a row of products into logits."""

    products: Tensor  # [rows, V] fp32
    bias: Tensor | None  # [V], divided by the temperature
    scale: float  # 1 / temperature


class Ids(NamedTuple):
    tokens: Tensor | None  # [rows] int64; where equal, an entry is masked in both
    vocabulary: Tensor | None  # [V] int64


class Sums(NamedTuple):
    """Of each row [rows] fp32."""

    divergence: Tensor
    entropy: Tensor


class Target(NamedTuple):
    """Where G goes, in float32 and/or for products in half precision."""

    exact: Tensor | None  # [rows, V] fp32, may be the student's products, and has their stride
    half: Tensor | None  # [rows, V] fp16


NO_TARGET = Target(None, None)


@triton.jit
def _logits(head, ids, row, stride, o, mask):
    """A block of a row's logits, −inf where masked or beyond the vocabulary."""
    z = tl.load(head.products + row * stride + o, mask=mask, other=0.0) * head.scale
    if head.bias is not None:
        z += tl.load(head.bias + o, mask=mask, other=0.0)
    if ids.tokens is not None:
        mask = mask & (tl.load(ids.vocabulary + o, mask=mask, other=0) != tl.load(ids.tokens + row))
    return tl.where(mask, z, -float("inf"))


@triton.jit
def _fold(z, high, total):
    """Maximum and Σ exp(z − maximum) with one more block."""
    largest = tl.maximum(high, tl.max(z, 0))
    offset = finite(largest)
    return largest, total * tl.exp(finite(high) - offset) + tl.sum(tl.exp(z - offset), 0)


@triton.jit
def _excess(p, q, d):
    """p · (e^−d − 1 + d) for q = p · e^−d: see `linear_kl.cpp`."""
    series = 1.0 / 40320
    series = series * -d + 1.0 / 5040
    series = series * -d + 1.0 / 720
    series = series * -d + 1.0 / 120
    series = series * -d + 1.0 / 24
    series = series * -d + 1.0 / 6
    series = series * -d + 1.0 / 2
    direct = (q - p) + tl.where(p > 0.0, p * d, 0.0)
    return tl.where(tl.abs(d) < 0.5, p * (d * d) * series, direct)


@triton.jit
def _log_softmax(head, ids, row, stride, o, mask, high, low):
    return (_logits(head, ids, row, stride, o, mask) - high) - low


@triton.jit
def _store(g, target, row, stride, half_stride, o, mask):
    if target.exact is not None:
        tl.store(target.exact + row * stride + o, g, mask=mask)
    if target.half is not None:
        tl.store(target.half + row * half_stride + o, g.to(tl.float16), mask=mask)


@triton.jit(do_not_specialize=["vocabulary"])
def kl_kernel(
    student, teacher, ids, gradient, extents, target, sums, vocabulary, stride, half_stride, forward, reverse,
    FORWARD: tl.constexpr, REVERSE: tl.constexpr, UNIT: tl.constexpr, SLOTS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BV)
    p_high, t_high, p_low, t_low = -float("inf"), -float("inf"), 0.0, 0.0
    for v in range(0, vocabulary, BV):
        o, mask = v + o_v, v + o_v < vocabulary
        p_high, p_low = _fold(_logits(student, ids, row, stride, o, mask), p_high, p_low)
        t_high, t_low = _fold(_logits(teacher, ids, row, stride, o, mask), t_high, t_low)
    # A row with nothing left has the sum 0; without its logarithm every probability is exp(−inf) = 0.
    p_low, t_low = tl.where(p_low == 0.0, 0.0, tl.log(p_low)), tl.where(t_low == 0.0, 0.0, tl.log(t_low))
    p_high, t_high = finite(p_high), finite(t_high)

    scale = 0.0
    if gradient is not None:
        scale = factor_of(extents, UNIT, SLOTS) * tl.load(gradient + row)
    divergence, entropy = tl.zeros((BV,), tl.float32), tl.zeros((BV,), tl.float32)
    reverse_sums = tl.zeros((BV,), tl.float32)
    for v in range(0, vocabulary, BV):
        o, mask = v + o_v, v + o_v < vocabulary
        log_p = _log_softmax(student, ids, row, stride, o, mask, p_high, p_low)
        log_t = _log_softmax(teacher, ids, row, stride, o, mask, t_high, t_low)
        p, t = tl.exp(log_p), tl.exp(log_t)
        if FORWARD:
            divergence += _excess(t, p, log_t - log_p)
        if REVERSE:
            reverse_sums += _excess(p, t, log_p - log_t)
        entropy -= t * tl.where(log_t > -FLT_MAX, log_t, -FLT_MAX)
        if gradient is not None and not REVERSE:
            _store(scale * forward * (p - t), target, row, stride, half_stride, o, mask)
    mean = tl.sum(reverse_sums, 0)
    tl.store(sums.divergence + row, forward * tl.sum(divergence, 0) + reverse * mean)
    tl.store(sums.entropy + row, tl.sum(entropy, 0))

    if gradient is not None and REVERSE:
        for v in range(0, vocabulary, BV):
            o, mask = v + o_v, v + o_v < vocabulary
            log_p = _log_softmax(student, ids, row, stride, o, mask, p_high, p_low)
            log_t = _log_softmax(teacher, ids, row, stride, o, mask, t_high, t_low)
            p, t = tl.exp(log_p), tl.exp(log_t)
            pulled = tl.where(p > 0.0, p * ((log_p - log_t) - mean), p)
            g = scale * (forward * (p - t) + reverse * pulled)
            _store(g, target, row, stride, half_stride, o, mask)


def kl_launch(
    student: Head, teacher: Head, ids: Ids, shares: tuple[float, float], gradient: Tensor | None,
    extents: Tensor | None, target: Target, sums: Sums,
) -> Launch:  # fmt: skip
    rows, vocabulary = student.products.shape
    # Eight entries a thread: with wider blocks the assembler trades a few bytes of stack for occupancy.
    block = min(1024, max(64, triton.next_power_of_2(vocabulary)))
    arguments = (
        student, teacher, ids, gradient, extents, target, sums, vocabulary, student.products.stride(0),
        0 if target.half is None else target.half.stride(0), *shares,
    )  # fmt: skip
    constants = {
        "FORWARD": shares[0] != 0.0, "REVERSE": shares[1] != 0.0, "UNIT": 1.0 if extents is None else HALF_UNIT,
        "SLOTS": SLOTS if extents is None else extents.shape[1], "BV": block,
    }  # fmt: skip
    return Launch(kl_kernel, (rows,), arguments, constants, {"num_warps": 4})


def kl(
    logits: Sequence[Tensor],  # products of the student and of the teacher, [rows, V] fp32, of one stride
    heads: Sequence[tuple[float, Tensor | None]],  # scale, and bias [V] fp32, of each
    problem: Any,  # `ops._divergence.Problem` of these rows: ids and shares
    gradient: tuple[Tensor, Tensor | None, Target] | None,  # upstream [rows], extents, where G goes
    rows: Any,  # `ops._divergence.Rows`: divergence and entropy, [rows] fp32
) -> None:
    """`rows`, and with a gradient the weights."""
    student, teacher = (Head(z, bias, scale) for z, (scale, bias) in zip(logits, heads, strict=True))
    ids, shares = Ids(problem.token_ids, problem.vocabulary_ids), (problem.forward, problem.reverse)
    kl_launch(student, teacher, ids, shares, *(gradient or (None, None, NO_TARGET)), Sums(*rows)).run()


def compile_cases(capability: tuple[int, int]) -> Iterator[Case]:
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    heads = [Head(meta(256, 50272)[:, :50257], bias, 0.5) for bias in (None, meta(50257))]
    sums, gradient, products = Sums(meta(256), meta(256)), meta(256), heads[0].products
    half = meta(256, 50272, dtype=torch.float16)[:, :50257]
    ids = Ids(meta(256, dtype=torch.int64), meta(50257, dtype=torch.int64))
    for name, shares in (("forward", (1.0, 0.0)), ("reverse", (0.0, 1.0)), ("symmetric", (0.5, 0.5))):
        launches = {
            "gradient float16": (Ids(None, None), gradient, meta(5, SLOTS), Target(None, half)),
            "gradient of both kinds": (Ids(None, None), gradient, meta(5, SLOTS), Target(products, half)),
            "ids, gradient float32": (ids, gradient, None, Target(products, None)),
            "no gradient": (Ids(None, None), None, None, NO_TARGET),
        }
        if name != "symmetric":  # which has all that the two directions have
            launches = {kind: launches[kind] for kind in ("gradient float16",)}
        for kind, (masks, *target) in launches.items():
            yield Case(f"kl {name}, {kind}", kl_launch(*heads, masks, shares, *target, sums), False)
