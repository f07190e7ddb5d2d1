"""Sigmoid (SigLIP) loss of a similarity matrix that is never stored.

    L_ij = scale · ⟨q_i, k_j⟩ + bias,     S_i = Σ_j y_ij · softplus(−L_ij) + (1 − y_ij) · softplus(L_ij),     0 ≤ y ≤ 1

    G_ij = g_i · (σ(L_ij) − y_ij)          for an upstream gradient g of S
    dq = scale · G k,   dk = scale · Gᵀ q,   dscale = Σ_i ⟨(G k)_i, q_i⟩,   dbias = Σ_ij G_ij

Nothing is normalised over the matrix, so a sum over rows gets value and gradients from one sweep of three products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _check as check
from . import _sweep
from ._dispatch import choose, refuse_cpu, refuse_triton, register
from ._formed import formed
from ._precision import no_second_backward, refuse_second_gradient, without_autocast
from ._sweep import Factor, Masks, Targets
from .similarity_lse import reference_logits, rows_contiguous

register("similarity_softplus", {"cpu": refuse_cpu, "triton": refuse_triton})


# ---------------------------------------------------------------------------------------------------------- reference


@without_autocast
def _reference(queries, keys, scale, bias, masks: Masks, targets: Targets) -> Tensor:  # [M]
    """Of the dense logits: the definition."""
    logits = reference_logits(queries, keys, scale, None, masks)
    masked = torch.isneginf(logits)
    logits = logits.masked_fill(masked, 0.0) + bias.to(logits.dtype)
    y = _dense_targets(queries, keys, masks, targets).to(logits.dtype)
    return (y * F.softplus(-logits) + (1 - y) * F.softplus(logits)).masked_fill(masked, 0.0).sum(1)


def _dense_targets(queries, keys, masks: Masks, targets: Targets) -> Tensor:  # [M, N]
    if targets.dense is not None:
        return targets.dense
    if targets.query_labels is not None:
        positive = targets.query_labels[:, None] == targets.key_labels
    else:
        own = masks.positives
        if own is None:
            own = torch.full((queries.shape[0],), -1, device=queries.device)
        positive = own[:, None] == torch.arange(keys.shape[0], device=keys.device)
    return torch.where(positive, targets.high, targets.low)


# -------------------------------------------------------------------------------------------------------- one sweep


@without_autocast
def sweep_cpu(queries, keys, scale, bias, masks: Masks, targets: Targets, gradient: Tensor | None, needs):
    """Rows S [M]; for row weights `gradient` [M] also the gradients of Σ_i gradient_i S_i, None where not needed."""
    bias_row = bias.detach().float().expand(keys.shape[0]).contiguous()
    sweep = _sweep.Sweep(queries, keys, scale, bias_row, masks)
    if gradient is None:
        return _sweep.softplus(sweep, targets, None, 1.0, (False, False))[0], (None,) * 4
    need_queries, _, need_scale, need_bias = needs
    factor = Factor.of(scale)
    wants = factor.sums(needs)
    rows, dq, dk, sums = _sweep.softplus(sweep, targets, gradient.float().contiguous(), factor.inside, wants)
    dscale = dbias = None
    if need_scale:
        dscale = torch.full((), factor.scale_gradient(queries, keys, dq, dk), dtype=scale.dtype)
    if need_bias:
        dbias = (sums.sum(dtype=torch.float64) / factor.inside).to(bias.dtype)
    factor.finish(dq, dk)
    return rows, (dq if need_queries else None, dk, dscale, dbias)


def sweep_triton(*arguments):
    from . import _device_sweep

    return _device_sweep.softplus(*arguments)


SWEEPS = {"cpu": sweep_cpu, "triton": sweep_triton}


# -------------------------------------------------------------------------------------------- torch.library, autograd

_library = torch.library.Library("fastcontrast", "FRAGMENT")
_PROBLEM = (
    "Tensor queries, Tensor keys, Tensor scale, Tensor bias, Tensor? query_ids, Tensor? key_ids, Tensor? positives, "
    "Tensor? guide_queries, Tensor? guide_keys, Tensor? guide_limit, Tensor? query_labels, Tensor? key_labels, "
    "Tensor? targets, float high, float low"
)
_library.define(f"similarity_softplus({_PROBLEM}) -> Tensor")
_library.define(
    f"similarity_softplus_backward({_PROBLEM}, Tensor gradient, bool[4] needs)"
    " -> (Tensor queries, Tensor keys, Tensor scale, Tensor bias)"
)


def _forward(sweep):
    def forward(queries, keys, scale, bias, *rest):
        return sweep(queries, keys, scale, bias, Masks(*rest[:6]), Targets(*rest[6:]), None, None)[0]

    return forward


def _gradients(sweep):
    def gradients(queries, keys, scale, bias, *rest):
        *problem, gradient, needs = rest
        inputs = (queries, keys, scale, bias)
        found = sweep(*inputs, Masks(*problem[:6]), Targets(*problem[6:]), gradient, needs)[1]
        return tuple(
            queries.new_empty(0, dtype=torch.float32) if not need else x.to(like.dtype)
            for x, like, need in zip(found, inputs, needs, strict=True)
        )

    return gradients


def _gradients_fake(*arguments):
    needs, like = arguments[-1], arguments[0]
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else like.new_empty(0, dtype=torch.float32)
        for x, need in zip(arguments[:4], needs, strict=True)
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:13])
    ctx.values = inputs[13:]


def _backward(ctx, gradient, run=None):
    run = run or torch.ops.fastcontrast.similarity_softplus_backward
    needs = [*ctx.needs_input_grad[:4]]
    gradients = run(*ctx.saved_tensors, *ctx.values, gradient, needs)
    return (*(x if need else None for x, need in zip(gradients, needs, strict=True)), *(None,) * 11)


for _device, _sweep_of in (("CPU", sweep_cpu), ("CUDA", sweep_triton)):
    _library.impl("similarity_softplus", _forward(_sweep_of), _device)
    _library.impl("similarity_softplus_backward", _gradients(_sweep_of), _device)
torch.library.register_fake(
    "fastcontrast::similarity_softplus",
    lambda queries, *rest: queries.new_empty(queries.shape[0], dtype=torch.float32),
    lib=_library,
)
torch.library.register_fake("fastcontrast::similarity_softplus_backward", _gradients_fake, lib=_library)
torch.library.register_autograd(
    "fastcontrast::similarity_softplus", _backward, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd(
    "fastcontrast::similarity_softplus_backward", no_second_backward("similarity_softplus"), lib=_library
)


class _Eager(torch.autograd.Function):
    """The same autograd as the registered operation without its dispatch, which a small batch would feel."""

    @staticmethod
    def forward(ctx, *inputs):
        *problem, sweep = inputs
        _setup_context(ctx, problem, None)
        ctx.sweep = sweep
        return _forward(sweep)(*problem)

    @staticmethod
    def backward(ctx, gradient):
        refuse_second_gradient("similarity_softplus", reference=True)
        return (*_backward(ctx, gradient, run=_gradients(ctx.sweep)), None)


# --------------------------------------------------------------------------------------------------------------- public


def similarity_softplus(
    queries: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    *,
    query_labels: Tensor | None = None,  # [M] integer
    key_labels: Tensor | None = None,  # [N] integer
    targets: Tensor | None = None,  # [M, N]
    label_smoothing: float = 0.0,
    positives: Tensor | int | None = None,  # [M] integer
    query_ids: Tensor | None = None,  # [M] integer
    key_ids: Tensor | None = None,  # [N] integer
    guide: tuple[Tensor, Tensor, Tensor | float] | None = None,  # [M, Dg], [N, Dg], [M]
    weights: Tensor | None = None,  # [M]
    reduction: str = "none",
    implementation: str | None = None,
) -> Tensor:
    """S_i = Σ_j y_ij · softplus(−L_ij) + (1 − y_ij) · softplus(L_ij),     L_ij = scale · ⟨q_i, k_j⟩ + bias,

    where y_ij = 1 for a positive pair and 0 for another: −Σ_j log σ(±L_ij), SigLIP's loss of row i. Masked pairs count
    for nothing. Equals `F.binary_cross_entropy_with_logits(L, y, reduction="none").sum(1)`, with O(M + N) memory and
    gradients to queries, keys, scale and bias.

    Args:
        queries, keys: [M, D], [N, D]; float32, bfloat16 or float16 (float64: dense reference), any strides.
        scale, bias: numbers or 0-dim tensors.
        positives: index of each row's own key, its positive; default i for row i; −1 none. Never masked.
        query_labels, key_labels: instead, pairs with equal labels are the positives (several a row, or none), or
        targets: [M, N], the y_ij themselves in [0, 1], any floating dtype or bool; read a tile at a time. No gradient.
        label_smoothing: ε; positives and negatives become 1 − ε/2 and ε/2. Not with `targets`.
        query_ids, key_ids, guide: masks, as in `similarity_lse`.
        weights: [M], factors of the S_i in a sum or mean; a gradient to them needs reduction="none".
        reduction: "none" → S [M], any upstream gradient, four products in all; "sum" → Σ_i weights_i S_i, three;
            "mean" → the sum / M, 0 for M = 0.
        implementation: None (the best that can run), "cpu", "triton" or "reference".

    Returns float32 whatever the inputs (float64 for float64). NaN in a query gives NaN in its row.
    Raises: ValueError or TypeError naming the argument, what was expected and what came; NotImplementedError if the
    requested implementation cannot run, with the reason.
    Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training".
    """
    op = "similarity_softplus"
    check.features(op, queries, keys)
    check.one_of(op, "reduction", reduction, ("mean", "sum", "none"))
    scale, bias = (check.scalar(op, name, x, queries) for name, x in (("scale", scale), ("bias", bias)))
    given = _targets(op, queries, keys, query_labels, key_labels, targets, label_smoothing)
    labelled = given.query_labels is not None or given.dense is not None
    own = not labelled and (positives is None or isinstance(positives, Tensor))
    masks = check.masks(op, queries, keys, query_ids, key_ids, positives, guide, own)
    if weights is not None:
        if reduction == "none":
            raise ValueError(f"{op}: weights go with reduction 'mean' or 'sum', got 'none'")
        check.vector(op, "weights", weights, queries.shape[0], queries, floating=True)
        if weights.requires_grad:
            raise ValueError(f"{op}: weights must not require a gradient; multiply the rows of reduction='none'")
    chosen = choose(op, implementation, queries.device, queries.dtype)
    if chosen == "reference":
        rows = _reference(queries, keys, scale, bias, masks, given)
        return _reduced(rows, weights, reduction)
    inputs = (rows_contiguous(queries), rows_contiguous(keys), scale, bias)
    if torch.compiler.is_compiling():
        rows = torch.ops.fastcontrast.similarity_softplus(*inputs, *masks, *given)
    elif reduction == "none":
        return _Eager.apply(*inputs, *masks, *given, SWEEPS[chosen])
    else:
        return formed(_total(SWEEPS[chosen], masks, given, weights, reduction), *inputs, op=op)
    return _reduced(rows, weights, reduction)


def _reduced(rows: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    if reduction == "none":
        return rows
    total = (rows if weights is None else rows * weights).sum(dtype=torch.float64).to(rows.dtype)
    return total if reduction == "sum" else total / max(rows.shape[0], 1)


def _total(sweep, masks: Masks, targets: Targets, weights: Tensor | None, reduction: str):
    """The sum or mean of weights_i S_i and its gradients from one sweep, for `formed`."""

    def run(inputs, needs):
        m, g = inputs[0].shape[0], None
        if any(needs):
            each = 1.0 if reduction == "sum" else 1.0 / max(m, 1)
            g = torch.full((m,), each, device=inputs[0].device) if weights is None else weights.float() * each
        rows, gradients = sweep(*inputs, masks, targets, g, needs)
        return _reduced(rows, weights, reduction), gradients

    return run


def _targets(op: str, queries, keys, query_labels, key_labels, targets: Any, label_smoothing: float) -> Targets:
    if (query_labels is None) != (key_labels is None):
        missing = "key_labels" if key_labels is None else "query_labels"
        raise ValueError(f"{op}: query_labels and key_labels go together, got no {missing}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must lie in [0, 1], got {label_smoothing}")
    m, n = queries.shape[0], keys.shape[0]
    if targets is not None:
        if query_labels is not None or label_smoothing:
            raise ValueError(f"{op}: targets cannot go with labels or label_smoothing")
        if not isinstance(targets, Tensor) or not (targets.is_floating_point() or targets.dtype == torch.bool):
            got = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
            raise TypeError(f"{op}: targets must be a floating-point or bool tensor, got {got}")
        if targets.shape != (m, n):
            raise ValueError(f"{op}: targets must be [{m}, {n}], got {list(targets.shape)}")
        check.same_kind(op, "targets", targets, queries, dtype=False)
        return Targets(dense=targets.detach())
    values = (1.0 - label_smoothing / 2, label_smoothing / 2)
    if query_labels is None:
        return Targets(None, None, None, *values)
    check.vector(op, "query_labels", query_labels, m, queries, floating=False)
    check.vector(op, "key_labels", key_labels, n, queries, floating=False)
    return Targets(query_labels.long().contiguous(), key_labels.long().contiguous(), None, *values)
