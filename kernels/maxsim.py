"""Late interaction: the best document token of each query token and document, and gradients through the winners.

    best        products of BM query tokens with BN tokens of one document at a time: each row's largest, and its place
    queries     dq_bi = Σ_c g_bc d_{c,j*}: rows of documents gathered, a program for each query token
    documents   dd_cj = Σ g_bc q_bi over the query tokens that j won, which a stable sort of a document's winners puts
                next to each other: a program for each document token, and no atomics

Winners lie as [C, B · Tq], so that the rows of a tile are stored side by side. NaN is above every number.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import NO_INDEX, Case, Launch, interpreted, kind_of, meta, product, rounded, tile_of

BM, BN = 128, 64  # query tokens, and tokens of a document, of a tile of half precision: 64 registers of products
BM_EXACT, BN_EXACT = 32, 64  # of 64 rows, Triton 3.6 may make TF32 products on sm_100, whatever it is told
GROUP = 8  # tiles of query tokens that meet a document together
BC, BE, BD = 16, 8, 128  # documents, or query tokens that one token won, and width of a step of a gradient
SORTED_BYTES = 40  # for each winner while it is sorted: keys, places, and the sort's own of both

# -------------------------------------------------------------------------------------------------------------- forward


@triton.jit
def larger(a, b):
    """NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def first_place(score, high, j):
    """The first column where each row's `high` is; of NaN the first NaN."""
    at = tl.min(tl.where(score == high[:, None], j[None, :], NO_INDEX), 1)
    nan = high != high
    if tl.max(nan.to(tl.int32), 0) > 0:  # rare, and two more passes over the tile
        at = tl.where(nan, tl.min(tl.where(score != score, j[None, :], NO_INDEX), 1), at)
    return at


