"""LiMBeR: one linear map lets a language model that never learned to see read the features of an image encoder that
never learned to speak. Both stay frozen; the map learns by captioning.

    prefix = dropout_0.1(F Wᵀ + b),  F [S, D_img] the encoder's features before pooling, W the same at all S positions
    L      = mean over the tokens y of all captions of −log p(y_t | prefix, y_<t),  up to each one's first end token

FAQ. Which features? As they are, neither normalised nor projected into the space that was contrasted.
Where does the gradient go? Through the language model, whose weights take none, into W and b.
A prompt in the test, such as "A picture of"? Append its embeddings to the prefix; `say` passes on how to sample.

Source: Merullo et al. 2022, "Linearly Mapping from Image to Text Space", arXiv 2209.15162.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from fastcontrast.towers import GlyphTower, encode

from ._shared.icons import load_icons
from ._shared.namer import Namer, spread
from ._shared.prefix import Prefix, prefix_loss
from ._shared.report import Report, train

__all__ = ["Prefix", "positions", "prefix_loss", "run"]

STEPS, BATCH = 100, 64
RATES = {"on text vectors": 3e-3, "blind": 1e-3, "LiMBeR": 1e-3}
TOKENS, START = 4, 3e-3  # of the prefix of text vectors; first standard deviation of W
DROPOUT = 0.1


@torch.no_grad()
def positions(tower: GlyphTower, glyphs: Tensor) -> Tensor:  # [B, 32, 32]
    """Features before pooling: a CNN's last map, row by row, [B, 16, 192]."""
    layers = tower.layers[:-2]  # without Flatten and the projection
    x = ((glyphs.float() / 255 - tower.MEAN) / tower.STD).unsqueeze(1)
    return layers(x.contiguous(memory_format=torch.channels_last)).flatten(2).mT


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Says the names of icons. The language model, two layers of SmolLM2, first learns to read names from text vectors,
    and is frozen: it never sees an icon. Then a map learns, from a CNN that CLIP trained on icons; and, blind, one from
    the same CNN's features of other icons.
    """
    steps = STEPS if steps is None else steps
    report = Report("limber", output, steps=steps, seed=seed, limit=limit, batch=BATCH)
    icons = load_icons(limit)
    clip, namer = icons.clip(seed), Namer(icons)
    text, tower = spread(encode(clip.name_tower, icons.texts)), clip.item_tower
    for label, rate in RATES.items():
        torch.manual_seed(seed)
        if label == "on text vectors":
            prefix, learned = Prefix(text.shape[1], namer.width, TOKENS), namer.learned
        else:
            namer.model.requires_grad_(False)
            prefix, learned = Prefix(positions(tower, icons.glyphs[:1]).shape[2], namer.width, dropout=DROPOUT), []
            # Features are large: usual weights would make tokens of a length that the model has never read.
            nn.init.normal_(prefix.linear.weight, std=START)
        batches = icons.batches(BATCH, seed)

        def prefix_of(rows: Tensor, label=label, prefix=prefix) -> Tensor:
            if label == "on text vectors":
                return prefix(text[icons.ids[rows]])
            return prefix(positions(tower, icons.glyphs[rows.roll(1) if label == "blind" else rows]))

        def step(_: int, prefix_of=prefix_of, batches=batches) -> Tensor:
            rows = next(batches)
            return namer.loss(prefix_of(rows), rows)

        with report.model(label) as found:
            learned = [*prefix.parameters(), *learned]
            found.losses = train(label, steps, learned, step, rate=rate, clip=1.0, betas=(0.9, 0.95))
            prefix.eval()  # no dropout
            found.metrics = namer.metrics(prefix_of, seed)
    return report.close(prefix, namer.picture(prefix_of, seed))
