"""Layers on a CPU, for the k rows of a step of look-ahead: read the weights once, at the speed of memory.

A step of decoding is bound by reading the weights. Library products are built for many rows: for 5 they take up to
twice as long as for 1. In between lies everything that k siblings cost beside greedy search. Linear layers are here,
whole layers of Llama's form in `_llama_layer.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._dispatch import native
from ..ops._sweep import address
from ._lent import lent

MOST = 8  # rows; from there on the library's product is as fast


def few(x: Tensor) -> int:
    """How many rows x has, 0 if they are not for the core."""
    rows = x.numel() // max(1, x.shape[-1])
    ours = 2 <= rows <= MOST and x.dtype == torch.float32 and x.is_contiguous() and not torch.is_grad_enabled()
    return rows if ours and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling() else 0


def linear(layer: nn.Module, core: Callable, sizes: tuple[int, int], x: Tensor) -> Tensor:
    """x · W + bias; few rows by the C++ core, others by the layer itself."""
    rows, (outputs, inputs) = few(x), sizes
    if not rows or x.shape[-1] != inputs:
        return type(layer).forward(layer, x)
    out = x.new_empty(*x.shape[:-1], outputs)
    core(x.data_ptr(), layer.weight.data_ptr(), address(layer.bias), out.data_ptr(), rows, *sizes,
         torch.get_num_threads())  # fmt: skip
    return out


def plain(layer: nn.Module) -> bool:
    """Weights in float32 on a CPU, as they lie in memory: nothing quantised or adapted."""
    held = [layer.weight, *([] if getattr(layer, "bias", None) is None else [layer.bias])]
    suits = all(type(x) in (nn.Parameter, Tensor) and x.dtype == torch.float32 and x.is_contiguous() for x in held)
    return suits and all(x.device.type == "cpu" for x in held)


class StandIn(partial):
    """A forward that a layer has while it is lent."""


def untouched(layer: nn.Module) -> bool:
    """Nobody replaced the layer's forward, unless it was another generation, or put the same back: transformers 4 does
    where it returns hidden states."""
    own = vars(layer).get("forward")
    same = getattr(own, "__self__", None) is layer and getattr(own, "__func__", None) is type(layer).forward
    return own is None or same or isinstance(own, StandIn)


def few_rows(model: Any) -> AbstractContextManager:
    """Inside, the model's layers take few rows in this way, whichever thread runs them."""
    from transformers.pytorch_utils import Conv1D

    from ._llama_layer import whole_layer

    def stand_in(layer: nn.Module) -> StandIn | None:
        if type(layer) not in (nn.Linear, Conv1D):
            return whole_layer(layer)
        if not untouched(layer) or not plain(layer):
            return None
        if type(layer) is nn.Linear:
            return StandIn(linear, layer, native.few_rows, layer.weight.shape)
        return StandIn(linear, layer, native.few_rows_by_input, layer.weight.shape[::-1])

    def step_in(layer: nn.Module) -> None:
        layer.forward = stand_in(layer)

    def step_back(layer: nn.Module) -> None:
        del layer.forward

    return lent(lambda: filter(stand_in, model.modules()) if native is not None else (), step_in, step_back)
