"""Late interaction: each query token's best document token, summed, without the scores of all pairs of tokens.

S_bc = Σ_i max_j ⟨q_bi, d_cj⟩        over the real tokens i of query b and j of document c

dq_bi = Σ_c g_bc d_{c,j*},   dd_cj = Σ_{(b,i): j*(b,i,c) = j} g_bc q_bi,   j*(b,i,c) the first of the best tokens

The backward needs the winners j* [C, B, Tq] alone: of the scores [B, C, Tq, Td] there is never more than a tile.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from . import _check as check
from . import _workspace
from ._dispatch import choose, native, refuse_cpu, refuse_triton, register
from ._inference import CODES, last_contiguous, wide
from ._precision import float32, no_second_backward, refuse_second_gradient, without_autocast

OP = "maxsim"
MASKED = ("neg_inf", "zero")
ROWS, COLUMNS = 2048, 512  # of a tile: document tokens, and query tokens

register(OP, {"cpu": refuse_cpu, "triton": refuse_triton})


# ---------------------------------------------------------------------------------------------------------- reference


@without_autocast
def _reference(
    queries: Tensor,  # [B, Tq, D]
    documents: Tensor,  # [C, Td, D]
    query_mask: Tensor | None,  # [B, Tq]
    document_mask: Tensor | None,  # [C, Td]
    zero: bool,
) -> Tensor:
    b, c = queries.shape[0], documents.shape[0]
    queries, documents = _real(queries, query_mask), _real(documents, document_mask)
    scores = torch.einsum("bid,cjd->bcij", queries, documents)
    if not scores.shape[3]:
        best = scores.sum(3) - torch.inf
    else:
        if document_mask is not None:
            scores = scores.masked_fill(~document_mask[None, :, None], 0.0 if zero else -torch.inf)
        best = scores.gather(3, scores.argmax(3, keepdim=True))[..., 0]  # the first of equals, and NaN before numbers
    best = best.masked_fill(best.isneginf(), -torch.inf)  # which has no gradient
    if query_mask is not None:
        best = best.masked_fill(~query_mask[:, None], 0.0)
    return best.sum(2).view(b, c)


def _real(x: Tensor, mask: Tensor | None) -> Tensor:
    """In the width of the result, with nothing read from padding."""
    x = x.to(wide(x.dtype))
    return x if mask is None else x.masked_fill(~mask[..., None], 0.0)


# ----------------------------------------------------------------------------------------------------- implementations


def _cpu(
    queries: Tensor,  # [B, Tq, D]
    documents: Tensor,  # [C, Td, D]
    query_mask: Tensor | None,  # [B, Tq]
    document_mask: Tensor | None,  # [C, Td]
    zero: bool,
    need: bool,
) -> tuple[Tensor, Tensor]:
    """S [B, C] and, if `need`, the winners [C, B, Tq], −1 where no token gets a gradient."""
    (b, tq, d), (c, td) = queries.shape, documents.shape[:2]
    scores, winners = queries.new_zeros(b, c, dtype=torch.float32), _empty_winners(queries, documents, need)
    columns = float32(queries).reshape(b * tq, d).t()
    several = max(1, ROWS // max(td, 1))
    most = max(1, min(COLUMNS, ROWS * COLUMNS // max(several * td, 1)))
    buffer = _workspace.buffer(min(most, b * tq) * min(several, c) * td)
    for c0 in range(0, c, several):
        c1 = min(c0 + several, c)
        rows = float32(documents[c0:c1]).reshape((c1 - c0) * td, d)
        for b0, b1, i0, i1 in _token_blocks(b, tq, most):
            begin, end = b0 * tq + i0, (b1 - 1) * tq + i1
            tile = buffer[: rows.shape[0] * (end - begin)].view(rows.shape[0], end - begin)
            torch.mm(rows, columns[:, begin:end], out=tile)
            native.maxsim_fold(
                tile.data_ptr(), _at(query_mask, begin), _at(document_mask, c0 * td), _at(scores, b0 * c + c0),
                _at(winners, c0 * b * tq + begin) if need else 0, (b1 - b0, i1 - i0, c1 - c0, td), (c, b * tq),
                zero, winners.dtype == torch.int32, torch.get_num_threads(),
            )  # fmt: skip
    return scores, winners


def _at(x: Tensor | None, element: int) -> int:
    """Address of an element, 0 for no tensor."""
    return 0 if x is None else x.data_ptr() + element * x.element_size()


def _token_blocks(b: int, tq: int, most: int):
    """(b0, b1, i0, i1): tokens [i0, i1) of queries [b0, b1), `most` of them; whole queries where they fit."""
    if tq <= most:
        several = most // max(tq, 1)
        yield from ((b0, min(b0 + several, b), 0, tq) for b0 in range(0, b if tq else 0, several))
    else:
        yield from ((i, i + 1, i0, min(i0 + most, tq)) for i in range(b) for i0 in range(0, tq, most))


def _cpu_backward(
    queries: Tensor,  # [B, Tq, D]
    documents: Tensor,  # [C, Td, D]
    winners: Tensor,  # [C, B, Tq]
    gradient: Tensor,  # [B, C]
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    (b, tq, d), (c, td) = queries.shape, documents.shape[:2]
    wide_winners = winners.dtype == torch.int32
    sides = ((native.maxsim_queries, queries, documents), (native.maxsim_documents, documents, queries))
    found = []
    for need, (run, like, other) in zip(needs, sides, strict=True):
        out = _workspace.empty(like.new_empty(0, dtype=torch.float32), *like.shape) if need else None
        if need:
            run(
                winners.data_ptr(), wide_winners, gradient.data_ptr(), other.data_ptr(), out.data_ptr(),
                (b, tq, c, td, d), other.stride()[:2], CODES[other.dtype], torch.get_num_threads(),
            )  # fmt: skip
        found.append(out)
    return tuple(found)


def _empty_winners(queries: Tensor, documents: Tensor, need: bool) -> Tensor:
    dtype = torch.int16 if documents.shape[1] < 1 << 15 else torch.int32
    shape = (documents.shape[0], *queries.shape[:2]) if need else (0,)
    return queries.new_empty(shape, dtype=dtype)


def _triton(queries, documents, query_mask, document_mask, zero, need):
    kernels = importlib.import_module("fastcontrast.kernels.maxsim")
    winners = _empty_winners(queries, documents, need)
    return kernels.maxsim(queries, documents, query_mask, document_mask, zero, winners if need else None), winners


def _triton_backward(queries, documents, winners, gradient, needs):
    kernels = importlib.import_module("fastcontrast.kernels.maxsim")
    workspace = _workspace.workspace_bytes(None, queries.device)
    return kernels.maxsim_backward(queries, documents, winners, gradient, needs, workspace)


IMPLEMENTATIONS = {"cpu": (_cpu, _cpu_backward), "triton": (_triton, _triton_backward)}


# -------------------------------------------------------------------------------------------- torch.library, autograd

_library = torch.library.Library("fastcontrast", "FRAGMENT")
_library.define(
    "maxsim(Tensor queries, Tensor documents, Tensor? query_mask, Tensor? document_mask, bool zero, bool need, "
    "str implementation) -> (Tensor scores, Tensor winners)"
)
_library.define(
    "maxsim_backward(Tensor queries, Tensor documents, Tensor winners, Tensor gradient, bool[2] needs, "
    "str implementation) -> (Tensor queries, Tensor documents)"
)


def _forward(*arguments):
    *problem, implementation = arguments
    return IMPLEMENTATIONS[implementation][0](*problem)


def _fake(queries, documents, query_mask, document_mask, zero, need, implementation):
    scores = queries.new_empty(queries.shape[0], documents.shape[0], dtype=torch.float32)
    return scores, _empty_winners(queries, documents, need)


def _gradients(queries, documents, winners, gradient, needs, implementation):
    gradient = gradient.float().contiguous()
    found = IMPLEMENTATIONS[implementation][1](queries, documents, winners, gradient, needs)
    inputs = (queries, documents)
    return tuple(x.new_empty(0) if g is None else g.to(x.dtype) for g, x in zip(found, inputs, strict=True))


def _gradients_fake(queries, documents, winners, gradient, needs, implementation):
    inputs = zip((queries, documents), needs, strict=True)
    return tuple(x.new_empty(x.shape if need else (0,)) for x, need in inputs)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.implementation = inputs[-1]


def _backward(ctx, gradient, _, run=torch.ops.fastcontrast.maxsim_backward):
    needs = ctx.needs_input_grad[:2]
    found = run(*ctx.saved_tensors, gradient, [*needs], ctx.implementation)
    return *(g if need else None for g, need in zip(found, needs, strict=True)), *[None] * 5


_library.impl("maxsim", _forward, "CompositeExplicitAutograd")
_library.impl("maxsim_backward", _gradients, "CompositeExplicitAutograd")
torch.library.register_fake("fastcontrast::maxsim", _fake, lib=_library)
torch.library.register_fake("fastcontrast::maxsim_backward", _gradients_fake, lib=_library)
torch.library.register_autograd("fastcontrast::maxsim", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("fastcontrast::maxsim_backward", no_second_backward(OP), lib=_library)


class _Eager(torch.autograd.Function):
    """The same autograd as the registered operation, without its dispatch."""

    @staticmethod
    def forward(ctx, *inputs):
        scores, winners = _forward(*inputs)
        _setup_context(ctx, inputs, (scores, winners))
        return scores

    @staticmethod
    def backward(ctx, gradient):
        refuse_second_gradient(OP, reference=True)
        return _backward(ctx, gradient, None, run=_gradients)


# --------------------------------------------------------------------------------------------------------------- public


def maxsim(
    queries: Tensor,  # [B, Tq, D]
    documents: Tensor,  # [C, Td, D]
    *,
    query_mask: Tensor | None = None,  # [B, Tq] bool
    document_mask: Tensor | None = None,  # [C, Td] bool
    masked: str = "neg_inf",
    implementation: str | None = None,
) -> Tensor:
    """S [B, C], S_bc = Σ_i max_j ⟨queries_bi, documents_cj⟩, ColBERT's late interaction.

    Equivalent to `einsum("bid,cjd->bcij", queries, documents).amax(3).sum(2)` in float32 without masks, in memory for
    a tile of the scores and, where a gradient is wanted, the winners [C, B, Tq] (two bytes each up to Td = 32,767).

    Args:
        queries, documents: [B, Tq, D], [C, Td, D]; float32, bfloat16 or float16 (float64: dense reference), any
            strides, neither has to be of unit length.
        query_mask: [B, Tq] bool, False where a token is none (padding): it contributes 0. None: all are real.
        document_mask: [C, Td] bool, likewise; what a masked token does, `masked` says. Nothing is read from it.
        masked: "neg_inf": it never wins. "zero": its score is 0, as in trainers that multiply scores by the mask; it
            wins where all real scores are negative (or 0 behind it), and then no gradient flows.
        implementation: None (the best that can run), "cpu", "triton" or "reference".

    Returns float32 (float64 for float64); products, maxima and sums are float32. The first of equal tokens is the best.
    A query without a real token has S = 0. A document without a token that could win (Td = 0; "neg_inf" and all
    masked) has S = −inf for every query with a real token, and no gradient. NaN counts as the largest score, and gives
    NaN in its pairs. Bit-identical from run to run. A gradient of the gradient has only the reference.

    Raises: ValueError or TypeError naming the argument, what was expected and what came; NotImplementedError if the
    requested implementation cannot run, with the reason.

    Source: Khattab and Zaharia, "ColBERT: Efficient and Effective Passage Search via Contextualized Late Interaction
    over BERT" (2020).
    """
    check.tensor(OP, "queries", queries, 3, "[B, Tq, D]")
    check.tensor(OP, "documents", documents, 3, "[C, Td, D]")
    if documents.shape[2] != queries.shape[2]:
        raise ValueError(
            f"{OP}: documents must be [C, Td, {queries.shape[2]}] to match queries, got {list(documents.shape)}"
        )
    check.same_kind(OP, "documents", documents, queries)
    query_mask = _check_mask("query_mask", query_mask, queries, "queries")
    document_mask = _check_mask("document_mask", document_mask, documents, "documents")
    check.one_of(OP, "masked", masked, MASKED)
    chosen = choose(OP, implementation, queries.device, queries.dtype)
    if chosen == "reference":
        return _reference(queries, documents, query_mask, document_mask, masked == "zero")
    need = torch.is_grad_enabled() and (queries.requires_grad or documents.requires_grad)
    inputs = last_contiguous(queries), last_contiguous(documents), query_mask, document_mask, masked == "zero", need
    if torch.compiler.is_compiling():
        return torch.ops.fastcontrast.maxsim(*inputs, chosen)[0]
    return _Eager.apply(*inputs, chosen) if need else _forward(*inputs, chosen)[0]


def _check_mask(name: str, mask: Any, like: Tensor, like_name: str) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = str(mask.dtype).removeprefix("torch.") if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{OP}: {name} must be a bool tensor, got {got}")
    if mask.shape != like.shape[:2]:
        raise ValueError(f"{OP}: {name} must be {list(like.shape[:2])} like {like_name}, got {list(mask.shape)}")
    check.same_kind(OP, name, mask, like, dtype=False, like_name=like_name)
    return mask.contiguous()
