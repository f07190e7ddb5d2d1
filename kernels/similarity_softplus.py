"""Tiles of similarity_softplus: row sums of the sigmoid loss, and the weights of its gradient, in one pass.

loss   max(L, 0) − y·L + log(1 + exp(−|L|))          y = `high` for a positive pair, `low` for another, or dense
G_ij = factor · g_i · (σ(L_ij) − y_ij)               without cancellation: (1 − y) − σ(−L) where y > ½
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    ANY,
    EXTRAS,
    MEDIUM,
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
    guide_mask,
    guided_part,
    kinds,
    logits,
    meta,
    meta_problem,
    options,
    own_column,
    part,
    products,
    random_problem,
    store_tile,
    sum_launch,
    tile_constants,
    tile_of,
    unit_constants,
)

OP = "similarity_softplus"


class Pairs(NamedTuple):
    """Which pairs are positive: what a dense target says, else those of equal labels, else each row's own column."""

    dense: Tensor | None  # [M, N]
    query_labels: Tensor | None  # [M] int64
    key_labels: Tensor | None  # [N] int64


class Out(NamedTuple):
    """Where weights go: G of a chunk, and of each tile Σ_j G_ij and Σ_j G_ij ⟨q_i, k_j⟩, of G unrounded."""

    target: Tensor | None = None  # [rows, N]
    totals: Tensor | None = None  # [column tiles, rows] fp32
    dots: Tensor | None = None  # [column tiles, rows] fp32


@triton.jit
def _targets(problem, pairs, y_stride_i, y_stride_j, high, low, i, j, m_i, m_j, n):
    if pairs.dense is not None:
        at = pairs.dense + i.to(tl.int64)[:, None] * y_stride_i + j.to(tl.int64)[None, :] * y_stride_j
        y = tl.load(at, mask=m_i[:, None] & m_j[None, :], other=0.0).to(tl.float32)
    else:
        if pairs.query_labels is not None:
            query_labels = tl.load(pairs.query_labels + i, mask=m_i, other=0)
            key_labels = tl.load(pairs.key_labels + j, mask=m_j, other=0)
            positive = query_labels[:, None] == key_labels[None, :]
        elif problem.positives is not None:
            positive = own_column(problem.positives, i, m_i, n)[:, None] == j[None, :]
        else:
            positive = tl.zeros((i.shape[0], j.shape[0]), tl.int1)
        y = tl.where(positive, high, low)
    return y


@triton.jit
def _log1p(e, inverse):
    """log(1 + e) for 0 ≤ e ≤ 1 to full relative precision, as 2·artanh(e / (2 + e)); inverse = 1 / ((1 + e)(2 + e)).

    log of the rounded 1 + e would lose the losses of all pairs with L ≪ 0, which are about e each.
    """
    s = e * (1.0 + e) * inverse
    t = s * s
    series = 1.0 / 13.0
    for k in tl.static_range(6):
        series = series * t + 1.0 / (11.0 - 2.0 * k)
    return 2.0 * s * series


