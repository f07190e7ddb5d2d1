"""Mean squared distances of each sample to a positive and a negative, in one pass over the three.

d⁺_b = mean_n (positive_bn − target_bn)²,   d⁻_b = mean_n (negative_bn − target_bn)²     n over all trailing dimensions

dpositive = g⁺_b · 2/n · (positive − target),   dnegative likewise with g⁻,   dtarget = −(dpositive + dnegative)
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from . import _check as check
from . import _workspace
from ._dispatch import choose, native, refuse_cpu, refuse_triton, register
from ._inference import CODES, last_contiguous, wide
from ._precision import no_second_backward, refuse_second_gradient, without_autocast
from ._sweep import address

OP = "triplet_distances"

register(OP, {"cpu": refuse_cpu, "triton": refuse_triton})


# ---------------------------------------------------------------------------------------------------------- reference


@without_autocast
def _reference(target: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:  # each [B, n]
    target, positive, negative = (x.to(wide(x.dtype)) for x in (target, positive, negative))
    n = max(target.shape[1], 1)
    return (positive - target).square().sum(1) / n, (negative - target).square().sum(1) / n


# ----------------------------------------------------------------------------------------------------- implementations


def _cpu(target: Tensor, positive: Tensor, negative: Tensor) -> Tensor:  # each [B, n]
    """[2, B]: both distances."""
    distances = target.new_empty(2, target.shape[0], dtype=torch.float32)
    tensors, sizes = _native(target, positive, negative)
    native.triplet_distances(*tensors, distances.data_ptr(), sizes, CODES[target.dtype], torch.get_num_threads())
    return distances


def _cpu_backward(
    target: Tensor,  # [B, n]
    positive: Tensor,  # [B, n]
    negative: Tensor,  # [B, n]
    gradients: Tensor,  # [2, B]
    needs: tuple[bool, bool, bool],
) -> list[Tensor | None]:
    tensors, sizes = _native(target, positive, negative)
    found = [_workspace.empty(target, *target.shape) if need else None for need in needs]
    native.triplet_distances_backward(
        *tensors, gradients.data_ptr(), *map(address, found), sizes, CODES[target.dtype], torch.get_num_threads()
    )
    return found


def _native(*inputs: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(x.data_ptr() for x in inputs), (*inputs[0].shape, *(x.stride(0) for x in inputs))


def _triton(*inputs):
    return importlib.import_module("fastcontrast.kernels.triplet_distances").triplet_distances(*inputs)


def _triton_backward(*inputs):
    return importlib.import_module("fastcontrast.kernels.triplet_distances").triplet_distances_backward(*inputs)


IMPLEMENTATIONS = {"cpu": (_cpu, _cpu_backward), "triton": (_triton, _triton_backward)}


# -------------------------------------------------------------------------------------------- torch.library, autograd

_library = torch.library.Library("fastcontrast", "FRAGMENT")
_library.define("triplet_distances(Tensor target, Tensor positive, Tensor negative, str implementation) -> Tensor")
_library.define(
    "triplet_distances_backward(Tensor target, Tensor positive, Tensor negative, Tensor gradients, bool[3] needs, "
    "str implementation) -> (Tensor target, Tensor positive, Tensor negative)"
)


def _forward(target, positive, negative, implementation):
    return IMPLEMENTATIONS[implementation][0](target, positive, negative)


def _fake(target, positive, negative, implementation):
    return target.new_empty(2, target.shape[0], dtype=torch.float32)


def _gradients(target, positive, negative, gradients, needs, implementation):
    gradients = gradients.float().contiguous()
    found = IMPLEMENTATIONS[implementation][1](target, positive, negative, gradients, needs)
    return tuple(target.new_empty(0) if x is None else x for x in found)


def _gradients_fake(target, positive, negative, gradients, needs, implementation):
    return tuple(target.new_empty(target.shape if need else (0,)) for need in needs)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.implementation = inputs[3]


def _backward(ctx, gradients, run=torch.ops.fastcontrast.triplet_distances_backward):
    needs = ctx.needs_input_grad[:3]
    found = run(*ctx.saved_tensors, gradients, [*needs], ctx.implementation)
    return *(x if need else None for x, need in zip(found, needs, strict=True)), None


_library.impl("triplet_distances", _forward, "CompositeExplicitAutograd")
_library.impl("triplet_distances_backward", _gradients, "CompositeExplicitAutograd")
torch.library.register_fake("fastcontrast::triplet_distances", _fake, lib=_library)
torch.library.register_fake("fastcontrast::triplet_distances_backward", _gradients_fake, lib=_library)
torch.library.register_autograd(
    "fastcontrast::triplet_distances", _backward, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd("fastcontrast::triplet_distances_backward", no_second_backward(OP), lib=_library)


class _Eager(torch.autograd.Function):
    """The same autograd as the registered operation, without its dispatch."""

    @staticmethod
    def forward(ctx, *inputs):
        _setup_context(ctx, inputs, None)
        return _forward(*inputs)

    @staticmethod
    def backward(ctx, gradients):
        refuse_second_gradient(OP, reference=True)
        return _backward(ctx, gradients, run=_gradients)


# --------------------------------------------------------------------------------------------------------------- public


def triplet_distances(
    target: Tensor,  # [B, ...]
    positive: Tensor,  # [B, ...]
    negative: Tensor,  # [B, ...]
    *,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """d⁺, d⁻ [B]: mean squared distances of `positive` and `negative` to `target`, sample by sample.

    Equivalent to `((positive - target) ** 2).flatten(1).mean(1)` and the same of `negative`, in float32, in one read of
    the three tensors; the backward is one read and writes the gradients that are wanted. A hinge on d⁺ − d⁻ is algebra
    on two vectors.

    Args:
        target, positive, negative: [B, ...] of one shape; float32, bfloat16 or float16 (float64: dense reference).
            Any strides: copies only of samples with gaps, or if the three do not lie in memory in one order.
        implementation: None (the best that can run), "cpu", "triton" or "reference".

    Returns float32 (float64 for float64), summed in blocks, so that differences of 1e-4 survive millions of numbers.
    Samples of no numbers have distance 0. NaN and infinity stay in their sample. Bit-identical from run to run. A
    gradient of the gradient has only the reference.

    Raises: ValueError or TypeError naming the argument, what was expected and what came; NotImplementedError if the
    requested implementation cannot run, with the reason.
    """
    _check_samples("target", target, None)
    _check_samples("positive", positive, target)
    _check_samples("negative", negative, target)
    chosen = choose(OP, implementation, target.device, target.dtype)
    inputs = _samples(target, positive, negative)
    if chosen == "reference":
        return _reference(*inputs)
    inputs = map(last_contiguous, inputs)
    if torch.compiler.is_compiling():
        return torch.ops.fastcontrast.triplet_distances(*inputs, chosen).unbind()
    return _Eager.apply(*inputs, chosen).unbind()


def _samples(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Each as [B, n], its numbers in the order in which the first has them in memory: the mean does not mind, and a
    channels-last image is not copied."""
    first = inputs[0]
    n = first[:1].numel() if first.shape[0] else first.shape[1:].numel()
    order = sorted(range(1, first.ndim), key=lambda i: (-first.stride(i), i))
    return tuple(x.permute(0, *order).reshape(x.shape[0], n) for x in inputs)


def _check_samples(name: str, x: Any, like: Tensor | None) -> None:
    check.tensor(OP, name, x, x.ndim if isinstance(x, Tensor) else 1, "[B, ...]")
    if x.ndim == 0:
        raise ValueError(f"{OP}: {name} must be [B, ...], got []")
    if like is None:
        return
    if x.shape != like.shape:
        raise ValueError(f"{OP}: {name} must be {list(like.shape)} like target, got {list(x.shape)}")
    check.same_kind(OP, name, x, like, like_name="target")
