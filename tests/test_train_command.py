"""`fastcontrast train` and `fastcontrast recipes`: what they measure, write and say."""

import importlib
import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastcontrast import cli, clips
from fastcontrast.ops import frame_attention
from fastcontrast.recipes import x_clip
from fastcontrast.recipes._parts import x_clip_picture, x_clip_run
from fastcontrast.recipes._shared import report
from fastcontrast.recipes.x_clip import XClip


@pytest.fixture
def noise(monkeypatch) -> dict[str, torch.Tensor]:
    """Features without videos and net: each frame's are noise around its video's own."""
    torch.manual_seed(0)
    count = {video: max(s.last for s in clips.SHOTS if s.video == video) for video in clips.VIDEOS}
    made = {
        video: (torch.randn(1, clips.WIDTH, 4, 4) + 0.2 * torch.randn(n, clips.WIDTH, 4, 4)).half()
        for video, n in count.items()
    }
    monkeypatch.setattr(clips, "patch_features", lambda video: made[video])
    monkeypatch.setattr(
        clips, "frames", lambda video, height, width: torch.zeros(count[video], height, width, 3, dtype=torch.uint8)
    )
    torch.manual_seed(1)
    texts = torch.nn.functional.normalize(torch.randn(len(x_clip_run.WAYS), 384), dim=1)
    monkeypatch.setattr(x_clip_run, "minilm_features", lambda names: texts)
    monkeypatch.setattr(x_clip_run, "BATCH", 6)
    return made


def test_parts_for_training_and_test_do_not_meet():
    for shot in clips.SHOTS:
        train, test = (x_clip_run.span(shot, held_out) for held_out in (False, True))
        assert (train[0], train[1], test[1]) == (shot.first, test[0], shot.last)
        assert min(train[1] - train[0], test[1] - test[0]) >= x_clip_run.FRAMES


@pytest.mark.parametrize("held_out", [False, True])
def test_clips_are_windows_shown_in_every_way(held_out):
    numbers = {video: 1000 * i + torch.arange(300) for i, video in enumerate(clips.VIDEOS)}
    found, labels, sources = x_clip_run.draw_clips(numbers, 16, random.Random(0), held_out)
    assert labels.view(16, -1).tolist() == [[*range(len(x_clip_run.WAYS))]] * 16
    for ways, windows in zip(found.unflatten(0, (16, -1)), sources, strict=True):
        for shot, index in windows:
            first, last = x_clip_run.span(shot, held_out)
            assert first <= index[0] and index[-1] < last and index == sorted(index)
        own, other = ([1000 * clips.VIDEOS.index(shot.video) + i for i in index] for shot, index in windows)
        assert windows[0][0] is not windows[1][0]
        shown = dict(zip(x_clip_run.WAYS, ways.tolist(), strict=True))
        assert shown["a scene in motion"] == own
        assert set(shown["a frozen picture"]) < set(own) and len(set(shown["a frozen picture"])) == 1
        assert shown["a cut to another scene"] in [own[:at] + other[at:] for at in range(2, 7)]
    if held_out:
        assert [windows[0][0] for windows in sources] == [*clips.SHOTS] * 2


def test_whitened_features_vary_by_one(noise):
    white = x_clip_run.whiten(noise)
    rows = torch.cat(
        [white[s.video][slice(*x_clip_run.span(s, False))].transpose(1, 3).flatten(0, 2) for s in clips.SHOTS]
    )
    covariance = rows.T @ rows / len(rows)
    assert rows.mean(0).abs().max() < 1e-3
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-2
    assert covariance.diag().median() > 0.8 and covariance.diag().max() < 1.01


