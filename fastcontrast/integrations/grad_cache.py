"""The names of Luyu Gao's GradCache package, on our `GradCache` and on losses that store no [M, N] logits.

    from grad_cache import GradCache                        from fastcontrast.integrations.grad_cache import (
    from grad_cache.loss import SimpleContrastiveLoss   →       GradCache, SimpleContrastiveLoss, cached, ...
    from grad_cache.functional import cached, ...           )

Calls, values and gradients are the original's. Beyond it: decorated functions take keyword arguments, `cached` replays
the random state of every device the call may use and buffers that it rewrites (BatchNorm moves once), ranks may hold
different numbers of rows, and of the distributed loss each rank computes its own rows alone.

There is no `PLGradCache`: in a LightningModule with manual optimization `GradCache` works as it is. On several ranks
Lightning's DDP averages there only the gradients of `manual_backward`; average `.grad` over ranks before the optimizer
steps.

Source: Gao, Zhang, Han, Callan 2021, arXiv 2101.06983.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from fastcontrast.distributed import gather, shards
from fastcontrast.grad_cache import GradCache
from fastcontrast.grad_cache.chunks import tensors
from fastcontrast.grad_cache.replay import Buffers, Replay, random_devices
from fastcontrast.losses import info_nce

__all__ = [
    "DistributedContrastiveLoss",
    "GradCache",
    "SimpleContrastiveLoss",
    "cached",
    "cat_input_tensor",
    "gather_input_tensor",
]


class SimpleContrastiveLoss:
    """`F.cross_entropy(x @ y.T, target, reduction=reduction)`, of which `x @ y.T` is not stored.

    Args:
        n_hard_negatives: y holds, for each row of x, its positive and then that many negatives.

    Called with x [M, D], y [M · (n_hard_negatives + 1), D], target [M] (default 0, n_hard_negatives + 1, …) and
    reduction "mean", "sum" or "none". Raises: ValueError where, without a target, y has another number of rows.
    """

    def __init__(self, n_hard_negatives: int = 0):
        self.target_per_qry = n_hard_negatives + 1

    def __call__(
        self,
        x: Tensor,  # [M, D]
        y: Tensor,  # [N, D]
        target: Tensor | None = None,  # [M] integer
        reduction: str = "mean",
    ) -> Tensor:
        return info_nce(x, y, 1.0, positives=self._target(x, y, 0) if target is None else target, reduction=reduction)

    def _target(self, x: Tensor, y: Tensor, start: int) -> Tensor:
        """Of this rank's rows, the first of which is number `start` of all."""
        each = self.target_per_qry
        if x.shape[0] * each != y.shape[0]:
            expected = f"{each} rows of y for each of the {x.shape[0]} of x"
            raise ValueError(f"{type(self).__name__}: expected {expected}, got {y.shape[0]}")
        return torch.arange(start, start + x.shape[0], device=x.device) * each


class DistributedContrastiveLoss(SimpleContrastiveLoss):
    """The loss of all ranks' x and y in the order of the ranks, on every rank.

    Each rank's gradient is that of the whole loss with respect to its own rows, as in the original. The mean over ranks
    that DistributedDataParallel takes makes it 1/W of one process's: multiply by the number of ranks W, or
    `scale_loss=True` does it. A target holds the rows of all ranks, and so does `reduction="none"`.

    All ranks must call it, and go backward, together.
    """

    def __init__(self, n_hard_negatives: int = 0, *, scale_loss: bool = False):
        super().__init__(n_hard_negatives)
        self.scale_loss = scale_loss

    def __call__(
        self,
        x: Tensor,  # [m, D]
        y: Tensor,  # [n, D]
        target: Tensor | None = None,  # [M] integer
        reduction: str = "mean",
    ) -> Tensor:
        held = shards(x.shape[0], x.device)
        own = self._target(x, y, held.offset) if target is None else target[held.slices[held.rank]]
        loss = info_nce(x, gather(y), 1.0, positives=own, reduction=reduction)
        if reduction == "none":
            loss = _with_own(loss)
        else:
            part = loss * (x.shape[0] / max(held.total, 1)) if reduction == "mean" else loss
            loss = part + (gather(part.detach()[None]).sum() - part.detach())
        return loss * len(held.sizes) if self.scale_loss else loss


