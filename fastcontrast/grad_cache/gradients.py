"""Where gradients stop, start again, and come to rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .chunks import leaves


def leaf_of(t: Tensor, trains: bool = True) -> Tensor:
    return t.detach().requires_grad_(trains and (t.is_floating_point() or t.is_complex()))


def backward(out: Any, gradients: Any) -> None:
    pairs = [(t, g) for t, g in zip(leaves(out), leaves(gradients), strict=True) if g is not None and t.requires_grad]
    if pairs:
        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))


@contextmanager
def all_or_nothing(loss: Tensor) -> Iterator[None]:
    """What a backward of `loss` that fails has accumulated until then is taken back."""
    before = [(leaf, leaf.grad) for leaf in _accumulated(loss)]
    for leaf, _ in before:
        leaf.grad = None
    try:
        yield
    except BaseException:
        for leaf, gradient in before:
            leaf.grad = gradient
        raise
    for leaf, gradient in before:
        if gradient is not None:
            leaf.grad = gradient if leaf.grad is None else gradient.add_(leaf.grad)


def _accumulated(loss: Tensor) -> list[Tensor]:
    """The leaves into which a backward of `loss` accumulates."""
    seen, found, todo = set(), [], [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
        if type(node).__name__ == "AccumulateGrad":
            found.append(node.variable)
    return found