def test_models_have_the_same_start_and_the_last_sees_frames_apart():
    made = {}
    for name in x_clip_run.KINDS:
        torch.manual_seed(0)
        made[name] = x_clip_run.make(name)
    ours = made["x_clip"].state_dict()
    lacks = {
        name: {key.split(".")[0] + (".message" if ".message" in key else "") for key in ours if key not in shared}
        for name, shared in ((name, model.state_dict()) for name, model in made.items())
    }
    assert lacks == {
        "x_clip": set(), "messages": {"mit"}, "integration": {"vision.message"}, "pooled": {"mit", "vision.message"},
    }  # fmt: skip
    assert all(torch.equal(x, ours[key]) for model in made.values() for key, x in model.state_dict().items())
    video, texts = torch.randn(1, 8, x_clip_run.CHANNELS, 4, 4), torch.randn(3, 384)
    frames = torch.cat([made["pooled"].encode(frame)[0] for frame in video.split(1, 1)])
    torch.testing.assert_close(made["pooled"].encode(video)[0][0], frames.mean(0), rtol=0, atol=1e-5)
    assert made["pooled"](video, texts).shape == (1, 3)


def test_accuracy_is_the_share_of_right_clips():
    class Fixed(torch.nn.Module):
        def forward(self, video, texts):
            return video

    labels = torch.arange(len(x_clip_run.WAYS)).repeat(50)
    logits = torch.nn.functional.one_hot(labels, len(x_clip_run.WAYS)).float()
    logits[labels == 0] = logits[labels == 0].roll(1, 1)  # every clip of the first class goes to the second
    found = x_clip_run.accuracy(Fixed(), logits, labels, torch.empty(0))
    ways = len(x_clip_run.WAYS)
    shares = [1 - 1 / ways, 0, *[1] * (ways - 1)]
    names = [f"{name}, %" for name in ("right", *x_clip_run.WAYS)]
    assert found == pytest.approx({name: 100 * share for name, share in zip(names, shares, strict=True)})


def test_attention_of_the_picture_is_the_model_s():
    """The outputs that its weights give are those of the operations."""
    torch.manual_seed(0)
    block = x_clip.CrossFrameBlock(8, 1).double()  # one head: the mean over heads is it
    z = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    read, told = x_clip_picture.message_attention(block, z)
    own = block.message_norm(block.message(z[:, :, 0]))
    values = block.message_attention.split(own)[2][:, :, 0]
    torch.testing.assert_close(block.message_attention.out(read @ values), block.message_attention.across_frames(own))
    # With values of 0 but for the message's 1, a token's output is the weight that it gives to the message.
    q, k, v = block.attention.split(block.norm1(z))
    message_key, message_value = block.attention.keys_and_values(block.norm1(block.messages(z))[:, :, None])
    extra = message_key, torch.ones_like(message_value)
    weight = frame_attention(q, k, torch.zeros_like(v), rule="self", extra=extra)
    torch.testing.assert_close(told, weight[..., 0, 0])


def test_train_writes_and_prints(noise, tmp_path, capsys, one_thread):
    command = ["train", "x_clip", "--steps", "2", "--limit", "24", "--output", str(tmp_path), "--seed", "5"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"x_clip.safetensors", "x_clip.png", "x_clip.json"}
    results = json.loads((tmp_path / "x_clip.json").read_text())
    assert (results["steps"], results["seed"], results["test_clips"]) == (2, 5, 24)
    assert list(results["models"]) == [kind.label for kind in x_clip_run.KINDS.values()]
    for found in results["models"].values():
        assert len(found["losses"]) == 2 and found["seconds"] > 0
        right, *each = found["metrics"].values()
        assert right == pytest.approx(sum(each) / len(each)) and len(each) == len(results["classes"])
    assert {"frame_attention", "temporal_attention"} == set(results["models"]["X-CLIP"]["implementations"])
    assert set(results["models"]["CLIP, frames pooled"]["implementations"]) == {"frame_attention"}
    assert "right, %" in printed and "loss, first → last" in printed
    assert (tmp_path / "x_clip.png").read_bytes().startswith(b"\x89PNG")
    with safe_open(str(tmp_path / "x_clip.safetensors"), "pt") as file:
        assert json.loads(file.metadata()["fastcontrast"])["steps"] == 2
    model = XClip(x_clip_run.SETTINGS, x_clip_run.SCALE)
    model.load_state_dict(load_file(tmp_path / "x_clip.safetensors"))


