"""What a symmetric loss over many ranks will move, hold and take, before any machine is rented.

N pairs of width D on W ranks, n = N / W rows each, b bytes a feature. A rank's share of the matrix is n × N, in W
blocks. Rings carry, besides features, one float64 a row in the forward (column statistics), three numbers in the
backward, and the gradient of the keys in float32:

    forward    W − 1 hops of n·D·b bytes,          W hops of 8n            2n²D FLOP a block
    backward   W − 1 hops of n·D·b + 12n bytes,    W hops of 4nD           6n²D FLOP a block

A hop is hidden behind a block's products where its seconds are fewer:

    forward    n ≥ b · F / (2B)            backward    n ≥ (b + 4) · F / (6B)          F in FLOP/s, B in bytes/s

which does not depend on D. Gathering moves what the ring moves, at once and hidden behind nothing, and holds N rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastcontrast.ops import _check as check

from ._exchange import HOW

STATISTICS = 8, 12  # bytes a row that travel beside features: float64 c; float32 gradient and float64 c
GRADIENT = 4  # bytes an entry of the keys' gradient
PRODUCTS = 1, 3  # of 2n²D FLOP a block, forward and backward


@dataclass(frozen=True)
class Plan:
    """See `plan`. Bytes and seconds are those of one rank; pairs (forward, backward)."""

    exchange: str
    ranks: int
    rows: int  # n, this rank's
    width: int
    hop_bytes: tuple[int, int]  # of the largest hop: features, and what was found out about the last block
    moved_bytes: tuple[int, int]  # received in a step
    held_bytes: int  # most at once, beyond features, their gradients and the workspace
    block_seconds: tuple[float, float]
    least_rows: tuple[float, float]  # n from which a ring's hops are hidden
    seconds: float  # of both passes, with what is hidden hidden
    compute_seconds: float  # of the products alone

    @property
    def hidden(self) -> bool:
        """Whether every hop of a ring takes no longer than the products beside it."""
        return self.rows >= max(self.least_rows)


def plan(
    pairs: int,
    width: int,
    ranks: int,
    *,
    exchange: str = "ring",
    feature_bytes: int = 2,
    flops: float,
    bandwidth: float,
) -> Plan:
    """A symmetric loss (`ClipLoss`) of `pairs` pairs on `ranks` ranks that hold as many each.

    Args:
        pairs, width, ranks: N, D, W.
        exchange: "ring" or "gather".
        feature_bytes: 2 for half precision, 4 for float32.
        flops: FLOP/s that a rank reaches in matrix products.
        bandwidth: bytes/s from a rank to its neighbour, while it receives as many.

    Raises: ValueError unless the ranks hold the same number of pairs, at least one.
    """
    check.one_of("plan", "exchange", exchange, HOW)
    if ranks < 1 or pairs < ranks or pairs % ranks:
        raise ValueError(f"plan: pairs must be a positive multiple of ranks, got {pairs} and {ranks}")
    n, w, b = pairs // ranks, ranks, feature_bytes
    features = n * width * b
    keys = features, features + n * STATISTICS[1]
    found = n * STATISTICS[0], n * width * GRADIENT
    moved = tuple((w - 1) * k + (w if exchange == "ring" else w - 1) * f for k, f in zip(keys, found, strict=True))
    gradient = n * width * GRADIENT
    if w == 1:
        moved, held = (0, 0), 0
    elif exchange == "ring":  # two blocks; the gradients of a block's queries and keys, on arrival, here and leaving
        held = 2 * keys[1] + 5 * gradient
    else:  # all keys, the gradient of all, and again in one piece to be reduced
        held = w * keys[1] + w * gradient + 2 * gradient
    block = tuple(p * 2 * n * n * width / flops for p in PRODUCTS)
    least = b * flops / (2 * bandwidth), (b + GRADIENT) * flops / (6 * bandwidth)
    passes = zip(block, keys, found, strict=True)
    if w == 1:
        seconds = sum(block)
    elif exchange == "ring":
        seconds = sum(ring_seconds(w, c, k / bandwidth, f / bandwidth) for c, k, f in passes)
    else:
        seconds = sum(w * c + (w - 1) * (k + f) / bandwidth for c, k, f in passes)
    hops = tuple(k + f for k, f in zip(keys, found, strict=True)) if w > 1 else (0, 0)
    return Plan(exchange, w, n, width, hops, moved, held, block, least, seconds, w * sum(block))


def ring_seconds(ranks: int, block: float, keys: float, found: float) -> float:
    """One pass round a ring, event by event as `_exchange` orders them, on a link that carries one thing at a time.

    `block`: seconds of the work on a block; `keys`, `found`: of a hop of features, and of what was found about them.
    """
    now = link = found_there = 0.0
    for step in range(ranks):
        if step < ranks - 1:
            link = keys_there = max(now, link) + keys
        now = max(now + block, found_there)
        link = found_there = max(now, link) + found
        if step < ranks - 1:
            now = max(now, keys_there)
    return max(now, found_there)
