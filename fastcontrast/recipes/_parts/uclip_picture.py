"""What icons foreign words find."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastcontrast.figures import GREEN, LIGHT

from .uclip_data import World

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

ROWS, ANSWERS = 7, 8


def draw(world: World, queries: Tensor, gallery: Tensor, panel: SubFigure) -> None:  # [Q, D], [N, D]
    """Some questions, evenly drawn, and the icons most similar to each; those that have its name in green."""
    asked = [i * len(world.questions) // ROWS for i in range(min(ROWS, len(world.questions)))]
    axes = panel.subplots(len(asked), ANSWERS, squeeze=False)
    for line, i in zip(axes, asked, strict=True):
        language, text, name = world.questions[i]
        found = (gallery @ queries[i]).topk(min(ANSWERS, len(gallery))).indices.tolist()
        for ax in line:
            ax.set_axis_off()
        for ax, item in zip(line, found, strict=False):
            ax.set_axis_on()
            ax.set(xticks=[], yticks=[])
            ax.imshow(255 - world.icons.glyphs[item].numpy(), cmap="gray", vmin=0, vmax=255)
            right = int(world.icons.ids[item]) == name
            for spine in ax.spines.values():
                spine.set(color=GREEN if right else LIGHT, linewidth=2.5 if right else 1)
        line[0].set_title(f"{text} ({language}: {world.icons.names[name]})", loc="left", fontsize=9)
