"""ProtoCLIP: besides its own text, an image predicts the cluster of that text; and a text the cluster of its image.

For an episode, a random subset of the data, the features of two projection heads are clustered, then constant. With a
student's feature f of length 1, its label y, prototypes S on its own side, centroids C on the other, and a scale s,

    L   = − Σ_k q_k log softmax_k(s ⟨f, S_k⟩) = log Σ_k exp(s ⟨f, S_k⟩) − s ⟨f, T_y⟩
    T_y = Σ_k q_k S_k,   q = softmax_k(⟨C_y, C_k⟩ / τ);   hard targets: T = S

Of images y and C are the texts' clusters, of texts the images'. S_k is the mean of the student's own side over cluster
k (back translation): centroids of the other side would pull across the gap between the modalities. T depends on the
label alone: it is made once an episode, and a step needs one log-sum-exp over K prototypes and a row of T.

FAQ. Are S and C of length 1? No: ⟨C_y, C_k⟩ may exceed ⟨C_y, C_y⟩, and τ → 0 need not give hard targets.
What of an empty cluster? It keeps S = 0 and adds exp(0) to every denominator, as in the released code; or `masked`.

Source: Chen et al. 2022, "Prototypical Contrastive Language Image Pretraining", arXiv 2206.10996.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcontrast import clip_loss, ops
from fastcontrast.distributed._sums import own_parameter, share
from fastcontrast.losses._common import features as checked
from fastcontrast.ops import _check as check
from fastcontrast.ops._precision import float32

from ._parts.protoclip_episode import Episode, Prediction, bias_of, soft_targets, stage
from ._parts.protoclip_features import cluster, frequent_words, linear_probe, principal, raw
from ._shared.icons import load_icons
from ._shared.report import Report, Scale, train

__all__ = ["Episode", "ProtoClip", "proto_loss", "run", "soft_targets", "stage"]

STEPS, BATCH, RATE = 120, 512, 2e-3
EPISODE, CLUSTERS = 4096, 300  # of 200,000 and 20,000: the icons are few
WIDTH = 256  # of the towers


def proto_loss(
    features: Tensor,  # [B, d]
    prototypes: Tensor,  # [K, d]
    labels: Tensor,  # [B] integer
    scale: float | Tensor,
    *,
    targets: Tensor | None = None,  # [K, d]
    valid: Tensor | None = None,  # [K] bool
) -> Tensor:
    """mean_i (log Σ_k exp(s ⟨f_i, S_k⟩) − s ⟨f_i, T_(y_i)⟩); gradients go to features and scale alone.

    Inside `exchange` the mean is over all ranks' rows; each rank has all prototypes and targets.

    Args:
        targets: T, `soft_targets(C, S, tau)`. None: hard ones, T = S; a row of label −1 then counts for nothing, nor in
            the mean.
        valid: clusters where it is False leave the denominator.

    Raises: ValueError or TypeError naming the argument, what was expected and what came.
    """
    op, hard = "proto_loss", targets is None
    features, prototypes = checked(op, features, prototypes, ("features", "prototypes"))
    prototypes = prototypes.detach()
    if not hard:
        check.matrix(op, "targets", targets, features.shape[1], like="features")
    table = prototypes if hard else targets.detach()
    check.vector(op, "labels", labels, features.shape[0], features, floating=False)
    check.within(op, "labels", labels, -1 if hard else 0, table.shape[0])
    counted, labels = labels >= 0, labels.long().clamp(min=0)
    scale, bias = check.scalar(op, "scale", scale, features), bias_of(op, valid, prototypes)
    if hard and bias is not None and not valid[labels[counted]].all():
        raise ValueError(f"{op}: labels must be of valid clusters, got some of others")
    lse = ops.similarity_lse(features, prototypes, scale, key_bias=bias)
    losses = lse - scale * torch.linalg.vecdot(float32(features), table[labels].to(lse.dtype))
    return share(losses.masked_fill(~counted, 0.0).sum(), counted.sum())


def predict(features: Tensor, task: Prediction, places: Tensor, scale: Tensor) -> Tensor:  # [B, d], [B]
    """`proto_loss` of the samples at these places of the episode."""
    given = {"targets": task.targets, "valid": task.valid}
    return proto_loss(features, task.prototypes, task.labels[places], scale, **given)


class ProtoClip(nn.Module):
    """L = w₁ L_CLIP + w₂ L_proto + w₃ L_ext of what the towers' last layers give, not yet of length 1.

    L_proto and L_ext are means of an image's and a text's `proto_loss`. Holds all that the towers do not: two heads of
    one start, two scales (`clamp()` them after each step), and the episode.

    Args:
        inside: width of the towers. hidden, width: of the heads; the latter is the episode's.
    """

    def __init__(
        self,
        episode: Episode,
        inside: int,
        *,
        hidden: int = 2048,
        width: int = 128,
        weights: Sequence[float] = (1.0, 1.0, 1.0),
    ):
        super().__init__()
        layers = nn.Linear(inside, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, width)
        self.image_head = nn.Sequential(*layers)
        self.text_head = copy.deepcopy(self.image_head)
        self.episode, self.weights = episode, weights
        self.scale, self.proto_scale = Scale(), Scale()

    def project(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:  # [B, E] each
        """h and g, [B, d] each, of length 1."""
        return {"image": F.normalize(self.image_head(image), dim=1), "text": F.normalize(self.text_head(text), dim=1)}

    def forward(self, image: Tensor, text: Tensor, places: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """`places` in the episode [B]; None: L_CLIP alone. `ids` [B]: equal ones are no negatives in L_CLIP."""
        scale, proto_scale = (own_parameter(x()) for x in (self.scale, self.proto_scale))
        losses = [clip_loss(F.normalize(image, dim=1), F.normalize(text, dim=1), scale, ids=ids)]
        with torch.set_grad_enabled(torch.is_grad_enabled() and places is not None):
            students = self.project(image, text)  # always: the next clusters need BatchNorm's running statistics
        if places is not None:
            for tasks in filter(None, (self.episode.of_each_other, self.episode.of_external)):
                halves = [predict(students[side], task, places, proto_scale) for side, task in tasks.items()]
                losses.append(sum(halves) / 2)
        return sum(w * x for w, x in zip(self.weights, losses, strict=False))

    def clamp(self, *_: Any) -> None:
        self.scale.clamp()
        self.proto_scale.clamp()


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Icons and their names in episodes: CLIP, ProtoCLIP, and ProtoCLIP that also predicts clusters of the names as
    MiniLM sees them. All three start alike and meet the same samples in the same order. The claim, a better linear
    probe, does not show here."""
    steps = STEPS if steps is None else steps
    icons = load_icons(limit)
    population = icons.pairs.train
    size = min(EPISODE, len(population))
    batch, k = min(BATCH, size), min(CLUSTERS, math.ceil(size / 8))
    lit_start = max(1, math.ceil(steps / (size // batch)) - 1)  # the last episode, but never the first
    report = Report("protoclip", output, steps=steps, seed=seed, limit=limit, batch=batch, episode=size, clusters=k)
    (items, words), minilm = frequent_words(icons), principal(icons.texts, 64)
    for label in ("CLIP", "ProtoCLIP", "ProtoCLIP, MiniLM"):
        model, external = icons.towers(seed), minilm if label.endswith("MiniLM") else None
        episode = Episode(size, k, external=external is not None, seed=seed)
        proto = ProtoClip(episode, WIDTH)

        def step(_: int, label=label, model=model, external=external, episode=episode, proto=proto) -> Tensor:
            begins = (places := episode.take(batch)) is None
            if begins:
                episode.draw(len(population))
                places = episode.take(batch)
            now = "clip" if label == "CLIP" else stage(int(episode.number), lit_start)
            if begins and now == "proto":
                cluster(proto, model, icons, population[episode.indices], external)
            model.item_tower.requires_grad_(now != "locked")
            rows = population[episode.indices[places]]
            return proto(*raw(model, icons, rows), places if now == "proto" else None, icons.ids[rows])

        with report.model(label) as found:
            learned = [*model.parameters(), *proto.parameters()]
            found.losses = train(label, steps, learned, step, rate=RATE, clip=10.0, after=proto.clamp)
            with torch.no_grad():
                images = torch.cat([raw(model, icons, rows)[0] for rows in items.split(1024)])
            found.metrics = {"linear probe, %": linear_probe(images, words, seed), **icons.recall(model)}
    return report.close(model)
