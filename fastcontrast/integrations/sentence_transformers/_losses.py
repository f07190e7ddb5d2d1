"""Losses of a batch's rows from its embeddings; inside `exchange`, other ranks' rows are candidates too."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcontrast import ops
from fastcontrast.distributed._lse import similarity_lse
from fastcontrast.distributed._sums import numbers
from fastcontrast.losses import info_nce
from fastcontrast.ops._precision import without_autocast
from fastcontrast.ops._workspace import empty

DIRECTIONS = {
    "query_to_doc": "query_to_key",
    "doc_to_query": "key_to_query",
    "query_to_query": "query_to_query",
    "doc_to_doc": "key_to_key",
}


@without_autocast
def ranking(
    queries: Tensor,  # [n, D]
    docs: list[Tensor],  # positives, then hard negatives, each [n, D]
    scale: Tensor | float,
    directions: tuple[str, ...],
    joint: bool,
    reduction: str,
) -> Tensor:  # [n], or their mean
    own = {}
    if "doc_to_doc" in directions and len(docs) > 1:
        # There no document meets one of its own query. Ids say so; a query's own hard negatives come back apart.
        ids = numbers(queries.shape[0], queries.device)
        own = {"query_ids": ids, "key_ids": ids.repeat(len(docs)), "hard_negatives": torch.stack(docs[1:], 1)}
    names = [DIRECTIONS[name] for name in dict.fromkeys(directions)]
    return info_nce(queries, together(docs), scale, directions=names, joint=joint, reduction=reduction, **own)


def together(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else _Together.apply(*parts)


class _Together(torch.autograd.Function):
    """torch.cat into memory that was used before: of 4,096 embeddings of 768 numbers, fresh pages cost a tenth of the
    whole loss."""

    @staticmethod
    def forward(ctx, *parts):
        ctx.rows = [len(x) for x in parts]
        return torch.cat(parts, out=empty(parts[0], sum(ctx.rows), parts[0].shape[1]))

    @staticmethod
    def backward(ctx, gradient):
        return gradient.split(ctx.rows)


@without_autocast
def hard_ranking(
    queries: Tensor,  # [n, D]
    docs: list[Tensor],  # positives, then hard negatives, each [n, D]
    scale: Tensor | float,
    directions: tuple[str, ...],
    joint: bool,
    mode: str,
    strength: float,
) -> Tensor:  # [n]
    """`ranking` whose negatives of `mode` have logits (scale + strength) · s, with the gradient of scale · s alone.

    For documents of other queries those are logits of a steeper scale, whose gradient to the features is lowered to
    that of `scale`. A query's own documents are few: their logits are written out.
    """
    keys, ids = together(docs), numbers(queries.shape[0], queries.device)
    doc_ids = ids if keys is docs[0] else ids.repeat(len(docs))
    similarities = torch.einsum("nd,nkd->nk", queries, torch.stack(docs, 1))
    own = scale * similarities
    if mode != "in_batch_negatives":
        own = own + F.pad(strength * similarities.detach()[:, 1:], (1, 0))
    others = queries, keys, scale
    if mode != "hard_negatives":
        steeper = scale + strength
        share = torch.as_tensor(scale / steeper, dtype=queries.dtype, device=queries.device).detach()
        # lerp between equal ends is their value, with `share` of the gradient
        others = torch.lerp(queries.detach(), queries, share), torch.lerp(keys.detach(), keys, share), steeper
    rest = similarity_lse(*others, query_ids=ids, key_ids=doc_ids, positives=-1)
    terms = [torch.logsumexp(torch.cat([rest[:, None], own], 1), 1)]
    if "doc_to_query" in directions:
        terms.append(similarity_lse(queries, docs[0], scale, dim="columns"))
    if "query_to_query" in directions:
        terms.append(similarity_lse(queries, queries, scale, query_ids=ids, key_ids=ids, positives=-1))
    if "doc_to_doc" in directions:
        terms.append(similarity_lse(docs[0], keys, scale, query_ids=ids, key_ids=doc_ids, positives=-1))
    stacked = torch.stack(terms, 1)
    return (torch.logsumexp(stacked, 1) if joint else stacked.mean(1)) - own[:, 0]


@without_autocast
def gist(
    anchors: Tensor,  # [n, D]
    candidates: list[Tensor],  # positives, then hard negatives, each [n, D]
    guide_anchors: Tensor,  # [n, Dg]
    guide_candidates: list[Tensor],  # each [n, Dg]
    scale: Tensor | float,
    limit: Callable[[Tensor], Tensor],
    contrast: tuple[bool, bool],
    across: AbstractContextManager,
) -> Tensor:  # [n]
    """A row's candidates are documents, and with `contrast` anchors and positives, unless the guide finds them more
    similar than `limit` of its similarity of the row's own pair. Anchors meet those of their rank alone."""
    own = torch.linalg.vecdot(guide_anchors, guide_candidates[0])
    # A duplicate of the positive is as similar as it, not more. In the library both numbers are the same sum; here one
    # comes from a matrix product, and they differ by rounding.
    limits = limit(own) + 8 * torch.finfo(own.dtype).eps
    with across:
        guide = guide_anchors, together(guide_candidates), limits
        rows, positive = similarity_lse(anchors, together(candidates), scale, guide=guide, return_positives=True)
        terms = [rows]
        if contrast[1]:
            guide = guide_candidates[0], guide_candidates[0], limits
            terms.append(similarity_lse(candidates[0], candidates[0], scale, positives=-1, guide=guide))
    if contrast[0]:
        guide = guide_anchors, guide_anchors, limits
        terms.append(ops.similarity_lse(anchors, anchors, scale, positives=-1, guide=guide).to(rows.dtype))
    return torch.logsumexp(torch.stack(terms, 1), 1) - positive
