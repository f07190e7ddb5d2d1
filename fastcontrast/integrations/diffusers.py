"""Video models of `diffusers` on attention across frames: attention processors, and motion modules without copies.

    set_processors(unet, FirstFrameProcessor())        self-attentions of an image model's blocks, across frames
    set_processors(unet, TemporalProcessor())          attentions of temporal blocks, their `(b t) f c` read in place
    patch_motion(unet)                                 AnimateDiff's motion modules, which then make no `(b t) f c`

Each returns a `Patch`; `patch.undo()`, or the end of a `with`, puts back what was there. Parameters and their names
stay what they are.

`FirstFrameProcessor` does what `CrossFrameAttnProcessor2_0` of the text_to_video_zero pipelines does, and takes the
place of its name in the pipeline's module; but keys and values are no longer repeated for each frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from diffusers.models.unets import unet_motion_model
from torch import Tensor, nn

from fastcontrast.attention import frames_first, frames_last, positions_first, positions_last, split_heads
from fastcontrast.ops import frame_attention, temporal_attention
from fastcontrast.ops.frame_rules import Rule, count_matrix

# --------------------------------------------------------------------------------------------------------- processors


def _check(name: str, attn: Attention) -> None:
    if attn.added_kv_proj_dim is not None or attn.to_k is None or attn.to_out is None:
        raise NotImplementedError(
            f"{name}: expected an attention with its own keys, values and output; got one with added key and value "
            "projections, or without an output"
        )


def _products(attn: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [..., heads, width] of x [..., C]."""
    q = split_heads(attn.to_q(x), attn.heads)
    k, v = (product(x).unflatten(-1, (-1, q.shape[-1])) for product in (attn.to_k, attn.to_v))
    q = q if attn.norm_q is None else attn.norm_q(q)
    return q, k if attn.norm_k is None else attn.norm_k(k), v


def _output(attn: Attention, out: Tensor) -> Tensor:
    for layer in attn.to_out:  # the product and its dropout
        out = layer(out)
    return out


class _Processor:
    """What is common to processors: all but the attention is done as `AttnProcessor2_0` does it."""

    def attend(self, attn: Attention, x: Tensor, mask: Tensor | None) -> Tensor:  # [rows, L, C], [rows, H, 1, L]
        raise NotImplementedError

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        _check(type(self).__name__, attn)
        if encoder_hidden_states is not None:
            plain = AttnProcessor2_0() if attn.scale_qk else AttnProcessor()
            return plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        x = residual = hidden_states
        if attn.spatial_norm is not None:
            x = attn.spatial_norm(x, temb)
        shape = x.shape
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)
        rows, length, _ = x.shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, length, rows).view(
                rows, attn.heads, -1, length
            )
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        x = _output(attn, self.attend(attn, x, attention_mask))
        if len(shape) == 4:
            x = x.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            x = x + residual
        return x if attn.rescale_output_factor == 1 else x / attn.rescale_output_factor


