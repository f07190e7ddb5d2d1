"""Temporal attention: a token attends the tokens at its own position in other frames of the clip, in any layout.

out[b, f, t, h] = Σ_g P_fg · v[b, g, t, h'],   P_f = softmax_g of scale · ⟨q[b, f, t, h], k[b, g, t, h']⟩ + log c

B · T · H problems of F × F that are read where they lie: what motion modules and space-time transformers rearrange to
`(b t) f c` for. Bound by memory: four passes over tensors of q's size forward, seven backward, nothing else.
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
    """Torch's attention on a view, where the kernels for this very problem cannot run."""
    return None if device.type == "cuda" else "it serves a GPU where the Triton kernel refuses; on a CPU C++ is faster"


OP = "temporal_attention"
register(
    OP,
    {"triton": refuse_triton, "sdpa": refuse_view, "cpu": refuse_cpu},
    partial={"sdpa": "tiles too large for the Triton kernel, where positions and heads join into one dimension"},
)
define(OP)


def temporal_attention(
    q: Tensor,  # [B, F, T, H, D]
    k: Tensor,  # [B, F, T, Hk, D]
    v: Tensor,  # [B, F, T, Hk, D]
    *,
    rule: str | Rule = "all",
    lengths: Tensor | None = None,  # [B] integer
    frame_mask: Tensor | None = None,  # [B, F] bool
    cu_frames: Tensor | None = None,  # [clips + 1] integer
    max_frames: int | None = None,
    extra: tuple[Tensor, Tensor] | None = None,  # each [B, F or 1, E, Hk, D]
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """out[b, f, t, h] = Σ_g P_fg · v[b, g, t, h'],   P_f = softmax_g of scale · ⟨q[b, f, t, h], k[b, g, t, h']⟩ + log c

    Without padding it equals `scaled_dot_product_attention` of q[:, :, t, h], k[:, :, t, h] and v[:, :, t, h] over the
    frames, for each position t and head h, and no tensor is rearranged for it.

    Args:
        q, k, v: [B, F, T, H, D] and [B, F, T, Hk, D]; Hk divides H, and head h reads h' = h // (H / Hk). float32,
            bfloat16 or float16 (float64: dense reference). Any strides whose last is 1, 0 among them, are read in
            place: pass views of the layout that the model has.
        rule: which frames a frame attends, c[f, g] of `frame_rules`: a name or a rule made there.
        lengths: [B], frames f ≥ lengths[b] are padding: their queries give 0, their keys are not there, and what they
            hold, NaN too, does not matter. Index rules take the clip to end there.
        frame_mask: [B, F] instead, True where a frame is valid: padding with holes. Index rules keep their places.
        cu_frames: [clips + 1], clips packed without padding: q [sumF, T, H, D], clip b owns frames cu_frames[b] …
            cu_frames[b + 1] − 1. `max_frames` is the longest; without it a GPU is waited for, to read it.
        extra: (keys, values) [B, F or 1, E, Hk, D] for all positions, always valid, count 1: each frame's own, or the
            clip's. Of packed clips [sumF, E, Hk, D] or [clips, 1, E, Hk, D].
        scale: default D^-0.5.
        return_lse: also return the natural log of the softmax's denominator.
        implementation: None (the best that can run), "triton", "sdpa", "cpu" or "reference", which has gradients of
            gradients.

    Returns out, of q's shape, dtype and order of dimensions in memory; with `return_lse`, (out, lse [B, F, H, T]) in
    float32 (float64 for float64). Scores, softmax and sums are float32. A query without a key gives 0, lse −inf and
    zero gradients. All inputs have gradients, dense and of a fixed order of summation: two runs give the same bits.
    Raises: ValueError or TypeError naming the argument, the rule and the shapes; NotImplementedError if the requested
    implementation cannot run, with the reason.
    Source: Bertasius et al. 2021, "Is Space-Time Attention All You Need for Video Understanding?"; Guo et al. 2023,
    "AnimateDiff".
    """
    clips = checked(OP, q, k, v, rule, lengths, frame_mask, cu_frames, max_frames, extra, scale)
    out, lse = attend(OP, clips, str(named(OP, rule)), return_lse, implementation)
    if cu_frames is not None:
        out, lse = out[0], lse[0] if return_lse else None
    return (out, lse) if return_lse else out
