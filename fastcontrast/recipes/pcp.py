"""PCP: continue pretraining on sentences that are prompts with their answers, then fine-tune on prompts. The answers of
unlabelled texts are pseudo labels of a first fine-tuned model. No loss is new: it is all in how data is written.

A template puts a text and one masked word together, "{text} It was {word}."; class c has the label word v_c:

    A  z_c = ⟨h, W_{v_c}⟩ + b_{v_c},  h the state at the mask,   L_A = mean over texts of −log softmax_c(z)_y
    B  ĉ(x) = argmax_c z_c of every unlabelled text
    C  s = text, template and the label word of ĉ,   L_C = mean over masked tokens of −log softmax_v(h Wᵀ + b)_token
    A  again, from the model of C

The softmax of A is over C words: rows of W are gathered, the other logits do not exist. That of C is over all of the
vocabulary, for the 15 % of tokens that are chosen, of which 80 % are hidden, 10 % replaced, 10 % kept.

FAQ. Is every pseudo label used? Yes, however sure: the released code takes a threshold and does not read it.
Does a regression have words too? Two, of the low and the high end, whose softmax is compared with where a value lies.
What is cut when a text is long? The text; never the template or its word.

Source: Shi and Lipani 2023, "Don't Stop Pretraining? Make Prompt-based Fine-tuning Powerful Learner", arXiv 2305.01711.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcontrast.distributed._sums import share
from fastcontrast.ops import linear_cross_entropy
from fastcontrast.ops._precision import float32

from ._parts import pcp_task
from ._parts.pcp_model import MaskedLM
from ._parts.pcp_prompt import Prompted, Template, label_words
from ._shared.encoder import batches
from ._shared.masked import MaskedHead, mask_tokens
from ._shared.report import Report, train

__all__ = [
    "MaskedHead", "MaskedLM", "Prompted", "Template", "label_value_loss", "label_word_loss", "label_words",
    "mask_tokens", "run",
]  # fmt: skip

STEPS, BATCH, RATE = 150, 32, 5e-4  # of continued pretraining
TUNING_STEPS, TUNING_BATCH, TUNING_RATE = 60, 16, 1e-3
START_STEPS = 100
SHOTS, LONGEST = 16, 32
TEMPLATE = "{text} It is about {word}."


def label_word_loss(
    hidden: Tensor,  # [B, D], states at the word
    weight: Tensor,  # [V, D]
    words: Tensor,  # [C] integer, the label word of each class
    classes: Tensor,  # [B] integer
    bias: Tensor | None = None,  # [V]
) -> Tensor:
    """L_A: mean cross-entropy over the C label words; inside `exchange` over the texts of all ranks."""
    bias = None if bias is None else bias[words]
    return share(linear_cross_entropy(hidden, weight[words], classes, bias=bias, reduction="sum"), len(hidden))


def label_value_loss(
    hidden: Tensor,  # [B, D]
    weight: Tensor,  # [V, D]
    words: Tensor,  # [2] integer, of the low and of the high end
    values: Tensor,  # [B] in [low, high]
    low: float = 0.0,
    high: float = 5.0,
    bias: Tensor | None = None,  # [V]
    *,
    log_target: bool = False,
) -> Tensor:
    """1/(2B) Σ_b Σ_c t_c (log t_c − log p_c),  t = (1 − y', y'),  y' = (y − low) / (high − low),  0 log 0 = 0.

    log_target: 1/(2B) Σ_b Σ_c exp(t_c) (t_c − log p_c), as the released code has it by mistake.
    """
    if len(words) != 2:
        raise ValueError(f"label_value_loss: words must be two, of the low and of the high end, got {len(words)}")
    place = (values - low) / (high - low)
    hidden, rows = float32(hidden), float32(weight[words])
    target = torch.stack([1 - place, place], 1).to(hidden.dtype)
    logits = F.linear(hidden, rows, None if bias is None else bias[words])
    total = F.kl_div(logits.log_softmax(1), target, reduction="sum", log_target=log_target)
    return share(total, 2 * len(hidden))


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Which of ten modules a docstring's sentence comes from, sixteen labelled sentences each. The start: two layers of
    MiniLM, and a head that learned to fill in words on all docstrings. From it prompt-based fine-tuning alone; after
    continued pretraining on the texts as they are; and PCP, `steps` as long, on texts with what the first one says. At
    this size, where four of ten pseudo labels are right, PCP is not ahead of continued pretraining on texts alone.
    """
    steps = STEPS if steps is None else steps
    report = Report("pcp", output, steps=steps, seed=seed, limit=limit, batch=BATCH, shots=SHOTS)
    task = pcp_task.load(limit, SHOTS, seed)
    torch.manual_seed(seed)
    start = MaskedLM([*task.everything, TEMPLATE, *pcp_task.WORDS.values()])
    words = label_words(start.pieces, [*pcp_task.WORDS.values()])
    plain, template = (Template(x, start.pieces, start.special, LONGEST) for x in ("{text}", TEMPLATE))
    prompts, texts = template(task.texts), [task.texts[i] for i in task.unlabelled]

    def pretrain(label: str, model: MaskedLM, sentences: Prompted, steps: int) -> None:
        drawn, generator = batches(len(sentences.ids), BATCH, seed), torch.Generator().manual_seed(seed)

        def step(_: int) -> Tensor:
            return model.masked_loss(sentences.take(next(drawn)), generator)

        train(label, steps, model, step, rate=RATE, decay=0.01)

    def tune(label: str, model: MaskedLM) -> list[float]:
        drawn = batches(len(task.labelled), TUNING_BATCH, seed)

        def step(_: int) -> Tensor:
            rows = task.labelled[next(drawn)]
            hidden = model.at_word(prompts.take(rows))
            return label_word_loss(hidden, model.weight, words, task.classes[rows], model.head.bias)

        return train(label, TUNING_STEPS, model, step, rate=TUNING_RATE, decay=0.01)

    def right(model: MaskedLM, rows: Tensor) -> float:
        return 100 * (model.classes(prompts.take(rows), words) == task.classes[rows]).float().mean().item()

    pretrain("the start", start, plain(task.everything), START_STEPS)
    corpora = {"texts, then prompts": plain(texts)}  # the first model writes PCP's
    for label in ("prompts alone", "texts, then prompts", "PCP"):
        torch.manual_seed(seed)
        model = copy.deepcopy(start)
        with report.model(label) as found:
            if label in corpora:
                pretrain(label, model, corpora[label], steps)
            found.losses = tune(label, model)
            found.metrics = {"accuracy, %": right(model, task.tested)}
            if label == "prompts alone":
                pseudo = model.classes(prompts.take(task.unlabelled), words)
                corpora["PCP"] = template(texts, words[pseudo])
                agreed = pseudo == task.classes[task.unlabelled]
                found.metrics["pseudo labels right, %"] = 100 * agreed.float().mean().item()
    return report.close(model)
