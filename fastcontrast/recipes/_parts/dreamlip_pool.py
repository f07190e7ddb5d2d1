"""DreamLIP's pool: from scores S_km = ⟨t_k, p_m⟩ to weights a_km that sum to 1, to g_k = N(Σ_m a_km p_m)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast.ops import _check as check
from fastcontrast.ops._precision import float32, without_autocast
from fastcontrast.ops._unit import unit_rows


@without_autocast
def pool_patches(
    texts: Tensor,  # [B, K, E]
    patches: Tensor,  # [B, M, E]
    *,
    sigma: float = 0.0,
    norm: str = "min_max",
) -> Tensor:
    """g [B, K, E]: for each sentence the mean of its image's patches, weighted by similarity, of length 1; in float32
    for half precision, in which 1e-10 would be 0.

    Args:
        sigma: weights below it become 0; negative: 1 / M. At most 1.
        norm: "min_max", or "softmax" over m without temperature in its place.

    Raises ValueError naming what was expected and what came.
    """
    op = "pool_patches"
    check.tensor(op, "texts", texts, 3, "[B, K, E]")
    check.tensor(op, "patches", patches, 3, "[B, M, E]")
    check.one_of(op, "norm", norm, ("min_max", "softmax"))
    count, _, width = texts.shape
    if patches.shape[::2] != (count, width) or not patches.shape[1]:
        raise ValueError(f"{op}: patches must be [{count}, M, {width}] to match texts, M > 0, got {[*patches.shape]}")
    if not sigma <= 1:
        raise ValueError(f"{op}: sigma must be at most 1, above which no patch is left, got {sigma}")
    threshold = 1 / patches.shape[1] if sigma < 0 else float(sigma)
    pooled = _Pool.apply(float32(texts), float32(patches), threshold, norm)
    return unit_rows(pooled.flatten(0, 1)).view_as(texts)


class _Pool(torch.autograd.Function):
    """Σ_m a_km p_m. By hand for the gradient of the patches: one product where autograd adds up two tensors as large
    as they are."""

    @staticmethod
    def forward(ctx, texts, patches, threshold, norm):
        scores = texts @ patches.mT
        ctx.save_for_backward(texts, patches, scores)
        ctx.settings = threshold, norm
        return _weights(scores, threshold, norm) @ patches

    @staticmethod
    def backward(ctx, gradient):  # of unit_rows, which refuses a second gradient
        return *_gradients(gradient, *ctx.saved_tensors, *ctx.settings), None, None


@without_autocast  # a backward may be called inside it
def _gradients(gradient: Tensor, texts: Tensor, patches: Tensor, scores: Tensor, *settings) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        scores = scores.detach().requires_grad_()
        weights = _weights(scores, *settings)
    (of_scores,) = torch.autograd.grad(weights, scores, gradient @ patches.mT)
    return of_scores @ patches, torch.cat([weights.detach(), of_scores], 1).mT @ torch.cat([gradient, texts], 1)


def _weights(scores: Tensor, threshold: float, norm: str) -> Tensor:  # [B, K, M]
    """a [B, K, M], which sum to 1 over m."""
    if norm == "min_max":
        low, high = scores.min(-1, keepdim=True).values, scores.max(-1, keepdim=True).values  # of equals the first
        weights = (scores - low) / (high - low + 1e-10)
    else:
        weights = scores.softmax(-1)
    weights = weights * (weights >= threshold)
    total = weights.sum(-1, keepdim=True)
    some = total > 0
    return torch.where(some, weights / total.where(some, 1.0), 1 / scores.shape[-1])
