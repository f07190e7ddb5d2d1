from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable)


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
