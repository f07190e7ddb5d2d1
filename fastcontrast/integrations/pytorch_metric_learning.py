"""NT-Xent and SupCon of pytorch-metric-learning, without a matrix of similarities.

    from fastcontrast.integrations.pytorch_metric_learning import NTXentLoss, SupConLoss

Subclasses of the originals, of the same names and arguments, for `SelfSupervisedLoss`, `CrossBatchMemory`,
`DistributedLossWrapper`, `MultipleLosses`, any reducer, embedding regularizers and `collect_stats`. A reducer gets one
loss a positive pair (NT-Xent) or one a row (SupCon), as from the originals. Those form positive pairs × negative pairs
and rows × rows numbers; here memory is O(N · D) and, for NT-Xent, O(positive pairs).

Negatives are the other labels' rows, or the pairs of an `indices_tuple`: all of them (`CrossBatchMemory` without a
miner, `DistributedLossWrapper(efficient=True)`) are recognised and swept, a miner's choice is gathered pair by pair.

The distance must be a dot product: `CosineSimilarity`, or `DotProductSimilarity` normalised or not. With another one,
with `power` ≠ 1, and with labels that are not integers, the original runs; `loss.last_fallback` says why, or is None.

Products and losses are float32 for half precision and under autocast (float64 for float64, which is dense). Losses are
not rounded to 0, or limited to −log(tiny), as the originals are in float32 where positives and negatives lie far apart:
`AvgNonZeroReducer` counts every row that has a positive and a negative.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import BaseDistance, DotProductSimilarity
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

from fastcontrast.ops import _check as check
from fastcontrast.ops import similarity_lse
from fastcontrast.ops._precision import float32, without_autocast
from fastcontrast.ops._segments import against_positives, positive_sums

__all__ = ["NTXentLoss", "SupConLoss"]

GATHERED = 1 << 18  # numbers gathered at once: two blocks of 1 MiB stay in a core's cache


# -------------------------------------------------------------------------------------------------------------- pairs


class _Dots(torch.autograd.Function):
    """⟨q_a, k_b⟩ of listed pairs (a, b), whose rows are gathered chunk by chunk and not kept."""

    @staticmethod
    def forward(ctx, queries, keys, a, b):
        ctx.save_for_backward(queries, keys, a, b)
        step = max(GATHERED // max(queries.shape[1], 1), 1)
        parts = [torch.linalg.vecdot(queries[i], keys[j]) for i, j in zip(a.split(step), b.split(step), strict=True)]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        queries, keys, a, b = ctx.saved_tensors
        dq = _weighted_sums(gradient, a, b, keys, queries.shape[0]) if ctx.needs_input_grad[0] else None
        dk = _weighted_sums(gradient, b, a, queries, keys.shape[0]) if ctx.needs_input_grad[1] else None
        return dq, dk, None, None


def _weighted_sums(weights: Tensor, to: Tensor, of: Tensor, rows: Tensor, count: int) -> Tensor:
    """Σ weights · rows[of] over the pairs that go `to` each of `count` places."""
    order = to.argsort(stable=True)
    starts = torch.searchsorted(to[order], torch.arange(count, device=to.device))
    return F.embedding_bag(of[order], rows, starts, mode="sum", per_sample_weights=weights[order])


def _sums(values: Tensor, places: Tensor, count: int) -> Tensor:
    return values.new_zeros(count).index_put((places,), values, accumulate=True)


def _log_sums(logits: Tensor, places: Tensor, count: int) -> Tensor:
    """Log-sum-exp of the logits at each place, −inf where there is none."""
    top = logits.new_full((count,), float("-inf")).scatter_reduce(0, places, logits.detach(), "amax")
    return top + _sums((logits - top[places]).exp(), places, count).log()


def _softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ), also to the digits of float64."""
    return F.softplus(x, threshold=40.0)


