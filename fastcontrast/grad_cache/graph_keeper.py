"""Which graphs of GradCache's first pass may stay in memory: one decision a chunk, and the reason for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

# "auto" spends at most this share of the memory that is free when the step starts: the rest stays for the loss, for
# the backward's temporaries, and for encoding again what was not kept.
KEEP_FRACTION = 0.5

# Where the kernel keeps a memory group's limit, its usage, and the page cache in it that would give way, by version.
_CGROUP = {
    "": ("/sys/fs/cgroup", "memory.max", "memory.current", "\ninactive_file"),
    "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


# What allocators without an error class of their own say: host, MPS, cuBLAS and cuDNN handles.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or (isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY))


class GraphKeeper:
    """The state of one step. `keep` is an int or "auto"; `ceiling` bounds "auto" after an earlier out of memory.

    A model's kept graphs are its first ones: after a refusal no later chunk is kept. So the second pass goes through
    chunks in order whatever is kept, no kept graph waits while another chunk is encoded again, and gradients, sums over
    chunks, do not depend in their last bits on how much memory was free."""

    def __init__(self, keep: int | str, ceiling: int | None, modules: Sequence[nn.Module]) -> None:
        self.auto = keep == "auto"
        self.limit: float = keep if not self.auto else inf if ceiling is None else ceiling
        self.modules = modules
        self.budget: dict[torch.device, int] = {}
        self.floor: dict[torch.device, int] = {}  # free memory that must be left
        self.need: Counter[torch.device] = Counter()  # one graph of the present model
        self.used: Counter[torch.device] = Counter()
        self.states: list[Any] = []  # whose `kept` holds representations with their graph
        self.largest = 0
        self.reason = ""
        self.rewritten = self.blind = self.failed = self.refused = self.exchanges = False

    def open(self, devices: Iterable[torch.device], exchanges: bool = False) -> None:
        """A model comes; `exchanges`: its forward needs other ranks. Devices seen for the first time get a budget;
        gradients not allocated yet are not free."""
        self.rewritten, self.blind, self.refused, self.need = False, False, False, Counter()
        self.exchanges = exchanges
        new = [d for d in devices if self.auto and d not in self.budget]
        params = {p for m in self.modules for p in m.parameters() if p.requires_grad and p.grad is None} if new else ()
        for d in new:
            free = free_bytes(d)
            self.budget[d] = int(KEEP_FRACTION * max(0, free - sum(p.nbytes for p in params if p.device == d)))
            self.floor[d] = free - self.budget[d]

    def meter(self, inputs: Iterable[Tensor]) -> saved_tensors_hooks:
        """Counts in `need` the bytes that autograd saves: each storage once, without parameters, buffers and inputs."""
        inside = (t for m in self.modules for t in chain(m.parameters(), m.buffers()))
        seen = {t.untyped_storage().data_ptr() for t in chain(inside, inputs)}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                self.need[t.device] += storage.nbytes()
            return t

        return saved_tensors_hooks(pack, lambda t: t)

    def fits(self, armed: bool, held: bool = False) -> bool:
        """May one more graph stay? `armed`: the chunk must be encoded last; `held`: its graph is already in memory."""
        self.largest = max(self.largest, self.need.total())
        if not self.refused:
            refusal = self._refusal(armed, held)
            self.reason, self.refused = self.reason or refusal, bool(refusal)
        return not self.refused

    def _refusal(self, armed: bool, held: bool) -> str:
        if len(self.states) >= self.limit:
            return f"at most {self.limit} since a step ran out of memory" if self.auto else f"keep_graphs={self.limit}"
        if armed:
            return "a chunk of a model with no_sync that arms its gradient reduction is encoded again"
        if self.auto and self.exchanges:
            return "the forward needs all ranks, which may keep different graphs; keep_graphs takes a number, too"
        if self.auto and self.rewritten:
            return "the forward rewrites a floating-point buffer in place, which a kept graph may have saved"
        if self.blind:
            return "the model forbids saved tensor hooks, which measure its graphs; keep_graphs takes a number, too"
        for d, n in self.need.items():
            budget = self.budget.get(d, 0)
            left = budget - self.used[d]
            if n > left:
                return f"the next graph needs {n >> 20} MiB on {d}, of {budget >> 20} MiB {max(0, left) >> 20} are left"
            # What the meter cannot see (checkpointed inputs, other processes) shows in what is free now.
            if free_bytes(d) - (0 if held else n) < self.floor[d]:
                return f"less than {self.floor[d] >> 20} MiB would stay free on {d}"
        return ""

    def take(self, state: Any, out: Any) -> None:
        state.kept, state.once = out, True
        self.states.append(state)
        self.used.update(self.need)

    @property
    def holds(self) -> bool:
        return any(state.kept is not None for state in self.states)

    def surrender(self) -> int:
        """Out of memory: drop every kept graph that is left. Returns how many later steps may try."""
        count = len(self.states)
        for state in self.states:
            state.once = state.kept is None  # its backward is done
        self.forget()
        self.limit, self.failed = 0, True
        self.reason = f"out of memory with {count} graphs kept: all dropped"
        return count // 2

    def release(self) -> None:
        """Give what a failed forward left in the allocators back, once nothing refers to it."""
        for d in self.budget:
            if d.type != "cpu":
                torch.get_device_module(d).empty_cache()

    def forget(self) -> None:
        for state in self.states:
            state.kept = None
        self.states.clear()

    @property
    def budget_bytes(self) -> int:
        """Of the devices where graphs live."""
        return sum(n for d, n in self.budget.items() if d in self.need or d in self.used)

    def why(self) -> str:
        if not self.auto:
            return self.reason or f"keep_graphs={self.limit}"
        return f"auto: {self.reason or ('every graph fits' if self.states else 'no model trains')}"


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still have on a device; 0 where nobody tells."""
    if device.type == "cpu":
        return min(_host_free())
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return 0
    return module.mem_get_info(device)[0] + module.memory_reserved(device) - module.memory_allocated(device)


def _host_free() -> Iterator[int]:
    """What the machine, and each memory group above this process, has left; page cache counts as free."""
    try:
        yield int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) << 10
        groups = [line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except (OSError, IndexError):
        yield 0
        return
    for kinds, path in groups:
        if kinds in _CGROUP:
            yield from _group_free(path, *_CGROUP[kinds])


def _group_free(path: str, root: str, limit: str, usage: str, cache: str) -> Iterator[int]:
    for place in [*(folder := Path(root + path)).parents, folder]:
        try:
            most, used = int((place / limit).read_text()), int((place / usage).read_text())
            yield most - used + int((place / "memory.stat").read_text().split(cache)[1].split()[0])
        except (OSError, IndexError, ValueError):  # no such group here, or no limit ("max")
            continue
