"""SimCTG's run: texts and a language model's start on them, what is measured of a model, and the picture of it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcontrast import generate
from fastcontrast.decoding.measures import diversity, isotropy, perplexity, rep_n
from fastcontrast.figures import GREY, INK

from .._shared import language
from .._shared.texts import documents, split

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

VOCABULARY, WIDTH, LAYERS, LENGTH = 2048, 192, 3, 128
PROMPTS, PROMPT, NEW = 32, 32, 64  # texts to continue, their tokens, and those that are written
METHODS = {
    "greedy": {"method": "greedy"},
    "contrastive search": {"method": "contrastive", "penalty_alpha": 0.6, "top_k": 5},
}


@dataclass(frozen=True)
class World:
    """Blocks of LENGTH + 1 tokens of the library's docstrings, of which those held out train nothing."""

    tokenizer: Tokenizer
    train: Tensor
    test: Tensor

    def llama(self, seed: int) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        return language.llama(VOCABULARY, width=WIDTH, layers=LAYERS, longest=LENGTH)

    @property
    def prompts(self) -> Tensor:
        return self.test[:PROMPTS, :PROMPT]


def load(limit: int | None, seed: int) -> World:
    """A module's sentences are one text: they seldom end inside a block."""
    texts: dict[str, list[str]] = defaultdict(list)
    for document in documents(limit):
        texts[document.module] += document.sentences
    joined = [" ".join(sentences) for sentences in texts.values()]
    tokenizer = language.vocabulary(joined, VOCABULARY)
    blocks = language.pack(tokenizer, joined, LENGTH)
    train, test = split(len(blocks), max(PROMPTS, len(blocks) // 10), seed)
    return World(tokenizer, blocks[train], blocks[test])


@torch.no_grad()
def judge(model: LlamaForCausalLM, world: World, reader: LlamaForCausalLM) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics of a model, and what it wrote behind the prompts, by method; `reader` says how likely that is."""
    model.eval()
    metrics = {
        "isotropy": isotropy(language.states(model, world.test[:, :-1])),
        "perplexity": language.perplexity(model, world.test),
    }
    written = {}
    for name, how in METHODS.items():
        prompts = world.prompts
        ids = generate(model, prompts, attention_mask=torch.ones_like(prompts), pad_token_id=0,
                       max_new_tokens=NEW, min_new_tokens=NEW, **how)  # fmt: skip
        new = ids[:, PROMPT:]
        metrics[f"diversity, {name}, %"] = 100 * diversity(new)
        written[name] = {
            "texts": [_plain(world.tokenizer, row) for row in new[:4]],
            **{f"rep-{n}, %": 100 * rep_n(new, n) for n in (2, 3, 4)},
            "coherence": -torch.tensor(perplexity(reader, ids, PROMPT)).log().item(),
        }
    model.train()
    return metrics, written


@torch.no_grad()
def self_similarity(hidden: Tensor) -> Tensor:  # [S, D]
    """Cosines of all tokens of a text, [S, S]."""
    unit = F.normalize(hidden.float(), dim=1)
    return unit @ unit.T


def draw(world: World, models: dict[str, LlamaForCausalLM], written: dict[str, Any], panel: SubFigure) -> None:
    """A text's cosines in each model; below, what greedy and contrastive search write behind its first tokens."""
    above, below = panel.subfigures(2, 1, height_ratios=(3, 2))
    text = world.test[:1, :-1]
    for axes, (label, model) in zip(above.subplots(1, len(models), squeeze=False).flat, models.items(), strict=True):
        image = axes.imshow(self_similarity(language.states(model, text)[0]).numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_title(label, fontsize=8, color=GREY)
    above.colorbar(image, ax=above.axes, shrink=0.7)
    above.suptitle("cosines of a text's tokens", fontsize=9, color=GREY)
    lines = [f"… {_plain(world.tokenizer, world.prompts[0])[-60:]} …"]
    for label, by_method in written.items():
        lines += [f"{label}, {method}: {found['texts'][0][:110]}…" for method, found in by_method.items()]
    axes = below.subplots()
    axes.axis("off")
    axes.text(0, 1, "\n".join(lines), fontsize=6.5, color=INK, va="top", parse_math=False)


def _plain(tokenizer: Tokenizer, ids: Tensor) -> str:
    """On one line, of few characters: what a model says may be in any script."""
    return " ".join(tokenizer.decode(ids.tolist()).encode("ascii", "replace").decode().split())
