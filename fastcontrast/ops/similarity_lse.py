"""Log-sum-exps of a similarity matrix that is never stored.

L_ij = scale · ⟨q_i, k_j⟩ + b_j,      r_i = log Σ_j exp L_ij,      c_j = log Σ_i exp L_ij

G_ij = g_i · exp(L_ij − r_i) + h_j · exp(L_ij − c_j)          for upstream gradients g of r and h of c
dq = scale · G k,   dk = scale · Gᵀ q,   db_j = Σ_i G_ij,   dscale = Σ_i ⟨(G k)_i, q_i⟩
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _check as check
from . import _sweep
from ._dispatch import choose, refuse_cpu, refuse_triton, register
from ._precision import no_second_backward, without_autocast
from ._sweep import Factor, Masks
from ._workspace import workspace_bytes

register("similarity_lse", {"cpu": refuse_cpu, "triton": refuse_triton})


# ---------------------------------------------------------------------------------------------------------- reference


def reference_logits(
    queries: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    scale: Tensor | float,
    key_bias: Tensor | None,  # [N]
    masks: Masks,
) -> Tensor:  # [M, N] fp32, or fp64 for fp64 inputs
    """The dense logits, −inf where masked: the definition that every implementation is tested against."""
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    logits = scale * (queries.to(dtype) @ keys.to(dtype).t())
    if key_bias is not None:
        logits = logits + key_bias.to(dtype)
    masked = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    if masks.query_ids is not None:
        masked |= masks.query_ids[:, None] == masks.key_ids[None, :]
    if masks.guide_queries is not None:
        guide = masks.guide_queries.to(dtype) @ masks.guide_keys.to(dtype).t()
        masked |= guide > masks.guide_limit[:, None]
    if masks.positives is not None:
        masked &= masks.positives[:, None] != torch.arange(keys.shape[0], device=keys.device)
    return logits.masked_fill(masked, float("-inf"))


def reference_lse(logits: Tensor, dim: int) -> Tensor:
    """logsumexp whose gradient is 0, not NaN, where everything is masked."""
    empty = torch.isneginf(logits).all(dim, keepdim=True)
    lse = torch.logsumexp(logits.masked_fill(empty, 0.0), dim)
    return lse.masked_fill(empty.squeeze(dim), float("-inf"))


@without_autocast
def _reference(queries, keys, scale, key_bias, masks, rows, columns, own, best) -> tuple[Tensor, ...]:
    logits = reference_logits(queries, keys, scale, key_bias, masks)
    dims = [dim for dim, wanted in ((1, rows), (0, columns)) if wanted]
    results = [reference_lse(logits, dim) for dim in dims]
    if own:
        results.append(own_logits(logits, masks.positives))
    if best:
        results += [first_best(logits, dim) for dim in dims]
    return tuple(results)


def own_logits(logits: Tensor, positives: Tensor) -> Tensor:
    """L_{i, positives[i]}, −inf where that is no key."""
    n = logits.shape[1]  # a column of −inf behind the last for rows without one: with no keys there is no other
    column = positives.masked_fill((positives < 0) | (positives >= n), n)
    padded = torch.nn.functional.pad(logits, (0, 1), value=float("-inf"))
    return padded.gather(1, column[:, None])[:, 0]


def first_best(logits: Tensor, dim: int) -> Tensor:
    if logits.shape[dim] == 0:
        return torch.full((logits.shape[1 - dim],), -1, dtype=torch.int64, device=logits.device)
    best = logits.detach().argmax(dim)
    return best.masked_fill(torch.isneginf(logits).all(dim), -1)


# -------------------------------------------------------------------------------------------- torch.library, autograd

_library = torch.library.Library("fastcontrast", "FRAGMENT")
_PROBLEM = (
    "Tensor queries, Tensor? keys, Tensor scale, Tensor? key_bias, Tensor? query_ids, Tensor? key_ids, "
    "Tensor? positives, Tensor? guide_queries, Tensor? guide_keys, Tensor? guide_limit"
)
_library.define(
    f"similarity_lse({_PROBLEM}, bool rows, bool columns, bool own, bool best, bool mix, SymInt keep)"
    " -> (Tensor rows, Tensor columns, Tensor own, Tensor rows_best, Tensor columns_best,"
    " Tensor rows_low, Tensor columns_low, Tensor kept, Tensor mix)"
)
_library.define(
    f"similarity_lse_backward({_PROBLEM}, Tensor? rows_gradient, Tensor? columns_gradient, Tensor? own_gradient,"
    " Tensor rows, Tensor columns,"
    " Tensor rows_low, Tensor columns_low, Tensor kept, Tensor mix, bool[4] needs)"
    " -> (Tensor queries, Tensor keys, Tensor scale, Tensor key_bias)"
)
N_PROBLEM = 10  # tensors that state the problem, first in both schemas


@without_autocast
def forward_cpu(queries, keys, scale, key_bias, *rest):
    masks, (rows, columns, wants_own, best, mix, keep) = Masks(*rest[:6]), rest[6:]
    sweep = _sweep.Sweep(queries, keys, scale, key_bias, masks)
    own = torch.full((sweep.m if wants_own else 0,), float("-inf"))
    nothing = torch.empty(0)
    if mix:
        r, mixed, *_ = _sweep.lse_and_mix(sweep, own, best)
        return r.high, nothing, own, r.best, r.best.new_empty(0), r.low, nothing.clone(), nothing.clone(), mixed
    r, c, kept = _sweep.lse(sweep, rows, columns, own, best, keep)
    if sweep.symmetric and wants_own:  # below the diagonal nothing was computed: there the own key's row has the logit
        own = torch.maximum(own, own.index_select(0, _mirror(masks.positives)))
    return r.high, c.high, own, r.best, c.best, r.low, c.low, kept, nothing


@without_autocast
def backward_cpu(queries, keys, scale, key_bias, *rest):
    masks = Masks(*rest[:6])
    g, h, p, r, c, r_low, c_low, kept, mix, needs = rest[6:]
    need_queries, need_keys, need_scale, need_bias = needs
    nothing = torch.empty(0)
    factor = Factor.of(scale)
    dq = dk = db = None
    if mix.numel():
        dq = mix.mul(g[:, None]) if g is not None else torch.zeros_like(mix)
        if p is not None and p.numel() and keys.shape[0]:
            column = masks.positives.clamp(0, keys.shape[0] - 1)
            p = p.masked_fill(masks.positives != column, 0.0)
            dq.addcmul_(p[:, None], keys.index_select(0, column).float())
        dq.mul_(factor.inside)
    else:
        sweep = _sweep.Sweep(queries, keys, scale, key_bias, masks)
        need_keys = need_keys and not sweep.symmetric
        if sweep.symmetric and p is not None and p.numel():
            p = p + p.index_select(0, _mirror(masks.positives))
        dq, dk, db = _sweep.gradients(
            sweep,
            None if g is None else (g.float().contiguous(), r, r_low),
            None if h is None else (h.float().contiguous(), c, c_low),
            None if p is None else p.float().contiguous(),
            factor.inside,
            kept,
            (*factor.sums((need_queries, need_keys, need_scale)), need_bias),
        )
    dscale = nothing.clone()
    if need_scale:
        # A symmetric G·K counts each pair in both orders.
        total = factor.scale_gradient(queries, keys, dq, dk) * (0.5 if keys is None else 1.0)
        dscale = torch.full((), total, dtype=scale.dtype)
    factor.finish(dq, dk)
    return (
        dq.to(queries.dtype) if need_queries else nothing,
        dk.to(keys.dtype) if need_keys and dk is not None else nothing.clone(),
        dscale,
        db.div_(factor.inside).to(key_bias.dtype) if need_bias else nothing.clone(),
    )


def _mirror(positives: Tensor) -> Tensor:
    """The row that holds row i's own logit in the other half of a symmetric matrix; i where there is none."""
    return torch.where(positives < 0, torch.arange(positives.shape[0]), positives)


