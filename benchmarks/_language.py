"""Language-model heads for the benchmarks, their float64 truth, and how a loss of theirs is run.

Shapes read as in `Shape`: m tokens, n entries of the vocabulary, d wide. Tokens are shuffled copies of a smaller set,
whose float64 truth is that of all: a mean over copies is the mean, and each copy has its share of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.testing.shapes import Shape

from ._harness import Provider, Step, Workload
from ._products import floor

MIB = 1 << 20
BASE = 2048  # tokens whose float64 truth is computed
ROWS = 512  # of them at a time: 200 MB of float64 logits

TINY = Shape("tiny", 64, 160, 32)
QUICK = Shape("quick", 512, 3000, 64)
SMOLLM2 = Shape("smollm2_135m", 4096, 49152, 576)
PINTS = Shape("1.5_pints", 16384, 32064, 2048)


class Tokens(NamedTuple):
    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [T]
    teacher_hidden: Tensor  # [T, D]
    teacher_weight: Tensor  # [V, D]
    small: tuple[Tensor, Tensor, Tensor]  # hidden, targets, teacher_hidden
    index: Tensor  # [T] into the small set
    copies: int

    @property
    def queries(self) -> Tensor:  # as the floors call them
        return self.hidden

    @property
    def keys(self) -> Tensor:
        return self.weight


def make_tokens(shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tokens:
    """Logits of about ± 3, targets that are likelier than others, and a teacher that half agrees."""
    random = torch.Generator().manual_seed(0)
    base = next(size for size in range(min(shape.m, BASE), 0, -1) if shape.m % size == 0)
    weight, other = (torch.randn(shape.n, shape.d, generator=random) for _ in range(2))
    hidden, noise = (torch.randn(base, shape.d, generator=random) * 3 / shape.d**0.5 for _ in range(2))
    targets = torch.randint(shape.n, (base,), generator=random)
    hidden += 3 / shape.d * weight[targets]
    index = (torch.randperm(shape.m, generator=random) % base).to(device)
    floats = (x.to(device, dtype) for x in (weight, 0.7 * (weight + other), hidden, 0.7 * (hidden + noise)))
    weight, teacher_weight, hidden, taught = floats
    small = hidden, targets.to(device), taught
    h, y, taught = (x[index] for x in small)
    return Tokens(h.requires_grad_(), weight.requires_grad_(), y, taught, teacher_weight, small, index, shape.m // base)


def truth(loss: Callable[..., Tensor], tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and gradients of `loss(logits, targets, teacher's logits)`, a sum over tokens, in float64."""
    weight = tokens.weight.detach().double().requires_grad_()
    taught, total, gradients, dw = tokens.teacher_weight.double(), 0.0, [], torch.zeros_like(weight)
    count = len(tokens.small[0])
    for h, y, teacher in zip(*(x.split(ROWS) for x in tokens.small), strict=True):
        h = h.double().requires_grad_()
        part = loss(h @ weight.T, y, teacher.double() @ taught.T) / count
        total += part.detach()
        dh, slope = torch.autograd.grad(part, [h, weight])
        dw += slope
        gradients.append(dh)
    return total, torch.cat(gradients)[tokens.index] / tokens.copies, dw


def cross_entropy(logits: Tensor, targets: Tensor, teacher: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="sum")


def forward_kl(logits: Tensor, targets: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(logits.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="sum")


def provider(loss: Callable[[], Callable[[Tokens], Tensor]], **options) -> Provider:
    """`loss()(tokens)` forward and backward, with gradients to hidden states and vocabulary."""

    def make(tokens: Tokens) -> Step:
        function, inputs = loss(), [tokens.hidden, tokens.weight]

        def step() -> tuple[Tensor, ...]:
            value = function(tokens)
            return (value.detach(), *torch.autograd.grad(value, inputs))

        return step

    return Provider(make, memory=True, **options)


def workload(
    name: str, shape: Shape, loss: Callable[..., Tensor], products: int, providers: dict[str, Provider], **options
) -> Workload:
    label = f"{name} {shape.m} × {shape.n} × {shape.d}"
    exact = partial(truth, loss)
    return Workload(label, shape, TINY, make_tokens, exact, providers, floor(products), **options)
