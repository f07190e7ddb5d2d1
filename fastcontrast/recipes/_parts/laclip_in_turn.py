"""A sum of losses that share their inputs, of which one at a time keeps what its backward needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastcontrast.distributed._exchange import active
from fastcontrast.ops._formed import formed
from fastcontrast.ops._precision import float32, for_products


def sum_in_turn(terms: Sequence[Callable[..., Tensor]], *inputs: Tensor) -> Tensor:
    """Σ term(*inputs), each differentiated as soon as it is known: the logits of no more than one are ever kept."""
    if active() is not None:  # where none keeps logits; and where a second backward would have to find the same ranks
        return torch.stack([term(*inputs) for term in terms]).sum()

    def run(inputs: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        leaves = [for_products(x).detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
        wanted = [i for i, need in enumerate(needs) if need]
        total, gradients = 0.0, [None] * len(inputs)
        for term in terms:
            with torch.set_grad_enabled(any(needs)):
                loss = term(*leaves)
            total = total + loss.detach()
            found = torch.autograd.grad(loss, [leaves[i] for i in wanted], allow_unused=True) if wanted else ()
            for i, g in zip(wanted, found, strict=True):
                if g is not None:
                    gradients[i] = float32(g) if gradients[i] is None else gradients[i] + float32(g)
        return total, tuple(gradients)

    return formed(run, *inputs, op="laclip_mt_loss")
