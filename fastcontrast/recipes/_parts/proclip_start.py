"""What a run of ProCLIP begins with: a CLIP of icons that reads bags of words."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast import clip_loss
from fastcontrast.towers import HashedWords, TwoTowers

from .._shared.icons import Icons
from .._shared.report import Scale, train

DIM, BATCH, RATE = 256, 1024, 3e-3


def bag_of_words_clip(icons: Icons, words: Tensor, steps: int, seed: int) -> tuple[TwoTowers, list[float]]:
    """The start: a CLIP trained on all seen names, whose text encoder is a bag of words; and its losses."""
    torch.manual_seed(seed)
    model, scale = TwoTowers("icons"), Scale()
    model.name_tower = HashedWords(dim=DIM)
    batches, choice = icons.batches(BATCH, seed), torch.Generator().manual_seed(seed)

    def step(_: int) -> Tensor:
        rows = next(batches)
        ids = icons.ids[rows]
        return clip_loss(model.item_tower(icons.glyphs[rows]), model.name_tower(either(words, ids, choice)), scale())

    learned = [*model.parameters(), *scale.parameters()]
    return model, train("CLIP, bag of words", steps, learned, step, rate=RATE, clip=1.0, after=scale.clamp)


def either(texts: Tensor, ids: Tensor, choice: torch.Generator) -> Tensor:
    """Of [2, K, ...] texts [B, ...] of the names `ids`: of each the short one or the raw one, with equal chance."""
    return texts[torch.randint(2, ids.shape, generator=choice), ids]
