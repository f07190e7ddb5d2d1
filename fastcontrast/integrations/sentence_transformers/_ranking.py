"""MultipleNegativesRankingLoss, plain, cached and symmetric."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from sentence_transformers import SentenceTransformer, SimilarityFunction
from sentence_transformers.sentence_transformer import losses as library
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor, nn
from typing_extensions import deprecated

from fastcontrast.ops._precision import float32
from fastcontrast.ops._unit import unit_rows

from ._losses import hard_ranking, ranking, together
from ._modules import OnRanks, Scaled, WholeBatch


class MultipleNegativesRankingLoss(OnRanks, Scaled, library.MultipleNegativesRankingLoss):
    """mean_i (log Σ_candidates exp(logit) − scale · similarity(query_i, positive_i)), as the library's class says.

    Args: the library's, then by keyword only
        learnable_scale: learn `log_scale`, from log(scale) on; `scale` is then its exponential, kept at or below
            `max_scale`. Needs a `similarity_fct` that streams.

    `streams`: whether `similarity_fct` is `cos_sim`, `dot_score`, or a model's `similarity` that is one of them.
    """

    scale = Scaled._setting

    def __init__(self, *args: Any, learnable_scale: bool = False, max_scale: float = 100.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._learn(learnable_scale, max_scale)

    @property
    def streams(self) -> bool:
        return _known(self.similarity_fct) is not None

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        if not self.streams:
            self._say_that_it_does_not_stream()
            return super().compute_loss_from_embeddings(embeddings, labels)
        if len(embeddings) < 2:
            raise ValueError(f"{type(self).__name__}: expected at least 2 columns of texts, got {len(embeddings)}")
        return self._loss(embeddings, self._current_scale())

    def _loss(self, embeddings: Iterable[Tensor], scale: Tensor | float) -> Tensor:
        cosine = _known(self.similarity_fct) is cos_sim
        queries, *docs = (unit_rows(x, 1e-12) if cosine else float32(x) for x in embeddings)
        settings = queries, docs, scale, self.directions, self.partition_mode == "joint"
        with self._across():
            if self.hardness_mode is not None and self.hardness_strength > 0:
                losses = hard_ranking(*settings, self.hardness_mode, self.hardness_strength)
            else:
                losses = ranking(*settings, "none" if self._spread else "mean")
        return self._mean(losses).to(queries.dtype)

    def _say_that_it_does_not_stream(self) -> None:
        if self.log_scale is not None:
            raise ValueError(
                f"{type(self).__name__}: learnable_scale needs similarity_fct to be cos_sim or dot_score, "
                f"got {self.similarity_fct!r}"
            )
        warnings.warn(
            f"{type(self).__name__}: similarity_fct is neither cos_sim nor dot_score, so the library's own code runs, "
            "with the whole matrix of scores",
            stacklevel=3,
        )


def _known(similarity_fct: Callable) -> Callable | None:
    owner = getattr(similarity_fct, "__self__", None)
    if isinstance(owner, SentenceTransformer) and similarity_fct == owner.similarity:
        similarity_fct = SimilarityFunction.to_similarity_fn(owner.similarity_fn_name)
    return next((known for known in (cos_sim, dot_score) if similarity_fct is known), None)


class CachedMultipleNegativesRankingLoss(WholeBatch, library.CachedMultipleNegativesRankingLoss):
    """The same with the encoder's gradients cached, as the library's class says; its arguments, and by keyword only
    `learnable_scale` and `max_scale`. `loss` is a `MultipleNegativesRankingLoss` that holds what is learned."""

    def __init__(self, *args: Any, learnable_scale: bool = False, max_scale: float = 100.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        settings = {name: getattr(self.loss, name) for name in self._delegated_to_wrapped_loss}
        self.loss = MultipleNegativesRankingLoss(
            self.model, **settings, learnable_scale=learnable_scale, max_scale=max_scale
        )

    @property
    def log_scale(self) -> nn.Parameter | None:
        return self.loss.log_scale

    @property
    def streams(self) -> bool:
        return self.loss.streams

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        if not self.streams:
            self.loss._say_that_it_does_not_stream()
            return super().calculate_loss(reps, labels, with_backward=with_backward)

        def loss(scale: Tensor | float) -> Tensor:
            return self.loss._loss(map(together, reps), scale)

        scale = self.loss._current_scale()
        return self._backward(loss, scale) if with_backward else loss(scale)


SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
INSTEAD = (
    f"deprecated as in sentence-transformers: use {{}} with {', '.join(f'{k}={v!r}' for k, v in SYMMETRIC.items())}"
)


@deprecated(INSTEAD.format("MultipleNegativesRankingLoss"))
class MultipleNegativesSymmetricRankingLoss(MultipleNegativesRankingLoss):
    """½ mean_i (r_i − p_i) + ½ mean_i (c_i − p_i)."""

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: Callable = cos_sim,
        gather_across_devices: bool = False,
        **learning: Any,
    ):
        super().__init__(model, scale, similarity_fct, gather_across_devices, **SYMMETRIC, **learning)


@deprecated(INSTEAD.format("CachedMultipleNegativesRankingLoss"))
class CachedMultipleNegativesSymmetricRankingLoss(CachedMultipleNegativesRankingLoss):
    """½ mean_i (r_i − p_i) + ½ mean_i (c_i − p_i)."""

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: Callable = cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        show_progress_bar: bool = False,
        **learning: Any,
    ):
        super().__init__(
            model, scale, similarity_fct, mini_batch_size, mini_batch_num_tokens, gather_across_devices,
            show_progress_bar=show_progress_bar, **SYMMETRIC, **learning,
        )  # fmt: skip
