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
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastcontrast.activations import QuickGELU
from fastcontrast.ops import frame_attention, temporal_attention

from ._x_clip_weights import our_weights

if TYPE_CHECKING:
    from transformers import XCLIPModel


@dataclass(frozen=True)
class Settings:
    """Sizes of a model. `messages=False` makes CLIP's own blocks, frames apart: what the messages are compared with."""

    width: int  # D
    layers: int
    heads: int
    joint: int  # E, of videos and texts
    joint_heads: int
    image: int  # pixels a side
    patch: int
    channels: int = 3
    frames: int = 8  # T
    mit_layers: int = 1
    prompt_layers: int = 2
    alpha: float = 0.1
    messages: bool = True


SETTINGS = {
    "B/32": Settings(768, 12, 12, 512, 8, image=224, patch=32),
    "B/16": Settings(768, 12, 12, 512, 8, image=224, patch=16),
    "L/14": Settings(1024, 24, 16, 768, 12, image=224, patch=14),
    "L/14@336": Settings(1024, 24, 16, 768, 12, image=336, patch=14, frames=16),
}


class Attention(nn.Module):
    """The products around an attention: queries, keys and values packed side by side, and the output's."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"x_clip: {heads} heads must divide the width, got {width}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k, v [..., H, D / H] of x [..., D], as views of one product."""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, ...]:
        """k, v [..., H, D / H] of x [..., D], which asks nothing itself."""
        width = self.out.in_features
        packed = F.linear(x, self.qkv.weight[width:], self.qkv.bias[width:])
        return packed.unflatten(-1, (2, self.heads, -1)).unbind(-3)

    def across_frames(self, x: Tensor) -> Tensor:  # [B, T, D]
        """One token a frame attends those of all frames of its clip."""
        out = temporal_attention(*(part[:, :, None] for part in self.split(x)))
        return self.out(out.flatten(2))

    def inside_frames(self, x: Tensor, message: Tensor | None) -> Tensor:  # [B, T, L, D], [B, T, 1, D]
        """Tokens attend those of their frame and its message."""
        extra = None if message is None else self.keys_and_values(message)
        return self.out(frame_attention(*self.split(x), rule="self", extra=extra).flatten(3))


def feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), QuickGELU(), nn.Linear(4 * width, width))


class CrossFrameBlock(nn.Module):
    """z'' of z [B, T, L, D]: see the module's equations."""

    def __init__(self, width: int, heads: int, messages: bool = True):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.ffn = Attention(width, heads), feed_forward(width)
        self.message = None
        if messages:
            self.message, self.message_norm = nn.Linear(width, width), nn.LayerNorm(width)
            self.message_attention = Attention(width, heads)

    def messages(self, z: Tensor) -> Tensor:  # [B, T, L, D]
        """m^ [B, T, D]: what each frame is told."""
        m = self.message(z[:, :, 0])
        return m + self.message_attention.across_frames(self.message_norm(m))

    def forward(self, z: Tensor) -> Tensor:  # [B, T, L, D]
        told = None if self.message is None else self.norm1(self.messages(z))[:, :, None]
        z = z + self.attention.inside_frames(self.norm1(z), told)
        return z + self.ffn(self.norm2(z))


