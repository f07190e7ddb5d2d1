"""How benchmarks are declared, measured and judged. Knows nothing of any operation.

A file `benchmarks/<op>.py` has `workloads(quick) -> list[Workload]`, and for what does not fit a workload
`measurements`, functions `(quick, reps) -> list[Row]` by name. Rules that hold for every row:

- Correct first: each provider's outputs (loss and gradients) are compared with a float64 truth at the size that is
  timed. A provider beyond the tolerance is shown as wrong and gets no speed.
- Speed is a ratio: medians of repetitions that are interleaved, providers and bare floors shuffled in each round, so
  that a slow minute of the machine falls on all of them.
- The floor is the faster of its variants: beating a weak floor says nothing.
- Memory is the growth of a fresh process's high-water mark during one step, over what is resident when inputs exist
  and a step of tiny size has run, less the bytes of the step's outputs. On a GPU the allocator says the same of any
  step, in this process.
"""

from __future__ import annotations

import functools
import gc
import importlib
import math
import pkgutil
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from fastcontrast.testing import relative_error

from . import _cuda, _memory

Step = Callable[[], "tuple[torch.Tensor, ...] | None"]
OURS = "fastcontrast"  # how the names of our own providers begin
LEAST_SECONDS = 0.02  # a repetition shorter than this calls its step several times: timers and wake-ups cost µs


@dataclass(frozen=True)
class Provider:
    """One way to do the work: `make(inputs)` gives the step that is timed, whose outputs are checked.

    `make` raises ImportError if its package is not installed; the table then names it as missing.
    """

    make: Callable[[Any], Step]
    truth: Callable[[Any], tuple[torch.Tensor, ...]] | None = None  # where it differs from the workload's
    floor: str | None = None  # default: the workload's first
    reps: int | None = None  # at most; 1: the call that is checked is the one that is timed
    memory: int = 0  # processes in which the peak is measured; the median of them
    compiles: bool = False  # its first step at a size is no measure of time or memory
    needs: int = 0  # bytes beside the inputs; skipped, with this reason, where the machine has less available


@dataclass(frozen=True)
class Floor:
    """Bare work that no implementation can do without, in one or more `variants`; there is `times` as much of it."""

    variants: dict[str, Callable[[Any], Step]]
    times: float = 1


@dataclass(frozen=True)
class Bar:
    """What is claimed: `of` (a provider, or over a provider or floor) is at most, or at least, a number."""

    of: str
    over: str | None = None
    at_most: float | None = None
    at_least: float | None = None
    what: str = "seconds"  # or "peak_extra_bytes"

    def __str__(self) -> str:
        sign, limit = ("≤", self.at_most) if self.at_least is None else ("≥", self.at_least)
        if self.over:
            return f"{self.of} / {self.over} {sign} {limit:g}"
        shown = f"{limit / 2**20:.0f} MiB" if self.what == "peak_extra_bytes" else f"{limit:g} s"
        return f"{self.of} {sign} {shown}"

    def met(self, value: float) -> bool:
        return value <= self.at_most if self.at_least is None else value >= self.at_least


@dataclass(frozen=True)
class Workload:
    name: str
    shape: Any
    tiny: Any  # for the warm-up of a process whose memory is measured
    inputs: Callable[[Any], Any]
    truth: Callable[[Any], tuple[torch.Tensor, ...]]  # float64
    providers: dict[str, Provider]
    floors: dict[str, Floor]
    bars: tuple[Bar, ...] = ()
    reps: int | None = None
    tolerance: float = 1e-5
    alone: bool = False  # too long to repeat: each provider runs once, in the process that measures its memory
    device: str = "cpu"  # or "cuda"

    def seconds_of(self, step: Step, calls: int = 1) -> float:
        return _cuda.seconds_of(step, calls) if self.device == "cuda" else seconds_of(step, calls)

    def calls_of(self, step: Step, first: float) -> int:
        """Calls a repetition. `first`: seconds of the first call, believed if long; on a GPU it compiled kernels."""
        seconds = first if first > 0.5 and self.device == "cpu" else self.seconds_of(step)
        return min(1000, max(1, math.ceil(LEAST_SECONDS / max(seconds, 1e-9))))

    def available(self) -> int:
        return _cuda.available() if self.device == "cuda" else _memory.available()


@dataclass
class Row:
    op: str
    workload: str
    provider: str
    status: str = "ok"  # "floor", "wrong", "missing", "skipped", "failed"
    note: str = ""
    seconds: float | None = None  # median
    min_seconds: float | None = None
    reps: int = 0
    floor: str | None = None
    floor_seconds: float | None = None
    ratio: float | None = None  # seconds / floor_seconds
    peak_extra_bytes: int | None = None
    error: float | None = None  # largest relative error of an output against float64
    bars: list[dict] = field(default_factory=list)  # claim, value, met

    def timed(self, seconds: list[float], times: float = 1) -> None:
        self.seconds, self.min_seconds = statistics.median(seconds) * times, min(seconds) * times
        self.reps = len(seconds)

    def judge(self, bar: Bar, value: float | None, reason: str = "") -> None:
        met = None if value is None else bar.met(value)
        self.bars.append({"claim": str(bar), "value": value, "met": met, "reason": reason})


