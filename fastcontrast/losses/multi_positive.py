"""Losses with several positives a row: supervised contrast, prototypes, class names, views.

The logits of the positives sum to scale · ⟨q_i, Σ_p k_p⟩: a segment sum over labels, and no second sweep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast.distributed._exchange import active
from fastcontrast.distributed._lse import similarity_lse
from fastcontrast.distributed._sums import at, numbers, positive_sums, share
from fastcontrast.ops import _check as check
from fastcontrast.ops import similarity_cross_entropy
from fastcontrast.ops._precision import float32, without_autocast
from fastcontrast.ops._segments import against_positives

from ._common import ScaledLoss, features, reduce


@without_autocast
def multi_positive_loss(
    queries: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    scale: float | Tensor = 10.0,
    *,
    query_labels: Tensor | None = None,  # [M] integer
    key_labels: Tensor | None = None,  # [N] integer
    positives: Tensor | None = None,  # [M, P] integer, −1 for none
    query_ids: Tensor | None = None,  # [M] integer
    key_ids: Tensor | None = None,  # [N] integer
    key_bias: Tensor | None = None,  # [N]
    weights: Tensor | None = None,  # [M]
    reduction: str = "mean",
    count_empty: bool = False,
    return_accuracy: bool = False,
    workspace: int | None = None,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """loss_i = −1/|P(i)| Σ_{p ∈ P(i)} log softmax_j(L_ij)_p = r_i − 1/|P(i)| Σ_p L_ip,   L_ij = scale·⟨q_i, k_j⟩ + b_j.

    One direction; mean over the rows that have a positive (`count_empty=True`: over all M); a row without one gives 0.
    Features are taken as they are.

    Args:
        queries, keys: [M, D], [N, D].
        query_labels, key_labels: P(i) = {j : key_labels_j = query_labels_i}, without pairs of equal ids; or
        positives: [M, P], the indices P(i) themselves, padded with −1.
        query_ids, key_ids: pairs with equal ids are left out altogether, of positives and of the sum (a sample and
            itself: `arange`). With `positives` they mask the sum only: listed positives should have other ids.
        key_bias, weights, reduction, workspace, implementation: see `info_nce`.
        return_accuracy: also the share of rows with a positive whose largest logit is one of their positives.

    Raises: as `similarity_lse`; ValueError unless either labels or positives are given.
    Source: Khosla et al. 2020 (eq. 2, "outside" form) with keys apart from queries.
    """
    op = "multi_positive_loss"
    queries, keys = features(op, queries, keys)
    m, n = queries.shape[0], keys.shape[0]
    if (positives is None) == (query_labels is None) or (query_labels is None) != (key_labels is None):
        raise ValueError(f"{op}: give either query_labels and key_labels, or positives")
    if positives is None:
        check.vector(op, "query_labels", query_labels, m, queries, floating=False)
        check.vector(op, "key_labels", key_labels, n, queries, floating=False)
    scale = check.scalar(op, "scale", scale, queries)
    masks = {"query_ids": query_ids, "key_ids": key_ids}
    run = {"key_bias": key_bias, "workspace": workspace, "implementation": implementation}
    plain = reduction == "mean" and weights is None and not count_empty and not return_accuracy
    if plain and positives is None and active() is None:
        labels = {"query_labels": query_labels, "key_labels": key_labels}
        return similarity_cross_entropy(queries, keys, scale, **labels, **masks, **run)
    swept = similarity_lse(queries, keys, scale, **masks, positives=-1, return_best=return_accuracy, **run)
    lse, best = swept if return_accuracy else (swept, None)

    problem = float32(queries), float32(keys), scale, key_bias
    if positives is None:
        sums = positive_sums(*problem, query_labels, key_labels, query_ids, key_ids)
    else:
        sums = _listed_sums(op, *problem, positives)
    losses, valid = against_positives(lse, *sums)
    loss = reduce(op, losses, weights, reduction, m if count_empty else valid.sum(), like=queries)
    if not return_accuracy:
        return loss
    hits = at(key_labels, best) == query_labels if positives is None else (positives == best[:, None]).any(1)
    return loss, share((hits & valid).sum().float(), valid.sum())


def _listed_sums(op, queries, keys, scale, key_bias, positives) -> tuple[Tensor, Tensor]:
    """`positive_sums` of positives that are listed, [M, P]."""
    m, n = queries.shape[0], keys.shape[0]
    if positives.ndim != 2 or positives.shape[0] != m or positives.dtype not in check.INTEGER:
        raise ValueError(f"{op}: positives must be integer [{m}, P], got {positives.dtype} {list(positives.shape)}")
    check.within(op, "positives", positives, -1, n)
    listed = positives >= 0
    index = positives.long().clamp(min=0)
    chosen = keys[index] * listed[:, :, None]  # [M, P, D]
    total = scale * torch.linalg.vecdot(queries, chosen.sum(1))
    if key_bias is not None:
        total = total + (key_bias.to(queries.dtype)[index] * listed).sum(1)
    return total, listed.sum(1)


@without_autocast
def supcon_loss(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N] integer
    scale: float | Tensor = 10.0,
    *,
    weights: Tensor | None = None,  # [N]
    reduction: str = "mean",
    count_empty: bool = False,
    return_accuracy: bool = False,
    workspace: int | None = None,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """loss_i = −1/|P(i)| Σ_{p ∈ P(i)} log( exp L_ip / Σ_{a ≠ i} exp L_ia ),   L = scale·z zᵀ,   P(i) = {p≠i: y_p=y_i}.

    One set of embeddings (stack the views), each against all others; mean over the rows that have a positive
    (`count_empty=True`: over all N). Embeddings are taken as they are: normalise them first. L is symmetric: half of it
    is computed.

    Args:
        embeddings: [N, D].
        labels: [N] integer.
        others: see `multi_positive_loss`.

    Source: Khosla et al. 2020, "Supervised Contrastive Learning", eq. 2 (temperature 0.1 = scale 10).
    """
    op = "supcon_loss"
    embeddings, _ = features(op, embeddings, embeddings, ("embeddings", "embeddings"))
    check.vector(op, "labels", labels, embeddings.shape[0], embeddings, floating=False)
    index = numbers(embeddings.shape[0], embeddings.device)
    return multi_positive_loss(
        embeddings,
        embeddings,
        scale,
        query_labels=labels,
        key_labels=labels,
        query_ids=index,
        key_ids=index,
        weights=weights,
        reduction=reduction,
        count_empty=count_empty,
        return_accuracy=return_accuracy,
        workspace=workspace,
        implementation=implementation,
    )


class MultiPositiveLoss(ScaledLoss):
    """`multi_positive_loss` as a module: `MultiPositiveLoss()(queries, keys, query_labels=…, key_labels=…)`."""

    function = staticmethod(multi_positive_loss)
    default_scale = 10.0


class SupConLoss(ScaledLoss):
    """`supcon_loss` as a module: `SupConLoss()(embeddings, labels)`; see there for equation and settings."""

    function = staticmethod(supcon_loss)
    default_scale = 10.0
