"""NT-Xent and decoupled contrastive losses of lightly, without a matrix of logits.

    from fastcontrast.integrations.lightly import DCLLoss, DCLWLoss, NTXentLoss

Subclasses of the originals with the same arguments; only `forward` is theirs no more. Views are normalised, and
half-precision ones compared in float32, inside. With `gather_distributed` ranks may hold different numbers of samples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from lightly import loss
from torch import Tensor

from fastcontrast.distributed import gather, shards, world_size
from fastcontrast.losses import info_nce, nt_xent_loss
from fastcontrast.ops import similarity_lse
from fastcontrast.ops._precision import without_autocast
from fastcontrast.ops._unit import unit_rows

__all__ = ["DCLLoss", "DCLWLoss", "NTXentLoss"]

Weights = Callable[[Tensor, Tensor], Tensor]


def _gathered(out0: Tensor, out1: Tensor) -> tuple[Tensor, Tensor, int]:
    """Both views of every rank's samples, view after view [2N, D]; the index of each own sample [n]; and N."""
    held = shards(out0.shape[0], out0.device)
    every = gather(torch.cat([out0, out1], 1))
    own = held.offset + torch.arange(out0.shape[0], device=out0.device)
    return torch.cat(every.chunk(2, 1)), own, held.total


@without_autocast
def _bank_loss(out0: Tensor, out1: Tensor, bank: Tensor, scale: float) -> Tensor:
    negatives = similarity_lse(out0, bank.to(out0), scale)
    return F.softplus(negatives - scale * torch.linalg.vecdot(out0, out1), threshold=40.0).mean()


class NTXentLoss(loss.NTXentLoss):
    """loss_u = −log( exp L_uu' / Σ_{v ≠ u} exp L_uv ),   L = ⟨·, ·⟩ / temperature,   u' u's other view; mean over rows.

    With a memory bank, the mean over samples of −log( exp L_01 / (exp L_01 + Σ_b exp L_0b) ), b the bank's rows as they
    were before this batch. `lightly.loss.NTXentLoss` with its arguments.

    Source: Chen et al. 2020 (SimCLR); He et al. 2020 (MoCo).
    """

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:  # [n, D], [n, D]
        out0, out1 = unit_rows(out0), unit_rows(out1)
        scale = 1 / self.temperature
        out1, bank = self.memory_bank(out1, update=out0.requires_grad)
        if bank is not None:
            return _bank_loss(out0, out1, bank.t(), scale)
        if not self.gather_distributed or world_size() == 1:
            return nt_xent_loss(out0, out1, scale)
        keys, own, total = _gathered(out0, out1)
        return info_nce(
            torch.cat([out0, out1]),
            keys,
            scale,
            positives=torch.cat([total + own, own]),
            query_ids=torch.cat([own, total + own]),
            key_ids=torch.arange(2 * total, device=keys.device),
        )


@without_autocast
def _decoupled(out0: Tensor, out1: Tensor, scale: float, weight_fn: Weights | None, gather_distributed: bool) -> Tensor:
    n, queries = out0.shape[0], torch.cat([out0, out1])
    if gather_distributed and world_size() > 1:
        keys, own, total = _gathered(out0, out1)
        query_ids, key_ids = own.repeat(2), torch.arange(total, device=keys.device).repeat(2)
    else:  # one tensor of features and one of ids: half of the matrix is computed
        keys = queries
        query_ids = key_ids = torch.arange(n, device=keys.device).repeat(2)
    negatives = similarity_lse(queries, keys, scale, query_ids=query_ids, key_ids=key_ids, positives=-1)
    positives = scale * torch.linalg.vecdot(out0, out1)
    weights = (weight_fn(out0, out1), weight_fn(out1, out0)) if weight_fn else (1.0, 1.0)
    return (negatives.view(2, n) - torch.stack([weight * positives for weight in weights])).mean()


class DCLLoss(loss.DCLLoss):
    """loss_u = log Σ_v exp L_uv − w_u L_uu',   L = ⟨·, ·⟩ / temperature,   v over both views of the other samples.

    Mean over rows; u' is u's other view, w = `weight_fn(out0, out1)` for the first view's rows and
    `weight_fn(out1, out0)` for the second's, of normalised views, else 1. `lightly.loss.DCLLoss` with its arguments.

    Source: Yeh et al. 2022, "Decoupled Contrastive Learning", eq. 6.
    """

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:  # [n, D], [n, D]
        out0, out1 = unit_rows(out0), unit_rows(out1)
        return _decoupled(out0, out1, 1 / self.temperature, self.weight_fn, self.gather_distributed)


class DCLWLoss(DCLLoss, loss.DCLWLoss):
    """`DCLLoss` with w = 2 − n · softmax(⟨out0, out1⟩ / sigma) over the samples. `lightly.loss.DCLWLoss`."""
