"""ProCLIP: a CLIP gets a new text encoder, and forgets nothing over it. A language model's frozen embedder and a small
adapter take the place of CLIP's own text encoder; first the adapter learns to say what that one said, from text alone.

With unit rows a_i of a student, e_i of a frozen teacher, and d(p, q) = ‖p − q‖:

    ins    = Σ_i ‖a_i − e_i‖²
    struct = Σ_{i<j} h(d(a_i, a_j) − d(e_i, e_j)),   h(x) = ½x² where |x| < 1, else |x| − ½; or x²
    1st stage, text alone:  ins + struct,  a the adapter, e CLIP's text encoder   (and ins of a second text, a raw one)
    2nd stage, with images: CLIP's loss(v, a) + λ (ins(v, v*) + struct(v, v*)),  v* the mean of past image encoders

All n² distances come tile by tile from inner products; a tile's gradient is formed where its distances are at hand.

FAQ. Which h is it? The released code says smooth L1, the paper x²; near agreement the one is half of the other.
Is anything divided by n? Only CLIP's loss: ins and struct are sums, for which λ = 4e-4 was tuned with n = 512.
On several ranks? CLIP's loss is that of the whole batch, ins and struct are of a rank's own rows, as in the code.
Does the teacher v* move? θ* ← 0.999 θ* + 0.001 θ in the paper; the released training file holds it still.

Source: Hu et al. 2025, "ProCLIP: Progressive Vision-Language Alignment via LLM-based Embedder", arXiv 2510.18795.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcontrast import EMATeacher, clip_loss
from fastcontrast.minilm import WIDTH, minilm_features
from fastcontrast.towers import hash_words

from ._parts.proclip_imitation import instance_loss, structure_loss
from ._parts.proclip_start import DIM, bag_of_words_clip, either
from ._shared.icons import Icons, load_icons, rewrites_of
from ._shared.report import Report, Scale, train

__all__ = ["Adapter", "imitation_loss", "instance_loss", "proclip_loss", "run", "structure_loss"]

STEPS, BATCH = 40, 512
START_STEPS = 40  # of the CLIP that both begin with
TEXT_STEPS, TEXT_RATE, RATE = 150, 3e-3, 1e-3
TAUGHT = 0.5  # share of the start's names that the two stages see
WEIGHT, MOMENTUM = 4e-4, 0.999


class Adapter(nn.Module):
    """N(W (LN(x)) + b),  x = u + W₂ GELU(W₁ LN(u)),  u = N(embedding): from an embedder's width to CLIP's.

    Args:
        inside: width of the embeddings (4096 in the paper). outside: that of the image features.
        expansion: of the hidden layer, `expansion · inside` wide.
    """

    def __init__(self, inside: int, outside: int, expansion: int = 8):
        super().__init__()
        hidden = expansion * inside
        layers = nn.Linear(inside, hidden), nn.GELU(), nn.Linear(hidden, inside)
        self.block = nn.Sequential(nn.LayerNorm(inside), *layers)
        self.head = nn.Sequential(nn.LayerNorm(inside), nn.Linear(inside, outside))

    def forward(self, embeddings: Tensor) -> Tensor:  # [N, inside]
        u = F.normalize(embeddings, dim=-1)
        return F.normalize(self.head(u + self.block(u)), dim=-1)


def imitation_loss(student: Tensor, teacher: Tensor, *, h: str = "smooth_l1") -> Tensor:  # [N, D] each
    """ins + struct: the first stage of one set of texts, and what holds the image encoder in the second."""
    return instance_loss(student, teacher) + structure_loss(student, teacher, h=h)


def proclip_loss(
    image: Tensor,  # [N, D]
    text: Tensor,  # [N, D]
    scale: float | Tensor,
    teacher: Tensor,  # [N, D]
    *,
    weight: float = 4e-4,
    h: str = "smooth_l1",
) -> Tensor:
    """The second stage: clip_loss(image, text, scale) + weight · imitation_loss(image, teacher), the teacher's features
    of the same images. The adapter gets its gradient from the first term alone. Raises as those two."""
    return clip_loss(image, text, scale) + weight * imitation_loss(image, teacher, h=h)


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """A CLIP of icons whose text encoder is a bag of words, and MiniLM as the embedder that replaces it. Both stages
    see half of the names. Beside it the second stage alone with CLIP's loss, from the same start: an adapter that
    begins with noise pulls the image encoder away from what it knew.
    """
    steps = STEPS if steps is None else steps
    report = Report("proclip", output, steps=steps, seed=seed, limit=limit, batch=BATCH, taught=TAUGHT, weight=WEIGHT)
    icons = load_icons(limit)
    raw = [rewrites_of(name)[i % 4] for i, name in enumerate(icons.names)]
    words = hash_words([*icons.names, *raw]).unflatten(0, (2, -1))  # [2, K, T], what the old text encoder reads
    embedded = torch.stack([icons.texts, minilm_features(raw)])  # [2, K, 384], what the new one says
    with report.model("CLIP, bag of words") as found:
        start, found.losses = bag_of_words_clip(icons, words, START_STEPS, seed)
        found.metrics = icons.recall(start, words[0])
    few = icons.fewer(TAUGHT, seed)
    for label, weight in (("2nd stage alone", 0.0), ("ProCLIP", WEIGHT)):
        torch.manual_seed(seed)
        model, scale = copy.deepcopy(start), Scale()
        teacher, model.name_tower = EMATeacher(model.item_tower, MOMENTUM), Adapter(WIDTH, DIM)
        with report.model(label) as found:
            if weight:
                imitate(model.name_tower, start.name_tower, embedded, words, few, seed)
                found.metrics = {f"{name} after 1st stage": x for name, x in icons.recall(model).items()}
            batches, choice = few.batches(BATCH, seed), torch.Generator().manual_seed(seed)

            def step(_: int, model=model, scale=scale, teacher=teacher, weight=weight, batches=batches, choice=choice):
                rows = next(batches)
                glyphs, text = icons.glyphs[rows], either(embedded, icons.ids[rows], choice)
                image = model.item_tower(glyphs)
                return proclip_loss(image, model.name_tower(text), scale(), teacher(glyphs), weight=weight)

            def after(_: int, model=model, scale=scale, teacher=teacher) -> None:
                teacher.update_parameters(model.item_tower)
                scale.clamp()

            learned = [*model.parameters(), *scale.parameters()]
            found.losses = train(label, steps, learned, step, rate=RATE, decay=0.05, after=after)
            found.metrics = icons.recall(model) | found.metrics
    return report.close(model)


def imitate(adapter: Adapter, old: nn.Module, embedded: Tensor, words: Tensor, few: Icons, seed: int) -> None:
    """The first stage, in place: names and raw texts through the adapter and the old text encoder; no image."""
    names, generator = (~few.pairs.unseen).nonzero()[:, 0], torch.Generator().manual_seed(seed)
    with torch.no_grad():
        taught = old(words.flatten(0, 1)).unflatten(0, (2, -1))  # [2, K, D]

    def step(_: int) -> Tensor:
        rows = names[torch.randint(len(names), (BATCH,), generator=generator)]
        short, raw = (adapter(x[rows]) for x in embedded)
        return imitation_loss(short, taught[0, rows]) + instance_loss(raw, taught[1, rows])

    train("ProCLIP, text alone", TEXT_STEPS, adapter, step, rate=TEXT_RATE, decay=0.05)
