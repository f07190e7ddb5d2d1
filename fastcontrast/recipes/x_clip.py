"""X-CLIP: a video classifier out of CLIP. Frames exchange messages in every block; a video shifts its classes' texts.

Of frames' tokens z [B, T, L, D], the class token first, a cross-frame block makes z'' (LN is LayerNorm):

    m   = W_m z[:, :, 0] + b_m                           a message a frame
    m^  = m + MHA(LN_m(m)) over the T frames             the messages read each other
    s   = [z, m^];  z' = (s + MHA(LN_1(s)))[:, :, :L]    attention inside each frame, its message among the keys
    z'' = z' + FFN(LN_2(z'))                             FFN(x) = W_2 g(W_1 x), g(x) = x · sigmoid(1.702 x)

Then, with f = LN_post(z''[:, :, 0]) · P_v and patches g = z''[:, :, 1:], which LN_post does not meet:

    v = mean_t( f + block(f + pos) )                     the multi-frame integration transformer
    p = LN_p'( mean_t( LN_p(g) · W_p ) )                 what the texts read
    c ← c + MHA(LN_a(c), p, p);  c ← c + FFN(LN_b(c))    two layers, from the classes' texts c0
    logits[b, k] = exp(s) · cos(v_b, c0_k + α · c_bk)    α a learned vector, from 0.1

Loss: cross-entropy over the classes, from video to text only. Texts and scale s stay as CLIP has them.

[z, m^] is never formed: the message is an extra key of `frame_attention`, and has no query, output or residual, for its
row would be dropped. The messages' own attention is `temporal_attention` with one token a frame.

FAQ. Does `transformers.XCLIPModel` compute the same? Yes, outputs and gradients, and `from_transformers` takes its
weights; its optional loss differs: CLIP's symmetric one, for as many texts as videos. Does the paper's text? Not quite:
there v lacks the f added again, and c its LayerNorms; the released code has both, and released weights expect them.
Why has the order of frames no effect on z''? Only pos knows it.

Source: Ni et al. 2022, "Expanding Language-Image Pretrained Models for General Video Recognition", arXiv 2208.02816.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ._parts.x_clip_layers import CrossFrameBlock, FrameEncoder, MultiFrameIntegration, Settings, VideoPrompt
from ._parts.x_clip_loop import add_views, mix, parameter_groups
from ._parts.x_clip_weights import our_weights

__all__ = [
    "CrossFrameBlock",
    "FrameEncoder",
    "MultiFrameIntegration",
    "Settings",
    "VideoPrompt",
    "XClip",
    "add_views",
    "from_transformers",
    "mix",
    "parameter_groups",
    "run",
    "text_features",
    "x_clip_loss",
]

if TYPE_CHECKING:
    from transformers import XCLIPModel


SETTINGS = {
    "B/32": Settings(768, 12, 12, 512, 8, image=224, patch=32),
    "B/16": Settings(768, 12, 12, 512, 8, image=224, patch=16),
    "L/14": Settings(1024, 24, 16, 768, 12, image=224, patch=14),
    "L/14@336": Settings(1024, 24, 16, 768, 12, image=336, patch=14, frames=16),
}


class XClip(nn.Module):
    """Logits [B, C] of videos and class texts. Modules named message*, mit and prompt* are new, the others CLIP's."""

    def __init__(self, settings: Settings, scale: float = 100.0):
        super().__init__()
        s = self.settings = settings
        self.vision = FrameEncoder(s)
        self.projection = nn.Linear(s.width, s.joint, bias=False)
        self.mit = MultiFrameIntegration(s.frames, s.joint, s.joint_heads, s.mit_layers)
        self.prompt_norm, self.prompt_projection = nn.LayerNorm(s.width), nn.Linear(s.width, s.joint, bias=False)
        self.prompt = VideoPrompt(s.joint, s.joint_heads, s.prompt_layers, s.alpha)
        self.register_buffer("log_scale", torch.tensor(math.log(scale)))

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:  # [B, T, channels, image, image]
        """v [B, E], not of length 1, and the patches p [B, P, E] that texts read."""
        s = self.settings
        if video.ndim != 5 or video.shape[2:] != (s.channels, s.image, s.image):
            raise ValueError(
                f"x_clip: videos must be [B, T, {s.channels}, {s.image}, {s.image}], got {list(video.shape)}"
            )
        z = self.vision(video)
        frames = self.projection(self.vision.norm_post(z[:, :, 0]))
        return self.mit(frames), self.prompt_projection(self.prompt_norm(z[:, :, 1:])).mean(1)

    def forward(self, video: Tensor, texts: Tensor, classes_at_once: int | None = None) -> Tensor:
        """Logits [B, C] of videos [B, T, channels, image, image] and text features [C, E], not of length 1.

        With `classes_at_once` the shifted texts of only so many classes exist at a time, not [B, C, E]; a backward
        computes them again.
        """
        if texts.ndim != 2 or texts.shape[1] != self.settings.joint:
            raise ValueError(f"x_clip: texts must be [C, {self.settings.joint}], got {list(texts.shape)}")
        v, patches = self.encode(video)
        if classes_at_once is None:
            return self.log_scale.exp() * self._cosines(v, patches, texts)
        parts = [
            checkpoint(self._cosines, v, patches, part, use_reentrant=False) for part in texts.split(classes_at_once)
        ]
        return self.log_scale.exp() * torch.cat(parts, 1)

    def _cosines(self, v: Tensor, patches: Tensor, texts: Tensor) -> Tensor:
        return torch.einsum("be,bce->bc", unit(v), unit(self.prompt(texts, patches)))


