"""InfoNCE in all its directions, with hard negatives, a queue, masks and smoothing: algebra on log-sum-exps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcontrast import ops
from fastcontrast.distributed._exchange import active
from fastcontrast.distributed._lse import similarity_lse
from fastcontrast.distributed._sums import count_over_ranks, numbers, over_ranks, segment_sums, share
from fastcontrast.ops import _check as check
from fastcontrast.ops import _segments, similarity_cross_entropy
from fastcontrast.ops._precision import float32, without_autocast

from ._common import ScaledLoss, features, own_index, pick, reduce

DIRECTIONS = ("query_to_key", "key_to_query", "query_to_query", "key_to_key")


@without_autocast
def info_nce(
    queries: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    scale: float | Tensor = 20.0,
    *,
    directions: Sequence[str] = ("query_to_key",),
    joint: bool = True,
    count_positive_once: bool = False,
    positives: Tensor | None = None,  # [M] integer
    hard_negatives: Tensor | None = None,  # [M, K, D]
    hard_negatives_mask: Tensor | None = None,  # [M, K] bool
    queue: Tensor | None = None,  # [Q, D]
    key_bias: Tensor | None = None,  # [N]
    query_ids: Tensor | None = None,  # [M] integer
    key_ids: Tensor | None = None,  # [N] integer
    queue_ids: Tensor | None = None,  # [Q] integer
    guide: tuple[Tensor, Tensor, Tensor | float] | None = None,  # [M, Dg], [N, Dg], [M]
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,  # [M]
    reduction: str = "mean",
    return_accuracy: bool = False,
    workspace: int | None = None,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """loss_i = log Σ_candidates exp(logit) − L_{i,own(i)},   L_ij = scale · ⟨q_i, k_j⟩ + key_bias_j,   mean over rows.

    Features are taken as they are: normalise them first for cosine similarity. With the defaults this equals
    `F.cross_entropy(scale * queries @ keys.T, arange(M))`.

    Args:
        queries, keys: [M, D], [N, D], N ≥ M: row i's own key is i, or `positives[i]`; keys behind the own ones are
            further negatives of every row.
        scale: 1 / temperature, number or 0-dim tensor with gradient.
        directions: what else competes with row i's positive:
            "query_to_key"    L_ij over all keys j (r_i of the matrix),
            "key_to_query"    L_j,own(i) over all queries j (the own key's column),
            "query_to_query"  scale·⟨q_i, q_j⟩ over j ≠ i,
            "key_to_key"      scale·⟨k_own(i), k_j⟩ over the other keys.
        joint: True: one softmax over the candidates of all directions together (GTE: all four). False: one softmax a
            direction (those that hold no positive get it added), the mean of their losses (CLIP: the first two).
        count_positive_once: the positive lies in "query_to_key" and in "key_to_query": True removes one of them from a
            joint softmax (GTE counts it twice, so that its minimum is log 2).
        hard_negatives, hard_negatives_mask: further candidates of row i alone; True entries of the mask are used.
        queue: further candidates of every row, without gradient (memory bank, MoCo).
        key_bias: per-key bias, e.g. −log p(key) to correct for how negatives are drawn.
        query_ids, key_ids, queue_ids: pairs with equal ids do not compete; the own key always stays.
        guide: (guide_queries, guide_keys, limit): key j does not compete where ⟨gq_i, gk_j⟩ > limit_i; likewise
            ⟨gq_i, gq_j⟩ and ⟨gk_i, gk_j⟩ for the other directions (GISTEmbed).
        label_smoothing: share of the target spread evenly over the row's candidates, as in `F.cross_entropy`.
        weights: [M], multiply the rows' losses; the mean still divides by M.
        reduction: "mean", "sum", or "none" for [M].
        return_accuracy: also the share of rows whose own key has the largest logit among the keys (with
            "key_to_query": averaged with that of the columns among the queries).
        workspace, implementation: see `similarity_lse`.

    An empty batch gives 0. Raises as `similarity_lse`.
    Source: van den Oord et al. 2018; joint directions: Li et al. 2023 (GTE).
    """
    op = "info_nce"
    queries, keys = features(op, queries, keys)
    m = queries.shape[0]
    own = own_index(op, queries, keys, positives)
    _check_directions(op, directions, joint, label_smoothing, guide)
    if queue_ids is not None and (query_ids is None or queue is None):
        raise ValueError(f"{op}: queue_ids needs queue and query_ids")
    if label_smoothing and own is not None and query_ids is not None and "key_to_query" in directions:
        raise ValueError(f'{op}: label_smoothing of "key_to_query" cannot go with ids and positives together')
    scale = check.scalar(op, "scale", scale, queries)
    run = {"workspace": workspace, "implementation": implementation}
    forward, backward = "query_to_key" in directions, "key_to_query" in directions
    masks = {"query_ids": query_ids, "key_ids": key_ids, "positives": own, "guide": guide}
    extras_given = hard_negatives is not None or hard_negatives_mask is not None or queue is not None
    plain = reduction == "mean" and weights is None and not label_smoothing and not extras_given and not return_accuracy
    plain = plain and active() is None
    square = own is None and m == keys.shape[0] and not joint
    if plain and m and forward and (len(directions) == 1 or (backward and len(directions) == 2 and square)):
        return similarity_cross_entropy(queries, keys, scale, both=backward, key_bias=key_bias, **masks, **run)
    own_keys = pick(keys, own, m)
    if forward or backward:
        dim = "both" if forward and backward else "rows" if forward else "columns"
        blocks, positive, hits = _sweep(
            queries, keys, scale, own, return_accuracy, dim=dim, key_bias=key_bias, **masks, **run
        )
    elif return_accuracy:
        raise ValueError(f'{op}: return_accuracy needs the direction "query_to_key" or "key_to_query"')
    else:
        blocks, hits = [], []
        positive = scale * torch.linalg.vecdot(float32(queries), float32(own_keys))
        if key_bias is not None:
            positive = positive + pick(key_bias.to(positive.dtype), own, m)
    has_positive = len(blocks)
    if "query_to_query" in directions:
        one_guide = _one_guide(guide, 0, None, m)
        blocks.append(_same_side(queries, queries, scale, None, query_ids, query_ids, one_guide, run))
    if "key_to_key" in directions:
        one_guide = _one_guide(guide, 1, own, m)
        blocks.append(_same_side(own_keys, keys, scale, own, _ids(key_ids, own, m), key_ids, one_guide, run))

    extra = _extra_logits(op, queries, scale, hard_negatives, hard_negatives_mask)
    extras = [] if extra is None else [extra]
    if queue is not None:
        check.matrix(op, "queue", queue, queries.shape[1])
        queue = _like(queue, queries).detach()
        ids = {} if queue_ids is None else {"query_ids": query_ids, "key_ids": queue_ids, "positives": -1}
        extras.append(ops.similarity_lse(queries, queue, scale, **ids, **run)[:, None])
    if joint:
        losses = _joint(blocks, extras, positive, has_positive, count_positive_once) - positive
    else:
        terms = [block if i < has_positive else torch.logaddexp(block, positive) for i, block in enumerate(blocks)]
        losses = _mean([_with_extras(term, extras) for term in terms]) - positive
    if label_smoothing:
        others = _extra_sum(queries, scale, extra, None if queue is None else (queue, queue_ids, query_ids))
        smooth = _mean_logits(queries, keys, scale, key_bias, positive, own, query_ids, key_ids, others, directions)
        losses = losses + label_smoothing * (positive - smooth)
    loss = reduce(op, losses, weights, reduction, like=queries)
    if not return_accuracy:
        return loss
    return loss, torch.stack([share(hit.sum().float(), m) for hit in hits]).mean()


def _sweep(queries, keys, scale, own, return_accuracy, *, dim, **settings) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Log-sum-exps of rows and of own columns as asked for, the positives' logits, and whether each is the largest."""
    forward, backward = dim != "columns", dim != "rows"
    swept = similarity_lse(
        queries, keys, scale, dim=dim, return_positives=True, return_best=return_accuracy, **settings
    )
    swept, m, hits = list(swept), queries.shape[0], []
    blocks = [swept.pop(0)] if forward else []
    blocks += [pick(swept.pop(0), own, m)] if backward else []
    positive = swept.pop(0)
    if return_accuracy:
        index = torch.arange(m, device=queries.device)
        hits += [swept.pop(0) == (index if own is None else own)] if forward else []
        hits += [pick(swept.pop(0), own, m) == index] if backward else []
    return blocks, positive, hits


class InfoNCELoss(ScaledLoss):
    """`info_nce` as a module: `InfoNCELoss(scale=20.0)(queries, keys)`; see there for equation and settings."""

    function = staticmethod(info_nce)
    default_scale = 20.0


def _check_directions(op: str, directions: Sequence[str], joint: bool, label_smoothing: float, guide) -> None:
    if isinstance(directions, str) or not directions:
        raise ValueError(f"{op}: directions must be a non-empty sequence of names, got {directions!r}")
    for direction in directions:
        check.one_of(op, "directions", direction, DIRECTIONS)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{op}: label_smoothing must lie in [0, 1), got {label_smoothing}")
    if label_smoothing and guide is not None:
        raise ValueError(f"{op}: label_smoothing cannot go with guide: which candidates remain is known to no sum")
    if label_smoothing and ((joint and len(directions) > 1) or not set(directions) <= set(DIRECTIONS[:2])):
        raise ValueError(
            f'{op}: label_smoothing needs "query_to_key" and/or "key_to_query", joint=False for both, '
            f"got directions={tuple(directions)} and joint={joint}"
        )


def _like(x: Tensor, queries: Tensor) -> Tensor:
    """Candidates that may come in another precision than the queries, in theirs if either is half."""
    half = (torch.bfloat16, torch.float16)
    return x.to(queries.dtype) if x.dtype in half or queries.dtype in half else x


def _ids(ids: Tensor | None, own: Tensor | None, m: int) -> Tensor | None:
    return None if ids is None else pick(ids, own, m)


def _one_guide(guide, side: int, own: Tensor | None, m: int):
    """The guide of one side against itself, under the same limits."""
    if guide is None:
        return None
    return (guide[0] if side == 0 else pick(guide[1], own, m)), guide[side], guide[2]


def _same_side(rows, candidates, scale, own, row_ids, candidate_ids, guide, run) -> Tensor:
    """log Σ exp of rows against candidates of their own kind, each row's own candidate and equal ids left out."""
    m, n = rows.shape[0], candidates.shape[0]
    if row_ids is None:
        index = numbers(n, rows.device)
        row_ids, candidate_ids = pick(index, own, m), index
    # Where both are one tensor, with one tensor of ids, the sweep computes half of the symmetric matrix.
    return similarity_lse(
        rows, candidates, scale, query_ids=row_ids, key_ids=candidate_ids, positives=-1, guide=guide, **run
    )


def _extra_logits(
    op: str, queries: Tensor, scale: Tensor, negatives: Tensor | None, mask: Tensor | None
) -> Tensor | None:
    if negatives is None:
        if mask is not None:
            raise ValueError(f"{op}: hard_negatives_mask needs hard_negatives")
        return None
    m, d = queries.shape
    if not isinstance(negatives, Tensor):
        raise TypeError(f"{op}: hard_negatives must be a tensor, got {type(negatives).__name__}")
    check.same_kind(op, "hard_negatives", negatives, queries, dtype=False)
    if negatives.ndim != 3 or negatives.shape[0] != m or negatives.shape[2] != d:
        raise ValueError(f"{op}: hard_negatives must be [{m}, K, {d}], got {list(negatives.shape)}")
    logits = scale * torch.einsum("md,mkd->mk", float32(queries), float32(negatives))
    if mask is None:
        return logits
    if mask.shape != logits.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"{op}: hard_negatives_mask must be bool {list(logits.shape)}, got {mask.dtype} {list(mask.shape)}"
        )
    return logits.masked_fill(~mask, float("-inf"))


