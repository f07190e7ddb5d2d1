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

import json
import os
import platform
import random
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcontrast import clips
from fastcontrast.minilm import WIDTH, minilm_features
from fastcontrast.ops import trace

from .x_clip import Settings, XClip, parameter_groups, warm_up_then_cosine, x_clip_loss

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
    "x_clip": Kind("X-CLIP", True, True),
    "messages": Kind("messages only", True, False),
    "integration": Kind("integration only", False, True),
    "pooled": Kind("CLIP, frames pooled", False, False),
}


class MeanOfFrames(nn.Module):
    """v = mean_t f: what stands in for the multi-frame integration."""

    def forward(self, f: Tensor) -> Tensor:  # [B, T, E]
        return f.mean(1)


def run(
    steps: int | None = None,
    *,
    output: str | os.PathLike = "train-output",
    seed: int = 0,
    test_clips: int | None = None,
) -> dict[str, Any]:
    """Trains the models, prints what they tell of held-out clips, writes weights, a picture and the results as JSON.

    Raises MissingDataError if a package is not installed, ValueError if there is nothing to do.
    """
    from ._x_clip_picture import draw as draw_picture

    steps = STEPS if steps is None else steps
    test_clips = TEST_CLIPS if test_clips is None else test_clips
    if steps < 1 or test_clips < 1:
        raise ValueError(f"x_clip: steps and test clips must be at least 1, got {steps} and {test_clips}")
    began = time.perf_counter()
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    texts = minilm_features([*WAYS])
    features = whiten({video: clips.patch_features(video) for video in clips.VIDEOS})
    test, labels, _ = draw_clips(features, test_clips * len(clips.SHOTS), random.Random(seed + 1), held_out=True)
    print(f"{len(clips.SHOTS)} shots, {len(WAYS)} classes, {len(labels)} clips of frames that training never sees")

    results: dict[str, Any] = {"recipe": "x_clip", "classes": [*WAYS], "steps": steps, "seed": seed, "models": {}}
    models: dict[str, XClip] = {}
    for name in KINDS:
        torch.manual_seed(seed)
        model = models[name] = make(name)
        before = accuracy(model, test, labels, texts)
        started = time.perf_counter()
        with trace() as ran:
            losses = train(model, features, texts, steps, seed, name)
        results["models"][name] = {
            "before": before, "after": accuracy(model, test, labels, texts), "losses": losses,
            "seconds": time.perf_counter() - started,
            "implementations": {choice.op: choice.implementation for choice in ran},
        }  # fmt: skip
    print_results(results)

    weights, picture, file = (folder / f"x_clip.{kind}" for kind in ("safetensors", "png", "json"))
    save(models["x_clip"], weights)
    draw_picture(picture, models["x_clip"], features, results)
    results |= {
        "settings": asdict(SETTINGS), "batch": BATCH, "shots": [shot.text for shot in clips.SHOTS],
        "test_clips": len(labels), "threads": torch.get_num_threads(), "seconds": time.perf_counter() - began,
        "versions": {"python": platform.python_version(), "torch": torch.__version__}, "machine": platform.machine(),
    }  # fmt: skip
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{results['seconds']:.0f} s in all\n{weights}\n{picture}\n{file}")
    return results


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


def train(model: XClip, features: dict[str, Tensor], texts: Tensor, steps: int, seed: int, name: str) -> list[float]:
    """`steps` steps, in place. Returns the loss of every step."""
    from tqdm import tqdm

    # Nothing here comes from CLIP: all parameters are new, and learn at one rate.
    optimizer = torch.optim.AdamW(parameter_groups(model, RATE, DECAY, faster=1.0), betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: warm_up_then_cosine(i, steps, max(1, steps // 10))
    )
    draw, losses = random.Random(seed), []
    with tqdm(range(steps), desc=f"training {name}", unit="step") as bar:
        for _ in bar:
            video, labels, _ = draw_clips(features, BATCH // len(WAYS), draw, held_out=False)
            loss = x_clip_loss(model(video, texts), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


@torch.no_grad()
def accuracy(model: XClip, test: Tensor, labels: Tensor, texts: Tensor) -> dict[str, float]:
    """Share of clips whose class has the highest logit: of all, and of each class."""
    right = torch.cat([model(part, texts).argmax(1) for part in test.split(64)]) == labels
    return {"all": right.float().mean().item()} | {
        way: right[labels == k].float().mean().item() for k, way in enumerate(WAYS)
    }


def print_results(results: dict[str, Any]) -> None:
    print(f"\n{'right on held-out clips, %':<32}{'before':>8}{'after':>8}")
    for name, found in results["models"].items():
        for way in found["after"]:
            start = KINDS[name].label if way == "all" else f"  {way}"
            print(f"{start:<32}{100 * found['before'][way]:8.1f}{100 * found['after'][way]:8.1f}")
        tail = found["losses"][-10:]
        print(f"  loss {found['losses'][0]:.2f} → {sum(tail) / len(tail):.2f}")
    print(f"{'chance':<40}{100 / len(WAYS):8.1f}")


def save(model: XClip, path: Path) -> None:
    """Weights as safetensors, with the settings in their metadata."""
    from safetensors.torch import save_file

    settings = {"settings": asdict(model.settings), "scale": SCALE, "classes": [*WAYS]}
    save_file(model.state_dict(), str(path), metadata={"fastcontrast": json.dumps(settings)})
