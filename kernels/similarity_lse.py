"""Tiles of similarity_lse: partial log-sum-exps of rows and columns, their merge, and the weights of the backward.

    lse       each tile writes, for its rows and/or columns, a reference and Σ exp(L − reference): no atomics, no locks
    merge     one program a block of rows (columns) adds those up in a fixed order: lse = high + low
    weights   G_ij = factor · (g_i·exp(L_ij − r_i) + h_j·exp(L_ij − c_j) + p_i·[j is i's own]), into a workspace

Rows and columns in one pass share one exponential an entry: both sums are taken against the tile's maximum, and only a
tile in which some row or column lies so far below it that its sum would lose digits takes them apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    ANY,
    BC,
    BT,
    EXTRAS,
    FLT_MAX,
    MEDIUM,
    NO_INDEX,
    SMALL,
    Case,
    Config,
    Ladder,
    Launch,
    Problem,
    autotune,
    between_parts,
    config_for,
    described,
    descriptors,
    distinct,
    factor_of,
    finite,
    guide_mask,
    guided_part,
    kinds,
    logits,
    meta,
    meta_problem,
    options,
    own_entry,
    own_here,
    part,
    products,
    random_problem,
    store_tile,
    sum_launch,
    tile_constants,
    tile_of,
    unit_constants,
    within,
)

OP = "similarity_lse"

# A sum of exponentials this small has lost entries that mattered: with e⁻⁶⁰ for the largest, what is below the smallest
# normal number (e⁻⁸⁷) is less than 2⁻³⁸ of it.
SMALLEST_SUM = tl.constexpr(8.7e-27)

# The widest range of log-sum-exps in a tile for which one exponential serves rows and columns.
WIDEST = tl.constexpr(60.0)

STRIP = tl.constexpr(32)  # columns; each BN is a multiple of it


class Parts(NamedTuple):
    """Of each tile [tiles, count]: a reference, Σ exp(L − reference), and the first index of the largest.

    Without tensors: this direction is not wanted. (Not None: Triton 3.6 cannot compare a tuple that contains None.)
    """

    reference: Tensor | None = None
    sum: Tensor | None = None
    best: Tensor | None = None  # int32


class Lse(NamedTuple):
    """lse = high + low [count]; the first index of the largest, −1 where nothing is left."""

    high: Tensor | None = None
    low: Tensor | None = None
    best: Tensor | None = None  # int64


class Softmax(NamedTuple):
    """One direction's share of the weights: gradient · exp(L − high − low); no gradient stands for ones.

    Without tensors: this direction has no share.
    """

    gradient: Tensor | None = None
    high: Tensor | None = None
    low: Tensor | None = None


class Slopes(NamedTuple):
    """Of a mix: weights are multiplied by slope_ij − delta_i, or slope_ij. Without tensors: they are not."""

    slope: Tensor | None = None  # [rows of the chunk, N] fp32
    delta: Tensor | None = None  # [M] fp32


class Out(NamedTuple):
    """Where weights go: G of a chunk, and of each tile Σ_i G_ij, Σ_j G_ij ⟨q_i, k_j⟩ and Σ_j G_ij (without the own
    logits' gradient). The sums are of G unrounded."""

    target: Tensor | None  # [rows, N]
    column_sums: Tensor | None = None  # [row tiles, N] fp32
    dots: Tensor | None = None  # [column tiles, rows] fp32
    row_sums: Tensor | None = None  # [column tiles, rows] fp32


# ------------------------------------------------------------------------------------------------------------------ lse


@triton.jit
def _first_largest(tile, largest, index, AXIS: tl.constexpr):
    candidates = tl.where(tile == tl.expand_dims(largest, AXIS), tl.expand_dims(index, 1 - AXIS), NO_INDEX)
    return tl.min(candidates, AXIS)


@triton.jit
def _store_rows(rows, at, mask, tile, j):
    """Each row against its own maximum."""
    largest = tl.max(tile, 1)
    reference = finite(largest)
    tl.store(rows.reference + at, reference, mask=mask)
    tl.store(rows.sum + at, tl.sum(tl.exp(tile - reference[:, None]), 1), mask=mask)
    if rows.best is not None:
        tl.store(rows.best + at, _first_largest(tile, largest, j, 1), mask=mask)


@triton.jit
def _store_columns(columns, at, mask, tile, i):
    """Each column against its own maximum."""
    largest = tl.max(tile, 0)
    reference = finite(largest)
    tl.store(columns.reference + at, reference, mask=mask)
    tl.store(columns.sum + at, tl.sum(tl.exp(tile - reference[None, :]), 0), mask=mask)
    if columns.best is not None:
        tl.store(columns.best + at, _first_largest(tile, largest, i, 0), mask=mask)


@triton.jit
def _store_both(rows, columns, at_rows, at_columns, m_i, m_j, tile):
    """Rows and columns with one exponential an entry, against the tile's maximum; returns the smallest sum."""
    reference = finite(tl.max(tl.max(tile, 1), 0))
    e = tl.exp(tile - reference)
    row_sums, column_sums = tl.sum(e, 1), tl.sum(e, 0)
    tl.store(rows.reference + at_rows, tl.zeros_like(row_sums) + reference, mask=m_i)
    tl.store(rows.sum + at_rows, row_sums, mask=m_i)
    tl.store(columns.reference + at_columns, tl.zeros_like(column_sums) + reference, mask=m_j)
    tl.store(columns.sum + at_columns, column_sums, mask=m_j)
    return tl.minimum(tl.min(tl.where(m_i, row_sums, 1.0), 0), tl.min(tl.where(m_j, column_sums, 1.0), 0))


@triton.jit
def _store_by_strips(
    rows, columns, problem, at_rows, at_columns, i, m_i, i_n, n,
    BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Rows and columns against maxima of their own, a few columns at a time, their products formed again.

    Rare enough; and a tile that had to be kept for it would leave the usual way too few registers.
    """
    reference = tl.zeros((i.shape[0],), tl.float32) - FLT_MAX
    total = tl.zeros((i.shape[0],), tl.float32)
    for j0 in range(i_n * BN, tl.minimum((i_n + 1) * BN, n), STRIP):
        j = j0 + tl.arange(0, STRIP)
        m_j = j < n
        guided = guide_mask(problem, i, j, m_i, m_j, BK, PRECISION, UPCAST)
        tile = products(problem, None, None, i, j, m_i, m_j, BK, PRECISION, UPCAST, ALIGNED)
        tile = within(logits(problem, tile, guided, i, j, m_i, m_j, n), m_i, m_j)
        _store_columns(columns, at_columns + j, m_j, tile, i)
        before = reference
        reference = tl.maximum(before, finite(tl.max(tile, 1)))
        total = total * tl.exp(before - reference) + tl.sum(tl.exp(tile - reference[:, None]), 1)
    tl.store(rows.reference + at_rows, reference, mask=m_i)
    tl.store(rows.sum + at_rows, total, mask=m_i)


@triton.jit(do_not_specialize=["start", "stop", "n"])
def lse_kernel(
    problem, queries_tma, keys_tma, own, rows, columns, start, stop, n,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, ALIGNED: tl.constexpr, BEST: tl.constexpr,
):  # fmt: skip
    """Rows [start, stop). Parts of rows [column tiles, stop − start]; of columns [1 + row tiles, n], the first free."""
    i_m, i_n = tile_of(tl.program_id(0), tl.cdiv(stop - start, BM), tl.cdiv(n, BN), GROUP)
    i, j = start + i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    m_i, m_j = i < stop, j < n
    guided = guide_mask(problem, i, j, m_i, m_j, BK, PRECISION, UPCAST)
    tile = products(problem, queries_tma, keys_tma, i, j, m_i, m_j, BK, PRECISION, UPCAST, ALIGNED)
    tile = within(logits(problem, tile, guided, i, j, m_i, m_j, n), m_i, m_j)
    if own is not None:
        m_own, own_j = own_here(problem, i, j, m_i, n)
        if tl.max(m_own.to(tl.int32), 0) > 0:
            tl.store(own + i, own_entry(tile, own_j, j), mask=m_own)
    at_rows = i_n.to(tl.int64) * (stop - start) + (i - start)
    at_columns = (1 + i_m).to(tl.int64) * n
    if rows.sum is not None and columns.sum is not None and not BEST:
        smallest = _store_both(rows, columns, at_rows, at_columns + j, m_i, m_j, tile)
        if not (smallest >= SMALLEST_SUM):
            tl.debug_barrier()  # over what is stored already
            _store_by_strips(
                rows, columns, problem, at_rows, at_columns, i, m_i, i_n, n, BN, BK, PRECISION, UPCAST, ALIGNED
            )
    else:
        if rows.sum is not None:
            _store_rows(rows, at_rows, m_i, tile, j)
        if columns.sum is not None:
            _store_columns(columns, at_columns + j, m_j, tile, i)


@triton.jit
def _merge(parts, lse, program, first, last, count, FINISH: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    c = program * BC + tl.arange(0, BC)
    m_c = c < count
    reference = tl.zeros((BC,), tl.float32) - FLT_MAX
    for t0 in range(first, last, BT):
        t = t0 + tl.arange(0, BT)
        at, mask = t.to(tl.int64)[:, None] * count + c[None, :], (t < last)[:, None] & m_c[None, :]
        reference = tl.maximum(reference, tl.max(tl.load(parts.reference + at, mask=mask, other=-FLT_MAX), 0))
    total = tl.zeros((BC,), tl.float64)
    best = tl.zeros((BC,), tl.int32) + NO_INDEX
    for t0 in range(first, last, BT):
        t = t0 + tl.arange(0, BT)
        at, mask = t.to(tl.int64)[:, None] * count + c[None, :], (t < last)[:, None] & m_c[None, :]
        theirs = tl.load(parts.reference + at, mask=mask, other=-FLT_MAX)
        share = tl.load(parts.sum + at, mask=mask, other=0.0) * tl.exp(theirs - reference[None, :])
        total += tl.sum(share.to(tl.float64), 0)
        if parts.best is not None:
            candidate = tl.load(parts.best + at, mask=mask, other=NO_INDEX)
            best = tl.minimum(best, tl.min(tl.where(theirs == reference[None, :], candidate, NO_INDEX), 0))
    if FINISH:
        empty = total == 0.0
        exact = reference.to(tl.float64) + tl.log(tl.where(empty, 1.0, total))
        high = tl.where(empty, -float("inf"), exact.to(tl.float32))
        low = (exact - high.to(tl.float64)).to(tl.float32)
        tl.store(lse.high + c, high, mask=m_c)
        tl.store(lse.low + c, tl.where(tl.abs(high) <= FLT_MAX, low, 0.0), mask=m_c)
        if lse.best is not None:
            none = empty | (best == NO_INDEX)
            tl.store(lse.best + c, tl.where(none, -1, best).to(tl.int64), mask=m_c)
    else:
        tl.store(parts.reference + c, reference, mask=m_c)
        tl.store(parts.sum + c, total.to(tl.float32), mask=m_c)
        if parts.best is not None:
            tl.store(parts.best + c, best, mask=m_c)


@triton.jit(do_not_specialize=["row_tiles", "row_count", "first", "column_tiles", "n"])
def merge_kernel(
    rows, rows_lse, columns, columns_lse, row_tiles, row_count, first, column_tiles, n,
    BT: tl.constexpr, BC: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """Rows are finished; columns too with FINISH, else what came so far goes into their first part.

    Parts [0, row_tiles) of each row, [first, column_tiles) of each column.
    """
    program = tl.program_id(0)
    row_programs = 0
    if rows.sum is not None:
        row_programs = tl.cdiv(row_count, BC)
        if program < row_programs:
            _merge(rows, rows_lse, program, 0, row_tiles, row_count, True, BT, BC)
    if columns.sum is not None:  # noqa: SIM102 (decided by the compiler, which must not see what lies inside)
        if program >= row_programs:
            _merge(columns, columns_lse, program - row_programs, first, column_tiles, n, FINISH, BT, BC)


# -------------------------------------------------------------------------------------------------------------- weights


@triton.jit
def _softmax(softmax, index, mask):
    """lse, and gradient · exp(−low). What has nothing left (lse −inf) gets FLT_MAX: its weights are 0.

    L − high is exact near the maximum, and exp(−low) goes into the gradient: at scale 100 the rounding of the
    log-sum-exp itself would otherwise cost two digits.
    """
    high, low = tl.load(softmax.high + index, mask=mask, other=0.0), tl.load(softmax.low + index, mask=mask, other=0.0)
    g = tl.exp(-low)
    if softmax.gradient is not None:
        g *= tl.load(softmax.gradient + index, mask=mask, other=0.0).to(tl.float32)
    return tl.where(high < -FLT_MAX, FLT_MAX, high), tl.where(mask, g, 0.0)


@triton.jit
def _own_weights(problem, rows, columns, own_gradient, factor, raw, m_own, own_j, i):
    """G of rows' own entries, whose products are `raw`, and the gradient of the own logits in it. Apart from the tile,
    since it is a difference: only once the gradient is added may it be rounded."""
    x = raw * tl.load(problem.scale).to(tl.float32)
    if problem.key_bias is not None:
        x += tl.load(problem.key_bias + own_j, mask=m_own, other=0.0).to(tl.float32)
    p = factor * tl.load(own_gradient + i, mask=m_own, other=0.0).to(tl.float32)
    value = p
    if rows.high is not None:
        r, g = _softmax(rows, i, m_own)
        value += factor * g * tl.exp(x - r)
    if columns.high is not None:
        c, h = _softmax(columns, own_j, m_own)
        value += factor * h * tl.exp(x - c)
    return value, p


@triton.jit
def _put_own(value, p, out, own_j, m_own, i_m, i_n, i, n, start, target_stride, BN: tl.constexpr):
    """G of rows' own entries and what it adds to the sums of columns, over what the tile has stored."""
    tl.debug_barrier()
    at = out.target + (i - start).to(tl.int64) * target_stride + own_j
    tl.store(at, value.to(out.target.dtype.element_ty), mask=m_own)
    if out.column_sums is not None:
        for j0 in range(i_n * BN, tl.minimum((i_n + 1) * BN, n), STRIP):
            j = j0 + tl.arange(0, STRIP)
            at_sums = out.column_sums + i_m.to(tl.int64) * n + j
            added = tl.sum(tl.where(own_j[:, None] == j[None, :], p[:, None], 0.0), 0)
            tl.store(at_sums, tl.load(at_sums, mask=j < n, other=0.0) + added, mask=j < n)


@triton.jit(do_not_specialize=["start", "stop", "n"])
def weights_kernel(
    problem, queries_tma, keys_tma, rows, columns, own_gradient, slopes, extents, out, start, stop, n, target_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, ALIGNED: tl.constexpr, UNIT: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """G of rows [start, stop) into the target [stop − start, n], and its sums that are asked for: see `Out`.

    factor = UNIT, divided by the power of two of the largest gradient where `extents` has their sizes.
    """
    i_m, i_n = tile_of(tl.program_id(0), tl.cdiv(stop - start, BM), tl.cdiv(n, BN), GROUP)
    i, j = start + i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    m_i, m_j = i < stop, j < n
    guided = guide_mask(problem, i, j, m_i, m_j, BK, PRECISION, UPCAST)
    whole = products(problem, queries_tma, keys_tma, i, j, m_i, m_j, BK, PRECISION, UPCAST, ALIGNED)
    factor = factor_of(extents, UNIT, SLOTS)
    if own_gradient is not None:
        m_own, own_j = own_here(problem, i, j, m_i, n)
        any_own = tl.max(m_own.to(tl.int32), 0) > 0
        own_raw = tl.zeros((BM,), tl.float32)
        if any_own:
            own_raw = own_entry(whole, own_j, j)
    row_sums, dots = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    if rows.high is not None:
        r, g = _softmax(rows, i, m_i)
        g *= factor
    if rows.high is not None and columns.high is not None:
        # g·exp(L − r) + h·exp(L − c) = exp(L − r) · (g + h·exp(r − c)): one exponential an entry, and exp(r − c) is a
        # row's number times a column's. What underflows in exp(L − r) matters to no column while no r − c exceeds 60.
        top = tl.max(tl.where(m_i & (r != FLT_MAX), r, -FLT_MAX), 0)
        narrow = top - tl.min(_softmax(columns, j, m_j)[0], 0) <= WIDEST
        u = tl.where(m_i & (r != FLT_MAX), tl.exp(r - top), 0.0)
    for p in tl.static_range(PARTS):
        raw, j = part(whole, p, PARTS), i_n * BN + p * (BN // PARTS) + tl.arange(0, BN // PARTS)
        m_j = j < n
        tile = logits(problem, raw, guided_part(problem, guided, p, PARTS), i, j, m_i, m_j, n)
        if columns.high is not None:
            c, h = _softmax(columns, j, m_j)
            h *= factor
        if rows.high is not None and columns.high is not None:
            if narrow:
                v = tl.where(c == FLT_MAX, 0.0, h * tl.exp(top - c))
                tile = tl.exp(tile - r[:, None]) * (g[:, None] + u[:, None] * v[None, :])
            else:
                tile = g[:, None] * tl.exp(tile - r[:, None]) + h[None, :] * tl.exp(tile - c[None, :])
        elif rows.high is not None:
            tile = g[:, None] * tl.exp(tile - r[:, None])
        elif columns.high is not None:
            tile = h[None, :] * tl.exp(tile - c[None, :])
        else:
            tile = tl.zeros_like(tile)
        if slopes.slope is not None:
            at = slopes.slope + (i - start).to(tl.int64)[:, None] * n + j[None, :]
            slope = tl.load(at, mask=m_i[:, None] & m_j[None, :], other=0.0)
            if slopes.delta is not None:
                slope -= tl.load(slopes.delta + i, mask=m_i, other=0.0)[:, None]
            tile *= slope
        if out.target is not None:
            store_tile(tile, out.target, target_stride, i, j, m_i, m_j, start)
        if out.column_sums is not None:
            sums = tl.sum(tl.where(m_i[:, None], tile, 0.0), 0)
            tl.store(out.column_sums + i_m.to(tl.int64) * n + j, sums, mask=m_j)
        if out.row_sums is not None:
            row_sums += tl.sum(tl.where(m_j[None, :], tile, 0.0), 1)
        if out.dots is not None:
            dots += tl.sum(tl.where(m_j[None, :], tile * raw, 0.0), 1)
        between_parts(PARTS)
    if own_gradient is not None:  # noqa: SIM102 (decided by the compiler, which must not see what lies inside)
        if any_own:
            value, p_own = _own_weights(problem, rows, columns, own_gradient, factor, own_raw, m_own, own_j, i)
            dots += p_own * own_raw
            _put_own(value, p_own, out, own_j, m_own, i_m, i_n, i, n, start, target_stride, BN)
    at_rows = i_n.to(tl.int64) * (stop - start) + (i - start)
    if out.row_sums is not None:
        tl.store(out.row_sums + at_rows, row_sums, mask=m_i)
    if out.dots is not None:
        tl.store(out.dots + at_rows, dots, mask=m_i)


# ------------------------------------------------------------------------------------------------------------- launches


def _table() -> dict[str, Ladder]:
    """What the registers allow, by compiling: not measured on any GPU yet.

    A tile of 128 × 256 reads 85 flop a byte from the second-level cache, one of 128 × 128 64, one of 64 × 64 32: the
    larger the better, except that a small matrix has to have a tile for each multiprocessor. With one epilogue in
    flight a thread has 128 products; what else it keeps decides how many more fit.
    """
    table: dict[str, Ladder] = {}
    for arch, bk in (("sm_80", 32), ("sm_90", 64), ("sm_100", 64)):
        tma = arch != "sm_80"
        small, thin = Config(64, 64, bk, 4, 3), Config(64, 128, bk, 8, 3)
        square = Config(128, 128, bk, 8, 3)
        lse: dict[str, Ladder] = {
            "sm_80": ((SMALL, small), (ANY, square)),
            "sm_90": ((SMALL, small), (MEDIUM, square), (ANY, Config(256, 128, bk, 8, 4, tma=True))),
            "sm_100": ((SMALL, small), (MEDIUM, thin), (ANY, replace(square, tma=True))),
        }
        table[f"lse half {arch}"] = lse[arch]
        table[f"lse half masked {arch}"] = ((SMALL, small), (ANY, thin if arch == "sm_100" else square))
        table[f"lse half guide {arch}"] = ((ANY, thin),)

        small, thin, square = replace(small, parts=4), replace(thin, parts=4), replace(square, parts=8)
        wide = Config(128, 256, bk, 8, 3, parts=8, tma=True)
        large = ((ANY, wide if tma else square),)
        table[f"weights half {arch}"] = ((SMALL, small), (MEDIUM, square), *large)
        table[f"weights dots half {arch}"] = ((SMALL, small), (MEDIUM, square), (ANY, replace(square, tma=tma)))
        table[f"weights half masked {arch}"] = ((SMALL, small), (ANY, square if tma else thin))
        table[f"weights half guide {arch}"] = ((ANY, replace(thin, parts=8)),)
        for extra in EXTRAS:
            table[f"slopes half{extra} {arch}"] = ((ANY, thin),)
            table[f"weights dots half{extra} {arch}"] = table.get(
                f"weights dots half{extra} {arch}", table[f"weights half{extra} {arch}"]
            )
            for kernel in ("lse", "weights", "weights dots", "slopes"):
                parts = 1 if kernel == "lse" else 8 if extra == " guide" else 4
                table[f"{kernel} tf32{extra} {arch}"] = ((ANY, Config(64, 128, 32, 8, 3, parts=parts)),)
                exact = Config(64, 64, 16, 8, 2, parts=min(parts, 4), registers=224)
                table[f"{kernel} float32{extra} {arch}"] = ((ANY, exact),)
    return table


TABLE = _table()

PARTS_BYTES = 64 << 20  # of the tiles' partial results at a time; more rows than that go in panels


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def lse_launch(
    config: Config, problem: Problem, own: Tensor | None, rows: Parts, columns: Parts, best: bool, start: int, stop: int
) -> Launch:
    n = problem.keys.shape[0]
    tiles = triton.cdiv(stop - start, config.BM) * triton.cdiv(n, config.BN)
    arguments = (problem, *descriptors(config, problem), own, rows, columns, start, stop, n)
    return Launch(lse_kernel, (tiles,), arguments, {**tile_constants(config, problem), "BEST": best}, options(config))


def merge_launch(rows: Parts, rows_lse: Lse, columns: Parts, columns_lse: Lse, first: int, finish: bool) -> Launch:
    row_tiles, row_count = (0, 0) if rows.sum is None else rows.sum.shape
    column_tiles, n = (0, 0) if columns.sum is None else columns.sum.shape
    programs = triton.cdiv(row_count, BC) + triton.cdiv(n, BC)
    arguments = (rows, rows_lse, columns, columns_lse, row_tiles, row_count, first, column_tiles, n)
    return Launch(merge_kernel, (programs,), arguments, {"BT": BT, "BC": BC, "FINISH": finish}, {"num_warps": 8})


def lse(
    problem: Problem, rows: Lse, columns: Lse, own: Tensor | None, best: bool, config: Config | None = None
) -> None:
    """Fills the log-sum-exps of rows and/or columns of a matrix of at least one entry, and the own logits where a row
    has one."""
    m, n, device = problem.queries.shape[0], problem.keys.shape[0], problem.queries.device
    config = config or config_for(OP, TABLE, "lse", problem)
    row_tiles, both = triton.cdiv(n, config.BN), (rows.high is not None, columns.high is not None)
    a_row = (12 if best else 8) * (both[0] * row_tiles + both[1] * n / config.BM)
    panel = max(config.BM, int(PARTS_BYTES / a_row) // config.BM * config.BM)
    panel = min(m, _round_up(triton.cdiv(m, triton.cdiv(m, panel)), config.BM))

    def parts(wanted: bool, tiles: int, count: int) -> Parts:
        if not wanted:
            return Parts()
        numbers = torch.empty(2, tiles, count, dtype=torch.float32, device=device)
        return Parts(*numbers, torch.empty(tiles, count, dtype=torch.int32, device=device) if best else None)

    # The first part of a column is what the panels before came to.
    column_parts = parts(both[1], 1 + triton.cdiv(panel, config.BM), n)
    for start in range(0, m, panel):
        stop = min(start + panel, m)
        row_parts = parts(both[0], row_tiles, stop - start)
        lse_launch(config, problem, own, row_parts, column_parts, best, start, stop).run()
        filled = _sliced(column_parts, 0, 1 + triton.cdiv(stop - start, config.BM))
        merge_launch(
            row_parts, _sliced(rows, start, stop), filled, columns, first=0 if start else 1, finish=stop == m
        ).run()


def _sliced(tensors: Parts | Lse, start: int, stop: int) -> Parts | Lse:
    return type(tensors)(*(x if x is None or x.shape[0] == stop - start else x[start:stop] for x in tensors))


def weights_launch(
    config: Config, problem: Problem, rows: Softmax, columns: Softmax, own_gradient: Tensor | None, slopes: Slopes,
    extents: Tensor | None, out: Out, start: int, count: int,
) -> Launch:  # fmt: skip
    n = problem.keys.shape[0]
    tiles = triton.cdiv(count, config.BM) * triton.cdiv(n, config.BN)
    arguments = (
        problem, *descriptors(config, problem), rows, columns, own_gradient, slopes, extents, out, start,
        start + count, n, 0 if out.target is None else out.target.stride(0),
    )  # fmt: skip
    constants = {**tile_constants(config, problem), **unit_constants(extents, out.target)}
    return Launch(weights_kernel, (tiles,), arguments, constants, options(config))


def weights(
    problem: Problem,
    rows: Softmax,  # [M]
    columns: Softmax,  # [N]
    own_gradient: Tensor | None,  # [M]
    extents: Tensor | None,
    target: Tensor,  # [rows of the chunk, N]
    start: int,
    *,
    sums: bool = False,
    dots: bool = False,
    slopes: Slopes = Slopes(),  # noqa: B008 (a tuple of None)
    config: Config | None = None,
) -> Out:
    """Fills `target` with factor · G of rows `start`…, and sums of it that are asked for."""
    kernel = "slopes" if slopes.slope is not None else "weights dots" if dots else "weights"
    config = config or config_for(OP, TABLE, kernel, problem)
    row_tiles, column_tiles = (triton.cdiv(*pair) for pair in zip(target.shape, (config.BM, config.BN), strict=True))
    out = Out(
        target,
        torch.empty(row_tiles, target.shape[1], dtype=torch.float32, device=target.device) if sums else None,
        torch.empty(column_tiles, target.shape[0], dtype=torch.float32, device=target.device) if dots else None,
    )
    weights_launch(config, problem, rows, columns, own_gradient, slopes, extents, out, start, target.shape[0]).run()
    return out


def mix_sums(problem: Problem, rows: Softmax, slope: Tensor, start: int, config: Config | None = None) -> Tensor:
    """Σ_j softmax_ij · slope_ij [rows] of rows `start`…, with weights in float32; slope [rows, N]."""
    config = config or config_for(OP, TABLE, "slopes", problem)
    count, n = slope.shape
    parts = torch.empty(triton.cdiv(n, config.BN), count, dtype=torch.float32, device=slope.device)
    out, sums = Out(None, row_sums=parts), torch.empty(count, dtype=torch.float32, device=slope.device)
    weights_launch(config, problem, rows, Softmax(), None, Slopes(slope), None, out, start, count).run()
    sum_launch(parts, sums).run()
    return sums


# --------------------------------------------------------------------------------------------------- tuning, compiling


def tune(
    m: int, n: int, d: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda", write: bool = False
) -> dict[str, list[tuple[float, Config]]]:
    """Times the configurations of rows and columns of an [m, n] problem of width d: see `_common.autotune`."""
    problem = random_problem(m, n, d, dtype, torch.device(device))
    r, c = (Lse(*torch.zeros(2, count, device=device)) for count in (m, n))
    shares = [Softmax(torch.ones_like(one.high), one.high, one.low) for one in (r, c)]
    rows = min(m, max(128, (256 << 20) // (4 * n) // 128 * 128))  # a chunk of the usual size
    target = torch.empty(rows, n, device=device, dtype=torch.float32 if dtype == torch.float32 else torch.float16)
    write_weights = partial(weights, problem, *shares, None, None, target, 0)
    launches = {
        "lse": lambda config: partial(lse, problem, r, c, None, False, config),
        "weights": lambda config: partial(write_weights, config=config),
        "weights dots": lambda config: partial(write_weights, dots=True, config=config),
    }
    return autotune(OP, TABLE, launches, problem, write)


def compile_cases(capability: tuple[int, int]) -> Iterator[Case]:
    """Each configuration with the variants that matter: which directions, own logits, sums."""
    n = 4096
    vector, sums = meta(n), meta(32, n)
    parts = Parts(sums, sums)
    for kind, dtype, constants in kinds():
        for extra in EXTRAS if kind == "half" else (" guide",):
            problem = meta_problem(dtype, extra)
            for config in distinct(TABLE, f"lse {kind}{extra}", capability):
                directions = {"both": (parts, parts)}
                if kind == "half" and not extra and config.tma:  # alone a direction keeps less than with the other
                    directions |= {"rows": (parts, Parts()), "columns": (Parts(), parts)}
                for name, wanted in directions.items():
                    own = None if name == "columns" else vector
                    launch = lse_launch(config, problem, own, *wanted, False, 0, n)
                    yield _case(f"lse {kind}{extra} {name}", config, launch, constants)
            yield from _weights_cases(kind, extra, problem, constants, capability)
    best = Parts(sums, sums, meta(32, n, dtype=torch.int32))
    config = next(distinct(TABLE, "lse half masked", capability))
    launch = lse_launch(config, meta_problem(torch.bfloat16, " masked"), vector, best, best, True, 0, n)
    yield _case("lse half masked both best", config, launch, {})
    # A width that is 8 · odd, whose loads are to be as wide as any.
    launch = lse_launch(config, meta_problem(torch.bfloat16, "", 1000), vector, parts, parts, False, 0, n)
    yield _case("lse half both of width 1000", config, launch, {})
    lse_best = Lse(vector, vector, meta(n, dtype=torch.int64))
    for finish in (False, True):
        yield Case(f"merge {finish}", merge_launch(best, lse_best, best, lse_best, 1, finish), False)


def _weights_cases(kind, extra, problem, constants, capability) -> Iterator[Case]:
    n = 4096
    vector, sums = meta(n), meta(32, n)
    softmax, target = (
        Softmax(vector, vector, vector),
        meta(n, n, dtype=torch.float16 if kind == "half" else torch.float32),
    )
    extents = meta(5, 128) if kind == "half" else None
    plain = kind == "half" and not extra
    for kernel in ("weights", "weights dots", "slopes") if kind == "half" else ("weights dots", "slopes"):
        for config in distinct(TABLE, f"{kernel} {kind}{extra}", capability):
            out = Out(target, None if plain else sums, None if kernel == "weights" else sums)
            directions = {"both": (softmax, softmax), "rows": (softmax, Softmax())}
            slopes = Slopes()
            if kernel == "slopes":
                slopes = Slopes(target if kind != "half" else meta(n, n), vector)
            if kernel == "slopes" or not plain or not config.tma:
                directions.pop("both" if kernel == "slopes" else "rows")
            for name, wanted in directions.items():
                own = None if kernel == "slopes" else vector
                launch = weights_launch(config, problem, *wanted, own, slopes, extents, out, 0, n)
                yield _case(f"{kernel} {kind}{extra} {name}", config, launch, constants)


def _case(name: str, config: Config, launch: Launch, constants: dict[str, str]) -> Case:
    launch = launch._replace(constants={**launch.constants, **constants})
    return Case(f"{name} {described(config)}", launch, constants.get("PRECISION") != "ieee")
