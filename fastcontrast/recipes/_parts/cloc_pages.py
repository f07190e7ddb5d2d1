"""What CLOC trains on and is measured with: pages of icons, with captions, boxes and names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastcontrast.demo.recall import recall
from fastcontrast.figures import BLUE, GREEN, ORANGE
from fastcontrast.minilm import minilm_features

from .._shared.icons import Icons
from .._shared.pages import CELLS, cell_tokens, compose

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

ON_A_PAGE, REGIONS = 5, 4  # icons, at most; regions to train on, at most
SETS, TEST_SETS = 2048, 512  # of names that share a page
LABELLED = 0.75  # share of the pages whose boxes and names are known


class Sets(NamedTuple):
    names: Tensor  # [S, 5], −1: none
    captions: Tensor  # [S, 384]
    labelled: Tensor  # [S] bool


class Batch(NamedTuple):
    """Pages, and R regions in the order of `there`."""

    images: Tensor  # [B, 96, 96]
    captions: Tensor  # [B, 384]
    there: Tensor  # [B, M] bool
    boxes: Tensor  # [R, 4]
    names: Tensor  # [R]
    texts: Tensor  # [R, 384]


def choose_regions(
    boxes: Tensor,  # [B, K, 4]
    there: Tensor,  # [B, K] bool
    most: int = 4,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """At most M = `most` regions an image, at random: their indices [B, M], and which of these are there. Boxes of no
    area, or that leave the image 0 … 1, are none."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    there = there & (x0 >= 0) & (y0 >= 0) & (x0 < x1) & (y0 < y1) & (x1 <= 1) & (y1 <= 1)
    chosen = torch.rand(there.shape, generator=generator).masked_fill(~there, 2.0).argsort(1)[:, :most]
    return chosen, there.gather(1, chosen)


class Data:
    """Sets of seen names to train on, each composed anew whenever it is drawn: of which font's icons, where, and which
    regions count. `test` are fixed pages of unseen names."""

    def __init__(self, icons: Icons, seed: int):
        self.icons, generator = icons, torch.Generator().manual_seed(seed)
        self.order = icons.ids.argsort(stable=True)  # icons of one name side by side
        self.count = torch.bincount(icons.ids, minlength=len(icons.names))
        seen, unseen = ((icons.pairs.unseen == is_unseen).nonzero()[:, 0] for is_unseen in (False, True))
        self.seen_texts = icons.texts[seen]
        train, test = (draw_names(names, min(most, len(names)), generator)
                       for names, most in ((seen, SETS), (unseen, TEST_SETS)))  # fmt: skip
        captions = minilm_features([", ".join(icons.names[i] for i in row if i >= 0)
                                    for row in torch.cat([train, test]).tolist()])  # fmt: skip
        labelled = torch.rand(len(train), generator=generator) < LABELLED
        self.sets = Sets(train, captions[: len(train)], labelled)
        everywhere = torch.ones(len(test), dtype=torch.bool)
        self.test = self.pages(Sets(test, captions[len(train) :], everywhere), generator, ON_A_PAGE)

    def pages(self, sets: Sets, generator: torch.Generator, most: int = REGIONS) -> Batch:
        names, there = sets.names, sets.names >= 0
        first = self.count.cumsum(0) - self.count
        drawn = first[names] + (torch.rand(names.shape, generator=generator) * self.count[names]).long()
        pages = compose(self.icons.glyphs, torch.where(there, self.order[drawn], -1), generator)
        chosen, there = choose_regions(pages.boxes, there & sets.labelled[:, None], most, generator)
        names = names.gather(1, chosen)[there]
        boxes = pages.boxes.take_along_dim(chosen[..., None], 1)[there]
        return Batch(pages.images, sets.captions, there, boxes, names, self.icons.texts[names])

    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        """Endless batches of different sets, at most `batch` of them."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.sets.names), generator=generator)
            for rows in order[: max(1, len(order) // batch) * batch].split(batch):
                yield self.pages(Sets(*(x[rows] for x in self.sets)), generator)


def draw_names(names: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` sets [count, 5] of one to five names, −1 where there is none."""
    drawn = names[torch.randint(len(names), (count, ON_A_PAGE), generator=generator)]
    sizes = torch.randint(1, ON_A_PAGE + 1, (count, 1), generator=generator)
    return drawn.masked_fill(torch.arange(ON_A_PAGE) >= sizes, -1)


def means_in_boxes(tokens: Tensor, pages: Batch) -> Tensor:  # [B, P, D]
    """Means [R, D] of the tokens in each box, which is a cell."""
    x, y = (pages.boxes[:, :2] * CELLS).round().long().unbind(1)
    return cell_tokens(tokens.mT).mT[pages.there.nonzero()[:, 0], y * CELLS + x]


def recalls(data: Data, regions: Tensor, images: Tensor, text_tower: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """recall@1, per cent, of the test's regions [R, E] among its names and back, and of pages [B, E] among captions."""
    names, labels = data.test.names.unique(return_inverse=True)
    local = recall(regions, text_tower(data.icons.texts[names]), labels)
    whole = recall(images, text_tower(data.test.captions), torch.arange(len(images)))
    return {
        "region → name R@1, %": 100 * local["item_to_name"]["1"],
        "name → region R@1, %": 100 * local["name_to_item"]["1"],
        "page → caption R@1, %": 100 * whole["item_to_name"]["1"],
    }


def errors(boxes: Tensor, found: Tensor) -> dict[str, float]:  # [R, 4] each
    """How far corners are off, and how much of the boxes' union is shared."""
    size = (torch.minimum(boxes, found)[:, 2:] - torch.maximum(boxes, found)[:, :2]).clamp(min=0)
    shared = size.prod(1)
    areas = [(x[:, 2:] - x[:, :2]).clamp(min=0).prod(1) for x in (boxes, found)]
    return {
        "box error, % of a side": 100 * (boxes - found).abs().mean().item(),
        "box IoU, %": 100 * (shared / (sum(areas) - shared)).mean().item(),
    }


def draw(whole: SubFigure, data: Data, found: Tensor) -> None:
    """Eight test pages of three icons; boxes, lines, and dashed where the name's text finds its icon."""
    from matplotlib.patches import Rectangle

    test = data.test
    regions = torch.arange(len(found)).split(test.there.sum(1).tolist())
    shown = [i for i, rows in enumerate(regions) if len(rows) == 3][:8]
    grid = whole.subplots(2, 4)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for axes, page in zip(grid.flat, shown, strict=False):
        axes.imshow(255 - test.images[page].numpy(), cmap="gray", vmin=-400, vmax=255, extent=(0, 1, 1, 0))
        for row, colour in zip(regions[page].tolist(), (BLUE, ORANGE, GREEN), strict=True):
            for box, style in ((test.boxes, "-"), (found, "--")):
                x0, y0, x1, y1 = box[row].tolist()
                axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linestyle=style))
            x0, _, _, y1 = test.boxes[row].tolist()
            axes.text(x0, y1 + 0.02, data.icons.names[test.names[row]], color=colour, fontsize=6, va="top")
        axes.set(xlim=(-0.05, 1.05), ylim=(1.1, -0.05))
    whole.suptitle("unseen names: their icons, and dashed where the text finds them", fontsize=9)
