"""A primer's catalogue of contrastive losses for texts, and CLESS: a text encoder that learns from labels which are
words, so that a label needs no example to be understood.

    t_i the vector of a text, l that of a label, both of one encoder of words; m(t, l) a small network on [t; l]:
    L = −1/B Σ_i 1/(g_i + b_i) [Σ_{l ∈ pos(i)} log σ(m(t_i, l)) + Σ_{l ∈ neg(i)} log(1 − σ(m(t_i, l)))]

pos(i) are the text's labels or, without supervision, some of its words; neg(i) labels of other texts in the batch.

    binary NCE, negative sampling         binary_nce, with noise= corrected; listed_binary_nce for lists of any length
    ranking NCE, sampled softmax          ranking_nce, listed_ranking_nce; with equal noise info_nce
    two views; a queue                    nt_xent_loss; info_nce(queue=MemoryBank(...).features)
    Jensen-Shannon mutual information     jsd_loss
    supervised contrast; beside CE        supcon_loss; fine_tuning_loss
    bilinear x U l; classes as prompts    either NCE of (x @ U, l); info_nce(x, prompts, positives=labels)
    cloze energies; replaced tokens       cloze_nce(energies, noised, log_noise); the same without noise
    residual energies of texts            residual_energy_loss
    a token against the vocabulary        linear_cross_entropy
    pairs; N-pair; VSE and VSE++          pair_loss, labelled_pair_loss; n_pair_loss; vse_loss(hardest=False or True)
    triplets and their mining             triplet_loss, mined_triplet_loss
    lifted structure                      lifted_structure_loss

FAQ. What divides binary NCE? The rows, each a sum over its negatives; over all cells it is less by their number.
CLESS divides by g + b of each text? So its formula says; a text without labels counts in B and adds 0.
Is a word of the text ever its negative? No: what other texts drew is left out where this text has it too.

Source: Rethmeier and Augenstein 2021, "A Primer on Contrastive Pretraining in Language Processing: Methods, Lessons
Learned and Perspectives", arXiv 2102.12982; CLESS: Rethmeier and Augenstein 2020, arXiv 2010.01061.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._parts import primer_cless
from ._parts.primer_cless import Matcher, WordEncoder, World, pseudo_labels
from ._parts.primer_metric import (
    distances,
    labelled_pair_loss,
    lifted_structure_loss,
    mined_triplet_loss,
    n_pair_loss,
    pair_loss,
    triplet_loss,
    vse_loss,
)  # fmt: skip
from ._parts.primer_nce import (
    Lists,
    binary_nce,
    cloze_nce,
    fine_tuning_loss,
    jsd_loss,
    listed_binary_nce,
    listed_ranking_nce,
    logistic_loss,
    noise_bias,
    ranking_nce,
    residual_energy_loss,
)  # fmt: skip
from ._shared.encoder import batches
from ._shared.report import Report, train

__all__ = [
    "Lists", "Matcher", "WordEncoder", "binary_nce", "cless_loss", "cloze_nce", "distances", "fine_tuning_loss",
    "jsd_loss", "labelled_pair_loss", "lifted_structure_loss", "listed_binary_nce", "listed_ranking_nce",
    "logistic_loss", "mined_triplet_loss", "n_pair_loss", "noise_bias", "pair_loss", "pseudo_labels", "ranking_nce",
    "residual_energy_loss", "run", "triplet_loss", "vse_loss",
]  # fmt: skip

STEPS, BATCH, RATE = 1000, 64, 5e-3
SHOTS, SHOT_STEPS, SHOT_RATE = 5, 60, 5e-3  # sentences a module whose module is told, and steps on them
POSITIVES, NEGATIVES = 5, 25
SCALE, SHOWN = 10.0, 12  # of cosines in the ranking form; sentences in the picture


def cless_loss(
    matcher: Callable[[Tensor, Tensor, tuple[Tensor, Tensor]], Tensor],
    texts: Tensor,  # [B, D]
    labels: Tensor,  # [N, D]
    positives: Lists,
    negatives: Lists,
) -> Tensor:
    """The loss above; `matcher(texts, labels, (rows, columns))` gives the logits of pairs.

    Raises ValueError for lists that do not fit.
    """
    for name, lists in (("positives", positives), ("negatives", negatives)):
        lists.checked("cless_loss", name, len(texts), len(labels))
    rows = torch.cat([positives.rows, negatives.rows])
    logits = matcher(texts, labels, (rows, torch.cat([positives.indices, negatives.indices])))
    positive = torch.arange(len(rows), device=rows.device) < len(positives.indices)
    return logistic_loss(logits, positive, rows, len(texts), "row_mean_mean")


class Model(nn.Module):
    """Words, and how a text is scored against labels: CLESS's network, cosines, or a classifier's rows."""

    def __init__(self, kind: str, world: World):
        super().__init__()
        self.kind, self.world, self.encoder = kind, world, WordEncoder(world.table)
        width = world.table.shape[1]
        heads = {"CLESS": lambda: Matcher(width), "classifier": lambda: nn.Linear(width, len(world.names))}
        self.head = heads.get(kind, nn.Identity)()

    def loss(self, words: Tensor, labels: Tensor, positives: Lists, negatives: Lists) -> Tensor:  # [B, T], [N, L]
        texts = self.encoder.texts(words[:, : int((words > 0).sum(1).max())])
        if self.kind == "classifier":
            return F.cross_entropy(self.head(texts), positives.indices)
        labels = self.encoder.labels(labels)
        if self.kind == "CLESS":
            return cless_loss(self.head, texts, labels, positives, negatives)
        texts, labels = (F.normalize(x, dim=1) for x in (texts, labels))
        return listed_ranking_nce(texts, labels, positives, negatives, SCALE)

    @torch.no_grad()
    def scores(self, rows: Tensor) -> Tensor:  # [R] -> [R, C]
        """Of sentences against the names of all modules."""
        self.eval()
        texts, labels = self.encoder.texts(self.world.words[rows]), self.encoder.labels(self.world.labels)
        self.train()
        if self.kind == "classifier":
            return self.head(texts)
        return self.head(texts, labels) if self.kind == "CLESS" else texts @ F.normalize(labels, dim=1).T

    def accuracy(self) -> float:
        """Per cent of the test sentences whose own module's name fits best."""
        test = self.world.test
        return 100 * (self.scores(test).argmax(1) == self.world.modules[test]).float().mean().item()


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Sentences of docstrings, of which five a module are told their module; its name is the label. CLESS learns from
    all training sentences with their words as labels, then from the few with the same network. Beside it, from the same
    start: ranking NCE of cosines on the same words, and a classifier of the few alone, which has no zero-shot answer.
    Both that know words are far better than the classifier; without any label, cosines name more modules than CLESS.
    """
    steps = STEPS if steps is None else steps
    report = Report("primer", output, steps=steps, seed=seed, limit=limit, batch=BATCH, shots=SHOTS)
    world = primer_cless.load(limit, seed, SHOTS)
    shown = world.test[:SHOWN]
    for label in ("classifier", "ranking NCE", "CLESS"):
        torch.manual_seed(seed)
        model = Model(label, world)
        draws, choice = batches(len(world.train), BATCH, seed), torch.Generator().manual_seed(seed)
        few = batches(len(world.shots), BATCH, seed)

        def on_words(_: int, model=model, draws=draws, choice=choice) -> Tensor:
            rows = world.train[next(draws)]
            words, *lists = pseudo_labels([world.contents[i] for i in rows], POSITIVES, NEGATIVES, choice)
            return model.loss(world.words[rows], words[:, None], *lists)

        def on_names(_: int, model=model, few=few) -> Tensor:
            rows = world.shots[next(few)]
            return model.loss(world.words[rows], world.labels, *primer_cless.name_lists(world, rows))

        with report.model(label) as found:
            zero = {}
            if label != "classifier":
                found.losses = train(label, steps, model, on_words, rate=RATE, decay=0.01)
                zero, scores = {"zero-shot accuracy, %": model.accuracy()}, model.scores(shown)
            losses = train(f"{label}, few shots", SHOT_STEPS, model, on_names, rate=SHOT_RATE, decay=0.01)
            found.losses = found.losses or losses
            found.metrics = {"few-shot accuracy, %": model.accuracy()} | zero
    return report.close(model, partial(primer_cless.draw, world, shown, scores), labels=len(world.names))
