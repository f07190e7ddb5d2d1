"""The few samples of each task that stay: which ones, and batches of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcontrast.ops import _check as check


class Rehearsal(nn.Module):
    """Rows of the training data to be replayed: in `state_dict`, with the generator that chooses and draws.

        memory.add(rows, labels, 24, features)                # at the end of a task
        rows = memory.draw(16)                                # in each step of the next

    Args:
        size: rows that fit in.
        selection: "random"; or "herding", for each class those whose running mean stays nearest to the class's.
    """

    rows: Tensor  # [size], −1 where nothing is held

    def __init__(self, size: int, selection: str = "random", seed: int = 0):
        super().__init__()
        check.one_of("Rehearsal", "selection", selection, ("random", "herding"))
        self.selection = selection
        self.register_buffer("rows", torch.full((size,), -1))
        self.register_buffer("generator", torch.Generator().manual_seed(seed).get_state())

    @property
    def held(self) -> Tensor:
        """The rows in it, oldest task first."""
        return self.rows[self.rows >= 0]

    @torch.no_grad()
    def add(self, rows: Tensor, labels: Tensor, count: int, features: Tensor | None = None) -> None:  # [n], [n], [n, D]
        """Keeps `count` of a task's rows, as many of each class as of any other, up to one.

        Raises ValueError where they do not fit in, or where herding has no features.
        """
        if count > (free := len(self.rows) - len(self.held)):
            raise ValueError(f"Rehearsal: count must be at most {free}, the rows that still fit in, got {count}")
        if self.selection == "herding" and features is None:
            raise ValueError("Rehearsal: features must be given for herding, got None")
        classes, chosen = labels.unique(), []
        for i, one in enumerate(classes):
            places = (labels == one).nonzero()[:, 0]
            share = min(count // len(classes) + (i < count % len(classes)), len(places))
            herding = self.selection == "herding"
            picked = herd(features[places], share) if herding else self._random(len(places), share)
            chosen.append(rows[places[picked]])
        found = torch.cat([self.held, *chosen])
        self.rows[: len(found)] = found

    def draw(self, count: int) -> Tensor:
        """`count` rows at random, each once; all of them where there are fewer."""
        held = self.held
        return held[self._random(len(held), count)]

    def _random(self, among: int, count: int) -> Tensor:
        generator = torch.Generator()
        generator.set_state(self.generator.cpu())
        found = torch.randperm(among, generator=generator)[:count]
        self.generator.copy_(generator.get_state())
        return found


def herd(features: Tensor, count: int) -> Tensor:  # [n, D]
    """Places of `count` rows, one after another: each brings the mean of those chosen nearest to the mean of all. Of
    features of length 1. Source: Welling 2009; Rebuffi et al. 2017 (iCaRL)."""
    x = F.normalize(features, dim=1)
    mean, total, free = x.mean(0), torch.zeros_like(x[0]), torch.ones(len(x), dtype=torch.bool, device=x.device)
    chosen: list[int] = []
    for k in range(1, count + 1):
        distance = (mean - (total + x) / k).norm(dim=1).masked_fill(~free, torch.inf)
        chosen.append(int(distance.argmin()))
        total, free[chosen[-1]] = total + x[chosen[-1]], False
    return torch.tensor(chosen, dtype=torch.int64)
