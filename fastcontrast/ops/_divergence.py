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
    """As `cpu`; the gradients come in the dtypes of what they belong to."""
    from ._device_sweep import on_device

    return on_device(_triton)(hidden, problem, upstream, needs, workspace)


def _triton(hidden, problem: Problem, upstream: Tensor | None, needs: tuple[bool, ...], workspace: int) -> Result:
    from fastcontrast.kernels import linear_kl as kernel

    from ._device_sweep import Gradients, Needs, Operands, product

    rows, vocabulary = _empty_rows(problem), problem.weight.shape[0]
    needs = tuple(needs) if upstream is not None else (False, False, False)
    if not problem.hidden.shape[0] or not vocabulary:
        zeros = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) if x is not None else None for x in problem[:3])
        return Result(rows, tuple(zero if need else None for zero, need in zip(zeros, needs, strict=True)))
    scale = hidden.new_full((), problem.scale, dtype=torch.float32)
    found = bias_sums = None
    if any(needs):
        operands = Operands.of(problem.hidden, problem.weight, (upstream, None, None))
        operands = operands if operands.extents is None else operands._replace(unit=kernel.HALF_UNIT)
        found = Gradients(operands, scale, Needs(needs[0], needs[1], False, False))
        bias_sums = hidden.new_zeros(vocabulary, dtype=torch.float32) if needs[2] else None
    heads = [(x, y, s, b) for x, y, s, b in (problem.student(), problem.teacher())]
    biases, scales = [head[3] for head in heads], [head[2] for head in heads]
    blocks = _chunks(problem, workspace, 10)
    size, padded = blocks[0][1], -(-vocabulary // 16) * 16  # rows that start on 64 bytes
    buffers = [hidden.new_empty(size, padded, dtype=torch.float32)[:, :vocabulary] for _ in heads]
    weights = None
    if found is not None:  # in place of the student's logits, unless they are to be float16
        weights = buffers[0] if found.extents is None else hidden.new_empty(size, padded, dtype=torch.float16)
        weights = weights[:, :vocabulary]
    for start, stop in blocks:
        part, count = slice(start, stop), stop - start
        logits = [product(x[part], y.t(), z[:count]) for (x, y, *_), z in zip(heads, buffers, strict=True)]
        target = None if weights is None else weights[:count]
        kernel.kl(
            logits, scales, biases, problem.rows(part), None if target is None else upstream[part],
            None if found is None else found.extents, target, Rows(*(x[part] for x in rows)),
        )  # fmt: skip
        if found is not None:
            found.add(start, target, None)
        if bias_sums is not None:
            bias_sums += target.sum(0, dtype=torch.float32)
    if found is None:
        return Result(rows, (None, None, None))
    dq, dk, _ = found.results()
    db = None if bias_sums is None else (found.operands.undone(bias_sums) * scale).to(problem.bias.dtype)
    return Result(rows, (dq, dk, db))


RUNS: dict[str, Callable[..., Result]] = {"cpu": cpu, "triton": triton}
