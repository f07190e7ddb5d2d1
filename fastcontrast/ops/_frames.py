"""What both attentions across frames check at the door, and what every implementation of them takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _check as check
from .frame_rules import Rule, count_matrix, named


class Clips(NamedTuple):
    """A checked problem. Packed clips are one row of B with `starts`: clip b owns frames starts[b] … starts[b + 1] − 1.

    Counts are 0 where the query frame or the key frame is padding; `valid` says which query frames are none, for with
    extra keys a row of zeros does not.
    """

    q: Tensor  # [B, F, T, H, D]
    k: Tensor  # [B, F, S, Hk, D]
    v: Tensor  # [B, F, S, Hk, D]
    extra_k: Tensor | None  # [B, F or 1, E, Hk, D]; of packed clips [1, sumF, E, Hk, D] or [clips, 1, E, Hk, D]
    extra_v: Tensor | None
    count: Tensor  # [F, F] or [clips, F, F] int32
    valid: Tensor | None  # [clips, F] bool
    starts: Tensor | None  # [clips + 1] int32
    scale: float

    @property
    def clips(self) -> int:
        return self.q.shape[0] if self.starts is None else self.starts.shape[0] - 1

    @property
    def frames(self) -> int:
        """Of a clip; of packed clips, of the longest."""
        return self.count.shape[-1]

    @property
    def shared(self) -> bool:
        """The extra keys are those of a clip, not each frame's own."""
        return self.extra_k is not None and tuple(self.extra_k.shape[:2]) == (self.clips, 1)


def checked(
    op: str, q: Any, k: Any, v: Any, rule: Any, lengths: Any, frame_mask: Any, cu_frames: Any, max_frames: Any,
    extra: Any, scale: Any,
) -> Clips:  # fmt: skip
    """Raises ValueError or TypeError that names `op`, the argument, the rule where it matters, and the shapes."""
    rule = named(op, rule)
    packed = cu_frames is not None
    check.tensor(op, "q", q, 4 if packed else 5, "[sumF, T, H, D]" if packed else "[B, F, T, H, D]")
    q_shape, k_shape, dtype, device = q.shape, getattr(k, "shape", None), q.dtype, q.device
    for name, x in (("k", k), ("v", v)):
        alike = isinstance(x, Tensor) and x.dtype == dtype and x.device == device and x.shape == k_shape
        if alike and k_shape[:-3] == q_shape[:-3] and k_shape[-1] == q_shape[-1] and x.ndim == q.ndim:
            continue
        tokens = "T" if op == "temporal_attention" else "S"
        wanted = f"[{', '.join(map(str, q_shape[:-3]))}, {tokens}, Hk, {q_shape[-1]}]"
        check.tensor(op, name, x, len(q_shape), wanted)
        check.same_kind(op, name, x, q, like_name="q")
        like = "q" if name == "k" else "q and k"
        raise ValueError(f"{op}: {name} must be {wanted} to match {like}, got {list(x.shape)}")
    heads, key_heads = q_shape[-2], k_shape[-2]
    if heads and (not key_heads or heads % key_heads):
        raise ValueError(f"{op}: the {key_heads} heads of k must divide the {heads} of q")
    if op == "temporal_attention" and k_shape[-3] != q_shape[-3]:
        raise ValueError(f"{op}: k must have the {q_shape[-3]} positions of q, got {k_shape[-3]}: {list(k_shape)}")
    if scale is None:
        scale = q_shape[-1] ** -0.5 if q_shape[-1] else 1.0
    elif isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{op}: scale must be a number or None, got {type(scale).__name__}")
    if packed:
        q, k, v = q[None], k[None], v[None]
        if lengths is not None or frame_mask is not None:
            raise ValueError(f"{op}: cu_frames cannot go together with lengths or frame_mask")
    elif max_frames is not None:
        raise ValueError(f"{op}: max_frames is for packed clips, and needs cu_frames")
    if not (packed or lengths is None) and frame_mask is not None:
        raise ValueError(f"{op}: lengths and frame_mask cannot go together")
    valid, starts = None, None
    if packed:
        starts, frames = _packed(op, cu_frames, max_frames, q)
        lengths = starts.diff()
    else:
        frames = q_shape[1]
    if lengths is not None:
        if not packed:
            if isinstance(lengths, Tensor) and lengths.device != q.device:
                check.same_kind(op, "lengths", lengths, q, dtype=False, like_name="q")
            check.vector(op, "lengths", lengths, q_shape[0], q, floating=False)
            check.within(op, "lengths", lengths, 0, frames + 1)
        valid = torch.arange(frames, device=q.device) < lengths[:, None]
    elif frame_mask is not None:
        valid = _mask(op, frame_mask, q)
    count = _counts(op, rule, frames, lengths, valid, q if not packed else starts)
    extra_k, extra_v = (None, None) if extra is None else _extra(op, extra, q, k, starts)
    return Clips(q, k, v, extra_k, extra_v, count, valid, starts, float(scale))


