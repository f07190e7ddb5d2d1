"""The schedule of a similarity sweep on a GPU: Triton tiles around library products, a chunk of rows at a time.

    forward:   lse of all tiles                                            1 product, O(M + N) memory
    backward:  for each chunk of rows:  G = weights(tiles)                 S again, into the workspace
                                        dQ_I = G · K,  dK += Gᵀ · Q_I      library products, accumulated in float32

Nothing here makes the host wait for the device, or depends on values: a CUDA graph can hold it. Nothing depends on CUDA
either, so that it runs on CPU tensors in Triton's interpreter.

For half-precision inputs G is float16 with powers of two taken out; see `kernels/_operands.py`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ._precision import without_autocast
from ._sweep import Masks, Targets
from ._workspace import workspace_bytes

CHUNK_ROWS = 128  # a chunk has a multiple of this, so that only the last tile of rows is ragged


def on_device(function: Callable) -> Callable:
    """Launches go to the device of the first tensor, whatever the current one is, outside autocast and autograd."""

    @functools.wraps(function)
    @without_autocast
    def wrapped(first: Tensor, *args, **kwargs):
        guard = torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext()
        with guard, torch.no_grad():
            return function(first, *args, **kwargs)

    return wrapped


# -------------------------------------------------------------------------------------------------------------- chunks


def chunks(m: int, n: int, entry: int, device: torch.device) -> list[tuple[int, int]]:
    """(start, rows) of chunks of about equal size, which fit the workspace with `entry` bytes for each entry."""
    most = max(1, workspace_bytes(None, device) // (_padded(n) * entry * CHUNK_ROWS)) * CHUNK_ROWS
    count = -(-m // most)
    rows = -(-m // (count * CHUNK_ROWS)) * CHUNK_ROWS
    return [(i, min(rows, m - i)) for i in range(0, m, rows)]


def _padded(n: int) -> int:
    return -(-n // 16) * 16  # rows that start on 32 bytes, for the library's vector loads


def _chunks(problem, inputs: torch.dtype, beside: torch.dtype | None = None) -> Iterator[tuple[int, Tensor]]:
    """(start, where its weights go [rows, N]) of each chunk of rows, for inputs of that dtype; each takes the place of
    the one before. `beside`: the dtype of another matrix of that size that the caller makes."""
    m, n, device = problem.queries.shape[0], problem.keys.shape[0], problem.queries.device
    dtype = torch.float32 if inputs == torch.float32 else torch.float16
    blocks = chunks(m, n, dtype.itemsize + (beside.itemsize if beside else 0), device)
    buffer = torch.empty(blocks[0][1], _padded(n), dtype=dtype, device=device)
    for start, rows in blocks:
        yield start, buffer[:rows, :n]


def product(a: Tensor, b: Tensor, out: Tensor | None = None, *, add: bool = False) -> Tensor:
    """a · b in float32, into or onto `out` if that is given."""
    if a.dtype == torch.float32 or not a.is_cuda:
        a, b = a.float(), b.float()
        if add:
            return torch.addmm(out, a, b, out=out)
        return torch.mm(a, b, out=out) if out is not None else torch.mm(a, b)
    if add:
        return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    if out is not None:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b, out_dtype=torch.float32)


QUERIES, KEYS = 0, 1
NONE = (None, None, None)


class Operands(NamedTuple):
    """The other factors of the products with weights, and what undoes the powers of two in them and in the weights."""

    queries: Tensor  # [M, D]
    keys: Tensor  # [N, D]
    extents: Tensor | None  # None: everything is float32
    unit: float

    @staticmethod
    def of(queries: Tensor, keys: Tensor, gradients: tuple[Tensor | None, ...]) -> Operands:
        """`gradients` of rows, columns and own logits: what the weights are proportional to, None for weights ≤ 1."""
        from fastcontrast.kernels import _common
        from fastcontrast.kernels import _operands as kernel

        queries, keys = _rows(queries), _rows(keys)
        if keys.dtype == torch.float32:
            return Operands(queries, keys, None, 1.0)
        m, n = queries.shape[0], keys.shape[0]
        q, k = (None if x.dtype == torch.float16 else x for x in (queries, keys))
        return Operands(queries, keys, kernel.extents(q, k, gradients, m, n, keys.device), _common.HALF_UNIT)

    def half(self, which: int, start: int = 0, count: int | None = None) -> Tensor:
        """Queries or keys, or some of their rows, as a factor of a product with weights."""
        from fastcontrast.kernels import _operands as kernel

        x = self[which] if count is None else self[which][start : start + count]
        return kernel.to_half(x, self.extents, which) if self._converted(which) else x

    def finish(self, raw: Tensor, *others: int, out: Tensor, scale: Tensor | None = None) -> None:
        """From a product with `others` (queries or keys) to a gradient; see `kernels._operands.finish`."""
        from fastcontrast.kernels import _operands as kernel

        kernel.finish(raw, scale, self.extents, self.unit, [x for x in others if self._converted(x)], out)

    def undone(self, sums: Tensor) -> Tensor:
        """Sums of the weights [*] fp32 without their power of two, in place."""
        if self.extents is not None:
            row = sums.view(1, -1)
            self.finish(row, out=row)
        return sums

    def _converted(self, which: int) -> bool:
        return self.extents is not None and self[which].dtype != torch.float16


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


# ----------------------------------------------------------------------------------------------- gradients of any sweep


class Needs(NamedTuple):
    queries: bool
    keys: bool
    scale: bool
    bias: bool


class Gradients:
    """scale · G·K and scale · Gᵀ·Q from weights that come a chunk of rows at a time, and sums that come with them."""

    def __init__(self, operands: Operands, scale: Tensor, needs: Needs):
        queries, keys = operands.queries, operands.keys
        self.operands, self.scale, self.extents = operands, scale, operands.extents
        self._k = operands.half(KEYS) if needs.queries else None
        self.dq = _empty_like(queries) if needs.queries else None
        self._sum = torch.empty(keys.shape, dtype=torch.float32, device=keys.device) if needs.keys else None
        self._dots: list[Tensor] = []

    def add(self, start: int, weights: Tensor, dots: Tensor | None) -> None:
        """The weights [rows, N] of rows `start`…, and parts of Σ G ∘ Q Kᵀ."""
        operands, rows = self.operands, weights.shape[0]
        if self.dq is not None:
            out = self.dq[start : start + rows]
            raw = product(weights, self._k, out if out.dtype == torch.float32 else None)
            operands.finish(raw, KEYS, out=out, scale=self.scale)
        if self._sum is not None:
            product(weights.t(), operands.half(QUERIES, start, rows), self._sum, add=start > 0)
        if dots is not None:
            self._dots.append(dots)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dq, dk, dscale in the dtype of the scale); what was not needed or not given is None."""
        dk, keys = None, self.operands.keys
        if self._sum is not None:
            dk = self._sum if keys.dtype == torch.float32 else _empty_like(keys)
            self.operands.finish(self._sum, QUERIES, out=dk, scale=self.scale)
        return self.dq, dk, self.total(self._dots, self.scale.dtype) if self._dots else None

    def total(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Their sum, 0-dim, in float64 until it is complete."""
        sums = [part.sum(dtype=torch.float64) for part in parts]
        return self.operands.undone(sum(sums[1:], sums[0]).float()).to(dtype)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _zeros(inputs: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of an empty matrix. Some inputs are expanded: none is written to in its own layout."""
    return tuple(
        torch.zeros(x.shape, dtype=x.dtype, device=x.device) if need else None
        for x, need in zip(inputs, needs, strict=True)
    )


# --------------------------------------------------------------------------------------------------------------- lse


def _problem(queries, keys, scale, key_bias, masks):
    from fastcontrast.kernels import _common

    return _common.problem_of(queries, queries if keys is None else keys, scale, key_bias, masks)


def lse_of(problem, rows: bool, columns: bool, own: Tensor | None, best: bool):
    """(rows, columns) as `kernels.similarity_lse.Lse`; of an empty matrix −inf everywhere."""
    from fastcontrast.kernels import similarity_lse as kernel

    m, n, device = problem.queries.shape[0], problem.keys.shape[0], problem.queries.device

    def empty(wanted: bool, count: int) -> kernel.Lse:
        if not wanted:
            return kernel.Lse()
        high = torch.empty(count, dtype=torch.float32, device=device)
        return kernel.Lse(
            high, torch.empty_like(high), torch.empty(count, dtype=torch.int64, device=device) if best else None
        )

    r, c = empty(rows, m), empty(columns, n)
    if m and n:
        kernel.lse(problem, r, c, own, best)
    else:
        for one in (r, c):
            for x, value in zip(one, (float("-inf"), 0.0, -1), strict=True):
                if x is not None:
                    x.fill_(value)
    return r, c


@on_device
def forward_triton(queries, keys, scale, key_bias, *rest):
    """As `forward_cpu`; nothing is kept, and no mix: it would cost the three products that forward and backward do."""
    masks, (rows, columns, wants_own, best, wants_mix, _) = Masks(*rest[:6]), rest[6:]
    assert not wants_mix
    problem = _problem(queries, keys, scale, key_bias, masks)
    own = queries.new_full((queries.shape[0] if wants_own else 0,), float("-inf"), dtype=torch.float32)
    r, c = lse_of(problem, rows, columns, own if wants_own else None, best)

    def nothing(dtype: torch.dtype = torch.float32) -> Tensor:
        return queries.new_empty(0, dtype=dtype)

    high, low, index = (
        [x if x is not None else nothing(dtype) for x in pair]
        for pair, dtype in zip(zip(r, c, strict=True), (torch.float32, torch.float32, torch.int64), strict=True)
    )
    return (*high, own, *index, *low, nothing(), nothing())


@on_device
def backward_triton(queries, keys, scale, key_bias, *rest):
    """As `backward_cpu`."""
    from fastcontrast.kernels import similarity_lse as kernel

    masks = Masks(*rest[:6])
    g, h, p, r, c, r_low, c_low, *_, needs = rest[6:]
    needs = Needs(*needs)
    symmetric = keys is None
    others = queries if symmetric else keys
    p = None if p is None or not p.numel() else p
    if p is not None and symmetric:
        p = p + p.index_select(0, torch.where(masks.positives < 0, _range(p), masks.positives))
    gradients = tuple(None if x is None else x.float().contiguous() for x in (g, h, p))
    g, h, p = gradients
    rows = kernel.Softmax() if g is None else kernel.Softmax(g, r, r_low)
    columns = kernel.Softmax() if h is None else kernel.Softmax(h, c, c_low)
    if symmetric:
        columns, gradients, needs = rows, (g, g, p), needs._replace(keys=False)
    if not queries.shape[0] or not others.shape[0]:
        return _as_outputs(_zeros((queries, others, scale, key_bias), needs), queries)
    problem = _problem(queries, keys, scale, key_bias, masks)
    found = Gradients(Operands.of(queries, others, gradients), scale, needs)
    db = torch.zeros(others.shape[0], dtype=torch.float32, device=queries.device) if needs.bias else None
    for start, target in _chunks(problem, queries.dtype):
        out = kernel.weights(
            problem, rows, columns, p, found.extents, target, start, sums=needs.bias, dots=needs.scale
        )  # fmt: skip
        if needs.bias:
            db += out.column_sums.sum(0)
        found.add(start, target, out.dots)
    dq, dk, dscale = found.results()
    if dscale is not None and symmetric:  # G·K counts each pair in both orders
        dscale = dscale * 0.5
    db = None if db is None else found.operands.undone(db).to(key_bias.dtype)
    return _as_outputs((dq, dk, dscale, db), queries)


def _as_outputs(gradients: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0, dtype=torch.float32) if x is None else x for x in gradients)


