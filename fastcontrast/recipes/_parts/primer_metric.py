"""Metric learning, see the catalogue of `fastcontrast.recipes.primer`: pairs, triplets with mining, lifted structure.

A batch with labels is swept in blocks of rows: of its distances D [N, N] one block exists at a time, and the gradient
of what the block adds is formed while it does. Triplets, N³ of them, are never listed.

    G_ij = ∂L/∂D_ij,   D_ij = |x_i − x_j|²:   dx_i = 2 Σ_j (G_ij + G_ji)(x_i − x_j);   plain: G_ij / (2 D_ij), 0 at 0

All pairs are of the tensor that is given: on several ranks give `fastcontrast.distributed.gather(x)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastcontrast import info_nce
from fastcontrast.ops import _check as check
from fastcontrast.ops import pairwise_reduce, similarity_topk
from fastcontrast.ops._formed import formed
from fastcontrast.ops._precision import float32, without_autocast

KINDS = ("squared", "euclidean")
MINING = ("all", "all_active", "hard", "semi_hard")
TILE = 1 << 20  # distances in a block: 4 MiB, and three of them stay in the caches

# rule(D of rows [R, N], rows [R], batch, margin) -> (sum, number of terms, ∂sum/∂D [R, N])
Rule = Callable[[Tensor, Tensor, "_Batch", float], "tuple[Tensor, Tensor | int, Tensor]"]


def distances(a: Tensor, b: Tensor, kind: str = "squared") -> Tensor:  # [..., D] each
    """|a − b|² or |a − b| of rows that belong together, whose gradient at 0 is 0."""
    check.one_of("distances", "kind", kind, KINDS)
    squares = (float32(a) - float32(b)).square().sum(-1)
    return squares if kind == "squared" else _root(squares)


def pair_loss(a: Tensor, b: Tensor, same: Tensor, margin: float = 0.5) -> Tensor:  # [B, D], [B, D], [B] bool or 0, 1
    """½ mean_i (y d² + (1 − y) max(0, m − d)²),   d_i = |a_i − b_i|. Raises ValueError where shapes differ."""
    _aligned("pair_loss", a, b=b)
    d = distances(a, b, "euclidean")
    return _mean(torch.where(same.bool(), d.square(), (margin - d).relu().square())) / 2


def triplet_loss(
    anchor: Tensor,  # [B, D]
    positive: Tensor,  # [B, D]
    negative: Tensor,  # [B, D]
    margin: float = 0.2,
    *,
    kind: str = "squared",
) -> Tensor:
    """mean_i max(0, D(x_i, a⁺_i) − D(x_i, a⁻_i) + m). Raises ValueError where shapes differ."""
    _aligned("triplet_loss", anchor, positive=positive, negative=negative)
    return _mean((distances(anchor, positive, kind) - distances(anchor, negative, kind) + margin).relu())


@without_autocast
def mined_triplet_loss(
    x: Tensor,  # [N, D]
    labels: Tensor,  # [N] integer
    margin: float = 0.2,
    *,
    mining: str = "all",
    kind: str = "squared",
) -> Tensor:
    """The mean of max(0, D_ip − D_in + m) over triplets that labels make, 0 where there is none:

    "all"         all of y_p = y_i ≠ y_n, p ≠ i; "all_active": those alone that violate the margin
    "hard"        for each i the farthest p and the nearest n, if it has both
    "semi_hard"   for each (i, p) the nearest n with D_ip < D_in < D_ip + m, if it has one

    Time beside the products is N² times the size of a class; memory is a block's. Raises ValueError or TypeError naming
    what does not fit.
    """
    op = "mined_triplet_loss"
    check.one_of(op, "mining", mining, MINING)
    batch = _Batch(op, x, labels, kind)
    if mining == "hard":
        return _hard(batch, margin)
    return batch.mean(_semi_hard if mining == "semi_hard" else _all(mining == "all_active"), margin)


def labelled_pair_loss(x: Tensor, labels: Tensor, margin: float = 0.5) -> Tensor:  # [N, D], [N] integer
    """`pair_loss` of all pairs i ≠ j of a batch, y_ij = [labels_i = labels_j]."""
    return _Batch("labelled_pair_loss", x, labels, "euclidean").mean(_pairs, margin)


@without_autocast
def lifted_structure_loss(x: Tensor, labels: Tensor, margin: float = 1.0) -> Tensor:  # [N, D], [N] integer
    """1/(2|P|) Σ_{(i,j) ∈ P} max(0, J_ij)²,   J_ij = D_ij + log(Σ_{k: y_k≠y_i} e^{m−D_ik} + Σ_{l: y_l≠y_j} e^{m−D_jl}),

    D plain distances, P all ordered pairs i ≠ j of a label; 0 without such a pair.
    """
    batch = _Batch("lifted_structure_loss", x, labels, "euclidean")
    with torch.no_grad():
        pushes = [(margin - batch.others(d, rows)).logsumexp(1) for rows, d in batch.blocks(float32(x))]
        # A row without a negative has log 0, whose differences would be NaN: a number that adds nothing does as well.
        push = torch.cat(pushes).clamp(min=-1e30)

    def rule(d: Tensor, rows: Tensor, batch: _Batch, _: float) -> tuple[Tensor, Tensor, Tensor]:
        index, valid = batch.positives(rows)
        own, mate = push[rows, None], push[index]
        j = (torch.logaddexp(own, mate) + d.gather(1, index)).relu().masked_fill(~valid, 0.0)
        # (i, j) and (j, i) are equal, so row i's push has the gradient of both: once more what it has here.
        pull = -2 * (j * torch.sigmoid(own - mate)).sum(1, keepdim=True)
        slope = (margin - batch.others(d, rows) - own).exp_().mul_(pull)
        return j.square().sum() / 2, valid.sum(), slope.scatter_add_(1, index, j)

    return batch.mean(rule, margin)


@without_autocast
def vse_loss(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [N, D]
    margin: float = 0.2,
    *,
    hardest: bool = False,
    both: bool = False,
) -> Tensor:
    """mean_i Σ_{j≠i} max(0, m − s_ii + s_ij),   s = queries · keysᵀ; `hardest`: of the largest s_ij alone (VSE++).

    both: adds the same of the columns, as those papers do.
    """
    op = "vse_loss"
    check.matrix(op, "queries", queries)
    _aligned(op, queries, keys=keys)
    queries, keys = float32(queries), float32(keys)
    n, own = len(queries), torch.linalg.vecdot(queries, keys)
    if hardest:
        numbers, total = torch.arange(n, device=own.device), own.sum() * 0.0
        for a, b in ((queries, keys), (keys, queries))[: 1 + both] if n else ():
            best = similarity_topk(a, b, 1, query_ids=numbers, key_ids=numbers)[0][:, 0]
            total = total + (margin - own + best).relu().sum()  # −inf, of one row alone, gives 0
        return total / max(n, 1)

    def tile(q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
        s = (q @ k.T).masked_fill(i[:, None] == j, float("-inf"))
        return sum((margin - other + s).relu().sum() for other in (own[i, None], own[j])[: 1 + both])

    return pairwise_reduce(tile, queries, keys) / max(n, 1)


def n_pair_loss(queries: Tensor, keys: Tensor, *, penalty: float = 0.0) -> Tensor:  # [B, D] each, of any length
    """1/B Σ_i log(1 + Σ_{j≠i} exp(⟨q_i, k_j⟩ − ⟨q_i, k_i⟩)) + penalty · 1/B Σ_i (|q_i|² + |k_i|²)."""
    loss = info_nce(queries, keys, 1.0)
    if penalty:
        loss = loss + penalty * _mean((float32(queries).square() + float32(keys).square()).sum(1))
    return loss


class _Batch:
    """Samples with labels, whose distances come a block of rows at a time."""

    def __init__(self, op: str, x: Tensor, labels: Tensor, kind: str):
        check.matrix(op, "x", x)
        check.vector(op, "labels", labels, len(x), x, floating=False)
        check.one_of(op, "kind", kind, KINDS)
        self.op, self.x, self.labels, self.kind = op, x, labels, kind
        ordered, self.order = labels.sort(stable=True)
        self.first = torch.searchsorted(ordered, labels)
        self.size = torch.searchsorted(ordered, labels, right=True) - self.first
        self.largest = int(self.size.max()) if len(x) else 0

    def positives(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """All p of the rows' labels, [R, P], and where there is one that is not the row itself."""
        place = torch.arange(self.largest, device=rows.device)
        index = self.order[(self.first[rows, None] + place).clamp(max=len(self.order) - 1)]
        return index, (place < self.size[rows, None]) & (index != rows[:, None])

    def others(self, d: Tensor, rows: Tensor) -> Tensor:
        """D with infinity where labels are equal."""
        return d.masked_fill(self.labels[rows, None] == self.labels, float("inf"))

    def blocks(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:  # [N, D]
        """(rows, their D [R, N]) through the batch."""
        squares = x.square().sum(1)
        for rows in torch.arange(len(x), device=x.device).split(max(1, TILE // max(len(x), 1))):
            d = torch.addmm(squares, x[rows], x.T, alpha=-2).add_(squares[rows, None]).clamp_(min=0)
            yield rows, d if self.kind == "squared" else d.sqrt_()

    def mean(self, rule: Rule, margin: float) -> Tensor:
        """Σ of a rule's sums / Σ of its numbers of terms; the gradient is formed on the same visit."""

        def run(inputs: tuple[Tensor], needs: tuple[bool]) -> tuple[Tensor, tuple[Tensor | None]]:
            x = float32(inputs[0])
            gradient = torch.zeros_like(x) if needs[0] else None
            total, count = torch.zeros((), dtype=torch.float64, device=x.device), 0
            for rows, d in self.blocks(x):
                part, number, slope = rule(d, rows, self, margin)
                total, count = total + part, count + number
                if gradient is not None:
                    if self.kind == "euclidean":
                        slope = (slope / (2 * d)).masked_fill_(d == 0, 0.0)
                    of_rows, of_columns = slope.sum(1, keepdim=True), slope.sum(0)[:, None]
                    gradient += of_columns * x - slope.T @ x[rows]
                    gradient[rows] += of_rows * x[rows] - slope @ x
            count = torch.as_tensor(count, dtype=torch.float64).clamp(min=1)  # 2 / integers would be float32
            return (total / count).to(x.dtype), (None if gradient is None else gradient.mul_(2 / count),)

        return formed(run, self.x, op=self.op)


def _all(active_alone: bool) -> Rule:
    def rule(d: Tensor, rows: Tensor, batch: _Batch, margin: float) -> tuple[Tensor, Tensor, Tensor]:
        index, valid = batch.positives(rows)
        limits = (d.gather(1, index) + margin).masked_fill_(~valid, float("-inf"))
        others, slope, hinge = batch.others(d, rows), torch.zeros_like(d), torch.empty_like(d)
        total, active = d.new_zeros((), dtype=torch.float64), torch.zeros_like(limits)
        for p, limit in enumerate(limits.unbind(1)):
            torch.sub(limit[:, None], others, out=hinge).relu_()
            total += hinge.sum(1).sum(dtype=torch.float64)
            slope -= hinge.sign_()
            active[:, p] = hinge.sum(1)
        if active_alone:
            count = active.sum(dtype=torch.float64)
        else:
            count = (valid.sum(1) * (len(batch.x) - batch.size[rows])).sum()
        return total, count, slope.scatter_add_(1, index, active)

    return rule


def _semi_hard(d: Tensor, rows: Tensor, batch: _Batch, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    index, valid = batch.positives(rows)
    near, others, slope = d.gather(1, index), batch.others(d, rows), torch.zeros_like(d)
    total, found = d.new_zeros((), dtype=torch.float64), torch.zeros_like(near)
    for p, limit in enumerate(near.unbind(1)):
        value, n = others.masked_fill(others <= limit[:, None], float("inf")).min(1)
        hit = valid[:, p] & (value < limit + margin)
        total += torch.where(hit, limit - value + margin, 0.0).sum(dtype=torch.float64)
        found[:, p] = hit
        slope.scatter_add_(1, n[:, None], -found[:, p, None])
    return total, found.sum(), slope.scatter_add_(1, index, found)


def _hard(batch: _Batch, margin: float) -> Tensor:
    """Chosen without gradient; then the 2N distances that count are formed from differences."""
    if not len(batch.x):
        return batch.x.sum()
    kept: list[list[Tensor]] = [[], [], []]
    with torch.no_grad():
        for rows, d in batch.blocks(float32(batch.x)):
            index, valid = batch.positives(rows)
            near = d.gather(1, index).masked_fill_(~valid, -1.0)
            both = valid.any(1) & (batch.size[rows] < len(batch.x))
            farthest = index.gather(1, near.argmax(1, keepdim=True))[:, 0]
            for found, chosen in zip(kept, (rows, farthest, batch.others(d, rows).argmin(1)), strict=True):
                found.append(chosen[both])
    return triplet_loss(*(batch.x[torch.cat(found)] for found in kept), margin, kind=batch.kind)


def _pairs(d: Tensor, rows: Tensor, batch: _Batch, margin: float) -> tuple[Tensor, int, Tensor]:
    same = batch.labels[rows, None] == batch.labels
    slope = torch.where(same, d, -(margin - d).relu())  # of half the square
    slope.scatter_(1, rows[:, None], 0.0)  # a sample and itself, whose D is 0 but for rounding
    return slope.square().sum(dtype=torch.float64) / 2, slope.numel() - len(rows), slope


def _root(squares: Tensor) -> Tensor:
    apart = squares > 0
    return torch.where(apart, squares.where(apart, 1.0).sqrt(), 0.0)


def _mean(x: Tensor) -> Tensor:
    return x.sum() / max(x.numel(), 1)


def _aligned(op: str, x: Tensor, **others: Tensor) -> None:
    for name, y in others.items():
        if y.shape != x.shape:
            raise ValueError(f"{op}: {name} must be {list(x.shape)} like the first, got {list(y.shape)}")