def forward_triton(*arguments):
    from . import _device_sweep

    return _device_sweep.forward_triton(*arguments)


def backward_triton(*arguments):
    from . import _device_sweep

    return _device_sweep.backward_triton(*arguments)


PASSES = {"cpu": (forward_cpu, backward_cpu), "triton": (forward_triton, backward_triton)}


def _forward_fake(queries, keys, *rest):
    rows, columns, own, best, mix, keep = rest[8:]
    m, n = queries.shape[0], (queries if keys is None else keys).shape[0]

    def vector(count, dtype=torch.float32):
        return queries.new_empty(count, dtype=dtype)

    r, c = m if rows else 0, n if columns else 0
    return (
        vector(r),
        vector(c),
        vector(m if own else 0),
        vector(r if best else 0, torch.int64),
        vector(c if best else 0, torch.int64),
        vector(r),
        vector(c),
        vector((keep, n) if not mix else 0),
        vector(tuple(queries.shape) if mix else 0),
    )


def _backward_fake(queries, keys, scale, key_bias, *rest):
    needs = rest[-1]
    inputs = (queries, keys, scale, key_bias)
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format)
        if need and x is not None
        else queries.new_empty(0, dtype=torch.float32)
        for x, need in zip(inputs, needs, strict=True)
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:N_PROBLEM], *output[:2], *output[5:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])


