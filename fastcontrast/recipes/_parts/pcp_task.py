"""The task of PCP's run: which module of the standard library a sentence of its docstrings comes from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._shared.texts import documents, split

# A module, and the word of one token that says so.
WORDS = {
    "tkinter": "window", "idlelib": "editor", "asyncio": "loop", "email": "email", "distutils": "build",
    "logging": "logging", "xml": "xml", "importlib": "import", "turtle": "turtle", "http": "http",
}  # fmt: skip
TESTED = 1000


@dataclass(frozen=True)
class Task:
    everything: list[str]  # sentences of all modules: what the start is trained on
    texts: list[str]  # of the modules that are to be told apart
    classes: Tensor  # [N] of texts
    unlabelled: Tensor  # indices of texts whose class is not to be looked at; the labelled ones are among them
    labelled: Tensor
    tested: Tensor


def load(limit: int | None, shots: int, seed: int) -> Task:
    """`shots` sentences of each class are labelled; `limit` keeps about so many documents."""
    found = documents(limit)
    index = {module: i for i, module in enumerate(WORDS)}
    tested = [(text, index[d.module]) for d in found if d.module in index for text in d.sentences]
    texts, classes = [text for text, _ in tested], torch.tensor([label for _, label in tested])
    train, test = split(len(texts), TESTED, seed)
    labelled = torch.cat([train[classes[train] == label][:shots] for label in range(len(WORDS))])
    return Task([text for d in found for text in d.sentences], texts, classes, train, labelled, test)
