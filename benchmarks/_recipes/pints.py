"""1.5-Pints: a micro-batch of pre-training, and the log-probabilities of DPO. The paper's: 8 × 2048 tokens, states of
2048 numbers, 32,064 tokens in the vocabulary."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.ops import linear_cross_entropy, linear_logprob
from fastcontrast.recipes.pints import dpo_loss

from .._harness import OURS, Bar, Workload
from . import against_dense

PAIRS = 4  # answers of either kind in a batch of DPO


def inputs(shape: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """States, head, targets of which one in ten is no token that counts."""
    tokens, width, vocabulary = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < 0.1] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def dense(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets)


def _preferences(logprobs: Tensor, targets: Tensor) -> Tensor:
    """DPO of answers one after another, the first half of them the better ones, against a reference of chance."""
    better, worse = logprobs.view(2, PAIRS, -1).sum(2)
    chance = (targets != -100).view(2, PAIRS, -1).sum(2) * -10.0
    return dpo_loss(better, worse, *chance)


def ours_dpo(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return _preferences(linear_logprob(hidden, weight, targets), targets)


def dense_dpo(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ weight.T).log_softmax(1)
    own = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return _preferences(own.where(targets != -100, 0.0), targets)


def workloads(quick: bool) -> list[Workload]:
    tokens, width, vocabulary = (256, 64, 1000) if quick else (16384, 2048, 32064)
    make = partial(against_dense, tiny=(64, 32, 100), inputs=inputs)
    name = "pints {} tokens × {}, vocabulary {}"
    # Ignored tokens cost ours nothing, but the floor is that of all. Three products are what any form takes.
    whole = make(
        name.format(tokens, width, vocabulary), shape=(tokens, width, vocabulary), ours=linear_cross_entropy,
        dense=dense, needs=4 * 4 * tokens * vocabulary, products=[(tokens, vocabulary, width, 3)], compile=False,
        reps=2, bars=() if quick else (  # some 20 s a step
            Bar(OURS, "products", at_most=1.15), Bar("dense torch", OURS, at_least=10, what="peak_extra_bytes"),
        ),
    )  # fmt: skip
    # Log-probabilities take any upstream gradient, for a fourth product.
    tokens //= 4
    preferences = make(
        f"{name.format(tokens, width, vocabulary)}, DPO", shape=(tokens, width, vocabulary), ours=ours_dpo,
        dense=dense_dpo, needs=4 * 4 * tokens * vocabulary, products=[(tokens, vocabulary, width, 4)], compile=False,
        reps=3, bars=() if quick else (Bar("dense torch", OURS, at_least=4, what="peak_extra_bytes"),),
    )  # fmt: skip
    return [whole, preferences]
