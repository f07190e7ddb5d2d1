"""Checks at an operation's door: each error names the operation, what it expects and what came."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._sweep import Masks

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def one_of(op: str, name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def matrix(op: str, name: str, x: Any, columns: int | None = None, like: str = "queries") -> None:
    """`x` is a floating-point matrix, of `columns` columns if given."""
    tensor(op, name, x, 2, "a matrix [rows, width]")
    if columns is not None and x.shape[1] != columns:
        raise ValueError(f"{op}: {name} must be [N, {columns}] to match {like}, got {list(x.shape)}")


def tensor(op: str, name: str, x: Any, ndim: int, like: str) -> None:
    """`x` is a floating-point tensor of `ndim` dimensions, whose names are `like`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {_name(x.dtype)}")
    if x.ndim != ndim:
        raise ValueError(f"{op}: {name} must be {like}, got {list(x.shape)}")


def same_kind(op: str, name: str, x: Tensor, like: Tensor, *, dtype: bool = True, like_name: str = "queries") -> None:
    if x.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} like {like_name}, got {x.device}")
    if dtype and x.dtype != like.dtype:
        raise TypeError(f"{op}: {name} must be {_name(like.dtype)} like {like_name}, got {_name(x.dtype)}")


def features(op: str, queries: Any, keys: Any) -> None:
    matrix(op, "queries", queries)
    if keys is queries:
        return
    matrix(op, "keys", keys, queries.shape[1])
    same_kind(op, "keys", keys, queries)


def scalar(op: str, name: str, value: Any, like: Tensor) -> Tensor:
    """A number or tensor of one element, as a 0-dim tensor on the device of `like`."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{op}: {name} must be a number or a tensor of one element, got {list(value.shape)}")
        if not value.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {_name(value.dtype)}")
        same_kind(op, name, value, like, dtype=False)
        return value if value.ndim == 0 else value.reshape(())
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be a number or a tensor of one element, got {type(value).__name__}")
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.full((), value, dtype=dtype, device=like.device)


def workspace(op: str, value: Any) -> None:
    """`value` is a number of bytes, or None for the default."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: workspace must be a number of bytes or None, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{op}: workspace must be at least 0 bytes, got {value}")


def vector(op: str, name: str, x: Any, length: int, like: Tensor, *, floating: bool) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in (FLOATING if floating else INTEGER):
        kind = "floating point" if floating else "an integer tensor"
        raise TypeError(f"{op}: {name} must be {kind}, got {_name(x.dtype)}")
    if x.shape != (length,):
        raise ValueError(f"{op}: {name} must be [{length}], got {list(x.shape)}")
    same_kind(op, name, x, like, dtype=False)


def masks(op: str, queries: Tensor, keys: Tensor, query_ids, key_ids, positives, guide, own: bool) -> Masks:
    """The masks of a similarity operation as raw tensors; see `similarity_lse` for their meaning.

    `own`: the positives are asked for, and needed even if nothing is masked.
    """
    m, n = queries.shape[0], keys.shape[0]
    if (query_ids is None) != (key_ids is None):
        missing = "key_ids" if key_ids is None else "query_ids"
        raise ValueError(f"{op}: query_ids and key_ids go together, got no {missing}")
    if query_ids is None and guide is None and positives is None and not own:
        return Masks()
    index = _positives(op, queries, n, positives)
    if own and index is None:
        raise ValueError(f"{op}: return_positives needs positives, got -1 (none)")
    if query_ids is None and guide is None:
        return Masks(positives=index if own else None)
    if query_ids is not None:
        vector(op, "query_ids", query_ids, m, queries, floating=False)
        vector(op, "key_ids", key_ids, n, queries, floating=False)
        query_ids, key_ids = query_ids.long().contiguous(), key_ids.long().contiguous()
    guides = (None, None, None)
    if guide is not None:
        guides = _guide(op, queries, keys, guide)
    return Masks(query_ids, key_ids, index, *guides)


def _positives(op: str, queries: Tensor, n: int, positives) -> Tensor | None:
    m = queries.shape[0]
    if positives is None:
        index = torch.arange(m, device=queries.device)
        return index if m <= n else index.masked_fill_(index >= n, -1)
    if isinstance(positives, int) and not isinstance(positives, bool):
        if positives != -1:
            raise ValueError(f"{op}: positives must be a tensor [{m}], -1 (protect none) or None, got {positives}")
        return None
    vector(op, "positives", positives, m, queries, floating=False)
    positives = positives.long().contiguous()
    within(op, "positives", positives, -1, n)
    return positives


def within(op: str, name: str, index: Tensor, least: int, count: int) -> None:
    """Indices lie in [least, count). Not looked at where reading would make a GPU wait or a compiler break the graph;
    out of range then protects nothing."""
    if index.device.type != "cpu" or torch.compiler.is_compiling() or not index.numel():
        return
    low, high = int(index.min()), int(index.max())
    if low < least or high >= count:
        raise ValueError(f"{op}: {name} must lie in [{least}, {count}), got values in [{low}, {high}]")


def _guide(op: str, queries: Tensor, keys: Tensor, guide) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(guide, (tuple, list)) or len(guide) != 3:
        raise TypeError(f"{op}: guide must be (guide_queries, guide_keys, limit), got {type(guide).__name__}")
    guide_queries, guide_keys, limit = guide
    m, n = queries.shape[0], keys.shape[0]
    matrix(op, "guide_queries", guide_queries)
    matrix(op, "guide_keys", guide_keys, guide_queries.shape[1], like="guide_queries")
    if guide_queries.shape[0] != m or guide_keys.shape[0] != n:
        got = f"{guide_queries.shape[0]} and {guide_keys.shape[0]}"
        raise ValueError(f"{op}: guide must have {m} queries and {n} keys, got {got}")
    for name, x in (("guide_queries", guide_queries), ("guide_keys", guide_keys)):
        same_kind(op, name, x, queries, dtype=False)
    return guide_queries.detach(), guide_keys.detach(), row_limit(op, "guide limit", limit, queries)


def row_limit(op: str, name: str, limit: Any, queries: Tensor) -> Tensor:
    """A number or a tensor [M], as a constant of each row."""
    m = queries.shape[0]
    if isinstance(limit, Tensor) and limit.ndim:
        vector(op, name, limit, m, queries, floating=True)
    else:
        limit = scalar(op, name, limit, queries).expand(m)
    return limit.detach().to(torch.float64 if queries.dtype == torch.float64 else torch.float32).contiguous()
