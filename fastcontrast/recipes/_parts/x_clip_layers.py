"""Layers of X-CLIP: cross-frame blocks, the multi-frame integration, and the prompts that a video gives its texts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcontrast.activations import QuickGELU
from fastcontrast.ops import frame_attention, temporal_attention


@dataclass(frozen=True)
class Settings:
    """Sizes of a model. `messages=False` makes CLIP's own blocks, frames apart: what the messages are compared with."""

    width: int  # D
    layers: int
    heads: int
    joint: int  # E, of videos and texts
    joint_heads: int
    image: int  # pixels a side
    patch: int
    channels: int = 3
    frames: int = 8  # T
    mit_layers: int = 1
    prompt_layers: int = 2
    alpha: float = 0.1
    messages: bool = True


class Attention(nn.Module):
    """The products around an attention: queries, keys and values packed side by side, and the output's."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"x_clip: {heads} heads must divide the width, got {width}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k, v [..., H, D / H] of x [..., D], as views of one product."""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, ...]:
        """k, v [..., H, D / H] of x [..., D], which asks nothing itself."""
        width = self.out.in_features
        packed = F.linear(x, self.qkv.weight[width:], self.qkv.bias[width:])
        return packed.unflatten(-1, (2, self.heads, -1)).unbind(-3)

    def across_frames(self, x: Tensor) -> Tensor:  # [B, T, D]
        """One token a frame attends those of all frames of its clip."""
        out = temporal_attention(*(part[:, :, None] for part in self.split(x)))
        return self.out(out.flatten(2))

    def inside_frames(self, x: Tensor, message: Tensor | None) -> Tensor:  # [B, T, L, D], [B, T, 1, D]
        """Tokens attend those of their frame and its message."""
        extra = None if message is None else self.keys_and_values(message)
        return self.out(frame_attention(*self.split(x), rule="self", extra=extra).flatten(3))


def feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), QuickGELU(), nn.Linear(4 * width, width))


class CrossFrameBlock(nn.Module):
    """z'' of z [B, T, L, D]: see the module's equations."""

    def __init__(self, width: int, heads: int, messages: bool = True):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.ffn = Attention(width, heads), feed_forward(width)
        self.message = None
        if messages:
            self.message, self.message_norm = nn.Linear(width, width), nn.LayerNorm(width)
            self.message_attention = Attention(width, heads)

    def messages(self, z: Tensor) -> Tensor:  # [B, T, L, D]
        """m^ [B, T, D]: what each frame is told."""
        m = self.message(z[:, :, 0])
        return m + self.message_attention.across_frames(self.message_norm(m))

    def forward(self, z: Tensor) -> Tensor:  # [B, T, L, D]
        told = None if self.message is None else self.norm1(self.messages(z))[:, :, None]
        z = z + self.attention.inside_frames(self.norm1(z), told)
        return z + self.ffn(self.norm2(z))


class FrameEncoder(nn.Module):
    """CLIP's vision transformer, of cross-frame blocks: video [B, T, channels, image, image] -> tokens [B, T, L, D]."""

    def __init__(self, s: Settings):
        super().__init__()
        self.patches = nn.Conv2d(s.channels, s.width, s.patch, s.patch, bias=False)
        self.class_token = nn.Parameter(s.width**-0.5 * torch.randn(s.width))
        self.positions = nn.Parameter(s.width**-0.5 * torch.randn(1 + (s.image // s.patch) ** 2, s.width))
        self.norm_pre, self.norm_post = nn.LayerNorm(s.width), nn.LayerNorm(s.width)
        self.blocks = nn.ModuleList(CrossFrameBlock(s.width, s.heads, s.messages) for _ in range(s.layers))

    def embed(self, video: Tensor) -> Tensor:  # [B, T, channels, image, image]
        """Tokens before the first block."""
        patches = self.patches(video.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, video.shape[:2])
        first = self.class_token.expand(*patches.shape[:2], 1, -1)
        return self.norm_pre(torch.cat([first, patches], 2) + self.positions)

    def forward(self, video: Tensor) -> Tensor:  # [B, T, channels, image, image]
        z = self.embed(video)
        for block in self.blocks:
            z = block(z)
        return z


class MultiFrameBlock(nn.Module):
    """x + MHA(LN(x)) over the frames, then x + FFN(LN(x)), of x [B, T, E]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.ffn = Attention(width, heads), feed_forward(width)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, E]
        x = x + self.attention.across_frames(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class MultiFrameIntegration(nn.Module):
    """v [B, E] = mean_t( f + blocks(f + pos) ) of frames f [B, T, E]."""

    def __init__(self, frames: int, width: int, heads: int, layers: int = 1):
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(frames, width))
        self.blocks = nn.Sequential(*(MultiFrameBlock(width, heads) for _ in range(layers)))

    def forward(self, f: Tensor) -> Tensor:  # [B, T, E]
        if f.shape[1] != len(self.positions):
            raise ValueError(
                f"x_clip: clips must have the {len(self.positions)} frames that positions were learned for, "
                f"got {f.shape[1]}; resample the clip or interpolate `mit.positions`"
            )
        return (f + self.blocks(f + self.positions)).mean(1)


class PromptLayer(nn.Module):
    """c + MHA(LN(c), p, p), then c + FFN(LN(c)): class texts c [B or 1, C, E] read patches p [B, P, E]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.out, self.ffn = nn.Linear(width, width), feed_forward(width)

    def forward(self, c: Tensor, p: Tensor) -> Tensor:  # [B or 1, C, E], [B, P, E]
        q = self.query(self.norm1(c)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.key_value(p).unflatten(-1, (2, self.heads, -1)).transpose(1, 3).unbind(2)
        read = F.scaled_dot_product_attention(q.expand(len(p), -1, -1, -1), k, v)
        c = c + self.out(read.transpose(1, 2).flatten(2))
        return c + self.ffn(self.norm2(c))


class VideoPrompt(nn.Module):
    """c0 + α · c [B, C, E]: class texts c0 [C, E] as the patches p [B, P, E] of each video shift them."""

    def __init__(self, width: int, heads: int, layers: int = 2, alpha: float = 0.1):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(PromptLayer(width, heads) for _ in range(layers))
        self.alpha = nn.Parameter(torch.full((width,), alpha))

    def forward(self, texts: Tensor, patches: Tensor) -> Tensor:  # [C, E], [B, P, E]
        p, c = self.norm(patches), texts[None]  # all videos start from the same texts: their first queries are one
        for layer in self.layers:
            c = layer(c, p)
        return texts + self.alpha * c
