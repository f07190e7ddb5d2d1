"""How keys that lie on several ranks meet the queries of each: gathered at once, or passed round a ring.

A *visit* shows every rank all keys, a block at a time, and brings back what the ranks found out about each block:

    gather   one block: all keys of all ranks. What was found is reduced, and every rank gets its own keys' part.
    ring     a block a rank, its own first. While a rank works on a block, the next one arrives from its left neighbour
             and what it found about the last one leaves to the right; after as many hops as ranks it is home.

A ring needs memory for two blocks; sums come in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastcontrast.ops import _check as check

from ._collectives import Shards, all_rows, own_rows_of_sum, shards, world_size

HOW = ("gather", "ring")


class Exchange(NamedTuple):
    how: str
    group: dist.ProcessGroup | None
    equal: bool

    def shards(self, rows: int, device: torch.device) -> Shards:
        if self.equal:
            return Shards((rows,) * world_size(self.group), dist.get_rank(self.group))
        return shards(rows, device, self.group)


_active: list[Exchange] = []


@contextmanager
def exchange(how: str = "gather", group: dist.ProcessGroup | None = None, *, equal: bool = False) -> Iterator[None]:
    """Inside, this package's losses take their arguments for this rank's rows of a batch that lies on all ranks.

        with exchange("ring"):
            loss = clip_loss(image_features, text_features, scale, ids=ids)

    The loss is that of the whole batch, on every rank. Gradients, after the data-parallel mean over ranks (which
    DistributedDataParallel takes), are those of one process that holds the whole batch. What belongs to rows goes
    along: ids, labels, biases, guides. Positives stay indices of keys on the same rank; hard negatives, weights and a
    queue are used by the rank that holds them. `reduction="none"` gives the rows of this rank; W · rows.sum() / N is
    its share of a mean over N rows on W ranks. Every rank must call the same losses with the same settings; they may
    hold different numbers of rows, also none.

    Args:
        how: "gather" holds the keys of all ranks, O(N · D) a rank; "ring" two ranks' keys, O(n · D).
        group: a process group; default all ranks. Without one, or with one rank, nothing changes.
        equal: the caller knows that every rank holds as many rows. Nobody is asked then, which on a GPU the host would
            have to wait for.

    Raises: ValueError for another `how`. A rank that is lost ends the others' collectives with an error within the
    timeout of the process group.
    """
    check.one_of("exchange", "how", how, HOW)
    _active.append(Exchange(how, group, equal))
    try:
        yield
    finally:
        _active.pop()


def active() -> Exchange | None:
    """The innermost exchange, if there is somebody to exchange with."""
    return _active[-1] if _active and world_size(_active[-1].group) > 1 else None


# --------------------------------------------------------------------------------------- what ranks found out, combined


class Sum:
    @staticmethod
    def merge(a: Tensor, b: Tensor) -> Tensor:
        return a + b

    across = staticmethod(own_rows_of_sum)


class LogSumExp:
    """float64 [rows]."""

    merge = staticmethod(torch.logaddexp)

    @staticmethod
    def across(x: Tensor, held: Shards, group: dist.ProcessGroup | None) -> Tensor:
        top = x.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group)
        top = top.masked_fill(torch.isneginf(top), 0.0)
        return own_rows_of_sum((x - top).exp(), held, group).log() + top[held.slices[held.rank]]


class Best:
    """The largest value of each row and its index, the smallest of equals; float64 [rows, 2]."""

    @staticmethod
    def merge(a: Tensor, b: Tensor) -> Tensor:
        better = (b[:, 0] > a[:, 0]) | ((b[:, 0] == a[:, 0]) & (b[:, 1] < a[:, 1]))
        return torch.where(better[:, None], b, a)

    @staticmethod
    def across(x: Tensor, held: Shards, group: dist.ProcessGroup | None) -> Tensor:
        value, index = x.unbind(1)
        top = value.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group)
        index = index.masked_fill(value != top, float("inf"))
        dist.all_reduce(index, dist.ReduceOp.MIN, group)
        return torch.stack([top, index], 1)[held.slices[held.rank]]


Merge = type[Sum] | type[LogSumExp] | type[Best]
# work(rows, block) -> for each merge, what this rank found about those rows of all keys
Work = Callable[[slice, "list[Tensor | None]"], "list[Tensor]"]


def within(own: Tensor, rows: slice) -> Tensor:
    """Indices into all keys as indices into a block of them, −1 where they are elsewhere."""
    return torch.where((own >= rows.start) & (own < rows.stop), own - rows.start, -1)


def visit(
    how: Exchange, held: Shards, keys: Sequence[Tensor | None], work: Work, merges: Sequence[Merge] = ()
) -> list[Tensor]:
    """Calls `work` with every rank's part of `keys` (this rank's are given, each [n, ...] or None), and returns what
    all ranks found about the keys of this one."""
    if how.how == "ring":
        return _ring(how.group, held, list(keys), work, merges)
    every = [None if x is None else all_rows(x, held, how.group) for x in keys]
    found = work(slice(0, held.total), every)
    return [merge.across(x, held, how.group) for x, merge in zip(found, merges, strict=True)]


def _ring(group, held: Shards, block: list, work: Work, merges: Sequence[Merge]) -> list[Tensor]:
    world, rank = len(held.sizes), held.rank
    found: list[Tensor] = []
    arriving = _Transfer(group, [], [])
    for step in range(world):
        source, following = (rank - step) % world, (rank - step - 1) % world
        upcoming = [None if x is None else x.new_empty(held.sizes[following], *x.shape[1:]) for x in block]
        blocks = _Transfer(group, block, upcoming) if step < world - 1 else None
        here = work(held.slices[source], block)
        arriving.wait()
        if step:
            here = [merge.merge(before, x) for merge, before, x in zip(merges, found, here, strict=True)]
        found = [x.new_empty(held.sizes[following], *x.shape[1:]) for x in here]
        arriving = _Transfer(group, here, found)
        if blocks is not None:
            blocks.wait()
        block = upcoming
    arriving.wait()
    return found


class _Transfer:
    """Tensors on their way to the right neighbour, others on theirs from the left one."""

    def __init__(self, group: dist.ProcessGroup | None, out: Sequence[Tensor | None], into: Sequence[Tensor | None]):
        world, rank = world_size(group), dist.get_rank(group)
        # Kept until they have arrived.
        self.out = [x.contiguous() for x in out if x is not None and x.numel()]
        self.into = [x for x in into if x is not None and x.numel()]
        right, left = (_peer(group, (rank + side) % world) for side in (1, -1))
        sends = [dist.P2POp(dist.isend, x, right, group) for x in self.out]
        receives = [dist.P2POp(dist.irecv, x, left, group) for x in self.into]
        self.work = dist.batch_isend_irecv(sends + receives) if sends or receives else []

    def wait(self) -> None:
        for work in self.work:
            work.wait()
        self.work = []


def _peer(group: dist.ProcessGroup | None, rank: int) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)
