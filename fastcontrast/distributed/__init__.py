"""Losses over a batch that lies on several ranks of `torch.distributed`."""

from ._collectives import Shards, gather, mean_gradient, shards, world_size
from ._exchange import exchange

__all__ = ["Shards", "exchange", "gather", "mean_gradient", "shards", "world_size"]
