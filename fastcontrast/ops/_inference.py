"""Operations of decoding: no backward but the reference's, so a tensor that wants a gradient runs on that one."""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import note, select

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # what the native kernels call them
NO_GRADIENT = "it has no backward, and an input requires a gradient"


def choose_inference(op: str, implementation: str | None, first: Tensor, *others: Tensor | None) -> str:
    """Name of the implementation to run for these inputs, noted for `trace`."""
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (first, *others))

    def refuse(name: str) -> str | None:
        return NO_GRADIENT if name != "reference" else None

    return note(select(op, implementation, first.device, first.dtype, refuse if wanted else None))


def refuse_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    """Reason why a CUDA C++ kernel cannot run, shared by the operations that have one."""
    if device.type != "cuda":
        return f"it runs on cuda tensors, these are on {device.type}"
    from . import _cuda  # asks the driver: not before there is a tensor of its

    return _cuda.refuse(device, dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What the reference computes in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def last_contiguous(x: Tensor) -> Tensor:
    """`x` itself where the last dimension has no gaps, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
