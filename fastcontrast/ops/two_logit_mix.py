"""Two rows of logits to one distribution, and how far apart they are, in one visit of the vocabulary.

P = softmax(z₁), Q = softmax(z₀)
JSD = ½ KL(P ‖ M) + ½ KL(Q ‖ M),  M = (P + Q) / 2                                                   in [0, ln 2]
out = log softmax((1 + a) z₁ − a z₀)      a given, one a row, or max(JSD, floor)

AdaCAD: a = JSD. Context-aware decoding: a fixed. Classifier-free guidance g: a = g − 1. Contrastive decoding and DoLa:
z₁ kept once instead of 1 + a times, on the tokens that P finds plausible.
"""

from __future__ import annotations

import importlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _check as check
from . import _inference as inference
from ._dispatch import native, refuse_cpu, refuse_triton, register
from ._precision import without_autocast
from ._sweep import address

register("two_logit_mix", {"cuda": inference.refuse_cuda, "triton": refuse_triton, "cpu": refuse_cpu})


class Mix(NamedTuple):
    log_probabilities: Tensor  # [R, V]
    weight: Tensor  # [R]: a
    divergence: Tensor | None  # [R]: JSD(P, Q), if it was computed


class Settings(NamedTuple):
    """What a kernel is told beside the logits."""

    keep: float  # z₁ is taken `keep` times; NaN: 1 + a times
    floor: float  # of a, when it is the divergence
    threshold: float  # tokens with z₁ < max z₁ + threshold are implausible; −inf: none is
    diverge: bool  # the divergence is to be computed


# ---------------------------------------------------------------------------------------------------------- reference


