"""Gaussian noise that depends on nothing but its place: seed, step, row and column.

    eps[i, j] = Φ(seed; step, i, j),  Φ = Box-Muller over Philox 4x32-10

A counter is encrypted, no state is carried along. So any part of the noise can be drawn alone, by any rank, thread or
device, and a run that goes on from a checkpoint needs only the number of its step. All that is used of floating point
is + − · / √ in float64, which round alike everywhere: results are equal to the last bit, where libraries of log and cos
differ between vectors and their tails.

Sources: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Box & Muller 1958.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastcontrast.distributed._exchange import active

WORD = (1 << 32) - 1
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85  # what the key grows by in each round
SINE = [(-1) ** k / math.factorial(2 * k + 1) for k in range(10)]
COSINE = [(-1) ** k / math.factorial(2 * k) for k in range(10)]
ATANH = [1 / (2 * k + 1) for k in range(12)]


def seeded_normal(
    rows: int,
    columns: int,
    seed: int,
    step: int | Tensor,
    first_row: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Rows first_row … first_row + rows − 1 of the noise of a step, [rows, columns], drawn in float64, then rounded.

    Args:
        seed: in [0, 2^64). step: in [0, 2^32), a number, or an integer tensor of no dimension, which is not read.

    Raises ValueError for a seed, step or row beyond its range.
    """
    for name, value, bits in (("seed", seed, 64), ("step", step, 32), ("first_row", first_row, 32)):
        if not isinstance(value, Tensor) and not 0 <= value < 1 << bits:
            raise ValueError(f"seeded_normal: {name} must lie in [0, 2^{bits}), got {value}")
    if first_row + rows > 1 << 32:
        raise ValueError(f"seeded_normal: rows must end before 2^32, got {rows} from {first_row} on")
    blocks = torch.arange(-(-columns // 4), device=device)  # four columns a counter
    row = torch.arange(first_row, first_row + rows, device=device)[:, None]
    words = philox(torch.broadcast_tensors(blocks, row, torch.as_tensor(step, device=device), row * 0), seed)
    radius = (-2 * _log((words[::2] + 1).double() * 2.0**-32)).sqrt()  # of (0, 1]: no infinity
    sine, cosine = _sine_cosine(words[1::2])
    pairs = torch.stack([radius * cosine, radius * sine], -1)  # [2, rows, blocks, 2]
    return pairs.movedim(0, 2).flatten(1)[:, :columns].to(dtype)


def batch_noise(rows: int, columns: int, seed: int, step: int | Tensor, like: Tensor) -> Tensor:
    """`seeded_normal` of this rank's rows of a batch that lies on all ranks, in precision (at least float32) and on the
    device of `like`."""
    how = active()
    first = 0 if how is None else how.shards(rows, like.device).offset
    return seeded_normal(rows, columns, seed, step, first, torch.promote_types(like.dtype, torch.float32), like.device)


def philox(counter: tuple[Tensor, ...], key: int) -> Tensor:  # 4 of [...], int64 of 32 bits
    """Philox 4x32-10 of counters (c0, c1, c2, c3) under a key of 64 bits, [4, ...]."""
    c0, c1, c2, c3 = counter
    keys = [key & WORD, key >> 32]
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(c0, MULTIPLIERS[0]), _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ keys[0], low1, high0 ^ c3 ^ keys[1], low0
        keys = [(k + w) & WORD for k, w in zip(keys, WEYL, strict=True)]
    return torch.stack([c0, c1, c2, c3])


def _product(x: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """High and low word of a product of 64 bits, by halves: int64 has no room for it."""
    low = x * (by & 0xFFFF)
    middle = x * (by >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def _log(u: Tensor) -> Tensor:
    """log(m · 2^e) = e·log 2 + 2·atanh((m − 1) / (m + 1)), m in [√½, √2)."""
    m, e = torch.frexp(u)
    small = m < math.sqrt(0.5)
    m, e = torch.where(small, 2 * m, m), e - small.int()
    s = (m - 1) / (m + 1)
    return e.to(u.dtype) * math.log(2) + 2 * s * _series(ATANH, s * s)


def _sine_cosine(word: Tensor) -> tuple[Tensor, Tensor]:
    """Of 2π · word / 2^32: series in its distance from the nearest quarter of a turn, then so many quarters."""
    shifted = word + (1 << 29)
    quarter = (shifted >> 30) & 3
    angle = ((shifted & ((1 << 30) - 1)) - (1 << 29)).double() * (2 * math.pi * 2.0**-32)
    square = angle * angle
    sine, cosine = angle * _series(SINE, square), _series(COSINE, square)
    odd = quarter % 2 == 1
    sine, cosine = torch.where(odd, cosine, sine), torch.where(odd, sine, cosine)
    return torch.where(quarter >= 2, -sine, sine), torch.where((quarter == 1) | (quarter == 2), -cosine, cosine)


def _series(coefficients: list[float], x: Tensor) -> Tensor:
    """Σ_k c_k x^k, by Horner."""
    total = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = total * x + c
    return total
