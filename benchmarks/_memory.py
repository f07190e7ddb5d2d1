"""Peak memory of one step, in a process of its own."""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ._harness import Step


def available() -> int:
    """Bytes that can be had without swapping; all there are where the system does not say."""
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def resident() -> tuple[int, int]:
    """Resident bytes and their high-water mark, now.

    Not ru_maxrss on Linux: it survives exec, so that a child starts with the mark of the process that forked it.
    """
    try:
        with open("/proc/self/status") as lines:
            status = dict(line.split(":", 1) for line in lines)
        return int(status["VmRSS"].split()[0]) << 10, int(status["VmHWM"].split()[0]) << 10
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return peak, peak


def peak_of(step: Step) -> tuple[int, tuple[torch.Tensor, ...], float]:
    """Bytes by which a step grew the process beyond what was there and beyond its outputs; the outputs; its seconds."""
    gc.collect()
    try:
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # the high-water mark falls to what is resident now
        before = resident()[0]
    except OSError:
        before = resident()[1]
    start = time.perf_counter()
    outputs = step()
    seconds = time.perf_counter() - start
    grown = resident()[1] - before
    return max(0, grown - sum(x.nbytes for x in outputs)), outputs, seconds


def child(module: str, name: str, provider_name: str, quick: bool, threads: int) -> None:
    """In the fresh process: a step of tiny size, then the one measured; prints a line of JSON."""
    from ._harness import worst_error

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    workload = next(w for w in importlib.import_module(module).workloads(quick) if w.name == name)
    provider = workload.providers[provider_name]
    provider.make(workload.inputs(workload.tiny))()
    inputs = workload.inputs(workload.shape)
    step = provider.make(inputs)
    if provider.compiles:
        step()
    grown, outputs, seconds = peak_of(step)
    result = {"peak_extra_bytes": grown, "seconds": seconds}
    if workload.alone:
        result["error"] = worst_error(outputs, (provider.truth or workload.truth)(inputs))
    print(json.dumps(result))


def in_fresh_process(module: str, workload: str, provider: str, quick: bool) -> dict[str, Any]:
    """What `child` found; RuntimeError with its last words if it failed."""
    arguments = (module, workload, provider, quick, torch.get_num_threads())
    code = f"from fastcontrast.benchmarks._memory import child; child(*{arguments!r})"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])
