"""Tasks that a line of demonstration tells: a word and what it becomes, such as "big bigger" or "Athens Greece"; and a
small language model that has learned them, so that demonstrations tell it which of them is asked."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastcontrast.data import package_folder

from .._shared.language import llama, next_token_loss, pack, vocabulary
from .._shared.report import train
from .._shared.texts import documents
from .mend_distiller import Example, halves

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

VOCABULARY, BLOCK = 3072, 64
OFTEN = 50  # times that a task's line counts for the vocabulary, so that words are tokens
UNSEEN = 5  # one task of so many is kept from the distiller

Pair = tuple[str, str]


def word_tasks() -> dict[str, list[Pair]]:
    """{task: pairs}: relations of words from gensim's questions-words.txt, their inverses where those are functions,
    and what is done to any word by rule. Raises MissingDataError without gensim, whose test data they are."""
    relations: dict[str, dict[str, str]] = defaultdict(dict)
    path = package_folder("gensim") / "test" / "test_data" / "questions-words.txt"
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(":"):
            relation = line[2:]
        else:
            a, b, c, d = line.split()
            relations[relation] |= {a: b, c: d}
    del relations["capital-common-countries"]  # "capital-world" has them all
    tasks = {name: [*pairs.items()] for name, pairs in relations.items()}
    for name, pairs in relations.items():
        if len({*pairs.values()}) == len(pairs):
            tasks[f"{name}, inverse"] = [(b, a) for a, b in pairs.items()]
    words = sorted({word for pairs in relations.values() for pair in pairs.items() for word in pair})
    rules = {"copy": str, "first letter": itemgetter(0), "last letter": itemgetter(-1), "length": lambda w: str(len(w))}
    return tasks | {name: [(word, rule(word)) for word in words] for name, rule in rules.items()}


@dataclass(frozen=True)
class World:
    """Texts as tokens, and draws of examples from them."""

    tokenizer: Tokenizer
    text: Tensor  # [N, BLOCK + 1], plain
    tasks: dict[str, list[Pair]]
    seen: list[str]  # tasks that the distiller learns from
    unseen: list[str]

    def lines(self, pairs: list[Pair]) -> Tensor:
        return torch.tensor(self.tokenizer.encode("".join(f"{a} {b}\n" for a, b in pairs)).ids)

    def example(self, tasks: list[str], count: int, draws: random.Random) -> Example:
        """A task's `count` demonstrations, and a query that is none of them."""
        *shown, (question, answer) = draws.sample(self.tasks[draws.choice(tasks)], count + 1)
        query, alone = self.lines([(question, answer)]), torch.tensor(self.tokenizer.encode(question).ids)
        return Example(self.lines(shown), query, len(query) - len(alone))

    def plain(self, draws: random.Random) -> Example:
        return halves(self.text[draws.randrange(len(self.text))])

    def block(self, draws: random.Random) -> Tensor:
        """[BLOCK + 1] tokens of a task's lines, for the language model itself."""
        pairs = self.tasks[draws.choice([*self.tasks])]
        return self.lines(draws.choices(pairs, k=BLOCK))[: BLOCK + 1]


def load_world(limit: int | None) -> World:
    tasks = word_tasks()
    texts = [" ".join(document.sentences) for document in documents(limit)]
    lines = [f"{a} {b}\n" for pairs in tasks.values() for a, b in pairs]
    tokenizer = vocabulary([*texts, *OFTEN * lines], VOCABULARY)
    names = [*tasks]
    unseen = names[2::UNSEEN]
    return World(tokenizer, pack(tokenizer, texts, BLOCK), tasks, [n for n in names if n not in unseen], unseen)


def language_model(
    world: World, steps: int, batch: int, rate: float, seed: int, **shape: int
) -> tuple[LlamaForCausalLM, list[float]]:
    """Learns plain texts, a quarter of each batch, and lines of tasks; comes back frozen, with its losses."""
    torch.manual_seed(seed)
    model, draws = llama(world.tokenizer.get_vocab_size(), **shape), random.Random(seed)

    def step(_: int) -> Tensor:
        plain = world.text[torch.randint(len(world.text), (batch // 4,))]
        lines = torch.stack([world.block(draws) for _ in range(batch - len(plain))])
        return next_token_loss(model, torch.cat([plain, lines]))

    losses = train("the language model", steps, model, step, rate=rate, decay=0.1, clip=1.0, betas=(0.9, 0.95))
    return model.requires_grad_(False).eval(), losses
