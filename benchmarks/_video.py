"""Attention across frames: the problems, their float64 truths, and what models run today, in torch.

All layouts are the model's own, `(b f) t c`: q, k and v [B, F, T, H, D] without gaps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.ops.frame_rules import Rule, causal
from fastcontrast.testing.shapes import Clips

from ._harness import Provider, Step

TOLERANCE = 2e-5
CHUNK = 3  # frames, of the one rule that is no list of frames
CHUNKS = str(causal(CHUNK))
POSITIONS = 1 << 22  # elements of q a chunk of the truth of temporal attention: 32 MiB in float64


def rule_of(name: str) -> str | Rule:
    """What the operation is given for the rule of a shape."""
    return {"temporal": "all", CHUNKS: causal(CHUNK)}.get(name, name)


class Problem(NamedTuple):
    q: Tensor  # [B, F, T, H, D]
    k: Tensor  # [B, F, T, H, D]
    v: Tensor  # [B, F, T, H, D]
    upstream: Tensor  # [B, F, T, H, D], the gradient of out
    extra: tuple[Tensor, ...]  # keys and values [B, F, E, H, D], or none
    lengths: Tensor | None  # [B]
    rule: str

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.q, self.k, self.v, *self.extra)

    @property
    def options(self) -> dict:
        """Arguments of the operation beside q, k and v."""
        return {"rule": rule_of(self.rule), "lengths": self.lengths, "extra": self.extra or None}


def make_problem(shape: Clips, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Problem:
    random = torch.Generator(device).manual_seed(0)

    def normal(tokens: int) -> Tensor:
        return torch.randn(
            shape.b, shape.f, tokens, shape.h, shape.d, generator=random, device=device, dtype=torch.float32
        ).to(dtype)

    q, k, v = (normal(shape.t).requires_grad_() for _ in range(3))
    extra = tuple(normal(shape.extra).requires_grad_() for _ in range(2)) if shape.extra else ()
    lengths = torch.randint(1, shape.f + 1, (shape.b,), generator=random, device=device) if shape.ragged else None
    return Problem(q, k, v, normal(shape.t), extra, lengths, shape.rule)


def tiny(shape: Clips) -> Clips:
    """Of the same kind, for the warm-up of a process and for `--quick`: a clip and a few tokens."""
    return replace(shape, name=f"{shape.name}, tiny", b=2, f=min(shape.f, 4), t=min(shape.t, 40), h=2)


def provider(attend: Callable[[Problem], Tensor], backward: bool, **options) -> Provider:
    """`attend(problem)` is out; forward and backward with its gradients to all inputs."""

    def make(problem: Problem) -> Step:
        def step() -> tuple[Tensor, ...]:
            with torch.set_grad_enabled(backward):
                out = attend(problem)
            return (out.detach(), *(torch.autograd.grad(out, problem.inputs, problem.upstream) if backward else ()))

        return step

    return Provider(make, **options)


# -------------------------------------------------------------------------------------------------- temporal attention


def key_mask(problem: Problem) -> Tensor | None:
    """[B, 1, 1, F], True where a frame is valid; None where all are."""
    if problem.lengths is None:
        return None
    frames = torch.arange(problem.q.shape[1], device=problem.q.device)
    return (frames < problem.lengths[:, None])[:, None, None]


def copy_free(problem: Problem) -> Tensor:
    """Torch's best: positions and heads are heads, on views."""
    q, k, v = (x.flatten(2, 3).transpose(1, 2) for x in problem.inputs)  # [B, T·H, F, D]
    out = F.scaled_dot_product_attention(q, k, v, key_mask(problem)).transpose(1, 2)
    return out.unflatten(2, problem.q.shape[2:4])


def rearranged(problem: Problem) -> Tensor:
    """As models do: to `(b t) h f d`, attention, and back to `(b f) t (h d)`."""
    q, k, v = (x.permute(0, 2, 3, 1, 4).contiguous().flatten(0, 1) for x in problem.inputs)
    mask = key_mask(problem)
    mask = None if mask is None else mask.repeat_interleave(problem.q.shape[2], 0)
    out = F.scaled_dot_product_attention(q, k, v, mask)
    return out.unflatten(0, (len(problem.q), -1)).permute(0, 3, 1, 2, 4).contiguous()