def _backward(ctx, rows_gradient, columns_gradient, own_gradient, *unused, run=None):
    run = run or torch.ops.fastcontrast.similarity_lse_backward
    saved = ctx.saved_tensors
    needs = [*ctx.needs_input_grad[:4]]
    none = (None,) * (N_PROBLEM + 6)
    upstream = (rows_gradient, columns_gradient, own_gradient)
    if all(gradient is None for gradient in upstream):
        return none
    gradients = run(*saved[:N_PROBLEM], *upstream, *saved[N_PROBLEM:], needs)
    return (*(x if need else None for x, need in zip(gradients, needs, strict=True)), *none[4:])


for _name, _device in (("cpu", "CPU"), ("triton", "CUDA")):
    _library.impl("similarity_lse", PASSES[_name][0], _device)
    _library.impl("similarity_lse_backward", PASSES[_name][1], _device)
torch.library.register_fake("fastcontrast::similarity_lse", _forward_fake, lib=_library)
torch.library.register_fake("fastcontrast::similarity_lse_backward", _backward_fake, lib=_library)
torch.library.register_autograd("fastcontrast::similarity_lse", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd(
    "fastcontrast::similarity_lse_backward", no_second_backward("similarity_lse"), lib=_library
)


class _Eager(torch.autograd.Function):
    """The same autograd as the registered operation without its dispatch, which a small batch would feel."""

    @staticmethod
    def forward(ctx, *inputs):
        *inputs, (forward, ctx.run) = inputs
        output = forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *gradients):
        # Under create_graph=True the registered operation runs, whose own backward refuses: `once_differentiable` would
        # return detached gradients, and a penalty on them would silently count for nothing.
        return (*_backward(ctx, *gradients, run=None if torch.is_grad_enabled() else ctx.run), None)


# --------------------------------------------------------------------------------------------------------------- public


