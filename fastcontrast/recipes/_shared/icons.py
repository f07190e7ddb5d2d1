"""Icons and their names, as the recipes use them: pairs, a CLIP that knows them, other words for a name, retrieval."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastcontrast import data
from fastcontrast.data import Pairs, cache_folder, write_whole
from fastcontrast.demo import training
from fastcontrast.demo.recall import evaluate
from fastcontrast.minilm import minilm_features
from fastcontrast.towers import GlyphTower, TwoTowers

START_STEPS, START_BATCH = 40, 2048  # of the CLIP that recipes of fine-tuning begin with
UNSEEN = 1000  # names kept out of all training


@dataclass(frozen=True)
class Icons:
    """`pairs.items` are glyphs uint8 [N, 32, 32]; item i is called `pairs.names[pairs.ids[i]]`, whose MiniLM features
    are `texts[pairs.ids[i]]`."""

    pairs: Pairs
    texts: Tensor  # [K, 384]

    @property
    def glyphs(self) -> Tensor:
        return self.pairs.items

    @property
    def ids(self) -> Tensor:
        return self.pairs.ids

    @property
    def names(self) -> list[str]:
        return self.pairs.names

    def batches(self, batch: int, seed: int) -> Iterator[Tensor]:
        """Endless batches of indices of items to train on: names in random order, for each one of its items."""
        return training.batches(self.pairs, batch, seed)

    def fewer(self, share: float, seed: int) -> Icons:
        """The same icons, of whose seen names only a share is seen: fine-tuning has less data than pretraining had."""
        drawn = torch.rand(len(self.names), generator=torch.Generator().manual_seed(seed)) < share
        return replace(self, pairs=replace(self.pairs, unseen=self.pairs.unseen | ~drawn))

    def towers(self, seed: int) -> TwoTowers:
        """An untrained CLIP: a CNN for glyphs, a linear head on MiniLM's features for names."""
        torch.manual_seed(seed)
        model = TwoTowers("icons")
        model.fit_names(self.texts[~self.pairs.unseen])
        return model

    def clip(self, seed: int) -> TwoTowers:
        """A CLIP trained on these icons, which `cache_folder()` keeps: what fine-tuning starts with. Half a minute."""
        kind = [START_STEPS, START_BATCH, seed, len(self.pairs), *self.names]
        path = cache_folder() / f"icon-clip-{hashlib.sha256(json.dumps(kind).encode()).hexdigest()[:24]}.safetensors"
        if path.exists():
            return TwoTowers.load(path).train()
        model, settings = self.towers(seed), training.RECIPES["icons"]
        options = {"batch": START_BATCH, "steps": START_STEPS, "seed": seed}
        training.train(model, self.glyphs, self.texts, self.pairs, settings, **options)
        write_whole(path, model.save)
        return model

    def recall(self, model: TwoTowers, texts: Tensor | None = None) -> dict[str, float]:
        """recall@1 on the unseen names, per cent: icon → name, name → icon; of a model that reads `texts` [K, ...] of
        the names, default their MiniLM features."""
        found = evaluate(model, self.glyphs, self.texts if texts is None else texts, self.pairs)
        return {
            "icon → name R@1, %": 100 * found["item_to_name"]["1"],
            "name → icon R@1, %": 100 * found["name_to_item"]["1"],
        }


def load_icons(limit: int | None = None) -> Icons:
    """All icons, or about `limit` of them. Raises MissingDataError without the packages."""
    drawn = data.icons(limit=limit, unseen=UNSEEN if limit is None else max(1, limit // 16))
    return Icons(drawn, minilm_features(drawn.names))


def raw_features(tower: nn.Module, x: Tensor) -> Tensor:
    """What a tower of icons or of names gives before it normalises, [B, D]."""
    found, last = [], tower.layers if isinstance(tower, GlyphTower) else tower.linear
    with last.register_forward_hook(lambda *call: found.append(call[-1].float())):
        tower(x)
    return found[0]


def rewrites_of(name: str) -> list[str]:
    """Four other ways to say an icon's name, by rule: "account box" →

    "an icon of account box", "box, account", "a pictogram that shows account box", "symbol for account box in an app".
    """
    words = name.split()
    return [
        f"an icon of {name}",
        ", ".join(reversed(words)),
        f"a pictogram that shows {name}",
        f"symbol for {name} in an app",
    ]
