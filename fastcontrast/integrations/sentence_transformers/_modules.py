"""What the loss modules share: rows on several ranks, a learned scale, and a cached loss of the whole batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastcontrast.distributed import exchange, mean_gradient, shards, world_size
from fastcontrast.ops._precision import without_autocast


class OnRanks:
    gather_across_devices: bool

    @property
    def _spread(self) -> bool:
        return self.gather_across_devices and world_size() > 1

    def _across(self) -> AbstractContextManager:
        """Inside, other ranks' rows are candidates too."""
        return exchange("gather") if self._spread else nullcontext()

    def _mean(self, losses: Tensor) -> Tensor:
        """Of this rank's rows; where ranks hold different numbers of them, of a size that makes the mean over ranks
        the mean over all rows."""
        if not self._spread:
            return losses.mean()
        held = shards(losses.shape[0], losses.device)
        return losses.sum() * (len(held.sizes) / max(held.total, 1))


class Scaled(nn.Module):
    """Holds the library's `scale`, or `temperature`: the number that was given, or what a learned scale makes of it."""

    _given: float

    @staticmethod
    def _scale_of(setting: float) -> float:
        """The scale for a setting, and the other way round."""
        return setting

    @property
    def _setting(self) -> float:
        learned = self._parameters.get("log_scale")
        return self._given if learned is None else self._scale_of(learned.detach().exp().item())

    @_setting.setter
    def _setting(self, value: float) -> None:
        learned = self._parameters.get("log_scale")
        if learned is None:
            self._given = value
        else:
            nn.init.constant_(learned, math.log(self._scale_of(value)))

    def _learn(self, learnable: bool, max_scale: float) -> None:
        scale, self.max_scale = self._scale_of(self._given), max_scale
        if learnable and not 0 < scale <= max_scale:
            name = type(self).__name__
            raise ValueError(f"{name}: a learned scale must be positive and at most {max_scale}, got {scale}")
        self.register_parameter("log_scale", nn.Parameter(torch.tensor(math.log(scale))) if learnable else None)

    def _current_scale(self) -> Tensor | float:
        """With gradient if it is learned: the mean over ranks, for the wrapper that averages the model's is not its."""
        if self.log_scale is None:
            return self._scale_of(self._given)
        with torch.no_grad():  # a clamp inside the graph would leave a scale beyond the limit without gradient
            self.log_scale.clamp_(max=math.log(self.max_scale))
        return mean_gradient(self.log_scale.exp())


class WholeBatch:
    """A cached loss of all embeddings at once."""

    def _backward(self, loss: Callable[[Tensor | float], Tensor], scale: Tensor | float) -> Tensor:
        """Value of a loss, after its backward to the embeddings. To a learned scale it stays differentiable: that
        gradient waits for the outer backward, which may multiply it (accumulation, GradScaler, MatryoshkaLoss)."""
        leaf = scale.detach().requires_grad_() if isinstance(scale, Tensor) else scale
        value = loss(leaf)
        without_autocast(Tensor.backward)(value)
        value = value.detach()
        return value + leaf.grad * (scale - scale.detach()) if isinstance(scale, Tensor) else value

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        if self.log_scale is None or not torch.is_grad_enabled():
            return super().forward(sentence_features, labels)
        # The library detaches what `calculate_loss`, or what MatryoshkaLoss put in its place, returns.
        calculate, replaced, returned = self.calculate_loss, vars(self).get("calculate_loss"), []

        def keeping(*args: Any, **kwargs: Any) -> Tensor:
            returned.append(calculate(*args, **kwargs))
            return returned[0]

        self.calculate_loss = keeping
        try:
            loss = super().forward(sentence_features, labels)
        finally:
            del self.calculate_loss
            if replaced is not None:
                self.calculate_loss = replaced
        return loss + (returned[0] - returned[0].detach())
