"""Distillation of similarities: a student's rows of a similarity matrix against a teacher's, neither of them stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcontrast.distributed._exchange import active
from fastcontrast.distributed._lse import similarity_lse
from fastcontrast.distributed._sums import mix_over_ranks, numbers
from fastcontrast.ops import _check as check
from fastcontrast.ops._divergence import Problem
from fastcontrast.ops._precision import float32, without_autocast
from fastcontrast.ops._workspace import workspace_bytes
from fastcontrast.ops.linear_kl import SHARES, divergence

from ._common import ScaledLoss, reduce

DIRECTIONS = ("query_to_key", "key_to_query")


@without_autocast
def distill_loss(
    queries: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    teacher_queries: Tensor,  # [M, Dt]
    teacher_keys: Tensor,  # [N, Dt]
    scale: float | Tensor = 1 / 0.07,
    *,
    teacher_scale: float | Tensor | None = None,
    directions: Sequence[str] = DIRECTIONS,
    form: str = "cross_entropy",
    divergence_direction: str = "forward",
    exclude_self: bool = False,
    weights: Tensor | None = None,  # [M]
    reduction: str = "mean",
    workspace: int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """loss_i = −Σ_j t_ij log p_ij,   p_i = softmax_j(scale · ⟨q_i, k_j⟩),   t_i the teacher's; mean over rows,

    of the rows ("query_to_key") and of the columns ("key_to_query"), whose losses are averaged. With the defaults this
    equals the distillation term of open_clip's `DistillClipLoss`. Features are taken as they are: normalise them first.

    Args:
        queries, keys: the student's, [M, D], [N, D], with gradients; "key_to_query" beside "query_to_key" needs M = N.
        teacher_queries, teacher_keys: the teacher's, [M, Dt], [N, Dt]. Frozen: they get no gradient.
        scale: 1 / temperature of the student, number or 0-dim tensor with gradient.
        teacher_scale: of the teacher, without gradient; default `scale`.
        directions: one or both of "query_to_key" and "key_to_query".
        form: "cross_entropy" as above; or "kl", which is less by the teacher's entropy and 0 for equal distributions.
        divergence_direction: with "kl": "forward" KL(teacher ‖ student), "reverse", or "symmetric", their mean.
        exclude_self: leaves out j = i on both sides. For one set against itself with normalised rows the diagonal is
            always the largest, and at a small temperature both distributions collapse onto it.
        weights: [M], multiply the losses of rows and columns i; without gradient. The mean still divides by M.
        reduction: "mean", "sum" or "none" for [M].
        workspace: bytes for the logits of a chunk of rows, student's and teacher's; default `set_workspace`.
        implementation: see `linear_kl`, through which it runs: four products a direction, in float32.

    A row with nothing left gives 0, an empty batch 0. Raises: ValueError or TypeError naming the argument.
    Source: open_clip; with "kl" and one direction, of one set: UniME (Gu et al. 2025), stage 1.
    """
    op = "distill_loss"
    _check(op, queries, keys, teacher_queries, teacher_keys, directions)
    check.one_of(op, "form", form, ("cross_entropy", "kl"))
    check.one_of(op, "divergence_direction", divergence_direction, tuple(SHARES))
    check.one_of(op, "reduction", reduction, ("mean", "sum", "none"))
    check.workspace(op, workspace)
    workspace = workspace_bytes(workspace, queries.device)
    if form == "cross_entropy" and divergence_direction != "forward":
        raise ValueError(f'{op}: form "cross_entropy" goes with divergence_direction "forward"')
    m, device = queries.shape[0], queries.device
    scale = check.scalar(op, "scale", scale, queries)
    teacher_scale = scale if teacher_scale is None else check.scalar(op, "teacher_scale", teacher_scale, queries)
    if weights is None:
        weights = torch.ones(m, device=device)
    check.vector(op, "weights", weights, m, queries, floating=True)
    if weights.requires_grad:
        raise ValueError(f"{op}: weights must not require a gradient; multiply the rows of reduction='none'")
    weights = weights.to(torch.float64 if queries.dtype == torch.float64 else torch.float32)
    if active() is not None:
        problem = queries, keys, teacher_queries, teacher_keys, scale, teacher_scale.detach()
        shares, run = SHARES[divergence_direction], {"workspace": workspace, "implementation": implementation}
        rows = _over_ranks(*problem, directions, form, shares, exclude_self, run)
        return reduce(op, rows, weights, reduction, like=queries)
    each = weights / (len(directions) * (max(m, 1) if reduction == "mean" else 1))
    ids = [torch.arange(x.shape[0], device=device) if exclude_self else None for x in (queries, keys)]
    student = float32(queries), float32(keys)
    teacher = float32(teacher_queries.detach()), float32(teacher_keys.detach())
    losses = []
    for direction in directions:
        way = 1 if direction == "query_to_key" else -1
        (q, k), (tq, tk) = student[::way], teacher[::way]
        # The scale multiplies the rows, and gets its gradient from there.
        heads = (scale * q, k, None, (teacher_scale.detach() * tq).to(tq.dtype), tk, None)
        problem = Problem(*heads, *ids[::way], 1.0, 1.0, *SHARES[divergence_direction])
        found = divergence(op, problem, each, "none" if reduction == "none" else "sum", workspace, implementation)
        losses.append(found.divergence + found.entropy if form == "cross_entropy" else found.divergence)
    return losses[0] if len(losses) == 1 else losses[0] + losses[1]


def _over_ranks(
    queries, keys, teacher_queries, teacher_keys, scale, teacher_scale, directions, form, shares, exclude_self, run
) -> Tensor:  # [M]
    """Losses of this rank's rows and columns against those of all: an expected logit is the logit of a mix of keys."""
    student, teacher = (queries, keys), (teacher_queries.detach(), teacher_keys.detach())
    if exclude_self:
        numbered = numbers(queries.shape[0], queries.device)
        run = {**run, "query_ids": numbered, "key_ids": numbered, "positives": -1}
    forward, reverse = shares
    total = 0.0
    for direction in directions:
        way = 1 if direction == "query_to_key" else -1
        (q, k), (tq, tk) = (tuple(float32(x) for x in pair[::way]) for pair in (student, teacher))
        r, rt = similarity_lse(q, k, scale, **run), similarity_lse(tq, tk, teacher_scale, **run)
        nothing_left = torch.isneginf(r)
        r, rt = r.masked_fill(nothing_left, 0.0), rt.masked_fill(nothing_left, 0.0)
        if forward:
            cross = scale * torch.linalg.vecdot(q, mix_over_ranks(tq, tk, k, teacher_scale, rt, **run))
            total = total + forward * (r - cross)
            if form == "kl":
                mixed = mix_over_ranks(tq, tk, tk, teacher_scale, rt, **run)
                total = total + forward * (teacher_scale * torch.linalg.vecdot(tq, mixed) - rt)
        if reverse:
            mixed = mix_over_ranks(q, k, torch.cat([k, tk], 1), scale, r, **run)
            of_student, of_teacher = mixed.split([k.shape[1], tk.shape[1]], 1)
            expected = scale * torch.linalg.vecdot(q, of_student) - teacher_scale * torch.linalg.vecdot(tq, of_teacher)
            total = total + reverse * (expected - r + rt)
    return total / len(directions)


