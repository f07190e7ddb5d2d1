"""What the kernels share: the product of a tile, its logits and masks, launches, and how a launch is chosen.

A tile is rows [i0, i0 + BM) by columns [j0, j0 + BN) of L = scale · Q Kᵀ + key_bias, in registers; what is masked, or
beyond the matrix, is −inf. Programs are numbered in groups of rows, so that tiles that run together share operands in
the second-level cache. Every scalar is read from device memory: nothing here makes the host wait.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

FLT_MAX = tl.constexpr(torch.finfo(torch.float32).max)
NO_INDEX = tl.constexpr(2**31 - 1)

# Weights in float16 lie below 6 · this: the largest of |g|, |h|, |p| counts as at most 2, and an entry has all three.
HALF_UNIT = 2.0**13

# ------------------------------------------------------------------------------------------------- arguments of kernels


class Problem(NamedTuple):
    """The logits of a problem, as one argument of a kernel; None switches a term off.

    Triton 3.6 loses a number of a tuple that it has specialized, as it does 1, and cannot compare with None a tuple
    that contains None: so no size or stride here is 1, and what may be absent is always a pointer.
    """

    queries: Tensor  # [M, D]
    keys: Tensor  # [N, D]
    scale: Tensor  # 0-dim
    key_bias: Tensor | None  # [N]
    query_ids: Tensor | None  # [M] int64
    key_ids: Tensor | None  # [N] int64
    positives: Tensor | None  # [M] int64
    guide_queries: Tensor | None  # [M, Dg]
    guide_keys: Tensor | None  # [N, Dg]
    guide_limit: Tensor | None  # [M] fp32
    d: int
    q_stride: int
    k_stride: int
    guide_d: int
    gq_stride: int
    gk_stride: int


def problem_of(queries: Tensor, keys: Tensor, scale: Tensor, key_bias: Tensor | None, masks: Any) -> Problem:
    """`masks` as in `ops._sweep.Masks`; positives matter only to a mask and to whoever asks for the own column."""
    matrices = _matrix(queries), _matrix(keys) if keys is not queries else None
    queries, keys = matrices[0], matrices[0] if matrices[1] is None else matrices[1]
    guides = None, None
    if masks.guide_queries is not None:
        guides = _matrix(masks.guide_queries), _matrix(masks.guide_keys)
    return Problem(
        queries, keys, scale.detach(), None if key_bias is None else key_bias.detach().contiguous(), masks.query_ids,
        masks.key_ids, masks.positives, *guides, masks.guide_limit, queries.shape[1], queries.stride(0), keys.stride(0),
        *((0, 0, 0) if guides[0] is None else (guides[0].shape[1], guides[0].stride(0), guides[1].stride(0))),
    )  # fmt: skip


def _matrix(x: Tensor) -> Tensor:
    """Rows without gaps between their numbers, and neither a width nor a stride of 1."""
    x = x.detach()
    if x.shape[1] <= 1:
        return torch.nn.functional.pad(x, (0, 2 - x.shape[1]))
    return x if x.stride(1) == 1 and x.stride(0) != 1 else x.clone(memory_format=torch.contiguous_format)


# ---------------------------------------------------------------------------------------------------- inside of kernels


@triton.jit
def tile_of(pid, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of tile number `pid`, GROUP rows of tiles at a time."""
    per_group = GROUP * column_tiles
    first = pid // per_group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    return first + pid % per_group % size, pid % per_group // size


