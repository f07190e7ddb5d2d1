"""CLIMB's curricula: a pace, and what it restricts: the vocabulary, the examples, the objectives."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TAGS = ("NOUN", "VERB", "ADJ", "ADV", "PRON", "DET", "ADP", "NUM", "CONJ", "PRT", ".", "X")
SHAPES = ("linear", "quad", "root", "step", "exp", "log", "none")


def pace(
    step: int, total: int, shape: str = "linear", *, start: float = 0.0625, end: float = 0.875, first: float = 0.1,
    most: float = 1.0,
) -> float:  # fmt: skip
    """f(step): `first` before the share `start` of all steps, `most` after the share `end`, in between

    first + (most − first)·g(x),  g = x, x², √x, (e¹⁰ˣ − 1) / (e¹⁰ − 1) or 1 + ln(x + e⁻¹⁰) / 10,  x from 0 to 1;
    "step" stays `first` until `end`; "none" is 1 throughout. Raises ValueError unless 0 ≤ start < end ≤ 1.
    """
    if shape not in SHAPES:
        raise ValueError(f"pace: shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    if not 0 <= start < end <= 1:
        raise ValueError(f"pace: start must lie before end, both in [0, 1], got {start} and {end}")
    if shape == "none":
        return 1.0
    begins, ends = start * total, end * total
    if step < begins:
        return first
    if shape == "step":
        return first if step < ends else most
    x = (step - begins) / max(1, int(ends - begins))
    if shape == "exp" and x > 1:
        return most  # e¹⁰ˣ would overflow
    grown = {
        "linear": x, "quad": x * x, "root": math.sqrt(x), "exp": math.expm1(10 * min(x, 1)) / math.expm1(10),
        "log": 1 + math.log(x + math.exp(-10)) / 10,
    }[shape]  # fmt: skip
    return min(first + (most - first) * grown, most)


# ----------------------------------------------------------------------------------------------------- the vocabulary


def restrict(
    ids: Tensor, share: float, *, vocabulary: int, unknown: int, special: int, tags: Tensor | None = None,
    by: str = "token_ids",
) -> Tensor:  # fmt: skip
    """Tokens above what `share` allows become `unknown`; ids rise as tokens become rarer. Ids up to `special` stay, and
    so do ignored labels, which are negative.

    by   "token_ids": id > share·V;  "pos_tags": tag > 11 share;  "pos_tags_and_token_ids": id + tag·V > 11 share·V

    The released code lets small vocabularies map special tokens too, and part-of-speech labels, which are no tokens.
    """
    if by not in ("token_ids", "pos_tags", "pos_tags_and_token_ids"):
        raise ValueError(f"restrict: by must be token_ids, pos_tags or pos_tags_and_token_ids, got {by!r}")
    if (tags is None) == (by != "token_ids"):
        raise ValueError(f"restrict: tags are for pos_tags and pos_tags_and_token_ids, and needed there, got by={by!r}")
    last = len(TAGS) - 1
    if by == "token_ids":
        rare = ids > share * vocabulary
    elif by == "pos_tags":
        rare = tags > share * last
    else:
        rare = ids + tags * vocabulary > share * last * vocabulary
    return ids.masked_fill(rare & (ids > special), unknown)


# -------------------------------------------------------------------------------------------------------- the examples


class Examples:
    """Draws batches of the examples whose scores are low enough at each step: at most the percentile 100·f.

    Args:
        scores: [N], low is easy. even: draw all allowed ones alike, else in proportion to their score.
    """

    def __init__(self, scores: Tensor, *, even: bool = True, seed: int = 0):
        self.scores, self.even, self.seed = scores.double(), even, seed

    def allowed(self, share: float) -> Tensor:
        """bool [N]."""
        return self.scores <= torch.quantile(self.scores, min(1.0, share))

    def draw(self, step: int, share: float, batch: int) -> Tensor:
        """Indices [batch], each at most once; of a step always the same. Raises ValueError if too few are allowed."""
        allowed = self.allowed(share)
        weights = allowed.double() if self.even else self.scores * allowed
        if (count := int((weights > 0).sum())) < batch:
            raise ValueError(f"Examples: a batch of {batch} needs as many allowed examples, got {count} at {share:.3f}")
        generator = torch.Generator().manual_seed(hash((self.seed, step)))
        return torch.multinomial(weights, batch, generator=generator)


def unigram_perplexity(blocks: Tensor) -> Tensor:  # [N, T] -> [N]
    """exp of the mean of −log p of an example's tokens, p the share that each token has of all blocks."""
    _, places, counts = blocks.unique(return_inverse=True, return_counts=True)
    return (-(counts.double() / blocks.numel()).log()[places]).mean(1).exp()


def source_ranks(sources: Sequence[str], order: Sequence[str]) -> Tensor:
    """[N], the place of each example's source in an order of them. Raises ValueError for a source that is not in it."""
    if unknown := set(sources) - set(order):
        raise ValueError(f"source_ranks: order must name every source, got none for {', '.join(sorted(unknown))}")
    return torch.tensor([order.index(source) for source in sources])


# ------------------------------------------------------------------------------------------------------ the objectives


class Unit(NamedTuple):
    """An objective: masked tokens (`tags` is None), or the part of speech of masked tokens, of which `tags` are told
    apart; active from the share `first` of all steps to the share `last`, both included."""

    name: str
    tags: tuple[str, ...] | None = None
    first: float = 0.0
    last: float = 1.0

    def active(self, step: int, total: int) -> bool:
        return self.first <= step / total <= self.last

    @property
    def classes(self) -> int:
        return len(self.tags) + 1


def check_plan(plan: Sequence[Unit]) -> tuple[Unit, ...]:
    """The plan, once it has names of its own, masked tokens among them, and an active unit at every step."""
    names = Counter(unit.name for unit in plan)
    if not plan or max(names.values()) > 1:
        raise ValueError(f"plan: units must have names of their own, got {', '.join(names.elements()) or 'none'}")
    for unit in plan:
        if not 0 <= unit.first < unit.last <= 1:
            raise ValueError(f"plan: {unit.name} must begin before it ends, got {unit.first} and {unit.last}")
        if unit.tags is not None and not set(unit.tags) <= set(TAGS):
            raise ValueError(f"plan: tags must be of {', '.join(TAGS)}, got {', '.join(unit.tags)}")
    if all(unit.tags is not None for unit in plan):
        raise ValueError("plan: masked tokens must be one of the units: tags=None")
    reached = 0.0
    for unit in sorted(plan, key=lambda unit: unit.first):
        if unit.first > reached:
            raise ValueError(f"plan: a unit must be active at every step, got none between {reached} and {unit.first}")
        reached = max(reached, unit.last)
    if reached < 1:
        raise ValueError(f"plan: a unit must be active at every step, got none after {reached}")
    return tuple(plan)


MASKED_TOKENS = Unit("tokens")
PLANS = {
    "tokens": (MASKED_TOKENS,),
    "speech, then tokens": (Unit("speech", TAGS, 0, 0.125), Unit("tokens", None, 0.125)),
    "nouns and verbs, then tokens": (Unit("speech", ("NOUN", "VERB"), 0, 0.125), Unit("tokens", None, 0.125)),
    "both": (Unit("speech", TAGS), MASKED_TOKENS),
    "nouns and verbs, then all, beside tokens": (
        Unit("nouns and verbs", ("NOUN", "VERB"), 0, 0.0625), Unit("speech", TAGS, 0.0625), MASKED_TOKENS,
    ),
}  # fmt: skip