def _with_extras(lse: Tensor, extras: list[Tensor]) -> Tensor:
    return torch.logsumexp(torch.cat([lse[:, None], *extras], 1), 1) if extras else lse


def _mean(terms: list[Tensor]) -> Tensor:
    if len(terms) == 1:
        return terms[0]
    return torch.lerp(*terms, 0.5) if len(terms) == 2 else torch.stack(terms).mean(0)


def _joint(blocks, extras, positive, has_positive: int, count_positive_once: bool) -> Tensor:
    if not has_positive:
        blocks = [positive, *blocks]
    elif has_positive == 2 and count_positive_once:
        # e^r + e^c − e^p. The column keeps the rest of its mass; what cancels is below the rounding of e^r ≥ e^p.
        rows, columns, *others = blocks
        top = torch.maximum(rows, columns).detach()
        both = (rows - top).exp() + (columns - top).exp() - (positive - top).exp()
        blocks = [both.log() + top, *others]
    if len(blocks) == 1:
        return _with_extras(blocks[0], extras)
    return _with_extras(torch.logsumexp(torch.stack(blocks, 1), 1), extras)


def _extra_sum(queries, scale, extra, queue) -> tuple[Tensor, Tensor]:
    """Sum and number of each row's logits to its hard negatives and the queue."""
    queries = float32(queries)
    total, count = queries.new_zeros(queries.shape[0]), queries.new_zeros(queries.shape[0])
    if extra is not None:
        used = ~torch.isneginf(extra)
        total, count = total + extra.masked_fill(~used, 0.0).sum(1), count + used.sum(1)
    if queue is not None:
        negatives, queue_ids, query_ids = float32(queue[0]), *queue[1:]
        total, count = total + scale * (queries @ negatives.sum(0)), count + negatives.shape[0]
        if queue_ids is not None:
            same, number = _segments.segment_sums(negatives, queue_ids, query_ids)
            total, count = total - scale * torch.linalg.vecdot(queries, same), count - number
    return total, count


