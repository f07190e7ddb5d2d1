"""NT-Xent, the loss of SimCLR: two views of each sample in one set."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast.distributed._exchange import active
from fastcontrast.distributed._lse import similarity_lse
from fastcontrast.distributed._sums import numbers, share
from fastcontrast.ops import _check as check
from fastcontrast.ops import similarity_cross_entropy
from fastcontrast.ops._precision import float32, without_autocast

from ._common import ScaledLoss, features, reduce


@without_autocast
def nt_xent_loss(
    view1: Tensor,  # [N, D]
    view2: Tensor,  # [N, D]
    scale: float | Tensor = 2.0,
    *,
    ids: Tensor | None = None,  # [N] integer
    weights: Tensor | None = None,  # [N]
    reduction: str = "mean",
    return_accuracy: bool = False,
    workspace: int | None = None,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """loss_u = −log( exp L_uu' / Σ_{v ≠ u} exp L_uv ),   L = scale · z zᵀ,   z = [view1; view2],   u' u's other view.

    Mean over the 2N rows. Views are taken as they are: normalise them first. L is symmetric: half of it is computed.

    Args:
        view1, view2: [N, D], pairs in order.
        scale: 1 / temperature (0.5 in SimCLR's default, scale 2), number or 0-dim tensor with gradient.
        ids: [N]; samples with equal ids are not negatives of each other.
        reduction: "none" gives [N]: the mean of both views' rows.
        weights, return_accuracy, workspace, implementation: see `info_nce`.

    Source: Chen et al. 2020 (SimCLR).
    """
    op = "nt_xent_loss"
    view1, view2 = features(op, view1, view2, ("view1", "view2"))
    n = view1.shape[0]
    if view2.shape[0] != n:
        raise ValueError(f"{op}: view2 must have {n} rows like view1, got {view2.shape[0]}")
    views = torch.cat([view1, view2])
    scale = check.scalar(op, "scale", scale, views)
    index = torch.arange(2 * n, device=views.device)
    other = torch.cat([index[n:], index[:n]])
    # The row itself shares its id and is masked. The other view may share it, and is protected; without ids it cannot,
    # and saying so keeps the symmetry also where a compiler cannot look at `other`.
    protected = -1 if ids is None else other
    if ids is None:
        ids = numbers(2 * n, views.device)
    else:
        check.vector(op, "ids", ids, n, view1, floating=False)
        ids = torch.cat([ids, ids])
    masks = {"query_ids": ids, "key_ids": ids}
    run = {"workspace": workspace, "implementation": implementation}
    plain = reduction == "mean" and weights is None and not return_accuracy and active() is None
    if plain and n and not torch.compiler.is_compiling():
        return similarity_cross_entropy(views, views, scale, **masks, positives=other, **run)
    swept = similarity_lse(views, views, scale, **masks, positives=protected, return_best=return_accuracy, **run)
    lse, best = swept if return_accuracy else (swept, None)
    losses = lse.view(2, n).mean(0) - scale * torch.linalg.vecdot(float32(view1), float32(view2))
    loss = reduce(op, losses, weights, reduction, like=views)
    if not return_accuracy:
        return loss
    hits = best == other
    return loss, share(hits.sum().float(), 2 * n)


class NTXentLoss(ScaledLoss):
    """`nt_xent_loss` as a module: `NTXentLoss(scale=2.0)(view1, view2)`; see there for equation and settings."""

    function = staticmethod(nt_xent_loss)
    default_scale = 2.0
