"""Models of which every rank holds a replica or a shard: when gradients are reduced, and what else ranks exchange."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any
from weakref import WeakSet

from torch import nn

_QUIET: WeakSet[nn.Module] = WeakSet()  # sharded modules under `no_sync`; FSDP2 tells nobody what was set


def no_sync(model: Any, on: bool = True) -> ExitStack:
    """Inside, gradients stay on their rank: `no_sync()` of DistributedDataParallel, `set_requires_gradient_sync(False)`
    of FSDP2, wherever they stand in the model. It nests."""
    stack = ExitStack()
    for module in reducers(model) if on else ():
        stack.enter_context(module.no_sync() if hasattr(module, "no_sync") else _unreduced(module))
    return stack


def reducers(model: Any) -> Iterator[Any]:
    """The outermost modules that reduce gradients over ranks."""
    if hasattr(model, "no_sync") or hasattr(model, "set_requires_gradient_sync"):
        yield model
    elif isinstance(model, nn.Module):
        for child in model.children():
            yield from reducers(child)


def arms(model: Any) -> bool:
    """Whether a backward reduces gradients only where its forward already ran outside `no_sync`."""
    return any(hasattr(module, "no_sync") for module in reducers(model))


def learns_graph(model: Any) -> bool:
    """DistributedDataParallel(static_graph=True) learns from its first backward which gradients come, and reduces then
    whether inside `no_sync` or not: that backward has to be outside."""
    found = (m for m in reducers(model) if getattr(m, "static_graph", False))
    return any(not getattr(m, "_static_graph_delay_allreduce_enqueued", True) for m in found)


def share_buffers(model: Any) -> None:
    """DistributedDataParallel's broadcast of rank 0's buffers, before the forward that would do it: what is copied of
    them for a second encoding is what the first one sees, and an encoding that fails half-way can start again alone."""
    for module in reducers(model):
        if hasattr(module, "_check_sync_bufs_pre_fwd") and module._check_sync_bufs_pre_fwd():
            module._sync_buffers()
            module.require_forward_param_sync = False


def collective(modules: list[nn.Module]) -> bool:
    """Whether a forward exchanges data with other ranks, so that all ranks must encode equally often: parameters that
    lie in shards (FSDP2 and 1, tensor parallel), BatchNorm over ranks."""
    inside = list(chain.from_iterable(m.modules() for m in modules))
    if any(hasattr(p, "to_local") for m in modules for p in m.parameters()):
        return True
    return any((isinstance(m, nn.SyncBatchNorm) and m.training) or hasattr(m, "_fsdp_wrapped_module") for m in inside)


@contextmanager
def _unreduced(module: Any) -> Iterator[None]:
    if module in _QUIET:
        yield
        return
    _QUIET.add(module)
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)
        _QUIET.discard(module)