@dataclass(eq=False)
class FrameProcessor(_Processor):
    """Self-attention of frames `(b f) t c` in which frames attend those that `rule` names; cross-attention as it was.

    Args:
        rule: a name or object of `ops.frame_rules`.
        batch_size: the number of clips; with classifier-free guidance, two for each video, for the halves are clips of
            their own.
        frames: instead, the frames of a clip.

    A mask of tokens, which no operation takes, goes to torch's attention over the keys of all frames; as in diffusers'
    own processors, the row of the frame that asks is applied to the keys it attends.
    Raises: ValueError where rows are not whole clips; NotImplementedError for attentions with added projections.
    Source: Khachatryan et al. 2023, "Text2Video-Zero"; Wu et al. 2023, "Tune-A-Video".
    """

    rule: str | Rule
    batch_size: int = 2
    frames: int | None = None

    def attend(self, attn: Attention, x: Tensor, mask: Tensor | None) -> Tensor:  # [(B F), T, C]
        rows = len(x)
        frames = max(1, rows // self.batch_size) if self.frames is None else self.frames
        if rows % frames or (self.frames is None and rows > self.batch_size and rows % self.batch_size):
            wanted = f"{self.batch_size} clips" if self.frames is None else f"clips of {self.frames} frames"
            raise ValueError(f"{type(self).__name__}: the rows must be {wanted}, got {rows} rows")
        q, k, v = (frames_first(part, frames) for part in _products(attn, x))
        if mask is not None:
            return self._masked(q, k, v, frames_first(mask, frames), attn.scale)
        return frames_last(frame_attention(q, k, v, rule=self.rule, scale=attn.scale))

    def _masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:  # [B, F, H, 1, S]
        """Scores + log c + mask, over the keys of all frames."""
        frames, tokens = q.shape[1:3]
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
        count = count_matrix(self.rule, frames, device=q.device).to(q.dtype).log()
        mask = mask[:, :, :, :, None] + count[:, None, None, :, None]  # [B, F, H, 1, F, S]
        mask = mask.flatten(4).expand(-1, -1, -1, tokens, -1)
        k, v = (x.flatten(1, 2).transpose(1, 2)[:, None].expand(-1, frames, -1, -1, -1) for x in (k, v))
        grouped = q.shape[3] != k.shape[2]
        out = F.scaled_dot_product_attention(q.transpose(2, 3), k, v, mask, scale=scale, enable_gqa=grouped)
        return frames_last(out.transpose(2, 3))


class FirstFrameProcessor(FrameProcessor):
    """`FrameProcessor("first")`: Text2Video-Zero, diffusers' `CrossFrameAttnProcessor(batch_size)`."""

    def __init__(self, batch_size: int = 2, frames: int | None = None):
        super().__init__("first", batch_size, frames)


class FirstPreviousProcessor(FrameProcessor):
    """`FrameProcessor("first_previous")`: Tune-A-Video's sparse-causal attention."""

    def __init__(self, batch_size: int = 2, frames: int | None = None):
        super().__init__("first_previous", batch_size, frames)


@dataclass(eq=False)
class TemporalProcessor(_Processor):
    """Self-attention of the rows `(b t) f c` of temporal blocks, over their frames; cross-attention as it was.

    Nothing is transposed for it, and no number of rows is too large for a launch. `rule` may be causal, or a window.
    """

    rule: str | Rule = "all"

    def attend(self, attn: Attention, x: Tensor, mask: Tensor | None) -> Tensor:  # [(B T), F, C]
        if mask is not None:
            raise NotImplementedError(f"TemporalProcessor: attention_mask must be None, got one of {list(mask.shape)}")
        q, k, v = map(positions_first, _products(attn, x))
        return positions_last(temporal_attention(q, k, v, rule=self.rule, scale=attn.scale))


class Patch:
    """What was changed, to be undone once: by `undo()` or as a `with` ends."""

    def __init__(self, undo: list[Callable[[], Any]]):
        self._undo = undo

    def __len__(self) -> int:
        """The number of modules that are changed."""
        return len(self._undo)

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error: Any) -> None:
        self.undo()


TEMPORAL = (
    unet_motion_model.AnimateDiffTransformer3D,
    TransformerTemporalModel,
    TemporalBasicTransformerBlock,
)


def _attentions(model: nn.Module, temporal: bool = False, name: str = "") -> Iterator[tuple[str, bool, Attention]]:
    """Each attention with its last name, and whether it is inside of a temporal block."""
    temporal = temporal or isinstance(model, TEMPORAL)
    if isinstance(model, Attention):
        yield name, temporal, model
    for name, child in model.named_children():
        yield from _attentions(child, temporal, name)


def set_processors(model: nn.Module, processor: _Processor) -> Patch:
    """Puts a `TemporalProcessor` on the attentions of the model's temporal blocks (AnimateDiff's motion modules, the
    temporal transformers of UNet3DConditionModel, the temporal blocks of Stable Video Diffusion), a `FrameProcessor` on
    the self-attentions, `attn1`, of its other blocks.

    Raises: ValueError where the model has none; TypeError for another processor.
    """
    if not isinstance(processor, (FrameProcessor, TemporalProcessor)):
        raise TypeError(
            f"set_processors: processor must be a FrameProcessor or a TemporalProcessor, got {type(processor).__name__}"
        )
    temporal = isinstance(processor, TemporalProcessor)
    found = [attn for name, inside, attn in _attentions(model) if inside == temporal and (temporal or name == "attn1")]
    if not found:
        what = "attentions in temporal blocks" if temporal else "self-attentions named attn1"
        raise ValueError(f"set_processors: expected a model with {what}, got {type(model).__name__}")
    undo = [lambda attn=attn, old=attn.processor: attn.set_processor(old) for attn in found]
    for attn in found:
        _check("set_processors", attn)
    for attn in found:
        attn.set_processor(processor)
    return Patch(undo)


