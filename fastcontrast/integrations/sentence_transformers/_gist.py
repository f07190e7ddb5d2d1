"""GISTEmbedLoss, plain and cached."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer import losses as library
from sentence_transformers.util import batch_to_device
from torch import Tensor

from fastcontrast.ops._unit import unit_rows

from ._losses import gist, together
from ._modules import OnRanks, Scaled, WholeBatch


class Gist(OnRanks, Scaled):
    temperature = Scaled._setting

    @staticmethod
    def _scale_of(setting: float) -> float:
        return 1 / setting

    @property
    def scale(self) -> float:
        return 1 / self.temperature

    def _limit(self, own: Tensor) -> Tensor:
        return own - (self.margin if self.margin_strategy == "absolute" else own.abs() * self.margin)

    def _loss(self, embeddings: Iterable[Tensor], guides: Iterable[Tensor], scale: Tensor | float) -> Tensor:
        (anchors, *candidates), (guide_anchors, *guide_candidates) = (
            [unit_rows(x, 1e-8) for x in side] for side in (embeddings, guides)
        )
        contrast = self.contrast_anchors, self.contrast_positives
        losses = gist(
            anchors, candidates, guide_anchors, guide_candidates, scale, self._limit, contrast, self._across()
        )
        return self._mean(losses).to(anchors.dtype)


class GISTEmbedLoss(Gist, library.GISTEmbedLoss):
    """InfoNCE without the candidates that a guide finds more similar than the positive, as the library's class says.

    Args: the library's, then by keyword only `learnable_scale` and `max_scale`, as `MultipleNegativesRankingLoss` has
    them here: scale = 1 / temperature.
    """

    def __init__(self, *args: Any, learnable_scale: bool = False, max_scale: float = 100.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._learn(learnable_scale, max_scale)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        columns = list(sentence_features)
        if len(columns) not in (2, 3):
            raise ValueError(f"{type(self).__name__}: expected 2 or 3 columns of texts, got {len(columns)}")
        guided = [dict(column) for column in columns]  # a model writes its output into what it is given
        embeddings = embed_columns(self.model, columns)
        with torch.no_grad():
            if self.must_retokenize:
                guided = [self._for_guide(column) for column in columns]
            guides = embed_columns(self.guide, guided)
        return self._loss(embeddings, guides, self._current_scale())

    def _for_guide(self, column: dict[str, Tensor]) -> dict[str, Tensor]:
        ids = column["input_ids"]
        if "cu_seq_lens_q" in column:  # sequences in one flat row
            ids = [part.tolist() for part in torch.tensor_split(ids[0], column["cu_seq_lens_q"][1:-1].tolist())]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return batch_to_device(self.guide.preprocess(texts), self.guide.device)


class CachedGISTEmbedLoss(WholeBatch, Gist, library.CachedGISTEmbedLoss):
    """The same with the encoder's gradients cached, and any number of hard negatives; arguments as the library's, then
    by keyword only `learnable_scale` and `max_scale`."""

    def __init__(self, *args: Any, learnable_scale: bool = False, max_scale: float = 100.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._learn(learnable_scale, max_scale)

    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        if len(reps) != len(reps_guided):
            counts = f"{len(reps)} and {len(reps_guided)}"
            raise ValueError(f"{type(self).__name__}: reps and reps_guided must have as many columns, got {counts}")

        def loss(scale: Tensor | float) -> Tensor:
            return self._loss(map(together, reps), map(together, reps_guided), scale)

        scale = self._current_scale()
        return self._backward(loss, scale) if with_backward else loss(scale)
