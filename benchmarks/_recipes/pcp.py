"""PCP: masked language modelling of 8192 tokens, 15 % of them targets, with RoBERTa-large's head and vocabulary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.recipes.pcp import MaskedHead

from .._harness import OURS, Bar, Provider, Workload
from . import _results, against_dense

Shape = tuple[int, int, int]  # tokens, D, V
EVERY = "dense torch, all tokens"


def inputs(shape: Shape) -> tuple[Any, ...]:
    """States, embedding, bias, the weight of the head's own layer, targets, and the head that takes them."""
    tokens, width, vocabulary = shape
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, width, generator=generator)
    weight, layer = (torch.randn(n, width, generator=generator) / width**0.5 for n in (vocabulary, width))
    bias = torch.randn(vocabulary, generator=generator)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) > 0.15] = -100
    head = MaskedHead(width, vocabulary)
    torch.nn.init.zeros_(head.dense.bias)
    return *(x.requires_grad_() for x in (states, weight, bias, layer)), targets, head


def ours(states: Tensor, weight: Tensor, bias: Tensor, layer: Tensor, targets: Tensor, head: MaskedHead) -> Tensor:
    return torch.func.functional_call(head, {"bias": bias, "dense.weight": layer}, (states, weight, targets))


def all_tokens(states: Tensor, weight: Tensor, bias: Tensor, layer: Tensor, targets: Tensor, _: Any) -> Tensor:
    hidden = F.layer_norm(F.gelu(F.linear(states, layer)), states.shape[1:], eps=1e-12)
    return F.cross_entropy(F.linear(hidden, weight, bias), targets)


def masked_tokens(states: Tensor, weight: Tensor, bias: Tensor, layer: Tensor, targets: Tensor, _: Any) -> Tensor:
    kept = targets != -100
    return all_tokens(states[kept], weight, bias, layer, targets[kept], _)


def workloads(quick: bool) -> list[Workload]:
    tokens, width, vocabulary = shape = (512, 32, 2048) if quick else (8192, 1024, 50_265)
    chosen = round(0.15 * tokens)
    made = against_dense(
        f"pcp {tokens} tokens, 15 % masked, × {width}, vocabulary {vocabulary}", shape, (64, 32, 512), inputs,
        ours, masked_tokens, products=[(chosen, vocabulary, width, 3)], compile=not quick,
        needs=16 * chosen * vocabulary, reps=5,
        bars=() if quick else (
            # All products are needed, by any form: what dense torch adds to them is passes over the logits.
            Bar("dense torch", OURS, at_least=1.0),
            Bar("dense torch", OURS, at_least=4.0, what="peak_extra_bytes"),
            Bar(EVERY, OURS, at_least=2.0),
            Bar(EVERY, OURS, at_least=10.0, what="peak_extra_bytes"),
        ),
    )  # fmt: skip
    # As models are written: the head reads every token, and the loss leaves out those without a target.
    every = Provider(
        lambda problem: lambda: _results(all_tokens, problem), reps=1, memory=1, needs=16 * tokens * vocabulary
    )
    return [replace(made, providers={**made.providers, EVERY: every})]
