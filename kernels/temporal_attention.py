"""Temporal attention: a program holds all frames of POS positions, reads each number once and writes each once.

    forward    S = scale · Q Kᵀ + log c of each position, P = softmax S, out = P V; extra keys one after another
    backward   P again, dS = P · (dout Vᵀ − δ), dq = scale · dS K, dk = scale · dSᵀ Q, dv = Pᵀ dout: the only owner

Products are batched over positions, or are of one position, whose queries its program goes through BQ at a time. A
position has a key head, and its program goes through the group of query heads, too.
Gradients of extra keys are float32 parts, one for each tile of positions, that are added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Case, Launch, finite, meta
from ._frames import (
    LN2,
    LOG2E,
    View,
    chunk,
    chunks,
    clip_of,
    constants,
    counts,
    example,
    frames_of,
    is_valid,
    rows,
    store,
    view,
    view_of_lse,
)

# ---------------------------------------------------------------------------------------------------- inside of kernels


@triton.jit
def positions(tiles, tokens, key_heads, POS: tl.constexpr, ONE_HEAD: tl.constexpr):
    """Clip, tokens [POS], key heads [POS], which of them there are, and the tile's number among those of its head.

    Heads first, as they lie in memory; a head's own tokens where gradients of its extra keys are to be added up.
    """
    pid = tl.program_id(0)
    b, tile = (pid // tiles).to(tl.int64), pid % tiles
    o = tl.arange(0, POS)
    if ONE_HEAD:
        per_head = tl.cdiv(tokens, POS)
        t, h = tile % per_head * POS + o, tile // per_head + tl.zeros((POS,), tl.int32)
        there, part = t < tokens, tile % per_head
    else:
        p = tile.to(tl.int64) * POS + o
        t, h, there, part = p // key_heads, p % key_heads, p < tokens.to(tl.int64) * key_heads, tile
    return b, t.to(tl.int64), h.to(tl.int64), there, part


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """[POS, M, K] by [POS, K, N] in float32. Of one position it is plain: a batch of one has all but one warp idle."""
    if a.shape[0] == 1:
        x = tl.dot(
            tl.reshape(a, (a.shape[1], a.shape[2])), tl.reshape(b, (b.shape[1], b.shape[2])), input_precision=PRECISION
        )[None, :, :]
    else:
        x = tl.dot(a, b, input_precision=PRECISION)
    return x


@triton.jit
def inner(a, a_tail, b, b_tail, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """⟨a_f, b_g⟩ of each position in float32."""
    s = product(a, tl.trans(b), PRECISION)
    if TAIL:
        s += product(a_tail, tl.trans(b_tail), PRECISION)
    return s


@triton.jit
def logits(q, q_tail, k, k_tail, bias, scale, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """In units of log 2: [POS, F, F]."""
    return inner(q, q_tail, k, k_tail, TAIL, PRECISION) * (scale * LOG2E) + bias


@triton.jit
def along(a, a_tail, b, b_tail, TAIL: tl.constexpr):
    """⟨a, b⟩ of rows with each other's, in float32: [POS, F]."""
    s = tl.sum(a.to(tl.float32) * b.to(tl.float32), 2)
    if TAIL:
        s += tl.sum(a_tail.to(tl.float32) * b_tail.to(tl.float32), 2)
    return s


@triton.jit
def bias_of(frames, b, f, g):
    """log₂ c [1, frames f, frames g]."""
    size = frames.twice_frames // 2
    c = counts(frames, b, f[:, None], g[None, :], (f < size)[:, None] & (g < size)[None, :]).to(tl.float32)
    return tl.where(c > 0, tl.log2(tl.maximum(c, 1.0)), -float("inf"))[None, :, :]


@triton.jit
def add_part(at, mask, weight, x, FIRST: tl.constexpr, D: tl.constexpr, SHARED: tl.constexpr):
    terms = tl.sum(weight[:, :, None] * x.to(tl.float32), 0)  # [F, width]
    if SHARED:
        o = FIRST + tl.arange(0, x.shape[2])
        tl.store(at + o, tl.sum(terms, 0), mask=o < D)
    else:
        store(at, mask, terms, FIRST, D)


