"""Half precision: where it is rounded, and where it must not be; and gradients that have none of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable)


def float32(x: Tensor) -> Tensor:
    """Half-precision features as float32, once.

    The gradient of a loss is a difference, Σ_j softmax_j k_j − k_pos; summed in float32 and rounded once it keeps its
    digits, where two half-precision terms would have lost them.
    """
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def for_products(x: Tensor) -> Tensor:
    """Half-precision features as a sweep multiplies them best: a CPU in float32, so they are converted once; a GPU as
    they are."""
    return float32(x) if x.device.type == "cpu" else x


def without_autocast(function: F) -> F:
    """Runs `function` outside autocast: it would round the logits to half precision, inside the products."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        first = args[0] if args else next((x for x in kwargs.values() if isinstance(x, torch.Tensor)), None)
        device = first.device.type if isinstance(first, torch.Tensor) else "cpu"
        if not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapped


def refuse_second_gradient(op: str, *, reference: bool = False) -> None:
    """In a backward whose own graph is asked for; `reference`: the operation has an implementation that gives it.
    (`once_differentiable` would return gradients that are cut off, where the upstream one is constant, and a penalty on
    them would silently count for nothing.)"""
    if torch.is_grad_enabled():
        instead = "; implementation='reference' has one" if reference else ""
        raise NotImplementedError(f"{op}: no gradient of its gradient is implemented{instead}")


def no_second_backward(op: str) -> Callable:
    """The autograd formula of a registered operation that is a backward itself: it runs for a second gradient alone."""

    def refuse(ctx, *gradients):
        raise NotImplementedError(
            f"{op}: a gradient of its gradient is not implemented; implementation='reference' has one"
        )

    return refuse


def fast_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 faster than float32: CPUs with avx512_bf16 or amx_bf16, recent GPUs."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    abilities = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(abilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
