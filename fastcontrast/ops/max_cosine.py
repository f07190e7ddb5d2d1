"""For each candidate the largest cosine to its row's context, without the matrix of all of them.

value_bk = max_t ⟨c_bk, x_bt⟩ / (|c_bk| |x_bt|)  over the valid t,      index_bk = the first t that attains it

One read of the context: its norms come from the same pass. The degeneration penalty of contrastive search.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from . import _check as check
from . import _inference as inference
from ._dispatch import native, refuse_cpu, refuse_triton, register
from ._precision import without_autocast
from ._sweep import address

SMALLEST_NORM = 1e-12  # of a vector of zeros, whose cosines then are 0


register("max_cosine", {"cuda": inference.refuse_cuda, "triton": refuse_triton, "cpu": refuse_cpu})


# ---------------------------------------------------------------------------------------------------------- reference


@without_autocast
def _reference(candidates: Tensor, context: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = inference.wide(candidates.dtype)
    unit = [x / x.norm(dim=2, keepdim=True).clamp(min=SMALLEST_NORM) for x in (candidates.to(dtype), context.to(dtype))]
    cosines = unit[0] @ unit[1].mT  # [B, K, T]
    if valid is not None:
        cosines = cosines.masked_fill(~valid[:, None], -torch.inf)
    if not context.shape[1]:
        return cosines.new_full(cosines.shape[:2], -torch.inf), torch.full(cosines.shape[:2], -1, device=cosines.device)
    indices = cosines.argmax(2)  # the first of equals, and NaN before any number
    values = cosines.gather(2, indices[..., None])[..., 0]
    return values, indices.where(values != -torch.inf, -1)


# ----------------------------------------------------------------------------------------------------- implementations


def _native(candidates: Tensor, context: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    (b, k, d), t = candidates.shape, context.shape[1]
    values = torch.empty(b, k)
    indices = torch.empty(b, k, dtype=torch.int64)
    native.max_cosine(
        candidates.data_ptr(), context.data_ptr(), address(valid), values.data_ptr(), indices.data_ptr(), b, k, t, d,
        *candidates.stride()[:2], *context.stride()[:2], inference.CODES[candidates.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return values, indices


def _triton(candidates: Tensor, context: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    return importlib.import_module("fastcontrast.kernels.max_cosine").max_cosine(candidates, context, valid)


def _cuda(candidates: Tensor, context: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    from . import _cuda

    return _cuda.max_cosine(candidates, context, valid)


IMPLEMENTATIONS = {"cuda": _cuda, "triton": _triton, "cpu": _native, "reference": _reference}

_library = torch.library.Library("fastcontrast", "FRAGMENT")
_library.define(
    "max_cosine(Tensor candidates, Tensor context, Tensor? valid, str implementation)"
    " -> (Tensor values, Tensor indices)"
)


def _forward(candidates, context, valid, implementation):
    return IMPLEMENTATIONS[implementation](candidates, context, valid)


def _fake(candidates, context, valid, implementation):
    shape = candidates.shape[:2]
    values = candidates.new_empty(shape, dtype=inference.wide(candidates.dtype))
    return values, candidates.new_empty(shape, dtype=torch.int64)


_library.impl("max_cosine", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("fastcontrast::max_cosine", _fake, lib=_library)


# --------------------------------------------------------------------------------------------------------------- public


def max_cosine(
    candidates: Tensor,  # [B, K, D]
    context: Tensor,  # [B, T, D]
    valid: Tensor | None = None,  # [B, T] bool
    *,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """values, indices [B, K] = max over t of cos(candidates_bk, context_bt), and the first t that attains it.

    Equivalent to `(normalize(candidates, dim=2) @ normalize(context, dim=2).mT).max(dim=2)` in float32, in one read of
    the context and without [B, K, T]. Neither side has to be of unit length.

    Args:
        candidates, context: [B, K, D], [B, T, D]; float32, bfloat16 or float16 (float64: dense reference), any strides.
        valid: [B, T] bool, False where a position is no context (padding); None: all are.
        implementation: None (the best that can run), "cuda", "triton", "cpu" or "reference".

    Returns values, float32 (float64 for float64), and indices, int64. Norms, products and maxima are float32. A vector
    of zeros has cosine 0. A row without a valid position: −inf and index −1. NaN in gives NaN out for what met it.
    Only the reference has gradients: an input that requires one runs on it.

    Raises: ValueError or TypeError naming the argument, what was expected and what came; NotImplementedError if the
    requested implementation cannot run, with the reason.

    Source: the degeneration penalty of Su et al., "A Contrastive Framework for Neural Text Generation" (2022).
    """
    op = "max_cosine"
    valid = check_context(op, candidates, context, valid)
    chosen = inference.choose_inference(op, implementation, candidates, context)
    if chosen == "reference":
        return _reference(candidates, context, valid)
    candidates, context = inference.last_contiguous(candidates), inference.last_contiguous(context)
    run = torch.ops.fastcontrast.max_cosine if torch.compiler.is_compiling() else _forward
    return run(candidates, context, valid, chosen)


def check_context(op: str, candidates: Tensor, context: Tensor, valid: Tensor | None) -> Tensor | None:
    """Checks at the door; returns `valid` without gaps."""
    check.tensor(op, "candidates", candidates, 3, "[B, K, D]")
    check.tensor(op, "context", context, 3, "[B, T, D]")
    b, _, d = candidates.shape
    if context.shape[0] != b or context.shape[2] != d:
        raise ValueError(f"{op}: context must be [{b}, T, {d}] to match candidates, got {list(context.shape)}")
    if context.dtype != candidates.dtype or context.device != candidates.device:
        wanted, got = (f"{str(x.dtype).removeprefix('torch.')} on {x.device}" for x in (candidates, context))
        raise ValueError(f"{op}: context must be {wanted} like candidates, got {got}")
    if valid is None:
        return None
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
        got = str(valid.dtype).removeprefix("torch.") if isinstance(valid, Tensor) else type(valid).__name__
        raise TypeError(f"{op}: valid must be a bool tensor, got {got}")
    if valid.shape != context.shape[:2]:
        raise ValueError(f"{op}: valid must be {list(context.shape[:2])} like context, got {list(valid.shape)}")
    if valid.device != context.device:
        raise ValueError(f"{op}: valid must be on {context.device} like context, got {valid.device}")
    return valid.contiguous()
