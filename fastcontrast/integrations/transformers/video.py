"""Video models of `transformers` on attention across frames: what they concatenate, permute and store is not.

`patch_video(model)` makes the model's layers subclasses of themselves, `unpatch_video(model)` makes that undone. The
parameters, their names, the hooks on layers, copies, pickles and gradient checkpointing stay what they are.

X-CLIP         The message of a frame is an extra key of `frame_attention`; what was concatenated, and a row for the
               message that nobody read, is not there. Messages, and the frames' features in the multi-frame
               integration, attend each other by `temporal_attention`. Of QuickGELU only the input is kept.
TimeSformer    Divided space-time: `temporal_attention` and `frame_attention` on views that skip the CLS token. It is an
               extra key, and asks in a small attention of its own; tokens are not copied to one row a position, then
               to one row a frame behind copies of the CLS token, and back. All kinds: no probabilities are stored.
ViViT          All tokens of a clip attend each other jointly: `frame_attention` of one frame. Of transformers 5, in
               which an attention's products are its own.

Outputs and gradients are the same to rounding. Where a layer is asked for what the operations do not have, it runs the
original code: attention weights (`output_attentions`), masks, and in training any dropout of attention weights; in
TimeSformer any dropout or drop path, for its draws would be others. `runs_patched(layer)` says which of the two a
layer did last. Hooks on the attention modules inside a layer, of which only the products run, are not called; ViViT's
attention modules are patched themselves.

`transformers` 4.57 and 5.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations
from transformers.models.timesformer import modeling_timesformer as timesformer
from transformers.models.vivit import modeling_vivit as vivit
from transformers.models.x_clip import modeling_x_clip as x_clip

from fastcontrast.activations import quick_gelu
from fastcontrast.attention import frames_first, frames_last, split_heads
from fastcontrast.ops import frame_attention, temporal_attention

# Before transformers 5, X-CLIP's layers took `output_attentions` by name, and returned tuples.
TUPLES = "output_attentions" in inspect.signature(x_clip.XCLIPVisionEncoderLayer.forward).parameters


def _asks_more(attention: nn.Module, dropout: float, masks: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """A mask, the weights themselves, or dropout of them."""
    weights = options.get("output_attentions")
    weights = getattr(attention.config, "output_attentions", False) if weights is None else weights
    masked = any(isinstance(x, Tensor) for x in (*masks, *options.values()))
    return bool(weights) or masked or (attention.training and dropout > 0)


def _jointly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, L, H, D]
    """[B, L, H · D]: tokens of all frames attend each other, as those of one frame."""
    return frame_attention(*(x[:, None] for x in (q, k, v)), rule="self").flatten(3)[:, 0]


def _result(hidden: Tensor) -> Any:
    return (hidden,) if TUPLES else hidden


# ----------------------------------------------------------------------------------------------------------- X-CLIP


def _split(attention: x_clip.XCLIPAttention, *products: Tensor) -> tuple[Tensor, ...]:
    return tuple(split_heads(x, attention.num_heads) for x in products)


def _qkv(attention: x_clip.XCLIPAttention, x: Tensor) -> tuple[Tensor, ...]:
    return _split(attention, attention.q_proj(x), attention.k_proj(x), attention.v_proj(x))


def _across_frames(attention: x_clip.XCLIPAttention, x: Tensor) -> Tensor:  # [B, F, C]
    """Of one token a frame."""
    q, k, v = (part[:, :, None] for part in _qkv(attention, x))
    return attention.out_proj(temporal_attention(q, k, v, scale=attention.scale).flatten(2))


class XCLIPVisionEncoderLayer(x_clip.XCLIPVisionEncoderLayer):
    patched = False

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *masks: Any, **options: Any) -> Any:
        asked = (attention_mask, *masks)
        self.patched = not any(_asks_more(x, x.dropout, asked, options) for x in (self.self_attn, self.message_attn))
        if not self.patched:
            return super().forward(hidden_states, attention_mask, *masks, **options)
        hidden_states = hidden_states + self._attend(hidden_states)
        return _result(hidden_states + self.mlp(self.layer_norm2(hidden_states)))

    def _attend(self, x: Tensor) -> Tensor:  # [B · F, L, C]
        """Apart from the rest, which then finds the memory of q, k and v free again."""
        attention, frames = self.self_attn, self.num_frames
        messages = self.message_fc(x[:, 0]).unflatten(0, (-1, frames))
        messages = messages + self.drop_path(_across_frames(self.message_attn, self.message_ln(messages)))
        told = self.layer_norm1(messages)[:, :, None]
        extra = _split(attention, attention.k_proj(told), attention.v_proj(told))
        q, k, v = (frames_first(part, frames) for part in _qkv(attention, self.layer_norm1(x)))
        out = frame_attention(q, k, v, rule="self", extra=extra, scale=attention.scale)
        return attention.out_proj(frames_last(out))


class XCLIPEncoderLayer(x_clip.XCLIPEncoderLayer):
    """Of the multi-frame integration transformer; the text model's layers stay what they are."""

    patched = False

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *masks: Any, **options: Any) -> Any:
        self.patched = not _asks_more(self.self_attn, self.self_attn.dropout, (attention_mask, *masks), options)
        if not self.patched:
            return super().forward(hidden_states, attention_mask, *masks, **options)
        hidden_states = hidden_states + _across_frames(self.self_attn, self.layer_norm1(hidden_states))
        return _result(hidden_states + self.mlp(self.layer_norm2(hidden_states)))


# ------------------------------------------------------------------------------------------------------ TimeSformer


