"""DreamLIP's sentences: the pool of an image, and what a step draws from it."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence


def sentences(captions: Iterable[str]) -> list[str]:
    """The pool of an image: all of its captions, split at new lines, full stops and end tags, without what is empty."""
    return [part for caption in captions for part in map(str.strip, re.split(r"\n|\.|</s>", caption)) if part]


def draw_sentences(
    pool: Sequence[str], count: int, draw: random.Random, *, merged: int = 1, skip_last: bool = False
) -> list[str]:
    """`count` of the pool, no two the same unless it has fewer.

    Args:
        merged: from each one that is drawn, so many that follow each other in the pool are joined.
        skip_last: as in the released code, which never draws the last one of several.
    """
    if not pool or count < 0 or merged < 1:
        got = f"{len(pool)}, {count}, {merged}"
        raise ValueError(f"draw_sentences: pool and merged must be at least 1, count at least 0, got {got}")
    first = range(max(1, len(pool) - skip_last))
    drawn = draw.sample(first, count) if count <= len(first) else draw.choices(first, k=count)
    return [". ".join(pool[i : i + merged]) for i in drawn]
