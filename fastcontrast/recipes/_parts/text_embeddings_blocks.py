"""Softmaxes over several blocks of scores at once, 1 to 5 of the catalogue: who competes with a query's document.

q, d and negatives are of length 1, scale = 1 / τ. Every block is one sweep, and no matrix of scores is stored. Inside
`fastcontrast.distributed.exchange` the candidates are those of all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast import info_nce
from fastcontrast.distributed._lse import similarity_lse
from fastcontrast.distributed._sums import numbers, share
from fastcontrast.ops import _check as check
from fastcontrast.ops._precision import float32, without_autocast

ALL = ("query_to_key", "key_to_query", "query_to_query", "key_to_key")
OWN_SIDES = ("query_to_key", "query_to_query", "key_to_key")


def ranking_loss(
    queries: Tensor,  # [B, D]
    documents: Tensor,  # [B, D]
    scale: float | Tensor = 20.0,
    *,
    negatives: Tensor | None = None,  # [B, K, D]
    symmetric: bool = False,
) -> Tensor:
    """1 and 2. InfoNCE of q_i over all documents and all negatives of all queries; `symmetric`: averaged with that of
    d_i over all queries."""
    keys = documents if negatives is None else torch.cat([documents, _flat("ranking_loss", negatives, queries)])
    return info_nce(queries, keys, scale, directions=ALL[:2] if symmetric else ALL[:1], joint=False)


def gte_loss(
    queries: Tensor,  # [B, D]
    documents: Tensor,  # [B, D]
    scale: float | Tensor = 100.0,
    *,
    negatives: Tensor | None = None,  # [B, K, D]
    count_positive_once: bool = False,
) -> Tensor:
    """3. One softmax over q_i and all documents, d_i and all queries, q_i and other queries, d_i and documents of other
    queries. The positive is twice in it, unless `count_positive_once`: the least loss is log 2."""
    settings = {"directions": ALL, "count_positive_once": count_positive_once}
    if negatives is None:
        return info_nce(queries, documents, scale, **settings)
    keys, ids = _with_negatives("gte_loss", queries, documents, negatives, None)
    return info_nce(queries, keys, scale, **ids, hard_negatives=negatives, **settings)


def masked_loss(
    queries: Tensor,  # [B, D]
    documents: Tensor,  # [B, D]
    scale: float | Tensor = 100.0,
    *,
    negatives: Tensor | None = None,  # [B, K, D]
    margin: float = 0.1,
    ids: Tensor | None = None,  # [B] integer
    all_negatives: bool = False,
) -> Tensor:
    """4, as Qwen3-Embedding: q_i over its own negatives, other documents and other queries, and d_i over other
    documents, without those whose similarity is above s(q_i, d_i) + margin.

    ids: documents with equal ids are the same text, and do not compete. all_negatives: negatives of other queries
    compete as other documents do.
    """
    limit = torch.linalg.vecdot(float32(queries), float32(documents)).detach() + margin
    keys, own = documents, {"query_ids": ids, "key_ids": ids}
    extra = {}
    if negatives is not None:
        _flat("masked_loss", negatives, queries)
        near = torch.einsum("bd,bkd->bk", float32(queries.detach()), float32(negatives.detach()))
        extra = {"hard_negatives": negatives, "hard_negatives_mask": near <= limit[:, None]}
        if all_negatives:
            keys, own = _with_negatives("masked_loss", queries, documents, negatives, ids)
    guide = queries.detach(), keys.detach(), limit
    return info_nce(queries, keys, scale, directions=OWN_SIDES, guide=guide, **own, **extra)


@without_autocast
def gist_loss(
    queries: Tensor,  # [B, D]
    documents: Tensor,  # [B, D]
    guide_queries: Tensor,  # [B, E]
    guide_documents: Tensor,  # [B, E]
    scale: float | Tensor = 100.0,
    *,
    negatives: Tensor | None = None,  # [B, K, D]
    guide_negatives: Tensor | None = None,  # [B, K, E]
    margin: float = 0.0,
    relative: bool = False,
    blocks: tuple[str, ...] = OWN_SIDES,
) -> Tensor:
    """5. q_i over documents, other queries (and d_i over other documents), and negatives, without those that a guide
    finds more similar than t_i = g(q_i, d_i) − margin, or g · (1 − margin) if `relative`. The own document stays."""
    op = "gist_loss"
    own = torch.linalg.vecdot(float32(guide_queries), float32(guide_documents))
    # A duplicate is as similar as the document itself, not more; two ways to sum differ by rounding.
    limit = (own * (1 - margin) if relative else own - margin) + 8 * torch.finfo(own.dtype).eps
    guide = guide_queries, guide_documents, limit
    losses = info_nce(queries, documents, scale, directions=blocks, guide=guide, reduction="none")
    if (negatives is None) != (guide_negatives is None):
        raise ValueError(f"{op}: negatives and guide_negatives go together")
    if negatives is not None:
        flat, of_guide = _flat(op, negatives, queries), _flat(op, guide_negatives, guide_queries)
        guide = guide_queries, of_guide, limit
        others = similarity_lse(queries, flat, scale, guide=guide, positives=-1)
        positive = scale * torch.linalg.vecdot(float32(queries), float32(documents))
        losses = torch.logaddexp(losses, (others - positive).to(losses.dtype))
    return share(losses.sum(), len(losses))


def _flat(op: str, negatives: Tensor, queries: Tensor) -> Tensor:
    """[B·K, D], query by query."""
    check.tensor(op, "negatives", negatives, 3, "[B, K, D]")
    if len(negatives) != len(queries) or negatives.shape[2] != queries.shape[1]:
        got, (rows, width) = list(negatives.shape), queries.shape
        raise ValueError(f"{op}: negatives must be [{rows}, K, {width}] to match queries, got {got}")
    return negatives.flatten(0, 1)


def _with_negatives(op: str, queries: Tensor, documents: Tensor, negatives: Tensor, ids: Tensor | None):
    """All documents, and ids by which none meets another of its own query: its own negatives are given apart."""
    keys = torch.cat([documents, _flat(op, negatives, queries)])
    ids = numbers(len(queries), queries.device) if ids is None else ids
    return keys, {"query_ids": ids, "key_ids": torch.cat([ids, ids.repeat_interleave(negatives.shape[1])])}
