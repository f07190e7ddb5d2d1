"""Sums over all pairs of a query and a key of whatever a function says, tile by tile, recomputed in the backward.

total = Σ_{I,J} fn(q_I, k_J, I, J)          over blocks I of the queries' indices and J of the keys'
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import _check as check
from ._dispatch import choose, refuse_torch, register

register("pairwise_reduce", {"torch": refuse_torch})

OP = "pairwise_reduce"
# Of a tile of 4 MiB the few matrices that fn makes stay in a CPU's caches; smaller tiles cost more calls, and a GPU's
# kernels must be long.
CPU_BLOCK, BLOCK = 1024, 4096


def _reference(fn: Callable, queries: Tensor, keys: Tensor) -> Any:
    return fn(queries, keys, _index(queries), _index(keys))


def _tiled(fn: Callable, queries: Tensor, keys: Tensor, rows: int, columns: int, upper: bool) -> Any:
    """Both sides are split once: the gradients of a block gather in its piece, and the pieces are joined at the end.

    A side without rows is one empty block: fn is called at least once, and says what nothing amounts to.
    """
    alone = queries.shape[0] <= rows and keys.shape[0] <= columns  # what one tile makes may as well stay
    run = _recomputed if torch.is_grad_enabled() and not alone else _plain
    right = [*zip(keys.split(columns), _index(keys).split(columns), strict=True)]
    total = None
    for q, i, i0 in zip(queries.split(rows), _index(queries).split(rows), _starts(queries, rows), strict=True):
        for (k, j), j0 in zip(right, _starts(keys, columns), strict=True):
            if upper and i0 >= j0 + j.shape[0] > j0:
                continue
            tile = run(fn, q, k, i, j)
            total = tile if total is None else _add(total, tile)
    return total


def _plain(fn: Callable, *arguments) -> Any:
    return _checked(fn(*arguments))


def _recomputed(fn: Callable, q: Tensor, *arguments) -> Any:
    how = {}
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        how = {"preserve_rng_state": False, "context_fn": _Randomness().contexts}
    return _checked(checkpoint(fn, q, *arguments, use_reentrant=False, **how))


class _Randomness:
    """The same random numbers in every call for one tile; a context of the later ones.

    Checkpoints see to that too, but keep 5 KiB for every tile, which come to lie between the large free blocks of the
    heap: it then grew by 2 MiB a tile. Here a state stays only if fn drew from it.
    """

    def __init__(self):
        self._state = self._outside = None

    def contexts(self):
        return self._first(), self

    @contextlib.contextmanager
    def _first(self):
        before = torch.get_rng_state()
        yield
        if not torch.equal(before, torch.get_rng_state()):
            self._state = before

    def __enter__(self):
        if self._state is not None:
            self._outside = torch.get_rng_state()
            torch.set_rng_state(self._state)

    def __exit__(self, *error):
        if self._state is not None:
            torch.set_rng_state(self._outside)


def _index(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0], device=x.device)


def _starts(x: Tensor, size: int) -> range:
    return range(0, max(1, x.shape[0]), size)


def _checked(tile: Any) -> Any:
    for x in tile if isinstance(tile, (tuple, list)) else (tile,):
        if not isinstance(x, Tensor):
            raise TypeError(f"{OP}: fn must return a tensor or a tuple of tensors, got {type(x).__name__}")
    return tuple(tile) if isinstance(tile, list) else tile


def _add(total: Any, tile: Any) -> Any:
    before, now = _shapes(total), _shapes(tile)
    if before != now:
        raise ValueError(f"{OP}: fn must return the same shapes for every tile, got {before}, then {now}")
    return tuple(map(torch.add, total, tile)) if isinstance(tile, tuple) else total + tile


def _shapes(tile: Any) -> list[int] | list[list[int]]:
    return [list(x.shape) for x in tile] if isinstance(tile, tuple) else list(tile.shape)


def pairwise_reduce(
    fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor | tuple[Tensor, ...]],
    queries: Tensor,  # [M, ...]
    keys: Tensor,  # [N, ...]
    *,
    block: int | tuple[int, int] | None = None,
    upper: bool = False,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """fn(queries, keys, arange(M), arange(N)) for a function that is a sum over pairs, without a matrix of all of them:

        Σ over tiles of fn(queries[i], keys[j], i, j)     with a backward that calls fn on each tile again.

    For losses that no sweep covers: distances, circles, margins of pairs, anything with log(1 − p). Memory is that of
    the tensors that fn makes for one tile, and of the gradients.

    Args:
        fn: called with a block of queries [rows, ...], one of keys [columns, ...] and their indices i [rows] and
            j [columns] (int64), with which it finds labels, log-sum-exps or a teacher's rows. Returns a tensor of any
            shape, or a tuple of them, the same for every tile, that add up over tiles: sums, not means. What it closes
            over (a scale, a module) gets its gradient. In the backward it runs again on the same inputs, with the same
            random numbers. That half-precision features become float32 is for fn to see to.
        queries, keys: any dtype and device, one device; may be one tensor.
        block: rows and columns of a tile, one number or two; by default 1,024 on a CPU and 4,096 elsewhere.
        upper: fn is 0 where i > j (it masks with `j > i[:, None]`): tiles wholly below the diagonal are not called.
        implementation: None, "torch", or "reference", which calls fn once, on everything.

    Gradients of any order, as far as fn has them. Without queries or without keys, fn is called with an empty side.

    Raises: ValueError or TypeError naming what was expected and what came.
    """
    if not callable(fn):
        raise TypeError(f"{OP}: fn must be callable, got {type(fn).__name__}")
    for name, x in (("queries", queries), ("keys", keys)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{OP}: {name} must be a tensor, got {type(x).__name__}")
        if not x.ndim:
            raise ValueError(f"{OP}: {name} must be [rows, ...], got a tensor without dimensions")
    check.same_kind(OP, "keys", keys, queries, dtype=False)
    rows, columns = _block(block, queries.device)
    if choose(OP, implementation, queries.device, queries.dtype) == "reference":
        return _checked(_reference(fn, queries, keys))
    return _tiled(fn, queries, keys, rows, columns, upper)


def _block(block: Any, device: torch.device) -> tuple[int, int]:
    if block is None:
        block = CPU_BLOCK if device.type == "cpu" else BLOCK
    sizes = tuple(block) if isinstance(block, (tuple, list)) else (block, block)
    if len(sizes) != 2 or any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
        raise TypeError(f"{OP}: block must be an integer or (rows, columns), got {block!r}")
    if min(sizes) < 1:
        raise ValueError(f"{OP}: block must be at least 1, got {block!r}")
    return sizes
