"""AdaCAD: a language model with a document at hand reads its question twice, with the document and without, and goes
beyond the first towards what the second would not have said: the further, the more the two disagree.

    z = (1 + a) z₁ − a z₀,    a = max(JSD(softmax z₁, softmax z₀), floor),    0 ≤ JSD ≤ log 2

z₁ are the logits with the document, z₀ those without; a is new for every token and row. With a fixed a it is
context-aware decoding (CAD), which overdoes it where document and memory agree.

FAQ. Which logarithm? The natural one. Does a filter of tokens come first? No: a is that of the whole distributions.
What does a step cost? A second row in the model's batch, and one pass over the two rows of logits: `two_logit_mix`.

Source: Wang et al. 2024, "AdaCAD: Adaptively Decoding to Balance Conflicts between Contextual and Parametric
Knowledge", arXiv 2409.07394.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastcontrast import generate
from fastcontrast.decoding import adacad, cad
from fastcontrast.figures import BLUE, GREY, ORANGE, plain

from ._parts.adacad_questions import KINDS, Question, questions
from ._shared.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

__all__ = ["adacad", "answers", "cad", "questions", "run"]

TOKENS, COUNT, BATCH = 5, 48, 48  # of an answer; questions of each kind; rows at a time
METHODS = {
    "no document": {"method": "greedy"},
    "greedy": {"method": "greedy"},
    "CAD, a = 1": {"method": "cad", "weight": 1.0},
    "AdaCAD": {"method": "adacad"},
}


def answers(
    model: Any, tokenizer: Any, asked: list[Question], tokens: int, document: bool = True, **how: Any
) -> tuple[list[str], Tensor]:
    """What the model says to each question in at most `tokens` tokens, and the weights a of the first of them, [N]: NaN
    for a method that has none. `how` goes to `generate`; the second reading is of the question alone."""
    said, weights = [], []
    contrasted = how["method"] in ("adacad", "cad")
    for i in range(0, len(asked), BATCH):
        some = asked[i : i + BATCH]
        alone = tokenizer([question.text for question in some], return_tensors="pt", padding=True)
        whole = tokenizer([question.with_document for question in some], return_tensors="pt", padding=True)
        given = whole if document else alone
        options = {**how, "attention_mask": given.attention_mask, "max_new_tokens": tokens}
        if contrasted:
            options |= {"unconditional_ids": alone.input_ids, "unconditional_mask": alone.attention_mask}
            options |= {"return_divergence": True, "return_dict_in_generate": True}
        found = generate(model, given.input_ids, pad_token_id=tokenizer.pad_token_id, **options)
        ids = found.sequences if contrasted else found
        said += tokenizer.batch_decode(ids[:, given.input_ids.shape[1] :], skip_special_tokens=True)
        weights.append(found["weights"][0] if contrasted else torch.full((len(some),), torch.nan))
    return said, torch.cat(weights)


def right(said: list[str], asked: list[Question]) -> Tensor:
    """Which answers begin with the right word, bool [N]."""
    pairs = zip(said, asked, strict=True)
    return torch.tensor([text.strip().lower().startswith(question.answer.lower()) for text, question in pairs])


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """SmolLM2 answers what the capital of a country is, in `steps` tokens, beside a document that contradicts what it
    remembers, agrees with it, or is about other countries. Nothing is trained. Where documents contradict, AdaCAD is as
    right as CAD, and elsewhere far more often; greedy decoding is ahead where they agree.
    """
    from fastcontrast import smollm2

    steps = TOKENS if steps is None else steps
    report = Report("adacad", output, steps=steps, seed=seed, limit=limit)
    asked = questions(COUNT if limit is None else max(1, min(COUNT, limit // 100)), seed)
    model, tokenizer = smollm2.load(progress=True)
    kinds = {kind: torch.tensor([question.kind == kind for question in asked]) for kind in KINDS}
    for label, how in METHODS.items():
        with report.model(label) as found:
            said, weights = answers(model, tokenizer, asked, steps, label != "no document", **how)
            hits = right(said, asked).float()
            found.metrics = {"right, %": 100 * hits.mean().item()} | {
                f"{kind}, %": 100 * hits[rows].mean().item() for kind, rows in kinds.items()
            }

    def draw(panel: SubFigure) -> None:
        axes = panel.subplots()
        for (kind, rows), colour in zip(kinds.items(), (ORANGE, BLUE, GREY), strict=True):
            values = weights[rows].sort().values
            axes.plot(values, torch.linspace(0, 100, len(values)), color=colour, label=f"the document {kind}")
        axes.set_xlabel("a, of the first token of the answer")
        axes.set_ylabel("% of questions below")
        axes.legend(frameon=False, fontsize=8)
        plain(axes, "how far AdaCAD goes beyond the document")

    return report.close(None, draw)
