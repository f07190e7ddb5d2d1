"""Docstrings as if they were turns of a dialog, with the trees of labels that their functions give; and masked words.

    {package: {first verb: {parameter that the docstring names: [its default]}}}

"Remove handler `h` and wait `timeout` seconds." of `asyncio` becomes {asyncio: {remove: {h: [], timeout: ["None"]}}}.
"""

from __future__ import annotations

import ast
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcontrast.data import nodes_of

from .._shared.encoder import Encoder
from .._shared.masked import MaskedHead, mask_tokens
from .._shared.texts import source_files
from .space2_trees import Frame

NONE = "none"  # the intent of what begins with no frequent verb
INTENTS = 60
A_FILE = 4  # documented functions, about
MASKED, IGNORED = 0.15, -100


class Dialog(NamedTuple):
    """A docstring's first paragraph, and its tree."""

    text: str
    frame: Frame

    @property
    def domain(self) -> str:
        return next(iter(self.frame))

    @property
    def intent(self) -> str:
        return next(iter(self.frame[self.domain]))


def dialogs(limit: int | None = None) -> list[Dialog]:
    """Of the documented functions of the standard library, each text once: some 4,000; or about `limit`."""
    root, found = Path(os.__file__).parent, {}
    for path in source_files(None if limit is None else max(1, limit // A_FILE)):
        package = path.relative_to(root).with_suffix("").parts[0]
        for node in nodes_of(path):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (text := ast.get_docstring(node)):
                text = " ".join(re.split(r"\n\s*\n", text)[0].split())
                if len(text.split()) >= 4 and text not in found:
                    found[text] = package, verb(text), slots(node, text)
    frequent = {word for word, _ in Counter(intent for _, intent, _ in found.values()).most_common(INTENTS)}
    return [Dialog(text, {package: {intent if intent in frequent else NONE: named}})
            for text, (package, intent, named) in found.items()]  # fmt: skip


def verb(text: str) -> str:
    """The first word, without the s of a third person."""
    word = re.match(r"\W*(\w*)", text)[1].lower()
    return word.removesuffix("s") if len(word) > 3 and not word.endswith("ss") else word


def slots(node: ast.FunctionDef | ast.AsyncFunctionDef, text: str) -> dict[str, list[str]]:
    """Parameters that the text names, each with its default where there is one."""
    given, words = node.args, set(re.findall(r"\w+", text))
    places = [*given.posonlyargs, *given.args]
    defaults = [*[None] * (len(places) - len(given.defaults)), *given.defaults, *given.kw_defaults]
    pairs = zip([*places, *given.kwonlyargs], defaults, strict=True)
    return {one.arg: [] if default is None else [ast.unparse(default)] for one, default in pairs if one.arg in words}


class MaskedWords(nn.Module):
    """−log p of tokens that were hidden from the encoder, whose own word vectors are the classifier."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.head = MaskedHead(encoder.width, encoder.tokenizer.get_vocab_size())
        self.mask_id = encoder.tokenizer.token_to_id("[MASK]")

    def forward(self, encoder: Encoder, ids: Tensor, mask: Tensor) -> Tensor:  # [B, T], [B, T]
        """Mean over the hidden tokens; 0 where chance hid none."""
        inputs, targets = mask_tokens(ids, inner(mask), mask_id=self.mask_id, vocabulary=len(self.head.bias))
        return self.head(encoder.states(inputs, mask), encoder.bert.get_input_embeddings().weight, targets)


def inner(mask: Tensor) -> Tensor:  # [B, T] bool
    """Tokens without the first and the last of each text, which say where it begins and ends."""
    return mask & F.pad(mask, (0, 1))[:, 1:] & (torch.arange(mask.shape[1], device=mask.device) > 0)
