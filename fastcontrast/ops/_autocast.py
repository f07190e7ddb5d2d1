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
        device = args[0].device.type if isinstance(args[0], torch.Tensor) else "cpu"
        if not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapped
