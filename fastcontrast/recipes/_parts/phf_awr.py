"""Regression on log-probabilities, weighted by how much better a text was than expected; and means over positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastcontrast.distributed._sums import over_ranks, share
from fastcontrast.ops._precision import float32


def mean_over(losses: Tensor) -> Tensor:
    """Mean over positions, of all ranks inside `exchange`; 0 of none."""
    return share(losses.sum(), losses.numel())


def positions(op: str, valid: Tensor | None, logprobs: Tensor, **others: Tensor) -> list[Tensor]:
    """`logprobs` and others, all of one shape, at those positions that are valid; all of them without `valid`."""
    for name, x in others.items() if valid is None else {"valid": valid, **others}.items():
        if x.shape != logprobs.shape:
            raise ValueError(f"{op}: {name} must be {list(logprobs.shape)} like logprobs, got {list(x.shape)}")
    return [x if valid is None else x[valid] for x in (logprobs, *others.values())]


class ValueHead(nn.Module):
    """V = −sigmoid(⟨v, h⟩), what is to be expected of −score, without bias; v starts at 0, V at −½."""

    def __init__(self, width: int):
        super().__init__()
        self.v = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor) -> Tensor:  # [..., D] -> [...]
        return -torch.sigmoid(float32(hidden) @ self.v)


def awr_loss(
    logprobs: Tensor,  # [...]
    scores: Tensor,  # [...]
    values: Tensor,  # [...]
    *,
    alpha: float = 0.5,
    beta: float = 1.0,
    normalise: bool = False,
    clamp: bool = False,
    fixed: float | None = None,
    baseline: float | None = None,
    largest: float = 1000.0,
    valid: Tensor | None = None,  # [...] bool
) -> Tensor:
    """alpha·mean(−w·lp) + (1 − alpha)·mean((r − V)²),  r = −s,  w = min(exp(A/beta), largest),  A = r − V.

    No gradient passes through w; that of the second mean reaches the states that `values`, of `ValueHead`, came from.

    Args:
        normalise: A becomes (A − mean)/(deviation + 1e-10), of the sample of all positions.
        clamp: V is bound to [−1, 0], which a `ValueHead` never leaves.
        fixed: takes the place of V; 0 counts as not given, as in the released code.
        baseline: takes the place of V in A alone; 0 is the textbook's exp(r/beta).
    """
    op = "awr_loss"
    logprobs, scores, values = positions(op, valid, logprobs, scores=scores, values=values)
    if not (0 <= alpha <= 1 and beta > 0):
        raise ValueError(f"{op}: alpha must lie in [0, 1] and beta be positive, got {alpha} and {beta}")
    rewards, values = -scores.to(logprobs.dtype), torch.full_like(values, fixed) if fixed else values
    values = values.clamp(-1, 0) if clamp else values
    advantages = rewards - (values.detach() if baseline is None else baseline)
    if normalise:
        count = over_ranks(torch.tensor(advantages.numel(), device=advantages.device))
        advantages = advantages - over_ranks(advantages.sum()) / count.clamp(min=1)
        deviation = (over_ranks(advantages.square().sum()) / (count - 1).clamp(min=1)).sqrt()
        advantages = advantages / (deviation + 1e-10)
    weights = (advantages / beta).exp().clamp(max=largest)
    loss = alpha * mean_over(-weights * logprobs)
    return loss if alpha == 1 else loss + (1 - alpha) * mean_over((rewards - values).square())


def rwr_loss(logprobs: Tensor, scores: Tensor, values: Tensor, **settings: Any) -> Tensor:  # [...] each
    """`awr_loss` with alpha = 1: nothing teaches V. With a `ValueHead` as it begins w = exp((½ − s)/beta)."""
    return awr_loss(logprobs, scores, values, alpha=1.0, **settings)
