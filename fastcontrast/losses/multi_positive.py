"""Losses with several positives a row: supervised contrast, prototypes, class names, views.

The logits of the positives sum to scale · ⟨q_i, Σ_p k_p⟩: a segment sum over labels, and no second sweep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast.ops import _check as check
from fastcontrast.ops import similarity_lse
from fastcontrast.ops._autocast import without_autocast

from ._common import ScaledLoss, features, reduce, segment_sums


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
    scale = check.scalar(op, "scale", scale, queries)
    masks = {"query_ids": query_ids, "key_ids": key_ids, "positives": -1}
    run = {"workspace": workspace, "implementation": implementation}
    swept = similarity_lse(queries, keys, scale, key_bias=key_bias, return_best=return_accuracy, **masks, **run)
    lse, best = swept if return_accuracy else (swept, None)

    bias = None if key_bias is None else key_bias.to(queries.dtype)
    if positives is None:
        check.vector(op, "query_labels", query_labels, m, queries, floating=False)
        check.vector(op, "key_labels", key_labels, n, queries, floating=False)
        values = keys if bias is None else torch.cat([keys, bias[:, None]], 1)
        sums, count = segment_sums(values, key_labels, query_labels)
        if query_ids is not None:  # pairs of equal labels and ids leave the positives too
            same, number = segment_sums(values, *_paired(key_labels, key_ids, query_labels, query_ids))
            sums, count = sums - same, count - number
        total = scale * torch.linalg.vecdot(queries, sums[:, : queries.shape[1]])
        total = total if bias is None else total + sums[:, -1]
    else:
        if positives.ndim != 2 or positives.shape[0] != m or positives.dtype not in check.INTEGER:
            raise ValueError(f"{op}: positives must be integer [{m}, P], got {positives.dtype} {list(positives.shape)}")
        listed = positives >= 0
        index = positives.long().clamp(min=0)
        chosen = keys[index] * listed[:, :, None]  # [M, P, D]
        total = scale * torch.linalg.vecdot(queries, chosen.sum(1))
        total = total if bias is None else total + (bias[index] * listed).sum(1)
        count = listed.sum(1).to(queries.dtype)

    hits = None
    if return_accuracy and positives is None:
        hits = key_labels[best.clamp(min=0)] == query_labels if n else count > 0
    elif return_accuracy:
        hits = (positives == best[:, None]).any(1)
    return _mean_over_positives(op, lse, total, count, hits, weights, reduction, count_empty)


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
    embeddings, _ = features(op, embeddings, embeddings)
    n = embeddings.shape[0]
    check.vector(op, "labels", labels, n, embeddings, floating=False)
    scale = check.scalar(op, "scale", scale, embeddings)
    index = torch.arange(n, device=embeddings.device)
    masks = {"query_ids": index, "key_ids": index, "positives": -1}
    run = {"workspace": workspace, "implementation": implementation, "return_best": return_accuracy}
    swept = similarity_lse(embeddings, embeddings, scale, **masks, **run)
    lse, best = swept if return_accuracy else (swept, None)
    # The class's sum without the row itself, Σ_{p ∈ P(i)} z_p.
    sums, count = segment_sums(embeddings, labels, labels)
    total = scale * torch.linalg.vecdot(embeddings, sums - embeddings)
    hits = labels[best.clamp(min=0)] == labels if return_accuracy else None
    return _mean_over_positives(op, lse, total, count - 1, hits, weights, reduction, count_empty)


def _mean_over_positives(op, lse, total, count, hits, weights, reduction, count_empty):
    """Row losses r_i − total_i / count_i, 0 without a positive, reduced; with `hits` also the share of rows hit."""
    valid = count > 0
    # masked_fill before the difference: a row with no candidate left has r = −inf
    losses = lse.masked_fill(~valid, 0.0) - (total / count.clamp(min=1)).masked_fill(~valid, 0.0)
    loss = reduce(op, losses, weights, reduction, len(valid) if count_empty else valid.sum())
    return loss if hits is None else (loss, (hits & valid).sum() / valid.sum().clamp(min=1))


def _paired(key_labels, key_ids, query_labels, query_ids) -> tuple[Tensor, Tensor]:
    """One code for (label, id): equal where both are. Through the rank of the label, so that nothing overflows."""
    ordered = torch.cat([key_ids, query_ids]).sort().values
    width = ordered.shape[0] + 1
    labels = torch.cat([key_labels, query_labels]).sort().values

    def code(label, identity):
        return torch.searchsorted(labels, label) * width + torch.searchsorted(ordered, identity)

    return code(key_labels, key_ids), code(query_labels, query_ids)


class MultiPositiveLoss(ScaledLoss):
    """`multi_positive_loss` as a module: `MultiPositiveLoss()(queries, keys, query_labels=…, key_labels=…)`."""

    function = staticmethod(multi_positive_loss)
    default_scale = 10.0


class SupConLoss(ScaledLoss):
    """`supcon_loss` as a module: `SupConLoss()(embeddings, labels)`; see there for equation and settings."""

    function = staticmethod(supcon_loss)
    default_scale = 10.0
