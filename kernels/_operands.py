"""What stands between weights and library products in half precision: powers of two in, powers of two out.

Weights are written in float16, whatever half precision the inputs have: its 11 bits round eight times finer than
bfloat16's 8, so that the gradients are as good as from float32 logits. Its range is narrow, so every operand is brought
into it by a power of two, which rounds nothing: a bfloat16 matrix times 2¹⁴ / (power of its largest entry) has each
number exactly down to 2⁻²⁹ of the largest; the gradients' largest counts in the same way (`HALF_UNIT` of the weights).

    extents    partial maxima of |x| over queries, keys, and the gradients of rows, columns and own logits
    to_half    a bfloat16 matrix as float16
    finish     fp32 product → gradient: times scale and the powers of two, cast
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import FLT_MAX, Case, Launch, interpreted, power_of_two

SLOTS = 128  # partial maxima of each tensor
QUERIES, KEYS = 0, 1  # rows of `extents`; the gradients have the three behind
HALF_OPERAND = 2.0**14


@triton.jit
def _extent(x, row_stride, count, width, slot, BLOCK: tl.constexpr, SLOTS: tl.constexpr):
    """Largest finite |x| of this slot's share of a matrix [count, width], taken as one sequence of numbers."""
    largest = tl.zeros((BLOCK,), tl.float32)
    total = tl.full((), 1, tl.int64) * count * width
    for block in range(slot, tl.cdiv(total, BLOCK), SLOTS):
        o = (tl.zeros((BLOCK,), tl.int64) + block) * BLOCK + tl.arange(0, BLOCK)
        value = tl.abs(tl.load(x + o // width * row_stride + o % width, mask=o < total, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, tl.where(value <= FLT_MAX, value, 0.0))
    return tl.max(largest, 0)


@triton.jit(do_not_specialize=["m", "n", "width", "q_stride", "k_stride"])
def extents_kernel(
    queries, keys, g, h, p, extents, m, n, width, q_stride, k_stride, BLOCK: tl.constexpr, SLOTS: tl.constexpr
):
    program = tl.program_id(0)
    row, slot = program // SLOTS, program % SLOTS
    value = 0.0
    if row == 0:
        if queries is not None:
            value = _extent(queries, q_stride, m, width, slot, BLOCK, SLOTS)
    elif row == 1:
        if keys is not None:
            value = _extent(keys, k_stride, n, width, slot, BLOCK, SLOTS)
    elif row == 2:
        if g is not None:
            value = _extent(g, 0, 1, m, slot, BLOCK, SLOTS)
        elif h is None and p is None:  # weights of ones
            value = 1.0
    elif row == 3:
        if h is not None:
            value = _extent(h, 0, 1, n, slot, BLOCK, SLOTS)
    else:
        if p is not None:
            value = _extent(p, 0, 1, m, slot, BLOCK, SLOTS)
    tl.store(extents + program, value)


def extents_launch(
    queries: Tensor | None, keys: Tensor | None, gradients: Sequence[Tensor | None], out: Tensor, m: int, n: int
) -> Launch:
    first = queries if queries is not None else keys
    arguments = (
        queries, keys, *gradients, out, m, n, 0 if first is None else first.shape[1],
        0 if queries is None else queries.stride(0), 0 if keys is None else keys.stride(0),
    )  # fmt: skip
    return Launch(extents_kernel, (5 * SLOTS,), arguments, {"BLOCK": 1024, "SLOTS": SLOTS}, {"num_warps": 4})


def extents(
    queries: Tensor | None,  # [M, D], if it is to become float16
    keys: Tensor | None,  # [N, D], if it is to become float16
    gradients: Sequence[Tensor | None],  # of rows [M], columns [N], own logits [M]; all None: ones
    m: int,
    n: int,
    device: torch.device,
) -> Tensor:  # [5, SLOTS] fp32
    """Partial maxima of the finite |x|; whoever needs the largest takes the maximum of a row."""
    out = torch.empty(5, SLOTS, dtype=torch.float32, device=device)
    queries, keys = (None if x is None or not x.numel() else x for x in (queries, keys))
    extents_launch(queries, keys, gradients, out, m, n).run()
    return out


@triton.jit(do_not_specialize=["count", "width"])
def to_half_kernel(
    x, extents, out, count, width, x_stride, out_stride, ROW: tl.constexpr, UNIT: tl.constexpr, SLOTS: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(width, BC)
    r, c = tl.program_id(0) // blocks * BR + tl.arange(0, BR), tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    mask = (r < count)[:, None] & (c < width)[None, :]
    factor = UNIT / power_of_two(extents, ROW, 1, SLOTS)
    value = tl.load(x + r.to(tl.int64)[:, None] * x_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + r.to(tl.int64)[:, None] * out_stride + c[None, :], (value * factor).to(tl.float16), mask=mask)


BR, BC = 16, 128


def to_half_launch(x: Tensor, extents: Tensor, row: int, out: Tensor) -> Launch:
    count, width = x.shape
    arguments = (x, extents, out, count, width, x.stride(0), out.stride(0))
    constants = {"ROW": row, "UNIT": HALF_OPERAND, "SLOTS": SLOTS, "BR": BR, "BC": BC}
    return Launch(
        to_half_kernel, (triton.cdiv(count, BR) * triton.cdiv(width, BC),), arguments, constants, {"num_warps": 4}
    )


def to_half(x: Tensor, extents: Tensor, row: int) -> Tensor:
    """x · 2¹⁴ / (power of two of row `row` of the extents), in float16."""
    out = torch.empty(x.shape, dtype=torch.float16, device=x.device)
    to_half_launch(x, extents, row, out).run()
    return out


@triton.jit(do_not_specialize=["count", "width"])
def finish_kernel(
    product, scale, extents, out, count, width, out_stride, UNIT: tl.constexpr, OPERAND: tl.constexpr,
    WITH_QUERIES: tl.constexpr, WITH_KEYS: tl.constexpr, SLOTS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(width, BC)
    r, c = tl.program_id(0) // blocks * BR + tl.arange(0, BR), tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    mask = (r < count)[:, None] & (c < width)[None, :]
    factor = 1.0 / UNIT
    if extents is not None:
        factor *= power_of_two(extents, 2, 3, SLOTS)
        if WITH_QUERIES:
            factor *= power_of_two(extents, 0, 1, SLOTS) / OPERAND
        if WITH_KEYS:
            factor *= power_of_two(extents, 1, 1, SLOTS) / OPERAND
    value = factor * tl.load(product + r.to(tl.int64)[:, None] * width + c[None, :], mask=mask, other=0.0)
    if scale is not None:
        value *= tl.load(scale).to(tl.float32)
    tl.store(
        out + r.to(tl.int64)[:, None] * out_stride + c[None, :], value.to(out.dtype.element_ty), mask=mask
    )  # fmt: skip


def finish_launch(
    product: Tensor, scale: Tensor | None, extents: Tensor | None, unit: float, operands: Sequence[int], out: Tensor
) -> Launch:
    count, width = product.shape
    arguments = (product, scale, extents, out, count, width, out.stride(0))
    constants = {
        "UNIT": unit, "OPERAND": HALF_OPERAND, "WITH_QUERIES": QUERIES in operands, "WITH_KEYS": KEYS in operands,
        "SLOTS": SLOTS, "BR": BR, "BC": BC,
    }  # fmt: skip
    programs = triton.cdiv(count, BR) * triton.cdiv(width, BC)
    return Launch(finish_kernel, (programs,), arguments, constants, {"num_warps": 4})


def finish(
    product: Tensor,  # [rows, width] fp32, contiguous
    scale: Tensor | None,
    extents: Tensor | None,
    unit: float,  # that the weights were multiplied by
    operands: Sequence[int],  # which of queries and keys, converted by `to_half`, were factors of the product
    out: Tensor,  # [rows, width], may be the product
) -> None:
    """out = scale · product, the powers of two undone."""
    if interpreted() and out.dtype == torch.bfloat16:  # the interpreter truncates instead of rounding
        finish(product, scale, extents, unit, operands, product)
        out.copy_(product)
        return
    finish_launch(product, scale, extents, unit, operands, out).run()


def compile_cases(capability: tuple[int, int]) -> Iterator[Case]:
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    half, vector, parts = meta(4096, 768, dtype=torch.bfloat16), meta(4096), meta(5, SLOTS)
    yield Case("extents", extents_launch(half, half, (vector,) * 3, parts, 4096, 4096), False)
    yield Case("to_half", to_half_launch(half, parts, KEYS, meta(4096, 768, dtype=torch.float16)), False)
    raw = meta(4096, 768)
    yield Case("finish bfloat16", finish_launch(raw, meta(), parts, 8192.0, (KEYS,), half), False)
    yield Case("finish float32", finish_launch(raw, meta(), None, 1.0, (), raw), False)