def _check(op: str, queries, keys, teacher_queries, teacher_keys, directions) -> None:
    check.matrix(op, "queries", queries)
    check.matrix(op, "keys", keys, queries.shape[1])
    check.matrix(op, "teacher_queries", teacher_queries)
    check.matrix(op, "teacher_keys", teacher_keys, teacher_queries.shape[1], like="teacher_queries")
    for name, x in (("keys", keys), ("teacher_queries", teacher_queries), ("teacher_keys", teacher_keys)):
        check.same_kind(op, name, x, queries, dtype=False)
    for name, x, like in (("queries", teacher_queries, queries), ("keys", teacher_keys, keys)):
        if x.shape[0] != like.shape[0]:
            raise ValueError(f"{op}: teacher_{name} must have the {like.shape[0]} rows of {name}, got {x.shape[0]}")
    unknown = [direction for direction in directions if direction not in DIRECTIONS]
    if isinstance(directions, str) or not directions or unknown or len(set(directions)) != len(directions):
        raise ValueError(f"{op}: directions must be one or both of {DIRECTIONS}, got {directions!r}")
    if "key_to_query" in directions and queries.shape[0] != keys.shape[0]:
        got = f"{queries.shape[0]} and {keys.shape[0]}"
        raise ValueError(f'{op}: "key_to_query" needs as many queries as keys, got {got}')


class DistillLoss(ScaledLoss):
    """`distill_loss` as a module: `DistillLoss()(queries, keys, teacher_queries, teacher_keys, teacher_scale=50.0)`."""

    function = staticmethod(distill_loss)
    default_scale = 1 / 0.07