def _mean_logits(queries, keys, scale, key_bias, positive, own, query_ids, key_ids, others, directions) -> Tensor:
    """Mean logit over a row's candidates, of "query_to_key" and "key_to_query" averaged as asked for."""
    m, means = queries.shape[0], []
    own_ids = _ids(key_ids, own, m)
    if "query_to_key" in directions:
        ids = None if query_ids is None else (query_ids, key_ids, own_ids)
        means.append(_mean_logit(queries, keys, scale, key_bias, positive, ids, others))
    if "key_to_query" in directions:
        # every logit of the own key's column carries that key's bias
        bias = positive.new_zeros(m) if key_bias is None else pick(key_bias.to(positive.dtype), own, m)
        ids = None if query_ids is None else (own_ids, query_ids, query_ids)
        means.append(_mean_logit(pick(keys, own, m), queries, scale, None, positive, ids, others, row_bias=bias))
    return _mean(means)


def _mean_logit(rows, candidates, scale, bias, positive, ids, others, row_bias=None) -> Tensor:
    """Mean logit over a row's candidates: sums of logits are logits of sums, so no matrix is needed.

    `ids`: of the rows, of the candidates, and of each row's own candidate, or None. `others`: sum and number of logits
    to candidates of other kinds.
    """
    rows, candidates = float32(rows), float32(candidates)
    number = count_over_ranks(candidates.shape[0], candidates.device)
    total = scale * (rows @ over_ranks(candidates.sum(0)))
    if bias is not None:
        total = total + over_ranks(bias.to(rows.dtype).sum())
    if row_bias is not None:
        total = total + number * row_bias
    if ids is not None:  # equal ids do not compete, but the own candidate does
        row_ids, candidate_ids, own_ids = ids
        values = candidates if bias is None else torch.cat([candidates, bias.to(rows.dtype)[:, None]], 1)
        sums, masked = segment_sums(values, candidate_ids, row_ids)
        same = scale * torch.linalg.vecdot(rows, sums[:, : rows.shape[1]])
        if bias is not None:
            same = same + sums[:, -1]
        if row_bias is not None:
            same = same + masked * row_bias
        own_masked = row_ids == own_ids
        total = total - same + positive * own_masked
        number = number - masked + own_masked
    return (total + others[0]) / (number + others[1])
