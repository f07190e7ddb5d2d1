"""Rows of length 1."""

from __future__ import annotations

import torch
from torch import Tensor

from ._precision import float32, refuse_second_gradient, without_autocast


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, eps):
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        unit = x / length.clamp(min=eps)
        ctx.save_for_backward(unit, length)
        ctx.eps = eps
        return unit

    @staticmethod
    def backward(ctx, gradient):
        refuse_second_gradient("unit_rows")
        return _gradient(gradient, *ctx.saved_tensors, ctx.eps), None


@without_autocast  # a backward may be called inside it
def _gradient(gradient: Tensor, unit: Tensor, length: Tensor, eps: float) -> Tensor:
    along = torch.linalg.vecdot(gradient, unit)[:, None].masked_fill(length < eps, 0.0)
    return torch.addcmul(gradient, unit, along, value=-1).div_(length.clamp(min=eps))


@without_autocast
def unit_rows(x: Tensor, eps: float = 1e-12) -> Tensor:  # [N, D]
    """x / max(‖x‖, eps) of each row, float32 for half precision.

    `F.normalize(x, dim=1, eps=eps)`, whose gradient, (g − ⟨g, u⟩ u) / ‖x‖ of the unit vector u, takes three passes
    instead of autograd's eight: a tenth of a loss of 4,096 rows.
    """
    return _UnitRows.apply(float32(x), eps)
