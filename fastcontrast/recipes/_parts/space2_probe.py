"""What a pre-trained encoder is good for: the loss of fine-tuning it, and labels told by its nearest neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcontrast.ops import similarity_topk

from .._shared.encoder import Encoder
from .space2_dialogs import Dialog

NEIGHBOURS = 5


def r_drop_loss(first: Tensor, second: Tensor, labels: Tensor, weight: float = 5.0) -> Tensor:  # [B, C], [B, C], [B]
    """Fine-tuning: the mean cross-entropy of two passes with different dropout, + weight · ½ (KL(p‖q) + KL(q‖p))."""
    p, q = first.log_softmax(1), second.log_softmax(1)
    apart = ((p.exp() - q.exp()) * (p - q)).sum(1)  # KL(p‖q) + KL(q‖p)
    return (F.nll_loss(p, labels) + F.nll_loss(q, labels)) / 2 + weight * apart.mean() / 2


def told_by_neighbours(encoder: Encoder, every: list[Dialog], known: Tensor, test: Tensor) -> dict[str, float]:
    """Per cent of the dialogs `test` whose intent, and domain, most of their nearest among the `known` ones have."""
    keys, queries = (encoder.encode([every[i].text for i in rows]) for rows in (known, test))
    nearest, found = similarity_topk(queries, keys, NEIGHBOURS)[1], {}
    for kind in ("intent", "domain"):
        names = [getattr(one, kind) for one in every]
        places = {name: i for i, name in enumerate(sorted({*names}))}
        ids = torch.tensor([places[name] for name in names])
        found[f"{kind}, %"] = 100 * (ids[known][nearest].mode(1).values == ids[test]).float().mean().item()
    return found
