"""The source of the standard library: files to learn from, files that nobody reads, and what a teacher picks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._shared.language import pack, vocabulary
from .._shared.texts import source_files
from .salt_scores import score_sequences, select
from .salt_teacher import Heads

FILES, EVERY = 250, 10  # of some seven hundred; every tenth is held out


def source_texts(limit: int | None = None) -> tuple[list[str], list[str]]:
    """Texts of files to learn from, and of others to be tested with; a tenth of `limit` files, if given."""
    files = source_files(FILES if limit is None else max(2 * EVERY, limit // 10))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    return [text for i, text in enumerate(texts) if i % EVERY], texts[::EVERY]


def blocks_of_source(entries: int, length: int, tested: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Blocks [N, length + 1] of tokens of a vocabulary of `entries` that the former texts teach; `tested` of the
    others, evenly spread."""
    learned, held_out = source_texts(limit)
    tokenizer = vocabulary(learned, entries)
    blocks, others = pack(tokenizer, learned, length), pack(tokenizer, held_out, length)
    return blocks, others[:: max(1, len(others) // tested)][:tested]


@torch.no_grad()
def most_instructive(heads: Callable[[Tensor], Heads], blocks: Tensor, count: int, batch: int = 64) -> Tensor:
    """The `count` of blocks [N, T + 1] that a teacher, `heads` of inputs [B, T], scores highest."""
    scores = [score_sequences(heads(part[:, :-1]), part[:, 1:]) for part in blocks.split(batch)]
    return blocks[select(torch.cat(scores), count)]
