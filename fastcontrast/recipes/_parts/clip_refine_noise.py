"""CLIP-Refine's noise: the random vectors that pairs are pulled to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._shared.noise import batch_noise


class Noise(nn.Module):
    """z_image, z_text [N, E] each ~ N(mean, std² I): one vector a pair, or with `shared=False` two.

    The draw depends on `seed` and on the number of the call, a buffer in `state_dict`. Inside `exchange` it is of the
    whole batch, of which every rank takes its rows.
    """

    def __init__(self, seed: int = 0, mean: float = 0.0, std: float = 1.0, *, shared: bool = True):
        super().__init__()
        self.seed, self.mean, self.std, self.shared = seed, mean, std, shared
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, like: Tensor) -> tuple[Tensor, Tensor]:  # [N, E]
        rows, columns = like.shape
        noise = batch_noise(rows, columns if self.shared else 2 * columns, self.seed, self.calls, like)
        self.calls += 1
        noise = (noise * self.std + self.mean).to(like.dtype)
        return noise[:, :columns], noise[:, -columns:]
