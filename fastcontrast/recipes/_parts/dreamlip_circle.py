"""DreamLIP's circle loss, see the equations of `fastcontrast.recipes.dreamlip`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.distributed._sums import numbers, over_keys, share
from fastcontrast.ops import pairwise_reduce
from fastcontrast.ops._precision import float32, without_autocast

MARGIN, GAMMA = 0.25, 32.0


@without_autocast
def circle_loss(image: Tensor, texts: Tensor) -> Tensor:  # [B, E], [B, K, E]
    """L_circle, without a matrix of B × B·K."""
    image, texts = float32(image), float32(texts)
    positive = torch.einsum("be,bke->bk", image, texts)
    pull = (-GAMMA * (1 + MARGIN - positive).relu().detach() * (positive - 1 + MARGIN)).logsumexp(1)
    rows = numbers(len(image), image.device)
    # Exponents of cosines lie in [−2, 30]: the sum needs no maximum first, so each tile is seen once.
    push = over_keys(_other_terms, [image, rows], [texts, rows])
    none = push == 0  # one image alone has no negatives, and its loss is 0
    push = push.masked_fill(none, 1.0).log().masked_fill(none, float("-inf"))
    return share(F.softplus(pull + push).sum(), len(image))


def _other_terms(local: Sequence[Tensor], block: Sequence[Tensor], _: slice) -> Tensor:
    """Σ over the block's sentences of other images of exp(γ a_n (s_n − m)), [rows]."""
    (image, rows), (texts, columns) = local, block

    def tile(image: Tensor, texts: Tensor, i: Tensor, j: Tensor) -> Tensor:
        cosines = image @ texts.flatten(0, 1).T
        terms = (GAMMA * (cosines.detach() + MARGIN).relu_() * (cosines - MARGIN)).exp()
        of_images = terms.unflatten(1, texts.shape[:2]).sum(2)
        return of_images.masked_fill(rows[i, None] == columns[j], 0.0).sum(1)

    return pairwise_reduce(tile, image, texts, block=(max(1, len(image)), 128))
