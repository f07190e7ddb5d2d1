"""Features of icons and names of another length, and how far the two kinds lie apart at length 1."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast.towers import GlyphTower, TwoTowers, encode

from .._shared.icons import Icons, raw_features


@torch.no_grad()
def at_scale(model: TwoTowers, icons: Icons, scale: float) -> list[Tensor]:
    """Raw features of all icons and of all names, after the last layers were scaled for a mean length of √scale: raw
    inner products then are about `scale` times the cosines, which stay as they were."""
    found = []
    for tower, x, seen in ((model.item_tower, icons.glyphs, icons.pairs.train),
                           (model.name_tower, icons.texts, ~icons.pairs.unseen)):  # fmt: skip
        features = torch.cat([raw_features(tower, part) for part in x.split(1024)])
        factor = scale**0.5 / features[seen].norm(dim=1).mean()
        for parameter in (tower.layers[-1] if isinstance(tower, GlyphTower) else tower.linear).parameters():
            parameter.mul_(factor)
        found.append(factor * features)
    return found


def gap(model: TwoTowers, icons: Icons) -> float:
    """‖mean of features of unseen icons − mean of features of their names‖."""
    test = icons.pairs.test
    images, texts = encode(model.item_tower, icons.glyphs[test]), encode(model.name_tower, icons.texts[icons.ids[test]])
    return (images.mean(0) - texts.mean(0)).norm().item()
