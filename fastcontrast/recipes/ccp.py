"""CCP: many languages in one space, without one parallel text. A sentence has to recognise a neighbour out of its own
document among thousands of others of its own language; as languages have alike structure, their spaces come out alike.

For a pair (c, x) of language l, unit vectors behind the projection head g, and the bank M_l of that language:

    L_c→x = −log( exp(c·x/τ) / (exp(c·x/τ) + Σ_{m∈M_l} exp(c·m/τ)) ),   L = mean over pairs of (L_c→x + L_x→c) / 2
    g(v)  = N(W_2 ReLU(BN(W_1 v))),  N(x) = x / ‖x‖

M_l holds the last K vectors of that language, as constants. BN is asymmetric: one side is normalised by the statistics
of its batch, the other by the stored ones; sides change with every step. After training g is dropped, and each language
is calibrated: x ↦ R_l ((x − μ_l) / σ_l), R_l a rotation towards a pivot language.

FAQ. Why a bank for each language? Those of other languages are told apart by their language, and languages drift apart.
Why two kinds of statistics? A batch's own mark all of its rows, so that a positive is known without being read.
What else was left open? τ, K, the window, ReLU, whether other pairs of the batch compete (`in_batch`), and whether both
sides enter the bank: they do, centres first. The rotation needs pairs: here such as are each other's nearest.

Source: Wu et al. 2022, "Unsupervised Context Aware Sentence Representation Pretraining for Multi-lingual Dense
Retrieval", arXiv 2206.03281.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor

from fastcontrast import info_nce, ops
from fastcontrast.distributed._lse import similarity_lse
from fastcontrast.distributed._sums import share
from fastcontrast.losses._common import features
from fastcontrast.ops import _check as check
from fastcontrast.ops._precision import float32
from fastcontrast.towers import HashedWords, encode

from ._parts import ccp_data
from ._parts.ccp_calibration import Calibration, mutual_pairs, procrustes
from ._parts.ccp_data import LANGUAGES
from ._parts.ccp_loop import AsymmetricBatchNorm, Banks, OrdinaryBatchNorm, Projection, window_pairs
from ._parts.uclip_data import BUCKETS
from ._shared.report import Report, train

__all__ = [
    "AsymmetricBatchNorm", "Banks", "Calibration", "Projection", "ccp_loss", "dpr_loss", "mutual_pairs", "procrustes",
    "run", "window_pairs",
]  # fmt: skip

STEPS, BATCH, RATE, WIDTH = 500, 128, 2e-3, 128
BANK = 256  # the paper's are thousands, of millions of sentences; here a language has some 600
SCALE = 1 / 0.07


def ccp_loss(
    centre: Tensor,  # [B, D]
    context: Tensor,  # [B, D]
    bank: Tensor | None = None,  # [K, D]
    scale: float | Tensor = SCALE,
    *,
    in_batch: bool = False,
    limit: float | None = None,
) -> Tensor:
    """L of a batch of one language, whose bank takes no gradient; rows of length 1.

    Args:
        in_batch: the contexts of other pairs, inside `exchange` of all ranks, compete as well, and so do their centres.
        limit: vectors of the bank that are more similar than this to the positive do not compete: it may be the
            positive itself, met before.

    Without anything that competes the loss is 0, with a warning. Raises ValueError naming what does not fit.
    """
    centre, context = features("ccp_loss", centre, context, ("centre", "context"))
    if context.shape != centre.shape:
        raise ValueError(f"ccp_loss: context must be {list(centre.shape)} to match centre, got {list(context.shape)}")
    if not in_batch and not (bank is not None and len(bank)):
        warnings.warn("ccp_loss: the bank is empty and in_batch is off: nothing competes, the loss is 0", stacklevel=2)
    positive = (scale * torch.linalg.vecdot(float32(centre), float32(context))).repeat(2)
    found = torch.cat(similarity_lse(centre, context, scale, dim="both")) if in_batch else positive
    if bank is not None and len(bank):
        check.matrix("ccp_loss", "bank", bank, centre.shape[1], like="centre")
        bank, both = bank.detach().to(centre.dtype), torch.cat([centre, context])
        guide = None if limit is None else (torch.cat([context, centre]), bank, limit)
        found = torch.logaddexp(found, ops.similarity_lse(both, bank, scale, guide=guide, positives=-1))
    return share((found - positive).sum(), len(positive)).to(positive.dtype)


def dpr_loss(questions: Tensor, contexts: Tensor, positives: Tensor) -> Tensor:  # [B, D], [N, D], [B] integer
    """Fine-tuning to retrieve: mean cross-entropy of q·p over all contexts, the positive of question i being
    `positives[i]`; neither normalised nor scaled. Inside `exchange` all ranks' contexts compete; gathered vectors as
    constants, as the released code has them, give the same gradient once the ranks' are summed."""
    return info_nce(questions, contexts, 1.0, positives=positives)


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Django's texts in six languages, an application's file as a document; the encoder reads parts of words, so that
    names and loan words are what languages share at first. Translations are known in the test alone, which asks with
    those texts that differ from theirs. CCP beside one bank for all languages, and beside ordinary batch norm. Banks of
    their own are most of what helps; files have nearly one order in all languages, which makes it easy.
    """
    steps = STEPS if steps is None else steps
    report = Report("ccp", output, steps=steps, seed=seed, limit=limit, batch=BATCH, bank=BANK)
    world = ccp_data.load(limit)
    for label in ("untrained", "one bank for all", "ordinary batch norm", "CCP"):
        torch.manual_seed(seed)
        encoder, head = HashedWords(BUCKETS, WIDTH), Projection(WIDTH, WIDTH)
        if label == "ordinary batch norm":
            head.norm = OrdinaryBatchNorm(WIDTH)
        shared = label == "one bank for all"  # as large as the others' together
        banks, generator = Banks(BANK * (len(LANGUAGES) if shared else 1), WIDTH), torch.Generator().manual_seed(seed)

        def project(language: str, encoder=encoder, head=head, generator=generator) -> tuple[Tensor, Tensor]:
            return head(*(encoder(codes) for codes in world[language].draw(BATCH, generator)))

        def step(_: int, banks=banks, project=project, shared=shared, generator=generator) -> Tensor:
            language = LANGUAGES[int(torch.randint(len(LANGUAGES), (), generator=generator))]
            pair, bank = project(language), "all" if shared else language
            loss = ccp_loss(*pair, banks.of(bank).clone())  # the push below comes before the backward
            banks.push(bank, *pair)
            return loss

        with torch.no_grad():  # banks begin with what the untrained model says, so that something competes at once
            for language in LANGUAGES:
                banks.push("all" if shared else language, *project(language))
        with report.model(label) as found:
            if label != "untrained":
                found.losses = train(label, steps, [*encoder.parameters(), *head.parameters()], step, rate=RATE)
            found.metrics = ccp_data.scores(world, lambda codes, encoder=encoder: encode(encoder, codes))
    return report.close(encoder)
