"""Pages composed of icons: pictures with several things in known places, for systems that look at parts of an image."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcontrast.data import SIDE
from fastcontrast.ops._precision import fast_bf16
from fastcontrast.towers import Conv, GlyphTower

CELLS = 3  # a page has CELLS × CELLS places
PAGE = CELLS * SIDE  # pixels a side
STRIDE = 8  # pixels between tokens
GRID = PAGE // STRIDE  # tokens a side


class Pages(NamedTuple):
    """`images` uint8 [B, 96, 96]; of page b the icons `items[b]` (−1: none) lie in `boxes[b]`: x0, y0, x1, y1 in 0 … 1.

    The boxes of icons that are not there are 0, 0, 0, 0. `places` [B, M] are cells, row by row; −1: none.
    """

    images: Tensor  # [B, 96, 96]
    items: Tensor  # [B, M]
    boxes: Tensor  # [B, M, 4]
    places: Tensor  # [B, M]


def compose(glyphs: Tensor, items: Tensor, generator: torch.Generator) -> Pages:
    """Pages of the icons `items` [B, M] (−1: none) among glyphs [N, 32, 32], each in a cell of its own, at random."""
    count, most = items.shape
    if most > CELLS * CELLS:
        raise ValueError(f"compose: a page has {CELLS * CELLS} places, got {most} icons")
    places = torch.rand(count, CELLS * CELLS, generator=generator).argsort(1)[:, :most]
    there = items >= 0
    cells = torch.zeros(count, CELLS * CELLS, SIDE, SIDE, dtype=torch.uint8)
    page, slot = there.nonzero(as_tuple=True)
    cells[page, places[page, slot]] = glyphs[items[page, slot]]
    corner = torch.stack([places % CELLS, places // CELLS], -1) / CELLS  # x, y
    boxes = torch.cat([corner, corner + 1 / CELLS], -1) * there[..., None]
    return Pages(joined(cells), items, boxes, torch.where(there, places, -1))


def joined(cells: Tensor) -> Tensor:  # [B, 9, 32, 32]
    """Pages [B, 96, 96] of cells row by row."""
    return cells.view(-1, CELLS, CELLS, SIDE, SIDE).transpose(2, 3).reshape(-1, PAGE, PAGE)


class PageTower(nn.Module):
    """Tokens F [B, 144, width] of pages uint8 [B, 96, 96], 12 × 12 row by row, and their pooled embedding.

    Five convolutions with stride 8 in all; `pool` is normalise(P · mean of tokens), [B, dim]. No BatchNorm, and
    bfloat16 where that is fast: see `fastcontrast.towers`.
    """

    def __init__(self, dim: int = 256, widths: tuple[int, int, int] = (32, 64, 128)):
        super().__init__()
        a, b, c = widths
        self.width = c
        shape = ((1, a, 4, 2), (a, b, 3, 2), (b, b, 3, 1), (b, c, 3, 2), (c, c, 3, 1))
        self.layers = nn.Sequential(*(layer for sizes in shape for layer in (Conv(*sizes), nn.ReLU())))
        self.projection = nn.Linear(c, dim)

    def forward(self, images: Tensor) -> Tensor:  # [B, 96, 96]
        x = ((images.float() / 255 - GlyphTower.MEAN) / GlyphTower.STD).unsqueeze(1)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=fast_bf16(x.device)):
            x = self.layers(x.contiguous(memory_format=torch.channels_last))
        return x.float().flatten(2).mT

    def pool(self, tokens: Tensor) -> Tensor:  # [B, 144, width]
        return F.normalize(self.projection(tokens.mean(1)), dim=-1)


def cell_tokens(values: Tensor) -> Tensor:
    """Means over each cell's tokens: [..., 144] → [..., 9], cells row by row."""
    side = GRID // CELLS
    return values.unflatten(-1, (CELLS, side, CELLS, side)).mean((-1, -3)).flatten(-2)
