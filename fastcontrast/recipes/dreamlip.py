"""DreamLIP: a long caption is many sentences. Each of them is a positive of the image, and of the patches that it
is similar to.

Of images v_i, sentences t_ik (k = 0 the raw caption, K in all) and patches p_im (M of them), all of length 1:

    L_MP   = 1/K Σ_k CLIP's loss of (v_i, t_ik) over i       sentences of one image never compete
    S_km   = ⟨t_k, p_m⟩,  w_km = (S_km − min_m S_k) / (max_m S_k − min_m S_k + 1e-10), 0 where below σ
    g_k    = N(Σ_m w_km p_m / Σ_m w_km)                      N(x) = x / ‖x‖; uniform weights where all w_km are 0
    L_S    = CLIP's loss of the pairs (t_ik, g_ik), B·K of them: here sentences of one image do compete
    L      = λ_MP L_MP (scale s) + λ_S L_S (scale s_l) + λ_C L_circle

L_circle, off by default, is over cosines s: of row i the positives s_p = ⟨v_i, t_ik⟩, all other sentences s_n:

    mean_i softplus( lse_p(−γ a_p (s_p − 1 + m)) + lse_n(γ a_n (s_n − m)) ),   a_p = [1 + m − s_p]₊,  a_n = [s_n + m]₊

with constant a_p, a_n. Nothing else is without gradient: of the minimum and the maximum the lowest m gets it.

FAQ. Why is L_S over the whole batch, where the paper has only the K sentences of an image? That is what the released
code trains with; the paper's is `form="instance"`. Why is σ = 0 the default, which drops no patch? So is the code's.

Source: Zheng et al. 2024, "DreamLIP: Language-Image Pre-training with Long Captions", arXiv 2403.17007.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from fastcontrast import clip_loss
from fastcontrast.distributed._sums import numbers, share
from fastcontrast.ops import _check as check
from fastcontrast.ops._precision import float32, without_autocast

from ._parts.dreamlip_circle import circle_loss
from ._parts.dreamlip_pool import pool_patches
from ._parts.dreamlip_sentences import draw_sentences, sentences

__all__ = ["circle_loss", "draw_sentences", "dreamlip_loss", "instance_loss", "pool_patches", "run", "sentences"]


@without_autocast
def instance_loss(
    queries: Tensor,  # [B, K, E]
    keys: Tensor,  # [B, K, E]
    scale: float | Tensor,
    same: Tensor | None = None,  # [B, K] integer
) -> Tensor:
    """mean_ik (log Σ_j exp(scale ⟨q_ik, k_ij⟩) − scale ⟨q_ik, k_ik⟩): K × K inside each image, over the keys."""
    logits = scale * (float32(queries) @ float32(keys).mT)
    if same is not None:
        others = ~torch.eye(same.shape[1], dtype=torch.bool, device=same.device)
        logits = logits.masked_fill((same[:, :, None] == same[:, None]) & others, float("-inf"))
    rows = logits.logsumexp(-1) - logits.diagonal(dim1=1, dim2=2)
    return share(rows.sum(), rows.numel())


def dreamlip_loss(
    image: Tensor,  # [B, E]
    texts: Tensor,  # [B, K, E]
    patches: Tensor,  # [B, M, E]
    scale: float | Tensor,
    local_scale: float | Tensor,
    *,
    lambda_mp: float = 1.0,
    lambda_s: float = 1.0,
    lambda_circle: float = 0.0,
    sigma: float = 0.0,
    norm: str = "min_max",
    form: str = "batch",
    same: Tensor | None = None,  # [B, K] integer
) -> Tensor:
    """λ_MP L_MP + λ_S L_S + λ_C L_circle of features of length 1; a term of weight 0 is not computed.

    Args:
        scale, local_scale: s and s_l, two `Scale()`s of their own.
        lambda_circle: 0.1 where the released code is asked for this term.
        sigma, norm: see `pool_patches`.
        form: of L_S: "batch", the released code's, or "instance", the paper's: each sentence against the K pooled
            vectors of its image.
        same: equal numbers in a row are equal sentences of that image, which then do not compete in L_S; by default
            they do. Draws with replacement give such.

    Raises ValueError naming what was expected and what came.
    """
    op = "dreamlip_loss"
    check.tensor(op, "texts", texts, 3, "[B, K, E]")
    count, k, width = texts.shape
    if image.shape != (count, width) or not k:
        raise ValueError(
            f"{op}: image must be [B, E] of texts [B, K, E], K > 0, got {[*image.shape]}, {[*texts.shape]}"
        )
    check.one_of(op, "form", form, ("batch", "instance"))
    if same is not None and same.shape != (count, k):
        raise ValueError(f"{op}: same must be [{count}, {k}], got {[*same.shape]}")
    loss = float32(image).new_zeros(())
    if lambda_mp:
        loss = loss + lambda_mp * sum(clip_loss(image, t, scale) for t in texts.unbind(1)) / k
    if lambda_s:
        pooled = pool_patches(texts, patches, sigma=sigma, norm=norm)
        if form == "instance":
            loss = loss + lambda_s * instance_loss(texts, pooled, local_scale, same)
        else:
            flat = texts.flatten(0, 1), pooled.flatten(0, 1)
            loss = loss + lambda_s * clip_loss(*flat, local_scale, ids=None if same is None else _ids(same))
    if lambda_circle:
        loss = loss + lambda_circle * circle_loss(image, texts)
    return loss


def _ids(same: Tensor) -> Tensor:  # [B, K]
    """Numbers [B·K], equal where two sentences of one image are."""
    first = (same[:, :, None] == same[:, None]).int().argmax(-1)  # the first slot with the same sentence
    return (numbers(len(same), same.device)[:, None] * same.shape[1] + first).flatten()


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Trains on pages composed of icons: see `fastcontrast.recipes._parts.dreamlip_run`."""
    from ._parts.dreamlip_run import run as train

    return train(steps, output=output, seed=seed, limit=limit)