def _range(like: Tensor) -> Tensor:
    return torch.arange(like.shape[0], device=like.device)


# --------------------------------------------------------------------------------------------------------------- mixes


def _mix(problem, high: Tensor, low: Tensor, values: Tensor) -> Tensor:  # [M, Dv] fp32
    """Σ_j softmax_j v_j from log-sum-exps; 0 where a row has nothing left."""
    from fastcontrast.kernels import similarity_lse as kernel

    m, n = problem.queries.shape[0], problem.keys.shape[0]
    out = torch.zeros(m, values.shape[1], dtype=torch.float32, device=values.device)
    if not m or not n:
        return out
    operands, rows = Operands.of(values[:0], values, NONE), kernel.Softmax(None, high, low)
    v = operands.half(KEYS)
    for start, target in _chunks(problem, values.dtype):
        kernel.weights(problem, rows, kernel.Softmax(), None, operands.extents, target, start)
        part = out[start : start + target.shape[0]]
        operands.finish(product(target, v, part), KEYS, out=part)
    return out


@on_device
def mix(
    queries: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    values: Tensor,  # [N, Dv]
    scale: Tensor,
    key_bias: Tensor | None,
    masks: Masks,
) -> tuple[Tensor, Tensor, Tensor]:
    """(high, low, out): the rows' log-sum-exp = high + low [M], and Σ_j softmax_j v_j [M, Dv], all float32."""
    problem = _problem(queries, keys, scale, key_bias, masks)
    rows, _ = lse_of(problem, True, False, None, False)
    return rows.high, rows.low, _mix(problem, rows.high, rows.low, values)


