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
HIDDEN, RANDOM = 0.8, 0.1  # of the chosen tokens; the others stay as they are


def mask_tokens(
    ids: Tensor,  # [..., T] integer
    maskable: Tensor,  # [..., T] bool: no padding, no special tokens
    *,
    mask_id: int,
    vocabulary: int,
    probability: float = 0.15,
    always: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """(inputs, targets): each maskable token is chosen with a probability; of those 80 % become `mask_id`, 10 % any
    token below `vocabulary`, 10 % stay. A target is the token where it was chosen, elsewhere −100.

    Args:
        always: a column that is chosen in each row where it is maskable.

    Raises ValueError for a probability outside [0, 1] and a `maskable` that does not fit.
    Source: Devlin et al. 2019 (BERT).
    """
    if not 0 <= probability <= 1:
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
    inputs = torch.where(fate < HIDDEN, mask_id, torch.where(fate < HIDDEN + RANDOM, other, ids))
    return torch.where(chosen, inputs, ids), torch.where(chosen, ids, IGNORED)


class MaskedHead(nn.Module):
    """BERT's head: h = LayerNorm(GELU(dense(state))), logits = h Wᵀ + b, W the embedding of all tokens (tied).

    Only rows with a target go through it, some 15 of 100; their logits [N', V] are never stored.

    Args:
        width, vocabulary: D and V. A W padded to more rows is cut to V: they get no probability.
    """

    def __init__(self, width: int, vocabulary: int, eps: float = 1e-12):
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=eps)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def hidden(self, states: Tensor) -> Tensor:  # [..., D]
        """h, what W multiplies."""
        return self.norm(F.gelu(self.dense(states)))

    def forward(self, states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # [..., D], [V, D], [...]
        """−log p of the targets, the mean over those that are not −100, inside `exchange` over those of all ranks; 0
        where there is none. Finding them makes a GPU wait."""
        kept = (targets.flatten() != IGNORED).nonzero()[:, 0]
        hidden = self.hidden(states.flatten(0, -2)[kept])
        count = len(self.bias)
        weight = weight if len(weight) == count else weight[:count]
        total = linear_cross_entropy(hidden, weight, targets.flatten()[kept], bias=self.bias, reduction="sum")
        return share(total, len(kept))
