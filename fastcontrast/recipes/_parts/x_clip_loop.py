"""Around the training of an X-CLIP: clips mixed with each other, rates of parameters, views of a clip in the test."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mix(
    video: Tensor,  # [B, T, channels, height, width]
    classes: Tensor,  # [B]
    count: int,
    draw: random.Random,
    *,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    switch: float = 0.5,
    smoothing: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Whole clips mixed with each other, and targets [B, count]: λ · y + (1 − λ) · y of the other, both smoothed.

    With probability `switch` cutmix, the same box of all frames from the other clip, else mixup, λ · clip + (1 − λ) ·
    other. λ comes from Beta(α, α), α being `mixup` or `cutmix`; a box's λ is then the share it leaves.
    """
    other = torch.tensor(draw.sample(range(len(video)), len(video)), device=video.device)
    by_box = draw.random() < switch
    share = draw.betavariate(*(2 * [cutmix if by_box else mixup]))
    if by_box:
        height, width = video.shape[-2:]
        tall, wide = (round(side * (1 - share) ** 0.5) for side in (height, width))
        top, left = draw.randint(0, height - tall), draw.randint(0, width - wide)
        box = (..., slice(top, top + tall), slice(left, left + wide))
        mixed = video.clone()
        mixed[box] = video[other][box]
        share = 1 - tall * wide / (height * width)
    else:
        mixed = share * video + (1 - share) * video[other]
    target = (1 - smoothing) * F.one_hot(classes, count).to(video.dtype) + smoothing / count
    return mixed, share * target + (1 - share) * target[other]


def parameter_groups(model: nn.Module, rate: float, decay: float = 1e-3, faster: float = 10.0) -> list[dict[str, Any]]:
    """AdamW's groups: what CLIP does not have learns `faster`; vectors, biases and positions do not decay.

    The paper's AdamW has betas (0.9, 0.98), and rates of 8e-6 fully supervised, 2e-6 from few shots.
    """
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        new = name.startswith(("mit.", "prompt")) or ".message" in f".{name}"
        decays = parameter.ndim > 1 and not name.endswith("positions")
        groups.setdefault((new, decays), []).append(parameter)
    return [
        {"params": found, "lr": rate * (faster if new else 1.0), "weight_decay": decay if decays else 0.0}
        for (new, decays), found in groups.items()
    ]


def add_views(logits: Sequence[Tensor]) -> Tensor:
    """Scores [B, C] of clips seen several times, cut out of time and space: the sum of the views' probabilities."""
    return sum(part.softmax(-1) for part in logits)