@on_device
def mix_backward(
    queries: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    values: Tensor,  # [N, Dv]
    scale: Tensor,
    key_bias: Tensor | None,
    masks: Masks,
    upstream: Tensor | None,  # [M, Dv], of the mix
    lse_gradient: Tensor | None,  # [M], of high + low
    out: Tensor,  # [M, Dv] fp32, as `mix` returned it
    high: Tensor,  # [M]
    low: Tensor,  # [M]
    needs: tuple[bool, bool, bool, bool, bool],  # queries, keys, scale, key_bias, values
) -> tuple[Tensor | None, ...]:
    """Gradients of ⟨upstream, out⟩ + ⟨lse_gradient, lse⟩ to queries, keys, scale, key_bias, values, at most 6 products.

    In half precision one more is for ⟨upstream_i, out_i⟩, from weights in float32. With P the softmax and
    δ_i = ⟨upstream_i, out_i⟩ − lse_gradient_i:
    dv = Pᵀ · upstream,   G = P ∘ (upstream · vᵀ − δ),   dq = scale · G k,   dk = scale · Gᵀ q,   db_j = Σ_i G_ij.
    """
    from fastcontrast.kernels import similarity_lse as kernel

    inputs, through = (queries, keys, scale, key_bias, values), Needs(*needs[:4])
    if not queries.shape[0] or not keys.shape[0]:
        return _zeros(inputs, needs)
    problem, rows = _problem(queries, keys, scale, key_bias, masks), kernel.Softmax(None, high, low)
    upstream = torch.zeros_like(out) if upstream is None else upstream.float().contiguous()
    mixed = Operands.of(upstream, values, NONE)
    up = mixed.half(QUERIES)
    dv = None
    if needs[4]:
        dv = torch.empty(values.shape, dtype=torch.float32, device=values.device)
        for start, target in _chunks(problem, values.dtype):
            kernel.weights(problem, rows, kernel.Softmax(), None, mixed.extents, target, start)
            product(target.t(), up[start : start + target.shape[0]], dv, add=start > 0)
        mixed.finish(dv, QUERIES, out=dv)
        dv = dv.to(values.dtype)
    if not any(through):
        return None, None, None, None, dv
    # What `out` lost to weights of 11 bits would not cancel in G: its sums are as exact as from float32 weights.
    exact = mixed.extents is not None
    delta = torch.zeros_like(high) if exact else torch.linalg.vecdot(upstream, out)
    if lse_gradient is not None:
        delta -= lse_gradient
    v = mixed.half(KEYS)
    found = Gradients(_slope_operands(queries, keys, upstream, values, lse_gradient), scale, through)
    db = torch.zeros(keys.shape[0], dtype=torch.float32, device=keys.device) if through.bias else None
    for start, target in _chunks(problem, values.dtype, beside=torch.float32):
        slope = product(up[start : start + target.shape[0]], v.t())  # [rows, N]
        if exact:
            mixed._replace(unit=1.0).finish(slope, QUERIES, KEYS, out=slope)
            part = slice(start, start + target.shape[0])
            delta[part] += kernel.mix_sums(problem, rows, slope, start)
        sums = kernel.weights(
            problem, rows, kernel.Softmax(), None, found.extents, target, start, sums=through.bias, dots=through.scale,
            slopes=kernel.Slopes(slope, delta),
        )  # fmt: skip
        if through.bias:
            db += sums.column_sums.sum(0)
        found.add(start, target, sums.dots)
    dq, dk, dscale = found.results()
    return dq, dk, dscale, None if db is None else found.operands.undone(db).to(key_bias.dtype), dv


