"""Code that models learn from, what they write themselves, and how good its lines are."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import TYPE_CHECKING

import torch

from fastcontrast.figures import GREY, INK, ORANGE
from fastcontrast.ops import linear_logprob

from .._shared.language import states, vocabulary
from .phf_text import Control, average, code, pack_segments, sample, score_line

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure
    from transformers import LlamaForCausalLM

EVERY = 10  # a document of so many is held out
FIRST = 6  # lines of a prompt, at most
LINES, WIDE = 22, 64  # of the picture


class Corpus:
    """`documents` functions and classes of the standard library, and a tokenizer of `entries` that learned from those
    that models learn from; blocks of `length` tokens of the others, `tested` at most."""

    def __init__(self, entries: int, length: int, tested: int, documents: int):
        found = code(documents)
        self.learned = [document for i, document in enumerate(found) if i % EVERY]
        self.others, self.length, self.tested = found[::EVERY], length, tested
        self.tokenizer = vocabulary(["".join(x.text for x in document) for document in self.learned], entries)
        self.median = statistics.median(map(average, self.learned))

    def write(self, model: LlamaForCausalLM, control: Control | None, count: int, longest: int, seed: int) -> list[str]:
        """The line that a model writes after the first lines of a document it has not read, `count` times; cut after
        `longest` tokens. With control tokens before each line, that for aligned text before its own."""
        draw, prompts = random.Random(seed), []
        control = control and replace(control, drop=0.0)
        for document in islice(cycle([x for x in self.others if len(x) > 1]), count):
            begun = document[: draw.randint(1, min(FIRST, len(document) - 1))]
            ids = pack_segments(self.tokenizer, [begun], 1, control)[0].flatten().tolist()
            prompts.append([*ids, *([control.aligned] if control else [])][longest - self.length :])
        banned = [control.aligned, control.misaligned] if control else []
        rows = sample(model, prompts, longest, banned=banned, seed=seed)
        return [self.tokenizer.decode(row, skip_special_tokens=False).partition("\n")[0] for row in rows]

    @torch.no_grad()
    def perplexity(self, model: LlamaForCausalLM, control: Control | None) -> float:
        """Of the tokens of good lines, without those of control, which stand before every line here."""
        control = control and replace(control, drop=0.0)
        ids, scores = (x[: self.tested] for x in pack_segments(self.tokenizer, self.others, self.length, control))
        model.eval()
        total, count = 0.0, 0
        for x, s in zip(ids.split(16), scores.split(16), strict=True):
            logprobs = linear_logprob(states(model, x[:, :-1]), model.lm_head.weight, x[:, 1:])
            good = s[:, 1:] == 0
            if control is not None:
                good &= (x[:, 1:] != control.aligned) & (x[:, 1:] != control.misaligned)
            total, count = total - logprobs[good].sum().item(), count + int(good.sum())
        model.train()
        return math.exp(total / max(count, 1))


def share_of_bad(lines: Sequence[str]) -> float:
    """Per cent of lines that `score_line` finds bad; 0 of none."""
    return 100 * sum(map(score_line, lines)) / max(len(lines), 1)


def draw(written: Mapping[str, Sequence[str]], panel: SubFigure) -> None:
    """Lines that models wrote, the bad ones in colour."""
    for ax, (label, lines) in zip(panel.subplots(1, len(written)), written.items(), strict=True):
        ax.set_axis_off()
        ax.set_title(f"{label} writes; bad lines in colour", loc="left", fontsize=9, color=GREY)
        for i, line in enumerate(islice(filter(str.strip, lines), LINES)):
            colour = ORANGE if score_line(line) else INK
            shown = "".join(x if " " <= x <= "~" else "?" for x in line[:WIDE])  # the font has few letters
            how = {"fontsize": 6, "family": "monospace", "color": colour, "parse_math": False}
            ax.text(0, 1 - (i + 1) / (LINES + 1), shown, transform=ax.transAxes, **how)
