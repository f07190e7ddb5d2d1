"""SaHa: a generative model becomes an embedder. A prompt of two levels makes its last token sum up the input before any
training; the vectors that this gives say which queries are hard for each other, and training batches are made of them.

    L = −1/B Σ_i log(exp(⟨q_i, c_i⟩ / τ) / Σ_j exp(⟨q_i, c_j⟩ / τ)),  τ = 0.02,  q, c of length 1

over a batch that is a union of clusters, B pairs in all. A cluster is a query and up to K others whose answers it takes
for its own, of those that it finds the ones least like it: `saha_clusters`. No forward pass is spent on negatives.

FAQ. Which similarity is the threshold for false negatives? None: a candidate counts as wrong if its query is unlike
this one, by rank. Two equal candidates in a batch? They count as negatives, unless `candidate_ids` tell.
More targets than one? With m a query, the first of them is its own: `targets=m`, the own key of i is i · m.
Batches too large for memory? `GradCache([model, model], 4, saha_loss)(queries, candidates)`.

Source: Ju and Lee 2025, "From Generator to Embedder: Harnessing Innate Abilities of Multimodal LLMs via Building
Zero-Shot Discriminative Embedding Model", arXiv 2508.00955.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor

from fastcontrast import info_nce
from fastcontrast.data import docstrings
from fastcontrast.ops import _check as check

from ._parts.saha_batches import ClusterBatches, hierarchical_prompt, last_token
from ._parts.saha_clusters import saha_clusters
from ._shared.encoder import Encoder
from ._shared.report import Report, train
from ._shared.texts import recall_at_1

__all__ = ["ClusterBatches", "hierarchical_prompt", "last_token", "run", "saha_clusters", "saha_loss"]

STEPS, RATE = 100, 1e-4
CLUSTERS, HARD, MULTIPLIER = 4, 7, 3  # clusters of a batch, of at most HARD + 1 rows
PAIRS, UNSEEN = 3000, 500
LAYERS, CHARACTERS = 1, 300  # of the encoder; of a text of code


def saha_loss(
    queries: Tensor,  # [B, D]
    candidates: Tensor,  # [m·B, D]
    scale: float | Tensor = 50.0,
    *,
    targets: int = 1,
    candidate_ids: Tensor | None = None,  # [m·B] integer
) -> Tensor:
    """L above, 1/τ = `scale`; rows of length 1. Inside `exchange` all ranks' candidates compete, however many each has.

    Args:
        targets: m; candidates i·m … i·m + m − 1 are of query i, the first of them its own.
        candidate_ids: candidates with the id of a query's own are no negatives of it.

    Raises ValueError or TypeError naming what does not fit.
    """
    op = "saha_loss"
    check.matrix(op, "queries", queries)
    check.matrix(op, "candidates", candidates, queries.shape[1])
    if targets < 1 or len(candidates) != targets * len(queries):
        raise ValueError(
            f"{op}: candidates must be {targets} for each of {len(queries)} queries, got {len(candidates)} in all"
        )
    own, ids = None if targets == 1 else torch.arange(len(queries), device=queries.device) * targets, {}
    if candidate_ids is not None:
        check.vector(op, "candidate_ids", candidate_ids, len(candidates), candidates, floating=False)
        ids = {"query_ids": candidate_ids[::targets], "key_ids": candidate_ids}
    return info_nce(queries, candidates, scale, positives=own, **ids)


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Docstrings ask for their code. An encoder, MiniLM's first layer, embeds all of them before training, clusters are
    made of that, and it trains on them; beside it, from the same start, the same rows shuffled between the clusters, so
    that batches have the same sizes. Prompts are for generative models, and this one is none. Among 2,500 rows chance
    too meets hard negatives: clusters gain nothing here.
    """
    steps = STEPS if steps is None else steps
    report = Report("saha", output, steps=steps, seed=seed, limit=limit, clusters_per_batch=CLUSTERS, hard=HARD)
    pairs = docstrings(UNSEEN, limit=PAIRS if limit is None else min(limit, PAIRS))
    code = [text[:CHARACTERS] for text in pairs.items]
    start = Encoder(LAYERS)

    def texts(rows: Tensor) -> tuple[list[str], list[str]]:
        return [pairs.names[pairs.ids[row]] for row in rows], [code[row] for row in rows]

    def recall(model: Encoder) -> dict[str, float]:
        asked, found = (model.encode(x) for x in texts(pairs.test))
        return {
            "docstring → code R@1, %": recall_at_1(asked, found), "code → docstring R@1, %": recall_at_1(found, asked)
        }  # fmt: skip

    with report.model("before training") as found:
        distinct = {text: i for i, text in enumerate(dict.fromkeys(code))}
        answers = torch.tensor([distinct[code[row]] for row in pairs.train])
        vectors = start.encode(pairs.names), start.encode([*distinct])
        hard, left_over = saha_clusters(*vectors, pairs.ids[pairs.train], answers, HARD, MULTIPLIER)
        clusters = [pairs.train[cluster] for cluster in hard + left_over]
        found.metrics = recall(start)
    lengths, order = [len(x) for x in clusters], torch.Generator().manual_seed(seed)
    rows = torch.cat(clusters)
    shuffled = rows[torch.randperm(len(rows), generator=order)].split(lengths)
    for label, grouped in (("random batches", shuffled), ("SaHa", clusters)):
        torch.manual_seed(seed)
        model, drawn = copy.deepcopy(start), ClusterBatches([x.tolist() for x in grouped], CLUSTERS, seed)

        def step(_: int, model=model, drawn=drawn) -> Tensor:
            asked, answers = texts(next(drawn))
            return saha_loss(model(asked), model(answers))

        with report.model(label) as found:
            found.losses = train(label, steps, model, step, rate=RATE)
            found.metrics = recall(model)
    return report.close(model, clusters=len(hard), left_over=len(left_over))
