"""Shards of a batch, and the collectives that carry features between the ranks that hold them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastcontrast.ops._precision import refuse_second_gradient

# torch 2.13 renamed them.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Shards(NamedTuple):
    """How many rows each rank holds; the whole batch is their concatenation in the order of the ranks."""

    sizes: tuple[int, ...]
    rank: int

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def offset(self) -> int:
        """Where this rank's rows start in the whole batch."""
        return sum(self.sizes[: self.rank])

    @property
    def slices(self) -> list[slice]:
        ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes))]
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Ranks in a group; 1 where no process group was initialized."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def shards(rows: int, device: torch.device, group: dist.ProcessGroup | None = None) -> Shards:
    """Asks every rank of the group for its number of rows: a collective of one integer, which the host waits for."""
    world = world_size(group)
    if world == 1:
        return Shards((rows,), 0)
    counts = torch.empty(world, dtype=torch.int64, device=device)
    _all_gather(counts, torch.full((1,), rows, dtype=torch.int64, device=device), group=group)
    return Shards(tuple(counts.tolist()), dist.get_rank(group))


def all_rows(x: Tensor, held: Shards, group: dist.ProcessGroup | None = None) -> Tensor:
    """Every rank's rows [total, ...], without gradient."""
    if len(held.sizes) == 1:
        return x
    most = max(held.sizes)
    padded = x.contiguous()
    if x.shape[0] < most:
        padded = x.new_zeros(most, *x.shape[1:])
        padded[: x.shape[0]] = x
    every = x.new_empty(len(held.sizes) * most, *x.shape[1:])
    _all_gather(every, padded, group=group)
    if min(held.sizes) == most:
        return every
    return torch.cat([rows[:size] for rows, size in zip(every.split(most), held.sizes, strict=True)])


def own_rows_of_sum(x: Tensor, held: Shards, group: dist.ProcessGroup | None = None) -> Tensor:
    """This rank's rows of the ranks' sum of x [total, ...]: the adjoint of `all_rows`."""
    if len(held.sizes) == 1:
        return x
    most, own = max(held.sizes), held.sizes[held.rank]
    padded = x.contiguous()
    if min(held.sizes) < most:
        padded = x.new_zeros(len(held.sizes) * most, *x.shape[1:])
        for i, rows in enumerate(held.slices):
            padded[i * most : i * most + held.sizes[i]] = x[rows]
    out = x.new_empty(most, *x.shape[1:])
    _reduce_scatter(out, padded, group=group)
    return out[:own]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, held, group):
        ctx.held, ctx.group = held, group
        return all_rows(x, held, group)

    @staticmethod
    def backward(ctx, gradient):
        refuse_second_gradient("gather")
        return own_rows_of_sum(gradient, ctx.held, ctx.group), None, None


def gather(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:  # [n, ...]
    """Every rank's rows, concatenated in the order of the ranks: [Σ n, ...].

    The gradient of a rank's rows is the sum of all ranks' gradients for them. Ranks may hold different numbers of rows,
    also none. Where no process group was initialized, or it has one rank, this is `x` itself. All ranks must call it,
    with the same dtype and the same shape beyond dimension 0, and all with gradient or all without.
    """
    if world_size(group) == 1:
        return x
    held = shards(x.shape[0], x.device, group)
    return _Gather.apply(x, held, group) if x.requires_grad and torch.is_grad_enabled() else all_rows(x, held, group)


class _MeanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        refuse_second_gradient("mean_gradient")
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient / world_size(ctx.group), None


def mean_gradient(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """`x`, whose gradient is the mean of the ranks' gradients: for a loss's own parameters (a scale, a bias), which are
    outside the model that DistributedDataParallel wraps. Inside one it changes nothing: a mean of equal numbers."""
    wanted = x.requires_grad and torch.is_grad_enabled() and world_size(group) > 1
    return _MeanGradient.apply(x, group) if wanted else x
