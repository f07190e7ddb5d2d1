"""One file a recipe: its objective, forward and backward, at the sizes of its paper, against the dense form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastcontrast import set_workspace
from fastcontrast.ops._sweep import COLUMNS, ROWS

from .. import _rivals as rivals
from .._harness import Bar, Floor, Provider, Step, Workload

MIB = 1 << 20
PART = 512  # tokens whose float64 logits exist at a time
Product = tuple[int, int, int, int]  # M, N, D, and how many such products there are


def against_dense(
    name: str,
    shape: Any,
    tiny: Any,
    inputs: Callable[[Any], Sequence[Any]],
    ours: Callable[..., Tensor],
    dense: Callable[..., Tensor],
    *,
    products: Sequence[Product],
    bars: Sequence[Bar] = (),
    truth: Callable[..., Tensor] | None = None,
    needs: int = 0,
    compile: bool = True,
    workspace: int | None = None,
    **options: Any,
) -> Workload:
    """The workload of an objective: `ours(*inputs)` and `dense(*inputs)` give the loss; gradients go to those inputs
    that require one. An objective without any gives just its value, or a tensor of results.

    shape, tiny  what `inputs` takes; the second is for the warm-up of a process whose memory is measured
    products     the floor: matrix products that no way of computing it can do without, [M, D] × [D, N], tile by tile
    truth        the float64 result of inputs in float64, where `dense` would not fit
    needs        bytes of the dense form, which is skipped where they are not available
    workspace    what `set_workspace` is told for ours: in little, no logits are kept, for a product more a matrix
    """
    providers = {
        "fastcontrast": _provider(ours, workspace, memory=1),
        "dense torch": _provider(dense, memory=1, needs=needs),
    }
    if compile:
        providers["dense torch, compiled"] = _provider(lambda: rivals.compiled(dense), needs=needs, compiles=True)
    exact = truth or dense

    def in_float64(problem: Sequence[Any]) -> tuple[Tensor, ...]:
        return _results(exact, [_double(x) for x in problem])

    floors = {"products": Floor({"bare": lambda problem: _bare(products)})}
    return Workload(name, shape, tiny, inputs, in_float64, providers, floors, tuple(bars), **options)


def in_parts(loss: Callable[..., Tensor], rows: Sequence[int]) -> Callable[..., Tensor]:
    """`loss`, a mean over tokens, a part of the tokens at a time; inputs at `rows` have a row a token."""

    def whole(*inputs: Tensor) -> Tensor:
        count = len(inputs[rows[0]])
        parts = [x.split(PART) if i in rows else repeat(x) for i, x in enumerate(inputs)]
        total = 0.0
        for part in zip(*parts, strict=False):
            share = len(part[rows[0]]) / count
            total = total + share * checkpoint(loss, *part, use_reentrant=False, preserve_rng_state=False)
        return total

    return whole


def _provider(loss: Callable, workspace: int | None = None, **options: Any) -> Provider:
    def make(problem: Sequence[Any]) -> Step:
        function = loss() if options.get("compiles") else loss

        def step() -> tuple[Tensor, ...]:
            set_workspace(workspace)
            try:
                return _results(function, problem)
            finally:
                set_workspace(None)

        return step if workspace else lambda: _results(function, problem)

    return Provider(make, **options)


def _results(function: Callable, problem: Sequence[Any]) -> tuple[Tensor, ...]:
    leaves = [x for x in problem if isinstance(x, Tensor) and x.requires_grad]
    value = function(*problem)
    return (value.detach(), *(torch.autograd.grad(value, leaves) if leaves else ()))


def _double(x: Any) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().double().requires_grad_(x.requires_grad)
    return x


def _bare(products: Sequence[Product]) -> Step:
    """Each product in tiles of the sweep's size, into one buffer."""
    operands = [(torch.randn(m, d), torch.randn(n, d), count) for m, n, d, count in products]
    buffer = torch.empty(ROWS * COLUMNS)

    def step() -> None:
        for a, b, count in operands:
            for _ in range(count):
                for keys in b.split(COLUMNS):
                    for rows in a.split(ROWS):
                        torch.mm(rows, keys.T, out=buffer[: len(rows) * len(keys)].view(len(rows), -1))

    return step
