"""A torchvision that does not fit the installed torch, beside which transformers and others could not be imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_declared: list[torch.library.Library] = []


def declare_torchvision_operators() -> None:
    """Lets a CUDA build of torchvision (what PyPI serves on Linux) import beside a CPU build of torch.

    Its library of operators then cannot be loaded, and `import torchvision` fails where it describes two of them to
    the compiler. Declaring these two is enough for its Python parts, and for open_clip, timm, lightly and transformers.
    """
    if _declared or torch.version.cuda is not None or torch.version.hip is not None:
        return
    spec = importlib.util.find_spec("torchvision")  # finds, does not import
    if spec is None or not spec.submodule_search_locations:
        return
    for path in Path(spec.submodule_search_locations[0]).glob("_C*.so"):
        try:
            torch.ops.load_library(str(path))
        except OSError:
            continue
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)  # a library that is collected takes its operators with it
