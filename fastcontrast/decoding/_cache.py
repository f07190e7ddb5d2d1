"""A key-value cache that is allocated once, in which look-ahead costs one slot a candidate and a commit moves one slot.

Imports transformers, so it is imported where decoding begins, not before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, EncoderDecoderCache

from ._loop import decoder_layers

Place = tuple[int, int]  # which block, and which of its [n, 2] parts


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, `[B, H, capacity, D]`, of which the first `length` slots are in use."""

    is_sliding = False
    is_croppable = True

    def __init__(self, cache: PrefixCache, index: int):
        self.cache, self.index, self.length = cache, index, 0
        self.places: tuple[Place, Place] | None = None  # of keys and values
        self.store: tuple[Tensor, Tensor] | None = None  # views of those places

    @property
    def is_initialized(self) -> bool:
        return self.store is not None

    @property
    def keys(self) -> Tensor | None:
        return None if self.store is None else self.store[0][:, :, : self.length]

    @property
    def values(self) -> Tensor | None:
        return None if self.store is None else self.store[1][:, :, : self.length]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        value_states = key_states if value_states is None else value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self.places = self.cache.allocate(self.index, key_states, value_states)
        self.look()

    def look(self) -> None:
        """Views anew, after the cache's blocks were replaced."""
        if self.places is not None:
            self.store = tuple(self.cache.blocks[block].flatten(0, 1)[index] for block, index in self.places)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the new states behind those in use; returns views of all, nothing is copied."""
        if self.store is None:
            self.lazy_initialization(key_states, value_states)
        start = self.claim(key_states.shape[2])
        keys, values = (x[:, :, : self.length] for x in self.store)
        keys[:, :, start:] = key_states
        values[:, :, start:] = value_states
        return keys, values

    def claim(self, count: int) -> int:
        """Takes so many slots behind those in use, of which the first comes out; they are to be written."""
        start, self.length = self.length, self.length + count
        if self.length > self.store[0].shape[2]:
            self.cache.grow(self.length)
        return start

    def get_mask_sizes(self, query: Tensor | int) -> tuple[int, int]:
        """Length and offset; transformers 4 passes the new positions, 5 their number."""
        return self.length + (query.shape[0] if isinstance(query, Tensor) else query), 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def crop(self, count: int) -> None:
        """Drops |count| slots where it is negative; keeps `count` where it is not."""
        self.length = max(0, self.length + count) if count < 0 else min(self.length, count)

    def reset(self) -> None:
        self.length = 0


def select_rows(past: Any, rows: Tensor) -> None:
    """Keeps these rows of the batch; `transformers` has no such thing for an encoder-decoder's pair of caches."""
    for cache in (getattr(past, "self_attention_cache", past), getattr(past, "cross_attention_cache", None)):
        if cache is not None:
            cache.batch_select_indices(rows)


def empty_cache(model: Any, capacity: int) -> tuple[Any, PrefixCache]:
    """What the model is given, and the part of it that holds the text: of an encoder-decoder the one of a pair."""
    cache = PrefixCache(decoder_layers(model.config), capacity)
    return (EncoderDecoderCache(cache, DynamicCache()) if model.config.is_encoder_decoder else cache), cache


class PrefixCache(Cache):
    """Keys and values `[layers, 2, B, H, capacity, D]` in one block, so that all layers commit a slot in one copy.

    `capacity`: slots to begin with; a longer text makes the block grow. A layer of another shape or on another device
    than the first has a block of its own, `[1, 2, …]`, or two of `[1, 1, …]` where keys and values differ in width.
    """

    def __init__(self, layers: int, capacity: int):
        self.count, self.capacity = layers, capacity
        self.blocks: list[Tensor] = []
        super().__init__(layers=[_Layer(self, i) for i in range(layers)])

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        while len(self.layers) <= layer_idx:  # a model of more layers than its configuration tells
            self.layers.append(_Layer(self, len(self.layers)))
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    def allocate(self, index: int, keys: Tensor, values: Tensor) -> tuple[Place, Place]:
        """Places for a layer of such states."""
        number, shape = len(self.blocks), (*keys.shape[:2], self.capacity, keys.shape[3])
        if keys.shape != values.shape:
            for x in (keys, values):
                self.blocks.append(x.new_empty(1, 1, *x.shape[:2], self.capacity, x.shape[3]))
            return (number, 0), (number + 1, 0)
        if not self.blocks:
            self.blocks.append(keys.new_empty(self.count, 2, *shape))
            number = 1
        common = self.blocks[0]
        fits = common.shape[1:] == (2, *shape) and index < common.shape[0]
        if fits and common.dtype == keys.dtype and common.device == keys.device:
            return (0, 2 * index), (0, 2 * index + 1)
        self.blocks.append(keys.new_empty(1, 2, *shape))
        return (number, 0), (number, 1)

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        self.blocks = [change(block) for block in self.blocks]
        for layer in self.layers:
            layer.look()

    def grow(self, least: int) -> None:
        """More slots for every layer, what is in use copied over."""
        self.capacity = max(least, 2 * self.capacity)

        def larger(block: Tensor) -> Tensor:
            new = block.new_empty(*block.shape[:4], self.capacity, block.shape[5])
            new[..., : block.shape[4], :] = block
            return new

        self._replace(larger)

    def rollback(self, slots: int) -> None:
        for layer in self.layers:
            layer.length = max(0, layer.length - slots)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._replace(lambda block: block.repeat_interleave(repeats, 2))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._replace(lambda block: block.index_select(2, indices.to(block.device)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    # ------------------------------------------------------------------------------------------------- candidates

    def commit_slot(self, start: int, choice: Tensor) -> None:
        """Of the siblings in slots start, start + 1, … the chosen one [B] moves to `start`; the rest is dropped."""
        for block in self.blocks:
            chosen = choice.to(block.device)
            rows = torch.arange(block.shape[2], device=block.device)
            block[:, :, :, :, start] = block[:, :, rows, :, start + chosen].permute(1, 2, 0, 3, 4)
        for layer in self.layers:
            layer.length = min(layer.length, start + 1)

    def commit_row(self, start: int, choice: Tensor, siblings: int) -> None:
        """Of the siblings in rows b · siblings + j the chosen one's slot `start` is copied to the others."""
        for block in self.blocks:
            chosen = choice.to(block.device)
            slot = block[:, :, :, :, start].unflatten(2, (-1, siblings))  # [n, 2, B, siblings, H, D]
            rows = torch.arange(slot.shape[2], device=block.device)
            slot.copy_(slot[:, :, rows, chosen][:, :, :, None])

    def slots(self, start: int) -> list[Tensor]:
        """A copy of slot `start`, [n, 2, B, H, D] a block."""
        return [block[:, :, :, :, start].clone() for block in self.blocks]

    def write_slots(self, start: int, slots: list[Tensor]) -> None:
        for block, slot in zip(self.blocks, slots, strict=True):
            block[:, :, :, :, start] = slot
        for layer in self.layers:
            layer.length = start + 1 if layer.store is not None else 0
