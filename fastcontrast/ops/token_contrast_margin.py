"""Hinge on the cosines of all pairs of tokens of a sequence, without the matrix of them: SimCTG's contrastive term.

    loss = 1/Z Σ_b Σ_{i≠j} max(0, margin − 1 + s_ij),   s_ij = ⟨u_i, u_j⟩,  u_i = h_i / |h_i|,   Z = Σ_b L_b (L_b − 1)

    A_ij = [margin − 1 + s_ij > 0],  g_i = 2/Z Σ_{j≠i} A_ij u_j,     dh_i = (g_i − u_i ⟨u_i, g_i⟩) / |h_i|

s and A are symmetric: only tiles on and above the diagonal are formed, and each gives the gradient of its rows and of
its columns. That is 1.5 matrix products where dense autograd takes 3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _check as check
from ._dispatch import choose, native, register
from ._formed import registered
from ._precision import float32, without_autocast
from ._workspace import buffer, workspace_bytes

OP = "token_contrast_margin"
SMALLEST_NORM = 1e-12  # of a vector of zeros, whose cosines then are 0
# A tile of 512 × 512 float32 is 1 MiB: it stays in the L2 caches of two cores, so that the four passes over it
# (subtract, relu, sum, sign) take 4 to 7 % of the time of its products (D = 768). 256 costs the products what it saves
# on the diagonal. A GPU's products must be long.
CPU_EDGE, EDGE, SMALLEST_EDGE = 512, 4096, 64


def _refuse(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "it takes float32, bfloat16 or float16, got float64"
    return None


register(OP, {"torch": _refuse})


# ---------------------------------------------------------------------------------------------------------- reference


@without_autocast
def _reference(hidden: Tensor, valid: Tensor | None, margin: float, mean: bool) -> Tensor:
    """Of the dense cosines [B, S, S]: the definition, with derivatives of any order."""
    s = hidden.shape[1]
    x = float32(hidden)
    pair = ~torch.eye(s, dtype=torch.bool, device=x.device).expand(x.shape[0], s, s)
    if valid is not None:
        x = x.where(valid[..., None], 1.0)  # NaN in padding counts for nothing
        pair = pair & valid[:, :, None] & valid[:, None]
    unit = x / x.square().sum(2, keepdim=True).clamp(min=SMALLEST_NORM**2).sqrt()
    total = (margin - 1 + unit @ unit.mT).relu().where(pair, 0.0).sum()
    return total / _pairs(hidden, valid) if mean else total


def _pairs(hidden: Tensor, valid: Tensor | None) -> Tensor | int:
    """Z, at least 1. Of a mask it stays on the device."""
    if valid is None:
        return max(1, hidden.shape[0] * hidden.shape[1] * (hidden.shape[1] - 1))
    lengths = valid.sum(1)
    return (lengths * (lengths - 1)).sum().clamp(min=1).double()  # 2 / Z of integers would be float32


# --------------------------------------------------------------------------------------------------------------- tiles


@torch.no_grad()
def _tiled(hidden: Tensor, valid: Tensor | None, margin: float, mean: bool, workspace: int, need: bool):
    """The loss, and its float32 gradient [B, S, D] if `need`. Autocast leaves products into a given tensor alone."""
    largest = CPU_EDGE if hidden.device.type == "cpu" else EDGE
    edge = max(SMALLEST_EDGE, min(largest, math.isqrt(workspace // 4)))
    groups = _groups(_windows(hidden, valid), edge * edge)
    numel = max((_length(rows) * min(_length(window), edge) ** 2 for rows, window in groups), default=0)
    tile = _buffer(numel, hidden.device)
    pairs = _pairs(hidden, valid) if mean else 1
    gradient = _buffer(hidden.numel(), hidden.device).view(hidden.shape).zero_() if need else None
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for rows, window in groups:
        inside = None if valid is None else valid[rows, window]
        into = None if gradient is None else gradient[rows, window]
        total += _group(float32(hidden[rows, window]), inside, margin, 2 / pairs, edge, tile, into)
    return (total / pairs).float(), gradient


def _buffer(numel: int, device: torch.device) -> Tensor:
    pooled = device.type == "cpu" and native is not None  # the pool asks the C++ core for huge pages
    return buffer(numel) if pooled else torch.empty(numel, device=device)


def _length(x: slice) -> int:
    return x.stop - x.start


def _windows(hidden: Tensor, valid: Tensor | None) -> list[tuple[int, int]]:
    """Of each sequence the first and past the last valid position. All of it on a GPU, which would have to be waited
    for: its padding is multiplied as zeros."""
    b, s = hidden.shape[:2]
    if valid is None or hidden.device.type != "cpu" or not s:
        return [(0, s)] * b
    position = torch.arange(s)
    first = torch.where(valid, position, s).amin(1).tolist()
    last = torch.where(valid, position + 1, 0).amax(1).tolist()
    return [*zip(first, last, strict=True)]


def _groups(windows: list[tuple[int, int]], numel: int) -> list[tuple[slice, slice]]:
    """Neighbouring sequences, and a window that covers theirs, whose matrices together fit into a tile of `numel`; else
    one sequence. Those without a pair are left out."""
    groups: list[tuple[slice, slice]] = []
    for row, (start, stop) in enumerate(windows):
        if stop - start < 2:
            continue
        if groups and groups[-1][0].stop == row:
            rows, window = groups[-1]
            both = slice(min(start, window.start), max(stop, window.stop))
            if (row + 1 - rows.start) * _length(both) ** 2 <= numel:
                groups[-1] = slice(rows.start, row + 1), both
                continue
        groups.append((slice(row, row + 1), slice(start, stop)))
    return groups


def _group(
    x: Tensor,  # [G, W, D]
    valid: Tensor | None,  # [G, W]
    margin: float,
    factor: float | Tensor,
    edge: int,
    buffer: Tensor,
    gradient: Tensor | None,  # [G, W, D]
) -> Tensor:
    """The sum over the pairs of a group in float64; `gradient`, zero before, becomes `factor` times half of its own."""
    count, width, _ = x.shape
    norm = torch.linalg.vector_norm(x, dim=2, keepdim=True).clamp_(min=SMALLEST_NORM)
    unit = x / norm
    if valid is not None:
        unit.masked_fill_(~valid[..., None], 0.0)
    step = -(-width // -(-width // edge))
    blocks = [slice(i, min(i + step, width)) for i in range(0, width, step)]
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for n, i in enumerate(blocks):
        for j in blocks[n:]:
            shape = (count, _length(i), _length(j))
            tile = torch.bmm(unit[:, i], unit[:, j].mT, out=buffer[: math.prod(shape)].view(shape))
            tile.sub_(1 - margin)
            if valid is not None and margin > 1:  # else the zeros of padding stay below the hinge by themselves
                tile.masked_fill_(~(valid[:, i, None] & valid[:, None, j]), 0.0)
            tile.relu_()
            if i == j:
                tile.diagonal(0, 1, 2).zero_()
            total += (1 if i == j else 2) * tile.sum().double()
            if gradient is not None:
                tile.sign_()
                gradient[:, i].baddbmm_(tile, unit[:, j])
                if i != j:
                    gradient[:, j].baddbmm_(tile.mT, unit[:, i])
    if gradient is not None:
        for i in blocks:
            _project(gradient[:, i], unit[:, i], norm[:, i], factor)
        if valid is not None:
            gradient.masked_fill_(~valid[..., None], 0.0)
    return total


def _project(g: Tensor, unit: Tensor, norm: Tensor, factor: float | Tensor) -> None:
    """From the gradient of the unit vectors to that of the vectors, in place."""
    inner = (unit * g).sum(2, keepdim=True)
    inner.masked_fill_(norm <= SMALLEST_NORM, 0.0)  # where the norm is clamped, it is a constant
    g.addcmul_(unit, inner, value=-1).mul_(factor / norm)


_call = registered(OP, "Tensor hidden, Tensor? valid, float margin, bool mean, SymInt workspace", _tiled)


# --------------------------------------------------------------------------------------------------------------- public


def token_contrast_margin(
    hidden: Tensor,  # [B, S, D]
    lengths: Tensor | None = None,  # [B] integer
    *,
    valid: Tensor | None = None,  # [B, S] bool
    margin: float = 0.5,
    reduction: str = "mean",
    workspace: int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """1/Z Σ_b Σ_{i≠j} max(0, margin − s_ii + s_ij),   s_ij = cos(hidden_bi, hidden_bj),   Z = Σ_b L_b (L_b − 1).

    s_ii is taken as the 1 that it is up to rounding. With u = normalize(hidden, dim=2), and without padding, it equals
    `(margin - 1 + u @ u.mT).relu()` summed off the diagonal, by Z. No [B, S, S] is stored. Both tokens of a pair get a
    gradient.

    Args:
        hidden: [B, S, D]; float32, bfloat16 or float16 (float64: dense reference), any strides.
        lengths: [B], the first L_b tokens of sequence b count (right padding); None: all S.
        valid: [B, S], instead: True where a token counts, so that L_b = valid[b].sum(). Of the others nothing is read
            into the result, and their gradient is 0. A CPU multiplies from the first to the last valid token only.
        margin: ρ; at 0 only rounding is left, at 2 and above every pair counts.
        reduction: "mean" divides by Z, 0 where no sequence has a pair; "sum" does not.
        workspace: bytes of a tile; default `set_workspace`. At most 1 MiB is used on a CPU, 64 MiB on a GPU, and 16 KiB
            at least. Beside it the unit vectors of one sequence exist, and the gradient in float32.
        implementation: None, "torch" or "reference", which has gradients of gradients.

    Returns a scalar, float32 (float64 for float64): cosines, sums and gradients are float32 whatever the dtype. Norms
    are clamped at 1e-12, so a vector of zeros has cosine 0. A cosine within rounding of 1 − margin may fall on either
    side of the hinge: the loss does not notice, and the gradient differs by that pair's. NaN in a valid token makes the
    loss NaN, and the gradients of its own sequence, no others'.
    Raises: ValueError or TypeError naming the argument, what was expected and what came; NotImplementedError if the
    requested implementation cannot run, with the reason.
    Source: Su et al. 2022, "A Contrastive Framework for Neural Text Generation", equation 2.
    """
    valid = _checked(hidden, lengths, valid)
    if isinstance(margin, bool) or not isinstance(margin, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{OP}: margin must be a number, got {type(margin).__name__}")
    if not math.isfinite(margin):
        raise ValueError(f"{OP}: margin must be finite, got {margin}")
    check.one_of(OP, "reduction", reduction, ("mean", "sum"))
    check.workspace(OP, workspace)
    margin, mean = float(margin), reduction == "mean"
    if choose(OP, implementation, hidden.device, hidden.dtype) == "reference":
        return _reference(hidden, valid, margin, mean)
    return _call(hidden, valid, margin, mean, workspace_bytes(workspace, hidden.device))


def _checked(hidden: Any, lengths: Any, valid: Any) -> Tensor | None:
    """Checks the tensors; which tokens are valid, None for all."""
    if not isinstance(hidden, Tensor):
        raise TypeError(f"{OP}: hidden must be a tensor, got {type(hidden).__name__}")
    if hidden.dtype not in check.FLOATING:
        got = str(hidden.dtype).removeprefix("torch.")
        raise TypeError(f"{OP}: hidden must be float32, bfloat16, float16 or float64, got {got}")
    if hidden.ndim != 3:
        raise ValueError(f"{OP}: hidden must be [B, S, D], got {list(hidden.shape)}")
    b, s = hidden.shape[:2]
    if valid is not None:
        if lengths is not None:
            raise ValueError(f"{OP}: lengths and valid cannot go together")
        if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
            got = str(valid.dtype).removeprefix("torch.") if isinstance(valid, Tensor) else type(valid).__name__
            raise TypeError(f"{OP}: valid must be a bool tensor, got {got}")
        if valid.shape != (b, s):
            raise ValueError(f"{OP}: valid must be [{b}, {s}], got {list(valid.shape)}")
        check.same_kind(OP, "valid", valid, hidden, dtype=False, like_name="hidden")
        return valid
    if lengths is None:
        return None
    if isinstance(lengths, Tensor):
        check.same_kind(OP, "lengths", lengths, hidden, dtype=False, like_name="hidden")
    check.vector(OP, "lengths", lengths, b, hidden, floating=False)
    check.within(OP, "lengths", lengths, 0, s + 1)
    return torch.arange(s, device=hidden.device) < lengths[:, None]
