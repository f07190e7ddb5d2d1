"""Sentences that Python itself carries, by the docstring they stand in; human ratings of similarity; retrieval."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastcontrast.data import _spread, nodes_of, package_folder

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
PLAIN = re.compile(r"[A-Z][A-Za-z0-9 ,;:()'\"/.-]+[.!?]")  # no prompts of a console, no tables, no markup
WORDS = range(4, 41)  # of a sentence


class Document(NamedTuple):
    """A docstring: the module that it belongs to, such as "email" or "json", and its sentences in order."""

    module: str
    sentences: list[str]


class Rating(NamedTuple):
    """Two texts and how alike people found them."""

    first: str
    second: str
    value: float


def source_files(limit: int | None = None) -> list[Path]:
    """The Python files of the standard library without its tests, sorted; or `limit` of them, evenly spread."""
    root = Path(os.__file__).parent
    files = sorted(path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts))
    return [files[i] for i in _spread(len(files), limit)]


def documents(limit: int | None = None) -> list[Document]:
    """Docstrings of the standard library with their plain sentences of 4 to 40 words, each sentence once. Some 6,000
    documents, 12,000 sentences: it depends on Python's version. `limit` keeps about that many documents, of files
    evenly spread."""
    root, seen, found = Path(os.__file__).parent, set(), []
    for path in source_files(limit and max(8, limit // 5)):  # parsing all takes seconds
        module = path.relative_to(root).with_suffix("").parts[0]
        for node in nodes_of(path):
            if not isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            sentences = []
            for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                for sentence in SENTENCE.split(" ".join(paragraph.split())):
                    if len(sentence.split()) in WORDS and PLAIN.fullmatch(sentence) and sentence not in seen:
                        seen.add(sentence)
                        sentences.append(sentence)
            if sentences:
                found.append(Document(module, sentences))
    return [found[i] for i in _spread(len(found), limit)]


def word_ratings(name: str = "wordsim353") -> list[Rating]:
    """Pairs of words as people rated them, 0 to 10: "wordsim353" (relatedness) or "simlex999" (similarity).

    Raises MissingDataError without the package gensim, whose test data they are, ValueError for another name.
    """
    files = {"wordsim353": "wordsim353.tsv", "simlex999": "simlex999.txt"}
    if name not in files:
        raise ValueError(f"word_ratings: name must be one of {', '.join(files)}, got {name!r}")
    lines = (_test_data() / files[name]).read_text(encoding="utf-8").splitlines()
    rows = (line.split("\t") for line in lines if line and not line.startswith("#"))
    return [Rating(first, second, float(value)) for first, second, value in rows]


def document_ratings() -> list[Rating]:
    """All 1,225 pairs of fifty news texts (Lee et al. 2005), rated 0 to 1. Raises MissingDataError without gensim."""
    folder = _test_data()
    texts = (folder / "lee.cor").read_text(encoding="latin-1").splitlines()
    rows = [[float(x) for x in line.split()] for line in (folder / "similarities0-1.txt").read_text().splitlines()]
    return [Rating(texts[i], texts[j], rows[i][j]) for i in range(len(texts)) for j in range(i + 1, len(texts))]


def news_texts() -> list[str]:
    """Three hundred texts of a broadcaster (Lee et al. 2005). Raises MissingDataError without the package gensim."""
    return (_test_data() / "lee_background.cor").read_text(encoding="latin-1").splitlines()


def _test_data() -> Path:
    return package_folder("gensim") / "test" / "test_data"


def spearman(found: Tensor, ratings: list[Rating]) -> float:  # [P] similarities
    """100 × Spearman's rank correlation of similarities with ratings, as such tables give it."""
    from scipy.stats import spearmanr

    return 100 * float(spearmanr(found.tolist(), [rating.value for rating in ratings]).statistic)


def recall_at_1(queries: Tensor, keys: Tensor, labels: Tensor | None = None) -> float:  # [M, D], [N, D], [M]
    """Per cent of queries whose most similar key is their own: key i of query i, or `labels[i]`."""
    from fastcontrast.ops import similarity_topk

    own = torch.arange(len(queries)) if labels is None else labels
    return 100 * (similarity_topk(queries, keys, 1)[1][:, 0] == own).float().mean().item()


def split(count: int, held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of 0 … count − 1 in random order: to train on, and `held_out` to test with, at most half of all."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held_out = min(held_out, count // 2)
    return order[held_out:], order[:held_out]