def _packed(op: str, cu_frames: Any, max_frames: Any, q: Tensor) -> tuple[Tensor, int]:
    """The starts as int32, and the length of the longest clip."""
    if not isinstance(cu_frames, Tensor) or cu_frames.dtype not in check.INTEGER or cu_frames.ndim != 1:
        got = list(cu_frames.shape) if isinstance(cu_frames, Tensor) else type(cu_frames).__name__
        raise ValueError(f"{op}: cu_frames must be an integer tensor [clips + 1], got {got}")
    if not len(cu_frames):
        raise ValueError(f"{op}: cu_frames must begin with 0 and end with {q.shape[1]}, got none")
    if cu_frames.device != q.device:
        check.same_kind(op, "cu_frames", cu_frames, q, dtype=False, like_name="q")
    starts = cu_frames.int().contiguous()
    if starts.device.type == "cpu" and not torch.compiler.is_compiling():
        lengths = starts.diff()
        if starts[0] != 0 or starts[-1] != q.shape[1] or (len(lengths) and lengths.min() < 0):
            raise ValueError(f"{op}: cu_frames must rise from 0 to the {q.shape[1]} frames of q, got {starts.tolist()}")
        longest = int(lengths.max()) if len(lengths) else 0
        if max_frames is not None and max_frames < longest:
            raise ValueError(f"{op}: max_frames must be at least {longest}, the longest clip's, got {max_frames}")
        return starts, longest
    return starts, int(starts.diff().max()) if max_frames is None else max_frames


def _mask(op: str, frame_mask: Any, q: Tensor) -> Tensor:
    if not isinstance(frame_mask, Tensor) or frame_mask.dtype != torch.bool:
        got = getattr(frame_mask, "dtype", type(frame_mask).__name__)
        raise TypeError(f"{op}: frame_mask must be a bool tensor, got {str(got).removeprefix('torch.')}")
    if frame_mask.shape != q.shape[:2]:
        raise ValueError(f"{op}: frame_mask must be {list(q.shape[:2])} like q, got {list(frame_mask.shape)}")
    check.same_kind(op, "frame_mask", frame_mask, q, dtype=False, like_name="q")
    return frame_mask.contiguous()


def _counts(op: str, rule: Rule, frames: int, lengths: Any, valid: Tensor | None, like: Tensor) -> Tensor:
    clips = like.shape[0] if like.ndim > 1 else like.shape[0] - 1
    try:
        count = count_matrix(rule, frames, lengths, like.device)
    except ValueError as error:
        raise ValueError(f"{op}: {error}") from None
    if count.ndim == 3 and len(count) not in (1, clips):
        raise ValueError(f"{op}: rule {rule} must be [{frames}, {frames}] or [{clips}, {frames}, {frames}]")
    if valid is not None:
        count = count * (valid[:, :, None] & valid[:, None, :])
    return count[0] if count.ndim == 3 and len(count) == 1 and clips != 1 else count.contiguous()


def _extra(op: str, extra: Any, q: Tensor, k: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    if not isinstance(extra, (tuple, list)) or len(extra) != 2:
        raise TypeError(f"{op}: extra must be (keys, values), got {type(extra).__name__}")
    packed = starts is not None
    heads, width, clips = *k.shape[3:], len(starts) - 1 if packed else q.shape[0]
    wanted = f"[{clips}, 1, E, {heads}, {width}] shared by a clip, or "
    if not packed:
        wanted += f"[{clips}, {q.shape[1]}, E, {heads}, {width}] of each frame"
    else:
        wanted += f"[{q.shape[1]}, E, {heads}, {width}] of each frame"
    found = []
    for name, x in zip(("keys", "values"), extra, strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: extra {name} must be a tensor, got {type(x).__name__}")
        check.same_kind(op, f"extra {name}", x, q, like_name="q")
        own = packed and x.ndim == 4
        shape = x.shape
        x = x[None] if own else x
        places = (
            ((1, q.shape[1]),) if own else ((clips, 1),) if starts is not None else ((clips, 1), (clips, q.shape[1]))
        )
        fits = x.ndim == 5 and tuple(x.shape[:2]) in places and tuple(x.shape[3:]) == (heads, width)
        if not fits or (found and found[0].shape != x.shape):
            raise ValueError(f"{op}: extra {name} must be {wanted}, got {list(shape)}")
        found.append(x)
    return found[0], found[1]