def unit(x: Tensor) -> Tensor:
    """x / ‖x‖ without an epsilon; a vector of zeros stays one, its gradient too."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.masked_fill(length == 0, 1.0)


def x_clip_loss(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:  # [B, C], [B] or [B, C]
    """mean_b − Σ_k y_bk log softmax_k(l_b). y: classes [B], smoothed to (1 − ε)·one-hot + ε / C, or y itself, as `mix`
    gives it."""
    if targets.ndim == 2 and smoothing:
        raise ValueError(f"x_clip: smoothing is for classes; soft targets are taken as they are, got {smoothing:g}")
    return F.cross_entropy(logits, targets, label_smoothing=smoothing)


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Trains a small X-CLIP on the clips of `fastcontrast.clips`: see `fastcontrast.recipes._parts.x_clip_run`."""
    from ._parts.x_clip_run import run as train

    return train(steps, output=output, seed=seed, limit=limit)


def from_transformers(theirs: XCLIPModel) -> XClip:
    """The model with the weights of a `transformers.XCLIPModel`, copied, in its dtype; texts: `text_features`."""
    config, vision, text = theirs.config, theirs.config.vision_config, theirs.config.text_config
    theirs_are = {vision.hidden_act, config.prompt_hidden_act}, {vision.layer_norm_eps, text.layer_norm_eps}
    if theirs_are != ({"quick_gelu"}, {1e-5}):
        raise ValueError(f"x_clip: expected quick_gelu and layer_norm_eps 1e-05 throughout, got {theirs_are}")
    if config.prompt_num_attention_heads != vision.mit_num_attention_heads:
        got = config.prompt_num_attention_heads, vision.mit_num_attention_heads
        raise ValueError(f"x_clip: prompts and multi-frame blocks must have equally many heads, got {got}")
    ours = XClip(
        Settings(
            vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads, config.projection_dim,
            vision.mit_num_attention_heads, vision.image_size, vision.patch_size, vision.num_channels,
            vision.num_frames, vision.mit_num_hidden_layers, config.prompt_layers,
        )
    )  # fmt: skip
    weights = our_weights(theirs.state_dict())
    weights["mit.positions"] = weights["mit.positions"][0]
    weights["prompt_projection.weight"] = weights["prompt_projection.weight"].T
    ours.to(weights["projection.weight"].dtype).load_state_dict(weights)
    return ours


@torch.no_grad()
def text_features(theirs: XCLIPModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Class texts c0 [C, E] by a `transformers.XCLIPModel`: computed once, no gradient, dropout off."""
    training = theirs.training
    theirs.eval()
    features = theirs.text_projection(theirs.text_model(input_ids, attention_mask).pooler_output)
    theirs.train(training)
    return features
