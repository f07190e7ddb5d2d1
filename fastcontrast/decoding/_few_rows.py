"""Linear layers on a CPU, for the k rows of a step of look-ahead: read the weights once, at the speed of memory.

A step of decoding is bound by reading the weights. Library products are built for many rows: for 5 they take up to 1.5
times as long as for 1. In between lies everything that k siblings cost beside greedy search.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops._dispatch import native
from ..ops._sweep import address
from ._lent import lent

MOST = 8  # rows; from there on the library's product is as fast


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """x · weightᵀ + bias; few rows by the C++ core, others as `nn.Linear` has it."""
    weight, bias = layer.weight, layer.bias
    rows = x.numel() // max(1, x.shape[-1])
    ours = 2 <= rows <= MOST and x.is_contiguous() and x.dtype == torch.float32 and not torch.is_grad_enabled()
    if not ours or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    native.few_rows(x.data_ptr(), weight.data_ptr(), address(bias), out.data_ptr(), rows, *weight.shape,
                    torch.get_num_threads())  # fmt: skip
    return out


def _suits(layer: nn.Module) -> bool:
    """Plain float32 layers on a CPU: no subclass (quantised, adapted), none whose forward somebody replaced."""
    return (
        type(layer) is nn.Linear
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
        and type(layer.weight) in (nn.Parameter, Tensor)
        and layer.weight.is_contiguous()
        and ("forward" not in vars(layer) or getattr(layer.forward, "func", None) is linear)
    )


def few_rows(model: Any) -> AbstractContextManager:
    """Inside, the model's linear layers take few rows in this way, whichever thread runs them."""

    def stand_in(layer: nn.Linear) -> None:
        layer.forward = partial(linear, layer)

    def step_back(layer: nn.Linear) -> None:
        del layer.forward

    return lent(lambda: filter(_suits, model.modules()) if native is not None else (), stand_in, step_back)
