"""Sums over equal ids: the logits of several positives sum to scale · ⟨q_i, Σ_p k_p⟩, and need no matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sums(values: Tensor, ids: Tensor, query_ids: Tensor) -> tuple[Tensor, Tensor]:
    """For each query: the sum of the values [N, D] whose id equals its own, [M, D], and how many there are, [M].

    A sum stands at the first sorted position of its id. Sorting gives shapes that depend on no value, so that compiled
    graphs stay whole; `unique` would not.
    """
    n, m = ids.shape[0], query_ids.shape[0]
    if n == 0:
        return values.new_zeros(m, values.shape[1]), values.new_zeros(m)
    ordered = ids.sort().values
    first = torch.searchsorted(ordered, query_ids)
    count = torch.searchsorted(ordered, query_ids, right=True) - first
    places = first if query_ids is ids else torch.searchsorted(ordered, ids)
    sums = torch.zeros_like(values).index_add(0, places, values)
    if query_ids is ids:
        return sums.index_select(0, first), count
    return sums.index_select(0, first.clamp(max=n - 1)) * (count > 0)[:, None], count


def positive_sums(
    queries: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    scale: Tensor,
    key_bias: Tensor | None,  # [N]
    query_labels: Tensor,  # [M]
    key_labels: Tensor,  # [N]
    query_ids: Tensor | None,  # [M]
    key_ids: Tensor | None,  # [N]
) -> tuple[Tensor, Tensor]:
    """For each query: Σ_p L_ip over the keys p of its label, and their number, without pairs of equal ids; [M], [M]."""
    values = keys if key_bias is None else torch.cat([keys, key_bias.to(keys.dtype)[:, None]], 1)
    sums, count = segment_sums(values, key_labels, query_labels)
    if query_ids is not None:
        same, number = segment_sums(values, *_paired(key_labels, key_ids, query_labels, query_ids))
        sums, count = sums - same, count - number
    total = scale * torch.linalg.vecdot(queries, sums[:, : queries.shape[1]])
    return (total if key_bias is None else total + sums[:, -1]), count


def against_positives(lse: Tensor, total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """r_i − total_i / count_i of each row, 0 where there is no positive; and where there is one; [M], [M] bool."""
    valid = count > 0
    # masked_fill before the difference: a row with no candidate left has r = −inf
    return lse.masked_fill(~valid, 0.0) - (total / count.clamp(min=1)).masked_fill(~valid, 0.0), valid


def _paired(key_labels, key_ids, query_labels, query_ids) -> tuple[Tensor, Tensor]:
    """One code for (label, id): equal where both are. Through the rank of the label, so that nothing overflows."""
    ordered = torch.cat([key_ids, query_ids]).sort().values
    width = ordered.shape[0] + 1
    labels = torch.cat([key_labels, query_labels]).sort().values

    def code(label, identity):
        return torch.searchsorted(labels, label) * width + torch.searchsorted(ordered, identity)

    return code(key_labels, key_ids), code(query_labels, query_ids)