def _matches(labels: Tensor, ref_labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The order that sorts `ref_labels`, and in it each label's first place and number."""
    ordered, order = ref_labels.sort(stable=True)
    first = torch.searchsorted(ordered, labels)
    return order, first, torch.searchsorted(ordered, labels, right=True) - first


def _ascend(codes: Tensor) -> bool:
    return bool((codes[1:] > codes[:-1]).all())


def _swept(queries, keys, scale, labels, ref_labels) -> Tensor:
    return similarity_lse(queries, keys, scale, query_ids=labels, key_ids=ref_labels, positives=-1)


def _negatives(queries, keys, scale, labels, ref_labels, a: Tensor, b: Tensor) -> Tensor:
    """Log-sum-exp of each row's logits over the listed pairs (a, b)."""
    n = keys.shape[0]
    if _integer(labels) and _integer(ref_labels):
        number = labels.shape[0] * n - int(_matches(labels, ref_labels)[2].sum())
        if a.shape[0] == number and not (labels[a] == ref_labels[b]).any() and _ascend(a * n + b):
            return _swept(queries, keys, scale, labels, ref_labels)
    return _log_sums(scale * _Dots.apply(queries, keys, a, b), a, queries.shape[0])


# -------------------------------------------------------------------------------------------------------------- losses


def _too_few(positives: int, negatives: int) -> bool:
    """The originals return 0 without positives, without negatives, and for one of each."""
    return not positives or not negatives or (positives <= 1 and negatives <= 1)


@without_autocast
def _nt_xent(queries, keys, scale, labels, ref_labels, pairs) -> tuple[Tensor, tuple[Tensor, Tensor]] | None:
    """loss_ap = log(exp L_ap + Σ_n exp L_an) − L_ap and (a, p); None where there is nothing to contrast."""
    if pairs is None:
        m, n, device = queries.shape[0], keys.shape[0], queries.device
        order, first, same = _matches(labels, ref_labels)
        a = torch.arange(m, device=device).repeat_interleave(same)
        negatives = m * n - a.shape[0]
        before = same.cumsum(0) - same
        p = order[first[a] + torch.arange(a.shape[0], device=device) - before[a]]
        if ref_labels is labels:
            others = a != p
            a, p = a[others], p[others]
    else:
        a, p, *listed = pairs
        negatives = listed[0].shape[0]
    if _too_few(a.shape[0], negatives):
        return None
    problem = queries, keys, scale, labels, ref_labels
    lse = _swept(*problem) if pairs is None else _negatives(*problem, *listed)
    return _softplus(lse[a] - scale * _Dots.apply(queries, keys, a, p)), (a, p)


@without_autocast
def _sup_con(queries, keys, scale, labels, ref_labels) -> Tensor | None:
    """loss_i = log Σ_j exp L_ij − mean_p L_ip over positives p, and j of positives and negatives; 0 without positive.

    The difference cancels in a row of one positive, well apart from its negatives: there it is softplus(r_i − L_ip),
    r_i of the negatives alone. So the ids mask a row itself, and with it the only positive that its class has.
    """
    m, n, device = queries.shape[0], keys.shape[0], queries.device
    itself = ref_labels is labels
    _, first, same = _matches(labels, ref_labels)
    index = torch.arange(n, device=device)
    if itself:
        query_ids = key_ids = torch.where(same == 2, first, n + index)
        own = index
    else:
        _, key_first, key_same = _matches(ref_labels, ref_labels)
        query_ids, key_ids = torch.where(same == 1, first, -1), torch.where(key_same == 1, key_first, n + index)
        own = None
    total, count = positive_sums(queries, keys, scale, None, labels, ref_labels, own, own)
    positives, matching = torch.stack([count.sum(), same.sum()]).tolist()
    if _too_few(positives, m * n - matching):
        return None
    lse = similarity_lse(queries, keys, scale, query_ids=query_ids, key_ids=key_ids, positives=-1)
    difference, _ = against_positives(lse, total, count)
    return torch.where(count == 1, _softplus(difference), difference)


@without_autocast
def _sup_con_of_pairs(queries, keys, scale, labels, ref_labels, pairs, refuse) -> Tensor | None:
    """`_sup_con` of listed pairs; `refuse` gets two masks over the positives: ones, and which are negatives too."""
    m, n = queries.shape[0], keys.shape[0]
    a, p, *listed = pairs
    if _too_few(a.shape[0], listed[0].shape[0]):
        return None
    positives, negatives = (x * n + y for x, y in ((a, p), listed))
    positives, negatives = (x if _ascend(x) else x.unique() for x in (positives, negatives))
    place = torch.searchsorted(negatives, positives).clamp(max=negatives.shape[0] - 1)
    both = negatives[place] == positives
    refuse(torch.ones_like(both), both)
    a, p = positives // n, positives % n
    lse = _negatives(queries, keys, scale, labels, ref_labels, negatives // n, negatives % n)
    logits = scale * _Dots.apply(queries, keys, a, p)
    count = _sums(torch.ones_like(logits), a, m)
    mean = _sums(logits, a, m) / count.clamp(min=1)
    none = count == 0
    every = torch.logaddexp(lse, _log_sums(logits, a, m).masked_fill(none, 0.0))
    return torch.where(count == 1, _softplus(lse - mean), every - mean).masked_fill(none, 0.0)


# ------------------------------------------------------------------------------------------------------------- classes


def _integer(labels: Tensor | None) -> bool:
    return labels is not None and labels.dtype in (*check.INTEGER, torch.bool)


def _fallback(distance: BaseDistance, labels: Tensor | None, ref_labels: Tensor | None, indices_tuple) -> str | None:
    """Why the original must run, or None."""
    kind = type(distance)
    if kind.compute_mat is not DotProductSimilarity.compute_mat or kind.forward is not BaseDistance.forward:
        return f"{kind.__name__} is not a dot product"
    if distance.power != 1:
        return f"{kind.__name__} has power {distance.power}"
    for given in (labels, ref_labels):
        if indices_tuple is None and not _integer(given):
            return f"labels are {str(given.dtype).removeprefix('torch.')}"
    return None


def _compared(distance: BaseDistance, embeddings: Tensor, ref_emb: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of the distance's matrix, with the statistics that its `forward` would collect."""
    distance.reset_stats()
    distance.check_shapes(embeddings, ref_emb)
    queries = distance.maybe_normalize(float32(embeddings))
    keys = queries if ref_emb is embeddings else distance.maybe_normalize(float32(ref_emb))
    distance.set_default_stats(embeddings, ref_emb, queries, keys)
    return queries, keys


class _WithoutMatrix:
    """`compute_loss` of a loss whose `_losses` gives losses and their indices, or None where there is none."""

    last_fallback: str | None = None
    reduction_type: str

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels) -> dict[str, Any]:
        c_f.labels_or_indices_tuple_required(labels, indices_tuple)
        if indices_tuple is None and ref_labels is None:
            ref_labels = labels
        self.last_fallback = _fallback(self.distance, labels, ref_labels, indices_tuple)
        if self.last_fallback is not None:
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        pairs = None
        if indices_tuple is not None:
            pairs = [x.to(embeddings.device, torch.int64) for x in lmu.convert_to_pairs(indices_tuple, labels)]
        queries, keys = _compared(self.distance, embeddings, ref_emb)
        scale = 1 / self.temperature
        itself = ref_labels is labels
        labels = labels.long() if _integer(labels) else labels
        if itself:
            ref_labels = labels
        elif _integer(ref_labels):  # a copy: a backward needs them, and may come after a memory's next batch
            ref_labels = ref_labels.to(torch.int64, copy=True)
        found = self._losses(queries, keys, scale, labels, ref_labels, pairs)
        if found is None:
            return self.zero_losses()
        values, indices = found
        return {"loss": {"losses": values, "indices": indices, "reduction_type": self.reduction_type}}


class NTXentLoss(_WithoutMatrix, losses.NTXentLoss):
    """loss_ap = −log( exp L_ap / (exp L_ap + Σ_n exp L_an) ),   L = ⟨·, ·⟩ / temperature,   mean over positive pairs.

    n are the negatives of anchor a; its other positives are left out. `pytorch_metric_learning.losses.NTXentLoss` with
    its arguments; `last_fallback` says why the last call ran the original's code, None if it did not.
    """

    reduction_type = "pos_pair"

    def _losses(self, *problem: Any) -> tuple[Tensor, tuple[Tensor, Tensor]] | None:
        return _nt_xent(*problem)


class SupConLoss(_WithoutMatrix, losses.SupConLoss):
    """loss_i = −mean_p log( exp L_ip / Σ_j exp L_ij ),   L = ⟨·, ·⟩ / temperature,   mean over the rows with loss > 0.

    p are the positives of row i, j its positives and negatives. `pytorch_metric_learning.losses.SupConLoss` with its
    arguments; `last_fallback` says why the last call ran the original's code, None if it did not.
    """

    reduction_type = "element"

    def _losses(self, *problem: Any) -> tuple[Tensor, Tensor] | None:
        *problem, pairs = problem
        values = (
            _sup_con(*problem) if pairs is None else _sup_con_of_pairs(*problem, pairs, self._assert_either_pos_or_neg)
        )
        return None if values is None else (values, torch.arange(values.shape[0], device=values.device))
