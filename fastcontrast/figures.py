"""What the pictures of all commands share: colours, letters, plain axes. Matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, LIGHT, BLUE, GREEN, ORANGE = "#1b1f24", "#6b7280", "#d8dce2", "#2563eb", "#15a34a", "#d97706"
STYLE = {
    "font.family": "DejaVu Sans", "text.color": INK, "axes.edgecolor": LIGHT, "axes.labelcolor": GREY,
    "xtick.color": GREY, "ytick.color": GREY, "font.size": 9,
}  # fmt: skip


@contextmanager
def figure(path: Path, **options: Any) -> Iterator[Figure]:
    """A white figure, written to `path` in the end; `options` are those of matplotlib's Figure."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # Agg by itself: pyplot's backend stays as it is
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        whole = Figure(facecolor="white", **options)
        FigureCanvasAgg(whole)
        yield whole
        whole.savefig(path)


def plain(axes: Axes, title: str, grid: str | None = "y") -> None:
    """A title on the left, two spines, no ticks, and lines behind the data at the values of axis `grid`."""
    axes.set_title(title, loc="left", fontweight="bold", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=LIGHT, linewidth=0.6)
