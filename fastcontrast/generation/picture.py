"""The comparison's picture: how diverse and how likely each way of decoding writes, and how fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastcontrast.figures import BLUE, GREEN, GREY, ORANGE, figure, plain

COLOURS = (GREY, "#93b4f5", ORANGE, GREEN, BLUE, "#9333ea")


def draw(path: Path, results: dict[str, Any]) -> None:
    """Writes a PNG. Left: a point a way of decoding, diversity over perplexity. Right: tokens a second, with memory."""
    rows = results["methods"]
    colours = dict(zip(rows, COLOURS * (1 + len(rows) // len(COLOURS)), strict=False))
    with figure(path, figsize=(11, 3.9), dpi=130, layout="constrained") as whole:
        left, right = whole.subplots(1, 2, width_ratios=(1.35, 1))
        _points(left, rows, colours)
        _bars(right, {name: row for name, row in rows.items() if row["seconds"] is not None}, colours)
        whole.suptitle(
            f"{results['model']}: {len(results['prompts'])} prompts of {results['prompt_tokens']} tokens, "
            f"{results['tokens']} new ones, {results['dtype']} on {results['device']}, threads: {results['threads']}",
            fontsize=8, color=GREY, x=0.01, ha="left",
        )  # fmt: skip


def _points(axes: Any, rows: dict[str, dict], colours: dict[str, str]) -> None:
    together: dict[tuple[float, float], list[str]] = {}  # ways that write the same text share a point
    for name, row in rows.items():
        together.setdefault((round(row["perplexity"], 3), round(row["diversity"], 4)), []).append(name)
    middle = sorted(x for x, _ in together)[len(together) // 2]
    for (x, y), names in together.items():
        axes.scatter([x], [y], s=70, color=colours[names[-1]], zorder=3)
        side = ("left", 9) if x <= middle else ("right", -9)  # labels stay inside
        axes.annotate(
            ",\n".join(names), (x, y), (side[1], -3), textcoords="offset points", ha=side[0], va="top", fontsize=8
        )
    axes.set_xscale("log")
    axes.set_xlabel("perplexity under the model")
    axes.set_ylabel("diversity")
    axes.margins(0.14)
    low, high = axes.get_xlim()  # the scale's own ticks are powers of ten: one, here
    ticks = [x * 10**power for power in range(6) for x in (1, 2, 3, 5) if low < x * 10**power < high]
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
    axes.minorticks_off()
    plain(axes, "diversity over perplexity", grid="both")


def _bars(axes: Any, rows: dict[str, dict], colours: dict[str, str]) -> None:
    speeds = [row["tokens_per_second"] for row in rows.values()]
    at = range(len(rows))
    axes.barh(at, speeds, height=0.6, color=[colours[name] for name in rows])
    for y, (speed, row) in enumerate(zip(speeds, rows.values(), strict=True)):
        axes.annotate(
            f"{speed:.1f}, {row['peak_mib']:.0f} MiB", (speed, y), (4, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks(list(at), list(rows))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max(speeds))
    plain(axes, "tokens a second, memory beyond the weights", grid=None)
