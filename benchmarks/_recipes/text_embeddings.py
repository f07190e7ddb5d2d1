"""The catalogue of text embeddings: GTE's four blocks, late interaction, CoSENT's order of pairs, Matryoshka."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.recipes.text_embeddings import (
    cosent_loss,
    gte_loss,
    halves,
    late_interaction_loss,
    matryoshka_loss,
    nested_info_nce,
    ranking_loss,
)

from .._harness import OURS, Bar, Workload
from . import MIB, _provider, against_dense

SCALE = 20.0
EACH = "a loss a prefix"


def pairs(shape: tuple[int, int], length: bool = True) -> tuple[Tensor, ...]:
    """Queries, and documents a little nearer to their own, so that there is much left to learn; of length 1 or not."""
    generator = torch.Generator().manual_seed(0)
    queries, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    both = queries, queries + 4 * noise
    return tuple((F.normalize(x, dim=1) if length else x).requires_grad_() for x in both)


def gte(queries: Tensor, documents: Tensor) -> Tensor:
    return gte_loss(queries, documents, SCALE)


def dense_gte(queries: Tensor, documents: Tensor) -> Tensor:
    crossed, diagonal = SCALE * queries @ documents.T, torch.eye(len(queries), dtype=torch.bool)
    own = [(SCALE * x @ x.T).masked_fill(diagonal, -torch.inf) for x in (queries, documents)]
    return F.cross_entropy(torch.cat([crossed, crossed.T, *own], 1), torch.arange(len(queries)))


def tokens(shape: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """Tokens of queries and of documents, and which of the documents' are real: three quarters on average."""
    batch, length, _ = shape
    generator = torch.Generator().manual_seed(0)
    queries, documents = (F.normalize(torch.randn(shape, generator=generator), dim=2) for _ in range(2))
    lengths = torch.randint(length // 2, length + 1, (batch, 1), generator=generator)
    return queries.requires_grad_(), documents.requires_grad_(), torch.arange(length) < lengths


def late(queries: Tensor, documents: Tensor, real: Tensor) -> Tensor:
    return late_interaction_loss(queries, documents, document_mask=real)


def dense_late(queries: Tensor, documents: Tensor, real: Tensor) -> Tensor:
    scores = torch.einsum("bid,cjd->bcij", queries, documents)
    best = scores.masked_fill(~real[:, None], -torch.inf).amax(3).sum(2)
    return F.cross_entropy(best, torch.arange(len(queries)))


def labelled(shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """Pairs, with a label from 0 to 5."""
    labels = torch.randint(6, shape[:1], generator=torch.Generator().manual_seed(1))
    return *pairs(shape, length=False), labels


def cosent(x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    return cosent_loss(x, y, labels, SCALE)


def dense_cosent(x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    scores = F.cosine_similarity(x, y, dim=1)
    above = (SCALE * (scores[:, None] - scores)).masked_fill(labels[:, None] >= labels, -torch.inf)
    return torch.cat([scores.new_zeros(1), above.flatten()]).logsumexp(0)


def nested(queries: Tensor, documents: Tensor) -> Tensor:
    return nested_info_nce(queries, documents, SCALE, dims=halves(queries.shape[1], 64))


def each(queries: Tensor, documents: Tensor) -> Tensor:
    loss = partial(ranking_loss, scale=SCALE)
    return matryoshka_loss(loss, queries, documents, dims=halves(queries.shape[1], 64))


def dense_prefixes(queries: Tensor, documents: Tensor) -> Tensor:
    total, target = 0.0, torch.arange(len(queries))
    for width in halves(queries.shape[1], 64):
        q, d = (F.normalize(x[:, :width], dim=1) for x in (queries, documents))
        total = total + F.cross_entropy(SCALE * q @ d.T, target)
    return total


def workloads(quick: bool) -> list[Workload]:
    rows, width = (256, 128) if quick else (4096, 1024)
    batch, length, dim = (4, 24, 32) if quick else (32, 180, 128)
    faster = Bar("dense torch", OURS, at_least=2.0)
    smaller = Bar("dense torch", OURS, at_least=10.0, what="peak_extra_bytes")

    def make(name, shape, tiny, inputs, ours, dense, products, bars, compile=True, **options) -> Workload:
        return against_dense(
            f"text_embeddings {name}", shape, tiny, inputs, ours, dense, products=products,
            bars=() if quick else bars, compile=compile and not quick, **options,
        )  # fmt: skip

    matrix = 4 * rows * rows
    # Three matrices of logits, two of them symmetric: two products for them, four for their gradients, where dense
    # torch takes nine.
    blocks = partial(make, shape=(rows, width), tiny=(64, 32), inputs=pairs, ours=gte, dense=dense_gte)
    found = [
        blocks(f"GTE {rows} × {width}", products=[(rows, rows, width, 6)], needs=16 * matrix,
               bars=(Bar("dense torch", OURS, at_least=1.5),)),
        make(f"late interaction {batch} × {length} × {dim}", (batch, length, dim), (2, 8, 8), tokens, late, dense_late,
             [(batch * length, batch * length, dim, 1)], (faster, smaller)),
        # The products are those of the cosines alone, and what these keep for their gradients either has.
        make(f"CoSENT {rows} × {width}", (rows, width), (64, 32), labelled, cosent, dense_cosent,
             [(rows, 1, width, 3)], (faster, Bar("dense torch", OURS, at_least=1.5, what="peak_extra_bytes")),
             needs=8 * matrix),
    ]  # fmt: skip
    prefixes = make(
        f"Matryoshka {rows} × {width}", (rows, width), (64, 128), partial(pairs, length=False), nested, dense_prefixes,
        [(rows, rows, width, 3)], (faster, Bar(EACH, OURS, at_least=1.2)), needs=20 * matrix,
    )  # fmt: skip
    found.append(replace(prefixes, providers=prefixes.providers | {EACH: _provider(each, memory=1)}))
    if not quick:
        found.append(
            blocks(f"GTE {rows} × {width}, in 4 MiB", products=[(rows, rows, width, 8)], needs=16 * matrix,
                   bars=(smaller,), compile=False, workspace=4 * MIB)
        )  # fmt: skip
    return found
