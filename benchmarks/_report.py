"""Table, plot and JSON of benchmark rows, with the machine and the versions that they hold for."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import fastcontrast

from ._harness import OURS, Row

RIVALS = (
    "open_clip_torch", "sentence-transformers", "pytorch-metric-learning", "lightly", "torchvision",
    "memeff", "siglip-kernel", "inf-cl", "cut-cross-entropy", "liger-kernel", "xformers",
)  # fmt: skip


def progress(items: Sequence[Any], label: str) -> Iterator[Any]:
    """A tqdm bar that names the workload in hand; nothing without tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from items
        return
    with tqdm(total=len(items), desc=label, disable=not items or None) as bar:
        for item in items:
            bar.set_postfix_str(item.name)
            yield item
            bar.update()


# ------------------------------------------------------------------------------------------------------------- context


def machine() -> dict[str, Any]:
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = model.group(1) if model else platform.processor()
    except OSError:
        cpu = platform.processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    return {
        "cpu": cpu,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": cores,
        "ram_bytes": ram,
        "os": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str | None]:
    def installed(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastcontrast": fastcontrast.__version__,
        "compiler": _compiler(),
        "triton": installed("triton"),
        "cuda": torch.version.cuda,
        **{package: installed(package) for package in RIVALS},
    }


def _compiler() -> str | None:
    """The compiler that built the C++ core, which leaves its name in the library."""
    try:
        from fastcontrast import _C
    except ImportError:
        return None
    found = re.search(rb"(GCC: \([^)]*\) [\d.]+|clang version [\d.]+)", Path(_C.__file__).read_bytes())
    return found.group(1).decode() if found else None


def commit() -> dict[str, Any] | None:
    """Hash and whether tracked files differ from it, when the package runs from a git checkout or a build inside one;
    where there is no repository, what FASTCONTRAST_COMMIT says."""
    root = next((path for path in Path(fastcontrast.__file__).parents if (path / ".git").exists()), None)
    if root is None:
        told = os.environ.get("FASTCONTRAST_COMMIT")
        return {"commit": told, "dirty": None} if told else None

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return None


# --------------------------------------------------------------------------------------------------------------- table


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _memory(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.0f} MiB"


def _bar(bar: dict[str, Any]) -> str:
    if bar["value"] is None:
        return f"{bar['claim']}: not judged ({bar['reason']})"
    value = _memory(bar["value"]) if "MiB" in bar["claim"] else f"{bar['value']:.3g}"
    return f"{bar['claim']}: {'met' if bar['met'] else 'MISSED'} ({value})"


COLUMNS = ("workload", "provider", "median", "min", "reps", "× floor", "floor", "extra memory", "error", "bars, notes")


def _cells(row: Row) -> tuple[str, ...]:
    speed = _time(row.seconds) if row.status in ("ok", "floor") else row.status.upper()
    notes = "; ".join([_bar(bar) for bar in row.bars] + ([row.note] if row.note else []))
    return (
        row.workload,
        row.provider,
        speed,
        _time(row.min_seconds),
        str(row.reps or ""),
        "" if row.ratio is None else f"{row.ratio:.2f}",
        row.floor or "",
        _memory(row.peak_extra_bytes),
        "" if row.error is None else f"{row.error:.0e}",
        notes,
    )


