"""The CLIP that DenseCLIP starts from, trained on single icons, and what labels pages from it on."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcontrast import clip_loss
from fastcontrast.data import SIDE
from fastcontrast.towers import TextHead

from .._shared.icons import Icons
from .._shared.pages import STRIDE, PageTower
from .._shared.report import Scale, train
from .denseclip_model import AttentionPool, PostModelPrompt, score_maps

BATCH, RATE, DIM = 512, 3e-3, 256


class Clip(nn.Module):
    """A CLIP whose pictures may have any size: a CNN with stride 8, attention pooling, a linear head on MiniLM."""

    def __init__(self):
        super().__init__()
        self.tower = PageTower()
        self.pool = AttentionPool(self.tower.width, DIM, SIDE // STRIDE)
        self.text = TextHead(dim=DIM)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # [B, H, W]
        """x [B, width, H/8, W/8] and V = [g; z], [B, 1 + H·W/64, DIM]."""
        x = self.tower(images).mT.unflatten(-1, [side // STRIDE for side in images.shape[1:]])
        return x, self.pool(x)


def pretrained(icons: Icons, items: Tensor, seed: int, steps: int) -> Clip:
    """A CLIP of single icons and their names, `items` of them only."""
    torch.manual_seed(seed)
    model, scale = Clip(), Scale()
    pairs = replace(icons.pairs, items=icons.glyphs[items], ids=icons.ids[items])
    model.text.mean.copy_(icons.texts.mean(0))
    batches = replace(icons, pairs=pairs).batches(min(BATCH, len(icons.names)), seed)

    def step(_: int) -> Tensor:
        rows = next(batches)
        image = F.normalize(model(pairs.items[rows])[1][:, 0], dim=-1)
        return clip_loss(image, model.text(icons.texts[pairs.ids[rows]]), scale())

    learned = [*model.parameters(), *scale.parameters()]
    train("CLIP, the start", steps, learned, step, rate=RATE, decay=0.1, clip=1.0, after=scale.clamp)
    return model


class Segmenter(nn.Module):
    """CLIP and a decoder of two convolutions; with `text` [K, DIM] DenseCLIP, without it CLIP that is fine-tuned."""

    def __init__(self, clip: Clip, classes: int, text: Tensor | None = None):
        super().__init__()
        self.clip = clip
        self.prompt = None if text is None else PostModelPrompt(DIM, width=128, layers=2)
        self.register_buffer("text", text)
        read = clip.tower.width + (0 if text is None else classes)
        self.head = nn.Sequential(nn.Conv2d(read, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, classes, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:  # [B, H, W]
        """Logits and score maps, [B, K, H/8, W/8] each."""
        x, visual = self.clip(images)
        if self.prompt is None:
            return self.head(x), None
        z = visual[:, 1:].mT.unflatten(-1, x.shape[2:])
        scores = score_maps(z, self.prompt(self.text, visual))
        return self.head(torch.cat([x, scores], 1)), scores
