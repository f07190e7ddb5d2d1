"""MultiCSR: a language model writes an entailed and a contradicting sentence for every sentence it is given, then says
which of them are good; an encoder learns from these triplets, and a frozen one tells it what in a batch is no negative.

With unit rows a_i, p_i, n_i of sentence, entailed and contradicting one, k = (p_1 … p_B, n_1 … n_B), and g the cosines
of the same texts in the frozen guide:

    l_ij = ⟨a_i, k_j⟩ / τ, but 0 where g_ij > φ and j ≠ i;   P = softmax of the rows;   τ = 0.05, φ = 0.95
    L    = −1/(2B²) Σ_i (log P_ii + Σ_{j≠i} log(1 − P_ij))

Triplets come from the model's own ratings, 0 to 5: roles are swapped where the contradiction is rated higher, and those
stay whose entailed sentence gets 3 or more, whose contradiction 3 or less, and not both the same.

FAQ. Why a binary loss of a softmax? The released code has it; `form="cross_entropy"` is SimCSE's with hard negatives.
Is a masked key gone? It stays with logit 0, as if orthogonal: `mask_mode="neg_inf"` removes it. Its own contradiction
too may be masked, its own positive never. Does φ depend on τ? No; the released test silently assumes τ = 0.05. Has the
guide dropout? In the release, so that its mask is random; better put it into eval mode.

Source: Wang et al. 2023, "Large Language Models can Contrastively Refine their Generation for Better Sentence
Representation Learning", arXiv 2310.10962.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from fastcontrast import info_nce
from fastcontrast.distributed._exchange import active
from fastcontrast.distributed._sums import count_over_ranks, gathered, share
from fastcontrast.ops import _check as check
from fastcontrast.ops._formed import formed
from fastcontrast.ops._precision import float32

from ._parts.multicsr_loop import Best, Pooler, agreement
from ._parts.multicsr_rows import rows_loss
from ._parts.multicsr_triplets import Triplet, in_roles, is_good, news, rating, written
from ._shared.encoder import Encoder, batches
from ._shared.report import Report, train
from ._shared.texts import document_ratings, word_ratings

__all__ = ["Best", "Pooler", "Triplet", "in_roles", "is_good", "multicsr_loss", "rating", "run", "written"]

STEPS, BATCH, RATE = 50, 32, 5e-5
SENTENCES, LAYERS = 160, None  # that SmolLM2 continues, with all of its layers
LIMIT = 0.95
EVERY = 10  # steps between two looks at the ratings that choose the weights
MASKED = {"zero_logit": 0.0, "neg_inf": float("-inf")}
FORMS = ("bce_over_softmax", "cross_entropy")


def multicsr_loss(
    anchor: Tensor,  # [B, D]
    positive: Tensor,  # [B, D]
    negative: Tensor,  # [B, D]
    guide: tuple[Tensor, Tensor, Tensor] | None = None,  # [B, Dg] each
    scale: float = 20.0,
    *,
    limit: float = 0.95,
    mask_mode: str = "zero_logit",
    form: str = "bce_over_softmax",
) -> Tensor:
    """L above, 1/τ = `scale`, φ = `limit`; features of length 1, also the guide's of the same texts, which get no
    gradient. No matrix of all cosines exists; no −log(1 − P) overflows, however sure a row is of a wrong key.

    Args:
        guide: without one nothing is masked.
        mask_mode: what becomes of a masked key: "zero_logit" or "neg_inf".
        form: "cross_entropy" is −1/B Σ_i log P_ii.

    Inside `exchange` keys are gathered from all ranks. An empty batch gives 0. Raises ValueError or TypeError naming
    what does not fit.
    """
    op = "multicsr_loss"
    check.one_of(op, "mask_mode", mask_mode, tuple(MASKED))
    check.one_of(op, "form", form, FORMS)
    anchor, positive, negative = _triplet(op, ("anchor", "positive", "negative"), anchor, positive, negative)
    of_guide = None
    if guide is not None:
        ga, *gk = _triplet(op, ("guide anchor", "guide positive", "guide negative"), *(x.detach() for x in guide))
        if len(ga) != len(anchor):
            raise ValueError(f"{op}: guide must have the {len(anchor)} rows of anchor, got {len(ga)}")
        of_guide = ga, [gathered(x) for x in gk]
    how, count = active(), count_over_ranks(len(anchor), anchor.device)
    first = 0 if how is None else how.shards(len(anchor), anchor.device).offset
    binary = form == FORMS[0]

    def rows(inputs, needs):
        queries, *keys = inputs
        total, gradients = rows_loss(
            queries, keys, of_guide, first, scale, limit, MASKED[mask_mode], binary, needs
        )  # fmt: skip
        return total.to(queries.dtype), gradients

    total = formed(rows, anchor, gathered(positive), gathered(negative), op=op)
    return share(total / (2 * max(count, 1)) if binary else total, len(anchor))


def _triplet(op: str, names: tuple[str, ...], anchor: Tensor, *others: Tensor) -> list[Tensor]:
    """Three matrices of one shape, in float32 at least."""
    check.matrix(op, names[0], anchor)
    for name, x in zip(names[1:], others, strict=True):
        check.matrix(op, name, x, anchor.shape[1], like=names[0])
        check.same_kind(op, name, x, anchor, like_name=names[0])
        if len(x) != len(anchor):
            raise ValueError(f"{op}: {name} must have the {len(anchor)} rows of {names[0]}, got {len(x)}")
    return [float32(x) for x in (anchor, *others)]


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Sentences of news, what SmolLM2 writes for them, and MiniLM's first layers as the encoder. SimCSE without labels
    comes first, on the same sentences, and then is the guide; beside MultiCSR the same triplets without a mask. All
    start alike, and keep the weights that agree best with SimLex-999; WordSim-353 and the first 32 tokens of Lee-50's
    texts are the test. With some sixty triplets they differ by a point or two.
    """
    steps = STEPS if steps is None else steps
    report = Report("multicsr", output, steps=steps, seed=seed, limit=limit, batch=BATCH)
    sentences = news(SENTENCES if limit is None else min(SENTENCES, max(4, limit // 50)))
    made = written(sentences, LAYERS)
    good = [x for x in made if is_good(x)] or made  # of a few that a tiny run has, none may be
    chosen, tests = word_ratings("simlex999"), {"Lee-50": document_ratings(), "WordSim-353": word_ratings()}
    guide = None
    for label in ("SimCSE", "MultiCSR, no mask", "MultiCSR"):
        torch.manual_seed(seed)
        model, texts = Encoder(), sentences if guide is None else good
        pooler, best, rows = Pooler(model.width), Best(model), batches(len(texts), BATCH, seed)

        def features(texts: list[str], model=model, pooler=pooler) -> Tensor:
            ids, mask = model.tokens(texts)
            return pooler(model.pool(model.states(ids, mask), mask))

        def step(_: int, label=label, texts=texts, rows=rows, features=features, guide=guide) -> Tensor:
            some = [texts[i] for i in next(rows)]
            if guide is None:
                return info_nce(features(some), features(some), 20.0)  # two draws of dropout
            triplet = [list(x) for x in zip(*(x[:3] for x in some), strict=True)]
            found = features([text for column in triplet for text in column]).chunk(3)
            if label == "MultiCSR":
                return multicsr_loss(*found, [guide.encode(x) for x in triplet], limit=LIMIT)
            return multicsr_loss(*found)

        def look(i: int, model=model, best=best) -> None:
            if (i + 1) % EVERY == 0 or i + 1 == steps:
                best.offer(model, agreement(model, chosen))

        with report.model(label) as found:
            learned = [*model.parameters(), *pooler.parameters()]
            found.losses = train(label, steps, learned, step, rate=RATE, after=look)
            best.restore(model)
            found.metrics = {f"{name}, Spearman": agreement(model, ratings) for name, ratings in tests.items()}
            found.metrics["SimLex-999, Spearman"] = best.score.item()
        guide = guide or model.eval()
    return report.close(model, triplets=[x._asdict() for x in good])
