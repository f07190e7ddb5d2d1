"""What surrounds the losses of text embeddings: batches of one task, mined negatives, whitening."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastcontrast.ops import _check as check
from fastcontrast.ops import similarity_topk
from fastcontrast.ops._precision import float32, without_autocast


class TaskBatches(nn.Module):
    """Endless batches of rows of one task each, no text twice in one: of whole epochs, in which each row comes at most
    once. Where it is lies in `state_dict`; equal on all ranks.

    Args:
        tasks: [N], the task (data set) of each row. texts: [N], rows with equal numbers are the same text.
        batch, seed: rows a batch; of the draws.

    A batch that texts or rows do not fill is left out. Raises ValueError where no task fills one.
    """

    def __init__(self, tasks: Tensor, texts: Tensor, batch: int, seed: int = 0):
        super().__init__()
        check.vector("TaskBatches", "texts", texts, len(tasks), tasks, floating=False)
        self.tasks, self.texts, self.batch = tasks, texts, batch
        self.register_buffer("epoch", torch.tensor(0))
        self.register_buffer("place", torch.tensor(0))
        self.seed, self.drawn = seed, None
        if not self._draw(0):
            raise ValueError(f"TaskBatches: batch must be at most the texts of a task, got {batch}")

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        """Indices [batch]."""
        if self.drawn is None or self.drawn[0] != int(self.epoch):
            self.drawn = int(self.epoch), self._draw(int(self.epoch))
        rows = self.drawn[1][int(self.place)]
        self.place += 1
        if int(self.place) == len(self.drawn[1]):
            self.place.zero_()
            self.epoch += 1
        return rows

    def _draw(self, epoch: int) -> list[Tensor]:
        generator, found = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch), []
        order = torch.randperm(len(self.tasks), generator=generator)
        open_batches: dict[int, list[dict[int, int]]] = {}  # of each task, {text: row}
        for row, task, text in zip(order.tolist(), self.tasks[order].tolist(), self.texts[order].tolist(), strict=True):
            waiting = open_batches.setdefault(task, [])
            fitting = next((rows for rows in waiting if text not in rows), None)
            if fitting is None:
                waiting.append(fitting := {})
            fitting[text] = row
            if len(fitting) == self.batch:
                found.append(torch.tensor([*fitting.values()]))
                waiting.remove(fitting)
        return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]


@torch.no_grad()
@without_autocast
def mine(
    queries: Tensor,  # [M, D]
    documents: Tensor,  # [N, D]
    positives: Tensor,  # [M], indices of documents
    k: int,
    *,
    skip: int = 0,
    margin: float | None = None,
    share: float | None = 0.95,
    document_ids: Tensor | None = None,  # [N]
) -> Tensor:
    """Indices [M, k] of hard negatives, nearest first, −1 where there are not so many: documents of rank skip + 1 to
    skip + k among those whose similarity is at most `share` of the positive's, or less than it by `margin`.

    document_ids: those with the id of a row's positive are the same text. Raises ValueError naming what does not fit.
    """
    op = "mine"
    check.vector(op, "positives", positives, len(queries), queries, floating=False)
    check.within(op, "positives", positives, 0, len(documents))
    own = torch.linalg.vecdot(float32(queries), float32(documents)[positives])
    limit = None
    if margin is not None:
        limit = own - margin
    elif share is not None:
        limit = own - (1 - share) * own.abs()  # also below 0 it is less than the positive's
    ids = torch.arange(len(documents), device=queries.device) if document_ids is None else document_ids
    found = similarity_topk(queries, documents, skip + k, query_ids=ids[positives], key_ids=ids, limit=limit)[1]
    return found[:, skip:]


@torch.no_grad()
def whitening(features: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:  # [N, D]
    """16. Mean μ [D] and W [D, width] with which (x − μ) W has covariance 1, of the `width` largest variances; a
    direction without variance gives 0. In float64 inside."""
    check.matrix("whitening", "features", features)
    exact = features.double()
    mean = exact.mean(0)
    values, vectors = torch.linalg.eigh((exact - mean).T @ (exact - mean) / max(1, len(exact)))
    values, vectors = values.flip(0)[:width], vectors.flip(1)[:, :width]
    there = values > values.amax() * len(features.T) * torch.finfo(features.dtype).eps
    scales = torch.where(there, values, 1.0).rsqrt() * there
    return mean.to(features.dtype), (vectors * scales).to(features.dtype)