# ------------------------------------------------------------------------------------------------------ time and truth


def worst_error(outputs: Iterable[torch.Tensor], truth: Iterable[torch.Tensor]) -> float:
    """Largest ‖output − truth‖ / ‖truth‖; infinite where shapes, infinities or NaN disagree."""
    try:
        return max(relative_error(output, exact) for output, exact in zip(outputs, truth, strict=True))
    except (AssertionError, ValueError):
        return math.inf


def seconds_of(step: Step, calls: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def interleave(
    steps: dict[str, Step], calls: dict[str, int], reps: dict[str, int], clock: Callable = seconds_of
) -> dict[str, list[float]]:
    """Seconds a call of each step, in rounds over the steps that are still to be repeated, each in a new order."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for round in range(max(reps.values(), default=0)):
            shuffle(order)
            for name in order:
                if round < reps[name]:
                    times[name].append(clock(steps[name], calls[name]))
    finally:
        gc.enable()
    return times


def prepare(workload: Workload, provider: Provider, inputs: Any, row: Row, truth: Callable) -> tuple[Step, int] | None:
    """The step and its calls a repetition, if the provider can run and is right; the row says why if not."""
    available = workload.available()
    if provider.needs > available:
        row.status, row.note = "skipped", f"needs {provider.needs >> 20} MiB, {available >> 20} available"
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step = provider.make(inputs)
            start = time.perf_counter()
            outputs = step()
            seconds = time.perf_counter() - start
            if not _right(row, workload, worst_error(outputs, truth(provider.truth or workload.truth))):
                return None
            del outputs
            if provider.reps == 1:
                row.timed([seconds])
                return None
            return step, workload.calls_of(step, 0.0 if provider.compiles else seconds)
    except ImportError as error:
        row.status, row.note = "missing", str(error)
    except Exception as error:  # a rival that breaks is a result, and must not end the run
        row.status, row.note = "failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def run(workload: Workload, module: str, quick: bool, reps: int | None) -> list[Row]:
    """All rows of a workload: floors, then providers, with their bars."""
    op = module.rpartition(".")[2]
    usual = workload.reps or 7
    rows = {name: Row(op, workload.name, name) for name in workload.providers}
    times = _time(workload, rows, reps or (min(usual, 3) if quick else usual))
    floors: dict[str, Row] = {}
    floor_rows = []
    for group, floor in workload.floors.items():
        variants = [Row(op, workload.name, f"{group}, {variant}", "floor") for variant in floor.variants]
        for row in variants:
            row.timed(times[row.provider], floor.times)
            row.note = f"{floor.times:.3g} × the seconds of 1/{floor.times:.3g} of it" if floor.times != 1 else ""
        floors[group] = min(variants, key=lambda row: row.seconds)
        floor_rows += variants
    for name, row in rows.items():
        if times.get(name):
            row.timed(times[name])
        provider = workload.providers[name]
        if workload.alone or (provider.memory and row.status == "ok" and workload.device == "cpu"):
            _measure_alone(row, workload, module, quick)
        if row.seconds is not None and floors:
            row.floor = provider.floor or next(iter(floors))
            row.floor_seconds = floors[row.floor].seconds
            row.ratio = row.seconds / row.floor_seconds
    for bar in workload.bars:
        _judge(bar, rows, floors)
    return [*floor_rows, *rows.values()]


def _time(workload: Workload, rows: dict[str, Row], most: int) -> dict[str, list[float]]:
    """Seconds of the floors and of the providers that are right, interleaved."""
    inputs = workload.inputs(workload.shape)
    truth = functools.cache(lambda function: function(inputs))
    steps, calls, reps = {}, {}, {}
    for group, floor in workload.floors.items():
        for variant, make in floor.variants.items():
            step, name = make(inputs), f"{group}, {variant}"
            steps[name], calls[name] = step, workload.calls_of(step, workload.seconds_of(step))
            reps[name] = 2 if workload.alone else most
    for name, provider in workload.providers.items():
        if not workload.alone and (prepared := prepare(workload, provider, inputs, rows[name], truth)):
            steps[name], calls[name] = prepared
            reps[name] = min(most, provider.reps or most)
    times = interleave(steps, calls, reps, workload.seconds_of)
    if workload.device == "cuda":
        for name, row in rows.items():
            if workload.providers[name].memory and name in steps:
                row.peak_extra_bytes = _cuda.peak_of(steps[name])
    return times


def _measure_alone(row: Row, workload: Workload, module: str, quick: bool) -> None:
    try:
        processes = 1 if quick else workload.providers[row.provider].memory or 1
        runs = [_memory.in_fresh_process(module, workload.name, row.provider, quick) for _ in range(processes)]
    except RuntimeError as error:
        row.status, row.note = ("failed" if workload.alone else row.status), f"in a process of its own: {error}"
        return
    row.peak_extra_bytes = int(statistics.median(run["peak_extra_bytes"] for run in runs))
    if workload.alone and _right(row, workload, max(run["error"] for run in runs)):
        row.timed([run["seconds"] for run in runs])


def _right(row: Row, workload: Workload, error: float) -> bool:
    row.error = error
    if error <= workload.tolerance:
        return True
    row.status, row.note = "wrong", f"error {error:.1e} > {workload.tolerance:.0e}"
    return False


def _judge(bar: Bar, rows: dict[str, Row], floors: dict[str, Row]) -> None:
    row = rows[bar.of] if bar.of.startswith(OURS) or bar.over not in rows else rows[bar.over]
    values = []
    for name in (bar.of, bar.over) if bar.over else (bar.of,):
        other = rows.get(name) or floors[name]
        value = getattr(other, bar.what)
        if value is None:
            return row.judge(bar, None, f"{name} {other.status}")
        values.append(value)
    if not bar.over:
        return row.judge(bar, values[0])
    least = 1 << 20 if bar.what == "peak_extra_bytes" else 0.0  # less memory is not told from none
    return row.judge(bar, values[0] / max(values[1], least))


# -------------------------------------------------------------------------------------------------------- command line


def operations() -> list[str]:
    package = importlib.import_module("fastcontrast.benchmarks")
    return [module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")]


def configure(parser: Any) -> None:
    """Arguments of `fastcontrast bench`."""
    import argparse

    parser.add_argument("ops", nargs="*", metavar="OP", help=f"default: all ({', '.join(operations())})")
    parser.add_argument("--quick", action="store_true", help="small sizes, few repetitions: under a minute")
    parser.add_argument("--output", default="bench-output", metavar="DIR", help="for table, plot, JSON (%(default)s)")
    parser.add_argument("--reps", type=int, metavar="N", help="repetitions (7, fewer where a step takes seconds)")
    parser.add_argument("--gpu", action="store_true", help="on the CUDA device instead; writes OP.cuda.json")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="begin no workload after so long; name those left out"
    )
    parser.add_argument(
        "--only", metavar="TEXT", help="only workloads whose name contains this; results of others stay in the output"
    )
    parser.add_argument(
        "--large", action=argparse.BooleanOptionalAction, help="workloads of minutes a step (default unless --quick)"
    )


def main(args: Any) -> int:
    """Runs the benchmarks; 1 if an implementation of ours is wrong or failed, 0 otherwise, bars missed or not."""
    known = operations()
    if unknown := sorted(set(args.ops) - set(known)):
        print(f"bench: OP must be among {', '.join(known)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    if args.gpu and not torch.cuda.is_available():
        print("bench: --gpu needs a CUDA device, torch sees none", file=sys.stderr)
        return 2
    from . import _report

    for op in (args.ops or known) if args.only else ():
        what = _report.differs(f"{op}.cuda" if args.gpu else op, args.output, quick=args.quick)
        if what:
            print(f"bench: {args.output} has results of {op} whose {what} differs: --output another", file=sys.stderr)
            return 2
    until = math.inf if args.seconds is None else time.monotonic() + args.seconds
    wrong = [op for op in args.ops or known if not _run_op(op, args, until)]
    return 1 if wrong else 0


def _run_op(op: str, args: Any, until: float) -> bool:
    """Runs and reports one operation's workloads; whether all of ours was right."""
    from . import _gpu, _report

    name, results = f"fastcontrast.benchmarks.{op}", f"{op}.cuda" if args.gpu else op
    module = importlib.import_module(name)
    only, large = args.only or "", not args.quick if args.large is None else args.large
    workloads = _gpu.workloads(op, args.quick) if args.gpu else module.workloads(args.quick)
    workloads = [w for w in workloads if only in w.name and (large or not w.alone)]
    rows: list[Row] = []
    try:
        for workload in _report.progress(workloads, op):
            if time.monotonic() > until:
                rows.append(Row(op, workload.name, "", "skipped", f"the run's {args.seconds:g} s were over"))
            else:
                rows += run(workload, name, args.quick, args.reps)
        measurements = _gpu.measurements(op) if args.gpu else getattr(module, "measurements", {})
        for label, measure in measurements.items():
            if only in label:
                rows += measure(args.quick, args.reps)
    finally:  # who interrupts a long run keeps what it has measured
        if rows:
            _report.write(results, rows, args.output, quick=args.quick, part=bool(only))
    return not any(row.provider.startswith(OURS) and row.status in ("wrong", "failed") for row in rows)
