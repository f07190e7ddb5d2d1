"""1.5-Pints: a language model of 1.6 billion parameters, pre-trained within days because its texts are few and good,
then taught to answer, then which of two answers is the better one. Ordinary parts, at a definite size.

    reading      L = mean over micro-batches of  Σ_t CE_t [y_t ≠ pad] / |{t : y_t ≠ pad}|
    answers      the same, where only the tokens of answers count
    preferences  L = −mean log σ(β (lp_w − lp_w^ref − lp_l + lp_l^ref)),   lp = Σ_t log p(y_t | x, y_<t)

w is the better answer, l the other, the reference a frozen copy. Logits [T, V] of T = 16,384 tokens over a vocabulary
V = 32,064 are a gigabyte in bfloat16: none is stored, neither for the losses nor for lp.

FAQ. Does a micro-batch of few real tokens weigh as much as a full one? Yes, as in the released code; one of pads alone
adds nothing. Is lp divided by the length? No. Do texts that are packed together see each other? Yes: attention is
plainly causal.

Source: Tan and Wang 2024, "1.5-Pints Technical Report: Pretraining in Days, Not Months", arXiv 2408.03506.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcontrast.distributed._sums import share
from fastcontrast.ops import linear_cross_entropy, linear_logprob

from ._parts import pints_data
from ._parts.pints_data import encode, right_and_wrong
from ._shared.encoder import batches
from ._shared.language import llama, next_token_loss, pack, states, vocabulary
from ._shared.report import Report, train
from ._shared.texts import news_texts

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

__all__ = ["PINTS", "SIBLING", "accumulated", "answer_logprobs", "answer_loss", "dpo_loss", "encode", "rate_at", "run"]

PINTS = {"vocabulary": 32064, "width": 2048, "layers": 24, "heads": 32, "kv_heads": 4, "hidden": 8192, "tied": False}
SIBLING = {"vocabulary": 32064, "width": 768, "layers": 12, "heads": 12, "kv_heads": 1, "hidden": 2048, "tied": False}
SIZE = {"width": 192, "layers": 3, "heads": 6, "kv_heads": 1, "hidden": 512, "tied": False}  # what learns here

STEPS, BATCH, MICRO, LENGTH, VOCABULARY = 90, 16, 2, 128, 4096
RATES = {"reading": 4e-3, "answers": 1e-3, "preferences": 2e-4}
OPTIONS = {"decay": 0.1, "betas": (0.9, 0.95), "clip": 1.0}
TESTED, NEWS = 500, 100  # questions; texts


def rate_at(step: int, total: int, warmup: int, highest: float = 4e-4, lowest: float = 4e-5) -> float:
    """Linear from 0 to `highest` over `warmup` micro-batches, then half a cosine down to `lowest` at `total`."""
    if step < warmup:
        return highest * step / warmup
    return lowest + (highest - lowest) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def accumulated(micro_batches: Sequence[Any], loss_of: Callable[[Any], Tensor]) -> Iterator[Tensor]:
    """The losses of micro-batches, each divided by how many there are: `train` has the backward of one before it asks
    for the next, so that one graph exists at a time."""
    for one in micro_batches:
        yield loss_of(one) / len(micro_batches)


def answer_loss(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:  # [B, T], [B, T − 1]
    """Mean cross-entropy of the tokens of answers; labels are −100 elsewhere."""
    return linear_cross_entropy(states(model, ids[:, :-1]), model.lm_head.weight, labels)


def answer_logprobs(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:  # [B, T], [B, T − 1] -> [B]
    """lp of each answer: the sum over its tokens."""
    return linear_logprob(states(model, ids[:, :-1]), model.lm_head.weight, labels).sum(1)


def dpo_loss(
    better: Tensor,  # [B]
    worse: Tensor,  # [B]
    reference_better: Tensor,  # [B]
    reference_worse: Tensor,  # [B]
    beta: float = 0.1,
) -> Tensor:
    """−mean log σ(β (better − reference_better − worse + reference_worse)), of lp; the reference gets no gradient.

    Raises ValueError naming what does not fit. Source: Rafailov et al. 2023.
    """
    for name, x in {"worse": worse, "reference_better": reference_better, "reference_worse": reference_worse}.items():
        if x.shape != better.shape:
            raise ValueError(f"dpo_loss: {name} must be {list(better.shape)} to match better, got {list(x.shape)}")
    margins = (better - reference_better.detach()) - (worse - reference_worse.detach())
    return share(-F.logsigmoid(beta * margins).sum(), better.numel())


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Two models of one start read equally many tokens: the standard library's source, or the prose in its docstrings.
    Both then learn to say what functions are for, and to prefer that answer to its words in another order.
    """
    steps = STEPS if steps is None else steps
    report = Report("pints", output, steps=steps, seed=seed, limit=limit, batch=BATCH, length=LENGTH)
    source, prose, news = pints_data.source(limit), pints_data.prose(limit), news_texts()[:NEWS]
    questions = pints_data.questions(seed, limit)
    held_out = min(TESTED, len(questions) // 2)
    tested, taught = questions[:held_out], questions[held_out:]
    tokenizer = vocabulary([*source, *prose], VOCABULARY)
    for label, texts in (("source", source), ("1.5-Pints, prose", prose)):
        torch.manual_seed(seed)
        model = llama(tokenizer.get_vocab_size(), **SIZE)
        with report.model(label) as found:
            found.losses = _read(label, model, pack(tokenizer, texts, LENGTH), steps, seed)
            bits = pints_data.bits_per_byte(model, tokenizer, news, LENGTH)
            reference = _teach(label, model, tokenizer, taught, max(1, steps // 3), seed)
            found.metrics = {
                "news, bits a byte": bits,
                "right answer preferred, %": _preferred(model, reference, tokenizer, tested),
            }
    return report.close(model)


def _read(label: str, model: LlamaForCausalLM, blocks: Tensor, steps: int, seed: int) -> list[float]:
    rows, warmup = batches(len(blocks), BATCH, seed), max(1, steps // 20)
    return train(
        label, steps, model, lambda _: accumulated(blocks[next(rows)].chunk(MICRO), partial(next_token_loss, model)),
        rate=RATES["reading"], schedule=lambda i: rate_at(i, steps, warmup, 1.0, 0.1), **OPTIONS,
    )  # fmt: skip


def _teach(
    label: str, model: LlamaForCausalLM, tokenizer: Tokenizer, taught: list, steps: int, seed: int
) -> LlamaForCausalLM:
    """Answers first, then preferences. Returns the model between the two, the reference of the second."""
    rows = batches(len(taught), BATCH, seed)

    def drawn() -> tuple[tuple[Tensor, Tensor], ...]:
        return right_and_wrong(tokenizer, [taught[i] for i in next(rows)])

    def answers(_: int) -> Tensor:
        return answer_loss(model, *drawn()[0])

    def preferences(_: int) -> Tensor:
        pair = drawn()
        before = [answer_logprobs(reference, *one) for one in pair]
        return dpo_loss(*(answer_logprobs(model, *one) for one in pair), *before)

    train(f"{label}, answers", steps, model, answers, rate=RATES["answers"], **OPTIONS)
    reference = copy.deepcopy(model).requires_grad_(False)
    train(f"{label}, preferences", steps, model, preferences, rate=RATES["preferences"], **OPTIONS)
    return reference


@torch.no_grad()
def _preferred(model: LlamaForCausalLM, reference: LlamaForCausalLM, tokenizer: Tokenizer, tested: list) -> float:
    """Share of questions whose right answer became likelier, against the reference, than the wrong one did."""
    right = 0
    for i in range(0, len(tested), 64):
        pair = right_and_wrong(tokenizer, tested[i : i + 64])
        better, worse = (answer_logprobs(model, *one) - answer_logprobs(reference, *one) for one in pair)
        right += (better > worse).sum().item()
    return 100 * right / len(tested)
