"""Mean squared distances of samples to a positive and a negative, in one read of the three, and their gradients.

distances   of each chunk of a sample both sums of squares over n; more than one chunk are added up in float64
gradients   those that are wanted, in one read; everything is 64-bit beyond a chunk
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Case, Launch, interpreted, meta, rounded, sum_launch

BLOCK = 1024  # numbers of a step: 8 for each thread, 16 bytes of half precision
CHUNK = 8192  # numbers of a program: 24 KiB and more in flight, and two programs a processor at 64 samples of 16,384

# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def load_three(target, positive, negative, b, target_b, positive_b, negative_b, o, mask):
    y = tl.load(target + b * target_b + o, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(positive + b * positive_b + o, mask=mask, other=0.0).to(tl.float32)
    n = tl.load(negative + b * negative_b + o, mask=mask, other=0.0).to(tl.float32)
    return y, p, n


@triton.jit(do_not_specialize=["samples", "chunks"])
def distances_kernel(
    target, positive, negative, parts, samples, chunks, n, target_b, positive_b, negative_b,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts [chunks, 2, samples]."""
    chunk, b = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64)
    near, far = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    start = chunk.to(tl.int64) * CHUNK
    for o0 in range(0, CHUNK, BLOCK):
        o = start + o0 + tl.arange(0, BLOCK)
        y, p, q = load_three(target, positive, negative, b, target_b, positive_b, negative_b, o, o < n)
        near += (p - y) * (p - y)
        far += (q - y) * (q - y)
    at = parts + chunk.to(tl.int64) * 2 * samples + b
    tl.store(at, tl.sum(near, 0) / n)
    tl.store(at + samples, tl.sum(far, 0) / n)


@triton.jit(do_not_specialize=["samples", "chunks"])
def gradients_kernel(
    target, positive, negative, gradients, dtarget, dpositive, dnegative,
    samples, chunks, n, target_b, positive_b, negative_b, BLOCK: tl.constexpr, TO_NEAREST: tl.constexpr,
):  # fmt: skip
    """Of gradients [2, samples], into [samples, n] each, where wanted."""
    chunk, b = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64)
    o = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o < n
    y, p, q = load_three(target, positive, negative, b, target_b, positive_b, negative_b, o, mask)
    dp = tl.load(gradients + b) * (2.0 / n) * (p - y)
    dn = tl.load(gradients + samples + b) * (2.0 / n) * (q - y)
    at = b * n + o
    if dtarget is not None:
        tl.store(dtarget + at, rounded(-(dp + dn), dtarget, TO_NEAREST), mask=mask)
    if dpositive is not None:
        tl.store(dpositive + at, rounded(dp, dpositive, TO_NEAREST), mask=mask)
    if dnegative is not None:
        tl.store(dnegative + at, rounded(dn, dnegative, TO_NEAREST), mask=mask)


# ------------------------------------------------------------------------------------------------------------- launches


def distances_launch(target: Tensor, positive: Tensor, negative: Tensor) -> tuple[Launch, Tensor]:
    """The launch, and parts [chunks, 2, B] that it fills."""
    b, n = target.shape
    chunks = triton.cdiv(n, CHUNK)
    parts = torch.empty(chunks, 2, b, dtype=torch.float32, device=target.device)
    arguments = target, positive, negative, parts, b, chunks, n, *strides(target, positive, negative)
    constants = {"CHUNK": CHUNK, "BLOCK": BLOCK}
    return Launch(distances_kernel, (b * chunks,), arguments, constants, {"num_warps": 4}), parts


def gradients_launch(
    target: Tensor,  # [B, n]
    positive: Tensor,  # [B, n]
    negative: Tensor,  # [B, n]
    gradients: Tensor,  # [2, B]
    found: list[Tensor | None],  # each [B, n]
) -> Launch:
    b, n = target.shape
    chunks = triton.cdiv(n, BLOCK)
    arguments = target, positive, negative, gradients, *found, b, chunks, n, *strides(target, positive, negative)
    constants = {"BLOCK": BLOCK, "TO_NEAREST": interpreted() and target.dtype == torch.bfloat16}
    return Launch(gradients_kernel, (b * chunks,), arguments, constants, {"num_warps": 4})


def strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(x.stride(0) for x in tensors)


def triplet_distances(target: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """[2, B] fp32; each [B, n], without gaps in a sample."""
    b, n = target.shape
    if not b * n:
        return torch.zeros(2, b, dtype=torch.float32, device=target.device)
    launch, parts = distances_launch(target.detach(), positive.detach(), negative.detach())
    launch.run()
    if parts.shape[0] == 1:
        return parts[0]
    distances = torch.empty(2, b, dtype=torch.float32, device=target.device)
    sum_launch(parts.view(-1, 2 * b), distances).run()
    return distances


def triplet_distances_backward(
    target: Tensor,  # [B, n]
    positive: Tensor,  # [B, n]
    negative: Tensor,  # [B, n]
    gradients: Tensor,  # [2, B]
    needs: tuple[bool, bool, bool],
) -> list[Tensor | None]:
    inputs = target.detach(), positive.detach(), negative.detach()
    found = [torch.empty(target.shape, dtype=target.dtype, device=target.device) if need else None for need in needs]
    gradients_launch(*inputs, gradients, found).run()
    return found


def compile_cases(capability: tuple[int, int]) -> Iterator[Case]:
    """Latents of a diffusion model, and samples that are no multiple of 16 bytes."""
    for dtype in (torch.bfloat16, torch.float32):  # float16 takes the registers that bfloat16 takes
        for n in (16384, 1025):
            name, x = f"{str(dtype).removeprefix('torch.')} {n}", meta(64, n, dtype=dtype)
            yield Case(f"distances {name}", distances_launch(x, x, x)[0], False, n == 16384)
            for wanted, found in (("both", [None, x, x]), ("all", [x, x, x])):
                yield Case(
                    f"gradients {name} {wanted}", gradients_launch(x, x, x, meta(2, 64), found), False, n == 16384
                )
