"""1.5-Pints: prose and source to read, news to test with, and questions with a right and a wrong answer."""

from __future__ import annotations

import ast
import math
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastcontrast.data import nodes_of

from .._shared.language import END, IGNORED, pack, perplexity
from .._shared.texts import PLAIN, SENTENCE, WORDS, documents, source_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

LONGEST = 64  # tokens of a question and its answer


class Question(NamedTuple):
    """What a docstring answers, the answer, and its words in another order."""

    text: str
    right: str
    wrong: str


def prose(limit: int | None) -> list[str]:
    """Texts to read: what the docstrings of the standard library say in plain sentences."""
    return [" ".join(document.sentences) for document in documents(limit)]


def source(limit: int | None) -> list[str]:
    """The standard library's files."""
    files = source_files(limit and max(8, limit // 8))
    return [path.read_text(encoding="utf-8", errors="ignore") for path in files]


def questions(seed: int, limit: int | None = None) -> list[Question]:
    """In random order, one for every plain sentence that begins the docstring of a function or class."""
    root, names = Path(os.__file__).parent, {}
    for path in source_files(limit and max(8, limit // 8)):  # there are eight in a file
        module = path.relative_to(root).with_suffix("").parts[0]
        for node in nodes_of(path):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                first = SENTENCE.split(" ".join((ast.get_docstring(node) or "").split()))[0]
                if len(first.split()) in WORDS and PLAIN.fullmatch(first):
                    names.setdefault(first, f"{node.name} of {module}")
    draw, found = random.Random(seed), []
    for right, name in names.items():
        words = right.split()
        found.append(Question(f"What is {name}?", right, " ".join(draw.sample(words, len(words)))))
    draw.shuffle(found)
    return found


def encode(tokenizer: Tokenizer, asked: Sequence[str], answers: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids [B, T] of question, answer and end, padded on the right, and labels [B, T − 1] of the tokens after the first:
    `IGNORED` on the question and on padding. Too long a text loses the end of its answer."""
    rows, labels = [], []
    for question, answer in zip(asked, answers, strict=True):
        prompt = tokenizer.encode(question + "\n").ids
        ids = [*prompt, *tokenizer.encode(answer + END).ids][:LONGEST]
        rows.append(torch.tensor(ids))
        labels.append(torch.tensor([IGNORED] * (len(prompt) - 1) + ids[len(prompt) :]))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad(labels, batch_first=True, padding_value=IGNORED)


def right_and_wrong(tokenizer: Tokenizer, some: Sequence[Question]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Ids and labels of the right answers, and of the wrong ones."""
    asked = [question.text for question in some]
    return tuple(encode(tokenizer, asked, [getattr(q, side) for q in some]) for side in ("right", "wrong"))


def bits_per_byte(model: LlamaForCausalLM, tokenizer: Tokenizer, texts: Sequence[str], length: int) -> float:
    """What the model needs for texts: comparable whatever the vocabulary."""
    blocks = pack(tokenizer, texts, length)
    size = len(tokenizer.decode(blocks[:, 1:].flatten().tolist(), skip_special_tokens=False).encode())
    return math.log2(perplexity(model, blocks)) * blocks[:, 1:].numel() / size
