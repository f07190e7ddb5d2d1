"""A teacher in one of three forms, and its logits, a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastcontrast.ops import _check as check
from fastcontrast.ops._precision import float32
from fastcontrast.ops._tokens import workspace_of

IGNORED = -100
LEAST = 64  # rows of a chunk: each reads and writes the gradient of the whole vocabulary
REST = ("renormalise", "tail")


class Heads(NamedTuple):
    """A teacher's states and vocabulary, whose logits are computed where they are needed."""

    hidden: Tensor  # [..., Dt]
    weight: Tensor  # [V, Dt]


class TopK(NamedTuple):
    """A teacher's K likeliest tokens, and log q of them, normalised over the whole vocabulary: see `top_k`."""

    ids: Tensor  # [..., K]
    logprobs: Tensor  # [..., K]

    @property
    def mass(self) -> Tensor:
        """Probability that was kept, [...]."""
        return self.logprobs.exp().sum(-1)


Teacher = Heads | TopK | Tensor  # a tensor: logits [..., V]


def entries_of(teacher: Heads | Tensor) -> int:
    """Of its vocabulary."""
    return len(teacher.weight) if isinstance(teacher, Heads) else teacher.shape[-1]


def fit(op: str, teacher: Teacher, tokens: torch.Size, vocabulary: int, padded: bool = False) -> Teacher:
    """Checked against tokens and vocabulary, with a row a token, without gradient; of a `padded` vocabulary without
    what lies behind."""
    if isinstance(teacher, TopK):
        shapes = [list(x.shape) for x in teacher]
        if shapes[0] != shapes[1] or not 1 <= shapes[0][-1] <= vocabulary:
            expected = f"[..., K] with K in [1, {vocabulary}]"
            raise ValueError(
                f"{op}: ids and logprobs of the teacher must be {expected}, got {shapes[0]} and {shapes[1]}"
            )
        check.within(op, "ids of the teacher", teacher.ids, 0, vocabulary)
        first, entries = teacher.ids, vocabulary
        found = TopK(*(x.detach().flatten(0, -2) for x in teacher))
    elif isinstance(teacher, Heads):
        check.matrix(op, "weight of the teacher", teacher.weight, teacher.hidden.shape[-1], like="its hidden")
        first, entries = teacher.hidden, entries_of(teacher)
        found = Heads(first.detach().flatten(0, -2), teacher.weight.detach()[:vocabulary])
    elif isinstance(teacher, Tensor):
        first, entries = teacher, entries_of(teacher)
        found = teacher.detach()[..., :vocabulary].flatten(0, -2)
    else:
        raise TypeError(f"{op}: teacher must be Heads, TopK or logits, got {type(teacher).__name__}")
    if first.shape[:-1] != tokens:
        raise ValueError(f"{op}: teacher must have the tokens {list(tokens)}, got {list(first.shape[:-1])}")
    if entries < vocabulary or (entries > vocabulary and not padded):
        raise ValueError(f"{op}: teacher must have the vocabulary of {vocabulary}, got {entries}")
    return found


class Logits:
    """Logits whose softmax is q, some rows at a time, of what `fit` gave: also where only K tokens are known."""

    def __init__(self, teacher: Teacher, vocabulary: int, rho: float = 1.0, rest: str = "renormalise"):
        self.teacher, self.vocabulary, self.rho, self.rest = teacher, vocabulary, rho, rest
        if isinstance(teacher, Heads):
            self.weight = float32(teacher.weight)

    def rows(self, index: Tensor) -> Tensor:  # [R] -> [R, V], float32 or float64, nobody else's
        if isinstance(self.teacher, Heads):
            hidden = float32(self.teacher.hidden[index])
            return (self.rho * hidden) @ self.weight.to(hidden.dtype).T
        if isinstance(self.teacher, Tensor):
            return self.rho * float32(self.teacher[index])
        ids, logprobs = self.teacher.ids[index].long(), float32(self.teacher.logprobs[index])
        others = self.vocabulary - ids.shape[1]
        level = torch.full_like(logprobs[:, :1], -torch.inf)
        if self.rest == "tail" and others:
            level = ((1 - logprobs.exp().sum(1, keepdim=True)).clamp(min=0) / others).log()
        return level.repeat(1, self.vocabulary).scatter_(1, ids, logprobs)


def chunks(index: Tensor, vocabulary: int) -> Iterator[Tensor]:
    """Parts of an index of tokens, whose logits fit the workspace twice."""
    budget = workspace_of(None, index.device)
    return iter(index.split(max(LEAST, budget // (8 * max(vocabulary, 1)))))
