"""Losses of tokens: late interaction, 12 of the catalogue, and those of language models, 15; pooling of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcontrast.distributed._sums import gathered, numbers, share
from fastcontrast.ops import _check as check
from fastcontrast.ops import linear_cross_entropy, maxsim, similarity_topk
from fastcontrast.ops._precision import float32, without_autocast

IGNORED = -100
POOLINGS = ("mean", "first", "last")


def late_interaction_loss(
    queries: Tensor,  # [B, Tq, D]
    documents: Tensor,  # [B, Td, D]
    scale: float | Tensor = 1.0,
    *,
    query_mask: Tensor | None = None,  # [B, Tq] bool
    document_mask: Tensor | None = None,  # [B, Td] bool
    masked: str = "neg_inf",
) -> Tensor:
    """12. Mean cross-entropy of scale · S_bc over all documents, S_bc = Σ_i max_j ⟨q_bi, d_cj⟩, tokens of length 1.

    masked: see `maxsim`. A document without a token has S = −inf with "neg_inf"; its own query's loss is infinite.
    """
    keys, there, index = _documents("late_interaction_loss", queries, documents, document_mask)
    scores = scale * maxsim(queries, keys, query_mask=query_mask, document_mask=there, masked=masked)
    return share(F.cross_entropy(scores, index, reduction="sum"), len(scores))


@without_autocast
def xtr_loss(
    queries: Tensor,  # [B, Tq, D]
    documents: Tensor,  # [B, Td, D]
    scale: float | Tensor = 1.0,
    *,
    k: int = 32,
    query_mask: Tensor | None = None,  # [B, Tq] bool
    document_mask: Tensor | None = None,  # [B, Td] bool
) -> Tensor:
    """12, as XTR: mean cross-entropy of scale · `xtr_scores`."""
    keys, there, index = _documents("xtr_loss", queries, documents, document_mask)
    scores = scale * xtr_scores(queries, keys, k=k, query_mask=query_mask, document_mask=there)
    return share(F.cross_entropy(scores, index, reduction="sum"), len(scores))


def xtr_scores(
    queries: Tensor,  # [B, Tq, D]
    documents: Tensor,  # [C, Td, D]
    *,
    k: int = 32,
    query_mask: Tensor | None = None,  # [B, Tq] bool
    document_mask: Tensor | None = None,  # [C, Td] bool
) -> Tensor:
    """1/Z Σ_i max over those j of document c that are among query token i's k nearest of all documents' tokens, [B, C];
    Z: how many i have such a j. Without any, 0."""
    (b, tq, d), (c, td, _) = queries.shape, documents.shape
    ids = {}
    if document_mask is not None:  # equal ids are no candidates: padding's are the queries'
        nobody = torch.zeros(b * tq, dtype=torch.int64, device=queries.device)
        ids = {"query_ids": nobody, "key_ids": document_mask.flatten().long()}
    values, chosen = similarity_topk(queries.reshape(-1, d), documents.reshape(-1, d), min(k, c * td), **ids)
    there = chosen >= 0
    if query_mask is not None:
        there = there & query_mask.reshape(-1, 1)
    owner = (chosen // td).masked_fill(~there, c)  # the document of each hit, c for none
    # Best first: a document's first hit of a token is its maximum.
    repeated = (owner[:, :, None] == owner[:, None, :]).tril(-1).any(2)
    owner = owner.masked_fill(repeated, c)
    place = (torch.arange(b, device=owner.device).repeat_interleave(tq)[:, None] * (c + 1) + owner).flatten()
    values = values.masked_fill(owner == c, 0.0).flatten()
    total = values.new_zeros(b * (c + 1)).index_add(0, place, values).view(b, c + 1)[:, :c]
    return total / torch.bincount(place, minlength=b * (c + 1)).view(b, c + 1)[:, :c].clamp(min=1)


def _documents(op: str, queries: Tensor, documents: Tensor, mask: Tensor | None):
    """Those of all ranks, their mask, and each query's own."""
    check.tensor(op, "queries", queries, 3, "[B, Tq, D]")
    check.tensor(op, "documents", documents, 3, "[B, Td, D]")
    if len(documents) != len(queries):
        raise ValueError(f"{op}: documents must be as many as queries, {len(queries)}, got {len(documents)}")
    mask = None if mask is None else gathered(mask.to(torch.uint8)).bool()
    return gathered(documents), mask, numbers(len(queries), queries.device)


def pool(states: Tensor, mask: Tensor, how: str = "mean") -> Tensor:  # [B, T, D], [B, T] bool
    """One vector a text, [B, D]: the mean of its tokens, the "first", or the "last" of them; 0 where there is none."""
    check.one_of("pool", "how", how, POOLINGS)
    states = states.masked_fill(~mask[..., None], 0.0)
    if how == "mean":
        return states.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    place = mask.to(torch.uint8).argmax(1)  # padding may lie on either side
    if how == "last":
        place = mask.shape[1] - 1 - mask.flip(1).to(torch.uint8).argmax(1)
    return states[torch.arange(len(states), device=states.device), place]


def token_loss(
    states: Tensor,  # [B, T, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [B, T] integer
    *,
    before: bool = False,
) -> Tensor:
    """15. Mean cross-entropy of the tokens that `labels` names, −100 elsewhere; the logits [B, T, V] are never stored.

    MLM: labels at the masked places. MNTP: the same, `before=True`: a token is told by the state before it. NTP: all
    tokens as labels, `before=True`.
    """
    if before:
        states, labels = states[:, :-1], labels[:, 1:]
    total = linear_cross_entropy(states, weight, labels, ignore_index=IGNORED, reduction="sum")
    return share(total, (labels != IGNORED).sum())


def replaced_token_loss(logits: Tensor, replaced: Tensor, mask: Tensor) -> Tensor:  # [B, T] each
    """15, RTD: mean binary cross-entropy over real tokens of whether a generator replaced them."""
    logits = float32(logits).masked_fill(~mask, 0.0)
    losses = F.binary_cross_entropy_with_logits(logits, replaced.to(logits.dtype), reduction="none")
    return share((losses * mask).sum(), mask.sum())
