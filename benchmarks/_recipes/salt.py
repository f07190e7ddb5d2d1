"""SALT: the loss of stage 1, a student 768 wide under a teacher 512 wide, with a vocabulary of 32,000."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.recipes.salt import OMEGA, Heads, salt_loss

from .._harness import OURS, Bar, Workload
from . import against_dense, in_parts


def inputs(shape: tuple[int, int, int, int]) -> tuple[Tensor, ...]:
    """States, vocabulary, gold tokens; states and vocabulary of a teacher that half agrees."""
    tokens, entries, width, narrow = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(entries, width, generator=generator)
    hidden = torch.randn(tokens, width, generator=generator) * 3 / width**0.5
    taught, other = hidden[:, :narrow], torch.randn(entries, narrow, generator=generator)
    gold = torch.randint(entries, (tokens,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), gold, taught.detach(), weight.detach()[:, :narrow] + other


def ours(hidden: Tensor, weight: Tensor, gold: Tensor, taught: Tensor, of_teacher: Tensor) -> Tensor:
    return salt_loss(hidden, weight, gold, Heads(taught, of_teacher))


def dense(hidden: Tensor, weight: Tensor, gold: Tensor, taught: Tensor, of_teacher: Tensor) -> Tensor:
    logits = hidden @ weight.T
    with torch.no_grad():
        q = (taught @ of_teacher.T).softmax(1)
    return (1 - OMEGA) * F.cross_entropy(logits, gold) + OMEGA * F.cross_entropy(logits, q)


def workloads(quick: bool) -> list[Workload]:
    tokens, entries, width, narrow = shape = (512, 2048, 64, 48) if quick else (8192, 32_000, 768, 512)
    return [
        against_dense(
            f"salt {tokens} tokens × {width}, vocabulary {entries}, teacher × {narrow}", shape, (64, 256, 32, 24),
            inputs, ours, dense, truth=in_parts(dense, (0, 2, 3)), needs=24 * tokens * entries, compile=not quick,
            products=[(tokens, entries, width, 3), (tokens, entries, narrow, 1)], reps=3,
            bars=() if quick else (
                Bar("dense torch", OURS, at_least=10, what="peak_extra_bytes"),
                Bar("dense torch", OURS, at_least=1.5),
                Bar(OURS, "products", at_most=1.5),
            ),
        )
    ]  # fmt: skip
