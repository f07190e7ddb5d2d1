"""What DenseCLIP puts between a CLIP and a decoder: pooling that keeps every position, texts with learned contexts, and
the decoder through which texts look at an image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcontrast.ops import _check as check
from fastcontrast.ops._precision import float32, without_autocast


class Attention(nn.Module):
    """softmax(q kᵀ/√d) v with heads, q of `x` [B, N, width], k and v of `memory` [B, M, width], and a projection."""

    def __init__(self, width: int, heads: int, outside: int | None = None, *, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.out = nn.Linear(width, outside or width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        pairs = (self.q, x), (self.k, memory), (self.v, memory)
        q, k, v = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer, y in pairs)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class AttentionPool(nn.Module):
    """CLIP's pooling, of all positions: [g; z] [B, 1 + H·W, dim], in which g is the image's embedding.

    Tokens [mean; pixels] of a map [B, width, H, W] + positions → self-attention → projection. Positions are those of a
    grid `side` × `side`, resized bilinearly to any other.
    """

    def __init__(self, width: int, dim: int, side: int, heads: int = 4):
        super().__init__()
        self.first = nn.Parameter(torch.randn(1, width) * width**-0.5)
        self.grid = nn.Parameter(torch.randn(width, side, side) * width**-0.5)
        self.attention = Attention(width, heads, dim, bias=True)

    def forward(self, x: Tensor) -> Tensor:  # [B, width, H, W]
        grid = F.interpolate(self.grid[None], x.shape[2:], mode="bilinear", align_corners=False)
        pixels = x.flatten(2).mT
        tokens = torch.cat([pixels.mean(1, keepdim=True) + self.first, pixels + grid.flatten(2).mT], 1)
        return self.attention(tokens, tokens)


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.own, self.cross = Attention(width, heads), Attention(width, heads)
        self.dropout = nn.Dropout(dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.dropout(self.own(y, y))
        x = x + self.dropout(self.cross(self.norms[1](x), memory))
        return x + self.dropout(self.mlp(self.norms[2](x)))


class ContextDecoder(nn.Module):
    """D(T, V): what texts T [B, K, text] read in an image's tokens V [B, 1 + H·W, visual], [B, K, text]."""

    def __init__(self, text: int, visual: int, width: int = 256, heads: int = 4, layers: int = 3, dropout: float = 0.1):
        super().__init__()
        self.visual = nn.Sequential(nn.LayerNorm(visual), nn.Linear(visual, width), nn.LayerNorm(width))
        self.text = nn.Sequential(nn.LayerNorm(text), nn.Linear(text, width))
        self.layers = nn.ModuleList(_Layer(width, heads, dropout) for _ in range(layers))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, text))

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        memory, x = self.visual(visual), self.text(text)
        for layer in self.layers:
            x = layer(x, memory)
        return self.out(x)


class PostModelPrompt(nn.Module):
    """T̂ = T + γ D(T, V): texts that come out of the encoder are moved a little by the image; γ [dim] is learned."""

    def __init__(self, dim: int, gamma: float = 1e-4, **decoder):
        super().__init__()
        self.decoder = ContextDecoder(dim, dim, **decoder)
        self.gamma = nn.Parameter(torch.full((dim,), gamma))

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:  # [K, dim] or [B, K, dim], [B, 1 + H·W, dim]
        text = text.expand(len(visual), -1, -1)
        return text + self.gamma * self.decoder(text, visual)


class PreModelPrompt(nn.Module):
    """T̂ = E(D(Q, V)): what learned queries Q read in the image stands as context before every name, so that the
    encoder E runs on B·K sequences."""

    def __init__(self, encoder: PromptedText, visual: int, **decoder):
        super().__init__()
        self.encoder, (count, width) = encoder, encoder.contexts.shape
        self.queries = nn.Parameter(nn.init.trunc_normal_(torch.empty(count, width)))
        self.decoder = ContextDecoder(width, visual, **decoder)

    def forward(self, names: Tensor, visual: Tensor) -> Tensor:  # [K, length] integer, [B, 1 + H·W, visual]
        return self.encoder(names, self.decoder(self.queries.expand(len(visual), -1, -1), visual))


class PromptedText(nn.Module):
    """CLIP's text encoder E of [start, P, name, end]: embeddings of names with contexts P [contexts, width] in front.

    A causal transformer of tokens and positions, read at the end token, normalised, projected. Only P learns: the rest
    is what CLIP trained, and is frozen.

    Args:
        words: size of the vocabulary. end: its token that ends a name.
        length: of tokenised names, start and end included; `cut` makes longer ones fit.
    """

    def __init__(
        self, words: int, end: int, dim: int = 512, *, width: int = 512, heads: int = 8, layers: int = 12,
        length: int = 5, contexts: int = 8,
    ):  # fmt: skip
        super().__init__()
        self.end, self.length = end, length
        self.tokens = nn.Embedding(words, width)
        self.positions = nn.Parameter(torch.randn(length + contexts, width) * 0.01)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )  # fmt: skip
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.projection = nn.Linear(width, dim, bias=False)
        self.requires_grad_(False)
        self.contexts = nn.Parameter(nn.init.trunc_normal_(torch.empty(contexts, width)))

    def forward(self, names: Tensor, contexts: Tensor | None = None) -> Tensor:  # [K, length], [B, contexts, width]
        """T [K, dim], or [B, K, dim] with contexts of each image."""
        ends = names == self.end
        if names.ndim != 2 or names.shape[1] != self.length or not ends.any(1).all():
            expected = f"[K, {self.length}] with an end token ({self.end}) each"
            raise ValueError(f"PromptedText: names must be {expected}, got {list(names.shape)}")
        rows, start = self.tokens(names), (self.contexts if contexts is None else contexts)
        start = start.expand(1 if contexts is None else len(contexts), -1, -1)
        b, k, p = len(start), len(names), start.shape[1]
        rows, start = rows.expand(b, -1, -1, -1), start[:, None].expand(-1, k, -1, -1)
        x = torch.cat([rows[:, :, :1], start, rows[:, :, 1:]], 2).flatten(0, 1) + self.positions
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        x = self.blocks(x, mask, is_causal=True).unflatten(0, (b, k))
        text = self.projection(x[:, torch.arange(k), ends.int().argmax(1) + p])
        return text[0] if contexts is None else text


def cut(tokens: Tensor, length: int, end: int) -> Tensor:  # [K, L] integer
    """Names of at most `length` tokens, [K, length]: what is longer is cut, and the last token of it is `end`."""
    kept = tokens[:, :length].clone()
    kept[(kept != end).all(1), -1] = end
    return F.pad(kept, (0, length - kept.shape[1]))


@without_autocast
def score_maps(z: Tensor, text: Tensor) -> Tensor:  # [B, C, H, W], [K, C] or [B, K, C]
    """Cosines of every pixel and class, float32 [B, K, H, W] (float64 for float64); 0 at a pixel without features.

    Raises ValueError naming what does not fit.
    """
    check.tensor("score_maps", "z", z, 4, "[B, C, H, W]")
    if text.shape[-1] != z.shape[1] or text.ndim not in (2, 3) or (text.ndim == 3 and len(text) != len(z)):
        expected = f"[K, {z.shape[1]}] or [{len(z)}, K, {z.shape[1]}]"
        raise ValueError(f"score_maps: text must be {expected} to match z, got {list(text.shape)}")
    pixels = F.normalize(float32(z).flatten(2), dim=1, eps=1e-12)
    return (F.normalize(float32(text), dim=-1, eps=1e-12) @ pixels).unflatten(-1, z.shape[2:])
