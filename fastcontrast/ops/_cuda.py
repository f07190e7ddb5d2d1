"""Calls of the CUDA C++ kernels, built where nvcc is: addresses in, one launch or a few, no synchronisation."""

from __future__ import annotations

import torch

try:
    import fastcontrast._CUDA as native

    missing = None
except ImportError as error:
    native = None
    missing = f"the CUDA kernels are not built ({error}); they need nvcc at installation"


def refuse_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    """Reason why a CUDA C++ kernel cannot run, or None."""
    if device.type != "cuda":
        return f"it runs on cuda tensors, these are on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
    return missing
