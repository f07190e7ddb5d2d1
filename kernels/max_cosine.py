"""The largest cosine of each candidate to its row's context, as keys that order like (value, first index).

    nearest   products of a tile of the context with BK candidates, and both sides' norms: the largest key of the tile
    decode    the largest key of all tiles, as value and index

A key has the bits of the value, made monotone, above the complement of the index: the largest is the first of the
largest values, in whatever order keys meet. NaN is above every number. Up to BK candidates the context is read once.
Half-precision products are the matrix units', which is why BK is 16 for the usual 3 … 10 candidates.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Case, Launch, interpreted, meta

SMALLEST_NORM = tl.constexpr(1e-12)  # as in `ops.max_cosine`
NOTHING = tl.constexpr(-(2**63))  # the key below all keys

SMALL, LARGE = 32, 64  # positions of a tile: small ones as long as large ones would leave processors idle
BK = 16
BS = 32  # tiles, and pairs of row and candidate, that `decode` takes at a time
PROGRAMS = 512  # that keep the GPUs of today busy

# ----------------------------------------------------------------------------------------------------------------- keys


@triton.jit
def pack(value, index):
    """int64 key of a float32 and an index below 2³²; −0 counts as 0."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bits = tl.where(value != value, 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def value_of(key):
    bits = (key >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def index_of(key):
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def largest_key(keys, pair, mask, tiles, BS: tl.constexpr):
    """Of all tiles of each pair of row and candidate: keys [pairs, tiles]."""
    best = tl.full((pair.shape[0], BS), NOTHING, tl.int64)
    for s0 in range(0, tiles, BS):
        s = s0 + tl.arange(0, BS)
        at = keys + pair[:, None] * tiles + s[None, :]
        best = tl.maximum(best, tl.load(at, mask=mask[:, None] & (s < tiles)[None, :], other=NOTHING))
    return tl.max(best, 1)


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["k", "t", "tiles"])
def nearest_kernel(
    candidates, context, valid, keys, k, t, d, tiles, candidates_b, candidates_k, context_b, context_t,
    BT: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """keys [B, K, tiles]: of each candidate, and each tile of BT positions."""
    pid = tl.program_id(0)
    groups = tl.cdiv(k, BK)  # next to each other, so that the second-level cache serves all but the first
    tile = pid // groups % tiles
    b = (pid // groups // tiles).to(tl.int64)
    o_k, o_d, i = pid % groups * BK + tl.arange(0, BK), tl.arange(0, BD), tile * BT + tl.arange(0, BT)
    m_k, m_t = o_k < k, i < t
    if valid is not None:
        m_t = m_t & (tl.load(valid + b * t + i, mask=m_t, other=0) != 0)
    p_c = candidates + b * candidates_b + o_k.to(tl.int64)[None, :] * candidates_k + o_d[:, None]
    p_x = context + b * context_b + i.to(tl.int64)[:, None] * context_t + o_d[None, :]
    dots = tl.zeros((BT, BK), tl.float32)
    x_squares, c_squares = tl.zeros((BT,), tl.float32), tl.zeros((BK,), tl.float32)
    for d0 in range(0, d, BD):
        m_d = d0 + o_d < d
        x = tl.load(p_x + d0, mask=m_t[:, None] & m_d[None, :], other=0.0)
        c = tl.load(p_c + d0, mask=m_d[:, None] & m_k[None, :], other=0.0)
        wide_x, wide_c = x.to(tl.float32), c.to(tl.float32)
        x_squares += tl.sum(wide_x * wide_x, 1)
        c_squares += tl.sum(wide_c * wide_c, 0)
        if UPCAST:
            dots = tl.dot(wide_x, wide_c, dots, input_precision="ieee")
        else:
            dots = tl.dot(x, c, dots, input_precision="ieee")
    # One norm after the other: their product may overflow or vanish where they do not.
    cosines = dots / tl.maximum(tl.sqrt_rn(c_squares), SMALLEST_NORM)[None, :]
    cosines = cosines / tl.maximum(tl.sqrt_rn(x_squares), SMALLEST_NORM)[:, None]
    key = pack(tl.where(m_t[:, None], cosines, -float("inf")), i[:, None])
    tl.store(keys + (b * k + o_k) * tiles + tile, tl.max(key, 0), mask=m_k)


@triton.jit
def cosine_of(key):
    """−inf where nothing was valid, and where there was nothing."""
    return tl.where(key == NOTHING, -float("inf"), value_of(key))


@triton.jit(do_not_specialize=["pairs", "tiles"])
def decode_kernel(keys, values, indices, pairs, tiles, BN: tl.constexpr, BS: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    mask = pair < pairs
    key = largest_key(keys, pair, mask, tiles, BS)
    value = cosine_of(key)
    tl.store(values + pair, value, mask=mask)
    tl.store(indices + pair, tl.where(value == -float("inf"), -1, index_of(key)), mask=mask)


# ------------------------------------------------------------------------------------------------------------- launches


def nearest_launch(candidates: Tensor, context: Tensor, valid: Tensor | None) -> tuple[Launch, Tensor]:
    """The launch, and keys [B, K, tiles] that it fills."""
    (b, k, d), t = candidates.shape, context.shape[1]
    groups = triton.cdiv(k, BK)
    # Float32 keeps to small tiles: of 64 rows, Triton 3.6 may make TF32 products on sm_100, whatever it is told.
    large = context.dtype != torch.float32 and b * groups * triton.cdiv(t, LARGE) >= PROGRAMS
    block = LARGE if large else SMALL
    tiles = triton.cdiv(t, block)
    keys = torch.empty(b, k, tiles, dtype=torch.int64, device=context.device)
    sizes = d, tiles, *candidates.stride()[:2], *context.stride()[:2]
    arguments = candidates, context, None if valid is None else valid.view(torch.uint8), keys, k, t, *sizes
    # Rows that do not start at 16 bytes are loaded number by number, each with an address and a mask of its own.
    narrow = any(size % 16 for size in (d, candidates.stride(1), context.stride(1)))
    constants = {
        "BT": block, "BK": BK, "BD": (64 if narrow else 128) // context.element_size(),
        "UPCAST": interpreted() and context.dtype != torch.float32,
    }  # fmt: skip
    options = {"num_warps": 4, "num_stages": 3}
    return Launch(nearest_kernel, (b * groups * tiles,), arguments, constants, options), keys


def decode_launch(keys: Tensor, values: Tensor, indices: Tensor) -> Launch:
    pairs = values.numel()
    arguments = keys, values, indices, pairs, keys.shape[2]
    return Launch(decode_kernel, (triton.cdiv(pairs, BS),), arguments, {"BN": BS, "BS": BS}, {"num_warps": 4})


def max_cosine(candidates: Tensor, context: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """values [B, K] fp32 and indices [B, K] int64; candidates and context without gaps in the last dimension."""
    launch, keys = nearest_launch(candidates.detach(), context.detach(), valid)
    launch.run()
    values = torch.empty(candidates.shape[:2], dtype=torch.float32, device=context.device)
    indices = torch.empty_like(values, dtype=torch.int64)
    decode_launch(keys, values, indices).run()
    return values, indices


def compile_cases(capability: tuple[int, int]) -> Iterator[Case]:
    """Few and many positions, with and without padding, and rows that are no multiple of 16 bytes."""
    for dtype in (torch.bfloat16, torch.float32):  # float16 takes the registers that bfloat16 takes
        name = str(dtype).removeprefix("torch.")
        for b, t, d in ((1, 512, 768), (256, 1024, 768), (256, 1024, 65), (1, 512, 65)):
            context = meta(b, 2 * t, d, dtype=dtype)[:, :t]
            for valid in (None, meta(b, t, dtype=torch.bool)):
                if valid is None and (d == 65 or dtype == torch.float32):
                    continue
                launch, keys = nearest_launch(meta(b, 5, d, dtype=dtype), context, valid)
                case = f"nearest {name} {b}x{t}x{d}{'' if valid is None else ' valid'}"
                yield Case(case, launch, dtype != torch.float32 and b > 1 and d != 65)
    yield Case("decode", decode_launch(keys, meta(256, 5), meta(256, 5, dtype=torch.int64)), False)
