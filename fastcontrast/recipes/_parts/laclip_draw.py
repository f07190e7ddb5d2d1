"""LaCLIP's draw: which version of its text each sample of a step shows."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastcontrast.distributed._sums import count_over_ranks, numbers


class Draw(nn.Module):
    """Which version each sample of a step shows: r [B], uniform over all V, each on its own.

    Depends on `seed` and on the number of the call alone, which are in `state_dict`. Inside `exchange` it is drawn for
    the whole batch, of which every rank takes its rows.
    """

    def __init__(self, seed: int = 0):
        super().__init__()
        self.register_buffer("seed_and_step", torch.tensor([seed, 0]))

    @torch.no_grad()
    def forward(self, usable: Tensor) -> Tensor:  # [B, V] bool -> [B]
        """Where the drawn version is not usable (see `enough_words`), 0, the original."""
        count, versions = usable.shape
        seed, step = self.seed_and_step.tolist()
        self.seed_and_step[1] += 1
        whole = count_over_ranks(count, usable.device)
        draws = torch.tensor(random.Random(f"{seed}, {step}").choices(range(versions), k=whole), device=usable.device)
        drawn = draws[numbers(count, usable.device)]
        return torch.where(usable.gather(1, drawn[:, None])[:, 0], drawn, 0)


def enough_words(versions: Sequence[Sequence[str]]) -> Tensor:
    """[K, V] of V lists of K texts, the originals first: False where a rewrite has fewer than two words.

    Raises ValueError where a list is not aligned with the originals.
    """
    lengths = [len(texts) for texts in versions]
    if len({*lengths}) != 1:
        raise ValueError(f"enough_words: versions must be lists of as many texts, got {lengths}")
    mask = torch.tensor([[len(text.split()) > 1 for text in texts] for texts in versions]).T
    mask[:, 0] = True
    return mask
