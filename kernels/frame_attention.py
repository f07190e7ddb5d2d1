"""Frame attention: the softmax of a tile of queries goes along while it meets the keys of one frame after another.

    forward      a tile of queries of frame f: frames g with c[f, g] > 0, a tile of keys at a time, then extra keys
    delta        δ = ⟨dout, out⟩ − dlse of every query
    queries      dq of a tile of queries, which meets the same keys
    plan         shares of work: frame g's R(g), the frames that attend it, CHUNK of them at a time
    keys         dk, dv of a tile of keys of frame g: the queries of one share. A frame of one share is done then;
    combine      of the others, which no query or many frames attend, parts are added, in their order
    extra keys   their gradients, of the queries of their frame; of shared ones a part for each frame

A tile has one owner and its sums one order. Nothing depends on what counts are but the device's own work: a share is
twice what a frame is attended on average, so that there are at most 3/2 F of them and F parts, whatever the rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Case, Launch, architecture, gpu_of, meta
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
    inner,
    is_valid,
    rows,
    store,
    view,
    view_of_lse,
)

# ---------------------------------------------------------------------------------------------------- inside of kernels


@triton.jit
def problem_of(frame_count, heads, tiles):
    """Clip, frame, head and tile: tiles first, then frames, which may share keys, then heads."""
    pid = tl.program_id(0)
    tile, rest = pid % tiles, pid // tiles
    f, rest = rest % frame_count, rest // frame_count
    return (rest // heads).to(tl.int64), f, (rest % heads).to(tl.int64), tile


@triton.jit
def up_to(i, size, there):
    """i < size, nowhere unless `there`."""
    return i < tl.where(there, size, 0)


@triton.jit
def weight(frames, b, f, g):
    """How often frame f attends frame g, and log₂ of that."""
    c = counts(frames, b, f, g, True)
    return c, tl.log2(tl.maximum(c, 1).to(tl.float32))


@triton.jit
def meet(
    acc, acc_tail, high, total, q, q_tail, k, v, b, row, h, size, bias, factor,
    BN: tl.constexpr, EVEN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The softmax so far, after `size` more keys, those of one frame."""
    o_n = tl.arange(0, BN)
    for n0 in range(0, size, BN):
        n = n0 + o_n
        m_n = n < (size if not EVEN else n0 + BN)
        k_rows, v_rows = rows(k, b, row, n.to(tl.int64), h, ALIGN), rows(v, b, row, n.to(tl.int64), h, ALIGN)
        b_k, b_k_tail = chunk(k_rows, m_n, 0, BD, D, UPCAST), chunk(k_rows, m_n, BD, TAIL, D, UPCAST)
        s = inner(q, q_tail, b_k, b_k_tail, TAIL, PRECISION) * factor + bias
        if not EVEN:
            s = tl.where(m_n[None, :], s, -float("inf"))
        higher = tl.maximum(high, tl.max(s, 1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        p, keep = tl.exp2(s - safe[:, None]), tl.exp2(high - safe)
        total, high = total * keep + tl.sum(p, 1), higher
        b_v, b_v_tail = chunk(v_rows, m_n, 0, BD, D, UPCAST), chunk(v_rows, m_n, BD, TAIL, D, UPCAST)
        p = p.to(b_v.dtype)
        acc = tl.dot(p, b_v, acc * keep[:, None], input_precision=PRECISION)
        if TAIL:
            acc_tail = tl.dot(p, b_v_tail, acc_tail * keep[:, None], input_precision=PRECISION)
    return acc, acc_tail, high, total


@triton.jit
def query_gradients(
    acc, acc_tail, q, q_tail, do, do_tail, lse, delta, k, v, b, row, h, size, bias, factor,
    BN: tl.constexpr, EVEN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Σ dS · k, after `size` more keys, those of one frame; lse in units of log 2."""
    o_n = tl.arange(0, BN)
    for n0 in range(0, size, BN):
        n = n0 + o_n
        m_n = n < (size if not EVEN else n0 + BN)
        k_rows, v_rows = rows(k, b, row, n.to(tl.int64), h, ALIGN), rows(v, b, row, n.to(tl.int64), h, ALIGN)
        b_k, b_k_tail = chunk(k_rows, m_n, 0, BD, D, UPCAST), chunk(k_rows, m_n, BD, TAIL, D, UPCAST)
        b_v, b_v_tail = chunk(v_rows, m_n, 0, BD, D, UPCAST), chunk(v_rows, m_n, BD, TAIL, D, UPCAST)
        p = tl.exp2(inner(q, q_tail, b_k, b_k_tail, TAIL, PRECISION) * factor + (bias - lse)[:, None])
        ds = p * (inner(do, do_tail, b_v, b_v_tail, TAIL, PRECISION) - delta[:, None])
        if not EVEN:
            ds = tl.where(m_n[None, :], ds, 0.0)
        ds = ds.to(b_k.dtype)
        acc = tl.dot(ds, b_k, acc, input_precision=PRECISION)
        if TAIL:
            acc_tail = tl.dot(ds, b_k_tail, acc_tail, input_precision=PRECISION)
    return acc, acc_tail


@triton.jit
def key_gradients(
    g_k, g_k_tail, g_v, g_v_tail, k, k_tail, v, v_tail, q, do, lse, delta, b, row, h, size, bias, factor,
    BM: tl.constexpr, EVEN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Σ dS · q and Σ P · dout of a tile of keys, after `size` more queries, those of one frame and head."""
    o_m = tl.arange(0, BM)
    for m0 in range(0, size, BM):
        m = m0 + o_m
        m_m = m < (size if not EVEN else m0 + BM)
        t = m.to(tl.int64)
        q_rows, do_rows = rows(q, b, row, t, h, ALIGN), rows(do, b, row, t, h, ALIGN)
        b_q, b_q_tail = chunk(q_rows, m_m, 0, BD, D, UPCAST), chunk(q_rows, m_m, BD, TAIL, D, UPCAST)
        b_do, b_do_tail = chunk(do_rows, m_m, 0, BD, D, UPCAST), chunk(do_rows, m_m, BD, TAIL, D, UPCAST)
        b_lse = logs(lse, b, row, t, h, m_m)
        b_delta = tl.load(rows(delta, b, row, t, h, 1), mask=m_m, other=0.0)
        p = tl.exp2(inner(k, k_tail, b_q, b_q_tail, TAIL, PRECISION) * factor + (bias - b_lse)[None, :])
        ds = (p * (inner(v, v_tail, b_do, b_do_tail, TAIL, PRECISION) - b_delta[None, :])).to(b_q.dtype)
        p = p.to(b_q.dtype)
        g_v = tl.dot(p, b_do, g_v, input_precision=PRECISION)
        g_k = tl.dot(ds, b_q, g_k, input_precision=PRECISION)
        if TAIL:
            g_v_tail = tl.dot(p, b_do_tail, g_v_tail, input_precision=PRECISION)
            g_k_tail = tl.dot(ds, b_q_tail, g_k_tail, input_precision=PRECISION)
    return g_k, g_k_tail, g_v, g_v_tail


@triton.jit
def logs(lse, b, row, t, h, mask):
    """lse in units of log 2; +∞, which makes a probability 0, where there is no query or it has no key."""
    x = tl.load(rows(lse, b, row, t, h, 1), mask=mask, other=float("inf"))
    return tl.where(x == -float("inf"), float("inf"), x * LOG2E)


@triton.jit
def zeros(ROWS: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr):
    """A float32 tile in two chunks, the second of which may not be meant."""
    return tl.zeros((ROWS, BD), tl.float32), tl.zeros((ROWS, TAIL if TAIL else 1), tl.float32)


@triton.jit
def store_tile(at, mask, x, x_tail, factor, D: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr):
    store(at, mask, x * factor, 0, D)
    if TAIL:
        store(at, mask, x_tail * factor, BD, D)


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["heads", "tiles", "tokens", "keys", "extras"])
def forward_kernel(
    q, k, v, extra_k, extra_v, out, lse, frames, heads, tiles, tokens, keys, extras, scale,
    BM: tl.constexpr, BN: tl.constexpr, BX: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    b, f, h, tile = problem_of(frames.twice_frames // 2, heads, tiles)
    first, length = clip_of(frames, b)
    if f < length:
        row, key_head = (first + f).to(tl.int64), h // GROUP
        t = tile.to(tl.int64) * BM + tl.arange(0, BM)
        m_t, valid = t < tokens, is_valid(frames, b, f, True)
        q_rows, m_v = rows(q, b, row, t, h, ALIGN), up_to(t, tokens, valid)
        b_q, b_q_tail = chunk(q_rows, m_v, 0, BD, D, UPCAST), chunk(q_rows, m_v, BD, TAIL, D, UPCAST)
        acc, acc_tail = zeros(BM, BD, TAIL)
        high, total = tl.full((BM,), -float("inf"), tl.float32), tl.zeros((BM,), tl.float32)
        factor = scale * LOG2E
        for g in range(0, length):
            c, bias = weight(frames, b, f, g)
            if c > 0:
                acc, acc_tail, high, total = meet(
                    acc, acc_tail, high, total, b_q, b_q_tail, k, v, b, (first + g).to(tl.int64), key_head, keys,
                    bias, factor, BN, EVEN, D, BD, TAIL, ALIGN, PRECISION, UPCAST,
                )  # fmt: skip
        if extra_k.data is not None:  # noqa: SIM102 (known to the compiler, the other is not)
            if valid:
                acc, acc_tail, high, total = meet(
                    acc, acc_tail, high, total, b_q, b_q_tail, extra_k, extra_v, b, row, key_head, extras,
                    0.0, factor, BX, False, D, BD, TAIL, ALIGN, PRECISION, UPCAST,
                )  # fmt: skip
        seen = total != 0
        share = tl.where(seen, 1 / tl.where(seen, total, 1.0), 0.0)
        store_tile(rows(out, b, row, t, h, ALIGN), m_t, acc, acc_tail, share[:, None], D, BD, TAIL)
        if lse.data is not None:
            value = tl.where(seen, (high + tl.log2(tl.where(seen, total, 1.0))) * LN2, -float("inf"))
            tl.store(rows(lse, b, row, t, h, 1), value, mask=m_t)


@triton.jit(do_not_specialize=["heads", "tiles", "tokens"])
def delta_kernel(
    out, dout, dlse, delta, frames, heads, tiles, tokens,
    BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """0 where a frame is padded: whatever is written there, it counts for nothing."""
    b, f, h, tile = problem_of(frames.twice_frames // 2, heads, tiles)
    first, length = clip_of(frames, b)
    t = tile.to(tl.int64) * BM + tl.arange(0, BM)
    row, m_t = (first + f).to(tl.int64), up_to(t, tokens, f < length)
    valid = up_to(t, tokens, is_valid(frames, b, f, f < length))
    o_rows, do_rows = rows(out, b, row, t, h, ALIGN), rows(dout, b, row, t, h, ALIGN)
    x, y = chunk(o_rows, valid, 0, BD, D, True), chunk(do_rows, valid, 0, BD, D, True)
    total = tl.sum(x * y, 1)
    if TAIL:
        total += tl.sum(chunk(o_rows, valid, BD, TAIL, D, True) * chunk(do_rows, valid, BD, TAIL, D, True), 1)
    if dlse.data is not None:
        total -= tl.load(rows(dlse, b, row, t, h, 1), mask=valid, other=0.0).to(tl.float32)
    tl.store(rows(delta, b, row, t, h, 1), total, mask=m_t)


@triton.jit(do_not_specialize=["heads", "tiles", "tokens", "keys", "extras"])
def queries_kernel(
    q, k, v, extra_k, extra_v, dout, lse, delta, dq, frames, heads, tiles, tokens, keys, extras, scale,
    BM: tl.constexpr, BN: tl.constexpr, BX: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    b, f, h, tile = problem_of(frames.twice_frames // 2, heads, tiles)
    first, length = clip_of(frames, b)
    if f < length:
        row, key_head = (first + f).to(tl.int64), h // GROUP
        t = tile.to(tl.int64) * BM + tl.arange(0, BM)
        m_t, valid = t < tokens, is_valid(frames, b, f, True)
        m_v = up_to(t, tokens, valid)
        q_rows, do_rows = rows(q, b, row, t, h, ALIGN), rows(dout, b, row, t, h, ALIGN)
        b_q, b_q_tail = chunk(q_rows, m_v, 0, BD, D, UPCAST), chunk(q_rows, m_v, BD, TAIL, D, UPCAST)
        b_do, b_do_tail = chunk(do_rows, m_v, 0, BD, D, UPCAST), chunk(do_rows, m_v, BD, TAIL, D, UPCAST)
        b_lse, b_delta = logs(lse, b, row, t, h, m_v), tl.load(rows(delta, b, row, t, h, 1), mask=m_v, other=0.0)
        acc, acc_tail = zeros(BM, BD, TAIL)
        factor = scale * LOG2E
        for g in range(0, length):
            c, bias = weight(frames, b, f, g)
            if c > 0:
                acc, acc_tail = query_gradients(
                    acc, acc_tail, b_q, b_q_tail, b_do, b_do_tail, b_lse, b_delta, k, v, b, (first + g).to(tl.int64),
                    key_head, keys, bias, factor, BN, EVEN, D, BD, TAIL, ALIGN, PRECISION, UPCAST,
                )  # fmt: skip
        if extra_k.data is not None:  # noqa: SIM102 (known to the compiler, the other is not)
            if valid:
                acc, acc_tail = query_gradients(
                    acc, acc_tail, b_q, b_q_tail, b_do, b_do_tail, b_lse, b_delta, extra_k, extra_v, b, row,
                    key_head, extras, 0.0, factor, BX, False, D, BD, TAIL, ALIGN, PRECISION, UPCAST,
                )  # fmt: skip
        store_tile(rows(dq, b, row, t, h, ALIGN), m_t, acc, acc_tail, scale, D, BD, TAIL)


@triton.jit
def attended(frames, b, g, there):
    """|R(g)|, of frames g."""
    n = tl.zeros(g.shape, tl.int32)
    for f in range(0, frames.twice_frames // 2):
        n += (counts(frames, b, f, g, there) > 0).to(tl.int32)
    return n


@triton.jit
def plan_kernel(frames, ends, part_ends, chunk_of, BF: tl.constexpr):
    """Of each clip: frames of a share; and of each frame, the shares, and the parts, that it and those before have."""
    b, f = tl.program_id(0).to(tl.int64), tl.arange(0, BF)
    frame_count = frames.twice_frames // 2
    there = f < frame_count
    n = attended(frames, b, f, there)
    size = tl.maximum(tl.cdiv(2 * tl.sum(n, 0), frame_count), 1)
    shares = tl.cdiv(n, size)
    tl.store(ends + b * frame_count + f, tl.cumsum(shares, 0), mask=there)
    tl.store(part_ends + b * frame_count + f, tl.cumsum(tl.where(shares > 1, shares, 0), 0), mask=there)
    tl.store(chunk_of + b, size)


@triton.jit
def last_before(ends, b, g, frame_count):
    """What frames before g have of what `plan_kernel` counted."""
    return tl.load(ends + b * frame_count + g - 1, mask=g > 0, other=0)


@triton.jit(do_not_specialize=["heads", "tiles", "tokens", "keys", "shares", "plan_b"])
def keys_kernel(
    q, k, v, dout, lse, delta, dk, dv, k_parts, v_parts, ends, part_ends, chunk_of, frames,
    heads, tiles, tokens, keys, shares, plan_b, scale,
    BF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`heads` are those of the keys. A share is of the frame g that the plan gives it."""
    b, share, key_head, tile = problem_of(shares, heads, tiles)
    first, length = clip_of(frames, b)
    plan, frame_count, o_f = b * plan_b, frames.twice_frames // 2, tl.arange(0, BF)
    until = tl.load(ends + plan * frame_count + o_f, mask=o_f < frame_count, other=2147483647)
    g = tl.sum((until <= share).to(tl.int32), 0)
    if g < length:
        mine = share - last_before(ends, plan, g, frame_count)
        size = tl.load(chunk_of + plan)
        row = (first + g).to(tl.int64)
        n = tile.to(tl.int64) * BN + tl.arange(0, BN)
        m_n = n < keys
        k_rows, v_rows = rows(k, b, row, n, key_head, ALIGN), rows(v, b, row, n, key_head, ALIGN)
        b_k, b_k_tail = chunk(k_rows, m_n, 0, BD, D, UPCAST), chunk(k_rows, m_n, BD, TAIL, D, UPCAST)
        b_v, b_v_tail = chunk(v_rows, m_n, 0, BD, D, UPCAST), chunk(v_rows, m_n, BD, TAIL, D, UPCAST)
        g_k, g_k_tail = zeros(BN, BD, TAIL)
        g_v, g_v_tail = zeros(BN, BD, TAIL)
        met = 0  # frames of R(g), those of other shares too
        for f in range(0, length):
            c, bias = weight(frames, b, f, g)
            if c > 0:
                if met // size == mine:
                    for member in range(GROUP):
                        g_k, g_k_tail, g_v, g_v_tail = key_gradients(
                            g_k, g_k_tail, g_v, g_v_tail, b_k, b_k_tail, b_v, b_v_tail, q, dout, lse, delta, b,
                            (first + f).to(tl.int64), key_head * GROUP + member, tokens, bias, scale * LOG2E,
                            BM, EVEN, D, BD, TAIL, ALIGN, PRECISION, UPCAST,
                        )  # fmt: skip
                met += 1
        if tl.load(ends + plan * frame_count + g) - last_before(ends, plan, g, frame_count) == 1:
            store_tile(rows(dk, b, row, n, key_head, ALIGN), m_n, g_k, g_k_tail, scale, D, BD, TAIL)
            store_tile(rows(dv, b, row, n, key_head, ALIGN), m_n, g_v, g_v_tail, 1.0, D, BD, TAIL)
        else:
            part = (last_before(part_ends, plan, g, frame_count) + mine).to(tl.int64)
            store_tile(rows(k_parts, b, part, n, key_head, ALIGN), m_n, g_k, g_k_tail, scale, D, BD, TAIL)
            store_tile(rows(v_parts, b, part, n, key_head, ALIGN), m_n, g_v, g_v_tail, 1.0, D, BD, TAIL)


@triton.jit
def combined(
    out, parts, b, row, n, h, part, count, m_n,
    D: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    acc, acc_tail = zeros(n.shape[0], BD, TAIL)
    for i in range(0, count):
        at = rows(parts, b, (part + i).to(tl.int64), n, h, ALIGN)
        acc += chunk(at, m_n, 0, BD, D, False)
        if TAIL:
            acc_tail += chunk(at, m_n, BD, TAIL, D, False)
    store_tile(rows(out, b, row, n, h, ALIGN), m_n, acc, acc_tail, 1.0, D, BD, TAIL)


@triton.jit(do_not_specialize=["heads", "tiles", "keys", "plan_b"])
def combine_kernel(
    dk, dv, k_parts, v_parts, ends, part_ends, frames, heads, tiles, keys, plan_b,
    BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """dk and dv of frames with no share, which are 0, or with several."""
    frame_count = frames.twice_frames // 2
    b, g, h, tile = problem_of(frame_count, heads, tiles)
    first, length = clip_of(frames, b)
    plan = b * plan_b
    shares = tl.load(ends + plan * frame_count + g) - last_before(ends, plan, g, frame_count)
    if (g < length) & (shares != 1):
        n = tile.to(tl.int64) * BN + tl.arange(0, BN)
        row, part = (first + g).to(tl.int64), last_before(part_ends, plan, g, frame_count)
        combined(dk, k_parts, b, row, n, h, part, shares, n < keys, D, BD, TAIL, ALIGN)
        combined(dv, v_parts, b, row, n, h, part, shares, n < keys, D, BD, TAIL, ALIGN)


@triton.jit(do_not_specialize=["heads", "tiles", "tokens", "extras"])
def extra_kernel(
    q, extra_k, extra_v, dout, lse, delta, dk, dv, frames, heads, tiles, tokens, extras, scale,
    BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    TAIL: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Gradients of a frame's extra keys. SHARED: dk and dv are parts [clips, F, E, Hk, D], 0 where no frame is."""
    b, f, key_head, tile = problem_of(frames.twice_frames // 2, heads, tiles)
    first, length = clip_of(frames, b)
    row = (first + f).to(tl.int64)
    valid = is_valid(frames, b, f, f < length)
    n = tile.to(tl.int64) * BN + tl.arange(0, BN)
    m_n = n < extras
    g_k, g_k_tail = zeros(BN, BD, TAIL)
    g_v, g_v_tail = zeros(BN, BD, TAIL)
    if valid:
        k_rows, v_rows = rows(extra_k, b, row, n, key_head, ALIGN), rows(extra_v, b, row, n, key_head, ALIGN)
        b_k, b_k_tail = chunk(k_rows, m_n, 0, BD, D, UPCAST), chunk(k_rows, m_n, BD, TAIL, D, UPCAST)
        b_v, b_v_tail = chunk(v_rows, m_n, 0, BD, D, UPCAST), chunk(v_rows, m_n, BD, TAIL, D, UPCAST)
        for member in range(GROUP):
            g_k, g_k_tail, g_v, g_v_tail = key_gradients(
                g_k, g_k_tail, g_v, g_v_tail, b_k, b_k_tail, b_v, b_v_tail, q, dout, lse, delta, b, row,
                key_head * GROUP + member, tokens, 0.0, scale * LOG2E, BM, EVEN, D, BD, TAIL, ALIGN, PRECISION, UPCAST,
            )  # fmt: skip
    place = f.to(tl.int64) if SHARED else row
    there = m_n if SHARED else up_to(n, extras, f < length)
    store_tile(rows(dk, b, place, n, key_head, ALIGN), there, g_k, g_k_tail, scale, D, BD, TAIL)
    store_tile(rows(dv, b, place, n, key_head, ALIGN), there, g_v, g_v_tail, 1.0, D, BD, TAIL)


# ------------------------------------------------------------------------------------------------------------- launches


class Tile(NamedTuple):
    """Queries by keys."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None  # a thread may use: the assembler likes 80, say, and spills to get there


class Tiles(NamedTuple):
    forward: Tile
    queries: Tile
    keys: Tile


# Up to this width, that of both chunks. What spills nothing, the largest of that: `make gate` shows registers.
HALF = {
    "sm_80": {
        64: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(64, 32, 4, 1)),
        96: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 1)),
        128: Tiles(Tile(128, 32, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 1)),
        256: Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
    },
    "sm_90": {
        48: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 1)),
        64: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 64, 8, 1)),
        96: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
        128: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 1)),
        160: Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 8, 1), Tile(16, 32, 8, 1)),
        256: Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
    },
    "sm_100": {
        48: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 8, 1), Tile(64, 64, 8, 1)),
        64: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 1, registers=255)),
        96: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 1)),
        128: Tiles(Tile(128, 32, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 1)),
        160: Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 8, 1), Tile(16, 64, 8, 1)),
        256: Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
    },
}
FLOAT32 = {
    64: Tiles(Tile(64, 32, 8, 1), Tile(16, 32, 4, 1), Tile(16, 16, 4, 1)),
    128: Tiles(Tile(16, 32, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
    256: Tiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}
# Widths up to which two chunks spill less than one. sm_90's dk and dv of 160 spill 8 bytes in two, in Triton 3.6.
TWO_CHUNKS = {"sm_80": 96, "sm_90": 160, "sm_100": 160}
KEYS_TWO_CHUNKS = {"sm_80": 96, "sm_90": 96, "sm_100": 160}
ROWS = 64  # of a tile that is only read and added up
FEW_EXTRAS = 16


def tiles_of(clips: Any, arch: str, two_chunks: dict[str, int]) -> Tiles:
    width = sum(chunks(clips.q.shape[4], two_chunks[arch]))
    table = FLOAT32 if clips.q.dtype == torch.float32 else HALF[arch]
    return next(tiles for limit, tiles in table.items() if width <= limit or limit == max(table))


def here(clips: Any) -> str:
    return architecture(gpu_of(clips.q.device)[1])


def options_of(tile: Tile) -> dict[str, int]:
    chosen = {"num_warps": tile.warps, "num_stages": tile.stages}
    return chosen if tile.registers is None else {**chosen, "maxnreg": tile.registers}


def sizes_of(clips: Any) -> tuple[int, int, int]:
    """T, S and E."""
    return clips.q.shape[2], clips.k.shape[2], 0 if clips.extra_k is None else clips.extra_k.shape[2]


def queries_launch(kernel: Any, clips: Any, views: list[View], others: tuple, tile: Tile, arch: str) -> Launch:
    """Of a kernel whose programs own tiles of queries; all but `others` decide about alignment."""
    t, s, e = sizes_of(clips)
    heads = clips.q.shape[3]
    bx = FEW_EXTRAS if e <= FEW_EXTRAS else tile.keys
    chosen = {"BM": tile.queries, "BN": tile.keys, "BX": bx, "EVEN": s % tile.keys == 0}
    chosen |= constants(clips, views, TWO_CHUNKS[arch])
    tiles = triton.cdiv(t, tile.queries)
    arguments = *others, frames_of(clips), heads, tiles, t, s, e, clips.scale
    return Launch(kernel, (clips.clips * clips.frames * heads * tiles,), arguments, chosen, options_of(tile))


def forward_launch(clips: Any, out: Tensor, lse: Tensor | None, arch: str) -> Launch:
    views = [*map(view, clips[:5]), view(out)]
    return queries_launch(
        forward_kernel, clips, views, (*views, view_of_lse(lse)), tiles_of(clips, arch, TWO_CHUNKS).forward, arch
    )


def dq_launch(clips: Any, dout: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, arch: str) -> Launch:
    views = [*map(view, clips[:5]), view(dout), view(dq)]
    given = *views[:6], view_of_lse(lse), view_of_lse(delta), views[6]
    return queries_launch(queries_kernel, clips, views, given, tiles_of(clips, arch, TWO_CHUNKS).queries, arch)


def delta_launch(clips: Any, out: Tensor, dout: Tensor, dlse: Tensor | None, delta: Tensor) -> Launch:
    views, t, heads = [view(out), view(dout)], *clips.q.shape[2:4]
    all_constants = constants(clips, views)
    chosen = {"BM": ROWS, **{name: all_constants[name] for name in ("D", "BD", "TAIL", "ALIGN")}}
    tiles = triton.cdiv(t, ROWS)
    arguments = *views, view_of_lse(dlse), view_of_lse(delta), frames_of(clips), heads, tiles, t
    return Launch(delta_kernel, (clips.clips * clips.frames * heads * tiles,), arguments, chosen, {"num_warps": 4})


class Plan(NamedTuple):
    """Which frames a share of the keys' gradients has."""

    ends: Tensor  # [plans, F] int32
    part_ends: Tensor  # [plans, F] int32
    chunk_of: Tensor  # [plans] int32


def plan_launch(clips: Any) -> tuple[Launch, Plan]:
    plans, frames = clips.count.shape[0] if clips.count.ndim == 3 else 1, clips.frames
    shapes = (plans, frames), (plans, frames), (plans,)
    plan = Plan(*(torch.empty(shape, dtype=torch.int32, device=clips.q.device) for shape in shapes))
    chosen = {"BF": triton.next_power_of_2(max(frames, 1))}
    return Launch(plan_kernel, (plans if frames else 0,), (frames_of(clips), *plan), chosen, {"num_warps": 1}), plan


def keys_launches(
    clips: Any, dout: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, plan: Plan, arch: str
) -> tuple[Launch, Launch]:
    """`keys` and `combine`, with parts [clips, F, S, Hk, D] between them."""
    tile, frames, (t, s, _) = tiles_of(clips, arch, KEYS_TWO_CHUNKS).keys, clips.frames, sizes_of(clips)
    heads, width = clips.k.shape[3:]
    parts = torch.empty(2, clips.clips, frames, s, heads, width, dtype=torch.float32, device=clips.q.device)
    views = [*map(view, clips[:3]), view(dout), view(dk), view(dv)]
    chosen = {
        "BF": triton.next_power_of_2(max(frames, 1)), "BM": tile.queries, "BN": tile.keys,
        "EVEN": t % tile.queries == 0, **constants(clips, views, KEYS_TWO_CHUNKS[arch]),
    }  # fmt: skip
    tiles, shares, plan_b = triton.cdiv(s, tile.keys), frames + frames // 2, int(clips.count.ndim == 3)
    owned, given = (*views[4:], *map(view, parts)), frames_of(clips)
    arguments = (
        *views[:4], view_of_lse(lse), view_of_lse(delta), *owned, *plan, given,
        heads, tiles, t, s, shares, plan_b, clips.scale,
    )  # fmt: skip
    keys = Launch(keys_kernel, (clips.clips * shares * heads * tiles,), arguments, chosen, options_of(tile))
    chosen = {"BN": ROWS, **{name: chosen[name] for name in ("D", "BD", "TAIL", "ALIGN")}}
    tiles = triton.cdiv(s, ROWS)
    arguments = *owned, plan.ends, plan.part_ends, given, heads, tiles, s, plan_b
    combine = Launch(combine_kernel, (clips.clips * frames * heads * tiles,), arguments, chosen, {"num_warps": 4})
    return keys, combine


def extra_launch(clips: Any, dout: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, arch: str) -> Launch:
    """dk, dv: as the extra keys, or parts [clips, F, E, Hk, D] of shared ones."""
    tile, (t, _, e), heads = tiles_of(clips, arch, KEYS_TWO_CHUNKS).keys, sizes_of(clips), clips.k.shape[3]
    views = [view(x) for x in (clips.q, clips.extra_k, clips.extra_v, dout)]
    block = FEW_EXTRAS if e <= FEW_EXTRAS else tile.keys
    chosen = {
        "BM": tile.queries, "BN": block, "EVEN": t % tile.queries == 0, "SHARED": clips.shared,
        **constants(clips, views, KEYS_TWO_CHUNKS[arch]),
    }  # fmt: skip
    tiles = triton.cdiv(e, block)
    arguments = (
        *views, view_of_lse(lse), view_of_lse(delta), view(dk), view(dv), frames_of(clips), heads, tiles, t, e,
        clips.scale,
    )  # fmt: skip
    return Launch(extra_kernel, (clips.clips * clips.frames * heads * tiles,), arguments, chosen, options_of(tile))


def forward(clips: Any, need_lse: bool) -> tuple[Tensor, Tensor]:
    """out, and lse [B, F, H, T], empty without need of it. `clips` is `ops._frames.Clips`."""
    b, f, t, h, _ = clips.q.shape
    out = torch.empty_like(clips.q)
    lse = clips.q.new_empty((b, f, h, t) if need_lse else (0,), dtype=torch.float32)
    forward_launch(clips, out, lse, here(clips)).run()
    return out, lse


def backward(clips: Any, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and the extra keys and values."""
    arch = here(clips)
    dq, dk, dv = (torch.empty_like(x) for x in clips[:3])
    delta = torch.empty_like(lse)
    delta_launch(clips, out, dout, dlse, delta).run()
    dq_launch(clips, dout, lse, delta, dq, arch).run()
    launch, plan = plan_launch(clips)
    launch.run()
    for launch in keys_launches(clips, dout, lse, delta, dk, dv, plan, arch):
        launch.run()
    if clips.extra_k is None:
        return dq, dk, dv, None, None
    extra = [torch.empty_like(x) for x in clips[3:5]]
    if not clips.shared:
        extra_launch(clips, dout, lse, delta, *extra, arch).run()
        return dq, dk, dv, *extra
    shape = clips.clips, clips.frames, *clips.extra_k.shape[2:]
    parts = [torch.empty(shape, dtype=torch.float32, device=clips.q.device) for _ in extra]
    extra_launch(clips, dout, lse, delta, *parts, arch).run()
    return dq, dk, dv, *(x.copy_(part.sum(1, keepdim=True)) for x, part in zip(extra, parts, strict=True))


def compile_cases(capability: tuple[int, int]) -> Iterator[Case]:
    """Widths of Stable Diffusion, VGGT and Self-Forcing, tiles that end early, extra keys of grouped heads, float32."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    shapes = (
        ("40", example(2, 8, 4096, 8, 40, bf16)),
        ("80", example(2, 8, 1024, 8, 80, fp16)),
        ("160", example(2, 8, 256, 8, 160, bf16)),
        ("64 extra", example(8, 8, 197, 12, 64, bf16, extra=1, padded=True, group=2)),
        ("128 float32", example(1, 21, 1560, 12, 128, fp32)),
    )
    arch = architecture(capability)
    for name, clips in shapes:
        b, f, t, h, _ = clips.q.shape
        lse, half = meta(b, f, h, t), clips.q.dtype != fp32
        yield Case(f"forward {name}", forward_launch(clips, clips.q, lse, arch), half, half)
        yield Case(f"dq {name}", dq_launch(clips, clips.q, lse, lse, clips.q, arch), half, half)
        plan = plan_launch(clips)[1]
        keys, combine = keys_launches(clips, clips.q, lse, lse, clips.k, clips.v, plan, arch)
        yield Case(f"dk dv {name}", keys, half and tiles_of(clips, arch, KEYS_TWO_CHUNKS).keys.keys >= 64, half)
        if clips.extra_k is not None:
            parts = meta(b, f, *clips.extra_k.shape[2:])
            yield Case(f"extra dk dv {name}", extra_launch(clips, clips.q, lse, lse, parts, parts, arch), False, half)
            yield Case(f"delta {name}", delta_launch(clips, clips.q, clips.q, lse, lse), False)
            yield Case(f"plan {name}", plan_launch(clips)[0], False)
            yield Case(f"combine {name}", combine, False)
