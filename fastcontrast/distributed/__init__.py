"""Losses over a batch that lies on several ranks of `torch.distributed`."""

from ._collectives import Shards, gather, mean_gradient, shards, world_size

__all__ = ["Shards", "gather", "mean_gradient", "shards", "world_size"]
