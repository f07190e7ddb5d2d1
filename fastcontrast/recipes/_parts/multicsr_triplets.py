"""Stages 1 and 2 of MultiCSR: a language model writes triplets, rates them, and the rules say which ones stay.

The rules take ratings as a language model says them, 0 to 5. A model of 135 million parameters that is asked for such a
number says nearly the same of every pair, so that here the rating of s for a sentence x is five times the probability
that s was written as entailed and not as contradicting, under the two prompts that wrote either:

    rating(x, s) = 5 σ(log p(s | x, "same meaning") − log p(s | x, "opposite meaning"))
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastcontrast import smollm2
from fastcontrast.data import _bar, cache_folder, write_whole
from fastcontrast.ops import linear_logprob

from .._shared.texts import PLAIN, SENTENCE, news_texts

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

HIGHEST = 5.0
LONGEST, BATCH = 16, 32  # tokens that are written; sentences at once
WORDS = range(5, 12)  # of a sentence
ASKED = "Same meaning", "Opposite meaning"
SHOTS = (
    ("A man plays a guitar on the street.", "Somebody makes music outdoors.", "Nobody plays an instrument."),
    ("The police arrested two men in Sydney.", "Two men were caught.", "The police arrested nobody."),
    ("Shares fell sharply after the news.", "The news made shares lose value.", "Shares rose after the news."),
    ("He will travel to Paris on Monday.", "On Monday he goes to France.", "He stays at home on Monday."),
)


class Triplet(NamedTuple):
    """A sentence, one that follows from it, one that contradicts it, and how the two were rated."""

    sentence: str
    entailed: str
    contradicting: str
    ratings: tuple[float, float]


def rating(said: str | float) -> float | None:
    """What was said as a number from 0 to 5; None where it is no such number, "4 of 5" for example."""
    try:
        value = float(said)
    except ValueError:
        return None
    return value if 0 <= value <= HIGHEST else None


def in_roles(
    sentence: str, entailed: str, contradicting: str, said: tuple[str | float, str | float], lower: float = 4.0
) -> Triplet | None:
    """The triplet, its two roles swapped where the contradiction is rated higher; None where a rating is none, a text
    empty, or even the lower rating above `lower`."""
    first, second = (rating(x) for x in said)
    if first is None or second is None or not entailed or not contradicting or min(first, second) > lower:
        return None
    if second > first:
        return Triplet(sentence, contradicting, entailed, (second, first))
    return Triplet(sentence, entailed, contradicting, (first, second))


def is_good(triplet: Triplet, positive_line: float = 3.0, negative_line: float = 3.0, gap: bool = True) -> bool:
    """Rated at least `positive_line` and at most `negative_line`; with `gap` also not both the same."""
    high, low = triplet.ratings
    return high >= positive_line and low <= negative_line and not (gap and high == low)


def news(limit: int | None = None) -> list[str]:
    """Sentences of 5 to 11 words from `news_texts`, each once; or the first `limit`."""
    found: dict[str, None] = {}
    for text in news_texts():
        found.update((s, None) for s in SENTENCE.split(text) if len(s.split()) in WORDS and PLAIN.fullmatch(s))
    return [*found][:limit]


def written(sentences: Sequence[str], layers: int | None = None) -> list[Triplet]:
    """Stage 1: what SmolLM2 writes for each sentence, rated and in roles; `layers`: its first ones alone, for a quick
    look. Some 0.4 s a sentence; `cache_folder()` keeps the result."""
    key = json.dumps([smollm2.WEIGHTS_SHA256, layers, LONGEST, SHOTS, ASKED, [*sentences]])
    path = cache_folder() / f"triplets-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    if path.exists():
        found = json.loads(path.read_text())
    else:
        model, tokenizer = smollm2.load(progress=True)
        found = _written(Writer(model if layers is None else smollm2.early_exit(model, layers), tokenizer), sentences)
        write_whole(path, lambda part: part.write_text(json.dumps(found)))
    triplets = [in_roles(*row) for row in found]
    return [x for x in triplets if x is not None]


def _written(writer: Writer, sentences: Sequence[str]) -> list[tuple[str, str, str, tuple[float, float]]]:
    found = []
    for i in _bar(range(0, len(sentences), BATCH), "SmolLM2 writes", "batch", True):
        part = sentences[i : i + BATCH]
        entailed, contradicting = (writer.write(part, asked) for asked in (0, 1))
        ratings = (writer.ratings(part, said).tolist() for said in (entailed, contradicting))
        found += zip(part, entailed, contradicting, zip(*ratings, strict=True), strict=True)
    return found


class Writer:
    """A language model and two prompts, each read once: what comes after them goes on from their keys and values.

    Sentence: A man plays a guitar on the street.
    Opposite meaning: Nobody plays an instrument.
    ...
    Sentence:
    """

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast):
        self.model, self.tokenizer = model, tokenizer
        shots = ["".join(self._shot(row[0], row[1 + asked], asked) for row in SHOTS) for asked in (0, 1)]
        self.prompts = [tokenizer(text, return_tensors="pt").input_ids for text in shots]

    @torch.inference_mode()
    def write(self, sentences: Sequence[str], asked: int) -> list[str]:
        """A line for each sentence, greedily; `asked`: 0 of the same meaning, 1 of the opposite one."""
        ids, mask = self._tokens([self._shot(s, "", asked).rstrip() for s in sentences])
        states, cache, mask = self._read(ids, mask, asked)
        said: list[Tensor] = []
        for _ in range(LONGEST):
            said.append((states[:, -1] @ self.model.lm_head.weight.T).argmax(1))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            states = self._states(said[-1][:, None], mask, cache)
        lines = self.tokenizer.batch_decode(torch.stack(said, 1), skip_special_tokens=True)
        return [line.strip().split("\n")[0].strip() for line in lines]

    @torch.inference_mode()
    def ratings(self, sentences: Sequence[str], said: Sequence[str]) -> Tensor:
        """See above, [B]."""
        same, opposite = (self._logprob(sentences, said, asked) for asked in (0, 1))
        return HIGHEST * torch.sigmoid(same - opposite)

    def _logprob(self, sentences: Sequence[str], said: Sequence[str], asked: int) -> Tensor:
        """log p of what was said, through the end of its line, [B]."""
        heads = [self._shot(s, "", asked).rstrip() for s in sentences]
        lengths = [len(self.tokenizer(f" {x}\n").input_ids) for x in said]
        ids, mask = self._tokens([f"{head} {x}\n" for head, x in zip(heads, said, strict=True)])
        states, *_ = self._read(ids, mask, asked)
        each = linear_logprob(states[:, :-1], self.model.lm_head.weight, ids[:, 1:])
        places = torch.arange(ids.shape[1] - 1, 0, -1)  # from the right, where texts end
        return each.masked_fill(places > torch.tensor(lengths)[:, None], 0.0).sum(1)

    @staticmethod
    def _shot(sentence: str, said: str, asked: int) -> str:
        return f"Sentence: {sentence}\n{ASKED[asked]}: {said}\n\n"

    def _tokens(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        found = self.tokenizer(texts, return_tensors="pt", padding=True)  # on the left
        return found.input_ids, found.attention_mask

    def _read(self, ids: Tensor, mask: Tensor, asked: int):
        """States of texts after a prompt, what to go on from, and the mask of all."""
        prompt = self.prompts[asked]
        cache = self.model.model(input_ids=prompt, use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(ids))
        mask = torch.cat([mask.new_ones(len(ids), prompt.shape[1]), mask], 1)
        return self._states(ids, mask, cache), cache, mask

    def _states(self, ids: Tensor, mask: Tensor, cache) -> Tensor:
        places = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
        return self.model.model(
            input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True
        ).last_hidden_state