class TimesformerLayer(timesformer.TimesformerLayer):
    patched = False

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        self.patched = not output_attentions and not (self.training and self._draws())
        if not self.patched:
            return super().forward(hidden_states, output_attentions)
        if self.attention_type == "divided_space_time":
            hidden_states = self._in_time(hidden_states)
            hidden_states = hidden_states + self.attention.output(self._in_space(hidden_states))
        else:
            qkv = self._qkv(self.attention, self.layernorm_before(hidden_states))
            hidden_states = hidden_states + self.attention.output(_jointly(*qkv.unbind(2)))
        out = self.output(self.intermediate(self.layernorm_after(hidden_states)))
        return (hidden_states + out,)

    def _draws(self) -> bool:
        drops = (x for x in self.modules() if isinstance(x, nn.Dropout))
        return any(x.p > 0 for x in drops) or not isinstance(self.drop_path, nn.Identity)

    @staticmethod
    def _qkv(attention: timesformer.TimeSformerAttention, x: Tensor) -> Tensor:  # [B, L, C]
        """[B, L, 3, H, D]."""
        inside = attention.attention
        return inside.qkv(x).unflatten(-1, (3, inside.num_heads, -1))

    def _patches(self, qkv: Tensor) -> tuple[Tensor, ...]:  # [B, 1 + T · F, 3, H, D]
        """q, k, v [B, F, T, H, D]: a view behind the CLS token. One slice, for its gradient is one padded tensor."""
        frames = self.config.num_frames
        return qkv[:, 1:].unflatten(1, (-1, frames)).transpose(1, 2).unbind(3)

    def _in_time(self, x: Tensor) -> Tensor:  # [B, 1 + T · F, C]
        """The CLS token goes along to the products, one row of T · F + 1: leaving it out would be a copy."""
        qkv = self._qkv(self.temporal_attention, self.temporal_layernorm(x))
        out = temporal_attention(*self._patches(qkv)).transpose(1, 2).flatten(3).flatten(1, 2)
        moved = self.temporal_dense(self.temporal_attention.output(out))
        return torch.cat([x[:, :1], x[:, 1:] + moved], 1)

    def _in_space(self, x: Tensor) -> Tensor:  # [B, 1 + T · F, C]
        """Tokens attend those of their frame and the CLS token; it attends each frame, and keeps the mean."""
        qkv = self._qkv(self.attention, self.layernorm_before(x))
        q, k, v = self._patches(qkv)
        first_q, *first = qkv[:, None, :1].unbind(3)  # each [B, 1, 1, H, D]
        out = frame_attention(q, k, v, rule="self", extra=first).transpose(1, 2).flatten(3).flatten(1, 2)
        asks = first_q.expand(-1, q.shape[1], -1, -1, -1)
        first_out = frame_attention(asks, k, v, rule="self", extra=first).flatten(3).mean(1)
        return torch.cat([first_out, out], 1)


# ------------------------------------------------------------------------------------------------------------ ViViT


class VivitAttention(vivit.VivitAttention):
    patched = False

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **options: Any) -> tuple[Tensor, Any]:
        self.patched = not _asks_more(self, self.attention_dropout, (attention_mask,), options)
        if not self.patched:
            return super().forward(hidden_states, attention_mask, **options)
        products = (product(hidden_states) for product in (self.q_proj, self.k_proj, self.v_proj))
        out = _jointly(*(split_heads(x, self.num_attention_heads) for x in products))
        return self.o_proj(out), None


# ------------------------------------------------------------------------------------------------------------ patch


class QuickGELUActivation(activations.QuickGELUActivation):
    def forward(self, input: Tensor) -> Tensor:
        return quick_gelu(input)


LAYERS = (x_clip.XCLIPVisionEncoderLayer, timesformer.TimesformerLayer, *(() if TUPLES else (vivit.VivitAttention,)))
CHANGED = XCLIPVisionEncoderLayer, XCLIPEncoderLayer, TimesformerLayer, VivitAttention, QuickGELUActivation
OURS = {ours.__base__: ours for ours in CHANGED}


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, x_clip.XCLIPMultiframeIntegrationTransformer):
            yield from module.encoder.layers
        elif isinstance(module, LAYERS):
            yield module


def _parts(model: nn.Module) -> list[nn.Module]:
    """Layers that can be patched, or are, and their activations."""
    layers = [*_layers(model)]
    return [
        *layers,
        *(x for layer in layers for x in layer.modules() if isinstance(x, activations.QuickGELUActivation)),
    ]


def patch_video(model: nn.Module) -> nn.Module:
    """The model, its layers on `temporal_attention`, `frame_attention` and `quick_gelu`: X-CLIP's, TimeSformer's and
    ViViT's.

    Any model with such layers inside, on any device, of any dtype; a patched one stays as it is.
    Raises: ValueError where there is no layer to patch, or one has a `forward` that something else put on it.
    """
    parts = _parts(model)
    if not parts:
        raise ValueError(
            f"patch_video: expected a model with layers of X-CLIP's vision model, of TimeSformer, or (of transformers "
            f"5) of ViViT, got {type(model).__name__}"
        )
    theirs = [part for part in parts if type(part) in OURS]
    for part in theirs:
        if "forward" in vars(part):  # it would run instead of the class's
            raise ValueError(f"patch_video: {type(part).__name__} has a forward that was put on it; patch before that")
    for part in theirs:
        part.__class__ = OURS[type(part)]
    return model


def unpatch_video(model: nn.Module) -> nn.Module:
    """The model, its layers as they were before `patch_video`."""
    for part in _parts(model):
        if type(part) in OURS.values():
            vars(part).pop("patched", None)
            part.__class__ = type(part).__base__
    return model


def runs_patched(layer: nn.Module) -> bool:
    """Whether the last forward of a layer, of ViViT of an attention, ran on the operations; False before its first, and
    where it is not patched."""
    return bool(getattr(layer, "patched", False))
