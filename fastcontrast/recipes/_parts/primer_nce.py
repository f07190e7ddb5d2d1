"""Noise contrastive estimation, see the catalogue of `fastcontrast.recipes.primer`: binary and ranking forms, of a
batch or of listed positives and negatives; energies of tokens and of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcontrast import info_nce, siglip_loss, supcon_loss
from fastcontrast.distributed._sums import count_over_ranks
from fastcontrast.ops import _check as check
from fastcontrast.ops import similarity_softplus
from fastcontrast.ops._precision import float32, without_autocast

REDUCTIONS = ("row_sum_mean", "row_mean_mean", "mean", "sum")


def noise_bias(noise: Tensor, samples: float = 1.0) -> Tensor:  # [N]
    """−log(K p_N) of every key, what noise correction adds to its logits. Raises ValueError unless all p_N > 0."""
    if not noise.is_floating_point() or not ((noise > 0) & noise.isfinite()).all():
        raise ValueError(f"noise_bias: noise must be probabilities above 0, got {noise}")
    return -(samples * noise).log()


@without_autocast
def binary_nce(
    queries: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    scale: float | Tensor = 10.0,
    *,
    noise: Tensor | None = None,  # [N]
    samples: float | None = None,
    positives: Tensor | None = None,  # [M] integer
    query_labels: Tensor | None = None,  # [M] integer
    key_labels: Tensor | None = None,  # [N] integer
    targets: Tensor | None = None,  # [M, N]
    reduction: str = "row_sum_mean",
) -> Tensor:
    """−1/M Σ_i [log σ(z_i⁺) + Σ_k log σ(−z_ik⁻)],   z = scale · ⟨q, k⟩ − log(K p_N(k)); without `noise` no correction.

    Args:
        noise, samples: p_N [N] and K, default N − 1: the negatives that a positive has in its row.
        positives, query_labels, key_labels, targets: which pairs are positive, as in `siglip_loss`; default k_i of q_i.
        reduction: "row_sum_mean" as above, "mean" over all cells, less by the factor N, or "sum".

    Inside `exchange` it is the loss of all ranks' rows. Raises as `siglip_loss`, and ValueError for a p_N of 0.
    """
    op = "binary_nce"
    check.one_of(op, "reduction", reduction, ("row_sum_mean", "mean", "sum"))
    check.features(op, queries, keys)
    queries, keys = scale * float32(queries), float32(keys)
    columns = count_over_ranks(len(keys), keys.device)
    if noise is not None:
        check.vector(op, "noise", noise, len(keys), keys, floating=True)
        bias = noise_bias(noise, max(columns - 1, 1) if samples is None else samples).to(keys)
        # A bias of every key is one more coordinate, which all queries have as 1.
        queries, keys = torch.cat([queries, queries.new_ones(len(queries), 1)], 1), torch.cat([keys, bias[:, None]], 1)
    structure = {"positives": positives, "image_labels": query_labels, "text_labels": key_labels, "targets": targets}
    loss = siglip_loss(queries, keys, 1.0, 0.0, **structure, reduction="sum" if reduction == "sum" else "mean")
    return loss / max(columns, 1) if reduction == "mean" else loss


def ranking_nce(queries: Tensor, keys: Tensor, noise: Tensor, scale: float | Tensor = 10.0, **settings) -> Tensor:
    """mean_i −log softmax_j(scale · ⟨q_i, k_j⟩ − log p_N(k_j)) at j = i: `info_nce` corrected for how keys are drawn.

    noise: p_N [N]. settings: of `info_nce`. Raises as that, and ValueError for a p_N of 0.
    """
    return info_nce(queries, keys, scale, key_bias=noise_bias(noise).to(keys), **settings)


@without_autocast
def jsd_loss(queries: Tensor, keys: Tensor, scale: float | Tensor = 1.0) -> Tensor:  # [N, D] each
    """mean_i softplus(−s_ii) + mean_{i≠j} softplus(s_ij): Jensen-Shannon's bound on mutual information, in a batch.
    Raises ValueError unless there are as many keys as queries."""
    if queries.shape != keys.shape:
        raise ValueError(f"jsd_loss: keys must be {list(queries.shape)} like queries, got {list(keys.shape)}")
    queries, keys, n = float32(queries), float32(keys), len(queries)
    numbers = torch.arange(n, device=queries.device)
    own = F.softplus(-scale * torch.linalg.vecdot(queries, keys)).sum()
    ids = {"query_ids": numbers, "key_ids": numbers, "positives": -1}
    others = similarity_softplus(queries, keys, scale, **ids, reduction="sum")
    return own / max(n, 1) + others / max(n * (n - 1), 1)


def fine_tuning_loss(
    logits: Tensor,  # [B, C]
    embeddings: Tensor,  # [B, D]
    labels: Tensor,  # [B] integer
    weight: float = 0.9,
    scale: float | Tensor = 1 / 0.3,
) -> Tensor:
    """(1 − λ) CE(logits) + λ SupCon(embeddings), of a classifier and the features that it stands on."""
    return (1 - weight) * F.cross_entropy(logits, labels) + weight * supcon_loss(embeddings, labels, scale)


class Lists(NamedTuple):
    """A list of keys for every row, one behind the other: those of row i are `indices[offsets[i] : offsets[i + 1]]`."""

    offsets: Tensor  # [M + 1] integer
    indices: Tensor  # [P] integer

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Lists:
        """Of Python's lists, one a row."""
        lengths = torch.tensor([0, *map(len, lists)])
        return cls(lengths.cumsum(0), torch.tensor([i for one in lists for i in one], dtype=torch.int64))

    @property
    def rows(self) -> Tensor:
        """The row of every entry, [P]."""
        count = self.offsets.diff()
        return torch.arange(len(count), device=count.device).repeat_interleave(count)

    def checked(self, op: str, name: str, rows: int, keys: int) -> Lists:
        steps = self.offsets.diff()
        ends = [0, len(self.indices)]
        if len(self.offsets) != rows + 1 or (steps < 0).any() or self.offsets[[0, -1]].tolist() != ends:
            raise ValueError(f"{op}: {name}.offsets must be [{rows + 1}] and rise from {ends[0]} to {ends[1]}")
        check.within(op, f"{name}.indices", self.indices, 0, keys)
        return self


