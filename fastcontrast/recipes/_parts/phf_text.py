"""Texts in segments that carry scores: of documents, of lines of code, and of the blocks of tokens they become."""

from __future__ import annotations

import ast
import random
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._shared.texts import source_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

ALIGNED, MISALIGNED = "<|aligned|>", "<|misaligned|>"
NOISE = 0.01  # of their first embeddings
WIDEST = 60  # characters of a good line; PEP 8 grants 79, which the standard library nearly always keeps to
# Spaces that align, tabs, semicolons; nothing after a comma, or around a comparison.
BAD = re.compile(r"[^\s.] {2,}[^\s#]|\t|;|,[^\s)\]}'\"]|\w([=!<>]=|[<>])\w")
DEFINED = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef

T = TypeVar("T")


class Segment(NamedTuple):
    """A line with its newline, or a sentence, and how far it is from what one wants: 0 is good."""

    text: str
    score: float


def score_line(line: str) -> float:
    """1 if a line of code breaks one of these rules, after PEP 8, else 0: at most `WIDEST` characters; an indentation
    of a multiple of four spaces, and no tab; no spaces that align, except before a comment; no semicolon; a space after
    a comma and around comparisons. An empty line is good. Comments and strings are lines as all others."""
    line = line.rstrip()
    indentation = len(line) - len(line.lstrip(" "))
    return float(len(line) > WIDEST or (line != "" and indentation % 4 > 0) or BAD.search(line) is not None)


def code(limit: int | None = None) -> list[list[Segment]]:
    """Functions and classes of the standard library, a document each; their lines are its segments. All of them, some
    6,000, or `limit` at most, evenly spread over files."""
    found = []
    for path in source_files(limit and max(1, limit // 4)):  # a file has eight
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in other people's strings
                nodes = ast.parse("".join(lines)).body
        except SyntaxError:
            continue
        found += [lines[node.lineno - 1 : node.end_lineno] for node in nodes if isinstance(node, DEFINED)]
    if limit is not None and limit < len(found):
        found = [found[i * len(found) // limit] for i in range(limit)]
    return [[Segment(line, score_line(line)) for line in lines] for lines in found]


def average(document: Sequence[Segment]) -> float:
    """Mean score of a document's segments, 0 without any."""
    return sum(segment.score for segment in document) / max(len(document), 1)


def keep(documents: Iterable[Sequence[Segment]], threshold: float) -> list[Sequence[Segment]]:
    """Filtering: the documents whose average score is at most the threshold."""
    return [document for document in documents if average(document) <= threshold]


@dataclass
class Control:
    """Which token stands before a segment: `aligned` where its score is at most the threshold, else `misaligned`; none
    in a share `drop` of the cases, drawn for each segment anew."""

    aligned: int
    misaligned: int
    threshold: float = 0.0
    drop: float = 0.1
    seed: int = 0

    def tokens(self, segments: Iterable[Segment]) -> Iterator[list[int]]:
        """The one token before each segment, or none."""
        random_ = random.Random(self.seed)
        for segment in segments:
            dropped = random_.random() < self.drop
            yield [] if dropped else [self.aligned if segment.score <= self.threshold else self.misaligned]


def pack_segments(
    tokenizer: Tokenizer, documents: Sequence[Sequence[Segment]], length: int, control: Control | None = None
) -> tuple[Tensor, Tensor]:
    """Blocks of token ids and of each token's score, [N, length] both: documents one after another, each behind token 0
    (the tokenizer's end of text), cut without overlap; what is left over is dropped.

    Segments are tokenized one by one. Each of their tokens has their score: the one of control before them too, and
    token 0 that of the first segment. A document without segments leaves nothing.
    """
    segments = [segment for document in documents for segment in document]
    encoded = iter(tokenizer.encode_batch([segment.text for segment in segments]))
    prefixes = iter([[]] * len(segments) if control is None else control.tokens(segments))
    ids: list[int] = []
    scores: list[float] = []
    for document in documents:
        for i, segment in enumerate(document):
            tokens = [*([] if i else [0]), *next(prefixes), *next(encoded).ids]
            ids += tokens
            scores += [segment.score] * len(tokens)
    count = len(ids) // length
    pairs = ((ids, torch.int64), (scores, torch.float32))
    return tuple(torch.tensor(x[: count * length], dtype=dtype).view(count, length) for x, dtype in pairs)


def shuffled(items: Iterable[T], size: int, seed: int) -> Iterator[T]:
    """Items of a stream in random order, of which `size` wait at a time: each that comes pushes a random one out. The
    order depends on the seed alone; to go on after n items, skip n."""
    waiting, random_ = [], random.Random(seed)
    for item in items:
        if len(waiting) < size:
            waiting.append(item)
            continue
        i = random_.randrange(size)
        yield waiting[i]
        waiting[i] = item
    random_.shuffle(waiting)
    yield from waiting


@torch.no_grad()
def add_control_tokens(model: PreTrainedModel, tokenizer: Tokenizer, seed: int = 0) -> tuple[int, int]:
    """Ids of `ALIGNED` and `MISALIGNED`, which the tokenizer learns if it does not know them, and for which the model
    gets two rows: the mean of its head's plus 0.01 · N(0, 1), as embeddings too."""
    tokenizer.add_special_tokens([ALIGNED, MISALIGNED])
    ids = tokenizer.token_to_id(ALIGNED), tokenizer.token_to_id(MISALIGNED)
    head = model.get_output_embeddings().weight
    count, width = head.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rows = head.mean(0) + NOISE * torch.randn(2, width).to(head)
        model.resize_token_embeddings(max(count, 1 + max(ids)), mean_resizing=False)
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        embeddings.weight[[*ids]] = rows
    return ids


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    longest: int,
    *,
    banned: Sequence[int] = (),
    seed: int = 0,
    temperature: float = 0.7,
    top_p: float = 0.9,
) -> list[list[int]]:
    """What a model writes after each prompt of tokens: at most `longest` of them, up to token 0. `banned` are tokens
    that it may not write: those of control, of which the prompt then ends with the one for aligned text."""
    from fastcontrast import generate

    training, wide = model.training, max(map(len, prompts))
    model.eval()
    ids = torch.tensor([[*[0] * (wide - len(prompt)), *prompt] for prompt in prompts], device=model.device)
    seen = torch.tensor([[*[0] * (wide - len(prompt)), *[1] * len(prompt)] for prompt in prompts], device=model.device)
    options = {"method": "sample", "temperature": temperature, "top_p": top_p, "top_k": 0, "max_new_tokens": longest}
    if banned:
        options["suppress_tokens"] = [*banned]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rows = generate(model, ids, attention_mask=seen, eos_token_id=0, pad_token_id=0, **options)
    model.train(training)
    return [row[: [*row, 0].index(0)] for row in rows[:, wide:].tolist()]
