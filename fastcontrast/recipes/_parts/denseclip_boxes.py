"""DenseCLIP's targets in detection: which pixels a box covers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcontrast.ops import _check as check


def box_targets(
    boxes: Sequence[Tensor],  # B of [n, 4]
    classes: Sequence[Tensor],  # B of [n]
    number: int,
    size: tuple[int, int],
    stride: int = 4,
) -> tuple[Tensor, Tensor]:
    """Targets bool [B, number, H, W] and mask bool [B, H, W] of boxes x0, y0, x1, y1 in pixels, (H, W) = `size`.

    A box covers [⌊y0/4⌋, ⌊y1/4⌋) × [⌊x0/4⌋, ⌊x1/4⌋), which may be empty; boxes of several classes may overlap. With
    instance masks as targets (Mask R-CNN), the mask stays that of the boxes. Raises ValueError naming what is wrong.
    """
    targets = torch.zeros(len(boxes), number, *size, dtype=torch.bool, device=boxes[0].device if boxes else None)
    for image, corners, kinds in zip(targets, boxes, classes, strict=True):
        check.matrix("box_targets", "boxes", corners, 4, like="x0, y0, x1, y1")
        check.vector("box_targets", "classes", kinds, len(corners), corners, floating=False)
        check.within("box_targets", "classes", kinds, 0, number)
        cells = torch.div(corners, stride, rounding_mode="floor").long().clamp(min=0)
        for (x0, y0, x1, y1), kind in zip(cells.tolist(), kinds.tolist(), strict=True):
            image[kind, y0:y1, x0:x1] = True
    return targets, targets.any(1)