@triton.jit
def add(
    parts, shift, weight, x, x_tail, b, f, e, h, in_clip,
    D: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """A tile's Σ weight · x of extra key e into its part: over positions, and over the frames that share the key."""
    at = rows(parts, b, f, e, h, ALIGN) + shift // ALIGN * ALIGN
    add_part(at, in_clip, weight, x, 0, D, SHARED)
    if TAIL:
        add_part(at, in_clip, weight, x_tail, BD, D, SHARED)


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["tiles", "tokens", "key_heads", "extras"])
def forward_kernel(
    q, k, v, extra_k, extra_v, out, lse, frames, tiles, tokens, key_heads, extras, scale,
    POS: tl.constexpr, BF: tl.constexpr, BQ: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    TAIL: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    b, t, key_head, there, _ = positions(tiles, tokens, key_heads, POS, False)
    first, length = clip_of(frames, b)
    o_f = tl.arange(0, BF)
    m_k = there[:, None] & is_valid(frames, b, o_f, o_f < length)[None, :]
    g, t, key_head = (first + o_f).to(tl.int64)[None, :], t[:, None], key_head[:, None]
    k_rows, v_rows = rows(k, b, g, t, key_head, ALIGN), rows(v, b, g, t, key_head, ALIGN)
    b_k, b_k_tail = chunk(k_rows, m_k, 0, BD, D, UPCAST), chunk(k_rows, m_k, BD, TAIL, D, UPCAST)
    b_v, b_v_tail = chunk(v_rows, m_k, 0, BD, D, UPCAST), chunk(v_rows, m_k, BD, TAIL, D, UPCAST)
    for step in range(GROUP * (BF // BQ)):
        h = key_head * GROUP + step // (BF // BQ)
        o_q = step % (BF // BQ) * BQ + tl.arange(0, BQ)
        f, in_clip = (first + o_q).to(tl.int64)[None, :], o_q < length
        m_v = there[:, None] & is_valid(frames, b, o_q, in_clip)[None, :]
        q_rows = rows(q, b, f, t, h, ALIGN)
        b_q, b_q_tail = chunk(q_rows, m_v, 0, BD, D, UPCAST), chunk(q_rows, m_v, BD, TAIL, D, UPCAST)
        s = logits(b_q, b_q_tail, b_k, b_k_tail, bias_of(frames, b, o_q, o_f), scale, TAIL, PRECISION)
        high = tl.max(s, 2)
        p = tl.exp2(s - finite(high)[:, :, None])
        total = tl.sum(p, 2)
        p = p.to(b_v.dtype)
        acc = product(p, b_v, PRECISION)
        acc_tail = None
        if TAIL:
            acc_tail = product(p, b_v_tail, PRECISION)
        if extra_k.data is not None:
            for e in range(extras):
                x_rows, y_rows = rows(extra_k, b, f, e, key_head, ALIGN), rows(extra_v, b, f, e, key_head, ALIGN)
                x, x_tail = chunk(x_rows, m_v, 0, BD, D, UPCAST), chunk(x_rows, m_v, BD, TAIL, D, UPCAST)
                y, y_tail = chunk(y_rows, m_v, 0, BD, D, UPCAST), chunk(y_rows, m_v, BD, TAIL, D, UPCAST)
                s_x = along(b_q, b_q_tail, x, x_tail, TAIL) * (scale * LOG2E)
                higher = tl.maximum(high, s_x)
                keep, p_x = tl.exp2(high - finite(higher)), tl.exp2(s_x - finite(higher))
                acc = acc * keep[:, :, None] + p_x[:, :, None] * y.to(tl.float32)
                if TAIL:
                    acc_tail = acc_tail * keep[:, :, None] + p_x[:, :, None] * y_tail.to(tl.float32)
                total, high = total * keep + p_x, higher
        seen = m_v & (total != 0)
        share = tl.where(seen, 1 / tl.where(seen, total, 1.0), 0.0)[:, :, None]
        o_rows, m_o = rows(out, b, f, t, h, ALIGN), there[:, None] & in_clip[None, :]
        store(o_rows, m_o, acc * share, 0, D)
        if TAIL:
            store(o_rows, m_o, acc_tail * share, BD, D)
        if lse.data is not None:
            value = tl.where(seen, (high + tl.log2(tl.where(seen, total, 1.0))) * LN2, -float("inf"))
            tl.store(rows(lse, b, f, t, h, 1), value, mask=m_o)


@triton.jit(do_not_specialize=["tiles", "tokens", "key_heads", "extras", "part_size"])
def backward_kernel(
    q, k, v, extra_k, extra_v, dout, dlse, dq, dk, dv, k_parts, v_parts, frames,
    tiles, tokens, key_heads, extras, part_size, scale,
    POS: tl.constexpr, BF: tl.constexpr, BQ: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    TAIL: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Parts [tiles, as extra_k], one after another `part_size` numbers."""
    b, t, key_head, there, tile = positions(tiles, tokens, key_heads, POS, extra_k.data is not None)
    first, length = clip_of(frames, b)
    o_f = tl.arange(0, BF)
    m_k = there[:, None] & is_valid(frames, b, o_f, o_f < length)[None, :]
    g, t, key_head = (first + o_f).to(tl.int64)[None, :], t[:, None], key_head[:, None]
    k_rows, v_rows = rows(k, b, g, t, key_head, ALIGN), rows(v, b, g, t, key_head, ALIGN)
    b_k, b_k_tail = chunk(k_rows, m_k, 0, BD, D, UPCAST), chunk(k_rows, m_k, BD, TAIL, D, UPCAST)
    b_v, b_v_tail = chunk(v_rows, m_k, 0, BD, D, UPCAST), chunk(v_rows, m_k, BD, TAIL, D, UPCAST)
    g_k, g_v = tl.zeros((POS, BF, BD), tl.float32), tl.zeros((POS, BF, BD), tl.float32)
    if TAIL:
        g_k_tail, g_v_tail = tl.zeros((POS, BF, TAIL), tl.float32), tl.zeros((POS, BF, TAIL), tl.float32)
    for step in range(GROUP * (BF // BQ)):
        member, block = step // (BF // BQ), step % (BF // BQ)
        h, o_q = key_head * GROUP + member, block * BQ + tl.arange(0, BQ)
        f, in_clip = (first + o_q).to(tl.int64)[None, :], o_q < length
        m_v, m_o = there[:, None] & is_valid(frames, b, o_q, in_clip)[None, :], there[:, None] & in_clip[None, :]
        q_rows, do_rows = rows(q, b, f, t, h, ALIGN), rows(dout, b, f, t, h, ALIGN)
        b_q, b_q_tail = chunk(q_rows, m_v, 0, BD, D, UPCAST), chunk(q_rows, m_v, BD, TAIL, D, UPCAST)
        b_do, b_do_tail = chunk(do_rows, m_v, 0, BD, D, UPCAST), chunk(do_rows, m_v, BD, TAIL, D, UPCAST)
        p = logits(b_q, b_q_tail, b_k, b_k_tail, bias_of(frames, b, o_q, o_f), scale, TAIL, PRECISION)
        high = tl.max(p, 2)
        p = tl.exp2(p - finite(high)[:, :, None])
        total = tl.sum(p, 2)
        dp = inner(b_do, b_do_tail, b_v, b_v_tail, TAIL, PRECISION)
        delta = tl.sum(p * dp, 2)  # times the sum, as p is
        highest = high
        if extra_k.data is not None:
            for e in range(extras):
                x_rows, y_rows = rows(extra_k, b, f, e, key_head, ALIGN), rows(extra_v, b, f, e, key_head, ALIGN)
                x, x_tail = chunk(x_rows, m_v, 0, BD, D, UPCAST), chunk(x_rows, m_v, BD, TAIL, D, UPCAST)
                y, y_tail = chunk(y_rows, m_v, 0, BD, D, UPCAST), chunk(y_rows, m_v, BD, TAIL, D, UPCAST)
                s_x = along(b_q, b_q_tail, x, x_tail, TAIL) * (scale * LOG2E)
                higher = tl.maximum(highest, s_x)
                keep, p_x = tl.exp2(highest - finite(higher)), tl.exp2(s_x - finite(higher))
                total, highest = total * keep + p_x, higher
                delta = delta * keep + p_x * along(b_do, b_do_tail, y, y_tail, TAIL)
        seen = m_v & (total != 0)
        share = tl.where(seen, 1 / tl.where(seen, total, 1.0), 0.0)
        delta = delta * share
        if dlse.data is not None:
            delta -= tl.load(rows(dlse, b, f, t, h, 1), mask=seen, other=0.0).to(tl.float32)
        p *= (tl.exp2(high - finite(highest)) * share)[:, :, None]
        ds = (p * (dp - delta[:, :, None]) * scale).to(b_k.dtype)
        p = p.to(b_k.dtype)
        g_q = product(ds, b_k, PRECISION)
        g_k += product(tl.trans(ds), b_q, PRECISION)
        g_v += product(tl.trans(p), b_do, PRECISION)
        if TAIL:
            g_q_tail = product(ds, b_k_tail, PRECISION)
            g_k_tail += product(tl.trans(ds), b_q_tail, PRECISION)
            g_v_tail += product(tl.trans(p), b_do_tail, PRECISION)
        if extra_k.data is not None:
            # A head's tile: its parts lie one after another, those of the group's members too.
            one, part = tl.max(key_head), tile.to(tl.int64) * GROUP + member
            shift = (part * (BF // BQ) + block if SHARED else part) * part_size
            o_part = tl.zeros((), tl.int64) if SHARED else (first + o_q).to(tl.int64)
            for e in range(extras):
                x_rows, y_rows = rows(extra_k, b, f, e, key_head, ALIGN), rows(extra_v, b, f, e, key_head, ALIGN)
                x, x_tail = chunk(x_rows, m_v, 0, BD, D, UPCAST), chunk(x_rows, m_v, BD, TAIL, D, UPCAST)
                y, y_tail = chunk(y_rows, m_v, 0, BD, D, UPCAST), chunk(y_rows, m_v, BD, TAIL, D, UPCAST)
                p_x = tl.exp2(along(b_q, b_q_tail, x, x_tail, TAIL) * (scale * LOG2E) - finite(highest)) * share
                ds_x = p_x * (along(b_do, b_do_tail, y, y_tail, TAIL) - delta) * scale
                g_q += ds_x[:, :, None] * x.to(tl.float32)
                add(k_parts, shift, ds_x, b_q, b_q_tail, b, o_part, e, one, in_clip, D, BD, TAIL, ALIGN, SHARED)
                add(v_parts, shift, p_x, b_do, b_do_tail, b, o_part, e, one, in_clip, D, BD, TAIL, ALIGN, SHARED)
                if TAIL:
                    g_q_tail += ds_x[:, :, None] * x_tail.to(tl.float32)
        dq_rows = rows(dq, b, f, t, h, ALIGN)
        store(dq_rows, m_o, g_q, 0, D)
        if TAIL:
            store(dq_rows, m_o, g_q_tail, BD, D)
    dk_rows, dv_rows = rows(dk, b, g, t, key_head, ALIGN), rows(dv, b, g, t, key_head, ALIGN)
    m_o = there[:, None] & (o_f < length)[None, :]
    store(dk_rows, m_o, g_k, 0, D)
    store(dv_rows, m_o, g_v, 0, D)
    if TAIL:
        store(dk_rows, m_o, g_k_tail, BD, D)
        store(dv_rows, m_o, g_v_tail, BD, D)


# ------------------------------------------------------------------------------------------------------------- launches


QUERIES = 32  # frames whose logits are there at a time, where a program has one position
LARGE = 4096  # numbers of a position from which it is half as many


def tile_of(clips: Any, backward: bool) -> tuple[int, int, int]:
    """POS, BF and warps: a warp a position where that has the registers, else all warps one position."""
    bf = max(16, triton.next_power_of_2(clips.frames))
    size = bf * max(sum(chunks(clips.q.shape[4])), bf) * clips.q.element_size()  # bytes of each tensor in a position
    wide = backward or clips.q.dtype == torch.float32  # gradients to keep, or operands in three parts
    extra = clips.extra_k is not None  # and the second layout that extra keys take
    size *= (2 if wide else 1) * (4 if extra else 1)
    most = 4 if bf == 16 else 8  # more would load numbers one by one
    warps = min(most, triton.next_power_of_2(size // (4096 if bf < 64 else 2048)))
    return (4, bf, 4) if size <= 4096 else (1, bf, warps)


def constants_of(clips: Any, views: list[View], backward: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    pos, bf, warps = tile_of(clips, backward)
    large = bf * sum(chunks(clips.q.shape[4])) > LARGE
    queries = QUERIES // 2 if large or (backward and bf > QUERIES) else QUERIES
    tile = {"POS": pos, "BF": bf, "BQ": min(bf, queries) if pos == 1 else bf}
    options = {"num_warps": warps, "num_stages": 1}
    if pos > 1 or clips.extra_k is not None:  # the assembler would go for 80 or 168 registers, and spill
        options["maxnreg"] = 168 if pos > 1 else 255
    return {**tile, **constants(clips, views)}, options


def forward_launch(clips: Any, out: Tensor, lse: Tensor | None) -> Launch:
    views = [*map(view, clips[:5]), view(out)]
    chosen, options = constants_of(clips, views, False)
    t, key_heads = clips.k.shape[2:4]
    tiles = triton.cdiv(t * key_heads, chosen["POS"])
    extras = 0 if clips.extra_k is None else clips.extra_k.shape[2]
    arguments = *views, view_of_lse(lse), frames_of(clips), tiles, t, key_heads, extras, clips.scale
    return Launch(forward_kernel, (clips.clips * tiles,), arguments, chosen, options)


def backward_launch(
    clips: Any, dout: Tensor, dlse: Tensor | None, gradients: tuple[Tensor, ...]
) -> tuple[Launch, list[Tensor | None]]:
    """The launch, and parts [tiles, as extra_k] that it fills, of keys and of values."""
    views = [*map(view, clips[:5]), view(dout)]
    given = [view(x) for x in gradients]
    chosen, options = constants_of(clips, [*views, *given], True)
    t, key_heads = clips.k.shape[2:4]
    parts, extras, size = [None, None], 0, 0
    if clips.extra_k is None:
        tiles = triton.cdiv(t * key_heads, chosen["POS"])
    else:
        per_head = triton.cdiv(t, chosen["POS"])
        tiles, extras, size = key_heads * per_head, clips.extra_k.shape[2], clips.extra_k.numel()
        blocks = chosen["BF"] // chosen["BQ"] if clips.shared else 1
        shape = (per_head * chosen["GROUP"] * blocks, *clips.extra_k.shape)
        parts = [torch.empty(shape, dtype=torch.float32, device=clips.q.device) for _ in parts]
    part_views = [view(None if x is None or not len(x) else x[0]) for x in parts]
    arguments = (
        *views, view_of_lse(dlse), *given, *part_views, frames_of(clips),
        tiles, t, key_heads, extras, size, clips.scale,
    )  # fmt: skip
    chosen["SHARED"] = clips.shared
    return Launch(backward_kernel, (clips.clips * tiles,), arguments, chosen, options), parts


def forward(clips: Any, need_lse: bool) -> tuple[Tensor, Tensor]:
    """out, and lse [B, F, H, T], empty without need of it. `clips` is `ops._frames.Clips`."""
    b, f, t, h, _ = clips.q.shape
    out = torch.empty_like(clips.q)
    lse = clips.q.new_empty((b, f, h, t) if need_lse else (0,), dtype=torch.float32)
    forward_launch(clips, out, lse).run()
    return out, lse


def backward(clips: Any, out: Any, lse: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and the extra keys and values. Of the forward it takes nothing: `out` and `lse` are None."""
    gradients = tuple(torch.empty_like(x) for x in clips[:3])
    launch, parts = backward_launch(clips, dout, dlse, gradients)
    launch.run()
    extra = (None if x is None else torch.empty_like(x) for x in clips[3:5])
    return *gradients, *(None if x is None else x.copy_(part.sum(0)) for x, part in zip(extra, parts, strict=True))


def compile_cases(capability: tuple[int, int]) -> Iterator[Case]:
    """AnimateDiff's widths, Open-Sora's 72, clips of 8, 25 and 96 frames, extra keys of grouped heads, float32."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    long = 96 if capability >= (9, 0) else 64  # sm_80's backward of 128 spills 400 bytes a thread
    shapes = (
        ("40", example(2, 16, 4096, 8, 40, bf16)),
        ("160", example(2, 16, 256, 8, 160, bf16)),
        ("72 extra", example(1, 15, 1590, 16, 72, fp16, extra=1, padded=True, group=2)),
        (f"{long} frames", example(8, long, 196, 12, 64, bf16, padded=True)),
        ("25 frames", example(2, 25, 2304, 10, 64, bf16)),
        ("25 frames float32", example(2, 25, 2304, 10, 64, fp32)),
    )
    for name, clips in shapes:
        b, f, t, h, _ = clips.q.shape
        lse, wide = meta(b, f, h, t), clips.q.dtype != fp32
        yield Case(f"forward {name}", forward_launch(clips, clips.q, lse), False, wide)
        launch, _ = backward_launch(clips, clips.q, None, (clips.q, clips.k, clips.v))
        yield Case(f"backward {name}", launch, False, wide)
