"""Texts as weights of words, 14 of the catalogue: LEX, with a penalty for weights that many texts share.

    w_v = max_t log(1 + relu(⟨h_t, E_v⟩ + b_v)) = log(1 + relu(max_t ⟨h_t, E_v⟩ + b_v))

since b_v is no matter of t: late interaction with each word as a query of one token, and no [B, T, V].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast import info_nce
from fastcontrast.distributed._sums import count_over_ranks, over_ranks
from fastcontrast.ops import _check as check
from fastcontrast.ops import maxsim
from fastcontrast.ops._precision import without_autocast


@without_autocast
def word_weights(
    states: Tensor,  # [B, T, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None = None,  # [V]
    mask: Tensor | None = None,  # [B, T] bool
) -> Tensor:
    """w [B, V]; zeros for a text without a token. Raises ValueError naming what does not fit."""
    check.tensor("word_weights", "states", states, 3, "[B, T, D]")
    check.matrix("word_weights", "weight", weight, states.shape[2], like="states")
    best = maxsim(weight[:, None], states, document_mask=mask).T  # [B, V]
    return torch.relu(best if bias is None else best + bias).log1p()


def flops_penalty(weights: Tensor) -> Tensor:  # [B, V]
    """Σ_v (mean_b w_bv)², over the texts of all ranks."""
    mean = over_ranks(weights.sum(0)) / max(1, count_over_ranks(len(weights), weights.device))
    return mean.square().sum()


def lexical_loss(
    queries: Tensor,  # [B, V]
    documents: Tensor,  # [B, V]
    scale: float | Tensor = 1.0,
    *,
    penalties: tuple[float, float] = (3e-4, 1e-4),
) -> Tensor:
    """14. InfoNCE of ⟨w_q, w_d⟩ + λ_q · `flops_penalty(queries)` + λ_d · `flops_penalty(documents)`."""
    sides = zip(penalties, (queries, documents), strict=True)
    return info_nce(queries, documents, scale) + sum(weight * flops_penalty(w) for weight, w in sides)
