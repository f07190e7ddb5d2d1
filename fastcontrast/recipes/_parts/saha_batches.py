"""Batches made of whole clusters, and the prompt under which a language model's last token stands for its input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROLE = "Describe the text in one word."
CLOSING = "Represent the text in one word:"


class ClusterBatches:
    """Endless batches of rows: `per_batch` clusters, drawn uniformly, each once an epoch, joined to one tensor.

    Clusters differ in length, and so do batches. What goes on from a `state_dict` draws what would have come.

    Args:
        clusters: lists of rows. rank, world: every rank draws the same clusters and takes its own `per_batch` of them.
    """

    def __init__(self, clusters: Sequence[Sequence[int]], per_batch: int, seed: int, rank: int = 0, world: int = 1):
        if not 1 <= per_batch * world <= len(clusters):
            got = f"per_batch = {per_batch} on {world} ranks"
            raise ValueError(f"ClusterBatches: a batch must hold 1 to {len(clusters)} clusters, got {got}")
        if not 0 <= rank < world:
            raise ValueError(f"ClusterBatches: rank must lie in [0, {world}), got {rank}")
        self.clusters, self.per_batch, self.seed, self.rank, self.world = clusters, per_batch, seed, rank, world
        self.drawn = 0

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        together = self.per_batch * self.world
        epoch, batch = divmod(self.drawn, len(self.clusters) // together)
        self.drawn += 1
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(len(self.clusters), generator=generator).tolist()
        start = batch * together + self.rank * self.per_batch
        return torch.tensor([row for i in order[start : start + self.per_batch] for row in self.clusters[i]])

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.drawn, self.seed = state["drawn"], state["seed"]


def hierarchical_prompt(
    text: str, task: str = "", *, query: bool = True, role: str = ROLE, closing: str = CLOSING
) -> list[dict[str, Any]]:
    """Two levels that ask for one word: the system's turn for all inputs, the user's for this one. Messages as chat
    templates take them; with `add_generation_prompt=True` the state of the last token is the embedding.

    Args:
        task: what is asked of the text, in front of it.
        query: queries close with a line that asks once more; candidates do not.
    """
    lines = [x for x in (task, text, closing if query else "") if x]
    return [{"role": "system", "content": role}, {"role": "user", "content": "\n".join(lines)}]


def last_token(states: Tensor, mask: Tensor) -> Tensor:  # [B, T, D], [B, T]
    """The state of each text's last token, of length 1, [B, D]; padding may be on either side."""
    places = torch.arange(mask.shape[1], device=mask.device)
    last = (places * mask.to(places.dtype)).argmax(1)
    return F.normalize(states[torch.arange(len(last), device=last.device), last], dim=-1)
