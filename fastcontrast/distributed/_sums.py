"""Sums over rows and over keys that lie on several ranks, with the gradients of the whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from fastcontrast import ops
from fastcontrast.ops import _segments
from fastcontrast.ops._formed import formed
from fastcontrast.ops._precision import float32, refuse_second_gradient, without_autocast

from ._collectives import all_rows, gather, mean_gradient, world_size
from ._exchange import Sum, active, visit


def gathered(x: Tensor) -> Tensor:  # [n, ...]
    """The rows of all ranks inside `exchange`, with their gradient; outside it x itself."""
    how = active()
    return x if how is None else gather(x, how.group)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return _AllReduce.apply(gradient, ctx.group), None


def over_ranks(x: Tensor) -> Tensor:
    """Σ over ranks of x; the gradient of each rank's x is the sum of what all ranks ask of the total."""
    how = active()
    return x if how is None else _AllReduce.apply(x, how.group)


def count_over_ranks(count: int, device: torch.device) -> int:
    """Σ over ranks of a number of rows."""
    how = active()
    return count if how is None else how.shards(count, device).total


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx, total, count, group):
        both = torch.stack([total.double(), torch.as_tensor(count, dtype=torch.float64, device=total.device)])
        dist.all_reduce(both, group=group)
        whole, count = both
        count = count.clamp(min=1)
        ctx.save_for_backward(count)
        ctx.world = world_size(group)
        return (whole / count).to(total.dtype)

    @staticmethod
    def backward(ctx, gradient):
        (count,) = ctx.saved_tensors
        return (gradient * (ctx.world / count)).to(gradient.dtype), None, None


def share(total: Tensor, count: Tensor | int) -> Tensor:
    """Σ total / Σ count over ranks, at least 1 of them; elsewhere total / count.

    The gradient of each rank's total is W / Σ count for W ranks: then the mean over ranks of gradients is the whole's.
    """
    how = active()
    if how is not None:
        return _Share.apply(total, count, how.group)
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def whole_sum(total: Tensor) -> Tensor:
    """Σ over ranks of a loss that is a sum, whose gradients become the whole's in the mean over ranks."""
    how = active()
    return total if how is None else _Share.apply(total, 1 / world_size(how.group), how.group)


def own_parameter(x: Tensor) -> Tensor:
    """A loss's own scale or bias, whose gradient every rank gets as the mean of all: no model that is wrapped for data
    parallelism contains it."""
    how = active()
    return x if how is None else mean_gradient(x, how.group)


def numbers(count: int, device: torch.device) -> Tensor:
    """This rank's rows, numbered through all ranks: 0 … count − 1 on one process."""
    how = active()
    index = torch.arange(count, device=device)
    return index if how is None else index + how.shards(count, device).offset


# --------------------------------------------------------------------------------------------- sums over blocks of keys

# fn(local, block, rows) -> [m, ...], a sum over the keys of the block; differentiable in tensors of both
BlockSum = Callable[["list[Tensor | None]", "list[Tensor | None]", slice], Tensor]


class _OverKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fn, how, held, count, *tensors):
        local, keys = list(tensors[:count]), list(tensors[count:])
        total: list[Tensor] = []

        def work(rows, block):
            x = fn(local, block, rows)
            total[:] = [total[0] + x] if total else [x]
            return []

        visit(how, held, keys, work)
        ctx.save_for_backward(*tensors)
        ctx.run = fn, how, held, count
        return total[0]

    @staticmethod
    def backward(ctx, gradient):
        refuse_second_gradient("a loss on several ranks")
        gradients = _again(gradient, ctx.saved_tensors, ctx.needs_input_grad[4:], *ctx.run)
        pairs = zip(gradients, ctx.saved_tensors, strict=True)
        return (*[None] * 4, *(None if g is None else g.to(x.dtype) for g, x in pairs))


@without_autocast  # a backward may be called inside it
def _again(gradient: Tensor, tensors, needs, fn: BlockSum, how, held, count: int) -> tuple[Tensor | None, ...]:
    """The visit once more, this time each block with its graph."""
    local = [_leaf(x, need) for x, need in zip(tensors[:count], needs, strict=False)]
    sums: list[Tensor | None] = [None] * count

    def work(rows, block):
        block = [_leaf(x, need) for x, need in zip(block, needs[count:], strict=True)]
        with torch.enable_grad():
            out = fn(local, block, rows)
        return _collect(out, gradient, local, block, sums)

    found = iter(visit(how, held, tensors[count:], work, (Sum,) * sum(needs[count:])))
    return (*sums, *(next(found) if need else None for need in needs[count:]))


def _leaf(x: Tensor | None, need: bool) -> Tensor | None:
    return x if x is None else x.detach().requires_grad_(need)


