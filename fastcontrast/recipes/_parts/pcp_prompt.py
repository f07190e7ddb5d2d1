"""PCP's prompts: a text and a template around one word, as tokens."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Pieces = Callable[[str], list[int]]  # token ids of a text, without special tokens
FIELD = re.compile(r"(\{\w+\})")


class Special(NamedTuple):
    """Ids of special tokens."""

    first: int
    last: int
    mask: int
    padding: int


class Prompted(NamedTuple):
    """Texts in their template."""

    ids: Tensor  # [N, T]
    real: Tensor  # [N, T], False on padding
    maskable: Tensor  # [N, T], real and not special
    places: Tensor  # [N], of the word; 0 where there is none

    def take(self, rows: Tensor) -> Prompted:  # [B] integer
        """Some of them, without columns in which all are padding."""
        ids, real, maskable, places = (x[rows] for x in self)
        width = int(real.sum(1).max())
        return Prompted(ids[:, :width], real[:, :width], maskable[:, :width], places)


class Template:
    """ "{text} It was {word}." or "{text}? {word}, {second}": token ids of texts with a word in its place.

    Where there is too much, texts are cut at their end, the longer first; template and word always stay. Without a
    {word} it makes sentences for masked language modelling alone.
    """

    def __init__(self, pattern: str, pieces: Pieces, special: Special, longest: int = 128):
        parts = [part for part in FIELD.split(pattern) if part.strip()]
        if parts.count("{word}") > 1 or "{text}" not in parts:
            raise ValueError(f"Template: pattern must hold {{text}}, and {{word}} at most once, got {pattern!r}")
        self.pieces, self.special, self.longest = pieces, special, longest
        self.parts = [part[1:-1] if FIELD.fullmatch(part) else pieces(part) for part in parts]
        self.fixed = 2 + len(self.tokens) + parts.count("{word}")  # with both special tokens
        if self.fixed >= longest:
            raise ValueError(f"Template: longest must leave room for a text beside {self.fixed} tokens, got {longest}")

    @property
    def tokens(self) -> list[int]:
        """The template's own tokens."""
        return [i for part in self.parts if isinstance(part, list) for i in part]

    def soft(self, new: dict[int, int]) -> Template:
        """The same with other tokens in the template, not in the texts: those that prompts learn anew."""
        other = copy.copy(self)
        other.parts = [[new[i] for i in part] if isinstance(part, list) else part for part in self.parts]
        return other

    def __call__(
        self, texts: Sequence[str], words: Sequence[int] | None = None, second: Sequence[str] | None = None
    ) -> Prompted:
        """Prompts of texts, with `words` in the word's place, or the mask; `second` are the texts of {second}."""
        fields = {"text": texts, **({} if second is None else {"second": second})}
        rows, places = [], []
        for i in range(len(texts)):
            found = {name: [*self.pieces(values[i])] for name, values in fields.items()}
            while sum(map(len, found.values())) > self.longest - self.fixed:
                max(found.values(), key=len).pop()
            row, place = [self.special.first], 0
            for part in self.parts:
                if part == "word":
                    place = len(row)
                    row.append(self.special.mask if words is None else int(words[i]))
                else:
                    row += part if isinstance(part, list) else found[part]
            places.append(place)
            rows.append(torch.tensor([*row, self.special.last]))
        ids = pad_sequence(rows, batch_first=True, padding_value=self.special.padding)
        real = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        maskable = real & (ids != self.special.first) & (ids != self.special.last)
        return Prompted(ids, real, maskable, torch.tensor(places))


def label_words(pieces: Pieces, words: Sequence[str]) -> Tensor:
    """Ids [C] of one word a class. Raises ValueError for a word of several tokens, and where two classes share one."""
    found = [pieces(word) for word in words]
    for word, ids in zip(words, found, strict=True):
        if len(ids) != 1:
            raise ValueError(f"label_words: a label word must be one token, got {word!r} of {len(ids)}")
    if len({ids[0] for ids in found}) < len(found):
        raise ValueError(f"label_words: classes must have different words, got {list(words)}")
    return torch.tensor([ids[0] for ids in found])
