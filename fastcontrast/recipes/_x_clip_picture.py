"""What a trained X-CLIP's frames tell each other, drawn: a clip in every way it is shown, and its attention.

The operations store no attention, so it is computed here once more, from the model's own projections.
"""

from __future__ import annotations

import random
import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcontrast import clips
from fastcontrast.figures import BLUE, GREEN, GREY, LIGHT, ORANGE, figure, plain

from ._x_clip_run import KINDS, draw_clips
from .x_clip import CrossFrameBlock, XClip

COLOURS = {"x_clip": BLUE, "messages": GREEN, "integration": ORANGE, "pooled": "#9ca3af"}


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
def draw(path: Path, model: XClip, features: dict[str, Tensor], results: dict[str, Any]) -> None:
    """Writes a PNG. Left: losses and accuracies. Right: a held-out clip in every way, under each frame's patches how
    much they read its message, and beside them which frames' messages read which, in the last block."""
    # The same clips of features and of frames' numbers: 1,000 · video + frame.
    numbers = {video: 1000 * i + torch.arange(len(x)) for i, (video, x) in enumerate(features.items())}
    ways, shot = len(results["classes"]), 5  # the shot whose frames are clearest when small
    video, shown = (
        draw_clips(x, shot + 1, random.Random(results["seed"] + 2), held_out=True)[0][-ways:]
        for x in (features, numbers)
    )
    z = model.vision.embed(video)
    for block in model.vision.blocks[:-1]:
        z = block(z)
    read, told = message_attention(model.vision.blocks[-1], z)
    pictures = {i: clips.frames([*features][i], 90, 160) for i in set((shown // 1000).flatten().tolist())}

    with figure(path, figsize=(15, 1.3 + 2.0 * ways), dpi=110) as whole:
        left, right = whole.add_gridspec(1, 2, width_ratios=(1, 3.4), wspace=0.08, left=0.04, right=0.99, top=0.92,
                                          bottom=0.06)  # fmt: skip
        top, bottom = left.subgridspec(2, 1, hspace=0.4)
        _curves(whole.add_subplot(top), results)
        _bars(whole.add_subplot(bottom), results)
        grid = right.subgridspec(2 * ways, video.shape[1] + 2, height_ratios=[0.62, 1] * ways, hspace=0.12, wspace=0.06)
        most, side = told[:, :, 1:].max().item(), round((told.shape[2] - 1) ** 0.5)
        for way, name in enumerate(results["classes"]):
            for t, number in enumerate(shown[way].tolist()):
                axes = whole.add_subplot(grid[2 * way, t])
                _image(axes, pictures[number // 1000][number % 1000])
                if t == 0:
                    axes.set_title(name, loc="left", fontweight="bold", fontsize=10)
                _image(whole.add_subplot(grid[2 * way + 1, t]), told[way, t, 1:].view(side, side), most)
            axes = whole.add_subplot(grid[2 * way : 2 * way + 2, video.shape[1] :])
            _image(axes, read[way], read.max().item())
            if way == 0:
                axes.set_title("messages: row reads column", fontsize=8, color=GREY)
        text = f"“{clips.SHOTS[shot].text}”, held out; below each frame: how much its patches read its message"
        whole.text(0.27, 0.965, text, color=GREY)


def _image(axes: Any, values: Tensor, most: float | None = None) -> None:
    """A picture [H, W, 3], or weights [H, W] from white, 0, to blue, `most`."""
    axes.imshow(values.numpy(), cmap="Blues", vmin=None if most is None else 0, vmax=most)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(edgecolor=LIGHT)


def _curves(axes: Any, results: dict[str, Any]) -> None:
    for name, found in results["models"].items():
        axes.plot(
            range(1, len(found["losses"]) + 1),
            found["losses"],
            color=COLOURS[name],
            label=KINDS[name].label,
            linewidth=1,
        )
    axes.set_xlabel("step")
    axes.legend(frameon=False, fontsize=8)
    plain(axes, "training loss")


def _bars(axes: Any, results: dict[str, Any]) -> None:
    ways = ["all", *results["classes"]]
    for place, (name, found) in enumerate(results["models"].items()):
        at = [x + 0.21 * (place - 1.5) for x in range(len(ways))]
        heights = [100 * found["after"][way] for way in ways]
        axes.bar(at, heights, width=0.2, color=COLOURS[name])
        for x, height in zip(at, heights, strict=True):
            axes.annotate(f"{height:.0f}", (x, height), (0, 2), textcoords="offset points", ha="center", fontsize=5.5)
    axes.axhline(100 / len(results["classes"]), color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(ways)), [textwrap.fill(way, 12) for way in ways], fontsize=7.5)
    plain(axes, "right on held-out clips, %; dotted: chance")