@triton.jit
def product(
    a, b, a_tma, b_tma, d, a_stride, b_stride, i, j, m_i, m_j,
    BK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """⟨a_i, b_j⟩ of a tile in float32, i [BM] and j [BN] consecutive. UPCAST: the interpreter's are wrong in bf16."""
    acc = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    if a_tma is not None:
        i0, j0 = tl.min(i, 0), tl.min(j, 0)
        for d0 in range(0, d, BK):
            x, y = a_tma.load([i0, d0]), b_tma.load([j0, d0])
            if UPCAST:
                x, y = x.to(tl.float32), y.to(tl.float32)
            acc = tl.dot(x, y.T, acc, input_precision=PRECISION)
    else:
        if ALIGNED:  # rows of 8 · odd elements load 16 bytes at a time too, once the compiler sees the 8
            a_stride, b_stride, d = a_stride // 8 * 8, b_stride // 8 * 8, d // 8 * 8
        o_d = tl.arange(0, BK)
        p_a = a + i.to(tl.int64)[:, None] * a_stride + o_d[None, :]
        p_b = b + j.to(tl.int64)[None, :] * b_stride + o_d[:, None]
        for d0 in range(0, d, BK):
            m_d = d0 + o_d < d
            x = tl.load(p_a + d0, mask=m_i[:, None] & m_d[None, :], other=0.0)
            y = tl.load(p_b + d0, mask=m_d[:, None] & m_j[None, :], other=0.0)
            if UPCAST:
                x, y = x.to(tl.float32), y.to(tl.float32)
            acc = tl.dot(x, y, acc, input_precision=PRECISION)
    return acc


@triton.jit
def own_column(positives, i, m_i, n):
    """Row i's own column as int32, −1 for none."""
    own = tl.load(positives + i, mask=m_i, other=-1)
    return tl.where((own >= 0) & (own < n), own, -1).to(tl.int32)


@triton.jit
def own_here(problem, i, j, m_i, n):
    """Rows whose own column is in the tile, and the column."""
    own_j = own_column(problem.positives, i, m_i, n)
    return m_i & (own_j >= tl.min(j, 0)) & (own_j <= tl.max(j, 0)), own_j


@triton.jit
def own_entry(tile, own_j, j):
    """Each row's entry in its own column, 0 where that is not in the tile."""
    return tl.sum(tl.where(own_j[:, None] == j[None, :], tile, 0.0), 1)


@triton.jit
def guide_mask(
    problem, i, j, m_i, m_j, BK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Where the guide masks, if there is one. Before the logits' product, beside which only this has to be kept."""
    if problem.guide_queries is None:
        masked = False
    else:
        guide = product(
            problem.guide_queries, problem.guide_keys, None, None, problem.guide_d, problem.gq_stride,
            problem.gk_stride, i, j, m_i, m_j, BK, PRECISION, UPCAST, False,
        )  # fmt: skip
        masked = guide > tl.load(problem.guide_limit + i, mask=m_i, other=0.0)[:, None]
    return masked


@triton.jit
def products(
    problem, queries_tma, keys_tma, i, j, m_i, m_j,
    BK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """⟨q_i, k_j⟩ of a tile."""
    return product(
        problem.queries, problem.keys, queries_tma, keys_tma, problem.d, problem.q_stride, problem.k_stride,
        i, j, m_i, m_j, BK, PRECISION, UPCAST, ALIGNED,
    )  # fmt: skip


@triton.jit
def logits(problem, tile, guided, i, j, m_i, m_j, n):
    """scale · tile + bias_j, −inf where masked; beyond the matrix it holds anything."""
    tile *= tl.load(problem.scale).to(tl.float32)
    if problem.key_bias is not None:
        tile += tl.load(problem.key_bias + j, mask=m_j, other=0.0).to(tl.float32)[None, :]
    if problem.query_ids is not None or problem.guide_queries is not None:
        masked = guided
        if problem.query_ids is not None:
            query_ids = tl.load(problem.query_ids + i, mask=m_i, other=0)
            key_ids = tl.load(problem.key_ids + j, mask=m_j, other=0)
            same = query_ids[:, None] == key_ids[None, :]
            masked = same if problem.guide_queries is None else masked | same
        if problem.positives is not None:
            masked = masked & (own_column(problem.positives, i, m_i, n)[:, None] != j[None, :])
        tile = tl.where(masked, -float("inf"), tile)
    return tile


@triton.jit
def _half(x, WHICH: tl.constexpr):
    a, b = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))
    return a if WHICH == 0 else b


@triton.jit
def part(x, p: tl.constexpr, PARTS: tl.constexpr):
    """Columns [p · BN / PARTS, …) of a tile. An epilogue that keeps several numbers an entry goes part by part, so that
    of the whole tile only the products take up registers."""
    return x if PARTS == 1 else part(_half(x, p // (PARTS // 2)), p % (PARTS // 2), PARTS // 2)


@triton.jit
def between_parts(PARTS: tl.constexpr):
    """Keeps the compiler from taking the parts together after all."""
    if PARTS > 1:
        tl.debug_barrier()


@triton.jit
def guided_part(problem, guided, p: tl.constexpr, PARTS: tl.constexpr):
    """The same part of what `guide_mask` returned."""
    return guided if problem.guide_queries is None else part(guided, p, PARTS)


@triton.jit
def within(tile, m_i, m_j):
    """−inf beyond the matrix: only tiles at its edge have such entries."""
    if (tl.min(m_i.to(tl.int32), 0) == 0) | (tl.min(m_j.to(tl.int32), 0) == 0):
        tile = tl.where(m_i[:, None] & m_j[None, :], tile, -float("inf"))
    return tile


@triton.jit
def finite(x):
    """The offset that makes exp(x − offset) safe for an infinite maximum: −inf − −inf would be NaN."""
    return tl.minimum(tl.maximum(x, -FLT_MAX), FLT_MAX)


@triton.jit
def power_of_two(extents, first, count: tl.constexpr, SLOTS: tl.constexpr):
    """The largest power of two not above any of `count` rows of partial maxima, from row `first` of `extents`."""
    o = tl.arange(0, SLOTS)
    largest = tl.load(extents + first * SLOTS + o)
    for row in tl.static_range(1, count):
        largest = tl.maximum(largest, tl.load(extents + (first + row) * SLOTS + o))
    exponent = tl.max(largest, 0).to(tl.int32, bitcast=True) & 0x7F800000
    return tl.maximum(exponent.to(tl.float32, bitcast=True), 2.0**-100)


@triton.jit
def factor_of(extents, UNIT: tl.constexpr, SLOTS: tl.constexpr):
    """What weights are multiplied by: UNIT, by the power of two of the largest gradient where `extents` has those."""
    return tl.full((), UNIT, tl.float32) if extents is None else UNIT / power_of_two(extents, 2, 3, SLOTS)


@triton.jit
def rounded(x, p, TO_NEAREST: tl.constexpr):
    """As the pointer's numbers. TO_NEAREST: the interpreter cuts bfloat16 off."""
    if TO_NEAREST:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(p.dtype.element_ty)


@triton.jit
def store_tile(tile, target, target_stride, i, j, m_i, m_j, start):
    """A tile of G into its chunk."""
    i0 = tl.min(i, 0)
    at = target + (i0 - start).to(tl.int64) * target_stride + (i - i0)[:, None] * target_stride + j[None, :]
    tl.store(at, tile.to(target.dtype.element_ty), mask=m_i[:, None] & m_j[None, :])


@triton.jit(do_not_specialize=["tiles", "count"])
def sum_kernel(parts, out, tiles, count, BT: tl.constexpr, BC: tl.constexpr):
    """Σ over tiles, in float64 and in a fixed order."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros((BC,), tl.float64)
    for t0 in range(0, tiles, BT):
        t = t0 + tl.arange(0, BT)
        mask = (t < tiles)[:, None] & (c < count)[None, :]
        part = tl.load(parts + t.to(tl.int64)[:, None] * count + c[None, :], mask=mask, other=0.0)
        total += tl.sum(part.to(tl.float64), 0)
    tl.store(out + c, total.to(tl.float32), mask=c < count)


# ------------------------------------------------------------------------------------------------------------- launches


@dataclass(frozen=True)
class Config:
    """Tile BM × BN, BK of the width at a time; `group` rows of tiles run together; `tma` for operands that allow it."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    group: int = 8
    parts: int = 1  # of the columns, that the epilogue takes one after another
    tma: bool = False
    registers: int | None = None  # a thread may use: the assembler likes 128 for 8 warps, and spills to get there


Ladder = tuple[tuple[float, Config], ...]  # (entries of the matrix up to which it serves, config), ascending
SMALL, MEDIUM, ANY = 1024**2, 4096**2, float("inf")  # entries


class Launch(NamedTuple):
    """A kernel with everything but a device: run, or compiled by the gate."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple
    constants: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> None:
        if self.grid[0]:
            self.kernel[self.grid](*self.arguments, **self.constants, **self.options)


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def options(config: Config) -> dict[str, Any]:
    chosen = {"num_warps": config.warps, "num_stages": config.stages}
    return chosen if config.registers is None else {**chosen, "maxnreg": config.registers}


def tile_constants(config: Config, problem: Problem) -> dict[str, Any]:
    """The constants that every tile kernel takes."""
    dtype, sizes = problem.queries.dtype, (problem.d, problem.q_stride, problem.k_stride)
    return {
        "BM": config.BM, "BN": config.BN, "BK": config.BK, "GROUP": config.group, "PARTS": config.parts,
        "PRECISION": "tf32" if kind_of(dtype) == "tf32" else "ieee",
        "UPCAST": interpreted() and dtype in (torch.bfloat16, torch.float16),
        "ALIGNED": all(size % 8 == 0 for size in sizes) and any(size % 16 for size in sizes),
    }  # fmt: skip


def descriptors(config: Config, problem: Problem) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """For the tensor memory accelerator."""
    if not config.tma:
        return None, None
    return tuple(
        TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [rows, config.BK])
        for x, rows in ((problem.queries, config.BM), (problem.keys, config.BN))
    )


def unit_constants(extents: Tensor | None, target: Tensor | None) -> dict[str, int | float]:
    return {
        "UNIT": HALF_UNIT if target is not None and target.dtype == torch.float16 else 1.0,
        "SLOTS": 1 if extents is None else extents.shape[1],
    }


def describable(problem: Problem) -> bool:
    """Whether the tensor memory accelerator can read queries and keys."""
    return all(_describable(x) for x in (problem.queries, problem.keys))


def _describable(x: Tensor) -> bool:
    size = x.element_size()
    aligned = (x.is_meta or x.data_ptr() % 16 == 0) and x.stride(0) * size % 16 == 0
    return aligned and x.stride(0) >= x.shape[1] and x.shape[1] * size >= 16


BT, BC = 16, 64  # parts and numbers of a program that adds parts up


def sum_launch(parts: Tensor, out: Tensor) -> Launch:
    tiles, count = parts.shape
    constants = {"BT": BT, "BC": BC}
    return Launch(sum_kernel, (triton.cdiv(count, BC),), (parts, out, tiles, count), constants, {"num_warps": 4})


# -------------------------------------------------------------------------------------------------- choosing the launch


def kind_of(dtype: torch.dtype) -> str:
    """ "half", "tf32" where torch is told to use it for float32, else "float32"."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "float32"


def architecture(capability: tuple[int, int]) -> str:
    """Which table serves: those of other chips (8.6, 8.9, 12.0 have 99 KiB of shared memory) keep to the smallest."""
    return {9: "sm_90", 10: "sm_100"}.get(capability[0], "sm_80")


def ladder(op: str, table: dict[str, Ladder], name: str, device: torch.device) -> Ladder:
    """Measured winners for this GPU if there are any, else the table's."""
    gpu, capability = gpu_of(device)
    return _tuned(gpu, op).get(name) or table[f"{name} {architecture(capability)}"]


def config_for(op: str, table: dict[str, Ladder], kernel: str, problem: Problem) -> Config:
    return pick(ladder(op, table, ladder_name(kernel, problem), problem.queries.device), problem)


EXTRAS = ("", " masked", " guide")  # masks and a bias need registers of their own, a guide a second product's


def ladder_name(kernel: str, problem: Problem) -> str:
    extra = "" if problem.query_ids is None and problem.key_bias is None else " masked"
    return f"{kernel} {kind_of(problem.queries.dtype)}{extra if problem.guide_queries is None else ' guide'}"


def pick(rungs: Ladder, problem: Problem) -> Config:
    """The first rung that reaches the problem's size; of those without `tma` where its operands do not allow that."""
    entries = problem.queries.shape[0] * problem.keys.shape[0]
    if any(config.tma for _, config in rungs) and not describable(problem):
        rungs = tuple((limit, config) for limit, config in rungs if not config.tma)
    return next((config for limit, config in rungs if entries <= limit), rungs[-1][1])


def gpu_of(device: torch.device) -> tuple[str, tuple[int, int]]:
    """Name, as a folder of `tuned`, and compute capability."""
    if device.type != "cuda":
        return "interpreter", (8, 0)
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _gpu(index: int) -> tuple[str, tuple[int, int]]:
    name = torch.cuda.get_device_name(index).lower().replace(" ", "-")
    return name, torch.cuda.get_device_capability(index)


TUNED = Path(__file__).parent / "tuned"


@cache
def _tuned(gpu: str, op: str) -> dict[str, Ladder]:
    path = TUNED / gpu / f"{op}.json"
    if not path.exists():
        return {}
    return {
        name: tuple((ANY if limit is None else limit, Config(**config)) for limit, config in rungs)
        for name, rungs in json.loads(path.read_text()).items()
    }


def autotune(
    op: str,
    table: dict[str, Ladder],
    launches: dict[str, Callable[[Config], Callable[[], None]]],
    problem: Problem,
    write: bool,
) -> dict[str, list[tuple[float, Config]]]:
    """Times each kernel of `launches` with every configuration that the table has for such inputs on this device.

    Returns ladder name → [(milliseconds, config)], the fastest first; a configuration that does not fit is left out.
    `write`: the fastest serves from now on for every size, from kernels/tuned/<gpu>/<op>.json.
    """
    gpu, capability = gpu_of(problem.queries.device)
    kind, arch = kind_of(problem.queries.dtype), architecture(capability)
    alike = {config for name, rungs in table.items() if {kind, arch} <= {*name.split()} for _, config in rungs}
    candidates = sorted((config for config in alike if not config.tma or describable(problem)), key=described)
    timed = {}
    for kernel, launch in launches.items():
        found = []
        for config in candidates:
            with contextlib.suppress(triton.runtime.errors.OutOfResources):
                found.append((triton.testing.do_bench(launch(config)), config))
        timed[ladder_name(kernel, problem)] = sorted(found, key=lambda pair: pair[0])
    if write:
        _write_tuned(gpu, op, {name: [(None, found[0][1])] for name, found in timed.items() if found})
    return timed


def random_problem(m: int, n: int, d: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """Unit vectors or so, nothing masked: what `autotune` times."""
    queries, keys = (torch.randn(count, d, device=device, dtype=dtype) * d**-0.5 for count in (m, n))
    sizes = (d, queries.stride(0), keys.stride(0), 0, 0, 0)
    return Problem(queries, keys, torch.full((), 20.0, device=device), *(None,) * 7, *sizes)


def _write_tuned(gpu: str, op: str, winners: dict[str, list[tuple[float | None, Config]]]) -> None:
    """Merges ladders by name into the file; a limit of None is no limit."""
    path = TUNED / gpu / f"{op}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known |= {name: [[limit, asdict(config)] for limit, config in rungs] for name, rungs in winners.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=2) + "\n")
    _tuned.cache_clear()


# -------------------------------------------------------------------------------------------------------- compile cases


class Case(NamedTuple):
    """What the compile gate compiles: a launch on meta tensors, and whether it must use the matrix units of sm_90+, and
    load no half-precision number by itself."""

    name: str
    launch: Launch
    matrix_units: bool
    wide_loads: bool = False


def described(config: Config) -> str:
    text = f"{config.BM}x{config.BN}x{config.BK} {config.warps}w {config.stages}s"
    text += f" /{config.parts}" if config.parts > 1 else ""
    text += f" r{config.registers}" if config.registers else ""
    return text + (" tma" if config.tma else "")


def distinct(table: dict[str, Ladder], name: str, capability: tuple[int, int]) -> Iterator[Config]:
    """The configurations of one ladder, each once."""
    yield from dict.fromkeys(config for _, config in table[f"{name} {architecture(capability)}"])


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def meta_problem(dtype: torch.dtype, extra: str, d: int = 768) -> Problem:
    """A problem for the compiler: with ids and a bias if `extra` says masked, with a guide too if it says that."""
    n = 4096
    integers, guide = meta(n, dtype=torch.int64), meta(n, d, dtype=dtype)
    ids = integers if extra else None
    guides = (guide, guide, meta(n)) if extra == " guide" else (None, None, None)
    features = meta(n, d, dtype=dtype)
    sizes = (d, d, d) * 2 if guides[0] is not None else (d, d, d, 0, 0, 0)
    return Problem(features, features, meta(), meta(n) if extra else None, ids, ids, integers, *guides, *sizes)


def kinds() -> Iterator[tuple[str, torch.dtype, dict[str, str]]]:
    """(kind, dtype, constants) of what the gate compiles; tf32 is a flag of torch, which the compiler is not told."""
    yield "half", torch.bfloat16, {}
    yield "tf32", torch.float32, {"PRECISION": "tf32"}
    yield "float32", torch.float32, {"PRECISION": "ieee"}
