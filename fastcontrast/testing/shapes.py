"""Named workloads: what is tested is what is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """`m` queries against `n` keys of width `d`."""

    name: str
    m: int
    n: int
    d: int

    @property
    def product_flop(self) -> int:
        """Floating-point operations of one matrix product, the unit in which a sweep is counted."""
        return 2 * self.m * self.n * self.d


# Fine-tuning batches: the whole matrix fits into one to a few tiles, so fixed costs show.
SMALL = tuple(Shape(f"batch_{n}", n, n, 512) for n in (128, 256, 512, 1024, 2048))

# Pre-training batches: open_clip's on one node, on a few, and CLIP's own 32k doubled. Dense logits: 0.25, 1 and 16 GiB.
LARGE = tuple(Shape(f"batch_{n}", n, n, 512) for n in (8192, 16384, 65536))

# Beside the tiles of the CPU sweep (1024 × 2048, columns in lanes of 64, rows in groups of 16) and beside everything.
RAGGED = (
    Shape("one_pair", 1, 1, 64),
    Shape("one_query", 1, 2100, 48),
    Shape("one_key", 1100, 1, 48),
    Shape("no_queries", 0, 7, 16),
    Shape("no_keys", 7, 0, 16),
    Shape("no_width", 5, 9, 0),
    Shape("width_one", 130, 67, 1),
    Shape("wide", 65, 129, 4096),
    Shape("primes", 337, 523, 61),
    Shape("below_tile", 1023, 2047, 24),
    Shape("tile", 1024, 2048, 24),
    Shape("above_tile", 1025, 2049, 24),
)


def named(name: str) -> Shape:
    for shape in (*SMALL, *LARGE, *RAGGED):
        if shape.name == name:
            return shape
    raise ValueError(f"no shape is named {name!r}")
