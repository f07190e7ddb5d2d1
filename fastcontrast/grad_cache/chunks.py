"""Trees of tensors: nested mappings, lists and tuples, cut into chunks along dimension 0 and joined again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor


def leaves(tree: Any) -> list[Any]:
    """Everything in nested mappings, lists and tuples that is none of them."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    return [leaf for branch in tree for leaf in leaves(branch)] if isinstance(tree, (list, tuple)) else [tree]


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def map_leaves(fn: Callable[[Any], Any], tree: Any, kind: type = Tensor) -> Any:
    """`tree` with `fn` of its leaves of that kind. A dict keeps its class (transformers' outputs); other mappings,
    which may hold more than their items (transformers' BatchEncoding), become plain dicts."""
    if isinstance(tree, Mapping):
        new = copy.copy(tree) if isinstance(tree, dict) else {}
        for key, branch in tree.items():
            new[key] = map_leaves(fn, branch, kind)
        return new
    if isinstance(tree, (list, tuple)):
        items = [map_leaves(fn, branch, kind) for branch in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return fn(tree) if isinstance(tree, kind) else tree


def with_leaves(tree: Any, new: Iterable[Any]) -> Any:
    """`tree` with its leaves replaced, in order."""
    remaining = iter(new)
    return map_leaves(lambda _: next(remaining), tree, object)


def fresh(tree: Any) -> Any:
    """`tree` in containers of its own: some models write into the mapping that they are given."""
    return map_leaves(lambda leaf: leaf, tree)


def split(tree: Any, size: int | list[int]) -> list[Any]:
    """Chunks of a tree in its own structure, of one size or of these sizes. Numbers, strings, None and 0-dimensional
    tensors go to every chunk."""
    cut = [t for t in tensors(tree) if t.dim()]
    if not cut:
        raise TypeError(f"GradCache: no tensor to split in a {type(tree).__name__}; pass split_input_fn")
    shapes = [tuple(t.shape) for t in cut]
    rows = {shape[0] for shape in shapes}
    if len(rows) > 1:
        raise ValueError(f"GradCache: tensors of one input must share dimension 0, got {shapes}")
    if rows == {0}:
        raise ValueError(f"GradCache: batch size must be at least 1, got {shapes}")
    _refuse_row_lists(tree, *rows)
    # split, not slices: if the input requires grad, one node gathers all chunks instead of one padded copy for each
    columns = [t.split(size) if isinstance(t, Tensor) and t.dim() else repeat(t) for t in leaves(tree)]
    return [with_leaves(tree, row) for row in zip(*columns, strict=False)]


def cat(chunks: Sequence[Any]) -> Any:
    """The tree whose leaves are those of the chunks, concatenated."""
    columns = list(zip(*map(leaves, chunks), strict=True))
    for column in columns:
        if len({t.shape[1:] for t in column}) > 1:
            shapes = [tuple(t.shape) for t in column]
            raise ValueError(f"GradCache: representations of chunks must agree beyond dimension 0, got {shapes}")
    return with_leaves(chunks[0], map(torch.cat, columns))


def split_as(tree: Any, rows: Sequence[Sequence[int]] | int, count: int) -> list[Any]:
    """The inverse of `cat`: `rows[c][j]` rows of leaf j to chunk c (or a chunk size); a None goes to every chunk."""
    sizes = repeat(rows) if isinstance(rows, int) else map(list, zip(*rows, strict=True))
    pairs = zip(leaves(tree), sizes, strict=False)
    columns = [repeat(None, count) if t is None else t.split(size) for t, size in pairs]
    return [with_leaves(tree, row) for row in zip(*columns, strict=True)]


def _refuse_row_lists(tree: Any, rows: int) -> None:
    """One string or number a row would otherwise go whole to every chunk, in silence."""
    if isinstance(tree, (list, tuple)) and len(tree) == rows > 1 and not tensors(tree):
        raise TypeError(
            f"GradCache: a {type(tree).__name__} of {rows} {type(tree[0]).__name__} beside {rows} rows may or may not "
            "have one entry a row; pass split_input_fn"
        )
    if isinstance(tree, (Mapping, list, tuple)):
        for branch in tree.values() if isinstance(tree, Mapping) else tree:
            _refuse_row_lists(branch, rows)
