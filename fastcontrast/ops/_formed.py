"""A scalar loss whose gradients are formed in its forward pass.

What the forward has at hand, the logits of a chunk of rows, the backward would have to compute again: one matrix
product saved. The gradients of upstream 1 wait in the graph; the backward multiplies them by what really came, and lets
go of them. Under torch.compile use a registered operation instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._precision import without_autocast

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
        if torch.is_grad_enabled():
            raise NotImplementedError(
                f"{ctx.op}: no gradient of its gradient is implemented; implementation='reference' has one"
            )
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
