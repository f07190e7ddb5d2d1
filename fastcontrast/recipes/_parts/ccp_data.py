"""What a run of CCP reads: Django's texts in six languages, each in the order of its files, and pairs for the test."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcontrast.data import package_folder
from fastcontrast.ops import similarity_topk

from .._shared.django import MARKUP
from .ccp_calibration import Calibration
from .ccp_loop import window_pairs
from .uclip_data import pieces

PIVOT = "en"
LANGUAGES = (PIVOT, "de", "es", "fr", "it", "nl")
# (context or "", msgid, msgstr); plurals do not match
ENTRY = re.compile(r'^(?:msgctxt (".*")\n)?msgid ((?:".*"\n)+)msgstr ((?:".*"\n)+)', re.MULTILINE)


@dataclass(frozen=True)
class Language:
    """Texts of a language, by what they are in English."""

    texts: dict[str, str]
    codes: Tensor  # [N, T], what the encoder reads
    pairs: Tensor  # [P, 2], texts that are neighbours

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Codes of centres and of contexts, [size, T] each."""
        rows = torch.randint(len(self.pairs), (size,), generator=generator)
        centre, context = self.pairs[rows].unbind(1)
        return self.codes[centre], self.codes[context]


def load(limit: int | None = None) -> dict[str, Language]:
    """The texts of `LANGUAGES`; `limit` keeps about so many in all. Raises MissingDataError without django."""
    return {name: _read(name, None if limit is None else max(limit // len(LANGUAGES), 8)) for name in LANGUAGES}


def _read(language: str, limit: int | None) -> Language:
    """A file is a document: an application's texts, in the order of its source. In English they are the keys."""
    texts: dict[str, str] = {}
    documents = []
    for path in sorted(package_folder("django").rglob(f"locale/{language}/LC_MESSAGES/*.po")):
        documents.append([])
        for context, *entry in ENTRY.findall(path.read_text(encoding="utf-8") + "\n"):
            english, text = ("".join(ast.literal_eval(line) for line in part.splitlines()) for part in entry)
            text = english if language == PIVOT else text
            if context or not (english and text) or MARKUP.search(english):
                continue
            if english in texts or len(texts) != limit:
                texts.setdefault(english, text)
                documents[-1].append(english)
    index = {english: i for i, english in enumerate(texts)}
    rows = (torch.tensor([index[english] for english in document]).long() for document in documents)
    return Language(texts, pieces([*texts.values()]), torch.cat([window_pairs(row) for row in rows]))


@torch.no_grad()
def scores(world: dict[str, Language], encode: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """How often a text finds its translation, per cent: English from each language and back, the mean of all. First as
    the encoder has it, then with every language calibrated; and how often the nearest text is of the own language."""
    found = {name: encode(language.codes) for name, language in world.items()}
    fitted = {name: Calibration(x.shape[1]).fit(x) for name, x in found.items()}
    scaled = {name: fitted[name](x) for name, x in found.items()}
    for name, x in found.items():
        if name != PIVOT:
            fitted[name].turn_towards(x, scaled[PIVOT])
    turned = {name: fitted[name](x) for name, x in found.items()}
    plain, shifted, rotated = (_recalls(world, x) for x in (found, scaled, turned))
    every = torch.cat([*found.values()])
    spoken = torch.cat([torch.full((len(x),), i) for i, x in enumerate(found.values())])
    nearest = similarity_topk(every, every, 1, query_ids=torch.arange(len(every)), key_ids=torch.arange(len(every)))[1]
    return {
        "translation R@1, %": plain[0],
        "R@10, %": plain[1],
        "R@1 shifted and scaled, %": shifted[0],
        "R@1 rotated, %": rotated[0],
        "nearest is of the own language, %": 100 * (spoken[nearest[:, 0]] == spoken).float().mean().item(),
    }


def _recalls(world: dict[str, Language], found: dict[str, Tensor]) -> list[float]:
    """recall@1 and @10 of texts that differ from their translation."""
    unit = {name: F.normalize(x, dim=-1) for name, x in found.items()}
    pivot = {english: i for i, english in enumerate(world[PIVOT].texts)}
    values = []
    for name in [*world][1:]:
        same = [(i, pivot[english]) for i, (english, text) in enumerate(world[name].texts.items())
                if english in pivot and english.lower() != text.lower()]  # fmt: skip
        own, other = torch.tensor(same).unbind(1)
        for queries, keys, asked, answer in (
            (unit[name], unit[PIVOT], own, other), (unit[PIVOT], unit[name], other, own),
        ):  # fmt: skip
            best = similarity_topk(queries[asked], keys, min(10, len(keys)))[1] == answer[:, None]
            values.append(torch.stack([best[:, 0].float().mean(), best.any(1).float().mean()]))
    return (100 * torch.stack(values).mean(0)).tolist()
