"""Pages of icons whose pixels have names, how well a model finds them, and a picture of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcontrast import data
from fastcontrast.data import SIDE, Pairs
from fastcontrast.minilm import minilm_features

from .._shared.icons import Icons
from .._shared.pages import CELLS, Pages, compose, joined

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

IGNORED = 255
CLASSES, TEST_PAGES = 48, 128
FILLED = 0.7  # share of a page's cells that have an icon


@dataclass(frozen=True)
class Classes:
    """The names that are drawn most often, `count` of them; item i of `icons` has class `icons.ids[i]`, if below it."""

    icons: Icons
    count: int
    train: Tensor  # items of classes, to be labelled
    test: Tensor  # others, which no training sees

    @classmethod
    def load(cls, limit: int | None, seed: int) -> Classes:
        """Of all icons, or of the most frequent names' with `limit` icons in all. Raises MissingDataError without the
        packages."""
        drawn = data.icons()
        counts = torch.bincount(drawn.ids, minlength=len(drawn.names))
        order = counts.argsort(descending=True, stable=True)
        if limit is not None:
            order = order[: max(2, int((counts[order].cumsum(0) <= limit).sum()))]
        place = torch.full_like(counts, -1)
        place[order] = torch.arange(len(order))  # names by frequency: the first are the classes
        kept = (place[drawn.ids] >= 0).nonzero()[:, 0]
        names, ids = [drawn.names[i] for i in order], place[drawn.ids[kept]]
        pairs = Pairs(drawn.source, drawn.items[kept], names, ids, torch.zeros(len(names), dtype=torch.bool))
        count, generator = min(CLASSES, int((counts[order] > 1).sum())), torch.Generator().manual_seed(seed)
        halves = []
        for name in range(count):
            items = (ids == name).nonzero()[:, 0]
            halves.append(items[torch.randperm(len(items), generator=generator)].tensor_split(2))
        train, test = (torch.cat(half) for half in zip(*halves, strict=True))
        return cls(Icons(pairs, minilm_features(names)), count, train, test)

    @property
    def seen(self) -> Tensor:
        """Items that a training may see."""
        return (~torch.isin(torch.arange(len(self.icons.pairs)), self.test)).nonzero()[:, 0]

    def pages(self, batch: int, seed: int) -> Iterator[tuple[Pages, Tensor]]:
        """Endless batches of pages and their labels, of the items to train on."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self._page(self.train, batch, generator)

    def test_pages(self) -> tuple[Pages, Tensor]:
        return self._page(self.test, TEST_PAGES, torch.Generator().manual_seed(1))

    def _page(self, items: Tensor, batch: int, generator: torch.Generator) -> tuple[Pages, Tensor]:
        """Pages with labels uint8 [B, 96, 96]: within an icon's frame its class, elsewhere `IGNORED`."""
        chosen = items[torch.randint(len(items), (batch, CELLS * CELLS), generator=generator)]
        empty = torch.rand(chosen.shape, generator=generator) > FILLED
        pages = compose(self.icons.glyphs, chosen.masked_fill(empty, -1), generator)
        labels = torch.full((batch, CELLS * CELLS, SIDE, SIDE), IGNORED, dtype=torch.uint8)
        page, slot = (pages.items >= 0).nonzero(as_tuple=True)
        item = pages.items[page, slot]
        named = self.icons.ids[item].to(torch.uint8)[:, None, None]
        labels[page, pages.places[page, slot]] = named.where(frames(self.icons.glyphs[item]), IGNORED)
        return pages, joined(labels)


def frames(glyphs: Tensor) -> Tensor:  # [N, H, W]
    """Where the smallest box around the ink is, bool [N, H, W]."""
    ink = glyphs > 0
    rows, columns = ((x.cumsum(1) > 0) & (x.flip(1).cumsum(1).flip(1) > 0) for x in (ink.any(2), ink.any(1)))
    return rows[:, :, None] & columns[:, None]


@torch.no_grad()
def predictions(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Classes of the decoder and of the score maps alone, [B, H, W], and the score maps, [B, K, h, w]."""
    model.eval()
    parts = [model(part) for part in images.split(32)]
    model.train()
    found = [None if maps[0] is None else torch.cat(maps) for maps in zip(*parts, strict=True)]
    best = [
        maps if maps is None else torch.cat([F.interpolate(x, images.shape[1:], mode="bilinear").argmax(1)
                                             for x in maps.split(32)]) for maps in found
    ]  # fmt: skip
    return best[0], best[1], found[1]


def mean_iou(model: nn.Module, classes: Classes) -> dict[str, float]:
    """On test pages: intersection over union, the mean over classes; pixels that are right; what the score maps would
    say without the decoder."""
    pages, labels = classes.test_pages()
    decoded, scored, _ = predictions(model, pages.images)
    found = {"mIoU, %": _iou(decoded, labels, classes.count)}
    valid = labels != IGNORED
    found["pixels right, %"] = 100 * (decoded == labels)[valid].double().mean().item()
    if scored is not None:
        found["mIoU of score maps, %"] = _iou(scored, labels, classes.count)
    return found


def _iou(found: Tensor, labels: Tensor, count: int) -> float:
    valid = labels != IGNORED
    pairs = labels[valid].long() * count + found[valid]
    confusion = torch.bincount(pairs, minlength=count * count).view(count, count).double()
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return 100 * (confusion.diagonal() / union)[union > 0].mean().item()


def draw(place: SubFigure, classes: Classes, models: dict[str, nn.Module]) -> None:
    """Two test pages, their names as colours, those that each model finds, and a score map."""
    from matplotlib import colormaps

    pages, labels = classes.test_pages()
    images, labels = pages.images[:2], labels[:2]
    found = {label: predictions(model, images) for label, model in models.items()}
    colours = torch.tensor([colormaps["hsv"](i * 0.618034 % 1)[:3] for i in range(classes.count)])
    axes = place.subplots(2, 3 + len(models))
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        named = label != IGNORED
        kind = int(label[named][0])

        def painted(values: Tensor, named=named) -> Tensor:
            return torch.where(named[..., None], colours[values.long().where(named, 0)], 1.0)

        panels = {"page": (255 - image)[..., None].expand(-1, -1, 3), "truth": painted(label)}
        panels |= {name: painted(decoded[row]) for name, (decoded, _, _) in found.items()}
        panels[f"scores of “{classes.icons.names[kind]}”"] = list(found.values())[-1][2][row, kind]
        for axis, (title, values) in zip(axes[row], panels.items(), strict=True):
            axis.imshow(values.numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.set_title(title, fontsize=8)
