"""Distillation from a cross-encoder's scores of short lists of documents, 10 and 11 of the catalogue."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcontrast import info_nce
from fastcontrast.distributed._sums import share
from fastcontrast.ops import _check as check
from fastcontrast.ops._precision import float32, without_autocast


@without_autocast
def list_scores(queries: Tensor, documents: Tensor) -> Tensor:  # [B, D], [B, 1 + K, D]
    """⟨q_b, d_bk⟩, [B, 1 + K]; the first document of a list is its positive."""
    check.matrix("list_scores", "queries", queries)
    check.tensor("list_scores", "documents", documents, 3, "[B, 1 + K, D]")
    if len(documents) != len(queries) or documents.shape[2] != queries.shape[1]:
        expected = f"[{len(queries)}, 1 + K, {queries.shape[1]}] to match queries"
        raise ValueError(f"list_scores: documents must be {expected}, got {list(documents.shape)}")
    return torch.einsum("bd,bkd->bk", float32(queries), float32(documents))


def margin_mse_loss(scores: Tensor, teacher: Tensor) -> Tensor:  # [B, 1 + K] each
    """10. mean_{b,k} ((s_b0 − s_bk) − (T_b0 − T_bk))², k ≥ 1."""
    _check("margin_mse_loss", scores, teacher)
    ours, theirs = (x[:, :1] - x[:, 1:] for x in (float32(scores), teacher.detach()))
    return share((ours - theirs).square().sum(), ours.numel())


def list_kl_loss(
    scores: Tensor,  # [B, 1 + K]
    teacher: Tensor,  # [B, 1 + K]
    temperature: float = 1.0,
    *,
    min_max: bool = False,
) -> Tensor:
    """11. T² · mean_b KL(softmax(teacher_b / T) ‖ softmax(scores_b / T)). min_max: each list of scores moved and
    stretched to [0, 1] before, as for sums over tokens; a list of equal scores becomes zeros."""
    _check("list_kl_loss", scores, teacher)
    scores = float32(scores)
    if min_max:
        low, high = scores.aminmax(dim=1, keepdim=True)
        scores = (scores - low) / (high - low).clamp(min=1e-12)
    p, t = (F.log_softmax(x / temperature, 1) for x in (scores, teacher.detach().to(scores.dtype)))
    return temperature**2 * share((t.exp() * (t - p)).sum(), len(scores))


def list_distillation_loss(
    queries: Tensor,  # [B, D]
    documents: Tensor,  # [B, 1 + K, D]
    teacher: Tensor,  # [B, 1 + K]
    temperature: float = 1.0,
    *,
    alpha: float = 0.2,
    scale: float | Tensor = 20.0,
) -> Tensor:
    """`list_kl_loss` + alpha · InfoNCE of q_b over its list and the positives of all."""
    kl = list_kl_loss(list_scores(queries, documents), teacher, temperature)
    return kl + alpha * info_nce(queries, documents[:, 0].contiguous(), scale, hard_negatives=documents[:, 1:])


def _check(op: str, scores: Tensor, teacher: Tensor) -> None:
    check.matrix(op, "scores", scores)
    if teacher.shape != scores.shape or scores.shape[1] < 2:
        got = f"{list(scores.shape)} and {list(teacher.shape)}"
        raise ValueError(f"{op}: scores and teacher must both be [B, 1 + K], K at least 1, got {got}")
