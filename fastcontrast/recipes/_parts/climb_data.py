"""CLIMB: sentences of docstrings as tokens with parts of speech, by rule."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

from .._shared.language import vocabulary
from .._shared.texts import documents
from .climb_curricula import TAGS

SPECIAL = ("<unk>", "<mask>")  # after the end of a text, which is id 0
UNKNOWN, MASK = 1, 2
WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?|\d[\d.]*|[^\sA-Za-z0-9]")

# Closed classes by their members, open ones by their endings: there is no tagger among the packages.
MEMBERS = {
    "DET": "a an the this that these those each every some any no all both either neither another such",
    "PRON": "i you he she it we they me him her us them his its our their your my who whom which what itself",
    "ADP": "of in to for on with at by from as into about between through over after before under without within per "
           "against during until via",
    "CONJ": "and or but nor if because while when where although unless than whether since so",
    "PRT": "not n't up out off",
    "VERB": "is are was were be been being am has have had do does did can could will would should may might must "
            "return returns get set use make call raise read write create add remove given called",
    "ADV": "also only then here there now always never just otherwise however already again",
    "NUM": "one two three four five six seven eight nine ten first second zero",
    "ADJ": "new same other default current internal specified available possible empty different",
}  # fmt: skip
OF_WORD = {word: tag for tag, words in MEMBERS.items() for word in words.split()}
ENDINGS = (
    ("ADV", ("ly",)), ("VERB", ("ing", "ed", "ize", "ify")),
    ("ADJ", ("able", "ible", "ous", "ful", "ive", "al", "ic", "less")),
)  # fmt: skip


def tag(word: str) -> str:
    """A word's part of speech: of `TAGS`, by lists and endings; a noun if nothing tells otherwise."""
    word = word.lower()
    if not word[0].isalnum():
        return "." if word in ".,;:!?()'\"-" else "X"
    if word[0].isdigit():
        return "NUM"
    if found := OF_WORD.get(word):
        return found
    for name, endings in ENDINGS:
        if len(word) > 4 and word.endswith(endings):
            return name
    return "NOUN"


class Blocks(NamedTuple):
    """Sentences one after another, cut into blocks of one length: tokens and their tags, int64 [N, T] each."""

    ids: Tensor
    tags: Tensor
    vocabulary: int


def blocks(length: int, size: int, limit: int | None) -> Blocks:
    """All sentences of the standard library's docstrings over a byte-level vocabulary of `size` tokens, of which a word
    has one or a few, all with the word's tag. Raises ValueError if they do not fill a block."""
    sentences = [sentence for document in documents(limit) for sentence in document.sentences]
    tokenizer = vocabulary(sentences, size, SPECIAL)
    known: dict[str, tuple[list[int], int]] = {}
    ids, tags = [], []
    for sentence in sentences:
        for word in WORD.findall(sentence):
            if word not in known:
                known[word] = tokenizer.encode(" " + word).ids, TAGS.index(tag(word))
            ids += known[word][0]
            tags += [known[word][1]] * len(known[word][0])
    count = len(ids) // length
    if not count:
        raise ValueError(f"blocks: a block needs {length} tokens, got {len(ids)}")
    cut = (torch.tensor(x[: count * length]).view(count, length) for x in (ids, tags))
    return Blocks(*cut, tokenizer.get_vocab_size())
