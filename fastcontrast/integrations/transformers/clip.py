"""CLIP and SigLIP models of `transformers` whose loss comes from the embeddings: no [N, N] logits, and, if asked for,
negatives from all ranks.

`patch_clip(model)` and `patch_siglip(model)` make each such model inside `model` a subclass of itself, `unpatch_clip`
and `unpatch_siglip` make that undone. Parameters and their names, configuration, hooks, copies, pickles and
`save_pretrained` stay what they are, and so does every call without `return_loss=True`. With it:

loss           The same, by `clip_loss` or `siglip_loss`, in float32 also where the embeddings are half precision.
logits         `logits_per_image` and `logits_per_text` are None in training, where nobody reads them; elsewhere they
               are there. `return_logits=True` or `False` says it for both.

Models: CLIP, MetaCLIP 2 and SigLIP of `transformers` 4.57 and 5; SigLIP 2, AltCLIP and Chinese CLIP of 5.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from transformers.models.altclip import modeling_altclip as altclip
from transformers.models.chinese_clip import modeling_chinese_clip as chinese_clip
from transformers.models.clip import modeling_clip as clip
from transformers.models.metaclip_2 import modeling_metaclip_2 as metaclip_2
from transformers.models.siglip import modeling_siglip as siglip
from transformers.models.siglip2 import modeling_siglip2 as siglip2
from transformers.utils.generic import can_return_tuple

from fastcontrast.distributed import exchange
from fastcontrast.distributed._exchange import HOW
from fastcontrast.losses import clip_loss, siglip_loss
from fastcontrast.ops._precision import float32

# Before transformers 5, CLIP's `get_image_features` returned a tensor, and what a tower may return was said by name.
OF_CONFIG = "output_attentions", "output_hidden_states"
OLD = OF_CONFIG[0] in inspect.signature(clip.CLIPModel.forward).parameters

OF_IMAGES = "pixel_values", "pixel_attention_mask", "spatial_shapes", "interpolate_pos_encoding"
OF_TEXTS = "input_ids", "attention_mask", "token_type_ids", "position_ids"


class Settings(NamedTuple):
    return_logits: bool | None = None
    exchange: str | None = None


def _by_features(model: nn.Module, image: dict[str, Any], text: dict[str, Any]) -> tuple[Any, ...]:
    """Outputs of the towers, and their embeddings."""
    outputs = model.get_image_features(**image, return_dict=True), model.get_text_features(**text, return_dict=True)
    return *outputs, *(output.pooler_output for output in outputs)


def _by_towers(model: nn.Module, image: dict[str, Any], text: dict[str, Any]) -> tuple[Any, ...]:
    outputs = model.vision_model(**image), model.text_model(**text)
    pooled = [output.pooler_output for output in outputs]
    if hasattr(model, "text_projection"):
        pooled = [model.visual_projection(pooled[0]), model.text_projection(pooled[1])]
    return *outputs, *pooled


class _Contrastive:
    """Goes before a model's class among the bases of ours."""

    _output: ClassVar[type]
    _encode: ClassVar[Callable[..., tuple[Any, ...]]] = _by_towers
    _contrast = Settings()

    @can_return_tuple
    def _with_loss(self, given: dict[str, Any]) -> Any:
        image, text = ({name: given.pop(name) for name in names if name in given} for names in (OF_IMAGES, OF_TEXTS))
        image_output, text_output, image_embeds, text_embeds = self._encode({**image, **given}, {**text, **given})
        if image_embeds.shape[0] != text_embeds.shape[0]:
            counts = f"{image_embeds.shape[0]} images and {text_embeds.shape[0]} texts"
            raise ValueError(f"{type(self).__name__}: return_loss needs as many texts as images, got {counts}")
        image_embeds, text_embeds = image_embeds / self._norm(image_embeds), text_embeds / self._norm(text_embeds)
        found = {"text_embeds": text_embeds, "image_embeds": image_embeds}
        image_embeds = image_embeds.to(text_embeds.device)
        scale, *bias = (x.to(text_embeds.device) for x in self._scale_and_bias())
        with exchange(self._contrast.exchange) if self._contrast.exchange else nullcontext():
            loss = self._loss_of(text_embeds, image_embeds, scale, *bias)
        wanted = self._contrast.return_logits
        if wanted or (wanted is None and not self.training):
            logits = text_embeds @ image_embeds.t() * scale.to(text_embeds.dtype)
            logits = logits + bias[0].to(logits.dtype) if bias else logits
            found |= {"logits_per_text": logits, "logits_per_image": logits.t()}
        return self._output(loss=loss, **found, text_model_output=text_output, vision_model_output=image_output)


class _Clip(_Contrastive):
    _loss_of = staticmethod(clip_loss)

    @staticmethod
    def _norm(x: Tensor) -> Tensor:
        """Rounded, in half precision, as theirs."""
        return x.square().sum(-1, keepdim=True).sqrt()

    def _scale_and_bias(self) -> tuple[Tensor, ...]:
        return (float32(self.logit_scale).exp(),)


class _Siglip(_Contrastive):
    _loss_of = staticmethod(siglip_loss)

    @staticmethod
    def _norm(x: Tensor) -> Tensor:
        return x.norm(dim=-1, keepdim=True)

    def _scale_and_bias(self) -> tuple[Tensor, ...]:
        return float32(self.logit_scale).exp(), float32(self.logit_bias)


