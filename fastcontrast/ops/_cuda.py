"""Calls of the CUDA C++ kernels, built where nvcc is: addresses in, one launch or a few, no synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from ._inference import CODES
from ._sweep import address

try:
    import fastcontrast._CUDA as native

    missing = None
except ImportError as error:
    native = None
    missing = f"the CUDA kernels are not built ({error}); they need nvcc at installation"

LARGEST = 1 << 32  # positions in a row that a kernel can tell apart

_refused: dict[int, str | None] = {}  # by device


def refuse(device: torch.device, dtype: torch.dtype) -> str | None:
    """Reason why a kernel cannot run on this CUDA device, or None."""
    if dtype not in CODES:
        return f"it takes float32, bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
    if missing is not None:
        return missing
    if not torch.cuda.is_available():
        return "torch sees no cuda device"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"it needs compute capability 8.0, the device has {'.'.join(map(str, capability))}"
    if torch.compiler.is_compiling():
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _refused:
        with torch.cuda.device(index):
            status = native.probe(index)  # a driver older than the toolkit, or a chip that it did not know
        _refused[index] = f"the CUDA kernels cannot run here: {native.error_string(status)}" if status else None
    return _refused[index]


def max_cosine(candidates: Tensor, context: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    b, k, _ = candidates.shape
    values = candidates.new_empty(b, k, dtype=torch.float32)
    indices = candidates.new_empty(b, k, dtype=torch.int64)
    if values.numel():
        problem, workspace = _cosines(candidates, context, valid)
        _run(native.max_cosine, values.device, problem, workspace.data_ptr(), values.data_ptr(), indices.data_ptr())
    return values, indices


def contrastive_candidates(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows, vocabulary = logits.shape
    _countable("the vocabulary", vocabulary)
    probabilities = logits.new_empty(rows, k, dtype=torch.float32)
    tokens = logits.new_empty(rows, k, dtype=torch.int64)
    if rows:
        splits = native.row_splits(rows, vocabulary, CODES[logits.dtype], _multiprocessors(logits))
        workspace = logits.new_empty(native.candidates_workspace(rows, splits), dtype=torch.int64)
        _run(
            native.contrastive_candidates, logits.device, logits.data_ptr(), probabilities.data_ptr(),
            tokens.data_ptr(), workspace.data_ptr(), rows, vocabulary, k, logits.stride(0), splits,
            CODES[logits.dtype],
        )  # fmt: skip
    return probabilities, tokens


def contrastive_select(
    probabilities: Tensor, candidates: Tensor, context: Tensor, valid: Tensor | None, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    b, k, _ = candidates.shape
    score, degeneration = (candidates.new_empty(b, k, dtype=torch.float32) for _ in range(2))
    choice = candidates.new_empty(b, dtype=torch.int64)
    if b:
        problem, workspace = _cosines(candidates, context, valid)
        _run(
            native.contrastive_select, score.device, problem, probabilities.data_ptr(), workspace.data_ptr(),
            choice.data_ptr(), score.data_ptr(), degeneration.data_ptr(), alpha,
        )  # fmt: skip
    return choice, score, degeneration


def two_logit_mix(z1: Tensor, z0: Tensor, weight: Tensor | None, settings) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocabulary = z1.shape
    out = z1.new_empty(rows, vocabulary, dtype=torch.float32)
    a, divergence = (z1.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if rows:
        splits = native.row_splits(rows, vocabulary, CODES[z1.dtype], _multiprocessors(z1))
        workspace = z1.new_empty(native.mixture_workspace(rows, splits), dtype=torch.float32)
        _run(
            native.two_logit_mix, z1.device, z1.data_ptr(), z0.data_ptr(), address(weight), out.data_ptr(),
            a.data_ptr(), divergence.data_ptr(), workspace.data_ptr(), rows, vocabulary, z1.stride(0), z0.stride(0),
            *settings, CODES[z1.dtype], splits,
        )  # fmt: skip
    return out, a, divergence


def _cosines(candidates: Tensor, context: Tensor, valid: Tensor | None):
    """What both cosine operations give to their first launch, and the memory between their two."""
    (b, k, d), t = candidates.shape, context.shape[1]
    _countable("the context", t)
    problem = native.Cosines(
        candidates.data_ptr(), context.data_ptr(), address(valid), b, k, t, d, *candidates.stride()[:2],
        *context.stride()[:2], CODES[candidates.dtype], _multiprocessors(candidates),
    )  # fmt: skip
    return problem, candidates.new_empty(problem.workspace, dtype=torch.int64)


def _countable(what: str, count: int) -> None:
    if count >= LARGEST:
        raise NotImplementedError(f"the CUDA kernels take {what} up to {LARGEST - 1} long, got {count}")


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def _run(kernel, device: torch.device, *arguments) -> None:
    """Launches on the current stream of the device."""
    with torch.cuda.device(device):
        status = kernel(*arguments, device.index, torch.cuda.current_stream(device).cuda_stream)
    if status:
        raise RuntimeError(f"{kernel.__name__}: {native.error_string(status)}")
