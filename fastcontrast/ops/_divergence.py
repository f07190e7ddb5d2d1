"""Divergence of two heads on the same tokens and vocabulary: the dense reference, and the schedule in chunks of tokens.

    for each chunk of tokens:   Z = H · Wᵀ,  Z' = H' · W'ᵀ      student and teacher, logits kept in the workspace
                                lse(Z), lse(Z')
                                kl(Z, Z')                      row sums; Z becomes G when the upstream gradient is known
                                dH = G · W,  dW += Gᵀ · H

See `linear_kl` for the equations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import _sweep
from ._dispatch import native
from ._precision import without_autocast
from ._sweep import Masks, Sums, Sweep, address
from .similarity_lse import reference_logits, rows_contiguous

# A chunk reads and writes the gradient of the whole vocabulary: thinner ones would do little else.
MIN_ROWS = 64


class Problem(NamedTuple):
    """Tensors first, in the order of the registered operation."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    teacher_hidden: Tensor  # [T, Dt]
    teacher_weight: Tensor  # [V, Dt]
    teacher_bias: Tensor | None  # [V]
    token_ids: Tensor | None  # [T] int64; where equal, an entry is masked in both heads
    vocabulary_ids: Tensor | None  # [V] int64
    scale: float  # 1 / temperature of the student
    teacher_scale: float
    forward: float  # share of KL(t ‖ p)
    reverse: float  # share of KL(p ‖ t)

    @property
    def dtype(self) -> torch.dtype:
        doubled = torch.float64 in (self.hidden.dtype, self.teacher_hidden.dtype)
        return torch.float64 if doubled else torch.float32

    def masks(self) -> Masks:
        return Masks(self.token_ids, self.vocabulary_ids)

    def student(self) -> tuple[Tensor, Tensor, float, Tensor | None]:
        """Queries, keys, scale and key bias of its logits; the bias is divided by the temperature too."""
        return self.hidden, self.weight, self.scale, _scaled(self.bias, self.scale, self.dtype)

    def teacher(self) -> tuple[Tensor, Tensor, float, Tensor | None]:
        bias = _scaled(self.teacher_bias, self.teacher_scale, self.dtype)
        return self.teacher_hidden, self.teacher_weight, self.teacher_scale, bias

    def rows(self, part: slice) -> Problem:
        ids = None if self.token_ids is None else self.token_ids[part]
        return self._replace(hidden=self.hidden[part], teacher_hidden=self.teacher_hidden[part], token_ids=ids)


def _scaled(bias: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype) * scale


class Rows(NamedTuple):
    """Of each token [T]: the divergence, and the teacher's entropy −Σ t log t."""

    divergence: Tensor
    entropy: Tensor


# ---------------------------------------------------------------------------------------------------------- reference


@without_autocast
def reference(hidden: Tensor, problem: Problem) -> Rows:
    """Dense and differentiable. `hidden` is the problem's own, first so that autocast is switched off on its device."""
    log_p, p_empty = _log_softmax(problem, *problem.student())
    log_t, t_empty = _log_softmax(problem, *problem.teacher())
    nothing = p_empty | t_empty
    total = 0.0
    for share, ours, theirs in ((problem.forward, log_t, log_p), (problem.reverse, log_p, log_t)):
        if share:
            total = total + share * _expected(ours, ours - theirs)
    return Rows(total.masked_fill(nothing, 0.0), _expected(log_t, -log_t).masked_fill(nothing, 0.0))


def _log_softmax(problem: Problem, queries, keys, scale, bias) -> tuple[Tensor, Tensor]:
    """log_softmax of a head's logits, and which rows have nothing left."""
    logits = reference_logits(queries.to(problem.dtype), keys.to(problem.dtype), scale, bias, problem.masks())
    nothing = torch.isneginf(logits).all(1)
    return torch.log_softmax(logits.masked_fill(nothing[:, None], 0.0), 1), nothing


