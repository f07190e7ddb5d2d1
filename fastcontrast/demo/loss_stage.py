"""What one batch's loss costs, ours and with the matrix stored: milliseconds in turns, memory in fresh processes."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcontrast.losses import clip_loss
from fastcontrast.ops import trace


def dense_loss(images: Tensor, texts: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    """`clip_loss` with the matrix stored: what one writes without a library."""
    logits = scale * images @ texts.T
    same = ids[:, None] == ids
    logits = logits.masked_fill(same.fill_diagonal_(False), float("-inf"))
    target = torch.arange(len(ids), device=ids.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def our_loss(images: Tensor, texts: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    return clip_loss(images, texts, scale, ids=ids)


STAGES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {"ours": our_loss, "dense": dense_loss}


def compare_loss(
    images: Tensor, texts: Tensor, scale: float, ids: Tensor, device: str, repeats: int = 5
) -> dict[str, Any]:
    """Forward and backward of the symmetric loss on features [N, D], by `clip_loss` and densely.

    Milliseconds: median of `repeats`, both taking turns in this process. MiB: what the stage adds to the peak, from the
    allocator on CUDA, else from the operating system in a process of its own (see `measure_stage`). `loss`: both
    values; `gradient_difference`: ‖ours − dense‖ / ‖dense‖ over the features' gradients; `implementation`: of ours.
    """
    inputs = [images.to(device), texts.to(device), torch.tensor(scale, device=device), ids.to(device)]
    outcomes = {kind: _backward(loss, inputs) for kind, loss in STAGES.items()}  # also the warm-up
    times: dict[str, list[float]] = {kind: [] for kind in STAGES}
    for _ in range(repeats):
        for kind, loss in STAGES.items():
            _wait(device)
            begin = time.perf_counter()
            _backward(loss, inputs)
            _wait(device)
            times[kind].append(1e3 * (time.perf_counter() - begin))
    (_, ours), (_, dense) = outcomes["ours"], outcomes["dense"]
    result: dict[str, Any] = {
        kind: {"ms": statistics.median(times[kind]), "mib": _stage_memory(kind, inputs), "loss": outcomes[kind][0]}
        for kind in STAGES
    }
    with trace() as ran:
        our_loss(*inputs)
    difference = ((ours - dense).norm() / dense.norm()).item()
    return result | {"gradient_difference": difference, "implementation": ran[0].implementation}


def measure_stage(kind: str, path: str) -> float:
    """MiB that one stage adds to this process's peak memory, for the features in `path`.

    Meant for a fresh process: nothing freed earlier lies about to be used again unseen. A small stage runs first, so
    that threads and libraries are up. Then the peak is set back to what is resident now (Linux lets a process do so);
    elsewhere the peak so far is the start, which can only make the result too small.
    """
    from safetensors.torch import load_file

    held = load_file(path)
    inputs = [held[name] for name in ("images", "texts", "scale", "ids")]
    _backward(STAGES[kind], [x[:64] if x.dim() else x for x in inputs])
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    start = _peak_of_process()
    _backward(STAGES[kind], inputs)
    return _peak_of_process() - start


def peak_memory(device: str) -> float:
    """Peak memory in MiB: of the GPU on CUDA, else of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return _peak_of_process()


def _backward(loss: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[float, Tensor]:
    """Value, and the gradient of all features [2N, D]."""
    images, texts, scale = (x.detach().requires_grad_() for x in inputs[:3])
    value = loss(images, texts, scale, inputs[3])
    value.backward()
    return value.item(), torch.cat([images.grad, texts.grad])


def _stage_memory(kind: str, inputs: list[Tensor]) -> float:
    from safetensors.torch import save_file

    device = inputs[0].device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        _backward(STAGES[kind], inputs)
        return (torch.cuda.max_memory_allocated(device) - start) / 2**20
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "features.safetensors")
        save_file(
            {name: x.contiguous() for name, x in zip(("images", "texts", "scale", "ids"), inputs, strict=True)}, path
        )
        code = "import sys; from fastcontrast.demo.loss_stage import measure_stage; print(measure_stage(*sys.argv[1:]))"
        where = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            [sys.executable, "-c", code, kind, path], env=where, check=True, stdout=subprocess.PIPE, text=True
        )
    return float(done.stdout.split()[-1])


def _peak_of_process() -> float:
    """Peak resident memory of this process, MiB."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    except (OSError, IndexError):
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
