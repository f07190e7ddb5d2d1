"""What the operations on language-model heads share: hidden states of tokens as queries, a vocabulary as keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _check as check
from ._workspace import MIB, workspace_bytes

# The gradient of a vocabulary is read and written once a chunk of tokens, and a product of few rows is slow. One head:
# the logits of 512 tokens of a vocabulary of 49,152. Two: of 688 in each; with 512 they would take 1.05 times as long,
# with 1,024 0.98 times.
ONE_HEAD, TWO_HEADS = 96 * MIB, 288 * MIB


def workspace_of(workspace: int | None, device: torch.device, usual: int = ONE_HEAD) -> int:
    """Bytes for the logits of a chunk of tokens."""
    return workspace_bytes(workspace, device, usual)


class Tokens(NamedTuple):
    """The tokens that count, as rows."""

    hidden: Tensor  # [M, D]
    targets: Tensor  # [M] int64, within the vocabulary
    index: Tensor | None  # [M], their places among all; None: all are here
    valid: Tensor | None  # [M] bool, where some that do not count are here too

    def spread(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Values [M] of these tokens as [*shape] of all, 0 where one does not count."""
        if self.valid is not None:
            values = values.masked_fill(~self.valid, 0.0)
        if self.index is not None:
            values = values.new_zeros(shape.numel()).index_copy(0, self.index, values)
        return values.view(shape)


def head(op: str, hidden: Any, weight: Any, bias: Any, names: tuple[str, str, str] = ("hidden", "weight", "bias")):
    """Hidden states [..., D], vocabulary [V, D] and bias [V] fit each other; returns the hidden states as [T, D]."""
    if isinstance(hidden, Tensor) and hidden.ndim != 2:
        if hidden.ndim < 2:
            raise ValueError(f"{op}: {names[0]} must be [..., width], got {list(hidden.shape)}")
        hidden = hidden.flatten(0, -2)
    check.matrix(op, names[0], hidden)
    check.matrix(op, names[1], weight, hidden.shape[1], like=names[0])
    check.same_kind(op, names[1], weight, hidden, like_name=names[0])
    if bias is not None:
        check.vector(op, names[2], bias, weight.shape[0], hidden, floating=True)
    return hidden


def per_token(op: str, name: str, x: Any, hidden: Tensor, *, floating: bool) -> Tensor:
    """`x` has the leading shape of `hidden` [..., D]; flat, [T]."""
    if isinstance(x, Tensor) and x.shape != hidden.shape[:-1]:
        raise ValueError(f"{op}: {name} must be {list(hidden.shape[:-1])}, one a token, got {list(x.shape)}")
    x = x.flatten() if isinstance(x, Tensor) else x
    check.vector(op, name, x, hidden.shape[:-1].numel(), hidden, floating=floating)
    return x


def token_weights(op: str, weights: Any, hidden: Tensor) -> Tensor | None:
    """`per_token` weights [T] in the dtype of losses; None stays."""
    if weights is None:
        return None
    weights = per_token(op, "weights", weights, hidden, floating=True)
    if weights.requires_grad:
        raise ValueError(f"{op}: weights must not require a gradient; multiply the tokens of reduction='none'")
    return weights.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)


def select(op: str, hidden: Tensor, vocabulary: int, targets: Tensor, ignore_index: int) -> Tokens:
    """Those of the tokens [T, D] whose target [T] is not `ignore_index`.

    On a CPU they are picked out, and the others cost nothing. Their number is a value, which a GPU would have to be
    waited for and a compiler not look at: there all stay, the others with a target of 0.
    """
    targets, valid = targets.long(), targets != ignore_index
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        index = None
        if not valid.all():
            index = valid.nonzero()[:, 0]
            hidden, targets = hidden.index_select(0, index), targets.index_select(0, index)
        check.within(op, "targets", targets, 0, vocabulary)
        return Tokens(hidden, targets, index, None)
    if not vocabulary:  # no target can count
        return Tokens(hidden[:0], targets[:0], targets[:0], None)
    return Tokens(hidden, targets.masked_fill(~valid, 0), None, valid)


def average(weights: Tensor) -> Tensor:
    """weights / Σ weights; zeros where they sum to 0."""
    total = weights.sum()
    return weights / torch.where(total == 0, 1.0, total)