def _forward(theirs: type[nn.Module]) -> Callable[..., Any]:
    """Their forward, with our loss. It keeps their signature: Trainer reads from it what a batch may hold."""
    signature = inspect.signature(theirs.forward)

    @wraps(theirs.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **{name: x for name, x in kwargs.items() if name != "return_dict"})
        bound.apply_defaults()
        given = dict(bound.arguments)
        if not given.pop("return_loss"):
            return theirs.forward(self, *args, **kwargs)
        given |= given.pop("kwargs", {})
        del given["self"]
        for name in OF_CONFIG:
            if name in signature.parameters and given[name] is None:
                given[name] = getattr(self.config, name)
        return self._with_loss(given, return_dict=kwargs.get("return_dict"))

    return forward


class CLIPModel(_Clip, clip.CLIPModel):
    _output, _encode = clip.CLIPOutput, _by_towers if OLD else _by_features
    forward = _forward(clip.CLIPModel)


class MetaClip2Model(_Clip, metaclip_2.MetaClip2Model):
    _output, _encode = metaclip_2.MetaClip2Output, _by_towers if OLD else _by_features
    forward = _forward(metaclip_2.MetaClip2Model)


class AltCLIPModel(_Clip, altclip.AltCLIPModel):
    _output = altclip.AltCLIPOutput
    forward = _forward(altclip.AltCLIPModel)


class ChineseCLIPModel(_Clip, chinese_clip.ChineseCLIPModel):
    _output, _encode = chinese_clip.ChineseCLIPOutput, _by_features
    forward = _forward(chinese_clip.ChineseCLIPModel)


class SiglipModel(_Siglip, siglip.SiglipModel):
    _output = siglip.SiglipOutput
    forward = _forward(siglip.SiglipModel)


class Siglip2Model(_Siglip, siglip2.Siglip2Model):
    _output = siglip2.Siglip2Output
    forward = _forward(siglip2.Siglip2Model)


CLIP = (CLIPModel, MetaClip2Model, *(() if OLD else (AltCLIPModel, ChineseCLIPModel)))
SIGLIP = (SiglipModel, *(() if OLD else (Siglip2Model,)))


def _patch(op: str, model: nn.Module, kinds: tuple[type, ...], settings: Settings) -> nn.Module:
    if settings.exchange not in (None, *HOW):
        raise ValueError(f"{op}: exchange must be None or one of {HOW}, got {settings.exchange!r}")
    ours = {kind.__bases__[1]: kind for kind in kinds}
    parts = [x for x in model.modules() if type(x) in ours or type(x) in kinds]
    if not parts:
        names = ", ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{op}: expected a model that is or holds one of {names}, got {type(model).__name__}")
    for part in parts:
        if "forward" in vars(part):  # it would run instead of the class's
            raise ValueError(f"{op}: {type(part).__name__} has a forward that was put on it; patch before that")
    for part in parts:
        part.__class__, part._contrast = ours.get(type(part), type(part)), settings
    return model


def _unpatch(model: nn.Module, kinds: tuple[type, ...]) -> nn.Module:
    for part in model.modules():
        if type(part) in kinds:
            vars(part).pop("_contrast", None)
            part.__class__ = type(part).__bases__[1]
    return model


def patch_clip(model: nn.Module, *, return_logits: bool | None = None, exchange: str | None = None) -> nn.Module:
    """`model(..., return_loss=True).loss` = `clip_loss(image_embeds, text_embeds, exp(logit_scale))`, no logits stored.

    Args:
        model: a CLIPModel, MetaClip2Model or, of transformers 5, AltCLIPModel or ChineseCLIPModel; or what holds one
            (a wrapper, a LightningModule). A patched one takes the new settings.
        return_logits: whether an output with a loss has logits. None: outside training, as metrics read them there.
        exchange: "gather" or "ring": negatives from all ranks, as inside `fastcontrast.distributed.exchange`. The loss
            is that of all ranks' pairs, and so are gradients after the mean over ranks that data parallelism takes.
            Logits are of a rank's own pairs.

    Raises: ValueError where there is no such model, or one has a `forward` that something else put on it; in the call,
        where numbers of texts and images differ.
    """
    return _patch("patch_clip", model, CLIP, Settings(return_logits, exchange))


def patch_siglip(model: nn.Module, *, return_logits: bool | None = None, exchange: str | None = None) -> nn.Module:
    """`model(..., return_loss=True).loss` = `siglip_loss(text_embeds, image_embeds, logit_scale.exp(), logit_bias)`, no
    logits stored. For SiglipModel and, of transformers 5, Siglip2Model; arguments and errors are `patch_clip`'s."""
    return _patch("patch_siglip", model, SIGLIP, Settings(return_logits, exchange))


def unpatch_clip(model: nn.Module) -> nn.Module:
    """The model, its forward as it was before `patch_clip`."""
    return _unpatch(model, CLIP)


def unpatch_siglip(model: nn.Module) -> nn.Module:
    """The model, its forward as it was before `patch_siglip`."""
    return _unpatch(model, SIGLIP)
