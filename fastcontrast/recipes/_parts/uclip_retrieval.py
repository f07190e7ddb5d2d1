"""uCLIP's soft retrieval from a bank of any size, in one piece or in parts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcontrast.ops import _check as check
from fastcontrast.ops import similarity_mix

TEMPERATURE = 0.01
CHUNK = 1 << 14  # rows of a half-precision bank that are in float32 at a time

Part = tuple[Tensor, Tensor]  # Σ_m softmax_m v_m [B, D], and the logits' log-sum-exp [B]


@torch.no_grad()
def look_up(queries: Tensor, bank: Tensor, temperature: float = TEMPERATURE) -> Part:  # [B, D], [M, D]
    """The softmax-weighted mean of a bank's rows, not normalised, and the log-sum-exp of its logits: `merge` joins
    those of a bank's parts. Products are in the precision of the queries, also where the bank is stored in less."""
    check.matrix("look_up", "bank", bank, queries.shape[1])
    if bank.dtype == queries.dtype:
        return similarity_mix(queries, bank, bank, 1 / temperature, return_lse=True)
    parts = (chunk.to(queries.dtype) for chunk in bank.split(CHUNK))
    return _join(similarity_mix(queries, part, part, 1 / temperature, return_lse=True) for part in parts)


def merge(parts: Iterable[Part]) -> Tensor:
    """What `retrieve` gives of the whole bank, from `look_up` of its parts (chunks, files, ranks), in any order."""
    return F.normalize(_join(parts)[0], dim=-1, eps=1e-12)


def retrieve(queries: Tensor, bank: Tensor, temperature: float = TEMPERATURE) -> Tensor:  # [B, D], [M, D]
    """N(Σ_m softmax_m(⟨q_i, b_m⟩ / T) b_m), [B, D], without gradient; 0 where the mean is.

    A bank in float16 stays so in memory. Raises ValueError naming what does not fit.
    """
    return merge([look_up(queries, bank, temperature)])


def _join(parts: Iterable[Part]) -> Part:
    parts = iter(parts)
    mean, lse = next(parts)
    for other, r in parts:
        both = torch.logaddexp(lse, r)
        mean = mean * (lse - both).exp()[:, None] + other * (r - both).exp()[:, None]
        lse = both
    return mean, lse
