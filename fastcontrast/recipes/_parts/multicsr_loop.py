"""What MultiCSR's loop has beside its loss: a head for training, the best weights so far, and how they are judged."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._shared.encoder import Encoder
from .._shared.texts import Rating, spearman


class Pooler(nn.Module):
    """tanh(W x + b) in training, x itself in eval mode, of length 1: a head that only the loss needs."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, width]
        return F.normalize(self.linear(x).tanh() if self.training else x, dim=-1)


class Best(nn.Module):
    """The weights of the highest score so far: `offer(model, score)` while it trains, `restore(model)` at the end. Both
    are in `state_dict`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.register_buffer("score", torch.tensor(float("-inf"), dtype=torch.float64))
        self.model = copy.deepcopy(model).requires_grad_(False)

    def offer(self, model: nn.Module, score: float) -> None:
        if score > self.score:
            self.score.fill_(score)
            self.model.load_state_dict(model.state_dict())

    def restore(self, model: nn.Module) -> None:
        model.load_state_dict(self.model.state_dict())


def agreement(model: Encoder, ratings: list[Rating]) -> float:
    """Of the cosines of pairs with people's ratings of them."""
    texts = sorted({text for rating in ratings for text in rating[:2]})
    index, found = {text: i for i, text in enumerate(texts)}, model.encode(texts)
    first, second = (found[[index[rating[side]] for rating in ratings]] for side in (0, 1))
    return spearman(torch.linalg.vecdot(first, second), ratings)
