"""The prompter of CLOC: one transformer layer over a prompt and an image's tokens, for all regions of all images."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcontrast.ops import _check as check

POOLS = ("all", "prompt")


def sinusoids(points: Tensor, width: int) -> Tensor:  # [..., 2] in 0 … 1
    """Tokens [..., width] of points: [sin a, cos a] of x, then of y, a_k = 2π · coordinate / 10000^(4k / width)."""
    if width % 4:
        raise ValueError(f"sinusoids: width must be a multiple of 4, got {width}")
    steps = torch.arange(width // 4, dtype=points.dtype, device=points.device) / (width // 4)
    rates = 2 * math.pi * 10000**-steps
    angles = points[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


class Prompter(nn.Module):
    """z [R, E] of prompts and the tokens of their images: see the module's equations.

    An image's tokens are projected, and attend each other, once for all of its regions: to its log-sum-exp and mean of
    values a region adds its own prompt's. What pool="all" has to pay a region is an FFN of P + T tokens, whose second
    product comes after the mean: 4·(P + T)·D² multiplications, and a hidden layer [R, P + T, 4D]. pool="prompt" pays
    4·T·D², and reads keys and values where they are.

    Args:
        width: D, of tokens. dim: E, of texts and regions. pool: whose outputs are averaged, "all" or the "prompt"'s.
    """

    def __init__(self, width: int, dim: int, pool: str = "all"):
        super().__init__()
        check.one_of("Prompter", "pool", pool, POOLS)
        self.width, self.pool = width, pool
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.projection = nn.Linear(width, dim)
        self.lift = nn.Linear(dim, width)

    def boxes(self, boxes: Tensor, tokens: Tensor, there: Tensor) -> Tensor:  # [R, 4], [B, P, D], [B, M]
        """z of boxes x0, y0, x1, y1 in 0 … 1: a token a corner."""
        return self(sinusoids(boxes.unflatten(-1, (2, 2)), self.width), tokens, there)

    def texts(self, texts: Tensor, tokens: Tensor, there: Tensor) -> Tensor:  # [R, E], [B, P, D], [B, M]
        """t of texts' embeddings: one token."""
        return self(self.lift(texts)[:, None], tokens, there)

    def forward(
        self,
        prompts: Tensor,  # [R, T, D]
        tokens: Tensor,  # [B, P, D]
        there: Tensor,  # [B, M] bool
    ) -> Tensor:
        """`there` has R entries True: row by row, the images' regions. Raises ValueError naming what does not fit."""
        if tokens.ndim != 3 or tokens.shape[2] != self.width:
            raise ValueError(f"Prompter: tokens must be [B, P, {self.width}], got {list(tokens.shape)}")
        rows = spots("Prompter", there, len(tokens))
        if prompts.ndim != 3 or prompts.shape[::2] != (len(rows[0]), self.width):
            raise ValueError(f"Prompter: prompts must be [{len(rows[0])}, T, {self.width}], got {list(prompts.shape)}")
        slots = prompts.new_zeros(*there.shape, *prompts.shape[1:]).index_put(rows, prompts)  # [B, M, T, D]
        (q, k, v), (slot_q, slot_k, slot_v) = self._parts(tokens), self._parts(slots)
        # the prompts' queries: to the image's keys, and to their own
        scores = torch.cat([torch.einsum("bmtd,bpd->bmtp", slot_q, k), slot_q @ slot_k.mT], -1)
        seen, own = scores.softmax(-1).split([k.shape[1], prompts.shape[1]], -1)
        attended = torch.einsum("bmtp,bpd->bmtd", seen, v) + own @ slot_v
        told = prompts + attended[rows]
        if self.pool == "all":
            told = torch.cat([told, self._image(tokens, q, k, v, slot_k, slot_v, rows)], 1)
        hidden = F.gelu(self.inner(self.norm2(told))).mean(1)
        return self.projection(told.mean(1) + self.outer(hidden))

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, scaled, keys, and values after the output's product: with a single head it may come first."""
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        return q * self.width**-0.5, k, self.out(v)

    def _image(self, tokens, q, k, v, slot_k, slot_v, rows) -> Tensor:  # [R, P, D]
        """Image tokens after attention: the part of their own image, once, then each region's share of it."""
        image, _ = rows
        scores = q @ k.mT  # [B, P, P]
        lse, mixed = scores.logsumexp(-1), scores.softmax(-1) @ v
        asked = torch.einsum("bpd,bmtd->bmpt", q, slot_k)[rows]
        weights = torch.cat([lse[image][..., None], asked], -1).softmax(-1)  # [R, P, 1 + T]
        return tokens[image] + weights[..., :1] * mixed[image] + weights[..., 1:] @ slot_v[rows]


def spots(op: str, there: Tensor, images: int) -> tuple[Tensor, ...]:
    """Image and slot of each region."""
    if there.dtype != torch.bool or there.ndim != 2 or len(there) != images:
        raise ValueError(f"{op}: there must be bool [{images}, M], got {there.dtype} {list(there.shape)}")
    return there.nonzero(as_tuple=True)