@triton.jit(do_not_specialize=["start", "stop", "n"])
def softplus_kernel(
    problem, queries_tma, keys_tma, bias, pairs, gradient, extents, rows, out, start, stop, n, target_stride,
    y_stride_i, y_stride_j, high, low,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, ALIGNED: tl.constexpr, UNIT: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Rows [start, stop): row sums of each tile [column tiles, stop − start]; with a gradient also what `Out` says."""
    i_m, i_n = tile_of(tl.program_id(0), tl.cdiv(stop - start, BM), tl.cdiv(n, BN), GROUP)
    i, j = start + i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    m_i, m_j = i < stop, j < n
    guided = guide_mask(problem, i, j, m_i, m_j, BK, PRECISION, UPCAST)
    whole = products(problem, queries_tma, keys_tma, i, j, m_i, m_j, BK, PRECISION, UPCAST, ALIGNED)
    loss_sum, slope_sum, dot_sum = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    if gradient is not None:
        g = factor_of(extents, UNIT, SLOTS) * tl.load(gradient + i, mask=m_i, other=0.0).to(tl.float32)
    for p in tl.static_range(PARTS):
        raw, j = part(whole, p, PARTS), i_n * BN + p * (BN // PARTS) + tl.arange(0, BN // PARTS)
        m_j = j < n
        x = logits(problem, raw, guided_part(problem, guided, p, PARTS), i, j, m_i, m_j, n) + tl.load(bias).to(
            tl.float32
        )
        counts = (x != -float("inf")) & m_j[None, :]
        y = _targets(problem, pairs, y_stride_i, y_stride_j, high, low, i, j, m_i, m_j, n)
        e = tl.exp(-tl.abs(x))
        inverse = 1.0 / ((1.0 + e) * (2.0 + e))
        loss_sum += tl.sum(tl.where(counts, tl.maximum(x, 0.0) - y * x + _log1p(e, inverse), 0.0), 1)
        if gradient is not None:
            smaller = e * (2.0 + e) * inverse  # σ(−|x|)
            slope = g[:, None] * tl.where(x >= 0.0, (1.0 - y) - smaller, smaller - y)
            slope = tl.where(counts, slope, 0.0)
            store_tile(slope, out.target, target_stride, i, j, m_i, m_j, start)
            slope_sum += tl.sum(slope, 1)
            if out.dots is not None:
                dot_sum += tl.sum(slope * raw, 1)
        between_parts(PARTS)
    at = i_n.to(tl.int64) * (stop - start) + (i - start)
    tl.store(rows + at, loss_sum, mask=m_i)
    if gradient is not None:
        tl.store(out.totals + at, slope_sum, mask=m_i)
        if out.dots is not None:
            tl.store(out.dots + at, dot_sum, mask=m_i)


def _table() -> dict[str, Ladder]:
    """What the registers allow, by compiling: not measured on any GPU yet. See similarity_lse."""
    table: dict[str, Ladder] = {}
    for arch, bk in (("sm_80", 32), ("sm_90", 64), ("sm_100", 64)):
        small, square = Config(64, 64, bk, 4, 3, parts=4), Config(128, 128, bk, 8, 3, parts=8)
        for extra in EXTRAS:
            table[f"softplus half{extra} {arch}"] = (
                (SMALL, small), (MEDIUM, square), (ANY, replace(square, tma=arch != "sm_80")),
            )  # fmt: skip
            table[f"softplus tf32{extra} {arch}"] = ((ANY, Config(64, 128, 32, 8, 3, parts=4)),)
            table[f"softplus float32{extra} {arch}"] = ((ANY, Config(64, 64, 16, 8, 2, parts=4, registers=224)),)
        thin = Config(64, 128, bk, 8, 3, parts=4)
        table[f"softplus half guide {arch}"] = ((ANY, thin),)
        if arch == "sm_100":
            table[f"softplus half masked {arch}"] = ((SMALL, small), (ANY, thin))
    return table


TABLE = _table()

PARTS_BYTES = 64 << 20  # of the tiles' row sums at a time


def panel_rows(problem: Problem) -> int:
    """Rows whose parts fit into `PARTS_BYTES`."""
    config = config_for(OP, TABLE, "softplus", problem)
    most = PARTS_BYTES // (4 * triton.cdiv(problem.keys.shape[0], config.BN))
    return max(config.BM, most // config.BM * config.BM)


def softplus_launch(
    config: Config, problem: Problem, bias: Tensor, targets: Any, gradient: Tensor | None, extents: Tensor | None,
    rows: Tensor, out: Out, start: int,
) -> Launch:  # fmt: skip
    """`targets` as `ops._sweep.Targets`."""
    n, count, dense = problem.keys.shape[0], rows.shape[1], targets.dense
    arguments = (
        problem, *descriptors(config, problem), bias, Pairs(dense, targets.query_labels, targets.key_labels), gradient,
        extents, rows, out, start, start + count, n, 0 if out.target is None else out.target.stride(0),
        *((0, 0) if dense is None else dense.stride()), float(targets.high), float(targets.low),
    )  # fmt: skip
    constants = {**tile_constants(config, problem), **unit_constants(extents, out.target)}
    tiles = triton.cdiv(count, config.BM) * triton.cdiv(n, config.BN)
    return Launch(softplus_kernel, (tiles,), arguments, constants, options(config))


def softplus(
    problem: Problem,
    bias: Tensor,  # 0-dim
    targets: Any,
    gradient: Tensor | None,  # [M]
    extents: Tensor | None,
    target: Tensor | None,  # [rows, N], with a gradient
    start: int,
    sums: Tensor,  # [rows] fp32
    *,
    dots: bool = False,
    config: Config | None = None,
) -> Out:
    """Row sums of rows `start`… into `sums`; with a gradient also factor · G into `target`, and sums of it."""
    config = config or config_for(OP, TABLE, "softplus", problem)
    shape = triton.cdiv(problem.keys.shape[0], config.BN), sums.shape[0]

    def per_tile(wanted: bool) -> Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=sums.device) if wanted else None

    rows, out = per_tile(True), Out(target, per_tile(gradient is not None), per_tile(dots))
    softplus_launch(config, problem, bias.detach(), targets, gradient, extents, rows, out, start).run()
    sum_launch(rows, sums).run()
    return out


OWN = SimpleNamespace(dense=None, query_labels=None, key_labels=None, high=1.0, low=0.0)  # as `ops._sweep.Targets`


def tune(
    m: int, n: int, d: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda", write: bool = False
) -> dict[str, list[tuple[float, Config]]]:
    """Times the configurations on an [m, n] problem of width d, with gradient: see `_common.autotune`."""
    problem = random_problem(m, n, d, dtype, torch.device(device))._replace(positives=torch.arange(m, device=device))
    rows = min(m, max(128, (256 << 20) // (4 * n) // 128 * 128))  # a chunk of the usual size
    target = torch.empty(rows, n, device=device, dtype=torch.float32 if dtype == torch.float32 else torch.float16)
    bias, g, sums = (torch.ones(shape, device=device) for shape in ((), (m,), (rows,)))
    launch = partial(softplus, problem, bias, OWN, g, None, target, 0, sums, dots=True)
    return autotune(OP, TABLE, {"softplus": lambda config: partial(launch, config=config)}, problem, write)


def compile_cases(capability: tuple[int, int]) -> Iterator[Case]:
    """Each configuration with what says which pairs are positive; sums alone once."""
    n = 4096
    vector, sums, integers = meta(n), meta(32, n), meta(n, dtype=torch.int64)
    positive = {
        "own": OWN,
        "labels": SimpleNamespace(dense=None, query_labels=integers, key_labels=integers, high=0.9, low=0.1),
        "dense": SimpleNamespace(dense=meta(n, n), query_labels=None, key_labels=None, high=1.0, low=0.0),
    }
    for kind, dtype, constants in kinds():
        target = meta(n, n, dtype=torch.float16 if kind == "half" else torch.float32)
        extents, out = meta(5, 128) if kind == "half" else None, Out(target, sums, sums)
        for extra in EXTRAS if kind == "half" else (" guide",):
            problem = meta_problem(dtype, extra)._replace(key_bias=None)
            for config in distinct(TABLE, f"softplus {kind}{extra}", capability):
                names = ("labels",) if extra else ("labels", "dense") if config.tma else positive
                for name in names:
                    launch = softplus_launch(config, problem, meta(), positive[name], vector, extents, sums, out, 0)
                    launch = launch._replace(constants={**launch.constants, **constants})
                    units = constants.get("PRECISION") != "ieee"
                    yield Case(f"softplus {kind}{extra} {name} {described(config)}", launch, units)
    config = next(distinct(TABLE, "softplus half", capability))
    launch = softplus_launch(config, meta_problem(torch.bfloat16, ""), meta(), OWN, None, None, sums, Out(), 0)
    yield Case(f"softplus half sums {described(config)}", launch, True)
    yield Case("sum", sum_launch(sums, vector), False)
