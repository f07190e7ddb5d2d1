"""The primer's losses whose dense forms are large: triplets mined in a batch, lifted structure, corrected binary NCE.

Dense, all triplets are listed first, as trainers that mine do it: [N, N, N] would be 34 GB at N = 2048.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.recipes import primer

from .._harness import OURS, Bar, Workload
from . import against_dense

A_CLASS, MARGIN, SCALE = 4, 0.2, 10.0
INFINITY = float("inf")


def labelled(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Unit rows about the centres of their classes, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(shape[0]) // A_CLASS
    centres = torch.randn(shape, generator=generator)[labels]
    return F.normalize(centres + torch.randn(shape, generator=generator), dim=1).requires_grad_(), labels


def pairs(shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """Queries, keys, how likely each key is drawn as noise."""
    generator = torch.Generator().manual_seed(0)
    queries, noise = (F.normalize(torch.randn(shape, generator=generator), dim=1) for _ in range(2))
    keys, drawn = F.normalize(queries + noise, dim=1), torch.rand(shape[0], generator=generator) + 0.1
    return queries.requires_grad_(), keys.requires_grad_(), drawn / drawn.sum()


def distances(x: Tensor) -> Tensor:
    squares = x.square().sum(1)
    return (squares[:, None] + squares - 2 * x @ x.T).clamp(min=0)


def dense_all(x: Tensor, labels: Tensor) -> Tensor:
    same = labels[:, None] == labels
    i, p = (same & ~torch.eye(len(x), dtype=torch.bool)).nonzero(as_tuple=True)
    pair, n = (~same)[i].nonzero(as_tuple=True)
    d = distances(x)
    return (d[i[pair], p[pair]] - d[i[pair], n] + MARGIN).relu().mean()


def dense_hard(x: Tensor, labels: Tensor) -> Tensor:
    same, d = labels[:, None] == labels, distances(x)
    far = d.masked_fill(~same | torch.eye(len(x), dtype=torch.bool), -INFINITY).amax(1)
    return (far - d.masked_fill(same, INFINITY).amin(1) + MARGIN).relu().mean()


def dense_lifted(x: Tensor, labels: Tensor) -> Tensor:
    same, own = labels[:, None] == labels, torch.eye(len(x), dtype=torch.bool)
    d = distances(x).masked_fill(own, 1.0).sqrt()  # the root has no slope at 0
    push = (1 - d).masked_fill(same, -INFINITY).logsumexp(1)
    hinge = (torch.logaddexp(push[:, None], push) + d).relu().square()
    pair = same & ~own
    return hinge.masked_fill(~pair, 0.0).sum() / (2 * pair.sum())


def nce(queries: Tensor, keys: Tensor, noise: Tensor) -> Tensor:
    return primer.binary_nce(queries, keys, SCALE, noise=noise)


def dense_nce(queries: Tensor, keys: Tensor, noise: Tensor) -> Tensor:
    logits = SCALE * queries @ keys.T - ((len(keys) - 1) * noise).log()
    return F.binary_cross_entropy_with_logits(logits, torch.eye(len(keys)), reduction="none").sum(1).mean()


def workloads(quick: bool) -> list[Workload]:
    n, large, d = (256, 512, 64) if quick else (4096, 8192, 512)
    half, triplets = n // 2, n // 2 * (A_CLASS - 1) * (n // 2 - A_CLASS)
    mined = partial(primer.mined_triplet_loss, margin=MARGIN)
    rows = (
        ("triplets, all", half, labelled, mined, dense_all, 3, 64 * triplets, 2.0, 10),
        # Our workspace for the one product is 64 MiB.
        ("triplets, hard", n, labelled, partial(mined, mining="hard"), dense_hard, 1, 48 * n * n, 2.0, 4),
        # Four products, where dense autograd spends three and keeps its matrices.
        ("lifted structure", n, labelled, primer.lifted_structure_loss, dense_lifted, 4, 64 * n * n, 1.5, 10),
        ("binary NCE", large, pairs, nce, dense_nce, 3, 24 * large * large, 1.5, 10),
    )
    return [
        against_dense(
            f"primer {name} {size} × {d}", (size, d), (64, 32), inputs, ours, dense, products=[(size, size, d, count)],
            bars=() if quick else (
                Bar("dense torch", OURS, at_least=faster),
                Bar("dense torch", OURS, at_least=smaller, what="peak_extra_bytes"),
            ),
            needs=needs, compile=False, reps=5,
        )
        for name, size, inputs, ours, dense, count, needs, faster, smaller in rows
    ]  # fmt: skip
