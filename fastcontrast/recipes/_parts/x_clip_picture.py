"""What a trained X-CLIP's frames tell each other, drawn: a clip in every way it is shown, and its attention.

The operations store no attention, so it is computed here once more, from the model's own projections.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastcontrast import clips
from fastcontrast.figures import GREY, LIGHT

from ..x_clip import CrossFrameBlock, XClip
from .x_clip_run import WAYS, draw_clips

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure


@torch.no_grad()
def message_attention(block: CrossFrameBlock, z: Tensor) -> tuple[Tensor, Tensor]:
    """Of tokens z [B, T, L, D]: how much frame t's message reads that of frame g, [B, T, T], and how much of its
    attention each token gives to its frame's message, [B, T, L]. Means over the heads; rows of the first sum to 1.
    """
    q, k, _ = block.message_attention.split(block.message_norm(block.message(z[:, :, 0])))
    read = (torch.einsum("bthd,bghd->bhtg", q, k) * q.shape[-1] ** -0.5).softmax(-1).mean(1)
    q, k, _ = block.attention.split(block.norm1(z))
    told = block.attention.keys_and_values(block.norm1(block.messages(z)))[0]
    scores = torch.cat(
        [torch.einsum("btlhd,btuhd->bhtlu", q, k), torch.einsum("btlhd,bthd->bhtl", q, told)[..., None]], -1
    )
    return read, (scores * q.shape[-1] ** -0.5).softmax(-1)[..., -1].mean(1)


@torch.no_grad()
def picture(model: XClip, features: dict[str, Tensor], seed: int) -> Callable[[SubFigure], None]:
    """A function that draws a held-out clip in every way: under a frame how much its patches read its message, beside
    them which frames' messages read which, in the last block."""
    # The same clips of features and of frames' numbers: 1,000 · video + frame.
    numbers = {video: 1000 * i + torch.arange(len(x)) for i, (video, x) in enumerate(features.items())}
    ways, shot = len(WAYS), 5  # the shot whose frames are clearest when small
    video, shown = (
        draw_clips(x, shot + 1, random.Random(seed + 2), held_out=True)[0][-ways:] for x in (features, numbers)
    )
    z = model.vision.embed(video)
    for block in model.vision.blocks[:-1]:
        z = block(z)
    read, told = message_attention(model.vision.blocks[-1], z)
    pictures = {i: clips.frames([*features][i], 90, 160) for i in set((shown // 1000).flatten().tolist())}
    most, side = told[:, :, 1:].max().item(), round((told.shape[2] - 1) ** 0.5)

    def draw(panel: SubFigure) -> None:
        grid = panel.add_gridspec(2 * ways, video.shape[1] + 2, height_ratios=[0.62, 1] * ways)
        for way, name in enumerate(WAYS):
            for t, number in enumerate(shown[way].tolist()):
                axes = panel.add_subplot(grid[2 * way, t])
                _image(axes, pictures[number // 1000][number % 1000])
                if t == 0:
                    axes.set_title(name, loc="left", fontweight="bold", fontsize=9)
                _image(panel.add_subplot(grid[2 * way + 1, t]), told[way, t, 1:].view(side, side), most)
            axes = panel.add_subplot(grid[2 * way : 2 * way + 2, video.shape[1] :])
            _image(axes, read[way], read.max().item())
            if way == 0:
                axes.set_title("messages: row reads column", fontsize=7, color=GREY)
        text = f"“{clips.SHOTS[shot].text}”, held out; below each frame: how much its patches read its message"
        panel.suptitle(text, fontsize=8, color=GREY)

    return draw


def _image(axes: Any, values: Tensor, most: float | None = None) -> None:
    """A picture [H, W, 3], or weights [H, W] from white, 0, to blue, `most`."""
    axes.imshow(values.numpy(), cmap="Blues", vmin=None if most is None else 0, vmax=most)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(edgecolor=LIGHT)
