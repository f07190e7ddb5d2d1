"""The k largest (or smallest) inner products of each query, without the matrix of all of them.

(values_i, indices_i) = topk_j ⟨q_i, k_j⟩  over the keys j that are candidates of row i

dq_i = Σ_s g_is k_j(i,s),      dk_j = Σ_{(i,s): j(i,s) = j} g_is q_i          for upstream gradients g of the values
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _check as check
from . import _sweep
from ._dispatch import choose, native, refuse_cpu, refuse_torch, register
from ._precision import no_second_backward, without_autocast
from ._sweep import address
from ._workspace import workspace_bytes
from .similarity_lse import rows_contiguous


def _refuse_streamed(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:  # a value and its index would not fit into the 64 bits that are compared
        return "it takes float32, bfloat16 or float16, got float64"
    return refuse_torch(device, dtype)


register("similarity_topk", {"cpu": refuse_cpu, "torch": _refuse_streamed})


# ---------------------------------------------------------------------------------------------------------- reference


@without_autocast
def _reference(queries, keys, k, query_ids, key_ids, limit, largest) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    scores = queries.to(dtype) @ keys.to(dtype).t()
    dropped = _dropped(scores, query_ids, key_ids, limit, largest)
    ranked = scores.detach() if largest else -scores.detach()
    order = torch.argsort(ranked, dim=1, descending=True, stable=True)  # NaN first, equals as they come
    last = torch.argsort(dropped.gather(1, order).byte(), dim=1, stable=True)
    indices = order.gather(1, last)[:, :k]
    none = dropped.gather(1, indices)
    return scores.gather(1, indices).masked_fill(none, _worst(largest)), indices.masked_fill(none, -1)


def _dropped(scores, query_ids, key_ids, limit, largest) -> Tensor:
    dropped = torch.zeros_like(scores, dtype=torch.bool)
    if query_ids is not None:
        dropped |= query_ids[:, None] == key_ids
    if limit is not None:
        dropped |= scores > limit[:, None] if largest else scores < limit[:, None]
    return dropped


def _worst(largest: bool) -> float:
    return float("-inf") if largest else float("inf")


# ------------------------------------------------------------------------------------------------------ implementations


def _native(queries, keys, k, query_ids, key_ids, limit, largest) -> tuple[Tensor, Tensor]:
    """Library products into a reused tile; in C++, what is better than the k-th best of a row so far is set aside."""
    sweep = _sweep.Sweep(queries, keys, torch.ones(()), None, _sweep.Masks())
    values = torch.empty(sweep.m, k, dtype=torch.float32)
    indices = torch.empty(sweep.m, k, dtype=torch.int64)
    best = native.Best(min(sweep.m, _sweep.ROWS), k, sweep.n, largest)
    conditions = [address(x) for x in (query_ids, key_ids, limit)]
    for i0, m, j0, n in sweep.tiles(0, rows_outermost=True):
        tile = sweep.tile(i0, m, j0, n)
        torch.mm(sweep.queries_block(i0, m), sweep.keys_block(j0, n).t(), out=tile)
        best.fold(sweep.native_tile(tile, i0, j0), *conditions, sweep.threads)
        if j0 + n == sweep.n:
            best.finish(values[i0:].data_ptr(), indices[i0:].data_ptr(), m, sweep.threads)
    return values, indices


NOTHING = torch.iinfo(torch.int64).min  # less than any rank
LARGEST, LAST = (1 << 31) - 1, (1 << 32) - 1


def _streamed(queries, keys, k, query_ids, key_ids, limit, largest) -> tuple[Tensor, Tensor]:
    """torch.topk of blocks, over ranks that order as the pairs (value, −index) do: equals then have one order only."""
    m, n, sign = queries.shape[0], keys.shape[0], 1.0 if largest else -1.0
    columns = min(n, max(2 * k, 4 * _sweep.COLUMNS))
    entry = 4 + 3 * 8  # of scores, ranks and what topk copies
    rows = max(1, min(m, workspace_bytes(None, queries.device) // (entry * columns)))
    index = LAST - torch.arange(n, device=queries.device)
    best = torch.empty(m, k, dtype=torch.int64, device=queries.device)
    for i in range(0, m, rows):
        q, kept = queries[i : i + rows].float(), best.new_empty(min(rows, m - i), 0)
        for j in range(0, n, columns):
            scores = q @ keys[j : j + columns].float().t()
            ids = (None, None) if query_ids is None else (query_ids[i : i + rows], key_ids[j : j + columns])
            dropped = _dropped(scores, *ids, None if limit is None else limit[i : i + rows], largest)
            ranks = (_monotone(scores.mul_(sign)).long() << 32 | index[j : j + columns]).masked_fill_(dropped, NOTHING)
            kept = torch.cat([kept, ranks], 1).topk(k).values
        best[i : i + rows] = kept
    none = best == NOTHING
    values = _bits((best >> 32).int()).view(torch.float32).mul_(sign).masked_fill_(none, _worst(largest))
    return values.add_(0.0), (LAST - (best & LAST)).masked_fill_(none, -1)


def _monotone(scores: Tensor) -> Tensor:
    """int32 that order as the scores do: −0 as +0, NaN as the largest."""
    return _bits(scores.add_(0.0).view(torch.int32)).masked_fill_(scores.isnan(), LARGEST)


def _bits(x: Tensor) -> Tensor:
    """Bits of a float to the integer that orders like it, and back."""
    return x ^ ((x >> 31) & LARGEST)


IMPLEMENTATIONS = {"cpu": _native, "torch": _streamed}


# -------------------------------------------------------------------------------------------- torch.library, autograd

_library = torch.library.Library("fastcontrast", "FRAGMENT")
_library.define(
    "similarity_topk(Tensor queries, Tensor keys, SymInt k, Tensor? query_ids, Tensor? key_ids, Tensor? limit,"
    " bool largest, str implementation) -> (Tensor values, Tensor indices)"
)
_library.define(
    "similarity_topk_backward(Tensor queries, Tensor keys, Tensor indices, Tensor gradient, bool[2] needs)"
    " -> (Tensor queries, Tensor keys)"
)


@without_autocast
def _forward(queries, keys, *rest):
    *problem, implementation = rest
    return IMPLEMENTATIONS[implementation](queries, keys, *problem)


@without_autocast
def _pairs_backward(queries, keys, indices, gradient, needs):
    """Both gradients are weighted sums over bags of rows: no [M, k, D], and in a fixed order on every device."""
    k, n = indices.shape[1], keys.shape[0]
    gradient = gradient.float()
    dq, dk = (queries.new_empty(0, dtype=torch.float32) for _ in range(2))
    if needs[0]:
        # A slot without a key repeats the row's first with weight 0; a row without any has key 0, and is put right.
        bags = indices.where(indices >= 0, indices[:, :1]).clamp(min=0)
        weights = gradient.masked_fill(indices < 0, 0.0)
        dq = F.embedding_bag(bags, keys.float(), per_sample_weights=weights, mode="sum")
        dq = dq.masked_fill_(indices[:, :1] < 0, 0.0).to(queries.dtype)
    if needs[1]:
        key, pair = torch.sort(indices.flatten(), stable=True)
        starts = torch.searchsorted(key, torch.arange(-1, n, device=key.device))
        weights = gradient.flatten()[pair]
        dk = F.embedding_bag(pair // k, queries.float(), starts, per_sample_weights=weights, mode="sum")
        dk = dk[1:].to(keys.dtype)  # the first bag holds the slots without a key
    return dq, dk


def _forward_fake(queries, keys, k, *rest):
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


def _backward_fake(queries, keys, indices, gradient, needs):
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else x.new_empty(0, dtype=torch.float32)
        for x, need in zip((queries, keys), needs, strict=True)
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, gradient, unused, run=None):
    run = run or torch.ops.fastcontrast.similarity_topk_backward
    needs = [*ctx.needs_input_grad[:2]]
    gradients = run(*ctx.saved_tensors, gradient, needs)
    return (*(x if need else None for x, need in zip(gradients, needs, strict=True)), *(None,) * 6)


_library.impl("similarity_topk", _forward, "CompositeExplicitAutograd")
_library.impl("similarity_topk_backward", _pairs_backward, "CompositeExplicitAutograd")
torch.library.register_fake("fastcontrast::similarity_topk", _forward_fake, lib=_library)
torch.library.register_fake("fastcontrast::similarity_topk_backward", _backward_fake, lib=_library)
torch.library.register_autograd("fastcontrast::similarity_topk", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd(
    "fastcontrast::similarity_topk_backward", no_second_backward("similarity_topk"), lib=_library
)


class _Eager(torch.autograd.Function):
    """The same autograd as the registered operation without its dispatch, which a small batch would feel."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *gradients):
        # Under create_graph=True the registered operation runs, whose own backward refuses.
        return _backward(ctx, *gradients, run=None if torch.is_grad_enabled() else _pairs_backward)