@without_autocast
def _reference(z1: Tensor, z0: Tensor, weight: Tensor | None, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    z1, z0 = (z.to(inference.wide(z.dtype)) for z in (z1, z0))
    p, q = (_softmax(z) for z in (z1, z0))
    divergence = z1.new_full(z1.shape[:1], torch.nan)
    if settings.diverge:
        mean = (p + q) / 2
        # 0 · log 0 counts as 0
        terms = [torch.where(x > 0, x * (x / torch.where(x > 0, mean, 1.0)).log(), x) for x in (p, q)]
        divergence = ((terms[0] + terms[1]).sum(1) / 2).clamp(min=0.0)
    a = divergence.clamp(min=settings.floor) if weight is None else weight.to(z1.dtype)
    keep = 1 + a if math.isnan(settings.keep) else torch.full_like(a, settings.keep)
    banned = z1 == -torch.inf
    least = z0.masked_fill(z0 == -torch.inf, torch.inf).amin(1, keepdim=True)  # the most negative finite logit
    z0 = torch.where(z0 == -torch.inf, least.masked_fill(least == torch.inf, 0.0), z0)
    mixed = keep[:, None] * z1.masked_fill(banned, 0.0) - a[:, None] * z0
    banned = banned | (z1 < z1.amax(1, keepdim=True) + settings.threshold)
    mixed = mixed.masked_fill(banned, -torch.inf)
    out = mixed.log_softmax(1).masked_fill(banned.all(1, keepdim=True), -torch.inf)
    return out, a, divergence


def _softmax(z: Tensor) -> Tensor:
    """A row without a finite logit has probabilities 0."""
    return z.softmax(1).masked_fill((z == -torch.inf).all(1, keepdim=True), 0.0)


# ----------------------------------------------------------------------------------------------------- implementations


def _native(z1: Tensor, z0: Tensor, weight: Tensor | None, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocabulary = z1.shape
    out = torch.empty(rows, vocabulary)
    a, divergence = torch.empty(rows), torch.empty(rows)
    native.two_logit_mix(
        z1.data_ptr(), z0.data_ptr(), address(weight), out.data_ptr(), a.data_ptr(), divergence.data_ptr(),
        rows, vocabulary, z1.stride(0), z0.stride(0), *settings, inference.CODES[z1.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out, a, divergence


def _triton(*problem) -> tuple[Tensor, Tensor, Tensor]:
    return importlib.import_module("fastcontrast.kernels.two_logit_mix").two_logit_mix(*problem)


def _cuda(*problem) -> tuple[Tensor, Tensor, Tensor]:
    from . import _cuda

    return _cuda.two_logit_mix(*problem)


IMPLEMENTATIONS = {"cuda": _cuda, "triton": _triton, "cpu": _native, "reference": _reference}

_library = torch.library.Library("fastcontrast", "FRAGMENT")
_library.define(
    "two_logit_mix(Tensor logits, Tensor contrast, Tensor? weight, float keep, float floor, float threshold,"
    " bool diverge, str implementation) -> (Tensor log_probabilities, Tensor weight, Tensor divergence)"
)


def _forward(z1, z0, weight, keep, floor, threshold, diverge, implementation):
    return IMPLEMENTATIONS[implementation](z1, z0, weight, Settings(keep, floor, threshold, diverge))


def _fake(z1, z0, weight, keep, floor, threshold, diverge, implementation):
    dtype = inference.wide(z1.dtype)
    a, divergence = (z1.new_empty(z1.shape[:1], dtype=dtype) for _ in range(2))
    return z1.new_empty(z1.shape, dtype=dtype), a, divergence


_library.impl("two_logit_mix", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("fastcontrast::two_logit_mix", _fake, lib=_library)


# --------------------------------------------------------------------------------------------------------------- public


def two_logit_mix(
    logits: Tensor,  # [R, V]
    contrast: Tensor,  # [R, V]
    weight: Tensor | float | None = None,  # [R]
    *,
    keep: float | None = None,
    floor: float = 0.0,
    plausibility: float = 0.0,
    divergence: bool = False,
    implementation: str | None = None,
) -> Mix:
    """log_probabilities [R, V] = log_softmax((1 + a) · logits − a · contrast), a = weight or max(JSD, floor).

    Args:
        logits, contrast: z₁ and z₀, [R, V], of one vocabulary; float32, bfloat16 or float16 (float64: dense reference),
            any strides. Columns that only pad the vocabulary are to be sliced off.
        weight: a, a number or [R]; None: the Jensen–Shannon divergence (natural logarithm) of the two softmaxes of each
            row, at least `floor` (AdaCAD).
        keep: logits are taken `keep` times instead of 1 + a times (1: contrastive decoding, DoLa).
        plausibility: β in [0, 1]; tokens with P < β · max P get −inf. 0: none does. 1: only the most likely stay.
        divergence: compute it even where `weight` is given.
        implementation: None (the best that can run), "cuda", "triton", "cpu" or "reference".

    Returns `Mix(log_probabilities [R, V], weight [R], divergence [R] or None)`, float32 (float64 for float64). Equal
    rows have divergence 0 exactly. A token of −inf in `logits` stays −inf; one of −inf in `contrast` alone counts as
    that row's smallest finite logit. A row without any finite logit gives −inf. NaN in `logits`, or in `contrast` at
    a token that is neither banned nor implausible, gives NaN out in its row. Only the reference has gradients: an input
    that requires one runs on it.

    Raises: ValueError or TypeError naming the argument, what was expected and what came; NotImplementedError if the
    requested implementation cannot run, with the reason.

    Source: Wang et al., "AdaCAD" (2024); Shi et al., "Trusting Your Evidence" (2023); Li et al., "Contrastive Decoding"
    (2022); Chuang et al., "DoLa" (2023).
    """
    op = "two_logit_mix"
    check.tensor(op, "logits", logits, 2, "[R, V]")
    check.tensor(op, "contrast", contrast, 2, "[R, V]")
    if contrast.shape != logits.shape:
        raise ValueError(
            f"{op}: contrast must be {list(logits.shape)} like logits, of the same vocabulary, "
            f"got {list(contrast.shape)}"
        )
    if contrast.dtype != logits.dtype or contrast.device != logits.device:
        wanted, got = (f"{str(x.dtype).removeprefix('torch.')} on {x.device}" for x in (logits, contrast))
        raise ValueError(f"{op}: contrast must be {wanted} like logits, got {got}")
    for name, value, most in (("floor", floor, math.inf), ("plausibility", plausibility, 1.0)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
            raise ValueError(f"{op}: {name} must lie in [0, {most:g}], got {value!r}")
    weight = _weight(op, weight, logits)
    settings = Settings(
        math.nan if keep is None else float(keep),
        float(floor),
        math.log(plausibility) if plausibility else -math.inf,
        bool(divergence) or weight is None,
    )
    chosen = inference.choose_inference(op, implementation, logits, contrast, weight)
    if chosen == "reference":
        result = _reference(logits, contrast, weight, settings)
    else:
        run = torch.ops.fastcontrast.two_logit_mix if torch.compiler.is_compiling() else _forward
        result = run(*map(inference.last_contiguous, (logits, contrast)), weight, *settings, chosen)
    return Mix(result[0], result[1], result[2] if settings.diverge else None)


def _weight(op: str, weight: Tensor | float | None, logits: Tensor) -> Tensor | None:
    """The given weights as [R] in the dtype of the result."""
    if weight is None:
        return None
    dtype, rows = inference.wide(logits.dtype), logits.shape[0]
    if isinstance(weight, bool) or not isinstance(weight, (int, float, Tensor)):
        raise TypeError(f"{op}: weight must be a number, a tensor [{rows}] or None, got {type(weight).__name__}")
    if not isinstance(weight, Tensor):
        return torch.full((rows,), weight, dtype=dtype, device=logits.device)
    if weight.ndim and weight.shape != (rows,):
        raise ValueError(f"{op}: weight must be a number or [{rows}], got {list(weight.shape)}")
    return weight.to(logits.device, dtype).expand(rows).contiguous()
