"""Text embeddings: what a survey finds them trained with, as a catalogue. Texts of one meaning lie close together, by
one of these objectives or by several added up.

    1   InfoNCE                            ranking_loss                 −log e^{s(q,d)/τ} / Σ_candidates e^{s/τ}
    2   in-batch and hard negatives        ranking_loss(negatives=)     candidates: all documents and all negatives
    3   GTE                                gte_loss                     and other queries, on either side
    4   masked, as Qwen3-Embedding         masked_loss                  without what is above s(q, d) + 0.1
    5   GIST                               gist_loss                    without what a guide finds nearer than d
    6   CoSENT                             cosent_loss                  log(1 + Σ_{y_p < y_r} e^{λ (s_p − s_r)})
    7   AnglE                              angle_loss                   the same of angles in the complex plane
    8   COS                                cosine_loss                  (cos(x, y) − label)²
    9   hardest pairs                      online_pair_loss             hinges, of pairs out of order alone
    10  MarginMSE                          margin_mse_loss              margins of a cross-encoder
    11  KL over lists                      list_kl_loss                 T² KL(teacher / T ‖ student / T)
    12  late interaction; XTR              late_interaction_loss, xtr_loss         Σ_i max_j ⟨q_i, d_j⟩
    13  Matryoshka                         matryoshka_loss, nested_info_nce        Σ_m loss(first m numbers)
    14  LEX                                word_weights, lexical_loss   w_v = max_t log(1 + relu(⟨h_t, E_v⟩ + b_v))
    15  MLM, MNTP, NTP; RTD                token_loss, replaced_token_loss
    16  SimCSE; whitening                  `nt_xent_loss` of two dropouts; whitening

A queue is `MemoryBank` in `info_nce`; a batch that does not fit goes through `GradCache`; `exchange` makes candidates
of all ranks' texts. No matrix of scores between texts, or of tokens and words, is stored. Features are of length 1
where a loss says so. Not here: flows, and other bounds of mutual information than InfoNCE.

FAQ. Why is GTE's loss never below log 2? Its positive is counted twice, in two of the blocks: `count_positive_once`.
Which documents does Qwen3's mask look at? Those of other queries; with `all_negatives` their hard negatives too.
What is AnglE's whole method? `angle_loss(cosent=1, in_batch=1)`.

Source: Zhang et al. 2025, "On The Role of Pretrained Language Models in General-Purpose Text Embeddings: A Survey",
arXiv 2507.20783.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcontrast.data import docstrings
from fastcontrast.minilm import minilm_features
from fastcontrast.towers import HashedWords, encode, hash_words

from ._parts.text_embeddings_blocks import gist_loss, gte_loss, masked_loss, ranking_loss
from ._parts.text_embeddings_lists import list_distillation_loss, list_kl_loss, list_scores, margin_mse_loss
from ._parts.text_embeddings_loop import TaskBatches, mine, whitening
from ._parts.text_embeddings_matryoshka import halves, matryoshka_loss, nested_info_nce
from ._parts.text_embeddings_pairs import angle, angle_loss, cosent_loss, cosine_loss, online_pair_loss, order_loss
from ._parts.text_embeddings_sparse import flops_penalty, lexical_loss, word_weights
from ._parts.text_embeddings_tokens import (
    late_interaction_loss,
    pool,
    replaced_token_loss,
    token_loss,
    xtr_loss,
    xtr_scores,
)
from ._shared.report import Report, train
from ._shared.texts import recall_at_1

__all__ = [
    "TaskBatches", "angle", "angle_loss", "cosent_loss", "cosine_loss", "flops_penalty", "gist_loss", "gte_loss",
    "halves", "late_interaction_loss", "lexical_loss", "list_distillation_loss", "list_kl_loss", "list_scores",
    "margin_mse_loss", "masked_loss", "matryoshka_loss", "mine", "nested_info_nce", "online_pair_loss", "order_loss",
    "pool", "ranking_loss", "replaced_token_loss", "run", "token_loss", "whitening", "word_weights", "xtr_loss",
    "xtr_scores",
]  # fmt: skip

STEPS, BATCH, RATE = 24, 2048, 4e-3  # eight times through the pairs
SCALE, MARGIN, UNSEEN = 20.0, 0.1, 1000
DIMS, BUCKETS = (128, 64, 32, 16), 1 << 15


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Docstrings and their code, through one bag of hashed words. From one start: InfoNCE, GTE, Qwen3's mask, GIST with
    MiniLM as the guide of docstrings, and Matryoshka; each asked with the first sixteen of its numbers, and with all.
    With all of them the five find about the same.
    """
    steps = STEPS if steps is None else steps
    report = Report("text_embeddings", output, steps=steps, seed=seed, limit=limit, batch=BATCH, scale=SCALE)
    pairs = docstrings(limit=limit, unseen=UNSEEN if limit is None else max(1, limit // 4), seed=seed)
    taught = [name for name, unseen in zip(pairs.names, pairs.unseen.tolist(), strict=True) if not unseen]
    guide = torch.zeros(len(pairs.names), 384)
    guide[~pairs.unseen] = minilm_features(taught)
    names, code = (hash_words(x, BUCKETS, 128) for x in (pairs.names, pairs.items))
    names = names[pairs.ids]
    texts = pairs.ids[pairs.train]

    def gist(q: Tensor, d: Tensor, meaning: Tensor) -> Tensor:
        return gist_loss(q, d, meaning, meaning, SCALE, margin=MARGIN)

    for label, loss in {
        "InfoNCE": lambda q, d, _: ranking_loss(q, d, SCALE),
        "GTE": lambda q, d, _: gte_loss(q, d, SCALE),
        "masked": lambda q, d, _: masked_loss(q, d, SCALE, margin=MARGIN),
        "GIST": gist,
        "Matryoshka": lambda q, d, _: nested_info_nce(q, d, SCALE, dims=DIMS),
    }.items():
        torch.manual_seed(seed)
        model = HashedWords(BUCKETS, DIMS[0])
        batches = TaskBatches(torch.zeros_like(texts), texts, min(BATCH, len(texts.unique())), seed)

        def step(_: int, model=model, loss=loss, batches=batches) -> Tensor:
            rows = pairs.train[next(batches)]
            return loss(model(names[rows]), model(code[rows]), guide[pairs.ids[rows]])

        with report.model(label) as found:
            found.losses = train(label, steps, model, step, rate=RATE)
            asked, items = (encode(model, x[pairs.test]) for x in (names, code))
            for width in (DIMS[-1], DIMS[0]):
                some = (F.normalize(x[:, :width], dim=1) for x in (asked, items))
                found.metrics[f"docstring → code R@1, first {width} numbers, %"] = recall_at_1(*some)
    return report.close(model)
