"""Chunks by number of tokens: cut where rows × the longest of them would pass a budget, without useless padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from .chunks import split

PER_TOKEN = ("attention_mask", "inputs_embeds")  # besides every [B, T, ...] of integers


def split_tokens(tree: Any, most_rows: int, budget: int) -> list[Any]:
    """Chunks of consecutive rows: at most `most_rows`, and rows × longest at most `budget` (or one row).

    A row ends at the last column that its `attention_mask` [B, T] uses. Columns behind all ends of a chunk are cut off
    the mask, `inputs_embeds`, and every tensor of integers [B, T, ...] beside them (ids, types, positions, labels).
    Text padded on the left stays as it is. Several masks in one input add up. The host waits for the masks.
    """
    texts = list(_texts(tree))
    if not texts:
        raise ValueError(
            f"GradCache: chunk_tokens needs an attention_mask [B, T], got a {type(tree).__name__} without; "
            "a list may hold None for such a model"
        )
    ends = [_ends(text["attention_mask"]) for text in texts]
    sizes = _pack(zip(*ends, strict=False), most_rows, budget)
    chunks, start = split(tree, sizes), 0
    for chunk, size in zip(chunks, sizes, strict=True):
        for text, end in zip(_texts(chunk), ends, strict=True):
            _trim(text, max(end[start : start + size]))
        start += size
    return chunks


def _texts(tree: Any) -> Iterator[Any]:
    """Mappings that hold a mask, in order."""
    if isinstance(tree, Mapping):
        mask = tree.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1]:
            yield tree
        tree = list(tree.values())
    for branch in tree if isinstance(tree, (list, tuple)) else ():
        yield from _texts(branch)


def _ends(mask: Tensor) -> list[int]:
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (columns * (mask != 0)).amax(1).clamp(min=1).tolist()


def _pack(rows: Iterable[tuple[int, ...]], most_rows: int, budget: int) -> list[int]:
    sizes: list[int] = []
    longest: tuple[int, ...] = ()
    for row in rows:
        grown = tuple(map(max, longest, row)) if sizes else row
        if sizes and sizes[-1] < most_rows and (sizes[-1] + 1) * sum(grown) <= budget:
            sizes[-1], longest = sizes[-1] + 1, grown
        else:
            sizes.append(1)
            longest = row
    return sizes


def _trim(text: MutableMapping[str, Any], width: int) -> None:
    shape = text["attention_mask"].shape
    for name, t in text.items() if width < shape[1] else ():
        counts = isinstance(t, Tensor) and t.shape[:2] == shape and not (t.is_floating_point() or t.is_complex())
        if counts or name in PER_TOKEN:
            text[name] = t[:, :width].contiguous()  # models take views of their ids