# --------------------------------------------------------------------------------------------------------------- public


def similarity_topk(
    queries: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    k: int,
    *,
    query_ids: Tensor | None = None,  # [M] integer
    key_ids: Tensor | None = None,  # [N] integer
    limit: Tensor | float | None = None,  # [M]
    largest: bool = True,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """values, indices [M, k] = torch.topk(queries @ keysᵀ, k, dim=1, largest), best first, among each row's candidates.

    Memory is that of the result and a tile, time that of one product: hard negatives, retrieval, recall at k.

    Args:
        queries, keys: [M, D], [N, D]; float32, bfloat16 or float16 (float64: dense reference), any strides.
        k: 1 … N.
        query_ids, key_ids: keys whose id is the query's are no candidates: duplicates, known positives, and with
            `arange(N)` twice the query itself.
        limit: number or [M]; keys with ⟨q_i, k_j⟩ > limit_i (for the smallest: < limit_i) are no candidates, being
            taken for false negatives. No gradient.
        implementation: None (the best that can run), "cpu", "torch" (any device) or "reference".

    Returns values, float32 (float64 for float64), with a gradient to the queries and keys that were selected, and their
    indices, int64. Products are summed in float32. Of equal values the lower index comes first. Where a row has fewer
    than k candidates: −inf (for the smallest: inf) and index −1. NaN counts as better than any number, in both
    directions and beyond any limit, so that a row that met one shows it, with the key's index, in its first place.

    Raises: ValueError or TypeError naming the argument, what was expected and what came; NotImplementedError if the
    requested implementation cannot run, with the reason.
    """
    op = "similarity_topk"
    check.features(op, queries, keys)
    _check_k(op, k, keys)
    masks = check.masks(op, queries, keys, query_ids, key_ids, -1, None, False)
    limit = None if limit is None else check.row_limit(op, "limit", limit, queries)
    chosen = choose(op, implementation, queries.device, queries.dtype)
    problem = (k, masks.query_ids, masks.key_ids, limit, bool(largest))
    if chosen == "reference":
        return _reference(queries, keys, *problem)
    run = torch.ops.fastcontrast.similarity_topk if torch.compiler.is_compiling() else _Eager.apply
    return run(rows_contiguous(queries), rows_contiguous(keys), *problem, chosen)


def _check_k(op: str, k, keys: Tensor) -> None:
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"{op}: k must be an integer, got {type(k).__name__}")
    if not 1 <= k <= keys.shape[0]:
        raise ValueError(f"{op}: k must lie in [1, {keys.shape[0]}], the number of keys, got {k}")
    if keys.shape[0] > LAST:
        raise ValueError(f"{op}: keys must be fewer than 2^32, got {keys.shape[0]}")
