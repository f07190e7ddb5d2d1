"""X-CLIP trained on real clips: how is a clip shown, and does it help that frames talk to each other?

Every shot of `fastcontrast.clips` is shown in the ways of `WAYS`, whose texts are the classes. Each frame of a frozen
picture, or of a clip with a cut, looks like one of any other clip: only frames together tell. Training takes windows
from the first two thirds of every shot, the test from the last.

A frame's patches are features of EfficientNet-lite0, frozen, whitened along their strongest directions; a small X-CLIP
with patches of 1 × 1 reads them, against MiniLM's features of the classes' texts. Frames meet in two places, in their
messages and in the multi-frame integration. So there are three rivals, trained on the same clips from the same start:
without the one, without the other, and without both, which is CLIP with pooled frames, v = mean_t f.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcontrast import clips
from fastcontrast.minilm import WIDTH, minilm_features

from .._shared.report import Report, train
from ..x_clip import Settings, XClip, x_clip_loss

FRAMES, SHORTEST, LONGEST = 8, 8, 24  # frames a clip; the window that they are taken from
HELD_OUT = 1 / 3  # of every shot, at its end
CHANNELS, SHRINK = 64, 0.1  # of whitened features; share of the mean variance that is added to each
BATCH, STEPS, RATE, DECAY, SCALE = 30, 150, 1.5e-3, 1e-2, 30.0
TEST_CLIPS = 12  # of every shot, in every way
SETTINGS = Settings(
    width=96, layers=2, heads=4, joint=WIDTH, joint_heads=6, image=4, patch=1, channels=CHANNELS, frames=FRAMES
)


def cut(clip: Tensor, other: Tensor, draw: random.Random) -> Tensor:
    """The first frames of one clip, the last of another, at least two of each."""
    at = draw.randint(2, len(clip) - 2)
    return torch.cat([clip[:at], other[at:]])


# How a clip [T, ...] is shown; `other` is one of another shot.
WAYS: dict[str, Callable[[Tensor, Tensor, random.Random], Tensor]] = {
    "a scene in motion": lambda clip, other, draw: clip,
    "a frozen picture": lambda clip, other, draw: clip[draw.randrange(len(clip))].expand_as(clip),
    "a cut to another scene": cut,
}


class Kind(NamedTuple):
    """A model: its name in print, and where its frames meet."""

    label: str
    messages: bool
    integration: bool


KINDS = {
    "pooled": Kind("CLIP, frames pooled", False, False),
    "messages": Kind("messages only", True, False),
    "integration": Kind("integration only", False, True),
    "x_clip": Kind("X-CLIP", True, True),
}


class MeanOfFrames(nn.Module):
    """v = mean_t f: what stands in for the multi-frame integration."""

    def forward(self, f: Tensor) -> Tensor:  # [B, T, E]
        return f.mean(1)


def run(
    steps: int | None = None, *, output: str | os.PathLike = "train-output", seed: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Trains the models and tests them on `TEST_CLIPS` held-out clips of every shot in every way, or about `limit`.

    Raises MissingDataError if a package is not installed, ValueError if there is nothing to do.
    """
    from .x_clip_picture import picture

    steps = STEPS if steps is None else steps
    count = TEST_CLIPS * len(clips.SHOTS) if limit is None else max(1, limit // len(WAYS))
    report = Report("x_clip", output, steps=steps, seed=seed, limit=limit, batch=BATCH, **asdict(SETTINGS))
    texts = minilm_features([*WAYS])
    features = whiten({video: clips.patch_features(video) for video in clips.VIDEOS})
    test, labels, _ = draw_clips(features, count, random.Random(seed + 1), held_out=True)
    models: dict[str, XClip] = {}
    for name, kind in KINDS.items():
        torch.manual_seed(seed)
        model, draw = make(name), random.Random(seed)
        models[name] = model

        def step(_: int, model=model, draw=draw) -> Tensor:
            video, classes, _ = draw_clips(features, BATCH // len(WAYS), draw, held_out=False)
            return x_clip_loss(model(video, texts), classes)

        with report.model(kind.label) as found:
            found.losses = train(kind.label, steps, model, step, rate=RATE, decay=DECAY, clip=1.0)
            found.metrics = accuracy(model, test, labels, texts)
    return report.close(
        models["x_clip"], picture(models["x_clip"], features, seed), classes=[*WAYS],
        shots=[shot.text for shot in clips.SHOTS], test_clips=len(labels),
    )  # fmt: skip


def make(name: str) -> XClip:
    """One of `KINDS`; seeded alike, they have the same weights where they have the same parts."""
    model = XClip(SETTINGS, SCALE)
    if not KINDS[name].messages:
        whole = model.state_dict()
        model = XClip(replace(SETTINGS, messages=False), SCALE)
        model.load_state_dict({key: x for key, x in whole.items() if ".message" not in key})
    if not KINDS[name].integration:
        model.mit = MeanOfFrames()
    return model


def whiten(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Features [N, 1280, h, w] along their `CHANNELS` strongest directions, each of about unit variance, float32.

    Frames of a shot differ little beside shots: unwhitened, what moves is lost beside what there is.
    """
    first = torch.cat([features[shot.video][slice(*span(shot, False))] for shot in clips.SHOTS]).float()
    rows = first.transpose(1, 3).flatten(0, 2)  # of training frames only
    mean = rows.mean(0)
    values, directions = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    values, directions = values[-CHANNELS:], directions[:, -CHANNELS:]
    directions = directions * (values + SHRINK * values.mean()).rsqrt()
    return {
        video: torch.einsum("nchw,cd->ndhw", x.float() - mean[:, None, None], directions)
        for video, x in features.items()
    }


def span(shot: clips.Shot, held_out: bool) -> tuple[int, int]:
    """First frame of a shot's part for the test, or for training, and the one after its last."""
    cut = shot.last - round(HELD_OUT * (shot.last - shot.first))
    return (cut, shot.last) if held_out else (shot.first, cut)


def window(shot: clips.Shot, held_out: bool, draw: random.Random) -> list[int]:
    """The frames of a clip: one of each equal part of a window, at random in the shot's part."""
    first, last = span(shot, held_out)
    length = draw.randint(min(SHORTEST, last - first), min(LONGEST, last - first))
    start = draw.randint(first, last - length)
    return clips.segment_frames(start, start + length, FRAMES, draw)


def draw_clips(
    features: dict[str, Tensor], count: int, draw: random.Random, held_out: bool
) -> tuple[Tensor, Tensor, list[list[tuple[clips.Shot, list[int]]]]]:
    """Clips [count · ways, T, channels, h, w], their classes, and the shot and frames that they come from, and those of
    the other clip. Shots take turns in the test; the clips of one window in every way stand side by side."""
    found, sources = [], []
    for i in range(count):
        shot = clips.SHOTS[i % len(clips.SHOTS)] if held_out else draw.choice(clips.SHOTS)
        other = draw.choice([x for x in clips.SHOTS if x is not shot])
        windows = [(x, window(x, held_out, draw)) for x in (shot, other)]
        pair = [features[x.video][index] for x, index in windows]
        found += [show(*pair, draw) for show in WAYS.values()]
        sources.append(windows)
    return torch.stack(found), torch.arange(len(WAYS)).repeat(count), sources


@torch.no_grad()
def accuracy(model: XClip, test: Tensor, labels: Tensor, texts: Tensor) -> dict[str, float]:
    """Per cent of clips whose class has the highest logit: of all, and of each class."""
    right = torch.cat([model(part, texts).argmax(1) for part in test.split(64)]) == labels
    shares = {"right": right} | {way: right[labels == k] for k, way in enumerate(WAYS)}
    return {f"{name}, %": 100 * share.float().mean().item() for name, share in shares.items()}
