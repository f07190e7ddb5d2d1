"""Ranking losses of `sentence-transformers` without the matrix of scores; one import changes.

    from fastcontrast.integrations.sentence_transformers import CachedMultipleNegativesRankingLoss

Each class is a subclass of the library's class of its name, with its arguments, methods and configuration. Value and
gradients are the same to rounding, for all directions, partitions, hardness modes, numbers of hard negatives, margins
and, with `gather_across_devices`, ranks; so `MatryoshkaLoss`, the trainer and model cards take them as they are.

    memory       O(N · D) for N rows of width D. A cached loss sees the whole batch at once: `mini_batch_size` is the
                 encoder's alone.
    precision    Scores are float32 also under autocast, where the library rounds them to half precision.
    ranks        Shards may differ in size: of W ranks, each returns W / N · Σ of its rows' losses, which is their mean
                 where shards are equal. After the data-parallel mean, gradients are those of the whole batch.
    temperature  `learnable_scale=True` makes 1 / temperature a parameter, `log_scale`, which the trainer's optimizer
                 gets with the model's. Weight decay, if any, decays it like them.

Only cosine similarity and dot products can be streamed. With another `similarity_fct` the library's own code runs, and
a warning says so; `loss.streams` tells beforehand.

`sentence-transformers` 6.2.
"""

from ._gist import CachedGISTEmbedLoss, GISTEmbedLoss
from ._ranking import (
    CachedMultipleNegativesRankingLoss,
    CachedMultipleNegativesSymmetricRankingLoss,
    MultipleNegativesRankingLoss,
    MultipleNegativesSymmetricRankingLoss,
)

__all__ = [
    "CachedGISTEmbedLoss",
    "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
    "GISTEmbedLoss",
    "MultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
]
