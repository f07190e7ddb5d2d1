"""Cross entropy against a blend of the gold token and a teacher's distribution, in chunks of tokens.

    for each chunk:   Z = H · Wᵀ,  A = logits of the teacher
                      loss += Σ_i −Σ_v t_iv log p_iv,   p = softmax Z,   t = (1 − ω)·onehot + ω·softmax A
                      Z becomes G = p − t
                      dH = G · W,  dW += Gᵀ · H

Three products, and a fourth where the teacher's logits are one. As `linear_cross_entropy` plus `linear_kl` it would be
seven: neither knows of the other's logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast.ops._formed import formed
from fastcontrast.ops._precision import float32

from .salt_teacher import IGNORED, Logits, chunks

TILE = 1 << 19  # entries of a chunk that are worked on at a time: 2 MiB, which a CPU's caches hold


def blend(hidden: Tensor, weight: Tensor, gold: Tensor, logits: Logits, omega: float) -> Tensor:
    """Sum of the losses of tokens [N] with states [N, D], vocabulary [V, D] and gold tokens [N]; 0 < omega ≤ 1."""
    index = (gold != IGNORED).nonzero()[:, 0]

    def run(inputs, needs):
        hidden, weight = inputs
        dh, dw = (torch.zeros_like(x) if need else None for x, need in zip(inputs, needs, strict=True))
        total = hidden.new_zeros((), dtype=torch.float64)
        for part in chunks(index, len(weight)):
            h = hidden[part]
            z, taught = h @ weight.T, logits.rows(part).to(hidden.dtype)
            for tile in zip(*(x.split(max(1, TILE // len(weight))) for x in (z, taught, gold[part])), strict=True):
                total += _tile(*tile, omega)
            if dh is not None:
                dh[part] = z @ weight
            if dw is not None:
                dw.addmm_(z.T, h)
        return total.to(hidden.dtype), (dh, dw)

    return formed(run, float32(hidden), float32(weight), op="salt_loss")


def _tile(z: Tensor, taught: Tensor, gold: Tensor, omega: float) -> Tensor:  # [R, V], [R, V], [R]
    """Sum of the losses; z becomes p − t."""
    log_p, q, gold = z.log_softmax(1), taught.softmax(1), gold[:, None]
    cross = torch.linalg.vecdot(q, log_p)
    if cross.isnan().any():  # what the teacher excludes may be impossible for the student: 0 · −∞ counts as 0
        cross = torch.linalg.vecdot(q, log_p.masked_fill(q == 0, 0.0))
    total = -omega * cross.double().sum()
    if omega < 1:
        total -= (1 - omega) * log_p.gather(1, gold).double().sum()
    torch.exp(log_p, out=z).sub_(q, alpha=omega)
    z.scatter_add_(1, gold, z.new_full(gold.shape, omega - 1.0))
    return total
