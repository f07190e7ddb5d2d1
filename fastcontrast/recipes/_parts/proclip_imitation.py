"""ProCLIP's two terms of imitation: of single rows, and of the distances between all of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcontrast.ops import _check as check
from fastcontrast.ops import pairwise_reduce
from fastcontrast.ops._formed import formed
from fastcontrast.ops._precision import float32


def instance_loss(student: Tensor, teacher: Tensor) -> Tensor:  # [N, D] each
    """Σ_i ‖a_i − e_i‖², a sum over rows and dimensions; the teacher gets no gradient."""
    student, teacher = _pair("instance_loss", student, teacher)
    return (student - teacher).square().sum()


def structure_loss(student: Tensor, teacher: Tensor, *, h: str = "smooth_l1") -> Tensor:  # [N, D], [N, E]
    """Σ_{i<j} h(‖a_i − a_j‖ − ‖e_i − e_j‖), without a matrix of all pairs; the teacher gets no gradient.

    Distances are in float32 or float64 and taken about the mean row, so that rows in a narrow cone keep their digits.
    Of features of length 1, those below about 1e-3 (float64: 4e-8) are 0, and so is their derivative: duplicates.
    Widths may differ. Fewer than two rows give 0.

    Raises ValueError naming what does not fit, and for another h than "smooth_l1" or "square".
    """
    op = "structure_loss"
    check.one_of(op, "h", h, tuple(PENALTIES))
    student, teacher = _pair(op, student, teacher, widths=False)
    target = teacher - teacher.mean(0)

    def run(inputs, needs):
        rows = inputs[0] - inputs[0].mean(0)
        gradient = torch.zeros_like(rows) if needs[0] else None

        def tile(p: Tensor, q: Tensor, i: Tensor, j: Tensor) -> Tensor:
            distances = _distances(p, q)
            difference = (distances - _distances(target[i], target[j])).masked_fill_(j <= i[:, None], 0.0)
            loss, slope = PENALTIES[h](difference)
            if gradient is not None:
                slope.div_(distances).masked_fill_(distances == 0, 0.0)
                gradient.index_add_(0, i, slope.sum(1)[:, None] * p - slope @ q)
                gradient.index_add_(0, j, slope.sum(0)[:, None] * q - slope.T @ p)
            return loss

        return pairwise_reduce(tile, rows, rows, upper=True), (gradient,)

    return formed(run, student, op=op)


def _smooth_l1(x: Tensor) -> tuple[Tensor, Tensor]:
    """Σ h(x), and h'(x) in a tensor of its own. With s = h'(x), h(x) = s · (x − s/2) on either side of 1."""
    slope = x.clamp(-1, 1)
    return torch.linalg.vecdot(slope, x.sub_(slope, alpha=0.5)).sum(), slope


PENALTIES = {"smooth_l1": _smooth_l1, "square": lambda x: (torch.linalg.vecdot(x, x).sum(), 2 * x)}


def _distances(p: Tensor, q: Tensor) -> Tensor:
    """‖p_i − q_j‖ from inner products, 0 where those have no digits left to tell it from 0."""
    squares = torch.addmm(p.square().sum(1)[:, None] + q.square().sum(1), p, q.T, alpha=-2)
    return F.threshold_(squares, 8 * torch.finfo(squares.dtype).eps, 0.0).sqrt_()


def _pair(op: str, student: Tensor, teacher: Tensor, widths: bool = True) -> tuple[Tensor, Tensor]:
    """Checked, in one precision of at least float32, the teacher detached."""
    check.matrix(op, "student", student)
    check.matrix(op, "teacher", teacher, student.shape[1] if widths else None, like="student")
    check.same_kind(op, "teacher", teacher, student, dtype=False, like_name="student")
    if len(teacher) != len(student):
        raise ValueError(f"{op}: teacher must have {len(student)} rows to match student, got {len(teacher)}")
    student = float32(student)
    return student, teacher.detach().to(student.dtype)