def _slope_operands(queries, keys, upstream, values, lse_gradient) -> Operands:
    """For G = P ∘ (upstream · vᵀ − δ), whose size is bounded by norms before any of it is known."""
    operands = Operands.of(queries, keys, NONE)
    if operands.extents is not None:
        longest = [torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).amax() for x in (upstream, values)]
        bound = 2.0 * longest[0] * longest[1]
        if lse_gradient is not None:
            bound = bound + lse_gradient.abs().amax()
        operands.extents[2] = torch.nan_to_num(bound, nan=1.0, posinf=1.0)
    return operands


# ----------------------------------------------------------------------------------------------------------- softplus


@on_device
def softplus(
    queries: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    scale: Tensor,
    bias: Tensor,  # 0-dim
    masks: Masks,
    targets: Targets,
    gradient: Tensor | None,  # [M]
    needs: tuple[bool, bool, bool, bool] | None,  # queries, keys, scale, bias
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """(S [M] fp32, gradients of Σ_i gradient_i S_i) in one sweep; the gradients are None where not needed, or all of
    them without a `gradient`."""
    from fastcontrast.kernels import similarity_softplus as kernel

    m, n, device = queries.shape[0], keys.shape[0], queries.device
    inputs = (queries, keys, scale, bias)
    needs = Needs(*needs) if gradient is not None else Needs(False, False, False, False)
    if not m or not n:
        return torch.zeros(m, dtype=torch.float32, device=device), _zeros(inputs, needs)
    problem, sums = _problem(queries, keys, scale, None, masks), torch.empty(m, dtype=torch.float32, device=device)
    if not any(needs):
        rows = kernel.panel_rows(problem)
        for start in range(0, m, rows):
            kernel.softplus(problem, bias, targets, None, None, None, start, sums[start : start + rows])
        return sums, (None,) * 4
    gradient = gradient.float().contiguous()
    found, totals = Gradients(Operands.of(queries, keys, (gradient, None, None)), scale, needs), []
    for start, target in _chunks(problem, queries.dtype):
        part = sums[start : start + target.shape[0]]
        out = kernel.softplus(
            problem, bias, targets, gradient, found.extents, target, start, part, dots=needs.scale
        )  # fmt: skip
        totals.append(out.totals)
        found.add(start, target, out.dots)
    dq, dk, dscale = found.results()
    return sums, (dq, dk, dscale, found.total(totals, bias.dtype) if needs.bias else None)