def logistic_loss(
    logits: Tensor,  # [P]
    positive: Tensor,  # [P] bool
    rows: Tensor,  # [P] integer
    count: int,
    reduction: str = "row_sum_mean",
) -> Tensor:
    """−Σ log σ(±logit) over listed pairs of `count` rows, + where `positive`. Nothing listed gives 0.

    reduction: "row_sum_mean": Σ / count; "row_mean_mean": each row's mean first, then Σ / count; "mean": / P; "sum".
    """
    check.one_of("logistic_loss", "reduction", reduction, REDUCTIONS)
    losses = F.softplus(torch.where(positive, -float32(logits), float32(logits)))
    if reduction == "row_mean_mean":
        losses = losses / rows.bincount(minlength=count)[rows]
    divisor = {"sum": 1, "mean": len(losses)}.get(reduction, count)
    return losses.sum() / max(divisor, 1)


@without_autocast
def listed_binary_nce(
    queries: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    positives: Lists,
    negatives: Lists,
    scale: float | Tensor = 10.0,
    *,
    key_bias: Tensor | None = None,  # [N]
    reduction: str = "row_sum_mean",
) -> Tensor:
    """`logistic_loss` of the pairs that the lists name, any number a row; key_bias: such as `noise_bias`."""
    op = "listed_binary_nce"
    near, far = _listed(op, queries, keys, positives, negatives, scale, key_bias)
    positive = torch.arange(len(near) + len(far), device=near.device) < len(near)
    return logistic_loss(
        torch.cat([near, far]), positive, torch.cat([positives.rows, negatives.rows]), len(queries), reduction
    )