def _with_own(x: Tensor, axis: int = 0) -> Tensor:
    """Every rank's x joined along an axis; what is this rank's has the gradient, which no other rank adds to."""
    rows = x.movedim(axis, 0)
    held, every = shards(rows.shape[0], x.device), gather(rows.detach())
    own = held.slices[held.rank]
    return torch.cat([every[: own.start], rows, every[own.stop :]]).movedim(0, axis)


def cached(func: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """`*leaves, backward = cached(func)(*args, **kwargs)`: GradCache for one chunk, by hand.

    `func` calls a model and returns one tensor or several. The decorated call runs it without a graph and returns what
    came as leaves, and a function. After the loss of all chunks' leaves went backward, `backward(leaf)`, or with a
    tuple of all leaves, runs `func` again with the same arguments, random state and buffers, and sends the leaves'
    gradients through it.

        x, backward = cached(encode)(model, chunk)
        loss(x, ...).backward()
        backward(x)

    Buffers are looked after of modules among the arguments, and of `func` where it is one.
    """

    @wraps(func)
    def first_pass(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        modules = [x for x in (func, *args, *kwargs.values()) if isinstance(x, nn.Module)]
        buffers = Buffers(modules)
        state = Replay(random_devices(modules, tensors([args, kwargs])), buffers.snapshot())
        with torch.no_grad():
            reps = _several(func(*args, **kwargs))
        buffers.learn(state)

        def backward(leaves: Tensor | tuple[Tensor, ...]) -> None:
            leaves = _several(leaves)
            with state, torch.enable_grad():
                reps = _several(func(*args, **kwargs))
            if len(reps) != len(leaves):
                raise ValueError(f"cached: expected the {len(reps)} leaves of one call, got {len(leaves)}")
            pairs = [(x, y.grad) for x, y in zip(reps, leaves, strict=True) if x.requires_grad and y.grad is not None]
            torch.autograd.backward([x for x, _ in pairs], [gradient for _, gradient in pairs])

        return *(x.detach().requires_grad_() for x in reps), backward

    return first_pass


def _several(reps: Any) -> tuple[Tensor, ...]:
    several = (reps,) if isinstance(reps, Tensor) else reps
    if not isinstance(several, (tuple, list)) or not all(isinstance(x, Tensor) for x in several):
        raise TypeError(f"cached: expected a tensor or a tuple of tensors, got {type(reps).__name__}")
    return tuple(several)


def _of_inputs(func: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    @wraps(func)
    def changed(*args: Any, **kwargs: Any) -> Any:
        return func(*map(change, args), **{name: change(x) for name, x in kwargs.items()})

    return changed


def cat_input_tensor(func: Callable[..., Any]) -> Callable[..., Any]:
    """A loss function whose arguments that are lists of tensors are concatenated: the leaves of many `cached` calls."""

    def joined(x: Any) -> Any:
        return torch.cat(x) if isinstance(x, list) and x and all(isinstance(t, Tensor) for t in x) else x

    return _of_inputs(func, joined)


def gather_input_tensor(func: Callable[..., Any], axis: int = 0) -> Callable[..., Any]:
    """A loss function whose tensors, in the order of the ranks, are joined along `axis`; a 0-dimensional one stays.

    As in the original every rank then computes the whole loss, and only its own rows have a gradient: multiply the loss
    by the number of ranks where DistributedDataParallel takes the mean.
    """

    def gathered(x: Any) -> Any:
        return _with_own(x, axis) if isinstance(x, Tensor) and x.dim() else x

    return _of_inputs(func, gathered)