def _expected(log_p: Tensor, x: Tensor) -> Tensor:
    """Σ_v p x, where 0 · infinity counts as 0."""
    p = log_p.exp()
    return (p * x.masked_fill(p == 0, 0.0)).sum(1)


# ----------------------------------------------------------------------------------------------------------- schedule


class Result(NamedTuple):
    rows: Rows
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]  # of hidden, weight, bias; None where not needed


def _chunks(problem: Problem, workspace: int, entry: int) -> list[tuple[int, int]]:
    """(start, stop) of chunks of tokens, which fit the workspace with `entry` bytes for each of the vocabulary."""
    vocabulary = max(1, problem.weight.shape[0])
    return _sweep.chunks(problem.hidden.shape[0], max(MIN_ROWS, workspace // (entry * vocabulary)))


def _empty_rows(problem: Problem) -> Rows:
    return Rows(*(problem.hidden.new_zeros(problem.hidden.shape[0], dtype=torch.float32) for _ in range(2)))


@without_autocast
def cpu(
    hidden: Tensor,  # the problem's own, as for `reference`
    problem: Problem,
    upstream: Tensor | None,  # [T] fp32
    needs: tuple[bool, ...],  # of hidden, weight, bias
    workspace: int,
) -> Result:
    """All rows, and for an upstream gradient of each the gradients that are needed, in float32."""
    matrices = {name: getattr(problem, name) for name in Problem._fields if name.endswith(("hidden", "weight"))}
    problem = problem._replace(**{name: rows_contiguous(x) for name, x in matrices.items()})
    needs = tuple(needs) if upstream is not None else (False, False, False)
    rows, sums = _empty_rows(problem), Sums.new(problem.hidden, problem.weight, needs)
    for start, stop in _chunks(problem, workspace, 8):
        part = slice(start, stop)
        gradient = upstream[part] if any(needs) else None
        for whole, values in zip(rows, _chunk(problem.rows(part), gradient, sums.rows(start, stop)), strict=True):
            whole[part] = values
    return Result(rows, sums[:3])


def _chunk(problem: Problem, upstream: Tensor | None, sums: Sums) -> Rows:
    student, teacher = (Sweep(*head, problem.masks()).widened() for head in (problem.student(), problem.teacher()))
    m, nothing = student.m, torch.empty(0)
    (p, _, p_kept), (t, _, t_kept) = (_sweep.lse(x, True, False, nothing, False, m) for x in (student, teacher))
    softmaxes = [native.Softmax(address(g), address(x.high), address(x.low)) for g, x in ((upstream, p), (None, t))]
    forward, reverse, entropy = (torch.zeros(m) for _ in range(3))
    totals = address(forward if problem.forward else None), address(reverse if problem.reverse else None)
    totals = (*totals, address(entropy))

    def tiles():
        for i0, rows, j0, columns in student.tiles(m):
            tile = student.tile(i0, rows, j0, columns, p_kept)
            source = teacher.tile(i0, rows, j0, columns, t_kept).data_ptr()
            yield tile, i0, j0, (student.native_tile(tile, i0, j0), source, *softmaxes)

    if upstream is None or problem.reverse:  # the gradient of the reverse divergence needs its value first
        for *_, both in tiles():
            native.kl_sums(*both, *totals, student.threads)
    if upstream is not None:
        for tile, i0, j0, both in tiles():
            native.kl_weights(*both, problem.forward, problem.reverse, *totals, problem.scale, student.threads)
            q, k = student.queries_block(i0, tile.shape[0]), student.keys_block(j0, tile.shape[1])
            sums.add(tile, i0, j0, q, k)
    return Rows(problem.forward * forward + problem.reverse * reverse, entropy)


def triton(
    hidden: Tensor, problem: Problem, upstream: Tensor | None, needs: tuple[bool, ...], workspace: int
) -> Result:
    """As `cpu`, with the products of `_device_sweep`."""
    from ._device_sweep import on_device

    return on_device(_triton)(hidden, problem, upstream, needs, workspace)


def _triton(hidden, problem: Problem, upstream: Tensor | None, needs: tuple[bool, ...], workspace: int) -> Result:
    from fastcontrast.kernels import linear_kl as kernel

    from ._device_sweep import product

    rows, vocabulary = _empty_rows(problem), problem.weight.shape[0]
    sums = _DeviceSums(problem, upstream, needs) if upstream is not None and any(needs) else None
    heads = problem.student(), problem.teacher()
    blocks = _chunks(problem, workspace, 10)
    size, padded = blocks[0][1] if blocks else 0, -(-vocabulary // 16) * 16  # rows that start on 64 bytes
    buffers = [hidden.new_empty(size, padded, dtype=torch.float32)[:, :vocabulary] for _ in heads]
    halves = None
    if sums is not None and sums.extents is not None:
        halves = hidden.new_empty(size, padded, dtype=torch.float16)[:, :vocabulary]
    for start, stop in blocks if vocabulary else ():
        part, count = slice(start, stop), stop - start
        logits = [product(x[part], y.t(), z[:count]) for (x, y, *_), z in zip(heads, buffers, strict=True)]
        gradient = None
        if sums is not None:  # in place of the student's logits where it is wanted in float32
            exact = logits[0] if halves is None or sums.exactly else None
            target = kernel.Target(exact, None if halves is None else halves[:count])
            gradient = upstream[part], sums.extents, target
        kernel.kl(logits, [head[2:] for head in heads], problem.rows(part), gradient, Rows(*(x[part] for x in rows)))
        if sums is not None:
            sums.add(start, *target)
    return Result(rows, (None, None, None) if sums is None else sums.results())


class _DeviceSums:
    """Gradients in float32 from weights that come a chunk of rows at a time.

    Not rounded to half precision here: what the loss is multiplied by afterwards would round them again. Weights in
    float16 are finer than bfloat16 gradients by three bits. Beside float16 gradients their own rounding would count,
    all the more since p − t of a row sum to 0: there what was rounded off is a second factor, and two products more.
    """

    def __init__(self, problem: Problem, upstream: Tensor, needs: tuple[bool, ...]):
        from fastcontrast.kernels import linear_kl as kernel

        from ._device_sweep import KEYS, Operands

        self.operands = Operands.of(problem.hidden, problem.weight, (upstream, None, None))
        if self.operands.extents is not None:
            self.operands = self.operands._replace(unit=kernel.HALF_UNIT)
        self.extents = self.operands.extents
        self.split = problem.hidden.dtype == torch.float16
        self.exactly = self.split or needs[2]
        self.scale = upstream.new_full((), problem.scale)
        zeros = [None if x is None else upstream.new_zeros(x.shape) for x in problem[:3]]
        self.hidden, self.weight, self.bias = (x if need else None for x, need in zip(zeros, needs, strict=True))
        self._factor = None if self.hidden is None else self.operands.half(KEYS)

    def add(self, start: int, exact: Tensor | None, half: Tensor | None) -> None:
        """The weights of rows `start`…, in float32 and/or in float16."""
        from ._device_sweep import KEYS, QUERIES, product

        factors = [exact if half is None else half]
        if self.split:
            factors.append((exact - half).half())
        part = slice(start, start + factors[0].shape[0])
        if self.hidden is not None:
            out = self.hidden[part]
            for factor in factors:
                product(factor, self._factor, out, add=True)
            self.operands.finish(out, KEYS, out=out, scale=self.scale)
        if self.weight is not None:
            others = self.operands.half(QUERIES, start, part.stop - start)
            for factor in factors:
                product(factor.t(), others, self.weight, add=True)
        if self.bias is not None:
            self.bias += exact.sum(0)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        from ._device_sweep import QUERIES

        if self.weight is not None and self.weight.numel():
            self.operands.finish(self.weight, QUERIES, out=self.weight, scale=self.scale)
        if self.bias is not None and self.bias.numel():
            self.bias = self.operands.undone(self.bias) * self.scale
        return self.hidden, self.weight, self.bias


RUNS: dict[str, Callable[..., Result]] = {"cpu": cpu, "triton": triton}
