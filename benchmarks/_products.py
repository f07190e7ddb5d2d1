"""Floors of the similarity benchmarks: bare matrix products, with outputs allocated beforehand.

Tiled as the sweep tiles them, and each over the whole matrix at once where that fits; the faster of the two counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastcontrast.ops._dispatch import native
from fastcontrast.ops._sweep import COLUMNS, ROWS

from ._harness import Floor, Step
from ._pairs import Batch


def _buffer(*shape: int) -> Tensor:
    """On huge pages, as the sweep's own buffers: a floor must not be slower for its pages."""
    buffer = torch.empty(shape)
    if native is not None and buffer.nbytes >= 4 << 20:
        native.huge_pages(buffer.data_ptr(), buffer.nbytes)
    return buffer


def _tiles(m: int, n: int, rows_outermost: bool = False) -> Iterator[tuple[slice, slice]]:
    rows = [slice(i, min(i + ROWS, m)) for i in range(0, m, ROWS)]
    columns = [slice(j, min(j + COLUMNS, n)) for j in range(0, n, COLUMNS)]
    return ((i, j) for i in rows for j in columns) if rows_outermost else ((i, j) for j in columns for i in rows)


def _into(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    if first:
        torch.mm(a, b, out=out)
    else:
        out.addmm_(a, b)


def tiled(products: int, batch: Batch, part: int = 1, kept: bool = True) -> Step:
    """4: every tile twice, and both gradients; 3: tiles kept, or unless `kept` each used up at once; 2: one pass, one
    gradient; 1: no gradient. `part`: 1/part of the rows."""
    q, k = batch.queries.detach(), batch.keys.detach()
    q = q[: len(q) // part]
    m, n = len(q), len(k)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    kept = kept and products == 3
    buffer = _buffer(m * n if kept else min(m, ROWS) * min(n, COLUMNS))

    def tile(i: slice, j: slice) -> Tensor:
        rows, columns = i.stop - i.start, j.stop - j.start
        start = i.start * n + rows * j.start if kept else 0
        return buffer[start : start + rows * columns].view(rows, columns)

    def step() -> None:
        if products == 4 or kept:
            for i, j in _tiles(m, n):
                torch.mm(q[i], k[j].T, out=tile(i, j))
        for i, j in _tiles(m, n, rows_outermost=products == 2):
            t = tile(i, j)
            if not kept:
                torch.mm(q[i], k[j].T, out=t)
            if products > 1:
                _into(dq[i], t, k[j], first=not j.start)
            if products > 2:
                _into(dk[j], t.T, q[i], first=not i.start)

    return step


def whole(products: int, batch: Batch) -> Step:
    """The same products, each over the whole matrix."""
    q, k = batch.queries.detach(), batch.keys.detach()
    logits, dq, dk = _buffer(len(q), len(k)), torch.empty_like(q), torch.empty_like(k)

    def step() -> None:
        torch.mm(q, k.T, out=logits)
        if products == 4:
            torch.mm(q, k.T, out=logits)
        if products > 1:
            torch.mm(logits, k, out=dq)
        if products > 2:
            torch.mm(logits.T, q, out=dk)

    return step


def _set(batch: Batch, views: bool) -> Tensor:
    return torch.cat([batch.queries, batch.keys]).detach() if views else batch.queries.detach()


def symmetric_tiled(batch: Batch, views: bool = True) -> Step:
    """Tiles on and above the diagonal, twice, each into the gradients of its rows and of its columns: 2 products."""
    z = _set(batch, views)
    n, dz = len(z), torch.empty_like(z)
    buffer = _buffer(min(n, ROWS) ** 2)
    blocks = [slice(i, min(i + ROWS, n)) for i in range(0, n, ROWS)]
    upper = [(i, j) for i in blocks for j in blocks if j.start >= i.start]

    def step() -> None:
        for gradients in (False, True):
            for i, j in upper:
                rows, columns = i.stop - i.start, j.stop - j.start
                t = buffer[: rows * columns].view(rows, columns)
                torch.mm(z[i], z[j].T, out=t)
                if gradients:
                    _into(dz[i], t, z[j], first=not j.start)
                    if i != j:
                        _into(dz[j], t.T, z[i], first=not i.start)

    return step


def symmetric_whole(batch: Batch, views: bool = True) -> Step:
    z = _set(batch, views)
    logits, dz = _buffer(len(z), len(z)), torch.empty_like(z)

    def step() -> None:
        torch.mm(z, z.T, out=logits)
        torch.mm(logits, z, out=dz)

    return step


def floor(products: int, **options) -> dict[str, Floor]:
    """`options`: of `tiled`."""
    return {
        f"{products} product{'s' if products > 1 else ''}": Floor(
            {"tiled": partial(tiled, products, **options), "whole": partial(whole, products)}
        )
    }


def symmetric_floor(views: bool = True) -> dict[str, Floor]:
    variants = {"tiled": partial(symmetric_tiled, views=views), "whole": partial(symmetric_whole, views=views)}
    return {"2 products": Floor(variants)}
