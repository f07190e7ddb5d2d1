"""Layers on a CPU, for the k rows of a step of look-ahead: read the weights once, at the speed of memory.

A step of decoding is bound by reading the weights. Library products are built for many rows: for 5 they take up to 1.5
times as long as for 1. In between lies everything that k siblings cost beside greedy search. Norms and gates are a
handful of library calls each, on so few numbers that the calls are what they cost.

    x · weightᵀ + bias,    weight · x / √(mean x² + ε),    down(silu(gate(x)) · up(x))
"""

from __future__ import annotations

from collections.abc import Callable
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


def _few(x: Tensor) -> int:
    """How many rows x has, 0 if they are not for this core."""
    rows = x.numel() // max(1, x.shape[-1])
    ours = 2 <= rows <= MOST and x.dtype == torch.float32 and x.is_contiguous() and not torch.is_grad_enabled()
    return rows if ours and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling() else 0


def linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    rows = _few(x)
    if not rows:
        return F.linear(x, weight, bias)
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    native.few_rows(x.data_ptr(), weight.data_ptr(), address(bias), out.data_ptr(), rows, *weight.shape,
                    torch.get_num_threads())  # fmt: skip
    return out


def rms_norm(layer: nn.Module, x: Tensor) -> Tensor:
    rows = _few(x)
    if not rows:
        return type(layer).forward(layer, x)
    out = torch.empty_like(x)
    weight = layer.weight
    native.rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, x.shape[-1], layer.variance_epsilon)
    return out


def gated(layer: nn.Module, x: Tensor) -> Tensor:
    rows = _few(x)
    if not rows:
        return type(layer).forward(layer, x)
    gate, up = layer.gate_proj, layer.up_proj
    hidden = x.new_empty(*x.shape[:-1], gate.weight.shape[0])
    native.few_rows_gated(x.data_ptr(), gate.weight.data_ptr(), up.weight.data_ptr(), address(gate.bias),
                          address(up.bias), hidden.data_ptr(), rows, *gate.weight.shape,
                          torch.get_num_threads())  # fmt: skip
    return layer.down_proj(hidden)


# -------------------------------------------------------------------------------------------- which layers, how long


def _plain(weight: Any) -> bool:
    suits = type(weight) in (nn.Parameter, Tensor) and weight.dtype == torch.float32 and weight.is_contiguous()
    return suits and weight.device.type == "cpu"


def _untouched(layer: nn.Module) -> bool:
    """Nobody replaced the layer's forward; another generation, which does what this one does, may have."""
    return "forward" not in vars(layer) or getattr(layer.forward, "func", None) in (linear, rms_norm, gated)


def _apart(layer: nn.Module) -> bool:
    """A plain linear layer that nobody watches: it may be run without being called."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks if isinstance(layer, nn.Module) else True
    return type(layer) is nn.Linear and _plain(layer.weight) and _untouched(layer) and not hooks


def _same_code(layer: nn.Module, name: str) -> bool:
    """Whether the layer computes what that layer of Llama does: the library's models copy each other's layers."""
    forward = type(layer).forward
    if not forward.__module__.startswith("transformers.models."):
        return False
    from transformers.models.llama import modeling_llama

    mine, llama = forward.__code__, getattr(modeling_llama, name).forward.__code__
    return (mine.co_code, mine.co_names, mine.co_consts) == (llama.co_code, llama.co_names, llama.co_consts)


def stand_in(layer: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What computes the same for few rows. None for quantised, adapted and unknown layers, and where somebody else
    replaced the forward."""
    if not _untouched(layer):
        return None
    if type(layer) is nn.Linear:
        return partial(linear, layer.weight, layer.bias) if _plain(layer.weight) else None
    name = type(layer).__name__
    if name.endswith("RMSNorm"):
        suits = _plain(getattr(layer, "weight", None)) and _same_code(layer, "LlamaRMSNorm")
        return partial(rms_norm, layer) if suits else None
    if name.endswith("MLP"):
        silu = type(getattr(layer, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
        whole = silu and _apart(getattr(layer, "gate_proj", None)) and _apart(getattr(layer, "up_proj", None))
        return partial(gated, layer) if whole and _same_code(layer, "LlamaMLP") else None
    return None


def few_rows(model: Any) -> AbstractContextManager:
    """Inside, the model's layers take few rows in this way, whichever thread runs them."""

    def step_in(layer: nn.Module) -> None:
        layer.forward = stand_in(layer)

    def step_back(layer: nn.Module) -> None:
        del layer.forward

    return lent(lambda: filter(stand_in, model.modules()) if native is not None else (), step_in, step_back)