def test_training_moves_and_repeats(one_thread):
    """Steps of AdamW whose rate rises and falls; vectors do not decay; what is not finite ends the run."""

    def losses(**options):
        torch.manual_seed(0)
        layer, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
        seen = []
        found = report.train("a layer", 4, layer, lambda i: layer(x).square().mean(), rate=0.1, after=seen.append,
                              **options)  # fmt: skip
        assert seen == [0, 1, 2, 3]
        return found, layer

    first, layer = losses()
    assert first == losses()[0] and first[-1] < first[0]
    decayed = losses(decay=1.0)[1]
    assert not torch.equal(layer.weight, decayed.weight)
    with pytest.raises(FloatingPointError, match="a layer: the loss of step 1 is nan"):
        report.train("a layer", 2, layer, lambda i: layer.bias.sum() * torch.nan, rate=0.1)


def test_groups_have_their_own_rates(one_thread):
    layers = [torch.nn.Linear(3, 3) for _ in range(2)]
    before = [layer.weight.detach().clone() for layer in layers]
    groups = {"params": layers[0].parameters()}, {"params": layers[1].parameters(), "lr": 0.01}
    report.train("layers", 1, groups, lambda _: sum(x(torch.ones(1, 3)).sum() for x in layers), rate=0.1)
    moved = [(layer.weight - old).detach() for layer, old in zip(layers, before, strict=True)]
    torch.testing.assert_close(moved[1], moved[0] / 10, rtol=1e-3, atol=0)  # one step of AdamW moves by the rate


def test_a_scale_stays_between_one_and_a_hundred():
    scale = report.Scale()
    assert scale().item() == pytest.approx(1 / 0.07)
    for log, expected in ((9.0, 100.0), (-1.0, 1.0)):
        scale.log.data.fill_(log)
        scale.clamp()
        assert scale().item() == pytest.approx(expected)


def test_what_is_missing_or_wrong_is_said(monkeypatch, capsys, tmp_path):
    assert cli.main(["train", "x_clip", "--steps", "0"]) == 2
    assert capsys.readouterr().err == "fastcontrast train: --steps must be at least 1, got 0\n"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["train", "x_clip", "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastcontrast train: the package ") and "requirements-data.txt" in error
    with pytest.raises(ValueError, match="x_clip: steps must be at least 1, got 0"):
        x_clip_run.run(0, output=tmp_path)


def test_the_readme_quotes_the_committed_run():
    root = Path(__file__).parents[1]
    run = json.loads((root / "benchmarks" / "results" / "train_x_clip.json").read_text())
    prose = " ".join((root / "README.md").read_text().split())
    kinds = x_clip_run.KINDS
    right = {name: f"{run['models'][kind.label]['metrics']['right, %']:.1f} %" for name, kind in kinds.items()}
    assert f"{right['x_clip']} right on {run['test_clips']} clips" in prose
    assert f"{right['messages']} with messages only, {right['integration']} with the integration only" in prose
    assert f"{right['pooled']} if frames are apart and pooled" in prose
    assert "(benchmarks/results/train_x_clip.png)" in prose
    assert f"chance {100 / len(run['classes']):.1f} %" in prose and f"in {run['seconds']:.0f} s on two" in prose
    assert run["classes"] == [*x_clip_run.WAYS] and (run["steps"], run["batch"]) == (
        x_clip_run.STEPS, x_clip_run.BATCH,
    )  # fmt: skip
    settings = json.loads(json.dumps(asdict(x_clip_run.SETTINGS)))
    assert {key: run[key] for key in settings} == settings
