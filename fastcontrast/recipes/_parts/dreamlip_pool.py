"""DreamLIP's pool: from scores S_km = ⟨t_k, p_m⟩ to weights a_km that sum to 1, to g_k = N(Σ_m a_km p_m)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast.ops import _check as check
from fastcontrast.ops._precision import float32, refuse_second_gradient, without_autocast
from fastcontrast.ops._unit import unit_rows_gradient

IMAGES = 64  # whose gradients are made at a time
SHORTEST = 1e-12  # a mean of patches that is shorter does not get length 1


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
    return _Pool.apply(float32(texts), float32(patches), threshold, norm)


class _Pool(torch.autograd.Function):
    """By hand for its backward: a few images at a time, so that beside the gradients nothing large is made."""

    @staticmethod
    def forward(ctx, texts, patches, threshold, norm):
        scores = texts @ patches.mT
        pooled = _weights(scores, threshold, norm) @ patches
        length = torch.linalg.vector_norm(pooled, dim=-1, keepdim=True)
        unit = pooled.div_(length.clamp(min=SHORTEST))
        ctx.save_for_backward(texts, patches, scores, unit, length)
        ctx.settings = threshold, norm
        return unit

    @staticmethod
    def backward(ctx, gradient):
        refuse_second_gradient("pool_patches")
        return *_gradients(gradient, *ctx.saved_tensors, *ctx.settings), None, None


@without_autocast  # a backward may be called inside it
def _gradients(gradient, texts, patches, scores, unit, length, *settings) -> tuple[Tensor, Tensor]:
    of_texts, of_patches = torch.empty_like(texts), torch.empty_like(patches)
    for i in range(0, len(patches), IMAGES):
        now = slice(i, i + IMAGES)
        rows = (x[now].flatten(0, 1) for x in (gradient, unit, length))
        of_pooled = unit_rows_gradient(*rows, SHORTEST).view_as(texts[now])
        with torch.enable_grad():
            leaf = scores[now].detach().requires_grad_()
            weights = _weights(leaf, *settings)
        (of_scores,) = torch.autograd.grad(weights, leaf, of_pooled @ patches[now].mT)
        torch.bmm(of_scores, patches[now], out=of_texts[now])
        left, right = torch.cat([weights.detach(), of_scores], 1), torch.cat([of_pooled, texts[now]], 1)
        torch.bmm(left.mT, right, out=of_patches[now])
    return of_texts, of_patches


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