def similarity_lse(
    queries: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    scale: float | Tensor = 1.0,
    *,
    dim: str = "rows",
    key_bias: Tensor | None = None,  # [N]
    query_ids: Tensor | None = None,  # [M] integer
    key_ids: Tensor | None = None,  # [N] integer
    positives: Tensor | int | None = None,  # [M] integer
    guide: tuple[Tensor, Tensor, Tensor | float] | None = None,  # [M, Dg], [N, Dg], [M]
    workspace: int | None = None,
    implementation: str | None = None,
    return_positives: bool = False,
    return_best: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """r_i = log Σ_j exp L_ij of the rows and/or c_j = log Σ_i exp L_ij of the columns of

        L_ij = scale · ⟨q_i, k_j⟩ + key_bias_j,     −inf where (i, j) is masked.

    Equals `torch.logsumexp` of the dense matrix, with O(M + N) memory and gradients to queries, keys, scale, key_bias.

    Args:
        queries, keys: [M, D], [N, D]; float32, bfloat16 or float16 (float64: dense reference), any strides. When
            `keys is queries` and nothing breaks the symmetry (a bias, a guide, columns, `query_ids` that is not
            `key_ids`, positives that are not pairs), half of the products are saved.
        scale: number or 0-dim tensor (1 / temperature).
        dim: "rows" → r [M]; "columns" → c [N]; "both" → (r, c). float32, whatever the inputs (float64 for float64).
        query_ids, key_ids: pairs with equal ids are masked (false negatives, duplicates).
        positives: index of each row's own key, which is never masked; default i for row i; −1 protects none, so that
            `query_ids = key_ids = arange(N), positives=-1` removes the diagonal.
        guide: (guide_queries, guide_keys, limit): masked where ⟨guide_q_i, guide_k_j⟩ > limit_i. No gradient.
        workspace: bytes for tiles and kept logits; default `set_workspace`. More of it saves products in the backward.
        implementation: None (the best that can run), "cpu", "triton" or "reference".
        return_positives: also L_{i, positives[i]} [M], with its gradient in the same sweep: the difference
            Σ_j softmax_j k_j − k_own is then summed in float32 and rounded once. −inf where a row protects none.
        return_best: also the index of each row's (column's) largest logit, the first of equals, −1 if all is masked.

    A row with nothing left (or N = 0) gives −inf with gradient 0. NaN in a query or key gives NaN in its row (column).

    Raises: ValueError or TypeError naming the argument, what was expected and what came; NotImplementedError if the
    requested implementation cannot run, with the reason.
    """
    op = "similarity_lse"
    check.features(op, queries, keys)
    n, device = keys.shape[0], queries.device
    check.one_of(op, "dim", dim, ("rows", "columns", "both"))
    check.workspace(op, workspace)
    rows, columns = dim != "columns", dim != "rows"
    scale = check.scalar(op, "scale", scale, queries)
    if key_bias is not None:
        check.vector(op, "key_bias", key_bias, n, queries, floating=True)
    masks = check.masks(op, queries, keys, query_ids, key_ids, positives, guide, return_positives)
    chosen = choose(op, implementation, device, queries.dtype)

    if chosen == "reference":
        results = _reference(queries, keys, scale, key_bias, masks, rows, columns, return_positives, return_best)
        return results if len(results) > 1 else results[0]

    symmetric = key_bias is None and guide is None and not columns
    symmetric = symmetric and is_symmetric(queries, keys, query_ids, key_ids, positives)
    mix, keep = plan(queries, keys, scale, key_bias, masks, columns, symmetric, workspace)
    if chosen == "triton":  # it would spend the same products either way, and keeps nothing
        mix, keep = False, 0
    compiling = torch.compiler.is_compiling()
    run = torch.ops.fastcontrast.similarity_lse if compiling else _Eager.apply
    keys = None if symmetric else rows_contiguous(keys)
    r, c, own, r_best, c_best, *_ = run(
        rows_contiguous(queries),
        keys,
        scale,
        key_bias,
        *masks,
        rows,
        columns,
        return_positives,
        return_best,
        mix,
        keep,
        *(() if compiling else (PASSES[chosen],)),
    )
    outputs = ((r, rows), (c, columns), (own, return_positives), (r_best, rows and return_best))
    results = [x for x, wanted in (*outputs, (c_best, columns and return_best)) if wanted]
    return tuple(results) if len(results) > 1 else results[0]


class _Plan(NamedTuple):
    mix: bool  # form Σ_j softmax_j k_j in the forward: 2 products in all
    keep: int  # rows of logits kept for the backward: 3 products for them, 4 for the others


def plan(queries, keys, scale, key_bias, masks, columns, symmetric, workspace) -> _Plan:
    def needs(x: Any) -> bool:
        return isinstance(x, Tensor) and x.requires_grad

    differentiable = (queries, keys, scale, key_bias)
    if not torch.is_grad_enabled() or not any(needs(x) for x in differentiable):
        return _Plan(False, 0)
    if not columns and not symmetric and not needs(keys) and not needs(key_bias):
        return _Plan(True, 0)
    budget = workspace_bytes(workspace, queries.device)
    return _Plan(False, _sweep.kept_rows(queries.shape[0], keys.shape[0], budget, masks.guide_queries is not None))


def is_symmetric(queries, keys, query_ids, key_ids, positives) -> bool:
    """Whether L_ij = L_ji, masks included: one set against itself, own keys in pairs (i's is j, j's is i) if given."""
    if keys is not queries or query_ids is not key_ids:
        return False
    if not isinstance(positives, Tensor):
        return True
    if positives.is_cuda or torch.compiler.is_compiling():  # to look at the values would wait, or cannot be done
        return False
    mirror = _mirror(positives)
    return torch.equal(mirror.index_select(0, mirror), torch.arange(mirror.shape[0]))


def rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()
