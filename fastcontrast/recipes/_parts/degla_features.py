"""What DeGLA's terms are of: features, their checks, and the order of corruptions in the released code."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcontrast.distributed import gather
from fastcontrast.distributed._exchange import active
from fastcontrast.distributed._sums import numbers
from fastcontrast.ops import _check as check


class Features(NamedTuple):
    """Of images, of their texts, and of corruptions of these, all of length 1."""

    image: Tensor  # [B, D]
    text: Tensor  # [B, D]
    corruptions: Tensor  # [B, K, D]


def checked(student: Features, teacher: Features, mask: Tensor | None, base: str, tgc: str):
    """Both, without gradient to the teacher, and zeros where a corruption is missing."""
    op = "degla_loss"
    check.one_of(op, "base", base, ("all", "own"))
    check.one_of(op, "tgc", tgc, ("own", "released"))
    check.matrix(op, "image", student.image)
    check.matrix(op, "text", student.text, student.image.shape[1], like="image")
    check.tensor(op, "corruptions", student.corruptions, 3, "[B, K, D]")
    b, d = student.image.shape
    k = student.corruptions.shape[1]
    for who, tensors in (("", student), ("teacher's ", teacher)):
        for name, x, shape in zip(Features._fields, tensors, ((b, d), (b, d), (b, k, d)), strict=True):
            if x.shape != shape:
                raise ValueError(f"{op}: {who}{name} must be {list(shape)}, got {list(x.shape)}")
    teacher = Features(*(x.detach() for x in teacher))
    if mask is None:
        return student, teacher
    if mask.dtype != torch.bool or mask.shape != (b, k):
        raise ValueError(f"{op}: mask must be bool {[b, k]}, got {mask.dtype} {list(mask.shape)}")
    student, teacher = (
        x._replace(corruptions=x.corruptions.masked_fill(~mask[..., None], 0.0)) for x in (student, teacher)
    )
    return student, teacher


def released_order(x: Tensor) -> Tensor:  # [B, K, ...]
    """Of the list x_11, x_12, … of all samples, for sample i those at i, B + i, 2B + i, …; [B, K, ...]."""
    how = active()
    every = x if how is None else gather(x, how.group)
    places = torch.arange(x.shape[1], device=x.device) * len(every)
    return every.flatten(0, 1)[numbers(len(x), x.device)[:, None] + places]
