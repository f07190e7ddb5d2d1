"""What the demo learned: recall on names that training never saw, and what chance would reach."""

from __future__ import annotations

import math
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcontrast.data import Pairs
from fastcontrast.towers import TwoTowers, encode

CUTOFFS = (1, 10)


def evaluate(model: TwoTowers, items: Tensor, names: Tensor, pairs: Pairs) -> dict[str, dict[str, float]]:
    """`recall` on the unseen names and all their items."""
    unseen = pairs.unseen.nonzero()[:, 0]
    labels = torch.searchsorted(unseen, pairs.ids[pairs.test])
    return recall(encode(model.item_tower, items[pairs.test]), encode(model.name_tower, names[unseen]), labels)


def recall(
    items: Tensor,  # [N, D]
    names: Tensor,  # [K, D]
    labels: Tensor,  # [N]
) -> dict[str, dict[str, float]]:
    """Share of queries with a right answer among the k most similar, k = 1 and 10; `names[labels[i]]` is item i's name.

    item -> name: all N items ask the K names. name -> item: the K names ask the N items, right if one of the first k
    carries the name. A wrong answer as similar as the best right one counts as ahead of it, so that equal features
    score nothing.

    Returns {"item_to_name": {"1": share, "10": share}, "name_to_item": …}.
    """
    similarity = items @ names.T  # [N, K]
    own = F.one_hot(labels, len(names)).bool()
    right = similarity.masked_fill(~own, -math.inf)
    wrong = similarity.masked_fill(own, -math.inf)
    ahead = {
        "item_to_name": (wrong >= right.amax(1, keepdim=True)).sum(1),
        "name_to_item": (wrong >= right.amax(0, keepdim=True)).sum(0),
    }
    return {way: {str(k): (rank < k).float().mean().item() for k in CUTOFFS} for way, rank in ahead.items()}


def chance(pairs: Pairs) -> dict[str, dict[str, float]]:
    """Recall of a random order: k / K for items; for names the mean of 1 − C(N − n, k) / C(N, k), n of N items
    right."""
    unseen = pairs.unseen.nonzero()[:, 0].tolist()
    counts = torch.bincount(pairs.ids, minlength=len(pairs.names)).tolist()
    total = len(pairs.test)

    def found(own: int, k: int) -> float:
        return 1 - math.comb(total - own, k) / math.comb(total, k)

    return {
        "item_to_name": {str(k): min(1.0, k / len(unseen)) for k in CUTOFFS},
        "name_to_item": {str(k): statistics.fmean(found(counts[i], k) for i in unseen) for k in CUTOFFS},
    }