class FrameEncoder(nn.Module):
    """CLIP's vision transformer, of cross-frame blocks: video [B, T, channels, image, image] -> tokens [B, T, L, D]."""

    def __init__(self, s: Settings):
        super().__init__()
        self.patches = nn.Conv2d(s.channels, s.width, s.patch, s.patch, bias=False)
        self.class_token = nn.Parameter(s.width**-0.5 * torch.randn(s.width))
        self.positions = nn.Parameter(s.width**-0.5 * torch.randn(1 + (s.image // s.patch) ** 2, s.width))
        self.norm_pre, self.norm_post = nn.LayerNorm(s.width), nn.LayerNorm(s.width)
        self.blocks = nn.ModuleList(CrossFrameBlock(s.width, s.heads, s.messages) for _ in range(s.layers))

    def embed(self, video: Tensor) -> Tensor:  # [B, T, channels, image, image]
        """Tokens before the first block."""
        patches = self.patches(video.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, video.shape[:2])
        first = self.class_token.expand(*patches.shape[:2], 1, -1)
        return self.norm_pre(torch.cat([first, patches], 2) + self.positions)

    def forward(self, video: Tensor) -> Tensor:  # [B, T, channels, image, image]
        z = self.embed(video)
        for block in self.blocks:
            z = block(z)
        return z


class MultiFrameBlock(nn.Module):
    """x + MHA(LN(x)) over the frames, then x + FFN(LN(x)), of x [B, T, E]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.ffn = Attention(width, heads), feed_forward(width)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, E]
        x = x + self.attention.across_frames(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class MultiFrameIntegration(nn.Module):
    """v [B, E] = mean_t( f + blocks(f + pos) ) of frames f [B, T, E]."""

    def __init__(self, frames: int, width: int, heads: int, layers: int = 1):
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(frames, width))
        self.blocks = nn.Sequential(*(MultiFrameBlock(width, heads) for _ in range(layers)))

    def forward(self, f: Tensor) -> Tensor:  # [B, T, E]
        if f.shape[1] != len(self.positions):
            raise ValueError(
                f"x_clip: clips must have the {len(self.positions)} frames that positions were learned for, "
                f"got {f.shape[1]}; resample the clip or interpolate `mit.positions`"
            )
        return (f + self.blocks(f + self.positions)).mean(1)


class PromptLayer(nn.Module):
    """c + MHA(LN(c), p, p), then c + FFN(LN(c)): class texts c [B or 1, C, E] read patches p [B, P, E]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.out, self.ffn = nn.Linear(width, width), feed_forward(width)

    def forward(self, c: Tensor, p: Tensor) -> Tensor:  # [B or 1, C, E], [B, P, E]
        q = self.query(self.norm1(c)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.key_value(p).unflatten(-1, (2, self.heads, -1)).transpose(1, 3).unbind(2)
        read = F.scaled_dot_product_attention(q.expand(len(p), -1, -1, -1), k, v)
        c = c + self.out(read.transpose(1, 2).flatten(2))
        return c + self.ffn(self.norm2(c))


class VideoPrompt(nn.Module):
    """c0 + α · c [B, C, E]: class texts c0 [C, E] as the patches p [B, P, E] of each video shift them."""

    def __init__(self, width: int, heads: int, layers: int = 2, alpha: float = 0.1):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(PromptLayer(width, heads) for _ in range(layers))
        self.alpha = nn.Parameter(torch.full((width,), alpha))

    def forward(self, texts: Tensor, patches: Tensor) -> Tensor:  # [C, E], [B, P, E]
        p, c = self.norm(patches), texts[None]  # all videos start from the same texts: their first queries are one
        for layer in self.layers:
            c = layer(c, p)
        return texts + self.alpha * c


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


# --------------------------------------------------------------------------------------------------------------- loop


def x_clip_loss(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:  # [B, C], [B] or [B, C]
    """mean_b − Σ_k y_bk log softmax_k(l_b). y: classes [B], smoothed to (1 − ε)·one-hot + ε / C, or y itself, as `mix`
    gives it."""
    if targets.ndim == 2 and smoothing:
        raise ValueError(f"x_clip: smoothing is for classes; soft targets are taken as they are, got {smoothing:g}")
    return F.cross_entropy(logits, targets, label_smoothing=smoothing)


def mix(
    video: Tensor,  # [B, T, channels, height, width]
    classes: Tensor,  # [B]
    count: int,
    draw: random.Random,
    *,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    switch: float = 0.5,
    smoothing: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Whole clips mixed with each other, and targets [B, count]: λ · y + (1 − λ) · y of the other, both smoothed.

    With probability `switch` cutmix, the same box of all frames from the other clip, else mixup, λ · clip + (1 − λ) ·
    other. λ comes from Beta(α, α), α being `mixup` or `cutmix`; a box's λ is then the share it leaves.
    """
    other = torch.tensor(draw.sample(range(len(video)), len(video)), device=video.device)
    by_box = draw.random() < switch
    share = draw.betavariate(*(2 * [cutmix if by_box else mixup]))
    if by_box:
        height, width = video.shape[-2:]
        tall, wide = (round(side * (1 - share) ** 0.5) for side in (height, width))
        top, left = draw.randint(0, height - tall), draw.randint(0, width - wide)
        box = (..., slice(top, top + tall), slice(left, left + wide))
        mixed = video.clone()
        mixed[box] = video[other][box]
        share = 1 - tall * wide / (height * width)
    else:
        mixed = share * video + (1 - share) * video[other]
    target = (1 - smoothing) * F.one_hot(classes, count).to(video.dtype) + smoothing / count
    return mixed, share * target + (1 - share) * target[other]


def parameter_groups(model: nn.Module, rate: float, decay: float = 1e-3, faster: float = 10.0) -> list[dict[str, Any]]:
    """AdamW's groups: what CLIP does not have learns `faster`; vectors, biases and positions do not decay.

    The paper's AdamW has betas (0.9, 0.98), and rates of 8e-6 fully supervised, 2e-6 from few shots.
    """
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        new = name.startswith(("mit.", "prompt")) or ".message" in f".{name}"
        decays = parameter.ndim > 1 and not name.endswith("positions")
        groups.setdefault((new, decays), []).append(parameter)
    return [
        {"params": found, "lr": rate * (faster if new else 1.0), "weight_decay": decay if decays else 0.0}
        for (new, decays), found in groups.items()
    ]


def add_views(logits: Sequence[Tensor]) -> Tensor:
    """Scores [B, C] of clips seen several times, cut out of time and space: the sum of the views' probabilities."""
    return sum(part.softmax(-1) for part in logits)


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Trains a small X-CLIP on the clips of `fastcontrast.clips`: see `fastcontrast.recipes._x_clip_run`."""
    from ._x_clip_run import run as train

    return train(steps, output=output, seed=seed, limit=limit)


# ------------------------------------------------------------------------------------------------------------- weights


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
