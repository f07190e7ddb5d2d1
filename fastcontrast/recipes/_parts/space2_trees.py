"""Trees of labels and how alike two of them are: ten views of a tree, each a set.

frame = {domain: {intent: {slot: [value, …]}}},   f_m(a, b) = |A_m ∩ B_m| / |A_m ∪ B_m|,  0 where both sets are empty

A view is a part of the paths from the root: nodes (D, I, S, V), edges (DI, IS, SV), or more (DIS, ISV, DISV). They are
tuples, so that no text in a label can be taken for a separator.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

Frame = Mapping[str, Mapping[str, Mapping[str, Sequence[str]]]]
Labels = tuple[frozenset, ...]

VIEWS = {
    "D": slice(0, 1), "I": slice(1, 2), "S": slice(2, 3), "V": slice(3, 4),
    "DI": slice(0, 2), "IS": slice(1, 3), "SV": slice(2, 4),
    "DIS": slice(0, 3), "ISV": slice(1, 4), "DISV": slice(0, 4),
}  # fmt: skip


def paths(tree: Frame | Sequence[str], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every path that begins at the root, of one to four labels, stripped and in small letters."""
    for label in tree:
        path = (*above, label.strip().lower())
        yield path
        if isinstance(tree, Mapping):
            yield from paths(tree[label], path)


def labels_of(frame: Frame, placeholders: Collection[str] = ()) -> Labels:
    """The ten sets of `VIEWS`, and behind them the set of all paths, which is the tree itself. Pieces with a label that
    is one of `placeholders`, the names of "no domain" or "no intent", are in no view."""
    every, none = frozenset(paths(frame)), {name.strip().lower() for name in placeholders}
    pieces = ({path[part] for path in every if len(path) >= part.stop} for part in VIEWS.values())
    return (*(frozenset(x for x in found if none.isdisjoint(x)) for found in pieces), every)


def scores_of(a: Labels, b: Labels) -> tuple[float, ...]:
    """The ten f_m, and the combined score: their mean over views that are not empty in both, but 1 for equal trees.
    All are 0 if either tree is empty."""
    *first, whole = a
    *second, other = b
    if not whole or not other:
        return (0.0,) * (len(VIEWS) + 1)
    pairs = [(len(x & y), len(x | y)) for x, y in zip(first, second, strict=True)]
    found = [common / total for common, total in pairs if total]
    combined = 1.0 if whole == other else sum(found) / max(len(found), 1)
    return (*(common / max(total, 1) for common, total in pairs), combined)


class TreeScores:
    """Scores of the pairs of a batch, of which the last ones asked for are kept by their ids.

        scores = TreeScores(frames, placeholders={"none"})
        weights = scores(ids)                                  # [10, B, B]

    Args:
        frames: of all examples; an example's id is its place among them.
        placeholders: see `labels_of`.
        kept: pairs to remember, some 0.4 KB each.
    """

    def __init__(self, frames: Sequence[Frame], placeholders: Collection[str] = (), kept: int = 1 << 18):
        self.labels = [labels_of(frame, placeholders) for frame in frames]
        self.pair = lru_cache(kept)(lambda i, j: scores_of(self.labels[i], self.labels[j]))

    def __call__(self, ids: Sequence[int] | Tensor) -> Tensor:  # [B]
        """f_m, [10, B, B]; symmetric, and 1 on the diagonal, which guards examples without labels."""
        return self._matrix(ids)[:-1]

    def combined(self, ids: Sequence[int] | Tensor) -> Tensor:  # [B] -> [B, B]
        """One score for the whole tree, for a loss without views."""
        return self._matrix(ids)[-1]

    def _matrix(self, ids: Sequence[int] | Tensor) -> Tensor:
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        found = torch.ones(len(VIEWS) + 1, len(ids), len(ids))
        rows, columns = torch.triu_indices(len(ids), len(ids), offset=1)
        above = [self.pair(min(ids[i], ids[j]), max(ids[i], ids[j]))
                 for i, j in zip(rows.tolist(), columns.tolist(), strict=True)]  # fmt: skip
        values = torch.tensor(above).reshape(-1, len(found)).T
        found[:, rows, columns] = values
        found[:, columns, rows] = values
        return found
