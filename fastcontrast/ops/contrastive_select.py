"""The two halves of a step of contrastive search: which tokens are tried, and which of them is taken.

candidates: the k tokens of largest p = softmax(z)
selection:  argmax_k (1 − α) p_k − α max_t cos(h_k, h_t)      h_k the hidden state of candidate k, h_t of the context
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

import torch
from torch import Tensor

from . import _check as check
from . import _inference as inference
from ._dispatch import native, refuse_cpu, refuse_triton, register
from ._precision import without_autocast
from ._sweep import address
from .max_cosine import _reference as _max_cosine_reference
from .max_cosine import check_context

register("contrastive_select", {"cuda": inference.refuse_cuda, "triton": refuse_triton, "cpu": refuse_cpu})


class Selection(NamedTuple):
    choice: Tensor  # [B] int64: rank of the candidate that is taken
    score: Tensor  # [B, K]: (1 − α) p − α · degeneration; −inf where p = 0
    degeneration: Tensor  # [B, K]: largest cosine to the context


# ---------------------------------------------------------------------------------------------------------- reference


@without_autocast
def _candidates_reference(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    z = logits.to(inference.wide(logits.dtype))
    tokens = torch.argsort(z.detach(), dim=1, descending=True, stable=True)[:, :k]  # NaN first, equals as they come
    # Of a row without a finite logit the softmax is NaN; its probabilities count as 0.
    nothing = (z == -torch.inf).all(1, keepdim=True)
    return z.softmax(1).gather(1, tokens).masked_fill(nothing, 0.0), tokens


@without_autocast
def _select_reference(probabilities, candidates, context, valid, alpha) -> Selection:
    degeneration, _ = _max_cosine_reference(candidates, context, valid)
    p = probabilities.to(degeneration.dtype)
    penalty = degeneration.masked_fill(degeneration == -torch.inf, 0.0)
    score = ((1 - alpha) * p - alpha * penalty).masked_fill(p == 0, -torch.inf)
    return Selection(score.argmax(1), score, degeneration)


# ----------------------------------------------------------------------------------------------------- implementations


def _candidates_native(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows, vocabulary = logits.shape
    probabilities = torch.empty(rows, k)
    tokens = torch.empty(rows, k, dtype=torch.int64)
    native.contrastive_candidates(
        logits.data_ptr(), probabilities.data_ptr(), tokens.data_ptr(), rows, vocabulary, k, logits.stride(0),
        inference.CODES[logits.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return probabilities, tokens


def _select_native(probabilities, candidates, context, valid, alpha) -> Selection:
    (b, k, d), t = candidates.shape, context.shape[1]
    score, degeneration = torch.empty(b, k), torch.empty(b, k)
    choice, nearest = torch.empty(b, dtype=torch.int64), torch.empty(b, k, dtype=torch.int64)
    native.contrastive_select(
        probabilities.data_ptr(), candidates.data_ptr(), context.data_ptr(), address(valid), choice.data_ptr(),
        score.data_ptr(), degeneration.data_ptr(), nearest.data_ptr(), b, k, t, d, *candidates.stride()[:2],
        *context.stride()[:2], alpha, inference.CODES[candidates.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return Selection(choice, score, degeneration)


def _kernels():
    return importlib.import_module("fastcontrast.kernels.contrastive_select")


def _cuda():
    from . import _cuda

    return _cuda


CANDIDATES = {
    "cuda": lambda *problem: _cuda().contrastive_candidates(*problem),
    "triton": lambda *problem: _kernels().contrastive_candidates(*problem),
    "cpu": _candidates_native,
    "reference": _candidates_reference,
}
SELECT = {
    "cuda": lambda *problem: _cuda().contrastive_select(*problem),
    "triton": lambda *problem: _kernels().contrastive_select(*problem),
    "cpu": _select_native,
    "reference": _select_reference,
}

_library = torch.library.Library("fastcontrast", "FRAGMENT")
_library.define(
    "contrastive_candidates(Tensor logits, SymInt k, str implementation) -> (Tensor probabilities, Tensor tokens)"
)
_library.define(
    "contrastive_select(Tensor probabilities, Tensor candidates, Tensor context, Tensor? valid, float alpha,"
    " str implementation) -> (Tensor choice, Tensor score, Tensor degeneration)"
)


def _candidates(logits, k, implementation):
    return CANDIDATES[implementation](logits, k)


def _candidates_fake(logits, k, implementation):
    shape = (logits.shape[0], k)
    return logits.new_empty(shape, dtype=inference.wide(logits.dtype)), logits.new_empty(shape, dtype=torch.int64)


def _select(probabilities, candidates, context, valid, alpha, implementation):
    return tuple(SELECT[implementation](probabilities, candidates, context, valid, alpha))


def _select_fake(probabilities, candidates, context, valid, alpha, implementation):
    dtype = inference.wide(candidates.dtype)
    score, degeneration = (candidates.new_empty(candidates.shape[:2], dtype=dtype) for _ in range(2))
    return candidates.new_empty(candidates.shape[:1], dtype=torch.int64), score, degeneration


_library.impl("contrastive_candidates", _candidates, "CompositeExplicitAutograd")
_library.impl("contrastive_select", _select, "CompositeExplicitAutograd")
torch.library.register_fake("fastcontrast::contrastive_candidates", _candidates_fake, lib=_library)
torch.library.register_fake("fastcontrast::contrastive_select", _select_fake, lib=_library)


# --------------------------------------------------------------------------------------------------------------- public


def contrastive_candidates(logits: Tensor, k: int, *, implementation: str | None = None) -> tuple[Tensor, Tensor]:
    """probabilities, tokens [B, K] = the k largest of softmax(logits), largest first; equals by lower token.

    Equivalent to `logits.float().softmax(1).topk(k)`, with ties in order. Probabilities are of the whole vocabulary,
    not renormalised over the k.

    Args:
        logits: [B, V]; float32, bfloat16 or float16 (float64: dense reference), any strides.
        k: 1 … V.
        implementation: None (the best that can run), "cuda", "triton", "cpu" or "reference".

    Returns probabilities, float32 (float64 for float64), and tokens, int64. −inf has probability 0 and comes last; a
    row of nothing else has probabilities 0. NaN counts as larger than any number and makes its row's probabilities NaN.

    Raises: ValueError, TypeError, NotImplementedError as `max_cosine` does.
    """
    op = "contrastive_select"
    check.tensor(op, "logits", logits, 2, "[B, V]")
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"{op}: k must be an integer, got {type(k).__name__}")
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"{op}: k must lie in [1, {logits.shape[1]}], the vocabulary, got {k}")
    chosen = inference.choose_inference(op, implementation, logits)
    if chosen == "reference":
        return _candidates_reference(logits, k)
    run = torch.ops.fastcontrast.contrastive_candidates if torch.compiler.is_compiling() else _candidates
    return run(inference.last_contiguous(logits), k, chosen)


def contrastive_select(
    probabilities: Tensor,  # [B, K]
    candidates: Tensor,  # [B, K, D]
    context: Tensor,  # [B, T, D]
    valid: Tensor | None = None,  # [B, T] bool
    *,
    alpha: float,
    implementation: str | None = None,
) -> Selection:
    """choice [B] = argmax_k (1 − alpha) · probabilities_bk − alpha · max_t cos(candidates_bk, context_bt).

    Args:
        probabilities: [B, K], in the order in which equal scores are settled: the first wins. A candidate of
            probability 0 is not chosen as long as there is another.
        candidates, context, valid: hidden states and padding, as for `max_cosine`.
        alpha: 0 (probability alone) … 1 (dissimilarity alone).
        implementation: None (the best that can run), "cuda", "triton", "cpu" or "reference".

    Returns `Selection(choice [B] int64, score [B, K], degeneration [B, K])`; a row without context has degeneration
    −inf and no penalty. Reads the context once.

    Raises: ValueError, TypeError, NotImplementedError as `max_cosine` does.

    Source: Su et al., "A Contrastive Framework for Neural Text Generation" (2022), equation 5.
    """
    op = "contrastive_select"
    valid = check_context(op, candidates, context, valid)
    if not isinstance(probabilities, Tensor) or probabilities.shape != candidates.shape[:2]:
        got = list(probabilities.shape) if isinstance(probabilities, Tensor) else type(probabilities).__name__
        raise ValueError(f"{op}: probabilities must be {list(candidates.shape[:2])} like candidates, got {got}")
    if candidates.shape[1] < 1:
        raise ValueError(f"{op}: candidates must be at least one a row, got {list(candidates.shape)}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ValueError(f"{op}: alpha must lie in [0, 1], got {alpha!r}")
    chosen = inference.choose_inference(op, implementation, candidates, context, probabilities)
    if chosen == "reference":
        return _select_reference(probabilities, candidates, context, valid, alpha)
    problem = (
        probabilities.float().contiguous(), inference.last_contiguous(candidates), inference.last_contiguous(context),
        valid, float(alpha), chosen,
    )  # fmt: skip
    run = torch.ops.fastcontrast.contrastive_select if torch.compiler.is_compiling() else _select
    return Selection(*run(*problem))
