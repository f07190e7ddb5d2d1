"""The one place that picks an implementation, and can say why not the others.

An operation registers its implementations in order of preference, each with a function that returns the reason why it
cannot serve a device and dtype, or None if it can. `reference` is always last and never refuses.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

try:
    import fastcontrast._C as native

    native_missing = None
except ImportError as error:  # built without a compiler: everything runs on the reference path, and says so
    native = None
    native_missing = f"the C++ core is not built ({error}); install a C++17 compiler and reinstall fastcontrast"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # set, like for Triton, before the import

Refusal = Callable[[torch.device, torch.dtype], "str | None"]

_registry: dict[str, dict[str, Refusal]] = {}
_through: dict[str, str] = {}
_partial: dict[tuple[str, str], str] = {}
_traces: list[list[Choice]] = []
_settled: dict[tuple[str, torch.device, torch.dtype], Choice] = {}  # what to run unasked: no process changes its mind


class Choice(NamedTuple):
    """Which implementation of `op` ran, and why those preferred to it did not."""

    op: str
    implementation: str
    refused: dict[str, str]


def register(op: str, implementations: dict[str, Refusal], partial: dict[str, str] | None = None) -> None:
    """Implementations of `op` in order of preference; `reference` is added behind them.

    `partial` says of those that serve some problems only, by `also` of `select`, which these are.
    """
    _registry[op] = {**implementations, "reference": lambda device, dtype: None}
    _settled.clear()
    _partial.update({(op, name): problems for name, problems in (partial or {}).items()})


def register_through(op: str, other: str) -> None:
    """`op` has no kernels of its own: it runs on those of `other`, where and when they do."""
    _registry[op], _through[op] = _registry[other], other


def operations() -> list[str]:
    return sorted(_registry)


def runs_through(op: str) -> str | None:
    """The operation on whose implementations `op` runs, if it has none of its own."""
    return _through.get(op)


def serves(op: str, implementation: str) -> str | None:
    """Which problems an implementation serves, if not all that its device and dtype admit."""
    return _partial.get((op, implementation))


def explain(op: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str | None]:
    """For each implementation of `op`, in order of preference: None if it can run here, or the reason why not."""
    device = torch.device(device)
    return {name: refuse(device, dtype) for name, refuse in _registry[op].items()}


def select(
    op: str,
    implementation: str | None,
    device: torch.device,
    dtype: torch.dtype,
    also: Callable[[str], str | None] | None = None,
) -> Choice:
    """What to run. A requested implementation that cannot run raises NotImplementedError with its reason.

    `also` gives the reason, if any, why an implementation of that name cannot serve this very problem.
    """
    unasked = implementation is None and also is None and not torch.compiler.is_compiling()
    if unasked and (choice := _settled.get((op, device, dtype))) is not None:
        return choice
    table = _registry[op]

    def reason(name: str) -> str | None:
        if (why := table[name](device, dtype)) is not None or also is None:
            return why
        return also(name)

    if implementation is not None:
        if implementation not in table:
            raise ValueError(f"{op}: implementation must be one of {', '.join(table)} or None, got {implementation!r}")
        if (why := reason(implementation)) is not None:
            raise NotImplementedError(f"{op}: implementation {implementation!r} cannot run: {why}")
        return Choice(op, implementation, {})
    refused = {}
    for name in table:
        if (why := reason(name)) is None:
            break
        refused[name] = why
    choice = Choice(op, name, refused)
    if unasked:
        _settled[op, device, dtype] = choice
    return choice


def note(choice: Choice) -> str:
    """Records for `trace` that `choice` runs, and returns its implementation's name."""
    if _traces and not torch.compiler.is_compiling():
        for trace in _traces:
            trace.append(choice._replace(refused=dict(choice.refused)))  # whoever reads it may change it
    return choice.implementation


def choose(op: str, implementation: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """Name of the implementation to run, noted for `trace`."""
    return note(select(op, implementation, device, dtype))


@contextlib.contextmanager
def trace() -> Iterator[list[Choice]]:
    """Collects what ran: `with fastcontrast.ops.trace() as ran: loss(...)`, then `ran[0].implementation`."""
    choices: list[Choice] = []
    _traces.append(choices)
    try:
        yield choices
    finally:
        _traces[:] = [other for other in _traces if other is not choices]


def refuse_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    """Reason why a C++ CPU kernel cannot run, shared by the operations that have one."""
    if device.type != "cpu":
        return f"it runs on cpu tensors, these are on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
    return native_missing


def refuse_torch(device: torch.device, dtype: torch.dtype) -> str | None:
    """A schedule of library calls alone runs wherever torch does."""
    return None


def refuse_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Reason why a Triton kernel cannot run, shared by the operations that have one."""
    if not INTERPRETED and device.type != "cuda":
        return f"it runs on cuda tensors, these are on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "torch sees no cuda device"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"it needs compute capability 8.0, the device has {'.'.join(map(str, capability))}"
    return None
