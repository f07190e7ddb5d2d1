"""Rows of length 1."""

from __future__ import annotations

import torch
from torch import Tensor

from ._precision import float32, refuse_second_gradient, without_autocast
from ._workspace import empty_like


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, eps):
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        unit = torch.div(x, length.clamp(min=eps), out=empty_like(x))
        ctx.save_for_backward(unit, length)
        ctx.eps = eps
        return unit

    @staticmethod
    def backward(ctx, gradient):
        refuse_second_gradient("unit_rows")
        return unit_rows_gradient(gradient, *ctx.saved_tensors, ctx.eps), None


@without_autocast  # a backward may be called inside it
def unit_rows_gradient(gradient: Tensor, unit: Tensor, length: Tensor, eps: float) -> Tensor:  # [N, D], [N, D], [N, 1]
    """(g − ⟨g, u⟩ u) / ‖x‖ of u = x / ‖x‖, and g / eps of rows shorter than eps."""
    out = empty_like(gradient)  # first for the products, where `vecdot` would make a tensor of its own
    along = torch.mul(gradient, unit, out=out).sum(1, keepdim=True).masked_fill_(length < eps, 0.0)
    return torch.addcmul(gradient, unit, along, value=-1, out=out).div_(length.clamp(min=eps))


@without_autocast
def unit_rows(x: Tensor, eps: float = 1e-12) -> Tensor:  # [N, D]
    """x / max(‖x‖, eps) of each row, float32 for half precision.

    `F.normalize(x, dim=1, eps=eps)`, whose gradient, (g − ⟨g, u⟩ u) / ‖x‖ of the unit vector u, takes three passes
    instead of autograd's eight: a tenth of a loss of 4,096 rows.
    """
    return _UnitRows.apply(float32(x), eps)