# ----------------------------------------------------------------------------------------------------- motion modules


class AnimateDiffTransformer3D(unet_motion_model.AnimateDiffTransformer3D):
    """The motion module whose tokens stay `(b f) t c`: see `patch_motion`."""

    def forward(
        self,
        hidden_states: Tensor,  # [(B F), C, H, W]
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        num_frames: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        asked = encoder_hidden_states, timestep, class_labels, cross_attention_kwargs
        if any(x is not None for x in asked) or not all(map(_is_plain, self.transformer_blocks)):
            return super().forward(hidden_states, *asked[:3], num_frames, cross_attention_kwargs)
        clips = hidden_states.unflatten(0, (-1, num_frames))  # [B, F, C, H, W]
        x = self.norm(clips.transpose(1, 2)).flatten(2).transpose(1, 2)  # [B, F · H · W, C]
        x = self.proj_in(x).unflatten(1, (num_frames, -1))
        for block in self.transformer_blocks:
            x = _motion_block(block, x)
        x = self.proj_out(x).unflatten(2, hidden_states.shape[2:]).flatten(0, 1)
        return hidden_states + x.permute(0, 3, 1, 2)


PLAIN = (AttnProcessor, AttnProcessor2_0, TemporalProcessor)


def _is_plain(block: nn.Module) -> bool:
    """Layer norms, self-attentions without processors of others, no dropout, whose draws would be others."""
    attentions = [attn for attn in (block.attn1, block.attn2) if attn is not None]
    return (
        type(block) is BasicTransformerBlock
        and block.norm_type == "layer_norm"
        and not hasattr(block, "fuser")
        and not block.only_cross_attention
        and block._chunk_size is None
        and not (block.training and block.dropout > 0)
        and all(_attends_itself(attn) for attn in attentions)
    )


def _attends_itself(attn: Attention) -> bool:
    return (
        type(attn.processor) in PLAIN
        and attn.added_kv_proj_dim is None
        and attn.spatial_norm is None
        and attn.group_norm is None
        and not attn.residual_connection
        and attn.rescale_output_factor == 1
    )


def _motion_block(block: BasicTransformerBlock, x: Tensor) -> Tensor:  # [B, F, T, C]
    """The block's residual steps, with positions of frames added before each attention."""
    positions = None if block.pos_embed is None else block.pos_embed.pe[0, : x.shape[1], None]
    for norm, attn in ((block.norm1, block.attn1), (block.norm2, block.attn2)):
        if attn is not None:
            y = norm(x)
            y = y if positions is None else y + positions
            rule = getattr(attn.processor, "rule", "all")
            out = temporal_attention(*_products(attn, y), rule=rule, scale=attn.scale)
            x = _output(attn, out.flatten(3)) + x
    return block.ff(block.norm3(x)) + x


def patch_motion(model: nn.Module) -> Patch:
    """Makes AnimateDiff's motion modules keep tokens as `(b f) t c`, in which temporal attention reads them in place.

    Of three copies of all tokens a module, two are left: the group norm's own, and one in front of the first product;
    on a CPU none, where the images are channels-last. The one back is gone, for the residual sum reads the tokens in
    place. Attention is `temporal_attention`, under the rule of a `TemporalProcessor` if one is set.

    Outputs and gradients are the same to rounding. A module runs the original code where its blocks are not plain ones
    (FreeNoise, chunked feed-forward, dropout in training, processors of others such as an IP-Adapter's), or where it is
    given text, a timestep, class labels or `cross_attention_kwargs`. Hooks on its blocks and attentions are not called.
    Raises: ValueError where the model has no such module, or one has a `forward` that something else put on it.
    """
    theirs = unet_motion_model.AnimateDiffTransformer3D
    found = [module for module in model.modules() if isinstance(module, theirs)]
    if not found:
        raise ValueError(f"patch_motion: expected a model with motion modules, got {type(model).__name__}")
    if any("forward" in vars(module) for module in found):
        raise ValueError("patch_motion: a motion module has a forward that was put on it; patch before that")
    changed = [module for module in found if type(module) is theirs]
    for module in changed:
        module.__class__ = AnimateDiffTransformer3D
    return Patch([lambda module=module: setattr(module, "__class__", theirs) for module in changed])
