"""Matryoshka, 13 of the catalogue: a loss of several prefixes of the features, and InfoNCE's in one pass over them.

    L = Σ_m w_m InfoNCE(N(x[:, :m]), N(y[:, :m])),      ⟨x_i, y_j⟩ of m = that of the prefix before + of what is new

so the products of all prefixes are those of the longest alone. With logits L^m = s · P^m / (|x^m| |y^m|) and softmaxes
E^m, the gradient to P is added up from the longest prefix down, and each piece of the features is multiplied once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcontrast import info_nce
from fastcontrast.distributed._exchange import active
from fastcontrast.ops import _check as check
from fastcontrast.ops._formed import formed
from fastcontrast.ops._precision import float32
from fastcontrast.ops._workspace import workspace_bytes

EPS = 1e-12
ROWS = 256  # of a block, at most: more do not multiply faster, and leave the caches


def halves(width: int, least: int = 32) -> list[int]:
    """width, width / 2, … down to `least`."""
    dims = [width]
    while dims[-1] % 2 == 0 and dims[-1] // 2 >= least:
        dims.append(dims[-1] // 2)
    return dims


def matryoshka_loss(
    loss: Callable[..., Tensor],
    *features: Tensor,  # [N, D] each
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    some: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Σ_m w_m loss(N(prefix_m(x)), ...) of any loss; w = 1. A prefix of zeros stays zeros. `some`: that many of the
    dims, drawn anew in every call."""
    dims, weights = _checked("matryoshka_loss", features[0].shape[1], dims, weights)
    drawn = range(len(dims)) if some is None else torch.randperm(len(dims), generator=generator)[:some].tolist()
    prefixes = ((weights[i], [F.normalize(float32(x[:, : dims[i]]), dim=-1) for x in features]) for i in drawn)
    return sum(weight * loss(*prefix) for weight, prefix in prefixes)


def nested_info_nce(
    queries: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    scale: float = 20.0,
    *,
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    workspace: int | None = None,
) -> Tensor:
    """`matryoshka_loss(info_nce)` in one direction, row i's own key being i, with the products of one prefix.

    Features of any length. Three products of the longest prefix, forward and backward, where a loss a prefix takes
    three of each; memory for a block of rows, of which all prefixes' logits are kept. Inside
    `fastcontrast.distributed.exchange` it is that sum of losses. Raises ValueError naming what does not fit.
    """
    op = "nested_info_nce"
    check.matrix(op, "queries", queries)
    check.matrix(op, "keys", keys, queries.shape[1])
    if len(keys) < len(queries):
        raise ValueError(f"{op}: keys must be at least as many as queries, {len(queries)}, got {len(keys)}")
    dims, weights = _checked(op, queries.shape[1], dims, weights)
    if active() is not None or not len(queries):
        return matryoshka_loss(lambda q, k: info_nce(q, k, scale), queries, keys, dims=dims, weights=weights)
    pieces = sorted(zip(dims, weights, strict=True))
    budget = workspace_bytes(workspace, queries.device)

    def run(inputs, needs):
        return _sweep(*(float32(z) for z in inputs), scale, pieces, any(needs), budget)

    return formed(run, queries, keys, op=op)


def _sweep(x: Tensor, y: Tensor, scale: float, pieces: list[tuple[int, float]], need: bool, budget: int):
    m, n = len(x), len(y)
    squares = [z.square().cumsum(1)[:, [d - 1 for d, _ in pieces]] for z in (x, y)]
    of_x, of_y = (1 / z.sqrt().clamp(min=EPS) for z in squares)  # [M, prefixes], [N, prefixes]: 1 / length
    dx, dy = (torch.zeros_like(z) if need else None for z in (x, y))
    down_x, down_y = torch.zeros_like(of_x), torch.zeros_like(of_y)  # Σ G L: what a length takes off its gradient
    rows = min(ROWS, max(1, budget // (x.element_size() * n * (len(pieces) + 3))))
    kept = x.new_empty(len(pieces), min(rows, m), n)
    product, buffer = x.new_empty(2, min(rows, m), n).unbind()
    total = x.new_zeros((), dtype=torch.float64)
    for i in range(0, m, rows):
        part = slice(i, min(i + rows, m))
        count = part.stop - i
        own = torch.arange(count, device=x.device), torch.arange(i, part.stop, device=x.device)
        inner, start = product[:count], 0
        for p, (d, weight) in enumerate(pieces):
            torch.addmm(inner, x[part, start:d], y[:, start:d].T, beta=float(start > 0), out=inner)
            start, logits = d, kept[p, :count]
            torch.mul(inner, (scale * of_x[part, p])[:, None], out=logits).mul_(of_y[:, p])
            top = logits.amax(1)
            e = torch.sub(logits, top[:, None], out=buffer[:count]).exp_()
            mass = e.sum(1)
            total += weight * (top + mass.log() - logits[own]).double().sum()
            if not need:
                continue
            # G = w / M (E / mass − 1 at the own key), of which the numbers of a row wait to multiply all it touches;
            # the logits become the gradient to the inner products.
            e[own] -= mass
            share = weight / (m * mass)
            logits.mul_(e)
            down_x[part, p] = share * logits.sum(1)
            down_y[:, p] += logits.T @ share
            torch.mul(e, (scale * share * of_x[part, p])[:, None], out=logits).mul_(of_y[:, p])
        if need:
            for p in reversed(range(len(pieces))):
                d, start = pieces[p][0], pieces[p - 1][0] if p else 0
                gradient = kept[p, :count]
                if p + 1 < len(pieces):
                    gradient.add_(kept[p + 1, :count])
                dx[part, start:d] += gradient @ y[:, start:d]
                dy[:, start:d] += gradient.T @ x[part, start:d]
    if need:
        for z, of_z, down, dz in ((x, of_x, down_x, dx), (y, of_y, down_y, dy)):
            down = down * of_z.square() * (of_z < 1 / EPS)  # a row of zeros has no length to keep
            after = down.flip(1).cumsum(1).flip(1)  # a piece is in its own prefix and in all longer ones
            start = 0
            for p, (d, _) in enumerate(pieces):
                dz[:, start:d] -= after[:, p : p + 1] * z[:, start:d]
                start = d
    return (total / m).to(x.dtype), (dx, dy)


def _checked(op: str, width: int, dims: Sequence[int], weights: Sequence[float] | None):
    if not dims or min(dims) < 1 or max(dims) > width or len(set(dims)) != len(dims):
        raise ValueError(f"{op}: dims must be distinct numbers in [1, {width}], got {list(dims)}")
    weights = [1.0] * len(dims) if weights is None else list(weights)
    if len(weights) != len(dims):
        raise ValueError(f"{op}: weights must be {len(dims)}, one of each of dims, got {len(weights)}")
    return list(dims), weights
