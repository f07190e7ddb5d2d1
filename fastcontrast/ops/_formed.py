"""A scalar loss whose gradients are formed in its forward pass.

What the forward has at hand, the logits of a chunk of rows, the backward would have to compute again: one matrix
product saved. The gradients of upstream 1 wait in the graph; the backward multiplies them by what really came, and lets
go of them. `registered` is the same as an operation of torch.library, which torch.compile can trace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._precision import refuse_second_gradient, without_autocast

Gradients = tuple["Tensor | None", ...]
# run(inputs, needs) -> (loss, gradients): a 0-dim float32 loss, and for each input that needs one its gradient of
# upstream 1, float32 and owned by nobody else. It is called without autograd, and again for a second backward.
Run = Callable[[tuple["Tensor | None", ...], tuple[bool, ...]], tuple[Tensor, Gradients]]


def formed(run: Run, *inputs: Tensor | None, op: str = "this operation") -> Tensor:
    """The loss of `run(inputs, needs)`, whose gradients it forms for those inputs that require one.

    Without any, or without grad mode, needs are all False. A backward uses the gradients up: another one through the
    same graph (retain_graph=True) runs again, so that no more than one set is ever held. `op` is named in the error
    that refuses a gradient of a gradient.
    """
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return _Formed.apply(run, op, *inputs)
    return _call(inputs[0], run, inputs, (False,) * len(inputs))[0]


@without_autocast
def _call(first: Tensor, run: Run, inputs: tuple[Tensor | None, ...], needs: tuple[bool, ...]):
    """`first` says on which device autocast is to be switched off."""
    with torch.no_grad():
        return run(inputs, needs)


class _Formed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, op, *inputs):
        ctx.run, ctx.op, ctx.dtypes = run, op, [None if x is None else x.dtype for x in inputs]
        ctx.save_for_backward(*inputs)
        loss, ctx.gradients = _call(inputs[0], run, inputs, ctx.needs_input_grad[2:])
        return loss

    @staticmethod
    def backward(ctx, upstream):
        refuse_second_gradient(ctx.op, reference=True)
        # Not looked at before they are gone: an optimiser may change the inputs in place between the two passes.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            inputs = ctx.saved_tensors
            _, gradients = _call(inputs[0], ctx.run, inputs, ctx.needs_input_grad[2:])
        if upstream.device.type != "cpu" or upstream.item() != 1.0:  # reading it would make a GPU wait
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(upstream)
        return None, None, *(None if g is None else g.to(d) for g, d in zip(gradients, ctx.dtypes, strict=True))


_library = torch.library.Library("fastcontrast", "FRAGMENT")


def registered(op: str, arguments: str, tiled: Callable[..., tuple[Tensor, Tensor | None]]) -> Callable[..., Tensor]:
    """`call(first, *others)`: the loss that `tiled(first, *others, need)` computes, and if `need` its gradient, which
    `first` alone gets. By `formed`; under torch.compile by the operation `fastcontrast::op(arguments, bool need)`.

    Args:
        arguments: the schema's, the tensor that gets the gradient first.
        tiled: gives a 0-dim float32 loss, and a float32 gradient of the shape of `first`, or None.
    """

    def forward(first, *others):
        loss, gradient = tiled(first, *others)
        return loss, first.new_empty(0, dtype=torch.float32) if gradient is None else gradient

    def fake(first, *others):
        shape = first.shape if others[-1] else 0
        return first.new_empty((), dtype=torch.float32), first.new_empty(shape, dtype=torch.float32)

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[1])
        ctx.dtype, ctx.others = inputs[0].dtype, len(inputs) - 1

    def backward(ctx, upstream, _):
        if not torch.compiler.is_compiling():
            refuse_second_gradient(op, reference=True)
        return (ctx.saved_tensors[0] * upstream).to(ctx.dtype), *[None] * ctx.others

    _library.define(f"{op}({arguments}, bool need) -> (Tensor loss, Tensor gradient)")
    _library.impl(op, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastcontrast::{op}", fake, lib=_library)
    torch.library.register_autograd(f"fastcontrast::{op}", backward, setup_context=setup_context, lib=_library)
    traced = getattr(torch.ops.fastcontrast, op)

    def call(first: Tensor, *others: Any, name: str = op) -> Tensor:
        if torch.compiler.is_compiling():
            return traced(first, *others, first.requires_grad and torch.is_grad_enabled())[0]

        def run(inputs, needs):
            loss, gradient = tiled(*inputs, *others, needs[0])
            return loss, (gradient,)

        return formed(run, first, op=name)

    return call
