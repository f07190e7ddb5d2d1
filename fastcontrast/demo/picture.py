"""The demo's picture: how the loss fell, how recall rose, and what the trained towers answer."""

from __future__ import annotations

import random
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastcontrast.figures import BLUE, GREEN, GREY, INK, LIGHT, figure, plain
from fastcontrast.towers import TwoTowers, encode

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastcontrast.data import Pairs

ANSWERS = 5


def draw(
    path: Path,
    model: TwoTowers,
    items: Tensor,  # [N, ...], as the item tower takes them
    names: Tensor,  # [K, ...], as the name tower takes them
    pairs: Pairs,
    free_texts: tuple[str, ...],
    ways: dict[str, str],
    losses: list[float],
    before: dict[str, dict[str, float]],
    after: dict[str, dict[str, float]],
    seed: int,
) -> None:
    """Writes a PNG. Left: loss and recall. Right: what the towers answer to unseen names, drawn at random, among the
    items of unseen names (the right one in green), and to free texts among all items; of items of one name, the best.
    """
    unseen = pairs.unseen.nonzero()[:, 0].tolist()
    asked = random.Random(seed).sample(unseen, min(7 if pairs.source == "icons" else 4, len(unseen)))
    features = encode(model.item_tower, items)
    rows: list[tuple[str, list[int], int | None]] = []
    for i, query in zip(asked, encode(model.name_tower, names[asked]), strict=True):
        rows.append((pairs.names[i], _best(features, pairs, query, pairs.test), i))
    for text, query in zip(free_texts, model.names(list(free_texts)), strict=True):
        rows.append((text, _best(features, pairs, query, torch.arange(len(pairs))), None))

    with figure(path, figsize=(13, 0.8 + 0.62 * (len(rows) + 2)), dpi=130) as whole:
        left, right = whole.add_gridspec(
            1, 2, width_ratios=(1, 2.6), wspace=0.1, left=0.05, right=0.985, top=0.93, bottom=0.07
        )
        top, bottom = left.subgridspec(2, 1, hspace=0.36)
        _curve(whole.add_subplot(top), losses)
        _bars(whole.add_subplot(bottom), ways, before, after, len(unseen))
        _answers(whole, right, rows, pairs, len(asked))


def _best(features: Tensor, pairs: Pairs, query: Tensor, among: Tensor) -> list[int]:
    """The most similar items with different names."""
    best: dict[int, int] = {}
    for i in among[(features[among] @ query).argsort(descending=True)[:200]].tolist():
        best.setdefault(int(pairs.ids[i]), i)
    return list(best.values())[:ANSWERS]


def _curve(axes: Any, losses: list[float]) -> None:
    axes.plot(range(1, len(losses) + 1), losses, color=BLUE, linewidth=2)
    axes.set_xlabel("step")
    plain(axes, "training loss")


def _bars(axes: Any, ways: dict[str, str], before: dict, after: dict, gallery: int) -> None:
    labels = [(way, k) for way in after for k in after[way]]
    heights = [100 * after[way][k] for way, k in labels]
    at = range(len(labels))
    axes.bar(at, heights, width=0.6, color=[BLUE if k == "1" else "#93b4f5" for _, k in labels])
    axes.bar(at, [100 * before[way][k] for way, k in labels], width=0.6, color=GREY)
    for x, height in zip(at, heights, strict=True):
        axes.annotate(f"{height:.1f}", (x, height), (0, 3), textcoords="offset points", ha="center", color=INK)
    ticks = [ways[way].replace("→ ", "→\n") + f" @{k}" for way, k in labels]
    axes.set_xticks(list(at), ticks, fontsize=7.5)
    axes.margins(y=0.12)
    axes.text(0.01, 0.99, "grey: before training", transform=axes.transAxes, va="top", color=GREY, fontsize=7.5)
    plain(axes, f"recall on {gallery:,} unseen names, %")


def _answers(
    whole: Figure, where: Any, rows: list[tuple[str, list[int], int | None]], pairs: Pairs, asked: int
) -> None:
    """One row a query, its answers beside it; a heading above each of the two groups."""
    heights = [0.45, *[1.0] * asked, 0.55, *[1.0] * (len(rows) - asked)]
    grid = where.subgridspec(
        len(heights), 1 + ANSWERS, height_ratios=heights, width_ratios=(1.25, *[1] * ANSWERS), hspace=0.18, wspace=0.06
    )
    pictures = pairs.source == "icons"
    kind = "icons" if pictures else "texts"
    _text(
        whole.add_subplot(grid[0, :]),
        f"unseen names, drawn at random  →  {kind} of unseen names",
        weight="bold",
        size=10,
    )
    _text(whole.add_subplot(grid[asked + 1, :]), f"free text  →  all {len(pairs):,} {kind}", weight="bold", size=10)
    for place, (query, answers, own) in enumerate(rows):
        line = place + 1 + (place >= asked)
        _text(whole.add_subplot(grid[line, 0]), textwrap.fill(f"“{query}”", 22, max_lines=3), size=9.5)
        for column, item in enumerate(answers, 1):
            name = int(pairs.ids[item])
            axes = whole.add_subplot(grid[line, column])
            if pictures:
                _icon(axes, pairs.items[item], pairs.names[name], name == own)
            else:
                shown = textwrap.fill(" ".join(str(pairs.items[item]).split()), 25, max_lines=4)
                _text(axes, shown, size=6.5, color=GREEN if name == own else INK)


def _icon(axes: Any, glyph: Tensor, name: str, right: bool) -> None:
    """A glyph, black on white, with its name beside it."""
    box = axes.inset_axes((0.0, 0.02, 0.36, 0.96))
    box.imshow(255 - glyph.numpy(), cmap="gray", vmin=0, vmax=255, interpolation="bilinear")
    box.set(xticks=[], yticks=[])
    for spine in box.spines.values():
        spine.set(edgecolor=GREEN if right else LIGHT, linewidth=2 if right else 0.8)
    axes.set_axis_off()
    text = textwrap.fill(name, 12, max_lines=3, break_long_words=False)
    axes.text(
        0.41, 0.5, text, va="center", ha="left", fontsize=7, color=GREEN if right else GREY, transform=axes.transAxes
    )


def _text(axes: Any, text: str, *, size: float, weight: str = "normal", color: str = INK) -> None:
    axes.set_axis_off()
    axes.text(
        0, 0.5, text, va="center", ha="left", fontsize=size, fontweight=weight, color=color, transform=axes.transAxes
    )
