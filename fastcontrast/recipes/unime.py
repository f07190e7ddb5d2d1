"""UniME: a language model learns to embed from a text embedder, then from the hardest negatives that are not false.

1st stage, on text alone, with unit rows e_i of the student and t_i of a frozen teacher:

    p_i(j) = softmax_j(⟨e_i, e_j⟩ / τ),   q_i(j) = softmax_j(⟨t_i, t_j⟩ / τ),   L = Σ_i KL(q_i ‖ p_i)

2nd stage, on pairs of unit rows q_i and c_i, s_ij = ⟨q_i, c_j⟩, k = 8, β = 0.1, τ = 0.02:

    N_i = the k largest s_ij of j ≠ i with s_ij ≤ s_ii + β, for what is nearer may be a false negative
    L   = −1/n Σ_i log( exp(s_ii / τ) / (exp(s_ii / τ) + Σ_{j ∈ N_i} exp(s_ij / τ)) )

Neither keeps an n × n matrix; the second's backward touches k + 1 rows of c for each of q.

FAQ. Which way does the KL go? The paper prints the student first; the default is that of distillation, the teacher's
mean, and `direction="reverse"` the other. Does a row meet itself in the 1st stage? As printed, yes: at a small τ both
softmaxes then collapse onto it, and the loss vanishes; `exclude_self` prevents that. Fewer than k negatives? They are
taken again, the hardest first; see `underfull`. A batch that does not fit? `fastcontrast.GradCache` takes either loss.

Source: Gu et al. 2025, "Breaking the Modality Barrier: Universal Embedding Learning with Multimodal LLMs",
arXiv 2504.17432.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastcontrast import distill_loss, info_nce
from fastcontrast.data import docstrings
from fastcontrast.minilm import minilm_features
from fastcontrast.ops import _check as check

from ._parts.unime_negatives import hard_negative_loss
from ._parts.unime_student import LowRank, word_means
from ._shared.encoder import batches
from ._shared.report import Report, train
from ._shared.texts import recall_at_1

__all__ = ["LowRank", "distillation_loss", "hard_negative_loss", "run"]

STEPS, RATE = 40, 2e-3  # of either stage: some seven times through the pairs
BATCH, RANKS = (768, 1024), (32, 16)  # of the 1st stage and the 2nd, as in the paper
SCALE = 20.0  # 1 / τ; at the paper's 50 all find less here
UNSEEN = 1000


def distillation_loss(
    student: Tensor,  # [n, D]
    teacher: Tensor,  # [n, Dt]
    scale: float | Tensor,
    *,
    direction: str = "forward",
    exclude_self: bool = False,
    reduction: str = "sum",
) -> Tensor:
    """Σ_i KL(q_i ‖ p_i) of unit features; scale = 1 / τ, which the paper does not tell. The teacher gets no gradient.

    direction: "forward" as above, "reverse" for KL(p ‖ q). reduction: "sum", "mean" over i, or "none". Raises
    ValueError naming what does not fit.
    """
    check.matrix("distillation_loss", "student", student)
    check.matrix("distillation_loss", "teacher", teacher)
    if len(teacher) != len(student):
        raise ValueError(f"distillation_loss: teacher must have {len(student)} rows like student, got {len(teacher)}")
    return distill_loss(
        student, student, teacher, teacher, scale, directions=("query_to_key",), form="kl",
        divergence_direction=direction, exclude_self=exclude_self, reduction=reduction,
    )  # fmt: skip


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """A student of frozen word vectors and adapters first learns from MiniLM, on docstrings alone, then to find the
    code of a docstring. Beside UniME the start, either stage alone, and InfoNCE with and without the first.

    The first stage helps whatever comes after it. The second is a little ahead of InfoNCE in the direction that it
    trains, after the first stage alone, and behind it in the other.
    """
    steps = STEPS if steps is None else steps
    report = Report("unime", output, steps=steps, seed=seed, limit=limit, batch=BATCH, scale=SCALE)
    pairs = docstrings(limit=limit, unseen=UNSEEN if limit is None else max(1, limit // 4), seed=seed)
    taught = [name for name, unseen in zip(pairs.names, pairs.unseen.tolist(), strict=True) if not unseen]
    texts, words, code = word_means(taught, pairs.names, pairs.items)
    words, teacher = words[pairs.ids], minilm_features(taught)

    def fit(label: str, rank: int, start: Tensor, count: int, size: int, loss: Callable[..., Tensor]):
        """A new adapter on a map, trained, and its losses."""
        torch.manual_seed(seed)
        model, drawn = LowRank(start, rank), batches(count, size, seed)
        return model, train(label, steps, model, lambda _: loss(model, next(drawn)), rate=RATE)

    def first(model: LowRank, rows: Tensor) -> Tensor:
        return distillation_loss(model(texts[rows]), teacher[rows], SCALE, exclude_self=True, reduction="mean")

    def second(objective: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def loss(model: LowRank, rows: Tensor) -> Tensor:
            rows = pairs.train[rows]
            return objective(model(words[rows]), model(code[rows]), SCALE)

        return loss

    def measure(model: LowRank) -> dict[str, float]:
        with torch.no_grad():
            asked, found = model(words[pairs.test]), model(code[pairs.test])
        return {
            "docstring → code R@1, %": recall_at_1(asked, found),
            "code → docstring R@1, %": recall_at_1(found, asked),
        }

    model = LowRank(torch.eye(texts.shape[1]), 1)
    with report.model("start") as found:
        found.metrics = measure(model)
    untrained = model.merge()
    with report.model("1st stage") as found:
        model, found.losses = fit("1st stage", RANKS[0], untrained, len(texts), BATCH[0], first)
        found.metrics = measure(model)
    distilled = model.merge()
    for label, start, objective in (
        ("InfoNCE", untrained, info_nce),
        ("2nd stage alone", untrained, hard_negative_loss),
        ("1st stage, InfoNCE", distilled, info_nce),
        ("UniME", distilled, hard_negative_loss),
    ):
        with report.model(label) as found:
            model, found.losses = fit(label, RANKS[1], start, len(pairs.train), BATCH[1], second(objective))
            found.metrics = measure(model)
    return report.close(model)
