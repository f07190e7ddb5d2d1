"""CLIMB: the head over the rows that carry a label, where the dense form computes all and throws most away. The
paper's: 128 sequences of 128 tokens, states of 256 numbers, 8192 tokens in the vocabulary, 15 % of them masked."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from fastcontrast.recipes._shared.masked import MaskedHead

from .._harness import OURS, Bar, Workload
from . import against_dense

MASKED = 0.15


def inputs(shape: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """States of all tokens, the head's two matrices, labels of the masked tokens."""
    tokens, width, vocabulary = shape
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, width, generator=generator)
    dense, weight = (torch.randn(n, width, generator=generator) / width**0.5 for n in (width, vocabulary))
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) > MASKED] = -100
    return states.requires_grad_(), dense.requires_grad_(), weight.requires_grad_(), labels


def head(dense: Tensor, weight: Tensor) -> tuple[MaskedHead, dict[str, Tensor]]:
    """The head, and its parameters with these two among them."""
    width = dense.shape[0]
    module = MaskedHead(width, len(weight), tied=False).to(weight.dtype)
    return module, {**dict(module.named_parameters()), "dense.weight": dense, "weight": weight}


def ours(states: Tensor, dense: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    torch.manual_seed(0)  # the bias of the first layer
    return functional_call(*head(dense, weight), (states, None, labels))


def dense(states: Tensor, dense: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    torch.manual_seed(0)
    module, parameters = head(dense, weight)
    hidden = F.gelu(F.linear(states, dense, parameters["dense.bias"]))
    hidden = F.layer_norm(hidden, (len(dense),), module.norm.weight, module.norm.bias, module.norm.eps)
    return F.cross_entropy(F.linear(hidden, weight, parameters["bias"]), labels)


def workloads(quick: bool) -> list[Workload]:
    tokens, width, vocabulary = (256, 32, 500) if quick else (16384, 256, 8192)
    rows = int(MASKED * tokens)
    return [
        against_dense(
            f"climb {tokens} tokens × {width}, vocabulary {vocabulary}", (tokens, width, vocabulary), (64, 16, 50),
            inputs, ours, dense, products=[(rows, vocabulary, width, 3)], compile=False,
            bars=() if quick else (
                Bar("dense torch", OURS, at_least=4),
                Bar("dense torch", OURS, at_least=10, what="peak_extra_bytes"),
            ),
        )
    ]  # fmt: skip
