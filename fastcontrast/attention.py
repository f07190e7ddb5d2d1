"""Attention across the frames of clips, as a module: products around `temporal_attention` or `frame_attention`.

The functions at the top view what video models pass around, and nothing is copied for them:

    (b f) t c     the frames of all clips one after the other, tokens inside       frames_first, frames_last
    (b t) f c     one row for each position of each clip, its frames inside        positions_first, positions_last
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .ops import frame_attention, temporal_attention
from .ops.frame_rules import Rule


def split_heads(x: Tensor, heads: int) -> Tensor:  # [..., H · D]
    """[..., H, D]."""
    return x.unflatten(-1, (heads, -1))


def frames_first(x: Tensor, frames: int) -> Tensor:  # [(B F), T, ...]
    """[B, F, T, ...] of rows that are frames, those of a clip one after the other."""
    if frames < 1 or len(x) % frames:
        raise ValueError(f"frames_first: rows must be clips of {frames} frames, got {len(x)} rows")
    return x.unflatten(0, (len(x) // frames, frames))


def frames_last(out: Tensor) -> Tensor:  # [B, F, T, H, D]
    """[(B F), T, H · D]: the way back from `frames_first`, heads joined."""
    return out.flatten(3).flatten(0, 1)


def positions_first(x: Tensor) -> Tensor:  # [(B T), F, ...]
    """[1, F, (B T), ...] of rows that are positions: to temporal attention, more clips are but more of them."""
    return x.transpose(0, 1)[None]


def positions_last(out: Tensor) -> Tensor:  # [1, F, (B T), H, D]
    """[(B T), F, H · D]: the way back from `positions_first`, heads joined."""
    return out[0].transpose(0, 1).flatten(2)


class CrossFrameAttention(nn.Module):
    """out = W_o · attention(W_q x, W_k y, W_v y) + b_o,   y = x, or `context` where it is given

    The attention is `frame_attention` under `rule`, or with `temporal=True` `temporal_attention`, in which a token
    attends its own position in other frames.

    Args:
        width: of x and of the result.
        heads, key_heads: of queries, and of keys and values if fewer: they divide `heads`, and groups share one.
        head_width: default width / heads.
        rule: a name or object of `ops.frame_rules`; default "all" if temporal, else "self".
        context_width: of `context`, default `width`.
        qkv_bias, out_bias: whether products have a bias.
        packed: W_q, W_k and W_v are rows of one matrix, `qkv`, and self-attention is one product. Not for a context of
            another width.
        scale: default head_width^-0.5.

    Raises: ValueError where heads, widths or shapes do not fit, naming what came; besides, what the operations raise.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        rule: str | Rule | None = None,
        temporal: bool = False,
        head_width: int | None = None,
        key_heads: int | None = None,
        context_width: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = True,
        packed: bool = False,
        scale: float | None = None,
    ):
        super().__init__()
        if head_width is None and width % heads:
            raise ValueError(f"CrossFrameAttention: {heads} heads must divide width, got {width}; or give head_width")
        self.heads, self.key_heads = heads, heads if key_heads is None else key_heads
        if self.key_heads < 1 or heads % self.key_heads:
            raise ValueError(f"CrossFrameAttention: key_heads must divide the {heads} heads, got {key_heads}")
        self.rule = ("all" if temporal else "self") if rule is None else rule
        self.temporal, self.packed, self.scale = temporal, packed, scale
        self.head_width = width // heads if head_width is None else head_width
        inside, shared = heads * self.head_width, self.key_heads * self.head_width
        context_width = width if context_width is None else context_width
        if packed:
            if context_width != width:
                raise ValueError(
                    f"CrossFrameAttention: packed products need a context of width {width}, got {context_width}"
                )
            self.qkv = nn.Linear(width, inside + 2 * shared, bias=qkv_bias)
        else:
            self.query = nn.Linear(width, inside, bias=qkv_bias)
            self.key = nn.Linear(context_width, shared, bias=qkv_bias)
            self.value = nn.Linear(context_width, shared, bias=qkv_bias)
        self.out = nn.Linear(inside, width, bias=out_bias)

    def extra_repr(self) -> str:
        kind = "temporal" if self.temporal else "frame"
        return f"{kind}, rule={self.rule}, heads={self.heads}, key_heads={self.key_heads}, head_width={self.head_width}"

    def queries(self, x: Tensor) -> Tensor:  # [..., C]
        """[..., H, D]."""
        return split_heads(self._rows(x, 0, self.heads) if self.packed else self.query(x), self.heads)

    def keys_and_values(self, y: Tensor) -> tuple[Tensor, Tensor]:  # [..., C]
        """Both [..., Hk, D], for tokens that ask nothing themselves."""
        if self.packed:
            both = split_heads(self._rows(y, self.heads, 2 * self.key_heads), 2 * self.key_heads)
            return both[..., : self.key_heads, :], both[..., self.key_heads :, :]
        return split_heads(self.key(y), self.key_heads), split_heads(self.value(y), self.key_heads)

    def _rows(self, x: Tensor, first: int, count: int) -> Tensor:
        """The product with the part of the packed matrix that makes `count` heads from head `first` on."""
        rows = slice(first * self.head_width, (first + count) * self.head_width)
        bias = self.qkv.bias
        return F.linear(x, self.qkv.weight[rows], None if bias is None else bias[rows])

    def _all(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self.packed:
            return self.queries(x), *self.keys_and_values(x)
        return split_heads(self.qkv(x), self.heads + 2 * self.key_heads).split(
            (self.heads, self.key_heads, self.key_heads), -2
        )

    def forward(
        self,
        hidden: Tensor,  # [B, F, T, C], [(B F), T, C] or [(B T), F, C]
        context: Tensor | None = None,  # of the same form, S for T
        *,
        frames: int | None = None,
        positions: int | None = None,
        messages: Tensor | None = None,  # [B, F or 1, E, C']
        lengths: Tensor | None = None,  # [B]
        frame_mask: Tensor | None = None,  # [B, F]
        cu_frames: Tensor | None = None,  # [clips + 1]
        max_frames: int | None = None,
        implementation: str | None = None,
    ) -> Tensor:
        """What `hidden` attends, of its shape.

        Args:
            hidden: [B, F, T, C]; or [(B F), T, C] with `frames`, F; or [(B T), F, C] with `positions`, T; or
                [sumF, T, C] with `cu_frames`.
            context: tokens that keys and values are made from instead, of the same form and as many frames.
            messages: more tokens that are attended, and ask nothing: each frame's own [B, F, E, C'], or the clip's
                [B, 1, E, C']; with `cu_frames` [sumF, E, C'] or [clips, 1, E, C'].
            lengths, frame_mask, cu_frames, max_frames, implementation: of the operations.
        """
        given = [name for name, x in (("frames", frames), ("positions", positions), ("cu_frames", cu_frames))
                 if x is not None]  # fmt: skip
        if len(given) > 1 or hidden.ndim != (3 if given else 4):
            raise ValueError(
                "CrossFrameAttention: hidden must be [B, F, T, C], or [(B F), T, C] with frames, [(B T), F, C] with "
                f"positions, [sumF, T, C] with cu_frames, got {list(hidden.shape)} with {' and '.join(given) or 'none'}"
            )
        rows = frames if positions is None else positions

        def clips(x: Tensor) -> Tensor:
            if rows is None:
                return x
            if rows < 1 or len(x) % rows:
                raise ValueError(f"CrossFrameAttention: rows must be clips of {rows} {given[0]}, got {len(x)} rows")
            x = x.unflatten(0, (len(x) // rows, rows))
            return x if positions is None else x.transpose(1, 2)

        qkv = self._all(hidden) if context is None else (self.queries(hidden), *self.keys_and_values(context))
        out = (temporal_attention if self.temporal else frame_attention)(
            *map(clips, qkv), rule=self.rule, lengths=lengths, frame_mask=frame_mask, cu_frames=cu_frames,
            max_frames=max_frames, extra=None if messages is None else self.keys_and_values(messages),
            scale=self.scale, implementation=implementation,
        )  # fmt: skip
        out = out if positions is None else out.transpose(1, 2)
        return self.out(out.flatten(-2).flatten(0, -3) if rows is not None else out.flatten(-2))
