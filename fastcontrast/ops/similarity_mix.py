"""Softmax-weighted means of values under a similarity matrix that is never stored.

L_ij = scale · ⟨q_i, k_j⟩ + b_j,      r_i = log Σ_j exp L_ij,      P_ij = exp(L_ij − r_i),      out_i = Σ_j P_ij v_j

dS_ij = P_ij · (⟨dout_i, v_j⟩ − ⟨dout_i, out_i⟩ + g_i)          for upstream gradients dout of out and g of r
dv = Pᵀ dout,   dq = scale · dS k,   dk = scale · dSᵀ q,   db_j = Σ_i dS_ij,   dscale = Σ_i ⟨(dS k)_i, q_i⟩
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check as check
from . import _sweep
from ._dispatch import choose, register_through
from ._precision import no_second_backward, without_autocast
from ._sweep import Factor, Masks
from ._workspace import workspace_bytes
from .similarity_lse import reference_logits, reference_lse, rows_contiguous

register_through("similarity_mix", "similarity_lse")


@without_autocast
def _reference(queries, keys, scale, key_bias, masks, values) -> tuple[Tensor, Tensor]:
    logits = reference_logits(queries, keys, scale, key_bias, masks)
    lse = reference_lse(logits, 1)
    # Against 0 each weight of a row with nothing left is 0, where −inf − −inf would be NaN.
    weights = torch.exp(logits - lse.masked_fill(torch.isneginf(lse), 0.0)[:, None])
    return weights @ values.to(weights.dtype), lse


# -------------------------------------------------------------------------------------------- torch.library, autograd

_library = torch.library.Library("fastcontrast", "FRAGMENT")
_PROBLEM = (
    "Tensor queries, Tensor keys, Tensor scale, Tensor? key_bias, Tensor? query_ids, Tensor? key_ids, "
    "Tensor? positives, Tensor? guide_queries, Tensor? guide_keys, Tensor? guide_limit, Tensor values"
)
_library.define(
    f"similarity_mix({_PROBLEM}, SymInt keep) -> (Tensor mix, Tensor lse, Tensor low, Tensor kept, Tensor shares)"
)
_library.define(
    f"similarity_mix_backward({_PROBLEM}, Tensor? mix_gradient, Tensor? lse_gradient,"
    " Tensor mix, Tensor lse, Tensor low, Tensor kept, Tensor shares, bool[5] needs)"
    " -> (Tensor queries, Tensor keys, Tensor scale, Tensor key_bias, Tensor values)"
)
N_PROBLEM = 11  # tensors that state the problem, first in both schemas
DIFFERENTIABLE = (0, 1, 2, 3, 10)  # queries, keys, scale, key_bias, values among them


@without_autocast
def forward_cpu(queries, keys, scale, key_bias, *rest):
    masks, (values, keep) = Masks(*rest[:6]), rest[6:]
    sweep = _sweep.Sweep(queries, keys, scale, key_bias, masks)
    r, mix, kept, shares = _sweep.lse_and_mix(sweep, torch.empty(0), False, values, keep)
    return mix, r.high, r.low, kept, shares


@without_autocast
def backward_cpu(queries, keys, scale, key_bias, *rest):
    masks = Masks(*rest[:6])
    values, upstream, g, mix, high, low, kept, shares, needs = rest[6:]
    _, _, need_scale, need_bias, need_values = needs
    sweep = _sweep.Sweep(queries, keys, scale, key_bias, masks)
    factor = Factor(float(scale), 1.0)
    through = (*factor.sums(needs), need_bias)
    if upstream is None:  # a loss that looks at the log-sum-exps alone
        rows = (g.float().contiguous(), high, low)
        dq, dk, db = _sweep.gradients(sweep, rows, None, None, 1.0, kept[:0], through)
        dv = torch.zeros(values.shape) if need_values else None
    else:
        upstream = upstream.float().contiguous()
        delta = torch.linalg.vecdot(upstream, mix)
        if g is not None:
            delta -= g
        softmax = (high, low), (kept, shares)
        dq, dk, db, dv = _sweep.mix_gradients(sweep, values, upstream, delta, *softmax, (*through, need_values))
    dscale = None
    if need_scale:
        dscale = torch.full((), factor.scale_gradient(queries, keys, dq, dk), dtype=scale.dtype)
    factor.finish(dq, dk)
    return _as_outputs((dq, dk, dscale, db, dv), (queries, keys, scale, key_bias, values), needs)


def forward_triton(queries, keys, scale, key_bias, *rest):
    from . import _device_sweep

    masks, (values, _) = Masks(*rest[:6]), rest[6:]
    high, low, out = _device_sweep.mix(queries, keys, values, scale, key_bias, masks)
    kept, shares = (out.new_empty(0, count) for count in (keys.shape[0], 0))
    return out, high, low, kept, shares


def backward_triton(queries, keys, scale, key_bias, *rest):
    from . import _device_sweep

    masks = Masks(*rest[:6])
    values, upstream, g, mix, high, low, _, _, needs = rest[6:]
    problem, inputs = (queries, keys, values, scale, key_bias, masks), (queries, keys, scale, key_bias, values)
    return _as_outputs(_device_sweep.mix_backward(*problem, upstream, g, mix, high, low, tuple(needs)), inputs, needs)


PASSES = {"cpu": (forward_cpu, backward_cpu), "triton": (forward_triton, backward_triton)}


def _as_outputs(gradients, inputs, needs) -> tuple[Tensor, ...]:
    """Gradients in the dtypes of their inputs; for those not needed, empty tensors."""
    return tuple(
        gradient.to(x.dtype) if need else inputs[0].new_empty(0, dtype=torch.float32)
        for gradient, x, need in zip(gradients, inputs, needs, strict=True)
    )


def _forward_fake(queries, keys, *rest):
    values, keep = rest[8:]
    m, n = queries.shape[0], keys.shape[0]
    blocks = (n + _sweep.COLUMNS - 1) // _sweep.COLUMNS if keep else 0
    shapes = ((m, values.shape[1]), m, m, (keep, n), (blocks, keep))
    return tuple(queries.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _backward_fake(*arguments):
    inputs, needs = [arguments[i] for i in DIFFERENTIABLE], arguments[-1]
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format)
        if need
        else inputs[0].new_empty(0, dtype=torch.float32)
        for x, need in zip(inputs, needs, strict=True)
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:N_PROBLEM], *output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx, mix_gradient, lse_gradient, *unused, run=None):
    run = run or torch.ops.fastcontrast.similarity_mix_backward
    results = [None] * (N_PROBLEM + 1)
    if mix_gradient is None and lse_gradient is None:
        return tuple(results)
    saved = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in DIFFERENTIABLE]
    gradients = run(*saved[:N_PROBLEM], mix_gradient, lse_gradient, *saved[N_PROBLEM:], needs)
    for i, need, gradient in zip(DIFFERENTIABLE, needs, gradients, strict=True):
        results[i] = gradient if need else None
    return tuple(results)


for _name, _device in (("cpu", "CPU"), ("triton", "CUDA")):
    _library.impl("similarity_mix", PASSES[_name][0], _device)
    _library.impl("similarity_mix_backward", PASSES[_name][1], _device)
torch.library.register_fake("fastcontrast::similarity_mix", _forward_fake, lib=_library)
torch.library.register_fake("fastcontrast::similarity_mix_backward", _backward_fake, lib=_library)
torch.library.register_autograd("fastcontrast::similarity_mix", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd(
    "fastcontrast::similarity_mix_backward", no_second_backward("similarity_mix"), lib=_library
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
        # Under create_graph=True the registered operation runs, whose own backward refuses.
        return (*_backward(ctx, *gradients, run=None if torch.is_grad_enabled() else ctx.run), None)


# --------------------------------------------------------------------------------------------------------------- public


def similarity_mix(
    queries: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    values: Tensor,  # [N, Dv]
    scale: float | Tensor = 1.0,
    *,
    key_bias: Tensor | None = None,  # [N]
    query_ids: Tensor | None = None,  # [M] integer
    key_ids: Tensor | None = None,  # [N] integer
    positives: Tensor | int | None = None,  # [M] integer
    guide: tuple[Tensor, Tensor, Tensor | float] | None = None,  # [M, Dg], [N, Dg], [M]
    workspace: int | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """out_i = Σ_j softmax_j(L_ij) · v_j [M, Dv] of

        L_ij = scale · ⟨q_i, k_j⟩ + key_bias_j,     −inf where (i, j) is masked.

    Equals `torch.softmax(L, 1) @ values` and, without masks, `F.scaled_dot_product_attention` of one head, with
    O(M + N) memory beside the result: soft retrieval from a bank, a teacher's mean of keys, attention with ids.

    Args:
        queries, keys: as for `similarity_lse`, which also says what scale, key_bias, the ids, positives and guide do.
        values: [N, Dv], any width, of the dtype of the queries; may be the keys.
        workspace: bytes for tiles and kept weights; default `set_workspace`. More of it saves products in the backward.
        implementation: chosen as for `similarity_lse`.
        return_lse: also r_i = log Σ_j exp L_ij [M], float32, with its gradient: (out, r) of parts of a bank merge to
            those of the whole, Σ_p softmax_p(r_p) · out_p and logsumexp_p r_p.

    Gradients to queries, keys, values, scale, key_bias, and only the products that those asked for need: 2 of M·N·D
    in the forward, 2 in the backward for values alone, 5 for all, one less where the weights were kept. Sums are in
    float32 and rounded once, to the dtype of the values. A row with nothing left (or N = 0) gives 0 and gradient 0.
    NaN in a query gives NaN in its row, in a key or value in every row: as in dense code, 0 · NaN is NaN.

    Raises: ValueError or TypeError naming the argument, what was expected and what came; NotImplementedError if the
    requested implementation cannot run, with the reason.
    """
    op = "similarity_mix"
    check.features(op, queries, keys)
    _check_values(op, queries, keys, values)
    check.workspace(op, workspace)
    scale = check.scalar(op, "scale", scale, queries)
    if key_bias is not None:
        check.vector(op, "key_bias", key_bias, keys.shape[0], queries, floating=True)
    masks = check.masks(op, queries, keys, query_ids, key_ids, positives, guide, False)
    chosen = choose(op, implementation, queries.device, queries.dtype)

    if chosen == "reference":
        out, lse = _reference(queries, keys, scale, key_bias, masks, values)
    else:
        # Triton keeps nothing.
        keep = _kept_rows((queries, keys, scale, key_bias, values), masks, workspace) if chosen == "cpu" else 0
        tensors = (rows_contiguous(queries), rows_contiguous(keys), scale, key_bias, *masks, rows_contiguous(values))
        if torch.compiler.is_compiling():
            out, lse, *_ = torch.ops.fastcontrast.similarity_mix(*tensors, keep)
        else:
            out, lse, *_ = _Eager.apply(*tensors, keep, PASSES[chosen])
    out = out.to(values.dtype)
    return (out, lse) if return_lse else out


def _check_values(op: str, queries: Tensor, keys: Tensor, values) -> None:
    check.matrix(op, "values", values)
    if values.shape[0] != keys.shape[0]:
        raise ValueError(f"{op}: values must be [{keys.shape[0]}, Dv] to match keys, got {list(values.shape)}")
    check.same_kind(op, "values", values, queries)


def _kept_rows(inputs, masks: Masks, workspace: int | None) -> int:
    """Rows whose weights the forward keeps: the backward then needs neither their product nor their exponentials."""
    queries, keys = inputs[:2]
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in inputs):
        return 0
    m, n = queries.shape[0], keys.shape[0]
    slopes = 4 * min(m, _sweep.ROWS) * min(n, _sweep.COLUMNS)  # the backward's second tile
    budget = workspace_bytes(workspace, queries.device) - slopes
    return _sweep.kept_rows(m, n, max(0, budget), masks.guide_queries is not None)
