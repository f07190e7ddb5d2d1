"""The texts of ALIP's run: raw ones, of which many belong to other icons, and synthetic captions."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from fastcontrast.minilm import minilm_features

from .._shared.icons import Icons


def shuffled_texts(icons: Icons, share: float, seed: int) -> tuple[Tensor, int]:
    """MiniLM's features of the names [K, 384], of which a share of the seen ones changed places; and how many."""
    generator = torch.Generator().manual_seed(seed)
    seen = (~icons.pairs.unseen).nonzero()[:, 0]
    chosen = seen[torch.randperm(len(seen), generator=generator)[: round(share * len(seen))]]
    raw = icons.texts.clone()
    raw[chosen] = icons.texts[chosen.roll(1)]
    return raw, len(chosen)


def synthetic_captions(icons: Icons, seed: int) -> Tensor:
    """MiniLM's features [K, 384] of what a captioner would say: a random half of a name's words, in order."""
    draw = random.Random(seed)

    def half(name: str) -> str:
        words = name.split()
        kept = sorted(draw.sample(range(len(words)), (len(words) + 1) // 2))
        return " ".join(words[i] for i in kept)

    return minilm_features([half(name) for name in icons.names])
