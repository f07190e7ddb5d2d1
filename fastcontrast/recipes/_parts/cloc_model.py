"""What the run of CLOC trains and measures: towers of pages and texts, a prompter, a head that finds boxes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcontrast.towers import TextHead

from .._shared.pages import GRID, PageTower
from . import cloc_pages
from .cloc_prompter import Prompter, sinusoids

WIDTHS, DIM = (16, 32, 64), 256


class Asked(nn.Module):
    """What is trained: towers of pages and of texts, prompter, and the head that finds boxes."""

    def __init__(self, pool: str = "all"):
        super().__init__()
        self.pages, self.texts = PageTower(DIM, WIDTHS), TextHead(dim=DIM)
        self.prompter = Prompter(self.pages.width, DIM, pool)
        self.head = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, 4))
        at = (torch.arange(GRID) + 0.5) / GRID
        # a transformer's tokens know where they are, those of a CNN are told
        centres = torch.stack([at.repeat(GRID), at.repeat_interleave(GRID)], -1)
        self.register_buffer("places", sinusoids(centres, self.pages.width))

    def regions(self, boxes: Tensor, tokens: Tensor, there: Tensor) -> Tensor:
        return F.normalize(self.prompter.boxes(boxes, tokens + self.places, there), dim=-1)

    def find(self, texts: Tensor, tokens: Tensor, there: Tensor) -> Tensor:
        """Boxes [R, 4] of texts' embeddings [R, E]."""
        return self.head(self.prompter.texts(texts, tokens + self.places, there))


@torch.no_grad()
def measure(model: Asked, data: cloc_pages.Data, asked: bool) -> dict[str, float]:
    """On the test pages; not `asked`: regions are means of tokens, and no box is found."""
    test = data.test
    tokens = model.pages(test.images)
    if asked:
        regions = model.regions(test.boxes, tokens, test.there)
    else:
        regions = cloc_pages.means_in_boxes(tokens, test)
        regions = F.normalize(model.pages.projection(regions), dim=-1)
    metrics = cloc_pages.recalls(data, regions, model.pages.pool(tokens), model.texts)
    return metrics | (cloc_pages.errors(test.boxes, found_boxes(model, test)) if asked else {})


@torch.no_grad()
def found_boxes(model: Asked, pages: cloc_pages.Batch) -> Tensor:
    """Boxes [R, 4] of the names on pages."""
    return model.find(model.texts(pages.texts), model.pages(pages.images), pages.there)
