"""PHF: unlikelihood on log-probabilities of GPT-2's vocabulary, states 768 wide, as GPT-2 small has them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast.ops import linear_logprob
from fastcontrast.recipes.phf import unlikelihood_loss

from .._harness import OURS, Bar, Workload
from . import against_dense, in_parts

THRESHOLD = 0.1


def inputs(shape: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """States, vocabulary, tokens and their scores."""
    tokens, entries, width = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator) * 3 / width**0.5
    weight = torch.randn(entries, width, generator=generator)
    gold = torch.randint(entries, (tokens,), generator=generator)
    hidden += 6 / width * weight[gold]  # likelier than others
    return hidden.requires_grad_(), weight.requires_grad_(), gold, torch.rand(tokens, generator=generator) / 5


def ours(hidden: Tensor, weight: Tensor, gold: Tensor, scores: Tensor) -> Tensor:
    return unlikelihood_loss(linear_logprob(hidden, weight, gold), scores, THRESHOLD)


def dense(hidden: Tensor, weight: Tensor, gold: Tensor, scores: Tensor) -> Tensor:
    logprobs = (hidden @ weight.T).log_softmax(1).gather(1, gold[:, None])[:, 0]
    unlikely = (1 - logprobs.exp()).clamp(min=1e-20).log()
    return -torch.where(scores <= THRESHOLD, logprobs, unlikely).mean()


def workloads(quick: bool) -> list[Workload]:
    tokens, entries, width = shape = (512, 2048, 64) if quick else (4096, 50_257, 768)
    return [
        against_dense(
            f"phf unlikelihood {tokens} tokens × {width}, vocabulary {entries}", shape, (64, 256, 32), inputs, ours,
            dense, truth=in_parts(dense, (0, 2, 3)), needs=16 * tokens * entries, compile=not quick, reps=3,
            products=[(tokens, entries, width, 4)],
            bars=() if quick else (
                Bar("dense torch", OURS, at_least=10, what="peak_extra_bytes"),
                # A fourth product, where dense torch keeps the logits and takes three.
                Bar("dense torch", OURS, at_least=0.9),
                Bar(OURS, "products", at_most=1.15),
            ),
        )
    ]  # fmt: skip
