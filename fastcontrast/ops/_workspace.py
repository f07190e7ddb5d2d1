"""How many bytes an operation may spend on what it could also compute again."""

from __future__ import annotations

import torch

MIB = 1 << 20
_default = {"cpu": 64 * MIB, "cuda": 512 * MIB}
_chosen: int | None = None


def set_workspace(bytes: int | None) -> None:
    """Bytes that each operation may spend on temporary tiles and kept logits; None restores the default
    (64 MiB on a CPU, 512 MiB on a GPU). More of it means fewer products computed twice, never another result."""
    global _chosen
    if bytes is not None and bytes < 0:
        raise ValueError(f"set_workspace: bytes must be at least 0, got {bytes}")
    _chosen = bytes


def workspace_bytes(workspace: int | None, device: torch.device) -> int:
    """The argument of a call, else what `set_workspace` said, else the default of the device."""
    if workspace is not None:
        return workspace
    return _chosen if _chosen is not None else _default.get(device.type, _default["cpu"])
