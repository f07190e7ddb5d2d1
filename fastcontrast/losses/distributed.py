"""A loss over a batch that lies on several ranks."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from fastcontrast.distributed import exchange
from fastcontrast.distributed._exchange import HOW
from fastcontrast.ops import _check as check

from ._common import ScaledLoss
from .token_contrast import TokenContrastLoss


class DistributedLoss(nn.Module):
    """`DistributedLoss(ClipLoss(learnable=True), exchange="ring")(image_features, text_features)`: the loss of all
    ranks' rows, of which each rank gives its own; see `fastcontrast.distributed.exchange`.

    A learned scale or bias gets the mean over ranks of its gradients here, whether or not DistributedDataParallel wraps
    this module: it need not. On one process, or before a process group is there, it is the loss itself.

    Args:
        loss: any loss module of this package.
        exchange: "gather" or "ring".
        group: a process group; default all ranks.
        equal: every rank always holds as many rows; nobody is asked.

    Raises: TypeError for another loss, which would see this rank's rows alone; ValueError for another exchange.
    """

    def __init__(
        self,
        loss: nn.Module,
        exchange: str = "gather",
        group: dist.ProcessGroup | None = None,
        *,
        equal: bool = False,
    ):
        super().__init__()
        if not isinstance(loss, (ScaledLoss, TokenContrastLoss)):
            raise TypeError(f"DistributedLoss: loss must be one of fastcontrast.losses, got {type(loss).__name__}")
        check.one_of("DistributedLoss", "exchange", exchange, HOW)
        self.loss, self.exchange, self.group, self.equal = loss, exchange, group, equal

    def forward(self, *inputs: Any, **settings: Any) -> Any:
        with exchange(self.exchange, self.group, equal=self.equal):
            return self.loss(*inputs, **settings)

    def extra_repr(self) -> str:
        return f"exchange={self.exchange!r}, equal={self.equal}"
