"""AdaCAD: questions with a document that contradicts what a model remembers, agrees with it, or says nothing of it."""

from __future__ import annotations

import random
from typing import NamedTuple

from fastcontrast.data import package_folder

FACTS = 6  # of a document
KINDS = ("contradicts", "agrees", "is silent")


class Question(NamedTuple):
    """A question, a document in front of it, what to answer, and which of `KINDS` the document is."""

    text: str
    document: str
    answer: str
    kind: str

    @property
    def with_document(self) -> str:
        return f"{self.document}\n{self.text}"


def capitals() -> dict[str, str]:
    """{country: capital} of 116 countries (Mikolov et al. 2013). Raises MissingDataError without the package gensim."""
    path, found, section = package_folder("gensim") / "test" / "test_data" / "questions-words.txt", {}, ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(":"):
            section = line
        elif "capital" in section:
            capital, country, *_ = line.split()
            found[country] = capital
    return dict(sorted(found.items()))


def questions(count: int, seed: int) -> list[Question]:
    """`count` of each kind, at most one a country and kind. A document states the capitals of six countries. One that
    contradicts gives each country another's; a silent one is about six countries that are not asked for, so that the
    answer is the true one."""
    known, draw = capitals(), random.Random(seed)
    found = []
    for kind in KINDS:
        for asked in draw.sample([*known], min(count, len(known))):
            others = draw.sample([country for country in known if country != asked], FACTS)
            countries = others if kind == "is silent" else [asked, *others[1:]]
            said = [known[country] for country in countries]
            if kind == "contradicts":
                said = [*said[1:], said[0]]
            lines = [f"The capital of {a} is {b}." for a, b in zip(countries, said, strict=True)]
            draw.shuffle(lines)
            text = f"Question: What is the capital of {asked}?\nAnswer: The capital of {asked} is"
            found.append(Question(text, " ".join(lines), known[asked] if kind != "contradicts" else said[0], kind))
    return found
