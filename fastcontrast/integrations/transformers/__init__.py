"""Models of `transformers` on the operations and losses; asking for a name imports the module that has it."""

from importlib import import_module
from typing import Any

_HOMES = {
    "clip": ("patch_clip", "patch_siglip", "unpatch_clip", "unpatch_siglip"),
    "video": ("patch_video", "runs_patched", "unpatch_video"),
}

__all__ = [name for names in _HOMES.values() for name in names]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
