"""How many bytes an operation may spend on what it could also compute again, and where large CPU buffers come from."""

from __future__ import annotations

import itertools
import math
import os
import threading
import weakref

import torch
from torch import Tensor

from ._dispatch import native

MIB = 1 << 20
POOLED_RESULTS = range(4 * MIB, 1024 * MIB + 1)  # bytes of results: more would hurt as idle memory
POOLED_FROM = MIB  # smaller buffers come back from malloc without a page fault
# Bytes of the machine's memory; a guess where no system call tells.
MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8192 * MIB
_default = {"cpu": 64 * MIB, "cuda": 512 * MIB}
_chosen: int | None = None


def set_workspace(bytes: int | None) -> None:
    """Bytes that each operation may spend on temporary tiles and kept logits; None restores the default
    (64 MiB on a CPU, 512 MiB on a GPU). More of it means fewer products computed twice, never another result.

    On a CPU the memory of the last workspace and of large results stays with the process for the next call, up to an
    eighth of the machine's; any call of this function frees it.
    """
    global _chosen
    if bytes is not None and bytes < 0:
        raise ValueError(f"set_workspace: bytes must be at least 0, got {bytes}")
    _chosen = bytes
    _pool.clear()


def workspace_bytes(workspace: int | None, device: torch.device, usual: int = 0) -> int:
    """The argument of a call, else what `set_workspace` said, else the default of the device, but at least `usual`."""
    if workspace is not None:
        return workspace
    return _chosen if _chosen is not None else max(usual, _default.get(device.type, _default["cpu"]))


class _Pool:
    """Large float32 buffers that are used again.

    The first write to fresh memory costs a page fault every 4 KiB, on a virtual machine more than the matrix product
    that a kept logit saves: 256 MiB of them took 0.1 to 0.5 s, where a product of N = 8,192, D = 512 takes 0.4 s.
    A buffer comes back when the last tensor on it dies. At most `SPARE` stay, the last ones that are no more than an
    eighth of the machine's memory together: of the largest ones, those of a job that is over would never leave.
    """

    SPARE = 8  # kept logits of two heads, or of one and a tile; gradients; an attention's output and its gradients
    IDLE = MEMORY // 8  # bytes

    def __init__(self) -> None:
        # Re-entrant: garbage collected while it is held may contain a tensor whose buffer then comes back.
        self._lock = threading.RLock()
        self._free: list[Tensor] = []  # last ones first

    def take(self, numel: int) -> Tensor:
        """A flat float32 buffer with undefined contents."""
        with self._lock:
            fitting = [block for block in self._free if numel <= block.numel() <= 2 * numel]
            block = min(fitting, key=Tensor.numel, default=None)
            if block is not None:
                self._free = [other for other in self._free if other is not block]
        if block is None:
            block = torch.empty(numel, dtype=torch.float32)
            if native is not None:
                native.huge_pages(block.data_ptr(), block.nbytes)
        # The tensor owns the view, and the view's death says that no tensor uses the block any more.
        view = memoryview(block.numpy())
        weakref.finalize(view, self._give_back, block).atexit = False
        return torch.frombuffer(view, dtype=torch.float32, count=numel)

    def _give_back(self, block: Tensor) -> None:
        with self._lock:
            if block.nbytes > self.IDLE:
                return
            last = [block, *self._free][: self.SPARE]
            idle = itertools.accumulate(block.nbytes for block in last)
            self._free = [block for block, bytes in zip(last, idle, strict=True) if bytes <= self.IDLE]

    def clear(self) -> None:
        with self._lock:
            self._free = []


_pool = _Pool()


def buffer(numel: int) -> Tensor:
    """A flat float32 CPU buffer with undefined contents, [numel]."""
    return torch.empty(numel, dtype=torch.float32) if numel * 4 < POOLED_FROM else _pool.take(numel)


def _pooled(like: Tensor, numel: int) -> bool:
    """Whether so many numbers come from the pool: of a large float32 result on a CPU, that no compiler sees."""
    if native is None or like.device.type != "cpu" or like.dtype != torch.float32:
        return False
    return numel * 4 in POOLED_RESULTS and not torch.compiler.is_compiling()


def empty(like: Tensor, *shape: int) -> Tensor:
    """`like.new_empty(*shape)`, where it is large from the pool of buffers."""
    numel = math.prod(shape)
    return buffer(numel).view(shape) if _pooled(like, numel) else like.new_empty(shape)


def empty_like(x: Tensor) -> Tensor:
    """`torch.empty_like(x)`, where it is large from the pool of buffers."""
    if not _pooled(x, x.numel()):
        return torch.empty_like(x)
    return buffer(x.numel()).as_strided(x.shape, torch.empty_like(x, device="meta").stride())
