"""MultiCSR's loss, some rows at a time: what is kept is O(rows · keys), never a matrix of all cosines.

Row i has logits l_j, 0 or −∞ where masked, its own key o, and a strongest other key s. With e = log Σ_{j≠s} exp l_j,
which has o in it and so is finite:

    r = log(exp e + exp l_s),  P_j = exp(l_j − r),  log(1 − P_s) = −softplus(l_s − e),  all other P_{j≠o} ≤ ½
    L = r − l_o + [softplus(l_s − e) − Σ_{j≠o,s} log(1 − P_j)]
    G_j = (2 − S) P_j − [j = o] + [j ≠ s] (u_j − exp(l_j − e)),  S = Σ_j u_j,  u_j = P_j / (1 − P_j), 0 of o and s

Without what is in brackets in L it is the cross-entropy, and G = P − [j = o]. However sure a row is of a wrong key,
nothing here overflows and no two large numbers cancel, as those of P_s / (1 − P_s) would. A row's logits are at hand
when its gradients are due: four products in all, as many as the dense form takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

CELLS = 1 << 20  # of a tile: 4 MiB of float32, of which some five are alive at once


def rows_loss(
    queries: Tensor,  # [m, D]
    keys: Sequence[Tensor],  # [n, D] each
    guide: tuple[Tensor, Sequence[Tensor]] | None,  # [m, Dg], [n, Dg] each
    first: int,
    scale: float,
    limit: float,
    masked_logit: float,
    binary: bool,
    needs: tuple[bool, ...],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Σ_i L_i over all keys, one part after another, and its gradients to queries and each part as needed; row i's own
    key is i + first of the first part."""
    dq, *dk = (torch.zeros_like(x) if need else None for x, need in zip((queries, *keys), needs, strict=True))
    total, sizes = queries.new_zeros((), dtype=torch.float64), [len(part) for part in keys]
    step = max(1, CELLS // max(1, sum(sizes)))
    for i in range(0, len(queries), step):
        q = queries[i : i + step]
        own = torch.arange(first + i, first + i + len(q), device=q.device)[:, None]
        logits, masked = _products(scale * q, keys), None
        if guide is not None:
            masked = (_products(guide[0][i : i + step], guide[1]) > limit).scatter_(1, own, False)
            logits.masked_fill_(masked, masked_logit)
        loss, g = _tile(logits, own, binary)
        total += loss
        if masked is not None:
            g.masked_fill_(masked, 0.0)
        for of_part, part, gradient in zip(g.split(sizes, 1), keys, dk, strict=True):
            if dq is not None:
                dq[i : i + step].addmm_(of_part, part, alpha=scale)
            if gradient is not None:
                gradient.addmm_(of_part.T, q, alpha=scale)
    return total, (dq, *dk)


def _products(queries: Tensor, keys: Sequence[Tensor]) -> Tensor:
    """queries · keysᵀ of all parts, side by side."""
    found = queries.new_empty(len(queries), sum(map(len, keys)))
    for out, part in zip(found.split([len(part) for part in keys], 1), keys, strict=True):
        torch.mm(queries, part.T, out=out)
    return found


def _tile(logits: Tensor, own: Tensor, binary: bool) -> tuple[Tensor, Tensor]:
    """Σ_i L_i and G of rows with all their logits, which it uses up."""
    positive = logits.gather(1, own)
    strongest, top = logits.scatter_(1, own, float("-inf")).max(1, keepdim=True)
    logits.scatter_(1, top, float("-inf")).scatter_(1, own, positive)  # in this order: top may be own if all is masked
    rest = logits.logsumexp(1, keepdim=True)
    above = strongest - rest
    share = torch.sigmoid(-above)  # exp(e − r)
    q = logits.sub_(rest).exp_()  # 0 at the strongest
    p = q * share
    left_out = F.softplus(above, threshold=40)  # r − e
    loss, of_top = rest - positive + left_out, torch.sigmoid(above)
    if binary:
        wrong = p.scatter(1, own, 0.0)
        loss = loss + left_out - torch.log1p(-wrong).sum(1, keepdim=True)
        odds = wrong.div_(1 - wrong)
        factor = 2 - odds.sum(1, keepdim=True)
        p, of_top = p.mul_(factor).add_(odds).sub_(q), factor * of_top
    p.scatter_add_(1, top, of_top).scatter_add_(1, own, torch.full_like(rest, -1.0))
    return loss.sum(dtype=torch.float64), p
