"""Clock and memory of a CUDA device, for workloads that run on one."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ._harness import Step


def seconds_of(step: Step, calls: int = 1) -> float:
    """Seconds a call, from events on the stream: what the device took, or the host where it could not keep up."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def available() -> int:
    """Bytes that the device has free, and those that torch holds without using them."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def peak_of(step: Step) -> int:
    """Bytes that a step allocated at its height beyond what was there and beyond its outputs."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = step()
    torch.cuda.synchronize()
    grown = torch.cuda.max_memory_allocated() - before
    return max(0, grown - sum(x.nbytes for x in outputs))
