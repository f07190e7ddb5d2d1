"""Frame attention: every token of a frame attends all tokens of the frames that an index rule names.

out[b, f, t, h] = Σ_g,u P · v[b, g, u, h'],   P = softmax_gu of scale · ⟨q[b, f, t, h], k[b, g, u, h']⟩ + log c

What video models gather, repeat and concatenate keys and values for is a loop over the frames' own keys: each frame is
read once, a repeated one counts log(count) more, and none is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._attend import attend, define
from ._dispatch import refuse_cpu, refuse_triton, register
from ._frames import checked
from .frame_rules import Rule, named


def refuse_view(device: torch.device, dtype: torch.dtype) -> str | None:
    """Torch's attention on a view: nothing is faster for plain attention on a GPU, and on a CPU for some."""
    return "on a CPU float64 takes the reference" if device.type == "cpu" and dtype == torch.float64 else None


OP = "frame_attention"
register(
    OP,
    {"sdpa": refuse_view, "triton": refuse_triton, "cpu": refuse_cpu},
    partial={
        "sdpa": "rules self, first and all where they are views of plain attention; on a CPU only heads wider than 128,"
        " and frames of 256 tokens where bfloat16 is multiplied fast"
    },
)
define(OP)


def frame_attention(
    q: Tensor,  # [B, F, T, H, D]
    k: Tensor,  # [B, F, S, Hk, D]
    v: Tensor,  # [B, F, S, Hk, D]
    *,
    rule: str | Rule,
    lengths: Tensor | None = None,  # [B] integer
    frame_mask: Tensor | None = None,  # [B, F] bool
    cu_frames: Tensor | None = None,  # [clips + 1] integer
    max_frames: int | None = None,
    extra: tuple[Tensor, Tensor] | None = None,  # each [B, F or 1, E, Hk, D]
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """out[b, f, t, h] = Σ_g,u P · v[b, g, u, h'],   P = softmax_gu of scale · ⟨q[b, f, t, h], k[b, g, u, h']⟩ + log c

    With rule "first_previous" and without padding it equals attention of frame f on
    `cat([k[:, 0], k[:, max(f - 1, 0)]], dim=1)` and its values, of which nothing is copied.

    Args:
        q, k, v: [B, F, T, H, D] and [B, F, S, Hk, D]; Hk divides H, and head h reads h' = h // (H / Hk). float32,
            bfloat16 or float16 (float64: dense reference). Any strides whose last is 1, 0 among them, are read in
            place.
        rule: which frames a frame attends, c[f, g] of `frame_rules`: "self", "first", "previous", "first_previous",
            "all", "causal", "swap", or a rule made there.
        lengths, frame_mask, cu_frames, max_frames: padding with valid frames first, with holes, or clips packed without
            any, as in `temporal_attention`.
        extra: (keys, values) [B, F or 1, E, Hk, D], always valid, count 1: each frame's own (a message token), or
            shared by the clip's frames (a CLS token, a reference image). Of packed clips [sumF, E, Hk, D] or
            [clips, 1, E, Hk, D].
        scale: default D^-0.5.
        return_lse: also return the natural log of the softmax's denominator.
        implementation: None (the best that can run), "sdpa", "triton", "cpu" or "reference", which has gradients of
            gradients.

    Returns out, of q's shape, dtype and order of dimensions in memory; with `return_lse`, (out, lse [B, F, H, T]) in
    float32 (float64 for float64). Scores, softmax and sums are float32. A query without a key gives 0, lse −inf and
    zero gradients. All inputs have gradients, dense and of a fixed order of summation: two runs give the same bits.
    Raises: ValueError or TypeError naming the argument, the rule and the shapes; NotImplementedError if the requested
    implementation cannot run, with the reason.
    Source: Wu et al. 2023, "Tune-A-Video"; Khachatryan et al. 2023, "Text2Video-Zero"; Ni et al. 2022, "Expanding
    Language-Image Pretrained Models for General Video Recognition" (the message token).
    """
    clips = checked(OP, q, k, v, rule, lengths, frame_mask, cu_frames, max_frames, extra, scale)
    out, lse = attend(OP, clips, str(named(OP, rule)), return_lse, implementation)
    if cu_frames is not None:
        out, lse = out[0], lse[0] if return_lse else None
    return (out, lse) if return_lse else out
