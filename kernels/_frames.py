"""What both attentions across frames share on a GPU: views of any strides, widths in two chunks, frames of a clip.

A width that is no power of two is two chunks, BD and then TAIL, which for 40, 72, 80 or 160 have a third less to carry
than the next power of two. Every scalar and every count is read from device memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import interpreted, kind_of, meta

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class View(NamedTuple):
    """A tensor [B, F, T, H, D] whose D has no gaps, as one argument of a kernel. Strides are doubled, for Triton 3.6
    loses a number 1 of a tuple; that of a dimension of size 1 is 0, so that any index will do there: the clip's in
    packed clips, the frame's in extra keys that its frames share."""

    data: Tensor | None
    b: int = 0
    f: int = 0
    t: int = 0
    h: int = 0


def view(x: Tensor | None) -> View:
    if x is None:
        return View(None)
    return View(x, *(0 if n == 1 else 2 * stride for n, stride in zip(x.shape[:4], x.stride()[:4], strict=True)))


def view_of_lse(x: Tensor | None) -> View:
    """Of [B, F, H, T], a number for each query."""
    return view(None if x is None or x.ndim != 4 else x.transpose(2, 3)[..., None])


def chunks(width: int, most: int = 160) -> tuple[int, int]:
    """BD and TAIL that cover a width, two of them up to `most`; products of the matrix units want at least 16."""
    whole = max(16, triton.next_power_of_2(width))
    half = whole // 2
    tail = max(16, triton.next_power_of_2(max(width - half, 1)))
    return (half, tail) if half >= 32 and half + tail < whole and half + tail <= most else (whole, 0)


def alignment(views: Iterable[View], width: int) -> int:
    """Elements that every row begins at a multiple of. Triton itself only asks for 16: rows of 8 · odd elements load 16
    bytes at a time too, once it sees the 8."""
    sizes = [width, *(stride // 2 for x in views for stride in x[1:])]
    return next(n for n in (16, 8, 4, 1) if all(size % n == 0 for size in sizes))


def precision(dtype: torch.dtype) -> str:
    """Float32 products of the matrix units, in three parts of TF32: as exact as float32's to a few units in the last
    place. Those without matrix units keep whole operands in registers, and spill."""
    return "tf32" if kind_of(dtype) == "tf32" else "tf32x3" if dtype == torch.float32 else "ieee"


def constants(clips: Any, views: Iterable[View], most: int = 160) -> dict[str, Any]:
    """What every kernel takes of a problem, `ops._frames.Clips`."""
    dtype, width = clips.q.dtype, clips.q.shape[4]
    bd, tail = chunks(width, most)
    return {
        "GROUP": clips.q.shape[3] // max(1, clips.k.shape[3]), "D": width, "BD": bd, "TAIL": tail,
        "ALIGN": alignment(views, width), "PRECISION": precision(dtype),
        "UPCAST": interpreted() and dtype in (torch.bfloat16, torch.float16),
    }  # fmt: skip


class Frames(NamedTuple):
    """Which frames there are, as one argument of a kernel."""

    count: Tensor  # [F, F] or [clips, F, F] int32
    valid: Tensor | None  # [clips, F]
    starts: Tensor | None  # [clips + 1] int32
    twice_frames: int  # of a clip, doubled as strides are
    count_b: int


def frames_of(clips: Any) -> Frames:
    frames, own = clips.frames, clips.count.ndim == 3
    valid = None if clips.valid is None else clips.valid.view(torch.uint8)
    return Frames(clips.count, valid, clips.starts, 2 * frames, 2 * frames * frames if own else 0)


class Example(NamedTuple):
    """As `ops._frames.Clips`, on meta tensors: what the compile gate compiles for."""

    q: Tensor
    k: Tensor
    v: Tensor
    extra_k: Tensor | None
    extra_v: Tensor | None
    count: Tensor
    valid: Tensor | None
    starts: Tensor | None
    scale: float
    clips: int
    frames: int
    shared: bool


def example(
    b: int, f: int, t: int, h: int, d: int, dtype: torch.dtype, extra: int = 0, padded: bool = False, group: int = 1
) -> Example:
    q, k = meta(b, f, t, h, d, dtype=dtype), meta(b, f, t, h // group, d, dtype=dtype)
    x = meta(b, 1, extra, h // group, d, dtype=dtype) if extra else None
    count = meta(*((b,) if padded else ()), f, f, dtype=torch.int32)
    valid = meta(b, f, dtype=torch.bool) if padded else None
    return Example(q, k, k, x, x, count, valid, None, d**-0.5, b, f, bool(extra))


# ---------------------------------------------------------------------------------------------------- inside of kernels


@triton.jit
def rows(x, b, f, t, h, ALIGN: tl.constexpr):
    """Pointers to numbers [b, f, t, h, 0]; indices are int64."""
    b_stride, f_stride = x.b // (2 * ALIGN) * ALIGN, x.f // (2 * ALIGN) * ALIGN
    t_stride, h_stride = x.t // (2 * ALIGN) * ALIGN, x.h // (2 * ALIGN) * ALIGN
    return x.data + (b * b_stride + f * f_stride + t * t_stride + h * h_stride)


@triton.jit
def chunk(pointers, mask, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, UPCAST: tl.constexpr):
    """Numbers [FIRST, FIRST + WIDTH) of rows, 0 beyond D and where `mask` says so; a mere 0 if there is no WIDTH, for
    Triton 3.6 cannot return None."""
    if WIDTH == 0:
        x = tl.zeros((), tl.float32)
    else:
        o = FIRST + tl.arange(0, WIDTH)
        at, m = tl.expand_dims(pointers, -1) + o, tl.expand_dims(mask, -1)
        x = tl.load(at, mask=m if FIRST + WIDTH <= D else m & (o < D), other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
    return x


@triton.jit
def store(pointers, mask, x, FIRST: tl.constexpr, D: tl.constexpr):
    o = FIRST + tl.arange(0, x.shape[-1])
    m = tl.expand_dims(mask, -1) & (o < D)
    tl.store(tl.expand_dims(pointers, -1) + o, x.to(pointers.dtype.element_ty), mask=m)


@triton.jit
def inner(a, a_tail, b, b_tail, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """⟨a_i, b_j⟩ in float32."""
    s = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if TAIL:
        s = tl.dot(a_tail, tl.trans(b_tail), s, input_precision=PRECISION)
    return s


@triton.jit
def clip_of(frames, b):
    """Row of its first frame and how many it has; `frames.twice_frames` is of the longest clip."""
    if frames.starts is None:
        first, length = tl.zeros((), tl.int32), frames.twice_frames // 2
    else:
        first = tl.load(frames.starts + b)
        length = tl.load(frames.starts + b + 1) - first
    return first, length


@triton.jit
def is_valid(frames, b, f, there):
    """Whether frames are valid, of those that are there."""
    if frames.valid is not None:
        there = there & (tl.load(frames.valid + b * (frames.twice_frames // 2) + f, mask=there, other=0) != 0)
    return there


@triton.jit
def counts(frames, b, f, g, mask):
    """c[f, g] of clip b."""
    at = frames.count + b * (frames.count_b // 2) + f * (frames.twice_frames // 2) + g
    return tl.load(at, mask=mask, other=0)
