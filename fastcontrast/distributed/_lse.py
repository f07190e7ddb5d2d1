"""Log-sum-exps of a similarity matrix whose queries and keys lie on several ranks.

Each rank's queries meet all keys, a block at a time (see `_exchange`). Row statistics stay; those of columns are merged
by log-sum-exp and come home with their keys. The backward is a second visit: with the statistics of the whole matrix,

    G_ij = g_i · exp(L_ij − r_i) + h_j · exp(L_ij − c_j)

is that of any block alone, so dq adds up where the queries are and dk comes home with the keys. Four products of a
rank's share of the matrix in all, and nothing of its size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcontrast import ops
from fastcontrast.ops import _check as check
from fastcontrast.ops._dispatch import choose
from fastcontrast.ops._precision import float32, refuse_second_gradient, without_autocast
from fastcontrast.ops._sweep import Masks
from fastcontrast.ops.similarity_lse import (
    PASSES,
    first_best,
    own_logits,
    reference_logits,
    reference_lse,
    rows_contiguous,
)

from ._collectives import Shards
from ._exchange import Best, Exchange, LogSumExp, Merge, Sum, active, visit, within


class _Problem(NamedTuple):
    exchange: Exchange
    held: Shards  # the keys
    chosen: str
    rows: bool
    columns: bool
    own: bool
    best: bool
    query_offset: int

    def block(self, masks: Masks, rows: slice, key_ids: Tensor | None, guide_keys: Tensor | None) -> Masks:
        """The masks of a block of keys: a row whose own key is elsewhere protects none here."""
        own = None if masks.positives is None else within(masks.positives, rows)
        return masks._replace(positives=own, key_ids=key_ids, guide_keys=guide_keys)


class _Statistics(NamedTuple):
    """Of a block: float64 where they are log-sum-exps and logits; None where not asked for."""

    rows: Tensor | None
    columns: Tensor | None
    own: Tensor | None
    rows_best: Tensor | None
    columns_best: Tensor | None


def _block_forward(problem: _Problem, queries, keys, scale, key_bias, masks: Masks) -> _Statistics:
    rows, columns, own, best = problem.rows, problem.columns, problem.own, problem.best
    if problem.chosen == "reference":
        logits = reference_logits(queries, keys, scale, key_bias, masks)
        of_own = own_logits(logits, masks.positives) if own else None
        lses, bests = ([of(logits, dim) for dim in (1, 0)] for of in (reference_lse, first_best))
        found = (*lses, of_own, *bests)
    else:
        forward = PASSES[problem.chosen][0]
        r, c, own_found, r_best, c_best, r_low, c_low, *_ = forward(
            rows_contiguous(queries), rows_contiguous(keys), scale, key_bias, *masks, rows, columns, own, best, False, 0
        )
        found = (r.double() + r_low, c.double() + c_low, own_found, r_best, c_best)
    wanted = rows, columns, own, rows and best, columns and best
    return _Statistics(*(x if want else None for x, want in zip(found, wanted, strict=True)))


def _block_backward(problem: _Problem, queries, keys, scale, key_bias, masks: Masks, g, h, p, r, c, needs):
    """Gradients of a block to queries, keys, scale and key_bias, None where not needed."""
    if problem.chosen == "reference":
        return _reference_backward(queries, keys, scale, key_bias, masks, g, h, p, r, c, needs)
    nothing = queries.new_empty(0, dtype=torch.float32)

    def two(x: Tensor | None) -> tuple[Tensor, Tensor]:
        if x is None:
            return nothing, nothing
        high = x.float()
        return high, torch.where(torch.isfinite(high), x - high, 0.0).float()

    (r, r_low), (c, c_low) = two(r), two(c)
    found = PASSES[problem.chosen][1](
        rows_contiguous(queries), rows_contiguous(keys), scale, key_bias, *masks,
        g, h, p, r, c, r_low, c_low, nothing, nothing, list(needs),
    )  # fmt: skip
    return [x if need else None for x, need in zip(found, needs, strict=True)]


@without_autocast
def _reference_backward(queries, keys, scale, key_bias, masks, g, h, p, r, c, needs):
    inputs = [None if x is None else x.detach().requires_grad_() for x in (queries, keys, scale, key_bias)]
    with torch.enable_grad():
        logits = reference_logits(*inputs, masks)
    values = logits.detach()
    weights = torch.zeros_like(values)
    if g is not None:
        weights += g[:, None] * (values - r[:, None]).exp()
    if h is not None:
        weights += h * (values - c).exp()
    weights = weights.masked_fill(torch.isneginf(values), 0.0)
    if p is not None:
        rows = torch.arange(len(values), device=values.device)[masks.positives >= 0]
        weights[rows, masks.positives[rows]] += p[rows]
    wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(logits, wanted, weights.to(logits.dtype)))
    return [next(found) if need else None for need in needs]


class _GlobalLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, keys, scale, key_bias, masks, problem):
        m, double = queries.shape[0], {"dtype": torch.float64, "device": queries.device}
        r, own = torch.full((m,), float("-inf"), **double), torch.full((m,), float("-inf"), **double)
        best = torch.tensor([[float("-inf"), float("inf")]], **double).expand(m, 2)
        columns = (LogSumExp,) * problem.columns + (Best,) * (problem.columns and problem.best)

        def work(rows, block):
            nonlocal r, own, best
            keys, key_bias, key_ids, guide_keys = block
            part = problem.block(masks, rows, key_ids, guide_keys)
            found = _block_forward(problem, queries, keys, scale, key_bias, part)
            if found.rows is not None:
                r = torch.logaddexp(r, found.rows.double())
            if found.own is not None:
                own = torch.maximum(own, found.own.double())
            if found.rows_best is not None:
                value = _logit(queries, keys, scale, key_bias, found.rows_best)
                best = Best.merge(best, torch.stack([value, found.rows_best.double() + rows.start], 1))
            totals = [] if found.columns is None else [found.columns.double()]
            if found.columns_best is not None:
                value = _logit(keys, queries, scale, None, found.columns_best)
                totals.append(torch.stack([value, found.columns_best.double() + problem.query_offset], 1))
            return totals

        travelling = keys, key_bias, masks.key_ids, masks.guide_keys
        c, *columns_best = visit(problem.exchange, problem.held, travelling, work, columns) or [r[:0]]
        ctx.save_for_backward(queries, keys, scale, key_bias, *masks, r, c)
        ctx.problem = problem
        results = [r if problem.rows else None, c if problem.columns else None, own if problem.own else None]
        results += [_index(best) if problem.rows and problem.best else None, *map(_index, columns_best)]
        ctx.mark_non_differentiable(*(x for x in results[3:] if x is not None))
        ctx.set_materialize_grads(False)
        return (*results, *[None] * (5 - len(results)))

    @staticmethod
    def backward(ctx, g, h, p, *_):
        refuse_second_gradient("similarity_lse on several ranks")
        queries, keys, scale, key_bias, *masks, r, c = ctx.saved_tensors
        masks, problem, needs = Masks(*masks), ctx.problem, ctx.needs_input_grad[:4]
        precision = torch.float64 if queries.dtype == torch.float64 else torch.float32
        g, h, p = (None if x is None else x.to(precision).contiguous() for x in (g, h, p))
        # Every rank takes part in the visit whatever of it this one needs.
        h = torch.zeros_like(c, dtype=precision) if h is None and problem.columns else h
        sums: list[Any] = [None, None]

        def work(rows, block):
            keys, key_bias, key_ids, guide_keys, h, c = block
            part = problem.block(masks, rows, key_ids, guide_keys)
            own = p if p is None else p.masked_fill(part.positives < 0, 0.0)
            statistics = (g, h, own, r if g is not None else None, c)
            dq, dk, dscale, dbias = _block_backward(problem, queries, keys, scale, key_bias, part, *statistics, needs)
            for i, x in enumerate((dq, dscale)):
                if x is not None:
                    sums[i] = x.to(precision) if sums[i] is None else sums[i].add_(x)
            return [x.to(precision) for x in (dk, dbias) if x is not None]

        travelling = (keys, key_bias, masks.key_ids, masks.guide_keys, h, c if problem.columns else None)
        home: tuple[Merge, ...] = (Sum,) * (needs[1] + needs[3])
        found = iter(visit(problem.exchange, problem.held, travelling, work, home))
        dk, dbias = (next(found) if need else None for need in (needs[1], needs[3]))
        gradients = (sums[0], dk, sums[1], dbias)
        inputs = (queries, keys, scale, key_bias)
        return (*(None if x is None else x.to(y.dtype) for x, y in zip(gradients, inputs, strict=True)), None, None)


def _logit(rows, candidates, scale, bias, index: Tensor) -> Tensor:
    """Logits of rows to the candidates of that index, −inf where it is −1; float64 [rows]."""
    if not candidates.shape[0]:
        return torch.full(index.shape, float("-inf"), dtype=torch.float64, device=rows.device)
    chosen = index.clamp(min=0)
    value = scale * torch.linalg.vecdot(float32(rows), float32(candidates).index_select(0, chosen))
    if bias is not None:
        value = value + bias.index_select(0, chosen)
    return value.double().masked_fill(index < 0, float("-inf"))


def _index(best: Tensor) -> Tensor:
    return best[:, 1].masked_fill(torch.isneginf(best[:, 0]), -1).long()


def similarity_lse(
    queries: Tensor,  # [m, D]
    keys: Tensor,  # [n, D]
    scale: float | Tensor = 1.0,
    *,
    dim: str = "rows",
    key_bias: Tensor | None = None,  # [n]
    query_ids: Tensor | None = None,  # [m] integer
    key_ids: Tensor | None = None,  # [n] integer
    positives: Tensor | int | None = None,  # [m] integer
    guide: tuple[Tensor, Tensor, Tensor | float] | None = None,  # [m, Dg], [n, Dg], [m]
    workspace: int | None = None,
    implementation: str | None = None,
    return_positives: bool = False,
    return_best: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`ops.similarity_lse`; inside `exchange`, of the matrix of all ranks' queries and keys, of which these are ours.

    r of this rank's queries against all keys, c of this rank's keys against all queries, float64. `positives` are
    indices of this rank's keys. `return_best` counts through all ranks' rows, less the number of those before this
    rank's: an index of this rank's own is as it is on one process.
    """
    how = active()
    if how is None:
        return ops.similarity_lse(
            queries, keys, scale, dim=dim, key_bias=key_bias, query_ids=query_ids, key_ids=key_ids,
            positives=positives, guide=guide, workspace=workspace, implementation=implementation,
            return_positives=return_positives, return_best=return_best,
        )  # fmt: skip
    op = "similarity_lse"
    check.features(op, queries, keys)
    check.one_of(op, "dim", dim, ("rows", "columns", "both"))
    check.workspace(op, workspace)
    scale = check.scalar(op, "scale", scale, queries)
    if key_bias is not None:
        check.vector(op, "key_bias", key_bias, keys.shape[0], queries, floating=True)
    masks = check.masks(op, queries, keys, query_ids, key_ids, positives, guide, return_positives)
    chosen = choose(op, implementation, queries.device, queries.dtype)
    of_queries = how.shards(queries.shape[0], queries.device)
    held = of_queries if keys is queries else how.shards(keys.shape[0], keys.device)
    if masks.positives is not None:
        masks = masks._replace(positives=torch.where(masks.positives < 0, -1, masks.positives + held.offset))
    rows, columns = dim != "columns", dim != "rows"
    problem = _Problem(how, held, chosen, rows, columns, return_positives, return_best, of_queries.offset)
    r, c, own, r_best, c_best = _GlobalLse.apply(queries, keys, scale, key_bias, masks, problem)
    if r_best is not None:
        r_best = r_best - held.offset
    if c_best is not None:
        c_best = c_best - of_queries.offset
    results = [x for x in (r, c, own, r_best, c_best) if x is not None]
    return tuple(results) if len(results) > 1 else results[0]
