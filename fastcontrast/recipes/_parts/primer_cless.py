"""CLESS's encoder of words, texts and labels, its matching network, and sentences of docstrings with their words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcontrast.figures import BLUE, GREY, INK

from .._shared.encoder import Encoder
from .._shared.namer import spread
from .._shared.texts import documents, split
from .primer_nce import Lists

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

WIDTH, HIDDEN, KERNEL = 128, 256, 3
WORD = re.compile(r"[a-z]{2,}")
LEAST = 30  # sentences of a module, for its name to be a label
COMMON = 0.05  # words of more than that share of the sentences are no labels: "the", "of", "return"


class WordEncoder(nn.Module):
    """One table of word vectors for texts and labels: a label is the mean of its words; a text is that mean plus what
    windows of three words make of it, maxima over the text. Word 0 is padding.

    Args:
        table: first vectors of the words, [W, D].
    """

    def __init__(self, table: Tensor, dropout: float = 0.2):
        super().__init__()
        width = table.shape[1]
        self.table = nn.Embedding.from_pretrained(table.clone(), freeze=False)
        self.windows = nn.Conv1d(width, HIDDEN, KERNEL, padding=KERNEL // 2)
        self.head = nn.Linear(HIDDEN, width)
        self.dropout = nn.Dropout(dropout)

    def labels(self, words: Tensor) -> Tensor:  # [N, L] -> [N, D]
        return self._mean(self.table(words), words > 0)

    def texts(self, words: Tensor) -> Tensor:  # [B, T] -> [B, D]
        x, real = self.dropout(self.table(words)), words > 0
        x = x * real[..., None]
        found = self.windows(x.mT).relu().masked_fill(~real[:, None], 0.0).amax(2)
        return self._mean(x, real) + self.head(found)

    def _mean(self, x: Tensor, real: Tensor) -> Tensor:
        return (x * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)


class Matcher(nn.Module):
    """m(t, l) = w · GELU(A [t; l] + b) + c, a logit. A [t; l] is a sum of two products, one a text and one a label, so
    that the pairs, which are many, cost no product and no concatenation."""

    def __init__(self, width: int, hidden: int = HIDDEN):
        super().__init__()
        self.of_text, self.of_label = nn.Linear(width, hidden), nn.Linear(width, hidden, bias=False)
        self.last = nn.Linear(hidden, 1)

    def forward(self, texts: Tensor, labels: Tensor, pairs: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """[P] of (texts[rows], labels[columns]) for `pairs` = rows, columns [P]; [B, N] of all pairs without."""
        texts, labels = self.of_text(texts), self.of_label(labels)
        if pairs is None:
            return self.last(F.gelu(texts[:, None] + labels))[..., 0]
        return self.last(F.gelu(texts[pairs[0]] + labels[pairs[1]]))[..., 0]


def pseudo_labels(
    texts: Sequence[Sequence[int]], positives: int, negatives: int, generator: torch.Generator
) -> tuple[Tensor, Lists, Lists]:
    """Labels that are words: those of a batch [N], and for each text the lists of some of its own and of others'.

    A text's positives are at most `positives` of its words, drawn at random. Its negatives are at most `negatives` of
    what was drawn for other texts and does not stand in it. A text without words has only negatives.
    """

    def some(of: list[int], count: int) -> list[int]:
        return [of[i] for i in torch.randperm(len(of), generator=generator)[:count].tolist()]

    drawn = [some(sorted({*text}), positives) for text in texts]
    words = sorted({word for text in drawn for word in text})
    place = {word: i for i, word in enumerate(words)}
    near = [[place[word] for word in text] for text in drawn]
    far = [some([place[word] for word in words if word not in own], negatives) for own in map(set, texts)]
    return torch.tensor(words, dtype=torch.int64), Lists.of(near), Lists.of(far)


@dataclass(frozen=True)
class World:
    """Sentences, the modules that they are from, and words for both, as numbers."""

    sentences: list[str]
    words: Tensor  # [N, T], 0 behind the last
    contents: list[list[int]]  # the words of each sentence that may be labels
    modules: Tensor  # [N], −1 for those without a label
    names: list[str]
    labels: Tensor  # [C, L], the words of the names
    table: Tensor  # [W, D], where words start
    train: Tensor
    test: Tensor
    shots: Tensor  # of the train sentences those whose module is told


def load(limit: int | None, seed: int, shots: int) -> World:
    """Sentences of the standard library's docstrings; words start as MiniLM's word pieces, cut to `WIDTH` numbers."""
    pairs = [(sentence, document.module) for document in documents(limit) for sentence in document.sentences]
    sentences = [sentence for sentence, _ in pairs]
    counts = Counter(module for _, module in pairs)
    names = sorted(name for name, count in counts.items() if count >= LEAST and WORD.fullmatch(name))
    spoken = [WORD.findall(sentence.lower()) for sentence in sentences]
    documents_of = Counter(word for words in spoken for word in {*words})
    vocabulary = ["", *sorted({*documents_of, *names})]
    number = {word: i for i, word in enumerate(vocabulary)}
    rows = [torch.tensor([number[word] for word in words] or [0]) for words in spoken]
    modules = torch.tensor([names.index(module) if module in names else -1 for _, module in pairs])
    train, test = split(len(sentences), len(sentences) // 5, seed)
    told = [train[modules[train] == c][:shots] for c in range(len(names))]
    return World(
        sentences,
        nn.utils.rnn.pad_sequence(rows, batch_first=True),
        [[number[w] for w in words if documents_of[w] <= COMMON * len(sentences)] for words in spoken],
        modules,
        names,
        torch.tensor([[number[name]] for name in names]),
        _table(vocabulary),
        train,
        test[modules[test] >= 0],
        torch.cat(told),
    )


def name_lists(world: World, rows: Tensor) -> tuple[Lists, Lists]:
    """Of sentences: the name of the own module, and all others."""
    own = world.modules[rows]
    others = (own[:, None] != torch.arange(len(world.names))).nonzero()[:, 1]
    offsets = torch.arange(len(rows) + 1)
    return Lists(offsets, own), Lists(offsets * (len(world.names) - 1), others)


@torch.no_grad()
def _table(vocabulary: Sequence[str]) -> Tensor:
    """Means of the word pieces' vectors on their first principal axes, with numbers of about 1; zeros for padding."""
    encoder = Encoder(1)
    pieces = encoder.bert.embeddings.word_embeddings.weight
    pieces = pieces - pieces.mean(0)
    _, axes = torch.linalg.eigh(pieces.T @ pieces)
    pieces = F.normalize(pieces @ axes[:, -WIDTH:], dim=1)
    ids = [one.ids[1:-1] for one in encoder.tokenizer.encode_batch(list(vocabulary))]
    index = torch.tensor(ids)  # padded with the piece 0
    return spread(F.normalize((pieces[index] * (index > 0)[..., None]).sum(1), dim=1))


def draw(world: World, rows: Tensor, scores: Tensor, panel: SubFigure) -> None:  # [R], [R, C]
    """Sentences of the test, the module of each, and the three names that fit best."""
    axes = panel.subplots()
    axes.axis("off")
    best = scores.topk(min(3, scores.shape[1]), dim=1).indices.tolist()
    for i, (row, found) in enumerate(zip(rows.tolist(), best, strict=True)):
        y, own = 1 - i / len(rows), world.modules[row].item()
        text = world.sentences[row]
        axes.text(0, y, text[:88] + "…" * (len(text) > 88), fontsize=7, color=INK, parse_math=False)
        told = ", ".join(world.names[c] for c in found)
        axes.text(0.02, y - 0.4 / len(rows), told, fontsize=7, color=BLUE if own in found else GREY)
    panel.suptitle("test sentences and the names that fit best, no label seen; blue: the right one is among them",
                   fontsize=8, color=GREY)  # fmt: skip
