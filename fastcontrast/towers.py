"""Small encoders that train from scratch in minutes: a CNN on glyphs, a head on text features, a bag of words.

Every tower maps a batch [B, ...] to features of length 1, float32 [B, D]. None uses BatchNorm: inside GradCache a tower
sees one chunk at a time, so BatchNorm would normalise by the statistics of the chunk, and a row's features would depend
on the chunk size. Here every row stands alone: chunked gradients equal those of the whole batch.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .minilm import WIDTH as MINILM_WIDTH
from .minilm import minilm_features
from .ops._precision import fast_bf16


class Conv(nn.Module):
    """convolution(x, gain · (w − mean w) / (√n · std w)) + bias: weight standardisation, which reads no activation.

    Every filter w (n numbers) has mean 0 and length `gain`, a learned number an output channel; it starts at 1.71,
    which keeps the variance through a ReLU. The weight is stored flat, [out, in·k·k]: the matrix that torch.optim.Muon
    orthogonalises. Source: Brock et al. 2021, "Characterizing signal propagation to close the performance gap in
    unnormalized ResNets".
    """

    GAIN = (2 / (1 - 1 / math.pi)) ** 0.5

    def __init__(self, inside: int, outside: int, kernel: int, stride: int = 1):
        super().__init__()
        self.kernel, self.stride = kernel, stride
        # Filters of length √⅓: the output does not depend on it, but Muon's steps, which have a length of their own,
        # turn a shorter filter further. With length √n, 28 steps did not reach the loss that else 15 reach.
        size = inside * kernel * kernel
        self.weight = nn.Parameter(torch.randn(outside, size) / math.sqrt(3 * size))
        self.gain = nn.Parameter(torch.full((outside,), self.GAIN))
        self.bias = nn.Parameter(torch.zeros(outside))

    def forward(self, x: Tensor) -> Tensor:  # [B, in, H, W]
        variance, mean = torch.var_mean(self.weight, dim=1, keepdim=True, correction=0)
        scale = self.gain[:, None] * torch.rsqrt(variance * self.weight.shape[1] + 1e-6)
        weight = ((self.weight - mean) * scale).unflatten(1, (-1, self.kernel, self.kernel))
        return F.conv2d(x, weight.contiguous(memory_format=torch.channels_last), self.bias, self.stride, padding=1)


class GlyphTower(nn.Module):
    """features = normalise(W · flatten(five convolutions of the glyph)), [B, dim].

    Glyphs are uint8 [B, 32, 32], white on black. 17 M multiply-adds a glyph: the first layer halves the sides at once,
    since half of the cost would otherwise lie in layers that see only strokes. `bf16` computes in bfloat16 where that
    is fast.
    """

    MEAN, STD = 0.22, 0.39  # of the 15,969 glyphs, as shares of 255

    def __init__(self, dim: int = 256, widths: tuple[int, int, int] = (48, 96, 192), bf16: bool | None = None):
        super().__init__()
        a, b, c = widths
        self.bf16 = bf16

        def block(inside: int, outside: int, kernel: int, stride: int) -> list[nn.Module]:
            return [Conv(inside, outside, kernel, stride), nn.ReLU()]

        self.layers = nn.Sequential(
            *block(1, a, 4, 2), *block(a, b, 3, 2), *block(b, b, 3, 1), *block(b, c, 3, 2), *block(c, c, 3, 1),
            nn.Flatten(), nn.Linear(c * 16, dim),
        )  # fmt: skip

    def forward(self, glyphs: Tensor) -> Tensor:  # [B, 32, 32]
        x = ((glyphs.float() / 255 - self.MEAN) / self.STD).unsqueeze(1).contiguous(memory_format=torch.channels_last)
        bf16 = fast_bf16(x.device) if self.bf16 is None else self.bf16
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            x = self.layers(x)
        return F.normalize(x.float(), dim=-1)


class TextHead(nn.Module):
    """features = normalise(W · (x − mean) + b) of frozen text features x [B, inside], [B, dim].

    `mean` is a buffer: sentence encoders put all short texts into a narrow cone, whose axis says nothing about a text.
    """

    def __init__(self, inside: int = MINILM_WIDTH, dim: int = 256):
        super().__init__()
        self.register_buffer("mean", torch.zeros(inside))
        self.linear = nn.Linear(inside, dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, inside]
        x = F.normalize(x - self.mean, dim=-1) * x.shape[-1] ** 0.5
        return F.normalize(self.linear(x), dim=-1)


class HashedWords(nn.Module):
    """features = normalise(mean of the vectors of a text's words and word pairs), [B, dim]; takes `hash_words`
    codes."""

    def __init__(self, buckets: int = 1 << 17, dim: int = 128):
        super().__init__()
        self.bag = nn.EmbeddingBag(buckets, dim, mode="mean", padding_idx=0)
        # Adam moves an entry by about its rate a step, and steps are few: starting with the usual deviation of 1, the
        # docstrings reach a recall@1 of 11 %; with 0.03, of 40 %.
        nn.init.normal_(self.bag.weight, std=0.03)
        with torch.no_grad():
            self.bag.weight[0] = 0

    def forward(self, codes: Tensor) -> Tensor:  # [B, T]
        return F.normalize(self.bag(codes), dim=-1)


class TwoTowers(nn.Module):
    """What the demo trains, and what its weights load into: a tower for items, one for names, in one space.

        similarity[i, j] = ⟨model.items(items)[i], model.names(names)[j]⟩

    `source` names the data ("icons", "wordnet", "docstrings") and so the towers: icons have a `GlyphTower` and a
    `TextHead` on MiniLM features, texts share one `HashedWords`.
    """

    def __init__(self, source: str = "icons"):
        super().__init__()
        self.source = source
        self.item_tower: nn.Module = GlyphTower() if source == "icons" else HashedWords()
        self.name_tower: nn.Module = TextHead() if source == "icons" else self.item_tower

    def prepare_items(self, items: Tensor | list[str]) -> Tensor:
        """What `item_tower` takes: glyphs as they are, texts as hash codes."""
        return torch.as_tensor(items) if self.source == "icons" else hash_words(items)

    def prepare_names(self, names: list[str], *, cache: bool = False, progress: bool = False) -> Tensor:
        """What `name_tower` takes: MiniLM features (kept on disk with `cache`), or hash codes."""
        return minilm_features(names, cache=cache, progress=progress) if self.source == "icons" else hash_words(names)

    def fit_names(self, prepared: Tensor) -> None:
        """Centres the text head on the names to train on, as `prepare_names` gave them."""
        if isinstance(self.name_tower, TextHead):
            self.name_tower.mean.copy_(prepared.mean(0))

    def items(self, items: Tensor | list[str]) -> Tensor:
        """Features of items, [B, D]."""
        return encode(self.item_tower, self.prepare_items(items))

    def names(self, names: list[str]) -> Tensor:
        """Features of names, [B, D]."""
        return encode(self.name_tower, self.prepare_names(names))

    def save(self, path: str | os.PathLike) -> None:
        """Weights as safetensors, with the source in its metadata."""
        from safetensors.torch import save_model

        save_model(self, str(path), metadata={"fastcontrast": json.dumps({"source": self.source})})

    @classmethod
    def load(cls, path: str | os.PathLike) -> TwoTowers:
        """The model that `save` wrote, in eval mode on the CPU."""
        from safetensors import safe_open
        from safetensors.torch import load_model

        with safe_open(str(path), "pt") as file:
            settings = (file.metadata() or {}).get("fastcontrast")
        if settings is None:
            raise ValueError(f"TwoTowers.load: {Path(path).name} was not written by TwoTowers.save")
        model = cls(**json.loads(settings))
        load_model(model, str(path))
        return model.eval()


@torch.no_grad()
def encode(tower: nn.Module, inputs: Tensor, batch: int = 1024) -> Tensor:
    """Features of all rows, `batch` at a time, in eval mode, on the tower's device, brought to the CPU."""
    device, training = next(tower.parameters()).device, tower.training
    tower.eval()
    features = torch.cat([tower(part.to(device)).cpu() for part in inputs.split(batch)])
    tower.train(training)
    return features


def hash_words(texts: list[str], buckets: int = 1 << 17, limit: int = 256) -> Tensor:
    """Codes int64 [B, T] in 1 … buckets − 1 of each text's words and pairs of neighbouring words, padded with 0.

    T is the longest of the texts, at most `limit` codes. crc32 is the same in every process, which `hash` is not.
    """
    rows = []
    for text in texts:
        words = re.findall(r"[^\W_]+", text.lower())
        pairs = [f"{a} {b}" for a, b in itertools.pairwise(words)]
        mixed = [
            token for both in zip(words, [*pairs, None], strict=False) for token in both if token
        ]  # a cut keeps both kinds
        rows.append([zlib.crc32(token.encode()) % (buckets - 1) + 1 for token in mixed[:limit]])
    return padded(rows)


def padded(rows: list[list[int]]) -> Tensor:
    """Codes int64 [B, T], T the longest row and at least 1; behind the others' ends 0."""
    codes = torch.zeros(len(rows), max(map(len, rows), default=0) or 1, dtype=torch.int64)
    for line, row in zip(codes, rows, strict=True):
        line[: len(row)] = torch.tensor(row, dtype=torch.int64)
    return codes
