"""Activations that autograd would store more for than their input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SLOPE = 1.702


class _QuickGELU(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return (SLOPE * x).sigmoid_().mul_(x)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dout: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        t = SLOPE * x
        if x.dtype == torch.float16:  # whose infinity is not far: 0 · ∞ below
            t.clamp_(-65504, 65504)
        # x · σ(a·x) is SiLU(a·x) / a, whose gradient by x is that of SiLU at t = a·x.
        if not torch.is_grad_enabled():
            return torch.ops.aten.silu_backward(dout, t)
        s = t.sigmoid()  # torch's kernel has no derivative of its own
        return dout * s * (1 + t * (1 - s))


def quick_gelu(x: Tensor) -> Tensor:
    """x · σ(1.702 · x), of any shape and floating-point type; the gradient keeps x alone.

    Backward, with t = 1.702 · x and s = σ(t): dx = dout · s · (1 + t · (1 − s)).

    Bit for bit what the three operations give. Autograd keeps x and σ for them, and a backward is five passes, not two.
    Source: Hendrycks and Gimpel 2016, "Gaussian error linear units"; the activation of CLIP.
    """
    return _QuickGELU.apply(x)


class QuickGELU(nn.Module):
    """`quick_gelu`."""

    def forward(self, x: Tensor) -> Tensor:
        return quick_gelu(x)
