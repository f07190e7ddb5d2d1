"""Mean cross entropy of rows, or of rows and columns, against each row's own column.

    loss = mean_i (r_i − p_i)      or      mean_i (½ r_i + ½ c_i − p_i)          r, c, p of `similarity_lse`

The same sweep and numbers as the algebra on `similarity_lse`, as one node of the graph instead of four: a batch
of 128 feels them. The differences are summed in double, so that a nearly solved batch keeps the digits of its loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check as check
from ._dispatch import native, note, select
from ._sweep import Masks
from .similarity_lse import backward_cpu, forward_cpu, plan, rows_contiguous, similarity_lse


def reference(queries, keys, scale, both: bool, **settings) -> Tensor:
    """The algebra: what every other form must equal."""
    *lses, own = similarity_lse(queries, keys, scale, dim="both" if both else "rows", return_positives=True, **settings)
    return ((torch.lerp(*lses, 0.5) if both else lses[0]) - own).mean()


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
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "similarity_cross_entropy: a gradient of its gradient is not implemented; "
                "implementation='reference' has one"
            )
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
    workspace: int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """mean_i (r_i − p_i), or with `both` mean_i (½ r_i + ½ c_i − p_i),   p_i = L_i,positives[i],   of `similarity_lse`.

    Args: as there; `both` needs M = N and the default positives. Every row needs a positive. M must be at least 1.
    Returns a 0-dim float32 tensor (float64 for float64 inputs). Raises as `similarity_lse`.
    """
    op = "similarity_cross_entropy"
    check.features(op, queries, keys)
    m, n = queries.shape[0], keys.shape[0]
    if m < 1 or (positives is None and m > n) or (both and (m != n or positives is not None)):
        raise ValueError(f"{op}: every row needs its own key, both=True a square problem, got {m} queries, {n} keys")
    settings = {
        "key_bias": key_bias, "query_ids": query_ids, "key_ids": key_ids, "positives": positives, "guide": guide,
        "workspace": workspace, "implementation": implementation,
    }  # fmt: skip
    choice = select("similarity_lse", implementation, queries.device, queries.dtype)
    # A compiler fuses the nodes itself, and needs to see the registered operation.
    if choice.implementation != "cpu" or torch.compiler.is_compiling():
        return reference(queries, keys, scale, both, **settings)
    note(choice)
    check.workspace(op, workspace)
    scale = check.scalar(op, "scale", scale, queries)
    if key_bias is not None:
        check.vector(op, "key_bias", key_bias, n, queries, floating=True)
    if key_bias is None and query_ids is None and guide is None and positives is None:
        masks = Masks(positives=torch.arange(m))
    else:
        masks = check.masks(op, queries, keys, query_ids, key_ids, positives, guide, True)
    mix, keep = plan(queries, keys, scale, key_bias, masks, both, False, workspace)
    return _MeanLoss.apply(rows_contiguous(queries), rows_contiguous(keys), scale, key_bias, masks, both, mix, keep)
