"""What the losses share: positives, sums of logits, reduction, and the module that holds a scale and settings."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastcontrast.distributed import _exchange as exchange
from fastcontrast.distributed import _sums as sums
from fastcontrast.ops import _check as check
from fastcontrast.ops._precision import float32, for_products


def features(
    op: str, queries: Tensor, keys: Tensor, names: tuple[str, str] = ("queries", "keys")
) -> tuple[Tensor, Tensor]:
    """Checked, under the names that the caller knows, and as products take them best: on a CPU half precision becomes
    float32, on a GPU it stays, and what is not a product must call `float32`. `keys is queries` survives."""
    check.matrix(op, names[0], queries)
    if keys is queries:
        queries = for_products(queries)
        return queries, queries
    check.matrix(op, names[1], keys, queries.shape[1], like=names[0])
    convert = for_products if queries.dtype == keys.dtype else float32  # two precisions: the wider one
    queries, keys = convert(queries), convert(keys)
    check.same_kind(op, names[1], keys, queries, like_name=names[0])
    return queries, keys


def own_index(op: str, queries: Tensor, keys: Tensor, positives: Tensor | None) -> Tensor | None:
    """Index of each row's own key [M]; None stands for 0 … M − 1."""
    m, n = queries.shape[0], keys.shape[0]
    if positives is None:
        if m > n:
            raise ValueError(f"{op}: positives must be given when there are more queries ({m}) than keys ({n})")
        return None
    check.vector(op, "positives", positives, m, queries, floating=False)
    check.within(op, "positives", positives, 0, n)
    return positives.long()


def pick(x: Tensor, index: Tensor | None, count: int) -> Tensor:
    """Rows of `x` at `index`, or its first `count`."""
    if index is not None:
        return x.index_select(0, index)
    return x if x.shape[0] == count else x[:count]


def reduce(
    op: str, losses: Tensor, weights: Tensor | None, reduction: str, count: Tensor | int | None = None, *, like: Tensor
) -> Tensor:
    """`none`: per row; `sum`; `mean`: over `count` rows (default all), 0 where there is none; inside `exchange` of all
    ranks' rows. In float32, float64 for features `like` that: statistics of several ranks come in float64."""
    if weights is not None:
        check.vector(op, "weights", weights, losses.shape[0], losses, floating=True)
        losses = losses * weights
    check.one_of(op, "reduction", reduction, ("mean", "sum", "none"))
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if reduction == "none":
        return losses.to(dtype)
    if reduction == "mean" and count is None and losses.shape[0] and exchange.active() is None:
        return losses.mean()
    total, rows = losses.sum(), losses.shape[0] if count is None else count
    return (sums.whole_sum(total) if reduction == "sum" else sums.share(total, rows)).to(dtype)


class ScaledLoss(nn.Module):
    """A loss function with its settings and a scale (1 / temperature), fixed or learned.

    Args:
        scale: initial scale.
        learnable: learn `log_scale`; the scale is then exp(log_scale), kept at or below `max_scale`.
        max_scale: upper limit of a learned scale (100 in CLIP).
        settings: any keyword argument of the function, fixed for all calls; `forward` may override them.
    """

    function: ClassVar[Callable[..., Any]]
    default_scale: ClassVar[float]

    def __init__(
        self, scale: float | None = None, *, learnable: bool = False, max_scale: float = 100.0, **settings: Any
    ):
        super().__init__()
        name = type(self).__name__
        scale = self.default_scale if scale is None else float(scale)
        if not scale > 0 or (learnable and scale > max_scale):
            limit = f" and at most max_scale = {max_scale}" if learnable else ""
            raise ValueError(f"{name}: scale must be positive{limit}, got {scale}")
        allowed = [
            p.name for p in inspect.signature(type(self).function).parameters.values() if p.kind == p.KEYWORD_ONLY
        ]
        if unknown := sorted(set(settings) - set(allowed)):
            raise TypeError(f"{name}: settings must be among {', '.join(allowed)}, got {', '.join(unknown)}")
        self.max_scale, self.settings = max_scale, settings
        log_scale = torch.tensor(math.log(scale))
        if learnable:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    @property
    def scale(self) -> Tensor:
        """1 / temperature, 0-dim."""
        return self.log_scale.exp()

    def forward(self, *inputs: Tensor, **settings: Any) -> Any:
        if isinstance(self.log_scale, nn.Parameter):
            with torch.no_grad():  # a clamp inside the graph would leave a scale beyond the limit without gradient
                self.log_scale.clamp_(max=math.log(self.max_scale))
        return type(self).function(*inputs, sums.own_parameter(self.scale), **{**self.settings, **settings})

    def extra_repr(self) -> str:
        learnable = isinstance(self.log_scale, nn.Parameter)
        parts = [f"scale={self.scale.item():.4g}", f"learnable={learnable}"]
        return ", ".join(parts + [f"{name}={value!r}" for name, value in self.settings.items()])