def temporal_truth(problem: Problem, backward: bool, padded_queries: bool = False) -> tuple[Tensor, ...]:
    """Softmax by its definition in float64, some positions at a time; kept in float32, for the largest q is 0.6 GB.

    Padded queries give 0 and no gradient, or with `padded_queries` are computed like others, as by a mask of keys.
    """
    q, mask = problem.q, key_mask(problem)
    results = [torch.empty_like(x, requires_grad=False) for x in ((q, *problem.inputs) if backward else (q,))]
    step = max(1, POSITIONS * q.shape[2] // q.numel())
    for i in range(0, q.shape[2], step):
        part = (slice(None), slice(None), slice(i, i + step))
        inputs = [x.detach()[part].double().requires_grad_(backward) for x in problem.inputs]
        a, b, c = (x.permute(0, 2, 3, 1, 4) for x in inputs)  # [B, t, H, F, D]
        scores = a @ b.mT * q.shape[4] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
        out = (scores.softmax(-1) @ c).permute(0, 3, 1, 2, 4)
        if mask is not None and not padded_queries:
            out = out * mask.view(*mask.shape[::3], 1, 1, 1)
        gradients = torch.autograd.grad(out, inputs, problem.upstream[part].double()) if backward else ()
        for result, exact in zip(results, (out.detach(), *gradients), strict=True):
            result[part] = exact
    return tuple(results)


# ----------------------------------------------------------------------------------------------------- frame attention


def gathered_frames(rule: str, f: int) -> list[list[int]]:
    """Key frames that published code gathers, one of each list for each of `f` frames."""
    every = range(f)
    return {
        "self": [[*every]],
        "first": [[0] * f],
        "first_previous": [[0] * f, [max(i - 1, 0) for i in every]],
        "all": [[g] * f for g in every],
        "swap": [[1, 0]],
    }[rule]


def concatenate(problem: Problem, x: Tensor, extra: tuple[Tensor, ...]) -> Tensor:
    """The keys or values of each frame in a row, [B, F, keys, H, D]; a copy."""
    parts = [x if frames == [*range(x.shape[1])] else x[:, frames]
             for frames in gathered_frames(problem.rule, x.shape[1])]  # fmt: skip
    return torch.cat([*parts, *extra], 2) if len(parts) + len(extra) > 1 else parts[0]


def concatenated(problem: Problem) -> Tensor:
    """As models do: keys and values gathered and concatenated for each frame, then attention of a batch of frames."""
    k = concatenate(problem, problem.k, problem.extra[:1])
    v = concatenate(problem, problem.v, problem.extra[1:])
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (problem.q, k, v))  # [B·F, H, T, D]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(0, problem.q.shape[:2])


def joined(problem: Problem) -> Tensor:
    """Torch's best for rules first and all: the tokens of all frames in one row, against those of frame 0 or of all."""
    k, v = (x[:, :1] if problem.rule == "first" else x for x in (problem.k, problem.v))
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (problem.q, k, v))  # [B, H, F·T, D]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(1, problem.q.shape[1:3])


def by_chunks(problem: Problem) -> Tensor:
    """Torch's best for chunks of frames that attend those up to their own: one call a chunk, on views."""
    outs = []
    for f in range(0, problem.q.shape[1], CHUNK):
        own, past = slice(f, f + CHUNK), slice(f + CHUNK)
        parts = problem.q[:, own], problem.k[:, past], problem.v[:, past]
        q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in parts)  # [B, H, tokens, D]
        outs.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(1, (-1, problem.q.shape[2])))
    return torch.cat(outs, 1)


def frame_truth(problem: Problem, backward: bool) -> tuple[Tensor, ...]:
    """Float64 on concatenated keys, or chunk by chunk, a clip and a head at a time."""
    q, attend = problem.q, by_chunks if problem.rule == CHUNKS else concatenated
    wanted = (q, *problem.inputs) if backward else (q,)
    results = [torch.empty_like(x, dtype=torch.float64, requires_grad=False) for x in wanted]
    for b in range(q.shape[0]):
        for h in range(q.shape[3]):
            part = (slice(b, b + 1), slice(None), slice(None), slice(h, h + 1))
            inputs = [x.detach()[part].double().requires_grad_(backward) for x in problem.inputs]
            out = attend(problem._replace(q=inputs[0], k=inputs[1], v=inputs[2], extra=tuple(inputs[3:])))
            gradients = torch.autograd.grad(out, inputs, problem.upstream[part].double()) if backward else ()
            for result, exact in zip(results, (out.detach(), *gradients), strict=True):
                result[part] = exact
    return tuple(results)
