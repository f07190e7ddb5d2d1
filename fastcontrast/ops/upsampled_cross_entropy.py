"""Cross-entropy of every pixel against classes, of score maps that are upsampled to the labels' size, tile by tile.

    z_b = A_H (s·S_b) A_Wᵀ for each class,      loss = Σ_pixels (logsumexp_k z_k − z_label)
    G = softmax_k z − [k is the label],         dS_b = s · A_Hᵀ G_b A_W

A_H [H, h] and A_W [W, w] are the two halves of bilinear interpolation (`align_corners=False`): row y has 1 − t and t at
the two source pixels next to (y + ½) h / H − ½. With sigmoids instead: loss = Σ (softplus(z) − target·z).

The upsampled maps [B, K, H, W] never exist: a tile of pixels is upsampled, turned into its gradient, and brought back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _check as check
from ._dispatch import choose, register
from ._formed import registered
from ._precision import float32, without_autocast
from ._workspace import workspace_bytes

OP = "upsampled_cross_entropy"
# Bytes of a tile's logits. Of 256 × 256 pixels and 150 classes, on one thread, tiles of 0.25 or 16 MiB take 1.7 times
# as long: too many calls, or too few in the caches. A GPU's kernels must be long.
CPU_TILE, TILE = 2 << 20, 64 << 20


def _refuse(device: torch.device, dtype: torch.dtype) -> str | None:
    return "it takes float32, bfloat16 or float16, got float64" if dtype == torch.float64 else None


register(OP, {"torch": _refuse})


# ---------------------------------------------------------------------------------------------------------- reference


@without_autocast
def _reference(scores: Tensor, target: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor:
    """The sum over pixels of the upsampled maps: the definition, with derivatives of any order."""
    logits = F.interpolate(scores, target.shape[-2:], mode="bilinear", align_corners=False)
    if mask is None:
        return F.cross_entropy(logits, target.long(), ignore_index=ignore_index, reduction="sum")
    losses = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")
    return losses.where(mask[:, None], 0.0).sum()


# --------------------------------------------------------------------------------------------------------------- tiles


class Piece(NamedTuple):
    """Of an axis some pixels, the source pixels that they are mixed from, and how much of each."""

    pixels: slice
    sources: slice
    weights: Tensor  # [pixels, sources]


def _pieces(inside: int, outside: int, size: int, device: torch.device) -> Iterator[Piece]:
    """All pixels of an axis that is interpolated from `inside` to `outside`, at most `size` at a time."""
    at = ((torch.arange(outside).double() + 0.5) * (inside / outside) - 0.5).clamp(0, inside - 1)
    size = -(-outside // -(-outside // size))
    for start in range(0, outside, size):
        here = at[start : start + size]
        first, last = int(here[0]), min(int(here[-1]) + 2, inside)
        weights = (1 - (here[:, None] - torch.arange(first, last)).abs()).clamp(min=0)
        yield Piece(slice(start, start + len(here)), slice(first, last), weights.float().to(device))


@torch.no_grad()
def _tiled(scores: Tensor, target: Tensor, mask: Tensor | None, ignore_index: int, workspace: int, need: bool):
    """The sum of the losses, and its gradient [B, K, h, w] if `need`; scores are float32."""
    (_, k, h, w), (height, width), device = scores.shape, target.shape[-2:], scores.device
    pixels = max(1, min(workspace, CPU_TILE if device.type == "cpu" else TILE) // (4 * k))
    columns = min(width, math.isqrt(pixels))
    rows = [*_pieces(h, height, min(height, pixels // columns), device)]
    columns = [*_pieces(w, width, columns, device)]
    sources = scores.permute(0, 2, 3, 1).contiguous()  # [B, h, w, K]: a pixel's classes side by side
    gradient = torch.zeros_like(sources) if need else None
    total = torch.zeros((), dtype=torch.float64, device=device)
    for b, source in enumerate(sources):
        for row in rows:
            mixed = torch.tensordot(row.weights, source[row.sources], 1)  # [R, w, K]
            back = torch.zeros_like(mixed) if need else None
            for column in columns:
                place = (b, ..., row.pixels, column.pixels)
                seen = mask is None or mask[place]
                if device.type == "cpu" and not (target[place] != ignore_index if mask is None else seen).any():
                    continue
                logits = torch.matmul(column.weights, mixed[:, column.sources])  # [R, C, K]
                if mask is None:
                    loss, g = _softmax_tile(logits, target[place].long(), ignore_index, need)
                else:
                    loss, g = _sigmoid_tile(logits, target[place].permute(1, 2, 0), seen, need)
                total += loss
                if need:
                    back[:, column.sources] += torch.matmul(column.weights.T, g)
            if need:
                gradient[b, row.sources] += torch.tensordot(row.weights.T, back, 1)
    return total.float(), gradient.permute(0, 3, 1, 2).contiguous() if need else None


def _softmax_tile(logits: Tensor, labels: Tensor, ignore_index: int, need: bool) -> tuple[Tensor, Tensor | None]:
    """Of logits [R, C, K]: the sum of the losses of labels [R, C] in float64, and its gradient."""
    valid = labels != ignore_index
    labels = labels.where(valid, 0)[..., None]
    softmax = logits.softmax(-1)
    own = softmax.gather(-1, labels)
    # −log p, unless a p may have lost its digits to underflow; a GPU, which would have to be waited for, takes two more
    # passes instead.
    if logits.device.type == "cpu" and own.min() > 1e-30:
        losses = -own.log()
    else:
        losses = logits.logsumexp(-1, keepdim=True) - logits.gather(-1, labels)
    loss = losses[..., 0].where(valid, 0.0).sum(dtype=torch.float64)
    if not need:
        return loss, None
    softmax.scatter_add_(-1, labels, softmax.new_full((), -1.0).expand_as(labels))
    if logits.device.type != "cpu" or not valid.all():
        softmax.mul_(valid[..., None].float())  # a tenth of the time of masked_fill_
    return loss, softmax


def _sigmoid_tile(logits: Tensor, target: Tensor, seen: Tensor, need: bool) -> tuple[Tensor, Tensor | None]:
    """The same of independent classes: target is bool [R, C, K], seen [R, C]."""
    target = target.to(logits.dtype, memory_format=torch.contiguous_format)
    seen = seen[..., None].to(logits.dtype)
    losses = F.softplus(logits).addcmul_(logits, target, value=-1).mul_(seen)
    loss = losses.sum(-1).sum(dtype=torch.float64)
    return loss, logits.sigmoid_().sub_(target).mul_(seen) if need else None


_call = registered(OP, "Tensor scores, Tensor target, Tensor? mask, int ignore_index, SymInt workspace", _tiled)


def _sum(op: str, scores, target, mask, scale, ignore_index, workspace, implementation) -> Tensor:
    check.workspace(op, workspace)
    scale = check.scalar(op, "scale", scale, scores)
    scaled = scale * float32(scores)  # small, so that this product and its gradients may be autograd's
    if choose(OP, implementation, scores.device, scores.dtype) == "reference":
        return _reference(scaled, target, mask, ignore_index)
    return _call(scaled, target, mask, ignore_index, workspace_bytes(workspace, scores.device), name=op)


# --------------------------------------------------------------------------------------------------------------- public


@without_autocast
def upsampled_cross_entropy(
    scores: Tensor,  # [B, K, h, w]
    labels: Tensor,  # [B, H, W] integer
    scale: float | Tensor = 1.0,
    *,
    ignore_index: int = 255,
    reduction: str = "valid",
    workspace: int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """F.cross_entropy(F.interpolate(scale * scores, (H, W), mode="bilinear"), labels, ignore_index=ignore_index).

    Equals it in value and gradients to scores and scale, without the upsampled maps [B, K, H, W] in any number: their
    gradient is formed in the forward, a tile of pixels at a time. H and W may also be smaller than h and w.

    Args:
        scores: [B, K, h, w]; float32, bfloat16 or float16 (float64: dense reference), any strides.
        labels: [B, H, W] integer in [0, K), or `ignore_index`: such a pixel has loss 0 and gradient 0.
        scale: 1 / temperature, a number or a tensor of one element.
        reduction: "valid" divides the sum by the number of pixels that are not ignored, at least 1; "all" by B·H·W;
            "sum" does not divide.
        workspace: bytes of a tile's logits; default `set_workspace`. At most 2 MiB are used on a CPU, 64 MiB on a GPU,
            and a pixel at least; the softmax is once more as much.
        implementation: None, "torch" or "reference", which has gradients of gradients.

    Returns a scalar, float32 (float64 for float64). Raises: ValueError or TypeError naming the argument, what was
    expected and what came; NotImplementedError if the requested implementation cannot run.
    """
    op = OP
    _maps(op, scores)
    _pixels(op, "labels", labels, scores, (len(scores), None, None), check.INTEGER, "an integer tensor")
    check.one_of(op, "reduction", reduction, ("valid", "all", "sum"))
    check.within(op, "labels", labels.masked_fill(labels == ignore_index, 0), 0, scores.shape[1])
    total = _sum(op, scores, labels, None, scale, ignore_index, workspace, implementation)
    if reduction == "valid":
        return total / (labels != ignore_index).sum().clamp(min=1)
    return total / max(1, labels.numel()) if reduction == "all" else total


@without_autocast
def upsampled_binary_cross_entropy(
    scores: Tensor,  # [B, K, h, w]
    targets: Tensor,  # [B, K, H, W] bool
    mask: Tensor,  # [B, H, W] bool
    scale: float | Tensor = 1.0,
    *,
    reduction: str = "positions",
    workspace: int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """The same with a sigmoid a class: F.binary_cross_entropy_with_logits(upsampled, targets) where the mask is True.

    Args: as `upsampled_cross_entropy`, and
        targets: which classes a pixel has, any number of them.
        mask: which pixels count; of the others neither score nor target does.
        reduction: "positions" divides the sum over pixels and classes by the number of pixels that count, "entries" by
            K times that; 0 where none does. "sum" does not divide.
        implementation: chosen as for `upsampled_cross_entropy`, under whose name `trace` lists it.

    Returns and raises as there.
    """
    op = "upsampled_binary_cross_entropy"
    _maps(op, scores)
    _pixels(op, "targets", targets, scores, (*scores.shape[:2], None, None), (torch.bool,), "bool")
    _pixels(op, "mask", mask, scores, (len(scores), *targets.shape[2:]), (torch.bool,), "bool")
    check.one_of(op, "reduction", reduction, ("positions", "entries", "sum"))
    total = _sum(op, scores, targets, mask, scale, -1, workspace, implementation)
    if reduction == "sum":
        return total
    return total / (mask.sum() * (1 if reduction == "positions" else scores.shape[1])).clamp(min=1)


def _maps(op: str, scores: Any) -> None:
    check.tensor(op, "scores", scores, 4, "[B, K, h, w]")
    if 0 in scores.shape[1:]:
        raise ValueError(f"{op}: scores must have a class and a pixel at least, got {list(scores.shape)}")


def _pixels(op: str, name: str, x: Any, scores: Tensor, shape: tuple, dtypes: tuple, kind: str) -> None:
    """`x` is of one of the dtypes, and of the shape, in which None is any size from 1 on."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must be {kind}, got {str(x.dtype).removeprefix('torch.')}")
    if x.ndim != len(shape) or any(n < 1 if m is None else n != m for n, m in zip(x.shape, shape, strict=True)):
        sizes = [size if size is not None else letter for size, letter in zip(shape[-2:], "HW", strict=True)]
        expected = ", ".join(map(str, [*shape[:-2], *sizes]))
        raise ValueError(f"{op}: {name} must be [{expected}] to match scores, got {list(x.shape)}")
    check.same_kind(op, name, x, scores, dtype=False, like_name="scores")
