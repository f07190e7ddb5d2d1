"""HyCD: divergence of two similarity matrices whose target is blended with the identity, tile by tile.

With A = scale · x tᵀ and A* = scale · x* t*ᵀ, and their log-sum-exps r, r* of rows and c, c* of columns found before:

    log p = A − r,   q̂ = α·[i = j] + (1 − α)·exp(A* − r*);   p′ and q̂′ the same with c and c*
    loss  = Σ_ij q̂ (log q̂ − log p) + q̂′ (log q̂′ − log p′)
    G = p − q̂ + p′ − q̂′,   dx = scale · G t,   dt = scale · Gᵀ x

Six products, two of them for the log-sum-exps. As a sum of `clip_loss`, `distill_loss` and what depends on the teacher
alone it would take thirteen, and twice the seconds. A single tile takes four: its A and A* are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastcontrast import clip_loss
from fastcontrast.distributed._exchange import active
from fastcontrast.distributed._lse import similarity_lse
from fastcontrast.distributed._sums import formed_over_keys, share
from fastcontrast.losses._common import features
from fastcontrast.ops._formed import formed
from fastcontrast.ops._precision import float32

ROWS, COLUMNS = 512, 1024  # of a tile of 2 MiB: the few that are alive at once stay in a CPU's caches


def hycd_loss(
    image: Tensor,  # [N, E]
    text: Tensor,  # [N, E]
    teacher_image: Tensor,  # [N, Et]
    teacher_text: Tensor,  # [N, Et]
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """T²·½ mean_i (KL(q̂_i ‖ p_i) of rows + of columns), see above; the teacher gets no gradient.

    alpha = 1: T² times CLIP's loss at scale 1/T. alpha = 0: distillation, 0 where the student is its teacher.
    Raises ValueError for alpha outside [0, 1], a temperature that is not positive, and shapes that do not fit.
    """
    op = "hycd_loss"
    if not 0 <= alpha <= 1:
        raise ValueError(f"{op}: alpha must lie in [0, 1], got {alpha}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"{op}: temperature must be positive, got {temperature}")
    image, text = features(op, image, text, ("image", "text"))
    teacher = features(op, teacher_image.detach(), teacher_text.detach(), ("teacher_image", "teacher_text"))
    for name, x in zip(("text", "teacher_image", "teacher_text"), (text, *teacher), strict=True):
        if x.shape[0] != image.shape[0]:
            raise ValueError(f"{op}: {name} must have the {image.shape[0]} rows of image, got {x.shape[0]}")
    scale = 1 / temperature
    if alpha == 1:
        return temperature**2 * clip_loss(image, text, scale)
    total = blended_divergence(image, text, *teacher, scale, alpha)
    return temperature**2 / 2 * share(total, image.shape[0])


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
    how, pairs, kept = active(), ((x, t), (x_star, t_star)), None
    with torch.no_grad():
        if how is None and len(x) <= ROWS:  # one tile: it waits in the caches
            kept = [scale * a @ b.T for a, b in pairs]
            lses = [y.logsumexp(dim) for y in kept for dim in (1, 0)]
        else:
            lses = [y.to(x.dtype) for a, b in pairs for y in similarity_lse(a, b, scale, dim="both")]
    r, c, r_star, c_star = lses
    first = 0 if how is None else how.shards(len(x), x.device).offset

    def of_block(rows: Sequence[Tensor], columns: Sequence[Tensor], place: slice) -> Tensor:
        def run(pair, needs):
            return _tiles(*pair, rows[1:], columns[1:], first - place.start, scale, alpha, needs, kept)

        return formed(run, rows[0], columns[0], op="hycd_loss")

    rows, columns = [x, x_star, r, r_star], [t, t_star, c, c_star]
    return of_block(rows, columns, slice(0, len(t))) if how is None else formed_over_keys(of_block, rows, columns)


def _tiles(x: Tensor, t: Tensor, rows, columns, first: int, scale: float, alpha: float, needs: Sequence[bool], kept):
    """Loss and gradients of a block, where row i's own column is i + first; `kept`: A and A* of its only tile."""
    dx, dt = (torch.zeros_like(y) if need else None for y, need in zip((x, t), needs, strict=True))
    total = x.new_zeros((), dtype=torch.float64)
    for i in range(0, len(x), ROWS):
        q, q_star, r, r_star = (y[i : i + ROWS] for y in (x, *rows))
        for j in range(0, len(t), COLUMNS):
            k, k_star, c, c_star = (y[j : j + COLUMNS] for y in (t, *columns))
            logits, of_teacher = kept or (scale * q @ k.T, scale * q_star @ k_star.T)
            of_rows, g = _tile(logits - r[:, None], of_teacher - r_star[:, None], i + first - j, alpha)
            of_columns, weights = _tile(logits.sub_(c), of_teacher.sub_(c_star), i + first - j, alpha)
            total += of_rows + of_columns
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
