"""Pieces of CCP's loop: pairs out of documents, a projection head with asymmetric batch norm, banks by language."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcontrast.distributed._sums import count_over_ranks, over_ranks
from fastcontrast.memory import MemoryBank
from fastcontrast.ops._precision import float32


def window_pairs(document: Tensor, window: int = 2) -> Tensor:  # [n] indices of sentences in order -> [P, 2]
    """All (centre, context) of a document whose places differ by 1 … `window`: what batches are drawn from."""
    if window < 1:
        raise ValueError(f"window_pairs: window must be at least 1, got {window}")
    pairs = [torch.stack([document[:-k], document[k:]], 1) for k in range(1, window + 1)]
    return torch.cat([*pairs, *(pair.flip(1) for pair in pairs)])


class AsymmetricBatchNorm(nn.BatchNorm1d):
    """(centre, context) → both normalised with one weight and bias: in training one side by the mean and variance of
    its batch, which then move the stored ones, once; the other side by the stored ones as they were before. The first
    call takes the batch's for the centre, the next for the context, and so on; in eval mode both take the stored ones.

    Statistics are of this device's rows, inside `exchange` of all ranks'. As in torch a batch is divided by its biased
    variance, and the unbiased one is stored. `num_batches_tracked` says whose turn it is, so a checkpoint has it.
    Raises ValueError in training for a single row, which has no variance.
    """

    def forward(self, centre: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:  # [B, D] each
        stored = self.running_mean, self.running_var
        if not self.training:
            return self._normalised(centre, *stored), self._normalised(context, *stored)
        swapped = bool(self.num_batches_tracked % 2)
        batch, other = (context, centre) if swapped else (centre, context)
        count = count_over_ranks(len(batch), batch.device)
        if count < 2:
            raise ValueError(f"AsymmetricBatchNorm: in training a batch must have at least 2 rows, got {count}")
        other = self._normalised(other, *stored)
        precise = float32(batch)
        mean = over_ranks(precise.sum(0)) / count
        variance = over_ranks((precise - mean).square().sum(0)) / count
        batch = self._normalised(batch, mean, variance)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            self.num_batches_tracked += 1
        return (other, batch) if swapped else (batch, other)

    def _normalised(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        y = (float32(x) - mean) * (variance + self.eps).rsqrt()
        return (y if self.weight is None else y * self.weight + self.bias).to(x.dtype)


class OrdinaryBatchNorm(nn.BatchNorm1d):
    """Both sides by their own batch, as nn.BatchNorm1d does: what CCP avoids, for comparison."""

    def forward(self, centre: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:  # [B, D] each
        return super().forward(centre), super().forward(context)


class Projection(nn.Module):
    """g of both sides: Linear, `norm`, `act`, Linear, length 1. Only training has it.

    Args:
        inside, width: of what comes and of what the loss takes; the layer between is as wide as what comes.
        norm: a module of two batches, `AsymmetricBatchNorm(inside)` unless given. act: `nn.Identity()` for none.
    """

    def __init__(self, inside: int, width: int, norm: nn.Module | None = None, act: nn.Module | None = None):
        super().__init__()
        self.first, self.second = nn.Linear(inside, inside), nn.Linear(inside, width)
        self.norm = AsymmetricBatchNorm(inside) if norm is None else norm
        self.act = nn.ReLU() if act is None else act

    def forward(self, centre: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:  # [B, inside] each
        centre, context = self.norm(self.first(centre), self.first(context))
        return self._out(centre), self._out(context)

    def _out(self, x: Tensor) -> Tensor:
        return F.normalize(self.second(self.act(x)), dim=-1)


class Banks(nn.ModuleDict):
    """A `MemoryBank` for each language, made by its first push; all are in `state_dict`, and come back with it.

    Args:
        size, width: of each bank. options: further ones of `MemoryBank`.
    """

    def __init__(self, size: int, width: int, **options: Any):
        super().__init__()
        self.size, self.width, self.options = size, width, options

    def of(self, language: str) -> Tensor | None:
        """The vectors of a language [K, D], None before its first push."""
        return self[language].features if language in self else None

    def push(self, language: str, centre: Tensor, context: Tensor) -> None:  # [B, D] each
        """Stores a batch, after its backward: all ranks' centres, then all contexts, in the place of the oldest."""
        if language not in self:
            self[language] = self._made(centre)
        self[language].enqueue(centre.detach())
        self[language].enqueue(context.detach())

    def _made(self, like: Tensor) -> MemoryBank:
        return MemoryBank(self.size, self.width, device=like.device, dtype=like.dtype, **self.options)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        rows = (key.removeprefix(prefix).rpartition(".") for key in state_dict if key.startswith(prefix))
        for language, _, name in rows:
            if name == "rows" and language not in self:
                self[language] = self._made(state_dict[f"{prefix}{language}.rows"])
        super()._load_from_state_dict(state_dict, prefix, *args)
