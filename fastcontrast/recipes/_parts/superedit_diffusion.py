"""Diffusion as editing needs it: a schedule of noise, a small U-Net that reads image and instruction, guidance."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# network(noisy [B, C, H, W], steps [B], image [B, C, H, W], text [B, E]) -> [B, C, H, W]
Network = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Schedule:
    """z_t = √a_t z_0 + √(1 − a_t) ε, a_t = Π_{s ≤ t} (1 − β_s), √β rising evenly: Stable Diffusion's.

    Args:
        steps: t lies in [0, steps). first, last: β at its ends.
    """

    def __init__(self, steps: int = 1000, first: float = 0.00085, last: float = 0.012):
        beta = torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64).square()
        self.steps, self.kept = steps, (1 - beta).cumprod(0)  # a [steps]

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:  # [B, ...], [B, ...], [B]
        signal, share = self._factors(t, clean)
        return signal * clean + share * noise

    def velocity(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """√a_t ε − √(1 − a_t) z_0, the target of networks that predict v."""
        signal, share = self._factors(t, clean)
        return signal * noise - share * clean

    def draw(self, clean: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:  # [B, ...]
        """z_t at a random t [B], that t, and the velocity."""
        t = torch.randint(self.steps, clean.shape[:1], generator=draws)
        noise = torch.randn(clean.shape, generator=draws)
        return self.add_noise(clean, noise, t), t, self.velocity(clean, noise, t)

    @torch.no_grad()
    def sample(self, predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int = 50) -> Tensor:
        """z_0 from pure noise [B, ...], by DDIM; `predict(z, t)` gives the velocity. What is beyond [−1, 1], which no
        image has, is cut off from z_0 at every step."""
        times = torch.linspace(self.steps - 1, 0, steps).long().to(noise.device)
        z = clean = noise
        for i, time in enumerate(times):
            signal, share = self._factors(time.expand(len(z)), z)
            clean = (signal * z - share * predict(z, time.expand(len(z)))).clamp(-1, 1)
            if i + 1 < steps:
                z = self.add_noise(clean, (z - signal * clean) / share, times[i + 1].expand(len(z)))
        return clean

    def _factors(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.kept.to(t.device)[t].view(-1, *[1] * (like.ndim - 1))
        return kept.sqrt().to(like.dtype), (1 - kept).sqrt().to(like.dtype)


def guided(
    network: Network, z: Tensor, t: Tensor, image: Tensor, text: Tensor, null: Tensor,
    text_scale: float = 10.0, image_scale: float = 1.5,
) -> Tensor:  # fmt: skip
    """e(∅, ∅) + image_scale · (e(∅, I) − e(∅, ∅)) + text_scale · (e(T, I) − e(∅, I)), e the network's prediction given
    text and image; three branches in one batch. `null` [B, E] is the text of no words."""
    branches = torch.cat([z] * 3), torch.cat([t] * 3)
    conditions = torch.cat([image, image, torch.zeros_like(image)]), torch.cat([text, null, null])
    full, of_image, free = network(*branches, *conditions).chunk(3)
    return free + image_scale * (of_image - free) + text_scale * (full - of_image)


class UNet(nn.Module):
    """What a noisy latent beside the original image hides, at two resolutions; time and text scale and shift features.

    Args:
        channels: of the latents. text: width of the text's features. width: of the first level, the second has twice.
    """

    def __init__(self, channels: int, text: int, width: int = 48):
        super().__init__()
        self.frequencies = 32
        mixed = 4 * width
        self.time, self.text = nn.Linear(2 * self.frequencies, mixed), nn.Linear(text, mixed)
        self.enter = nn.Conv2d(2 * channels, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.up = nn.Conv2d(2 * width, width, 3, padding=1)
        self.first, self.last = Block(width, mixed), Block(width, mixed)
        self.middle = nn.ModuleList(Block(2 * width, mixed) for _ in range(2))
        self.leave = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1))
        nn.init.zeros_(self.leave[-1].weight)

    def forward(self, noisy: Tensor, steps: Tensor, image: Tensor, text: Tensor) -> Tensor:
        """`noisy`, `image` [B, channels, H, W] with even H and W, `steps` [B], `text` [B, text]."""
        rates = torch.exp(-math.log(1e4) * torch.arange(self.frequencies, device=text.device) / self.frequencies)
        angles = steps[:, None] * rates
        known = F.silu(self.time(torch.cat([angles.sin(), angles.cos()], 1).to(text.dtype)) + self.text(text))
        outer = self.first(self.enter(torch.cat([noisy, image], 1)), known)
        inner = self.down(outer)
        for block in self.middle:
            inner = block(inner, known)
        return self.leave(self.last(outer + self.up(F.interpolate(inner, scale_factor=2.0)), known))


class Block(nn.Module):
    """x + conv(SiLU((1 + a) · norm(conv(SiLU(norm x))) + b)),  a, b linear in what is known."""

    def __init__(self, width: int, known: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.known = nn.Linear(known, 2 * width)

    def forward(self, x: Tensor, known: Tensor) -> Tensor:  # [B, width, H, W], [B, known]
        a, b = self.known(known)[..., None, None].chunk(2, 1)
        inner = self.convolutions[0](F.silu(self.norms[0](x)))
        return x + self.convolutions[1](F.silu((1 + a) * self.norms[1](inner) + b))