@triton.jit(do_not_specialize=["rows", "c", "td"])
def best_kernel(
    queries, documents, query_mask, document_mask, best, winners,
    rows, c, td, d, query_row, document_batch, document_row,
    ZERO: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """best [C, rows], 0 for a masked query token, and winners likewise where they are wanted."""
    tile, document = tile_of(tl.program_id(0), tl.cdiv(rows, BM), c, GROUP)
    document = document.to(tl.int64)
    i = tile * BM + tl.arange(0, BM)
    m_i = i < rows
    b_best, b_at = tl.full((BM,), -float("inf"), tl.float32), tl.full((BM,), -1, tl.int32)
    for j0 in range(0, td, BN):
        j = j0 + tl.arange(0, BN)
        m_j = j < td
        score = product(
            queries, documents + document * document_batch, None, None, d, query_row, document_row, i, j, m_i, m_j,
            BK, PRECISION, UPCAST, ALIGNED,
        )  # fmt: skip
        real = m_j
        if document_mask is not None:
            real = tl.load(document_mask + document * td + j, mask=m_j, other=0) != 0
        # Tiles without one go without the pass; and Triton 3.6 cannot lay the mask out for sm_100 but behind a branch.
        if tl.min(real.to(tl.int32), 0) == 0:
            other = tl.where(m_j, 0.0, -float("inf")) if ZERO else tl.full((BN,), -float("inf"), tl.float32)
            score = tl.where(real[None, :], score, other[None, :])
        high = tl.reduce(score, 1, larger)
        if winners is not None:
            take = (high > b_best) | ((high != high) & (b_best == b_best))
            b_at = tl.where(take, first_place(score, high, j), b_at)
        b_best = larger(b_best, high)
    if ZERO and winners is not None and document_mask is not None:
        real = tl.load(document_mask + document * td + b_at, mask=b_at >= 0, other=0) != 0
        b_at = tl.where(real, b_at, -1)
    if query_mask is not None:
        real = tl.load(query_mask + i, mask=m_i, other=0) != 0
        b_best, b_at = tl.where(real, b_best, 0.0), tl.where(real, b_at, -1)
    at = document * rows + i
    tl.store(best + at, b_best, mask=m_i)
    if winners is not None:
        tl.store(winners + at, b_at.to(winners.dtype.element_ty), mask=m_i)


# ------------------------------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=["rows", "tq", "c"])
def queries_kernel(
    winners, gradient, documents, dqueries, rows, tq, c, d, document_batch, document_row,
    BC: tl.constexpr, BD: tl.constexpr, TO_NEAREST: tl.constexpr,
):  # fmt: skip
    """dqueries [rows, D], in its dtype, from winners [C, rows] and gradient [B, C]."""
    parts = tl.cdiv(d, BD)
    row = (tl.program_id(0) // parts).to(tl.int64)
    o_d = tl.program_id(0) % parts * BD + tl.arange(0, BD)
    m_d = o_d < d
    acc = tl.zeros((BC, BD), tl.float32)
    for c0 in range(0, c, BC):
        o_c = c0 + tl.arange(0, BC)
        at = tl.load(winners + o_c.to(tl.int64) * rows + row, mask=o_c < c, other=-1).to(tl.int64)
        won = at >= 0
        g = tl.load(gradient + row // tq * c + o_c, mask=won, other=0.0)
        p_x = documents + (o_c.to(tl.int64) * document_batch + at * document_row)[:, None] + o_d[None, :]
        x = tl.load(p_x, mask=won[:, None] & m_d[None, :], other=0.0)
        acc += g[:, None] * x.to(tl.float32)
    tl.store(dqueries + row * d + o_d, rounded(tl.sum(acc, 0), dqueries, TO_NEAREST), mask=m_d)


@triton.jit(do_not_specialize=["rows", "tq", "c", "first", "td"])
def documents_kernel(
    order, bounds, gradient, queries, ddocuments, rows, tq, c, first, td, d, query_row,
    BE: tl.constexpr, BD: tl.constexpr, TO_NEAREST: tl.constexpr,
):  # fmt: skip
    """ddocuments [C, Td, D], in its dtype, of documents from `first` on.

    order [documents, rows]: their query tokens by winner; bounds [documents, Td + 1]: where each token's begin.
    """
    parts = tl.cdiv(d, BD)
    pair = (tl.program_id(0) // parts).to(tl.int64)
    document, token = pair // td, pair % td
    o_d = tl.program_id(0) % parts * BD + tl.arange(0, BD)
    m_d = o_d < d
    begin, end = tl.load(bounds + pair + document), tl.load(bounds + pair + document + 1)
    acc = tl.zeros((BE, BD), tl.float32)
    for e0 in range(begin, end, BE):
        e = e0 + tl.arange(0, BE)
        m_e = e < end
        row = tl.load(order + document * rows + e, mask=m_e, other=0)
        g = tl.load(gradient + row // tq * c + first + document, mask=m_e, other=0.0)
        x = tl.load(queries + (row * query_row)[:, None] + o_d[None, :], mask=m_e[:, None] & m_d[None, :], other=0.0)
        acc += g[:, None] * x.to(tl.float32)
    out = ddocuments + ((first + document) * td + token) * d + o_d
    tl.store(out, rounded(tl.sum(acc, 0), ddocuments, TO_NEAREST), mask=m_d)


# ------------------------------------------------------------------------------------------------------------- launches


def best_launch(
    queries: Tensor,  # [rows, D]
    documents: Tensor,  # [C, Td, D]
    query_mask: Tensor | None,  # [B, Tq]
    document_mask: Tensor | None,  # [C, Td]
    zero: bool,
    winners: Tensor | None,  # [C, B, Tq]
    kind: str | None = None,
) -> tuple[Launch, Tensor]:
    """The launch, and best [C, rows] that it fills."""
    (rows, d), (c, td) = queries.shape, documents.shape[:2]
    kind = kind or kind_of(queries.dtype)
    exact = kind == "float32"
    best = torch.empty(c, rows, dtype=torch.float32, device=queries.device)
    masks = (None if x is None else x.view(torch.uint8) for x in (query_mask, document_mask))
    strides = queries.stride(0), *documents.stride()[:2]
    sizes = (d, *strides)
    aligned = all(size % 8 == 0 for size in sizes)
    # Numbers loaded one by one, each with an address and a mask of its own, take registers.
    bm = BM_EXACT if exact else BM if aligned else BM // 2
    constants = {
        "ZERO": zero, "BM": bm, "BN": BN_EXACT if exact else BN,
        "BK": 16 if exact else 64 if kind == "half" and aligned else 32,
        "GROUP": GROUP, "PRECISION": "tf32" if kind == "tf32" else "ieee",
        "UPCAST": interpreted() and kind == "half",
        "ALIGNED": aligned and any(size % 16 for size in sizes),
    }  # fmt: skip
    arguments = queries, documents, *masks, best, winners, rows, c, td, *sizes
    # With a mask of documents four warps would spill on sm_100.
    options = {"num_warps": 4 if exact or document_mask is None else 8, "num_stages": 2 if exact else 3}
    if exact:
        options["maxnreg"] = 224  # the assembler likes 128, and spills to get there
    return Launch(best_kernel, (triton.cdiv(rows, bm) * c,), arguments, constants, options), best


def queries_launch(winners: Tensor, gradient: Tensor, documents: Tensor, dqueries: Tensor) -> Launch:
    b, tq, d = dqueries.shape
    c, constants = documents.shape[0], gradient_constants(dqueries)
    arguments = winners, gradient, documents, dqueries, b * tq, tq, c, d, *documents.stride()[:2]
    grid = (b * tq * triton.cdiv(d, constants["BD"]),)
    return Launch(queries_kernel, grid, arguments, {"BC": BC, **constants}, {"num_warps": 4})


def documents_launch(
    order: Tensor,  # [documents, rows]
    bounds: Tensor,  # [documents, Td + 1]
    gradient: Tensor,  # [B, C]
    queries: Tensor,  # [rows, D]
    ddocuments: Tensor,  # [C, Td, D]
    first: int,
) -> Launch:
    (b, c), (rows, d), td = gradient.shape, queries.shape, ddocuments.shape[1]
    constants = gradient_constants(ddocuments)
    arguments = order, bounds, gradient, queries, ddocuments, rows, rows // b, c, first, td, d, queries.stride(0)
    grid = (order.shape[0] * td * triton.cdiv(d, constants["BD"]),)
    return Launch(documents_kernel, grid, arguments, {"BE": BE, **constants}, {"num_warps": 1})


def gradient_constants(out: Tensor) -> dict[str, int | bool]:
    bd = min(BD, max(16, triton.next_power_of_2(out.shape[2])))
    return {"BD": bd, "TO_NEAREST": interpreted() and out.dtype == torch.bfloat16}


def maxsim(
    queries: Tensor,  # [B, Tq, D]
    documents: Tensor,  # [C, Td, D]
    query_mask: Tensor | None,  # [B, Tq]
    document_mask: Tensor | None,  # [C, Td]
    zero: bool,
    winners: Tensor | None,  # [C, B, Tq] int16 or int32
) -> Tensor:
    """Scores [B, C] fp32, and the winners where there is a tensor for them; the last dimensions have no gaps."""
    (b, tq, d), c = queries.shape, documents.shape[0]
    rows = queries.detach().reshape(b * tq, d)
    launch, best = best_launch(rows, documents.detach(), query_mask, document_mask, zero, winners)
    launch.run()
    return best.view(c, b, tq).sum(2).t().contiguous()


def maxsim_backward(
    queries: Tensor,  # [B, Tq, D]
    documents: Tensor,  # [C, Td, D]
    winners: Tensor,  # [C, B, Tq]
    gradient: Tensor,  # [B, C]
    needs: tuple[bool, bool],
    workspace: int,
) -> tuple[Tensor | None, Tensor | None]:
    """`workspace`: bytes that winners may take while they are sorted."""
    queries, documents = queries.detach(), documents.detach()
    dqueries = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device) if needs[0] else None
    ddocuments = torch.empty(documents.shape, dtype=documents.dtype, device=queries.device) if needs[1] else None
    if needs[0]:
        queries_launch(winners, gradient, documents, dqueries).run()
    if needs[1]:
        _document_gradients(winners, gradient, queries, ddocuments, workspace)
    return dqueries, ddocuments


def _document_gradients(winners, gradient, queries, ddocuments, workspace: int) -> None:
    """As many documents at a time as the workspace can sort the winners of."""
    (b, tq, d), (c, td) = queries.shape, ddocuments.shape[:2]
    if not b * tq:
        ddocuments.zero_()
        return
    rows = queries.reshape(b * tq, d)
    several = max(1, workspace // (SORTED_BYTES * b * tq))
    tokens = torch.arange(td + 1, dtype=winners.dtype, device=winners.device)
    for first in range(0, c, several):
        keys, order = winners[first : first + several].reshape(-1, b * tq).sort(dim=1, stable=True)
        bounds = torch.searchsorted(keys, tokens.expand(keys.shape[0], td + 1).contiguous())
        documents_launch(order, bounds, gradient, rows, ddocuments, first).run()


# -------------------------------------------------------------------------------------------------------- compile cases


def compile_cases(capability: tuple[int, int]) -> Iterator[Case]:
    """Queries of 32 tokens and documents of 180, as ColBERT's; masks and none; a width that is no multiple of 16."""
    b, tq, c, td = 32, 32, 1000, 180
    for kind, dtype in (("half", torch.bfloat16), ("tf32", torch.float32), ("float32", torch.float32)):
        for d in (128, 65) if kind == "half" else (128,):
            rows, documents = meta(b * tq, d, dtype=dtype), meta(c, td, d, dtype=dtype)
            masks = meta(b, tq, dtype=torch.bool), meta(c, td, dtype=torch.bool)
            winners, half = meta(c, b, tq, dtype=torch.int16), kind == "half"
            for case, given, zero, kept in (
                ("values", (None, None), False, None), ("", (None, None), False, winners),
                ("masks", masks, False, winners), ("masks zero", masks, True, winners),
            ):  # fmt: skip
                launch, _ = best_launch(rows, documents, *given, zero, kept, kind)
                yield Case(f"best {kind} {d} {case}", launch, half and d == 128, half and d == 128)
            if kind == "tf32":
                continue
            gradient, order = meta(b, c), meta(c, b * tq, dtype=torch.int64)
            dqueries, ddocuments = meta(b, tq, d, dtype=dtype), meta(c, td, d, dtype=dtype)
            yield Case(f"queries {kind} {d}", queries_launch(winners, gradient, documents, dqueries), False)
            bounds = meta(c, td + 1, dtype=torch.int64)
            yield Case(f"documents {kind} {d}", documents_launch(order, bounds, gradient, rows, ddocuments, 0), False)
