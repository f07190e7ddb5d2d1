"""A small language model that names icons: what it learns from, what it says, and how many of the words are right.

    [prefix] icon "account box"

It is SmolLM2's first two layers of thirty, between all of its vocabulary: what two cores train in half a minute. The
quotes are that model's own way to name things: ended by them, a name costs it fewer nats than ended as a document is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastcontrast.figures import GREY, INK

from .prefix import IGNORED, caption_labels, prefix_loss

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from .icons import Icons

LAYERS = 2
PROMPT, END = 'icon "', '"'
LONGEST = 6  # tokens of a name, its end among them: 19 of 20 names are shorter
TESTED, SHOWN = 300, 18  # icons of each kind; in the picture


def language_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """SmolLM2's first layers and its tokenizer. Layers and the last norm learn, the vocabulary stays."""
    from fastcontrast import smollm2

    model, tokenizer = smollm2.load(progress=True)
    model = smollm2.early_exit(model.requires_grad_(False), LAYERS)
    model.model.layers.requires_grad_(True)
    model.model.norm.requires_grad_(True)
    # It is made for what thirty layers add up to: behind two, logits are so large that a token costs twice as much.
    nn.init.constant_(model.model.norm.weight, 0.3)
    return model, tokenizer


def spread(x: Tensor) -> Tensor:  # [B, E]
    """x · √E: vectors of length 1 with entries of about 1, as AdamW's rates want them. W takes the factor up."""
    return x * x.shape[1] ** 0.5


def tokens_of(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], end: int) -> Tensor:
    """Ids [B, T] of lower-cased texts, each with its end token, padded with more of them."""
    rows = [torch.tensor([*tokenizer(text.lower()).input_ids, end]) for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=end)


@torch.no_grad()
def say(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prefix: Tensor,  # [B, S, D]
    longest: int,
    end: int,
    batch: int = 256,
    **how: Any,
) -> list[str]:
    """What the model says after each prefix until it says `end`, in at most `longest` tokens: greedily, or as `how`
    tells `generate`, with `num_beams=5` for example."""
    from fastcontrast import generate

    options = {"method": "greedy", "max_new_tokens": longest, "eos_token_id": end, "pad_token_id": end, **how}
    said: list[str] = []
    for part in prefix.detach().to(model.dtype).split(batch):
        rows = generate(model, inputs_embeds=part, attention_mask=part.new_ones(part.shape[:2]).long(), **options)
        said += [tokenizer.decode(row[: [*row, end].index(end)]) for row in rows.tolist()]
    return said


def word_f1(said: Sequence[str], names: Sequence[str]) -> float:
    """Mean over texts of 2·|common words| / (|words said| + |words of the name|), per cent."""
    total = 0.0
    for a, b in zip(said, names, strict=True):
        a, b = Counter(a.lower().split()), Counter(b.lower().split())
        total += 200 * (a & b).total() / max(a.total() + b.total(), 1)
    return total / len(names)


class Namer:
    """Icons, and a language model that says their names: of at most `LONGEST` tokens, the rest is cut."""

    def __init__(self, icons: Icons):
        self.icons, (self.model, self.tokenizer) = icons, language_model()
        self.width = self.model.config.hidden_size
        self.learned = [p for p in self.model.parameters() if p.requires_grad]
        (self.end,) = self.tokenizer(END).input_ids
        self.captions = tokens_of(self.tokenizer, icons.names, self.end)[:, :LONGEST]
        self.prompt = self.model.get_input_embeddings()(torch.tensor([self.tokenizer(PROMPT).input_ids])).detach()

    def loss(self, prefix: Tensor, rows: Tensor) -> Tensor:  # [B, S, D], [B] items
        """Of the names of items, without the columns in which every name is over."""
        captions = self.captions[self.icons.ids[rows]]
        kept = (caption_labels(captions, 0, self.end) != IGNORED).any(0)
        return prefix_loss(self.model, self._prompted(prefix), captions[:, kept], self.end)

    def metrics(self, prefix_of: Callable[[Tensor], Tensor], seed: int) -> dict[str, float]:
        """How well it names icons of names that training left out, and of others; `prefix_of` items, [B, S, D]."""
        found = {}
        for kind, items in (("unseen", self.icons.pairs.test), ("seen", self.icons.pairs.train)):
            rows = _some(items, TESTED, seed)
            found[f"F1 of words, {kind} names, %"] = word_f1(self._said(prefix_of(rows)), self._names(rows))
        return found

    def picture(self, prefix_of: Callable[[Tensor], Tensor], seed: int) -> Callable[[SubFigure], None]:
        """Draws icons of unseen names, their names, and below what the model calls them."""
        rows = _some(self.icons.pairs.test, SHOWN, seed)
        said = self._said(prefix_of(rows))

        def draw(panel: SubFigure) -> None:
            for axes, row, name, text in zip(panel.subplots(3, 6).flat, rows, self._names(rows), said, strict=False):
                axes.imshow(self.icons.glyphs[row].numpy(), cmap="Greys")
                axes.set(xticks=[], yticks=[])
                axes.set_title(name, fontsize=8, color=GREY)
                # what an untrained model says may be in any script, of which the font has few
                text = " ".join(text.encode("ascii", "replace").decode().split())
                axes.set_xlabel(text, fontsize=8, color=INK, parse_math=False)
            panel.suptitle("icons of unseen names; below, what the model calls them", fontsize=9, color=GREY)

        return draw

    def _prompted(self, prefix: Tensor) -> Tensor:
        return torch.cat([prefix, self.prompt.to(prefix.dtype).expand(len(prefix), -1, -1)], 1)

    def _said(self, prefix: Tensor) -> list[str]:
        return say(self.model, self.tokenizer, self._prompted(prefix), LONGEST, self.end)

    def _names(self, rows: Tensor) -> list[str]:
        return [self.icons.names[i] for i in self.icons.ids[rows]]


def _some(items: Tensor, count: int, seed: int) -> Tensor:
    return items[torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))[:count]]