def _collect(out: Tensor, upstream: Tensor | None, local: list, block: list, sums: list) -> list[Tensor]:
    """Gradients of a block: added to `sums` for the local tensors, returned for the block's that want one."""
    here = [i for i, x in enumerate(local) if x is not None and x.requires_grad]
    there = [x for x in block if x is not None and x.requires_grad]
    wanted = [local[i] for i in here] + there
    if not out.requires_grad:  # a block without keys, of a function that then needs none of its inputs
        return [torch.zeros_like(float32(x)) for x in there]
    found = torch.autograd.grad(out, wanted, upstream, allow_unused=True)
    found = [torch.zeros_like(float32(x)) if g is None else float32(g) for g, x in zip(found, wanted, strict=True)]
    for i, g in zip(here, found, strict=False):
        sums[i] = g if sums[i] is None else sums[i] + g
    return found[len(here) :]


def over_keys(fn: BlockSum, local: list[Tensor | None], keys: list[Tensor | None]) -> Tensor:
    """Σ over all ranks' keys of a function of this rank's rows and them: `fn(local, block, rows)` of every block, where
    `rows` says which of all keys it is. On one process the keys are one block."""
    how, first = active(), next(x for x in keys if x is not None)
    if how is None:
        return fn(local, keys, slice(0, first.shape[0]))
    held = how.shards(first.shape[0], first.device)
    return _OverKeys.apply(fn, how, held, len(local), *local, *keys)


def formed_over_keys(fn: BlockSum, local: list[Tensor | None], keys: list[Tensor | None]) -> Tensor:
    """The same of a scalar function, whose gradients are formed on the same visit: each block is looked at once."""
    how, first = active(), next(x for x in keys if x is not None)
    held, count = how.shards(first.shape[0], first.device), len(local)

    def run(inputs, needs):
        here = [_leaf(x, need) for x, need in zip(inputs[:count], needs, strict=False)]
        total: list[Tensor] = []
        sums: list[Tensor | None] = [None] * count

        def work(rows, block):
            block = [_leaf(x, need) for x, need in zip(block, needs[count:], strict=True)]
            with torch.set_grad_enabled(any(needs)):
                out = fn(here, block, rows)
            total[:] = [total[0] + out.detach()] if total else [out.detach()]
            return _collect(out, None, here, block, sums) if any(needs) else []

        found = iter(visit(how, held, inputs[count:], work, (Sum,) * sum(needs[count:])))
        return total[0], (*sums, *(next(found) if need else None for need in needs[count:]))

    return formed(run, *local, *keys)


def segment_sums(values: Tensor, ids: Tensor, query_ids: Tensor) -> tuple[Tensor, Tensor]:
    """`ops._segments.segment_sums` over the values of all ranks."""
    if active() is None:
        return _segments.segment_sums(values, ids, query_ids)

    def fn(local, block, _):
        total, count = _segments.segment_sums(block[0], block[1], local[0])
        return torch.cat([total, count[:, None].to(total.dtype)], 1)

    found = over_keys(fn, [query_ids], [values, ids])
    return found[:, :-1], found[:, -1]


def positive_sums(queries, keys, scale, key_bias, query_labels, key_labels, query_ids, key_ids):
    """`ops._segments.positive_sums` over the keys of all ranks."""
    if active() is None:
        return _segments.positive_sums(queries, keys, scale, key_bias, query_labels, key_labels, query_ids, key_ids)

    def fn(local, block, _):
        queries, scale, query_labels, query_ids = local
        keys, key_bias, key_labels, key_ids = block
        found = _segments.positive_sums(queries, keys, scale, key_bias, query_labels, key_labels, query_ids, key_ids)
        return torch.stack([found[0], found[1].to(found[0].dtype)], 1)

    local, block = [queries, scale, query_labels, query_ids], [keys, key_bias, key_labels, key_ids]
    return over_keys(fn, local, block).unbind(1)


def mix_over_ranks(queries, keys, values, scale, lse, *, query_ids=None, key_ids=None, **settings) -> Tensor:
    """Σ_j softmax_j(L_ij) · v_j over the keys of all ranks, whose log-sum-exps are `lse`, finite; [m, Dv]."""

    def fn(local, block, _):
        queries, scale, lse, query_ids = local
        keys, values, key_ids = block
        ids = {"query_ids": query_ids, "key_ids": key_ids}
        mixed, here = ops.similarity_mix(queries, keys, values, scale, **ids, **settings, return_lse=True)
        share = (here - lse).exp().to(mixed.dtype)[:, None]
        return torch.cat([share * mixed, share], 1)

    found = over_keys(fn, [queries, scale, lse, query_ids], [keys, values, key_ids])
    # The shares sum to 1 but for the rounding of the parts' log-sum-exps, which a logit of 100 would multiply.
    return found[:, :-1] / found[:, -1:].clamp(min=torch.finfo(found.dtype).tiny)


def at(values: Tensor, index: Tensor) -> Tensor:
    """Values of keys counted as `similarity_lse` counts its best: from this rank's first; of −1 anything."""
    how = active()
    if how is not None:
        held = how.shards(values.shape[0], values.device)
        values, index = all_rows(values, held, how.group), index + held.offset
    if not values.shape[0]:
        return values.new_zeros(index.shape)
    return values[index.clamp(min=0)]