@without_autocast
def listed_ranking_nce(
    queries: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    positives: Lists,
    negatives: Lists,
    scale: float | Tensor = 10.0,
    *,
    key_bias: Tensor | None = None,  # [N]
) -> Tensor:
    """Mean over rows with a positive of the mean over their p of −log(e^{z_p} / (e^{z_p} + Σ_k e^{z_k})), k the row's
    listed negatives. Other positives do not compete; without negatives it is 0."""
    near, far = _listed("listed_ranking_nce", queries, keys, positives, negatives, scale, key_bias)
    m, row, rows = len(queries), positives.rows, negatives.rows
    top = far.new_zeros(m).scatter_reduce(0, rows, far.detach(), "amax", include_self=False)
    sums = far.new_zeros(m).index_add(0, rows, (far - top[rows]).exp())
    against = (sums.masked_fill(sums == 0, 1.0).log() + top).masked_fill(sums == 0, float("-inf"))
    number = positives.offsets.diff()
    return (F.softplus(against[row] - near) / number[row]).sum() / (number > 0).sum().clamp(min=1)


def _listed(op, queries, keys, positives, negatives, scale, key_bias) -> tuple[Tensor, Tensor]:
    """Logits of both lists."""
    check.features(op, queries, keys)
    queries, keys, logits = float32(queries), float32(keys), []
    for name, lists in (("positives", positives), ("negatives", negatives)):
        lists.checked(op, name, len(queries), len(keys))
        z = scale * torch.linalg.vecdot(queries[lists.rows], keys[lists.indices])
        logits.append(z if key_bias is None else z + key_bias.to(z)[lists.indices])
    return logits[0], logits[1]


def cloze_nce(
    energies: Tensor,  # [B, T]
    noised: Tensor,  # [B, T] bool
    log_noise: Tensor | None = None,  # [B, T]
    *,
    valid: Tensor | None = None,  # [B, T] bool
    reduction: str = "row_sum_mean",
) -> Tensor:
    """−Σ_{clean t} log(n p̂_t / (n p̂_t + k q_t)) − Σ_{noised t} log(k q_t / (n p̂_t + k q_t)),   p̂ = exp(−energy),

    n clean and k noised tokens of a sequence (Electric); mean over sequences. One without either kind gives 0.

    Args:
        log_noise: log q_t of the token that stands there. None: the logit is −energy, replaced-token detection.
        valid: False at padding. reduction: see `logistic_loss`.
    """
    for name, x in (("noised", noised), ("log_noise", log_noise), ("valid", valid)):
        if x is not None and x.shape != energies.shape:
            raise ValueError(f"cloze_nce: {name} must be {list(energies.shape)} like energies, got {list(x.shape)}")
    valid = torch.ones_like(noised) if valid is None else valid
    logits = -float32(energies)
    if log_noise is not None:
        clean, noisy = ((valid & x).sum(1, keepdim=True).to(logits.dtype) for x in (~noised, noised))
        # Without either kind the ratio is infinite or 0, and the other kind's losses are 0, its slopes too.
        logits = logits - log_noise.detach() + (clean / noisy).log().clamp(-1e30, 1e30)
    rows = torch.arange(len(energies), device=energies.device)[:, None].expand_as(noised)
    return logistic_loss(logits[valid], ~noised[valid], rows[valid], len(energies), reduction)


def residual_energy_loss(real: Tensor, sampled: Tensor) -> Tensor:  # [B], [B'], energies of texts
    """mean softplus(E(x⁺)) + mean softplus(−E(x⁻)),   x⁻ sampled from the language model that −E corrects."""
    return sum(F.softplus(float32(x)).sum() / max(len(x), 1) for x in (real, -sampled))
