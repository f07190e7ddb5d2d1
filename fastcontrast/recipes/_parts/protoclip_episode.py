"""An episode of ProtoCLIP: a random subset of the data, clustered, and constant while training goes through it."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastcontrast import ops
from fastcontrast.distributed._collectives import world_size
from fastcontrast.kmeans import Clusters, kmeans, segment_mean
from fastcontrast.ops import _check as check
from fastcontrast.ops._precision import float32


class Prediction(nn.Module):
    """What one student has to predict: S and T [K, d], its labels [n], and with `masked` which clusters are valid [K].

    S: means of the student's features over the teacher's clusters, or with translate=False C, the teacher's centroids.
    T: `soft_targets` of C and S for tau > 0, else S.
    """

    def __init__(self, size: int, k: int, width: int, *, tau: float, translate: bool = True, masked: bool = False):
        super().__init__()
        self.tau, self.translate = tau, translate
        for name in ("prototypes", "targets"):
            self.register_buffer(name, torch.zeros(k, width))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("valid", torch.ones(k, dtype=torch.bool) if masked else None)

    @torch.no_grad()
    def fill(self, student: Tensor, clusters: Clusters) -> None:  # [n, d], of the teacher's features
        means, counts = segment_mean(student, clusters.labels, len(self.prototypes))
        self.prototypes.copy_(means if self.translate else clusters.centroids)
        self.targets.copy_(self.prototypes)
        self.labels.copy_(clusters.labels)
        if self.valid is not None:
            self.valid.copy_(counts > 0)
        if self.tau > 0:
            self.targets.copy_(soft_targets(clusters.centroids, self.prototypes, self.tau, self.valid))


class Episode(nn.Module):
    """Samples, what to predict of them, and how far training came: in `state_dict`, equal on all ranks.

        rows = episode.draw(count)                    # n indices in [0, count), with replacement
        episode.cluster(h, g)                         # features of those samples, from heads in evaluation mode
        while (places := episode.take(batch)) is not None:
            ...                                       # a step on rows[places], without an incomplete last batch

    Every rank takes the same places and trains on its share of them.

    Args:
        size, k, width: n, K ≤ n, d.
        tau, translate, masked: see `Prediction`.
        external: also predict hard clusters of constant features of a third model; needs `translate`.
        iterations, restarts: of K-means, whose seed is the number of the episode.
        seed: of the draws.

    Raises ValueError for settings that do not fit.
    """

    def __init__(
        self, size: int, k: int, width: int = 128, *, tau: float = 0.01, translate: bool = True, masked: bool = False,
        external: bool = False, iterations: int = 20, restarts: int = 3, seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        if not 1 <= k <= size:
            raise ValueError(f"Episode: k must lie in [1, {size}], the samples of an episode, got {k}")
        if external and not translate:
            raise ValueError("Episode: external=True needs translate=True, got False: its centroids have another width")
        self.k, self.search = k, {"iterations": iterations, "restarts": restarts}

        def both(**settings) -> nn.ModuleDict:
            return nn.ModuleDict({side: Prediction(size, k, width, **settings) for side in ("image", "text")})

        self.of_each_other = both(tau=tau, translate=translate, masked=masked)
        self.of_external = both(tau=0.0, masked=masked) if external else None
        self.register_buffer("indices", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("taken", torch.tensor(size))  # samples of this episode that were trained on
        self.register_buffer("number", torch.tensor(-1))  # of this episode, from 0
        self.register_buffer("generator", torch.Generator().manual_seed(seed).get_state())

    def draw(self, count: int) -> Tensor:
        """Begins an episode: indices of its samples [n]. What there is to predict is still that of the last."""
        generator = torch.Generator()
        generator.set_state(self.generator.cpu())
        self.indices.copy_(torch.randint(count, self.indices.shape, generator=generator))
        self.generator.copy_(generator.get_state())
        self.taken.zero_()
        self.number += 1
        return self.indices.clone()

    @torch.no_grad()
    def cluster(self, image: Tensor, text: Tensor, external: Tensor | None = None) -> None:  # [n, d], [n, d], [n, D]
        """Features of the samples, in the order drawn, all on every rank; rank 0 clusters. NaN counts as 0, an infinity
        raises ValueError."""
        if (external is None) != (self.of_external is None):
            raise ValueError("Episode: external features must be given if and only if external=True")
        students = {"image": self._clean("image", image), "text": self._clean("text", text)}
        external = None if external is None else self._clean("external", external)
        if world_size() == 1 or dist.get_rank() == 0:
            for side, other in (("image", "text"), ("text", "image")):
                self.of_each_other[side].fill(students[side], self._search(students[other]))
            if external is not None:
                clusters = self._search(external)
                for side, prediction in self.of_external.items():
                    prediction.fill(students[side], clusters)
        if world_size() > 1:
            for x in self.buffers():
                dist.broadcast(x, 0)

    def take(self, batch: int) -> Tensor | None:
        """Places of the next samples [batch] in the episode, None where fewer are left."""
        start = int(self.taken)
        if start + batch > len(self.indices):
            return None
        self.taken += batch
        return torch.arange(start, start + batch, device=self.indices.device)

    def _clean(self, name: str, x: Tensor) -> Tensor:
        check.matrix("Episode", name, x)
        if x.shape[0] != len(self.indices):
            raise ValueError(f"Episode: {name} must have {len(self.indices)} rows, the episode's, got {list(x.shape)}")
        x = float32(x).nan_to_num(0.0, math.inf, -math.inf)
        if not x.isfinite().all():  # on every rank: where one raises alone, the others wait
            raise ValueError(f"Episode: {name} must not be infinite, got some that are")
        return x

    def _search(self, x: Tensor) -> Clusters:
        return kmeans(x, self.k, seed=int(self.number), **self.search)


def soft_targets(
    teacher: Tensor,  # [K, D]
    prototypes: Tensor,  # [K, d]
    tau: float,
    valid: Tensor | None = None,  # [K] bool
) -> Tensor:
    """T_y = Σ_k softmax_k(⟨C_y, C_k⟩ / τ) S_k of every cluster y, [K, d]; C: teacher, S: prototypes.

    Clusters where `valid` is False get no share. Raises ValueError naming what does not fit.
    """
    op = "soft_targets"
    if not tau > 0:
        raise ValueError(f"{op}: tau must be positive, got {tau}; hard targets are the prototypes themselves")
    check.matrix(op, "teacher", teacher)
    check.matrix(op, "prototypes", prototypes)
    if len(teacher) != len(prototypes):
        raise ValueError(f"{op}: teacher must have {len(prototypes)} rows like prototypes, got {list(teacher.shape)}")
    return ops.similarity_mix(teacher, teacher, prototypes, 1 / tau, key_bias=bias_of(op, valid, prototypes))


def bias_of(op: str, valid: Tensor | None, prototypes: Tensor) -> Tensor | None:
    """0 where a cluster is valid, else −inf, [K]."""
    if valid is None:
        return None
    k = prototypes.shape[0]
    if valid.dtype != torch.bool or valid.shape != (k,):
        raise ValueError(f"{op}: valid must be bool [{k}], got {valid.dtype} {list(valid.shape)}")
    return torch.zeros(k, dtype=float32(prototypes).dtype, device=valid.device).masked_fill(~valid, -math.inf)


def stage(episode: int, lit_start: int, infonce_warmup: int = 1) -> str:
    """What episodes, from 0, train: "locked" from `lit_start` on, L_CLIP with the image tower locked; "clip" in the
    first `infonce_warmup`, L_CLIP; "proto" in between, all of L."""
    if episode >= lit_start:
        return "locked"
    return "clip" if episode < infonce_warmup else "proto"
