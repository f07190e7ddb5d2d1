"""SPACE-2: dialogs whose trees of labels overlap attract each other, as much as the trees do, in ten views of a tree;
dialogs without labels are told from all others by dropout alone.

Each of B dialogs is encoded twice, with another dropout: rows r = vB + i, h_r the state of a leading token. In view m

    z_r = N(tanh(W_m h_r + b_m)),   l_rs = ⟨z_r, z_s⟩ / τ,   w_rs = f_m(i(r), i(s)) of the trees, w_rr = 0
    L_m = 1/2B Σ_r (log Σ_(s≠r) exp l_rs − Σ_s w_rs l_rs / Σ_s w_rs) · τ/τ₀
    L   = mean_m L_m + 0.1 MLM of a labelled batch  +  the same of an unlabelled one, with w = the other copy alone

Σ_s w_rs l_rs = ⟨z_r, Σ_s w_rs z_s⟩ / τ is a product with w [B, B], and of the logits [2B, 2B] only the log-sum-exps are
computed. w carries no gradient. Equal trees in all of a batch: the least L_m is log(2B − 1), not 0.

FAQ. Must w be a Jaccard index? No: any w ≥ 0 will do, symmetric or not, and a row's factor does not matter. A row whose
weights are all 0 gives 0, and counts in 2B. Is the batch local? Yes, unless one asks: inside
`fastcontrast.distributed.exchange` it is that of all ranks, and each gives its rows of w, [b, B]. Do views weigh alike?
Yes, as in the released code.

Source: He et al. 2022, "SPACE-2: Tree-Structured Semi-Supervised Contrastive Pre-training for Task-Oriented Dialog
Understanding", arXiv 2209.06638.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcontrast import nt_xent_loss
from fastcontrast.distributed._lse import similarity_lse
from fastcontrast.distributed._sums import count_over_ranks, numbers, over_keys, share
from fastcontrast.losses._common import features
from fastcontrast.ops import _check as check
from fastcontrast.ops._precision import float32, without_autocast

from ._parts.space2_dialogs import NONE, MaskedWords, dialogs
from ._parts.space2_probe import r_drop_loss, told_by_neighbours
from ._parts.space2_trees import VIEWS, TreeScores, labels_of, scores_of
from ._shared.encoder import Encoder, batches
from ._shared.report import Report, train
from ._shared.texts import split

__all__ = [
    "MaskedWords", "Space2", "TreeScores", "labels_of", "r_drop_loss", "run", "scores_of", "soft_supcon_loss",
    "tree_loss",
]  # fmt: skip

STEPS, BATCH, RATE = 60, 32, 3e-4
LAYERS, DROPOUT, LONGEST = 1, 0.2, 24
TESTED, LABELLED = 1000, 1000
DOMAIN_AND_INTENT = [*VIEWS].index("DI")


@without_autocast
def soft_supcon_loss(
    z: Tensor,  # [N, D]
    weights: Tensor,  # [B, B]
    tau: float = 0.07,
    *,
    base_tau: float = 0.07,
    workspace: int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """L_m above, of N/B copies of B samples, copy after copy; features of length 1. Mean over all N rows.

    Extra memory: O(N·D), beside the weights. Inside `exchange` a rank gives its rows of weights, [b, B].

    Args:
        weights: ≥ 0, tiled over the copies; a row's own weight is left out.
        workspace, implementation: see `similarity_lse`.

    Raises: ValueError or TypeError naming the argument, what was expected and what came.
    """
    op = "soft_supcon_loss"
    z, _ = features(op, z, z, ("z", "z"))
    check.matrix(op, "weights", weights, count_over_ranks(len(weights), z.device), like="the batch")
    (rows, width), count = z.shape, len(weights)
    copies = rows // max(count, 1)
    if rows != copies * count:
        raise ValueError(f"{op}: z must have a multiple of {count} rows, those of weights, got {rows}")
    index = numbers(rows, z.device)
    run = {"workspace": workspace, "implementation": implementation}
    lse = similarity_lse(z, z, 1 / tau, query_ids=index, key_ids=index, positives=-1, **run)
    z = float32(z).reshape(copies, count, width)
    weights = weights.detach().to(z.dtype)
    own = weights.gather(1, numbers(count, z.device)[:, None])[:, 0]
    total = copies * weights.sum(1) - own
    valid = total > 0
    summed = z.sum(0)  # over a sample's copies, whose weights are alike: Σ_r Σ_s w_rs ⟨z_r, z_s⟩ is one of [B, D]
    mixed = over_keys(lambda local, block, part: local[0][:, part] @ block[0], [weights], [summed])
    alike = torch.linalg.vecdot(summed, mixed) - own * torch.linalg.vector_norm(z, dim=(0, 2)).square()
    mean = (alike / total.where(valid, 1.0)).masked_fill(~valid, 0.0).sum() / tau
    lse = lse.masked_fill(~valid.repeat(copies), 0.0).sum()
    return tau / base_tau * share(lse - mean, rows)


def tree_loss(z: Tensor, weights: Tensor | None = None, tau: float = 0.07, **settings: Any) -> Tensor:
    """The mean of `soft_supcon_loss` over views, z [2B, views, D]. Weights [views, B, B]; None for dialogs without
    labels, whose only positive is their other copy: NT-Xent."""
    check.tensor("tree_loss", "z", z, 3, "[2B, views, D]")
    if weights is None:
        factor = tau / settings.pop("base_tau", 0.07)
        return sum(factor * nt_xent_loss(*x.chunk(2), 1 / tau, **settings) for x in z.unbind(1)) / z.shape[1]
    check.tensor("tree_loss", "weights", weights, 3, "[views, B, B]")
    if len(weights) != z.shape[1]:
        raise ValueError(f"tree_loss: weights must be of {z.shape[1]} views, those of z, got {len(weights)}")
    return sum(soft_supcon_loss(x, w, tau, **settings) for x, w in zip(z.unbind(1), weights, strict=True)) / z.shape[1]


class Space2(nn.Module):
    """An encoder of texts, the maps W of its views, and masked words: L of a batch, with weights [10, B, B] or none.

    Args:
        width: of a view; default the encoder's. of_words: weight of the MLM.
    """

    def __init__(self, encoder: Encoder, width: int | None = None, of_words: float = 0.1):
        super().__init__()
        self.encoder, self.of_words = encoder, of_words
        self.views = nn.Linear(encoder.width, len(VIEWS) * (width or encoder.width))
        self.words = MaskedWords(encoder)

    def forward(self, texts: Sequence[str], weights: Tensor | None = None) -> Tensor:
        ids, mask = self.encoder.tokens(texts)
        twice = mask.repeat(2, 1)
        h = self.encoder.pool(self.encoder.states(ids.repeat(2, 1), twice), twice)
        z = F.normalize(self.views(h).tanh().unflatten(1, (len(VIEWS), -1)), dim=-1)
        return tree_loss(z, weights) + self.of_words * self.words(self.encoder, ids, mask)


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Docstrings of functions, a thousand of them with their trees: package, first verb, parameters, defaults. From the
    same start and with the same batches: dropout alone; hard labels, where equal package and verb are positives; and
    SPACE-2. Then the nearest of the labelled ones tell verb and package of others, from the encoder's features. The
    encoder is one layer, which moves little into a leading token: h is the mean of all states. Labels help with verbs;
    that soft ones beat hard ones is less than what a thousand questions can tell, and packages are told no better.
    """
    steps = STEPS if steps is None else steps
    report = Report("space2", output, steps=steps, seed=seed, limit=limit, batch=BATCH)
    every = dialogs(limit)
    known, test = split(len(every), TESTED, seed)
    count = min(LABELLED, len(known) // 2)
    labelled, unlabelled = known[:count], known[count:]
    texts, scores = [one.text for one in every], TreeScores([one.frame for one in every], {NONE})
    torch.manual_seed(seed)
    start = Space2(Encoder(LAYERS, dropout=DROPOUT, longest=LONGEST))
    for label in ("the start", "dropout alone", "hard labels", "SPACE-2"):
        torch.manual_seed(seed)
        model = copy.deepcopy(start)
        pairs = zip(batches(len(labelled), BATCH, seed), batches(len(unlabelled), BATCH, seed), strict=True)

        def step(_: int, label=label, model=model, pairs=pairs) -> Tensor:
            first, second = next(pairs)
            weights, rows = None, labelled[first]
            if label != "dropout alone":
                weights = scores(rows)
            if label == "hard labels":
                weights = (weights[DOMAIN_AND_INTENT] == 1).float().expand_as(weights)
            return model([texts[i] for i in rows], weights) + model([texts[i] for i in unlabelled[second]])

        with report.model(label) as found:
            if label != "the start":
                found.losses = train(label, steps, model, step, rate=RATE, decay=0.01, clip=5.0)
            found.metrics = told_by_neighbours(model.encoder, every, labelled, test)
    return report.close(model)
