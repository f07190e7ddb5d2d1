"""The k most likely tokens of each row of logits, and which of k candidates contrastive search takes.

    top      of a block of the vocabulary: the k largest logits as keys, the maximum and Σ exp(z − maximum)
    fold     of a block of keys: the k largest, until one block holds a row's
    finish   the k largest of a row, in order, and their probabilities
    select   scores of the candidates from the keys of `max_cosine`, and the first of the best

The k largest are taken out one by one: k is 3 … 10, and a block's keys stay in registers. Many more are sorted.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import FLT_MAX, Case, Launch, meta
from .max_cosine import BS, NOTHING, cosine_of, index_of, largest_key, nearest_launch, pack, value_of

BLOCK = 2048  # logits, or keys, of a program
MANY = 64  # candidates from which on all logits are sorted
PARTS = 256  # maxima and sums that `finish` takes at a time

# ------------------------------------------------------------------------------------------------------ the k likeliest


@triton.jit
def offset_of(high):
    """Makes exp(z − offset) 0 for every z of an empty row. An infinite maximum stays, and makes NaN as in torch."""
    return tl.maximum(high, -FLT_MAX)


@triton.jit
def _keep_best(keys, out, k):
    """The k largest of different keys in descending order, then NOTHING."""
    for i in range(k):
        best = tl.max(keys, 0)
        tl.store(out + i, best)
        keys = tl.where(keys == best, NOTHING, keys)


@triton.jit(do_not_specialize=["vocabulary", "k", "blocks"])
def top_kernel(logits, keys, highs, sums, vocabulary, k, blocks, stride, BV: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    o = pid % blocks * BV + tl.arange(0, BV)
    z = tl.load(logits + pid // blocks * stride + o, mask=o < vocabulary, other=-float("inf")).to(tl.float32)
    high = tl.max(tl.where(z == z, z, -float("inf")), 0)
    tl.store(highs + pid, high)
    tl.store(sums + pid, tl.sum(tl.exp(z - offset_of(high)), 0))
    _keep_best(pack(z, o), keys + pid * k, k)  # what lies beyond the vocabulary comes after all of it


@triton.jit(do_not_specialize=["count", "k", "blocks"])
def fold_kernel(keys, out, count, k, blocks, BN: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    o = pid % blocks * BN + tl.arange(0, BN)
    _keep_best(tl.load(keys + pid // blocks * count + o, mask=o < count, other=NOTHING), out + pid * k, k)


@triton.jit(do_not_specialize=["count", "k", "blocks"])
def finish_kernel(
    keys, highs, sums, probabilities, tokens, count, k, blocks, BN: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, PARTS)
    largest = tl.full((PARTS,), -float("inf"), tl.float32)
    for first in range(0, blocks, PARTS):
        at = highs + row * blocks + first + o_p
        largest = tl.maximum(largest, tl.load(at, mask=first + o_p < blocks, other=-float("inf")))
    offset = offset_of(tl.max(largest, 0))
    total = tl.zeros((PARTS,), tl.float32)
    for first in range(0, blocks, PARTS):
        at, mask = row * blocks + first + o_p, first + o_p < blocks
        high = tl.load(highs + at, mask=mask, other=-float("inf"))
        total += tl.load(sums + at, mask=mask, other=0.0) * tl.exp(high - offset)
    total = tl.sum(total, 0)
    o = tl.arange(0, BN)
    left = tl.load(keys + row * count + o, mask=o < count, other=NOTHING)
    for i in range(k):
        best = tl.max(left, 0)
        p = tl.exp(value_of(best) - offset) / total
        tl.store(probabilities + row * k + i, tl.where(total == 0.0, 0.0, p))  # 0 only where every logit is −inf
        tl.store(tokens + row * k + i, index_of(best))
        left = tl.where(left == best, NOTHING, left)


def top_launch(logits: Tensor, k: int) -> tuple[Launch, tuple[Tensor, Tensor, Tensor]]:
    """The launch, and what it fills: keys [rows, blocks, k], maxima and sums [rows, blocks]."""
    rows, vocabulary = logits.shape
    block = min(BLOCK, max(64, triton.next_power_of_2(vocabulary)))
    blocks = triton.cdiv(vocabulary, block)
    keys = torch.empty(rows, blocks, k, dtype=torch.int64, device=logits.device)
    highs, sums = (torch.empty(rows, blocks, dtype=torch.float32, device=logits.device) for _ in range(2))
    arguments = logits, keys, highs, sums, vocabulary, k, blocks, logits.stride(0)
    return Launch(top_kernel, (rows * blocks,), arguments, {"BV": block}, {"num_warps": 8}), (keys, highs, sums)


def fold_launch(keys: Tensor) -> tuple[Launch, Tensor]:
    """keys [rows, blocks, k] to fewer blocks."""
    rows, before, k = keys.shape
    blocks = triton.cdiv(before * k, BLOCK)
    out = keys.new_empty(rows, blocks, k)
    arguments = keys, out, before * k, k, blocks
    return Launch(fold_kernel, (rows * blocks,), arguments, {"BN": BLOCK}, {"num_warps": 8}), out


def finish_launch(keys: Tensor, highs: Tensor, sums: Tensor, probabilities: Tensor, tokens: Tensor) -> Launch:
    rows, blocks, k = keys.shape
    arguments = keys, highs, sums, probabilities, tokens, blocks * k, k, highs.shape[1]
    constants = {"BN": max(64, triton.next_power_of_2(blocks * k)), "PARTS": PARTS}
    return Launch(finish_kernel, (rows,), arguments, constants, {"num_warps": 4 if blocks * k <= 512 else 8})


def contrastive_candidates(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """probabilities [B, k] fp32 and tokens [B, k] int64; logits without gaps in a row."""
    logits = logits.detach()
    if k > MANY:
        return _sorted_candidates(logits, k)
    launch, (keys, highs, sums) = top_launch(logits, k)
    launch.run()
    while keys.shape[1] * k > BLOCK:
        launch, keys = fold_launch(keys)
        launch.run()
    probabilities = torch.empty(logits.shape[0], k, dtype=torch.float32, device=logits.device)
    tokens = torch.empty_like(probabilities, dtype=torch.int64)
    finish_launch(keys, highs, sums, probabilities, tokens).run()
    return probabilities, tokens


def _sorted_candidates(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    z = logits.float()
    values, tokens = z.sort(dim=1, descending=True, stable=True)  # NaN first, equals as they come
    nothing = values[:, :1] == -torch.inf
    return z.softmax(1).gather(1, tokens[:, :k]).masked_fill(nothing, 0.0), tokens[:, :k].contiguous()


# -------------------------------------------------------------------------------------------------------- the selection


@triton.jit(do_not_specialize=["k", "tiles"])
def select_kernel(
    probabilities, keys, choice, score, degeneration, k, tiles, keep, alpha, BK: tl.constexpr, BS: tl.constexpr
):  # fmt: skip
    """keep = 1 − alpha, in float64 before it is rounded."""
    row = tl.program_id(0).to(tl.int64)
    best = tl.full((BK,), NOTHING, tl.int64)
    for k0 in range(0, k, BK):
        o = k0 + tl.arange(0, BK)
        mask, at = o < k, row * k + o
        cosine = cosine_of(largest_key(keys, at, mask, tiles, BS))
        tl.store(degeneration + at, cosine, mask=mask)
        p = tl.load(probabilities + at, mask=mask, other=0.0)
        value = keep * p - alpha * tl.where(cosine == -float("inf"), 0.0, cosine)
        value = tl.where(p == 0.0, -float("inf"), value)
        tl.store(score + at, value, mask=mask)
        best = tl.maximum(best, tl.where(mask, pack(value, o), NOTHING))
    tl.store(choice + row, index_of(tl.max(best, 0)))


def select_launch(
    probabilities: Tensor, keys: Tensor, choice: Tensor, score: Tensor, degeneration: Tensor, alpha: float
) -> Launch:
    rows, k, tiles = keys.shape
    arguments = probabilities, keys, choice, score, degeneration, k, tiles, 1.0 - alpha, alpha
    constants = {"BK": min(16, triton.next_power_of_2(k)), "BS": BS}
    return Launch(select_kernel, (rows,), arguments, constants, {"num_warps": 4})


def contrastive_select(
    probabilities: Tensor,  # [B, K] fp32 without gaps
    candidates: Tensor,
    context: Tensor,
    valid: Tensor | None,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """choice [B] int64, score and degeneration [B, K] fp32."""
    launch, keys = nearest_launch(candidates.detach(), context.detach(), valid)
    launch.run()
    score, degeneration = (torch.empty(keys.shape[:2], dtype=torch.float32, device=keys.device) for _ in range(2))
    choice = keys.new_empty(keys.shape[:1])
    select_launch(probabilities.detach(), keys, choice, score, degeneration, alpha).run()
    return choice, score, degeneration


def compile_cases(capability: tuple[int, int]) -> Iterator[Case]:
    def integers(*shape: int) -> Tensor:
        return meta(*shape, dtype=torch.int64)

    for dtype in (torch.bfloat16, torch.float32):  # float16 takes the registers that bfloat16 takes
        for vocabulary in (50257, 128256):
            launch, parts = top_launch(meta(64, vocabulary, dtype=dtype), 5)
            yield Case(f"top {str(dtype).removeprefix('torch.')} {vocabulary}", launch, False)
    yield Case("fold", fold_launch(integers(64, 63, 64))[0], False)
    for k in (5, 32):
        keys = integers(64, parts[1].shape[1], k)
        yield Case(
            f"finish {k} of {keys.shape[1] * k}", finish_launch(keys, *parts[1:], meta(64, k), integers(64, k)), False
        )
    for k in (1, 5, 40):
        outputs = integers(64), meta(64, k), meta(64, k)
        yield Case(f"select {k}", select_launch(meta(64, k), integers(64, k, 8), *outputs, 0.6), False)
