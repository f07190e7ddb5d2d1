"""Divergence of two similarity matrices whose target is blended with the identity, tile by tile.

With A = scale · x tᵀ and A* = scale · x* t*ᵀ, and their log-sum-exps r, r* of rows and c, c* of columns found before:

    log p = A − r,   q̂ = α·[i = j] + (1 − α)·exp(A* − r*);   p′ and q̂′ the same with c and c*
    loss  = Σ_ij q̂ (log q̂ − log p) + q̂′ (log q̂′ − log p′)
    G = p − q̂ + p′ − q̂′,   dx = scale · G t,   dt = scale · Gᵀ x

Six products, two of them for the log-sum-exps. As a sum of `clip_loss`, `distill_loss` and what depends on the teacher
alone it would take thirteen, and twice the seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastcontrast.distributed._exchange import active
from fastcontrast.distributed._lse import similarity_lse
from fastcontrast.distributed._sums import formed_over_keys
from fastcontrast.ops._formed import formed
from fastcontrast.ops._precision import float32

ROWS, COLUMNS = 512, 1024  # of a tile of 2 MiB: the few that are alive at once stay in a CPU's caches


def blended_divergence(
    image: Tensor,  # [N, E]
    text: Tensor,  # [N, E]
    teacher_image: Tensor,  # [N, Et]
    teacher_text: Tensor,  # [N, Et]
    scale: float,
    alpha: float,
) -> Tensor:
    """The loss above for 0 ≤ alpha < 1, without gradient to the teacher; inside `exchange` of this rank's rows."""
    x, t, x_star, t_star = (float32(y) for y in (image, text, teacher_image.detach(), teacher_text.detach()))
    with torch.no_grad():
        lses = [y.to(x.dtype) for pair in ((x, t), (x_star, t_star)) for y in similarity_lse(*pair, scale, dim="both")]
    r, c, r_star, c_star = lses
    how = active()
    first = 0 if how is None else how.shards(len(x), x.device).offset

    def of_block(rows: Sequence[Tensor], columns: Sequence[Tensor], place: slice) -> Tensor:
        def run(pair, needs):
            return _tiles(*pair, rows[1:], columns[1:], first - place.start, scale, alpha, needs)

        return formed(run, rows[0], columns[0], op="hycd_loss")

    rows, columns = [x, x_star, r, r_star], [t, t_star, c, c_star]
    return of_block(rows, columns, slice(0, len(t))) if how is None else formed_over_keys(of_block, rows, columns)


def _tiles(x: Tensor, t: Tensor, rows, columns, first: int, scale: float, alpha: float, needs: Sequence[bool]):
    """Loss and gradients of a block, where row i's own column is i + first."""
    dx, dt = (torch.zeros_like(y) if need else None for y, need in zip((x, t), needs, strict=True))
    total = x.new_zeros((), dtype=torch.float64)
    for i in range(0, len(x), ROWS):
        q, q_star, r, r_star = (y[i : i + ROWS] for y in (x, *rows))
        for j in range(0, len(t), COLUMNS):
            k, k_star, c, c_star = (y[j : j + COLUMNS] for y in (t, *columns))
            logits, of_teacher = scale * q @ k.T, scale * q_star @ k_star.T
            g = torch.zeros_like(logits)
            for lse, lse_star in ((r[:, None], r_star[:, None]), (c, c_star)):
                divergence, weights = _tile(logits - lse, of_teacher - lse_star, i + first - j, alpha)
                total += divergence
                g += weights
            if dx is not None:
                dx[i : i + ROWS].addmm_(g, k, alpha=scale)
            if dt is not None:
                dt[j : j + COLUMNS].addmm_(g.T, q, alpha=scale)
    return total.to(x.dtype), (dx, dt)


def _tile(log_p: Tensor, log_q: Tensor, diagonal: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Σ q̂ (log q̂ − log p) and p − q̂ of a tile, in place."""
    log_q += math.log1p(-alpha)
    q = log_q.exp()
    if alpha and -len(q) < diagonal < q.shape[1]:  # it crosses this tile
        own = q.diagonal(diagonal)
        log_q.diagonal(diagonal).copy_(own.add_(alpha).log())
    return torch.dot(q.flatten(), (log_q - log_p).flatten()), log_p.exp_().sub_(q)
