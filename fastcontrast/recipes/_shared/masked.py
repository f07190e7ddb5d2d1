"""Masked language modelling: which tokens are hidden, and a head that looks at no others.

inputs, targets = mask_tokens(ids, maskable, mask_id=103, vocabulary=30522)
loss = head(states_of(inputs), embedding.weight, targets)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcontrast.distributed._sums import share
from fastcontrast.ops import linear_cross_entropy

IGNORED = -100


def mask_tokens(
    ids: Tensor,  # [..., T] integer
    maskable: Tensor,  # [..., T] bool: no padding, no special tokens
    *,
    mask_id: int,
    vocabulary: int,
    probability: float | Tensor = 0.15,  # or [..., T]
    hidden: float = 0.8,
    random: float = 0.1,
    always: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """(inputs, targets): each maskable token is chosen with a probability; of the chosen ones a share `hidden` becomes
    `mask_id`, a share `random` any token below `vocabulary`, the others stay. A target is the token where it was
    chosen, elsewhere −100.

    Args:
        always: a column that is chosen in each row where it is maskable.

    Raises ValueError for a probability outside [0, 1] and a `maskable` that does not fit.
    Source: Devlin et al. 2019 (BERT).
    """
    if not isinstance(probability, Tensor) and not 0 <= probability <= 1:
        raise ValueError(f"mask_tokens: probability must lie in [0, 1], got {probability}")
    if maskable.shape != ids.shape or maskable.dtype != torch.bool:
        got = f"{maskable.dtype} {list(maskable.shape)}"
        raise ValueError(f"mask_tokens: maskable must be bool {list(ids.shape)}, got {got}")
    drawn, fate = (torch.rand(ids.shape, generator=generator, device=ids.device) for _ in range(2))
    other = torch.randint(vocabulary, ids.shape, generator=generator, device=ids.device, dtype=ids.dtype)
    chosen = drawn < probability
    if always is not None:
        chosen[..., always] = True
    chosen &= maskable
    inputs = torch.where(fate < hidden, mask_id, torch.where(fate < hidden + random, other, ids))
    return torch.where(chosen, inputs, ids), torch.where(chosen, ids, IGNORED)


class MaskedHead(nn.Module):
    """BERT's head: h = LayerNorm(GELU(dense(state))), logits = h Wᵀ + b.

    Only rows with a target go through it, some 15 of 100; their logits [N', V] are never stored.

    Args:
        width, vocabulary: D and V. A W padded to more rows is cut to V: they get no probability.
        tied: W is given in every call, the embedding of all tokens for one; else the head has its own.
    """

    def __init__(self, width: int, vocabulary: int, eps: float = 1e-12, *, tied: bool = True):
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=eps)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.weight = None if tied else nn.Parameter(torch.randn(vocabulary, width) * 0.02)

    def hidden(self, states: Tensor) -> Tensor:  # [..., D]
        """h, what W multiplies."""
        return self.norm(F.gelu(self.dense(states)))

    def logits(self, states: Tensor, weight: Tensor | None = None) -> Tensor:  # [..., D], [V, D]
        """All of them, [..., V], for the few rows of a test."""
        return F.linear(self.hidden(states), self._weight(weight), self.bias)

    def forward(self, states: Tensor, weight: Tensor | None, targets: Tensor) -> Tensor:  # [..., D], [V, D], [...]
        """−log p of the targets, the mean over those that are not −100, inside `exchange` over those of all ranks; 0
        where there is none. Finding them makes a GPU wait."""
        kept = (targets.flatten() != IGNORED).nonzero()[:, 0]
        hidden = self.hidden(states.flatten(0, -2)[kept])
        targets = targets.flatten()[kept]
        total = linear_cross_entropy(hidden, self._weight(weight), targets, bias=self.bias, reduction="sum")
        return share(total, len(kept))

    def _weight(self, given: Tensor | None) -> Tensor:  # [V, D]
        weight, count = self.weight if given is None else given, len(self.bias)
        return weight if len(weight) == count else weight[:count]