def table(rows: Iterable[Row]) -> str:
    """Markdown, padded so that it reads as plain text too."""
    lines = [COLUMNS, *map(_cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]

    def text(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([text(lines[0]), text(["-" * width for width in widths]), *map(text, lines[1:])])


# ---------------------------------------------------------------------------------------------------------------- plot


def plot(op: str, rows: Sequence[Row], path: Path) -> str | None:
    """Time over floor, and extra memory, of each provider by workload. The reason if there is no plot."""
    try:
        from matplotlib.figure import Figure  # without pyplot: Agg, no display and no global state
    except ImportError:
        return "no plot: install matplotlib"
    shown = [row for row in rows if row.ratio is not None]
    if not shown:
        return "no plot: no provider was timed against a floor"
    positions, labels, y, workload = [], [], 0.0, None
    for row in shown:
        y += 1.0 if row.workload == workload else 1.8
        workload = row.workload
        positions.append(-y)
        labels.append(f"{row.workload}:  {row.provider}")
    colours = ["tab:blue" if row.provider.startswith(OURS) else "tab:gray" for row in shown]
    figure = Figure(figsize=(12, 1.2 + 0.24 * y), layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    ratios = [row.ratio for row in shown]
    time.barh(positions, ratios, color=colours)
    time.axvline(1, color="black", linewidth=1)
    time.set(xscale="log", xlabel="time / floor, both of this run", yticks=positions, yticklabels=labels)
    for position, row in zip(positions, shown, strict=True):
        time.annotate(f" {row.ratio:.2f}", (row.ratio, position), va="center", fontsize=8)
    # A logarithm has no place for 0: what is below a MiB is drawn as one.
    used = [(p, max(1.0, r.peak_extra_bytes / 2**20), c) for p, r, c in zip(positions, shown, colours, strict=True)
            if r.peak_extra_bytes is not None]  # fmt: skip
    if used:
        memory.barh([u[0] for u in used], [u[1] for u in used], color=[u[2] for u in used])
        memory.set(xscale="log", xlim=(1, 4 * max(10.0, *(u[1] for u in used))))
        for position, size, _ in used:
            memory.annotate(f" {size:.0f}", (size, position), va="center", fontsize=8)
    memory.set(xlabel="peak extra memory, MiB")
    time.set_xlim(min([*ratios, 0.5]), 2.5 * max([*ratios, 1.0]))
    figure.suptitle(f"{op}: {_where(op)}, torch {torch.__version__}")
    figure.savefig(path, dpi=120)
    return None


def _where(op: str) -> str:
    """The device that the rows hold for."""
    host = machine()
    if op.endswith(".cuda"):
        return f"{host['gpu']}, CUDA {torch.version.cuda}, Triton {versions()['triton']}"
    return f"{host['cpu']} ({host['vectors']}), {host['cores']} cores, {host['threads']} threads"


def differs(op: str, directory: str, *, quick: bool) -> str | None:
    """What keeps new rows from joining those that stand in the file: another machine, other versions, other sizes."""
    path = Path(directory) / f"{op}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    now = {"machine": machine(), "versions": versions(), "quick": quick}
    return next((what for what in now if before and before[what] != now[what]), None)


def _merged(before: Sequence[Row], now: Sequence[Row]) -> list[Row]:
    """Rows of `now` in the place of those of the same workload; of workloads that are new, at the end."""
    names = {row.workload for row in now}
    kept: list[Row] = []
    for old in before:
        if old.workload not in names:
            kept.append(old)
        elif all(row.workload != old.workload for row in kept):
            kept += [row for row in now if row.workload == old.workload]
    placed = {row.workload for row in kept}
    return kept + [row for row in now if row.workload not in placed]


def write(op: str, rows: Sequence[Row], directory: str, *, quick: bool, part: bool = False) -> None:
    """`<op>.json`, `<op>.md` and `<op>.png` in the directory, and the table on stdout.

    part: rows of some workloads alone, and those of others that stand in the file stay, where nothing `differs`. The
    record's date and commit are those of the others; under "again" it has those of the new rows.
    """
    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    now = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "git": commit()}
    record = {"op": op, **now, "quick": quick, "machine": machine(), "versions": versions()}
    path = out / f"{op}.json"
    if part and path.exists():
        before = json.loads(path.read_text())
        again = {**before.get("again", {}), **{row.workload: now for row in rows}}
        record |= {"date": before["date"], "git": before["git"], "again": again}
        rows = _merged([Row(**row) for row in before["rows"]], rows)
    record["rows"] = [dataclasses.asdict(row) for row in rows]
    text = table(rows)
    head = f"{_where(op)}; torch {torch.__version__}"
    bars = [bar for row in rows for bar in row.bars]
    count = {met: sum(bar["met"] is met for bar in bars) for met in (True, False, None)}
    foot = f"bars: {count[True]} met, {count[False]} MISSED, {count[None]} not judged"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    again = [f"{name}: {new['date']}" for name, new in record.get("again", {}).items()]
    dates = "; ".join([record["date"], *again])
    (out / f"{op}.md").write_text(f"# {op}\n\n{head}; {dates}\n\n{text}\n\n{foot}\n")
    reason = plot(op, rows, out / f"{op}.png")
    print(f"{head}\n\n{text}\n\n{foot}\nwritten to {out}/{op}.md, .png, .json{f' ({reason})' if reason else ''}")
