"""A language model that reads vectors: they become tokens in front of a text, and the text is what is learned.

    inputs = [p_1 … p_S; e(y_1) … e(y_T)],  p = x Wᵀ + b,  L = mean over kept t of −log p(y_t | p, y_<t)

Tokens are kept up to the first end token, which is one of them: padding, for which the end token serves as well, begins
after it. y_1 is predicted at p_S.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastcontrast.distributed._sums import share
from fastcontrast.ops import _check as check
from fastcontrast.ops import linear_cross_entropy
from fastcontrast.ops._precision import float32

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

IGNORED = -100


class Prefix(nn.Module):
    """Each of S vectors becomes `tokens` tokens: x Wᵀ + b, cut row by row, then dropout. [B, S, inside] or [B, inside]
    → [B, S · tokens, width]; half-precision vectors are multiplied in float32."""

    def __init__(self, inside: int, width: int, tokens: int = 1, dropout: float = 0.0):
        super().__init__()
        self.tokens = tokens
        self.linear = nn.Linear(inside, tokens * width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # [B, S, inside] or [B, inside]
        if x.ndim not in (2, 3) or x.shape[-1] != self.linear.in_features:
            inside = self.linear.in_features
            raise ValueError(f"Prefix: x must be [B, {inside}] or [B, S, {inside}], got {list(x.shape)}")
        x = self.linear(float32(x) if self.linear.weight.dtype == torch.float32 else x)
        return self.dropout(x.unflatten(-1, (self.tokens, -1)).flatten(1, -2))


def caption_labels(captions: Tensor, prefix: int, end: int) -> Tensor:  # [B, T] integer
    """Labels [B, prefix + T]: −100 on the prefix, a caption's tokens through its first `end`, −100 after it. A caption
    without `end` keeps all tokens; one that begins with it is empty, and keeps none."""
    ends = (captions == end).long()
    after = ends.cumsum(1) > ends  # an end came before
    empty = ends[:, :1].bool()
    return nn.functional.pad(captions.long().masked_fill(after | empty, IGNORED), (prefix, 0), value=IGNORED)


def prefix_loss(
    model: LlamaForCausalLM,
    prefix: Tensor,  # [B, S, D]
    captions: Tensor,  # [B, T] integer
    end: int,
    *,
    mask: Tensor | None = None,  # [B, S] bool
) -> Tensor:
    """L above, the mean over all kept tokens of the batch, on several ranks of the whole batch; 0 where none is kept.
    Logits [B·T, vocabulary] never exist.

    Args:
        mask: False where the prefix is padding; its last position must be True: the first token is predicted there.

    Raises ValueError naming what does not fit.
    """
    width = model.get_input_embeddings().embedding_dim
    check.tensor("prefix_loss", "prefix", prefix, 3, f"[B, S, {width}]")
    count, length, _ = prefix.shape
    if not length or prefix.shape[2] != width:
        raise ValueError(f"prefix_loss: prefix must be [B, S, {width}] with S at least 1, got {list(prefix.shape)}")
    if captions.ndim != 2 or len(captions) != count or captions.dtype not in check.INTEGER:
        got = f"{list(captions.shape)} of {captions.dtype}"
        raise ValueError(f"prefix_loss: captions must be integers [{count}, T], got {got}")
    if mask is not None and (mask.shape != (count, length) or not mask[:, -1].all()):
        raise ValueError(
            f"prefix_loss: mask must be [{count}, {length}] and True in its last column, got {list(mask.shape)}"
        )
    embedded = model.get_input_embeddings()(captions[:, :-1])  # nothing is predicted after the last token
    inputs: dict[str, Any] = {"inputs_embeds": torch.cat([prefix.to(embedded.dtype), embedded], 1)}
    if mask is not None:
        seen = nn.functional.pad(mask.long(), (0, embedded.shape[1]), value=1)
        inputs |= {"attention_mask": seen, "position_ids": (seen.cumsum(1) - 1).clamp(min=0)}
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[:, length - 1 :][:, : captions.shape[1]]
    labels = caption_labels(captions, length, end)[:, length:]
    head = model.get_output_embeddings()
    total = linear_cross_entropy(hidden, head.weight, labels, bias=head.bias, reduction="sum")
    return share(total, (labels != IGNORED).sum())
