"""Mean cross entropy of rows, or of rows and columns, against each row's own column or those of its label.

    loss = mean_i w_i (r_i − p_i)      or      mean_i (½ r_i + ½ c_i − p_i)      r, c, p of `similarity_lse`
    loss = mean_i (r_i − 1/|P(i)| Σ_{p ∈ P(i)} L_ip)                             P(i): the keys of row i's label

The same sweep and numbers as the algebra on `similarity_lse`, as one node of the graph instead of four: a batch
of 128 feels them. The differences are summed in double, so that a nearly solved batch keeps the digits of its loss.

Of rows alone the upstream gradient of each is known before the backward. A chunk of rows, whose logits fit into the
workspace, then gets its gradients at once: three products for any number of rows and columns, where a backward that
computes logits again takes four.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _check as check
from . import _sweep
from ._dispatch import native, note, select
from ._formed import formed
from ._precision import float32, refuse_second_gradient, without_autocast
from ._segments import against_positives, positive_sums
from ._sweep import Factor, Masks, address
from ._workspace import workspace_bytes
from .similarity_lse import backward_cpu, forward_cpu, is_symmetric, plan, rows_contiguous, similarity_lse


def algebra(queries, keys, scale, both: bool, labels: Labels, weights: Tensor | None, reduction, **settings) -> Tensor:
    """What every other form must equal."""
    if labels.queries is None:
        run = {"dim": "both" if both else "rows", "return_positives": True, **settings}
        *lses, own = similarity_lse(queries, keys, scale, **run)
        losses = (torch.lerp(*lses, 0.5) if both else lses[0]) - own
        losses = losses if weights is None else losses * weights
        return losses.mean() if reduction == "mean" else losses.sum()
    lse = similarity_lse(queries, keys, scale, **{**settings, "positives": -1})
    ids = settings["query_ids"], settings["key_ids"]
    sums = positive_sums(float32(queries), float32(keys), scale, settings["key_bias"], *labels, *ids)
    losses, valid = against_positives(lse, *sums)
    return losses.sum() / valid.sum().clamp(min=1)


class Labels(NamedTuple):
    queries: Tensor | None  # [M] int64
    keys: Tensor | None  # [N] int64


class _MeanLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, keys, scale, key_bias, masks, both, mix, keep):
        r, c, own, _, _, r_low, c_low, kept, mixed = forward_cpu(
            queries, keys, scale, key_bias, *masks, True, both, True, False, mix, keep
        )
        ctx.save_for_backward(queries, keys, scale, key_bias, *masks, r, c, r_low, c_low, kept, mixed)
        ctx.both = both
        columns = (c.data_ptr(), c_low.data_ptr()) if both else (0, 0)
        m = queries.shape[0]
        total = native.loss_sum(own.data_ptr(), r.data_ptr(), r_low.data_ptr(), *columns, m)
        return torch.full((), total / m, dtype=torch.float32)

    @staticmethod
    def backward(ctx, gradient):
        refuse_second_gradient("similarity_cross_entropy", reference=True)
        *problem, r, c, r_low, c_low, kept, mixed = ctx.saved_tensors
        m = r.shape[0]
        each = gradient.item() / m
        g = torch.full((m,), each / 2 if ctx.both else each)
        gradients = backward_cpu(
            *problem, g, g if ctx.both else None, torch.full((m,), -each), r, c, r_low, c_low, kept, mixed,
            ctx.needs_input_grad[:4],
        )  # fmt: skip
        needs = ctx.needs_input_grad[:4]
        return (*(x if need else None for x, need in zip(gradients, needs, strict=True)), None, None, None, None)


# Thinner chunks read and write the gradient of all keys so often that a fourth product costs no more: of 49,152 keys,
# D = 576, chunks of 128 rows take 1.33 times as long as whole products, of 341 rows 1.06 times.
MIN_ROWS = 128


def _chunk_rows(m: int, n: int, workspace: int, guided: bool) -> int:
    """Rows of a chunk whose logits fit into `workspace` bytes, at most; 0 if that is too few."""
    tile = 4 * _sweep.ROWS * _sweep.COLUMNS if guided else 0
    most = max(0, workspace - tile) // (4 * n) if n else m
    return most if most >= min(m, MIN_ROWS) else 0


class _RowLoss:
    """Σ_i w_i (r_i − p_i) / divisor and its gradients, for `formed`."""

    def __init__(self, masks: Masks, weights: Tensor | None, divisor: int, rows: int):
        self.masks, self.weights, self.divisor, self.rows = masks, weights, divisor, rows

    def __call__(self, inputs: tuple[Tensor | None, ...], needs: tuple[bool, ...]) -> tuple[Tensor, tuple]:
        queries, keys, scale, key_bias = inputs
        need_queries, _, need_scale, need_bias = needs
        m, loss, factor = queries.shape[0], 0.0, Factor.of(scale)
        sums = _sweep.Sums.new(queries, keys, (*factor.sums(needs), need_bias))
        for start, stop in _sweep.chunks(m, self.rows if any(needs) else m):
            part = slice(start, stop)
            sweep = _sweep.Sweep(queries[part], keys, scale, key_bias, _rows_of(self.masks, part)).widened()
            loss += self._chunk(sweep, part, factor.inside, sums.rows(start, stop), any(needs))
        dq, dk, db = sums[:3]
        dscale = torch.full((), factor.scale_gradient(queries, keys, dq, dk)) if need_scale else None
        factor.finish(dq, dk)
        db = db if db is None else db.div_(factor.inside)
        return torch.full((), loss / self.divisor), (dq if need_queries else None, dk, dscale, db)

    def _chunk(self, sweep: _sweep.Sweep, part: slice, factor: float, sums: _sweep.Sums, gradients: bool) -> float:
        own = torch.full((sweep.m,), float("-inf"))
        weights = torch.ones(sweep.m) if self.weights is None else self.weights[part]
        if gradients:
            mix = sums.queries
            values = sweep.keys if mix is not None else sweep.keys[:, :0]  # nothing to mix
            r, mix, *softmax = _sweep.lse_and_mix(sweep, own, False, values, sweep.m, without_own=True, out=mix)
        else:
            r, *_ = _sweep.lse(sweep, True, False, own, False, 0)
        losses = r.high.double() - own + r.low
        if gradients:
            # p - 1 of a row's own key apart from the others: of a row that is nearly solved it keeps its digits.
            each, own_weights = weights * (factor / self.divisor), torch.special.expm1(-losses).float()
            _sweep.add_softmax_gradients(sweep, each, each * own_weights, mix, softmax, sums)
        return float(losses.dot(weights.double()))


def _rows_of(masks: Masks, part: slice) -> Masks:
    rows = ("query_ids", "positives", "guide_queries", "guide_limit")
    of_rows = {name: getattr(masks, name) for name in rows}
    return masks._replace(**{name: None if x is None else x[part] for name, x in of_rows.items()})


# Logits of 4 MiB at the most, and their gradient as much again: beyond, tiles cost as little.
SMALL = 1 << 20


class _SmallLoss(torch.autograd.Function):
    """The same for a small float32 problem: its logits are kept, and the rest is one native call each way."""

    @staticmethod
    @without_autocast
    def forward(ctx, queries, keys, scale, masks, labels, both, symmetric):
        logits = torch.mm(queries, keys.t())
        m, n = logits.shape
        state = torch.empty(4 * m + 2 * n)
        problem = native.Logits(
            scale.item(), query_ids=address(masks.query_ids), key_ids=address(masks.key_ids),
            positives=address(masks.positives),
        )  # fmt: skip
        loss = native.small_loss(
            problem, *map(address, labels), logits.data_ptr(), m, n, both, state.data_ptr(), torch.get_num_threads()
        )
        ctx.save_for_backward(queries, keys, scale, masks.positives, *labels, logits, state)
        ctx.both, ctx.symmetric = both, symmetric
        return torch.full((), loss)

    @staticmethod
    @without_autocast
    def backward(ctx, gradient):
        refuse_second_gradient("similarity_cross_entropy", reference=True)
        queries, keys, scale, positives, *labels, logits, state = ctx.saved_tensors
        target, value = torch.empty_like(logits), scale.item()
        total = native.small_gradient(
            native.Logits(value, positives=address(positives)), *map(address, labels), logits.data_ptr(),
            target.data_ptr(), *logits.shape, ctx.both, ctx.symmetric, state.data_ptr(), gradient.item(),
            torch.get_num_threads(),
        )  # fmt: skip
        need_queries, need_keys, need_scale = ctx.needs_input_grad[:3]
        dq = torch.mm(target, keys) if need_queries else None
        dk = torch.mm(target.t(), queries) if need_keys and not ctx.symmetric else None
        # Σ G·S, where the target holds scale·G, for a symmetric matrix each pair in both orders, and the logits scale·S
        total = total / (2 if ctx.symmetric else 1) / (value * value)
        dscale = torch.full((), total, dtype=scale.dtype) if need_scale else None
        return dq, dk, dscale, None, None, None, None


def similarity_cross_entropy(
    queries: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    scale: float | Tensor = 1.0,
    *,
    both: bool = False,
    key_bias: Tensor | None = None,  # [N]
    query_ids: Tensor | None = None,  # [M] integer
    key_ids: Tensor | None = None,  # [N] integer
    positives: Tensor | None = None,  # [M] integer
    guide: tuple[Tensor, Tensor, Tensor | float] | None = None,  # [M, Dg], [N, Dg], [M]
    query_labels: Tensor | None = None,  # [M] integer
    key_labels: Tensor | None = None,  # [N] integer
    weights: Tensor | None = None,  # [M]
    reduction: str = "mean",
    workspace: int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """mean_i w_i (r_i − p_i), or with `both` mean_i (½ r_i + ½ c_i − p_i),   p_i = L_i,positives[i],   of
    `similarity_lse`.

    Args: as there; `both` needs M = N and the default positives. Every row needs a positive.
        query_labels, key_labels: p_i is instead the mean of L_ij over the keys j of row i's label that are not masked;
            rows without one do not count. They go with ids and a bias, not with `both`, positives or a guide.
        weights: w_i, default 1; they must not require a gradient. The mean still divides by M. Not with labels.
        reduction: "mean", which M = 0 does not have, or "sum", which does not go with labels.
        implementation: chosen as for `similarity_lse`, under whose name `trace` lists it.

    Returns a 0-dim float32 tensor (float64 for float64 inputs). Raises as `similarity_lse`.
    """
    op = "similarity_cross_entropy"
    check.features(op, queries, keys)
    m, n = queries.shape[0], keys.shape[0]
    labels = _labels(op, queries, keys, query_labels, key_labels)
    labelled = labels.queries is not None
    check.one_of(op, "reduction", reduction, ("mean", "sum"))
    if labelled and (both or positives is not None or guide is not None or weights is not None or reduction == "sum"):
        raise ValueError(f"{op}: labels cannot go with both, positives, guide, weights or a sum")
    lacking = (positives is None and m > n) or (both and (m != n or positives is not None))
    if not labelled and (lacking or (m < 1 and reduction == "mean")):
        raise ValueError(f"{op}: every row needs its own key, both=True a square problem, got {m} queries, {n} keys")
    scale = check.scalar(op, "scale", scale, queries)
    if weights is not None:
        check.vector(op, "weights", weights, m, queries, floating=True)
        if weights.requires_grad:
            raise ValueError(f"{op}: weights must not require a gradient; weigh the rows of similarity_lse")
        weights = weights.to(torch.float64 if queries.dtype == torch.float64 else torch.float32).contiguous()
    settings = {
        "key_bias": key_bias, "query_ids": query_ids, "key_ids": key_ids, "positives": positives, "guide": guide,
        "workspace": workspace, "implementation": implementation,
    }  # fmt: skip
    choice = select("similarity_lse", implementation, queries.device, queries.dtype)
    # A compiler fuses the nodes itself, and needs to see the registered operation.
    if choice.implementation != "cpu" or torch.compiler.is_compiling() or m == 0:
        return algebra(queries, keys, scale, both, labels, weights, reduction, **settings)
    check.workspace(op, workspace)
    if query_ids is None and key_ids is None and guide is None and positives is None:
        masks = Masks() if labelled else Masks(positives=torch.arange(m))
    else:
        masks = check.masks(op, queries, keys, query_ids, key_ids, -1 if labelled else positives, guide, not labelled)
    symmetric = key_bias is None and guide is None and not both and labels.queries is labels.keys
    symmetric = symmetric and is_symmetric(queries, keys, query_ids, key_ids, positives)
    budget = workspace_bytes(workspace, queries.device)
    small = m * n <= SMALL and 8 * m * n <= budget and weights is None
    if small and abs(scale.item()) > 1e-3 and key_bias is None and guide is None and queries.dtype == torch.float32:
        note(choice)
        loss = _SmallLoss.apply(queries, keys, scale, masks, labels, both, symmetric)
        return loss if reduction == "mean" else loss * m
    if key_bias is not None:
        check.vector(op, "key_bias", key_bias, n, queries, floating=True)
    mix, keep = plan(queries, keys, scale, key_bias, masks, both, symmetric, workspace)
    rows = _chunk_rows(m, n, budget, guide is not None)
    in_chunks = not (labelled or both or symmetric or mix) and rows > 0
    if labelled or (weights is not None and not in_chunks):
        return algebra(queries, keys, scale, both, labels, weights, reduction, **settings)
    note(choice)
    queries, keys = rows_contiguous(queries), None if symmetric else rows_contiguous(keys)
    if in_chunks:
        run = _RowLoss(masks, weights, m if reduction == "mean" else 1, rows)
        return formed(run, queries, keys, scale, key_bias, op=op)
    loss = _MeanLoss.apply(queries, keys, scale, key_bias, masks, both, mix, keep)
    return loss if reduction == "mean" else loss * m


def _labels(op: str, queries: Tensor, keys: Tensor, query_labels: Tensor | None, key_labels: Tensor | None) -> Labels:
    if query_labels is None and key_labels is None:
        return Labels(None, None)
    if query_labels is None or key_labels is None:
        missing = "key_labels" if key_labels is None else "query_labels"
        raise ValueError(f"{op}: query_labels and key_labels go together, got no {missing}")
    check.vector(op, "query_labels", query_labels, queries.shape[0], queries, floating=False)
    check.vector(op, "key_labels", key_labels, keys.shape[0], queries, floating=False)
    first = query_labels.long().contiguous()
    return Labels(first, first if key_labels is query_labels else key_labels.long().contiguous())
