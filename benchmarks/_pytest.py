"""Workloads and providers under pytest-benchmark: a benchmark file's two hooks call `parametrise` and `measure`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from ._harness import Row, Workload, interleave, prepare


def parametrise(metafunc: Any, workloads: Callable[[bool], list[Workload]]) -> None:
    """One case a workload and provider; the quick sizes while benchmarks are disabled."""
    import pytest

    option = metafunc.config.getoption
    quick = option("benchmark_disable", False) and not option("benchmark_enable", False)
    ignore = pytest.mark.filterwarnings("ignore")  # rivals warn
    cases = [(w, name) for w in workloads(quick) if not w.alone for name in w.providers]
    metafunc.parametrize("case", [pytest.param(c, id=f"{c[0].name}-{c[1]}", marks=ignore) for c in cases])


def measure(benchmark: Any, case: tuple[Workload, str]) -> None:
    """Checks a provider, times it, and adds error, floor and ratio to pytest-benchmark's extra information."""
    import pytest

    workload, name = case
    provider, inputs = workload.providers[name], workload.inputs(workload.shape)
    row = Row("", workload.name, name)
    step, _ = prepare(workload, provider, inputs, row, lambda function: function(inputs)) or (None, 0)
    if row.status in ("missing", "skipped"):
        pytest.skip(f"{name}: {row.note}")
    assert row.status == "ok", row.note
    benchmark.extra_info["error"] = row.error
    if step is None:  # too slow for a second call
        benchmark.extra_info["seconds"] = row.seconds
        pytest.skip(f"{name}: one call took {row.seconds:.1f} s; see `fastcontrast bench`")
    if provider.reps:
        benchmark.pedantic(step, rounds=provider.reps)
    else:
        benchmark(step)
    floor = workload.floors.get(provider.floor or next(iter(workload.floors), ""))
    if floor is not None and not benchmark.disabled:
        steps = {variant: make(inputs) for variant, make in floor.variants.items()}
        calls = {variant: workload.calls_of(step, workload.seconds_of(step)) for variant, step in steps.items()}
        times = interleave(steps, calls, dict.fromkeys(steps, 3), workload.seconds_of)
        seconds = min(statistics.median(each) for each in times.values()) * floor.times
        benchmark.extra_info.update(floor_seconds=seconds, ratio=benchmark.stats.stats.median / seconds)
