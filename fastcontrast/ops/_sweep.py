"""The schedule of a similarity sweep on the CPU: library matrix products into a reused tile, epilogues in between.

    for each tile (I, J):   tile = Q_I · K_Jᵀ              torch.mm into the buffer
                            lse(tile)                      forward: fold into the running max and sum of rows, columns
                            weights(tile)                  backward: tile becomes G
                            dQ_I += G · K_J,  dK_J += Gᵀ · Q_I

Nothing of size M × N is stored, except the first `keep` rows of logits when the workspace allows: those need no second
product in the backward. When `keys` is None the keys are the queries, the matrix is symmetric, and only tiles on and
above the diagonal are computed: each serves its rows and, as columns, the rows of its mirror image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ._dispatch import native
from ._workspace import POOLED_RESULTS, buffer

# 8 MiB of float32: large enough for the library's full speed, small enough to stay in a last-level cache.
ROWS, COLUMNS = 1024, 2048
TINY = torch.finfo(torch.float32).tiny
BLOCK = 16  # rows
MIN_KEPT_ROWS = 256  # a thinner first block would slow its product more than keeping it saves


class Masks(NamedTuple):
    """What is masked, as raw tensors: see `similarity_lse`. `positives` [M], -1 where a row protects nothing."""

    query_ids: Tensor | None = None  # [M] int64
    key_ids: Tensor | None = None  # [N] int64
    positives: Tensor | None = None  # [M] int64
    guide_queries: Tensor | None = None  # [M, Dg]
    guide_keys: Tensor | None = None  # [N, Dg]
    guide_limit: Tensor | None = None  # [M] fp32


class Targets(NamedTuple):
    """What a sigmoid loss takes for positive: see `similarity_softplus`."""

    query_labels: Tensor | None = None  # [M] int64
    key_labels: Tensor | None = None  # [N] int64
    dense: Tensor | None = None  # [M, N]
    high: float = 1.0
    low: float = 0.0


class Lse(NamedTuple):
    """One direction's log-sum-exp, `high + low`, and the index of each largest logit."""

    high: Tensor  # [M] fp32
    low: Tensor  # [M] fp32
    best: Tensor  # [M] int64; empty if not asked for


def kept_rows(m: int, n: int, workspace: int, guided: bool) -> int:
    """Rows of logits that fit into `workspace` bytes beside the tile buffers."""
    tiles = min(m, ROWS) * min(n, COLUMNS) * 4 * (2 if guided else 1)
    rows = max(0, workspace - tiles) // (4 * n) if n else 0
    return m if rows >= m else rows if rows >= MIN_KEPT_ROWS else 0


class Sweep:
    """The tiles of one problem, with the buffers that they share."""

    def __init__(self, queries: Tensor, keys: Tensor | None, scale: Tensor, key_bias: Tensor | None, masks: Masks):
        self.queries, self.keys = queries, keys
        self.symmetric = keys is None
        self.m, self.n = queries.shape[0], (queries if keys is None else keys).shape[0]
        self.threads = torch.get_num_threads()
        self.masks = masks
        self._keys_block: tuple[int, Tensor | None] = (-1, None)
        self.columns = ROWS if self.symmetric else COLUMNS
        self._buffer: Tensor | None = None
        self._guide_buffer: Tensor | None = None
        self.key_bias = None if key_bias is None else key_bias.float().contiguous()
        self.logits = native.Logits(
            scale=float(scale),
            key_bias=address(self.key_bias),
            query_ids=address(masks.query_ids),
            key_ids=address(masks.key_ids),
            guide_limit=address(masks.guide_limit),
            positives=address(masks.positives),
        )

    def widened(self) -> Sweep:
        """With wider tiles where few rows are kept, up to twice the area: each product begins with a wait of the
        threads for each other and a conversion of its operands. Two heads of 512 tokens take 1.19 times as long as four
        bare products on 4096 columns, 1.16 times on 8192."""
        self.columns = max(COLUMNS, 2 * ROWS * COLUMNS // max(1, self.m) // COLUMNS * COLUMNS)
        return self

    def row_blocks(self, keep: int) -> list[tuple[int, int]]:
        """(start, size); a boundary falls at `keep`, so that a block's logits are all kept or none."""
        return [*_blocks(0, keep, ROWS), *_blocks(keep, self.m, ROWS)]

    def tiles(self, keep: int, rows_outermost: bool = False) -> Iterator[tuple[int, int, int, int]]:
        """(i0, rows, j0, columns) of each tile."""
        rows, columns = self.row_blocks(keep), _blocks(0, self.n, self.columns)
        if self.symmetric:
            return ((*i, *j) for i in rows for j in rows if j[0] >= i[0])
        if rows_outermost:
            return ((*i, *j) for i in rows for j in columns)
        return ((*i, *j) for j in columns for i in rows)

    def queries_block(self, i0: int, rows: int) -> Tensor:  # [rows, D] fp32
        return (self.queries if rows == self.m else self.queries[i0 : i0 + rows]).float()

    def keys_block(self, j0: int, columns: int) -> Tensor:  # [columns, D] fp32
        if self._keys_block[0] != j0:  # columns are outermost: half-precision keys are converted once
            keys = self.queries if self.symmetric else self.keys
            self._keys_block = (j0, keys[j0 : j0 + columns].float())
        return self._keys_block[1]

    def tile(self, i0: int, rows: int, j0: int, columns: int, kept: Tensor | None = None) -> Tensor:
        """Where the tile's numbers go: [rows, columns] contiguous, in the kept logits or in the shared buffer.

        Kept logits lie tile after tile: with rows a power of two apart, a product would write into few cache sets.
        """
        if kept is not None and i0 < kept.shape[0]:
            return _view(kept.view(-1), i0 * self.n + rows * j0, rows, columns)
        if self._buffer is None:  # not before: with all logits kept, the forward needs none
            self._buffer = self.new_buffer()
        return _view(self._buffer, 0, rows, columns)

    def new_buffer(self) -> Tensor:
        return buffer(min(self.m, ROWS) * min(self.n, self.columns))

    def native_tile(self, tile: Tensor, i0: int, j0: int, *, guide: bool = True) -> object:
        rows, columns = tile.shape
        if self.masks.guide_queries is not None and guide:
            if self._guide_buffer is None:
                self._guide_buffer = self.new_buffer()
            similarity = _view(self._guide_buffer, 0, rows, columns)
            torch.mm(
                self.masks.guide_queries[i0 : i0 + rows].float(),
                self.masks.guide_keys[j0 : j0 + columns].float().t(),
                out=similarity,
            )
            return native.Tile(tile.data_ptr(), i0, rows, j0, columns, similarity.data_ptr())
        return native.Tile(tile.data_ptr(), i0, rows, j0, columns)


def _finish(state: object, count: int, best: bool, sum: Tensor | None = None) -> Lse:
    high, low = torch.empty(count, dtype=torch.float32), torch.empty(count, dtype=torch.float32)
    indices = torch.empty(count if best else 0, dtype=torch.int64)
    if state is not None:
        state.finish(high.data_ptr(), low.data_ptr(), indices.data_ptr(), address(sum))
    return Lse(high, low, indices)


def lse(sweep: Sweep, rows: bool, columns: bool, own: Tensor, best: bool, keep: int) -> tuple[Lse, Lse, Tensor]:
    """Log-sum-exp of rows and/or columns in one sweep, and the logits of the first `keep` rows [keep, N].

    `own` [M] receives the logit of each row's own column; empty if not wanted.
    """
    own_address = own.data_ptr() if own.numel() else 0
    row_state = native.Running(sweep.m, best) if rows else None
    column_state = native.Running(sweep.n, best) if columns else None
    kept = buffer(keep * sweep.n).view(keep, sweep.n)
    for i0, m, j0, n in sweep.tiles(keep):
        tile = sweep.tile(i0, m, j0, n, kept)
        torch.mm(sweep.queries_block(i0, m), sweep.keys_block(j0, n).t(), out=tile)
        mirror = (row_state if i0 != j0 else None) if sweep.symmetric else column_state
        native_tile = sweep.native_tile(tile, i0, j0)
        native.lse(sweep.logits, native_tile, row_state, mirror, own=own_address, threads=sweep.threads)
    r = _finish(row_state, sweep.m if rows else 0, best and rows)
    return r, _finish(column_state, sweep.n if columns else 0, best and columns), kept


def lse_and_mix(
    sweep: Sweep,
    own: Tensor,  # [M] or empty
    best: bool,
    values: Tensor | None = None,  # [N, Dv]; the keys themselves if None
    keep: int = 0,
    without_own: bool = False,
    out: Tensor | None = None,  # [M, Dv] fp32
) -> tuple[Lse, Tensor, Tensor, Tensor]:
    """Log-sum-exp of the rows and mix_i = Σ_j softmax_j(L_ij) v_j [M, Dv] in one sweep of two products.

    Mixing keys gives dq_i = scale · g_i · mix_i, whatever the gradient g. Also the softmax of the first `keep` rows, as
    exponentials [keep, N] times shares [tiles of columns, keep]. `without_own`: a row's own column counts in the
    log-sum-exp, and is 0 in what is mixed and kept. `out`: where the mix goes.
    """
    own_address = own.data_ptr() if own.numel() else 0
    state = native.Running(sweep.m, best)
    width = (sweep.queries if values is None else values).shape[1]
    mix = buffer(sweep.m * width).view(sweep.m, width) if out is None else out
    if not sweep.n:
        mix.zero_()
    rescale = torch.empty(min(sweep.m, ROWS), dtype=torch.float32)
    kept = buffer(keep * sweep.n).view(keep, sweep.n)
    shares = torch.ones(-(-sweep.n // sweep.columns) if keep else 0, keep, dtype=torch.float32)
    for i0, m, j0, n in sweep.tiles(keep, rows_outermost=True):
        k = sweep.keys_block(j0, n)
        tile = sweep.tile(i0, m, j0, n, kept)
        torch.mm(sweep.queries_block(i0, m), k.t(), out=tile)
        native_tile = sweep.native_tile(tile, i0, j0)
        native.lse(sweep.logits, native_tile, state, None, own_address, rescale.data_ptr(), without_own, sweep.threads)
        if j0:
            mix[i0 : i0 + m].mul_(rescale[:m, None])
            if i0 < keep:
                shares[: j0 // sweep.columns, i0 : i0 + m].mul_(rescale[:m])
        _add(mix, i0, tile, k if values is None else values[j0 : j0 + n].float(), first=not j0)
    total = torch.empty(sweep.m, dtype=torch.float32)
    lse = _finish(state, sweep.m, best, total)
    # A row with nothing left has sum 0 and mix 0.
    total.clamp_(min=TINY)
    return lse, mix.div_(total[:, None]), kept, shares.div_(total[:keep])


class Factor(NamedTuple):
    """How the scale gets into the gradients of queries and keys, and its own out of them.

    Inside the weights it costs no pass over the gradients; one that is nearly zero could not be divided out again.
    """

    scale: float
    inside: float  # what the weights are multiplied by

    @staticmethod
    def of(scale: Tensor) -> Factor:
        value = float(scale)
        return Factor(value, value if abs(value) > 1e-3 else 1.0)

    @staticmethod
    def sums(needs: tuple[bool, ...]) -> tuple[bool, bool]:
        """Which of G·K and Gᵀ·Q are needed for gradients to queries, keys and scale: the last comes from either."""
        need_queries, need_keys, need_scale = needs[:3]
        return need_queries or (need_scale and not need_keys), need_keys

    def scale_gradient(self, queries: Tensor, keys: Tensor | None, dq: Tensor | None, dk: Tensor | None) -> float:
        return (dot(dq, queries) if dq is not None else dot(dk, keys)) / self.inside

    def finish(self, *gradients: Tensor | None) -> None:
        """Multiplies by the scale what does not have it yet."""
        if self.inside != self.scale:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(self.scale)


class Sums(NamedTuple):
    """Where the gradients of one sweep go; those of the keys may already hold what other rows contributed."""

    queries: Tensor | None  # [M, D] fp32, G·K
    keys: Tensor | None  # [N, D] fp32, Gᵀ·Q
    key_bias: Tensor | None  # [N] fp32, ΣG over rows
    started: bool = False  # the keys' are added to, not overwritten

    @staticmethod
    def new(queries: Tensor, keys: Tensor | None, needs: tuple[bool, bool, bool]) -> Sums:
        m, n = queries.shape[0], (queries if keys is None else keys).shape[0]
        return Sums(
            _gradient(queries, n) if needs[0] else None,
            _gradient(keys, m) if needs[1] else None,
            torch.zeros(n, dtype=torch.float32) if needs[2] else None,
        )

    def rows(self, start: int, stop: int) -> Sums:
        """The same for a sweep over these rows alone, those before being done."""
        return self._replace(queries=None if self.queries is None else self.queries[start:stop], started=start > 0)

    def add(self, g: Tensor, i0: int, j0: int, q: Tensor, k: Tensor) -> None:
        """What the weights `g` of one tile contribute."""
        if self.queries is not None:
            _add(self.queries, i0, g, k, first=not j0)
        if self.keys is not None:
            _add(self.keys, j0, g.t(), q, first=not i0 and not self.started)
        if self.key_bias is not None:
            self.key_bias[j0 : j0 + g.shape[1]] += g.sum(0)


def gradients(
    sweep: Sweep,
    rows: tuple[Tensor, Tensor, Tensor] | None,  # gradient, high, low, each [M]
    columns: tuple[Tensor, Tensor, Tensor] | None,  # each [N]
    own_gradient: Tensor | None,  # [M]
    factor: float,
    kept: Tensor,  # [keep, N]
    needs: tuple[bool, bool, bool],  # G·K [M, D], Gᵀ·Q [N, D], ΣG over rows [N]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """G·K, Gᵀ·Q and Σ_i G_ij for G_ij = g_i·exp(L_ij - r_i) + h_j·exp(L_ij - c_j) + p_i·[j is i's own], times `factor`.

    Symmetric: `rows` stands for both directions, and G·K is the whole gradient of the one tensor.
    """
    sums = Sums.new(sweep.queries, sweep.keys, needs)
    row_softmax = native.Softmax(*(address(x) for x in rows or ()))
    column_softmax = row_softmax if sweep.symmetric else native.Softmax(*(address(x) for x in columns or ()))
    own_address = address(own_gradient)
    keep = kept.shape[0]
    for i0, m, j0, n in sweep.tiles(keep):
        q, k = sweep.queries_block(i0, m), sweep.keys_block(j0, n)
        tile = sweep.tile(i0, m, j0, n)
        source = sweep.tile(i0, m, j0, n, kept).data_ptr() if i0 < keep else 0
        if not source:
            torch.mm(q, k.t(), out=tile)
        native_tile = sweep.native_tile(tile, i0, j0, guide=not source)
        native.weights(
            sweep.logits, native_tile, source, row_softmax, column_softmax, own_address, factor, sweep.threads
        )
        sums.add(tile, i0, j0, q, k)
        if sweep.symmetric and i0 != j0:
            _add(sums.queries, j0, tile.t(), q, first=not i0)
    return sums[:3]


def _run_of(indices: Tensor) -> slice | None:
    """The slice that lists the same rows, if there is one."""
    first = int(indices[0]) if indices.numel() else 0
    whole = torch.arange(first, first + indices.numel())
    return slice(first, first + indices.numel()) if torch.equal(indices, whole) else None


def add_softmax_gradients(
    sweep: Sweep,
    rows: Tensor,  # [M]
    own: Tensor,  # [M]
    mix: Tensor,  # [M, D]
    softmax: tuple[Tensor, Tensor],  # exponentials [M, N], shares [tiles of columns, M]
    sums: Sums,
) -> None:
    """G·K, Gᵀ·Q and Σ_i G_ij for G_ij = rows_i · softmax_ij, and own_i where j is i's own, of what
    `lse_and_mix(without_own=True)` returned. No pass over the softmax: it is the queries that are multiplied.
    """
    exponentials, shares = softmax
    q, indices = sweep.queries.float(), sweep.masks.positives
    run = _run_of(indices)  # a slice is read and written in parallel, listed rows one after the other
    if sums.queries is not None:
        torch.mul(mix, rows[:, None], out=sums.queries)
        sums.queries.addcmul_(sweep.keys[indices if run is None else run].float(), own[:, None])
    scaled = buffer(min(sweep.m, ROWS) * q.shape[1])
    for i0, m, j0, n in sweep.tiles(sweep.m):
        share = rows[i0 : i0 + m] * shares[j0 // sweep.columns, i0 : i0 + m]
        tile = sweep.tile(i0, m, j0, n, exponentials)
        if sums.keys is not None:
            # Without denormals, in which a product would be a hundred times slower.
            part = _view(scaled, 0, m, q.shape[1])
            _scale_rows(q[i0 : i0 + m], share, out=part)
            _add(sums.keys, j0, tile.t(), part, first=not i0 and not sums.started)
        if sums.key_bias is not None:
            sums.key_bias[j0 : j0 + n].addmv_(tile.t(), share)
    if sums.keys is not None and run is not None:
        sums.keys[run].addcmul_(q, own[:, None])
    elif sums.keys is not None:
        sums.keys.index_add_(0, indices, q * own[:, None])
    if sums.key_bias is not None:
        sums.key_bias.index_add_(0, indices, own)


def mix_gradients(
    sweep: Sweep,
    values: Tensor,  # [N, Dv]
    upstream: Tensor,  # [M, Dv] fp32
    delta: Tensor,  # [M]
    lse: tuple[Tensor, Tensor],  # high, low [M]
    kept: tuple[Tensor, Tensor],  # exponentials [keep, N], shares [tiles of columns, keep]
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dS·K [M, D], dSᵀ·Q [N, D], Σ_i dS_ij [N] and Pᵀ·upstream [N, Dv] of the softmax P and its slope
    dS = P ∘ (upstream·Vᵀ − delta)."""
    sums = Sums.new(sweep.queries, sweep.keys, needs[:3])
    dv = _gradient(values, sweep.m) if needs[3] else None
    ones = torch.ones(sweep.m, dtype=torch.float32)
    softmax = native.Softmax(*(address(x) for x in (ones, *lse)))
    exponentials, shares = kept
    slopes = sweep.new_buffer() if any(needs[:3]) else None
    v, at = values, -1
    for i0, m, j0, n in sweep.tiles(len(exponentials)):
        if at != j0:  # half-precision values are converted once
            v, at = values[j0 : j0 + n].float(), j0
        q, k, up = sweep.queries_block(i0, m), sweep.keys_block(j0, n), upstream[i0 : i0 + m]
        tile = sweep.tile(i0, m, j0, n)
        if i0 < len(exponentials):
            share = shares[j0 // sweep.columns, i0 : i0 + m]
            _scale_rows(sweep.tile(i0, m, j0, n, exponentials), share, out=tile)
        else:
            torch.mm(q, k.t(), out=tile)
            native_tile = sweep.native_tile(tile, i0, j0)
            native.weights(sweep.logits, native_tile, 0, softmax, native.Softmax(), 0, 1.0, sweep.threads)
        if dv is not None:
            _add(dv, j0, tile.t(), up, first=not i0)
        if slopes is None:
            continue
        slope = _view(slopes, 0, m, n)
        torch.mm(up, v.t(), out=slope)
        _slopes(slope, delta[i0 : i0 + m], tile)
        sums.add(slope, i0, j0, q, k)
    return *sums[:3], dv


def _in_cache(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of the tensors together, a MiB of each at a time, so that several passes over them stay in cache."""
    rows = max(1, (1 << 18) // max(1, tensors[0].shape[1]))
    return zip(*(x.split(rows) for x in tensors), strict=True)


def _scale_rows(tile: Tensor, share: Tensor, out: Tensor) -> None:
    """out = share_i · tile_ij. Denormals become 0: one in a hundred makes the products behind 2.5 times as slow."""
    for a, b, c in _in_cache(tile, share, out):
        torch.hardshrink(torch.mul(a, b[:, None], out=c), TINY, out=c)


def _slopes(tile: Tensor, delta: Tensor, weights: Tensor) -> None:
    """tile ← weights ∘ (tile − delta_i), without denormals."""
    for a, b, c in _in_cache(tile, delta, weights):
        torch.hardshrink(a.sub_(b[:, None]).mul_(c), TINY, out=a)


def softplus(
    sweep: Sweep,
    targets: Targets,
    gradient: Tensor | None,  # [M]
    factor: float,
    needs: tuple[bool, bool],  # G·K [M, D], Gᵀ·Q [N, D]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Row sums of the sigmoid loss [M]; and for row weights `gradient`, from the same products, G·K, Gᵀ·Q and the row
    sums of G_ij = factor · gradient_i · (σ(L_ij) − y_ij)."""
    sums = torch.zeros(sweep.m, dtype=torch.float32)
    gradient_sums = None if gradient is None else torch.zeros_like(sums)
    dq = _gradient(sweep.queries, sweep.n) if needs[0] else None
    dk = _gradient(sweep.keys, sweep.m) if needs[1] else None
    for i0, m, j0, n in sweep.tiles(0):
        q, k = sweep.queries_block(i0, m), sweep.keys_block(j0, n)
        tile = sweep.tile(i0, m, j0, n)
        torch.mm(q, k.t(), out=tile)
        dense = None
        if targets.dense is not None:
            dense = targets.dense[i0 : i0 + m, j0 : j0 + n].float().contiguous()
        labels = address(targets.query_labels), address(targets.key_labels)
        native.softplus(
            sweep.logits, sweep.native_tile(tile, i0, j0), native.Targets(*labels, address(dense), *targets[3:]),
            address(sums), address(gradient), address(gradient_sums), factor, sweep.threads,
        )  # fmt: skip
        if dq is not None:
            _add(dq, i0, tile, k, first=not j0)
        if dk is not None:
            _add(dk, j0, tile.t(), q, first=not i0)
    return sums, dq, dk, gradient_sums


def dot(a: Tensor, b: Tensor) -> float:
    """Σ a·b in double, for fp32 `a` [M, D] without gaps and any `b` [M, D]: terms of both signs cancel."""
    blocks = ((a[i : i + n], b[i : i + n].float().contiguous()) for i, n in _blocks(0, a.shape[0], ROWS))
    return sum(native.dot(x.data_ptr(), y.data_ptr(), x.numel()) for x, y in blocks)


def _gradient(like: Tensor, others: int) -> Tensor:
    """Where the gradient of `like` accumulates; its first tile overwrites it, and without others there is none.

    From the pool of buffers, to which it returns when its user drops it, as a training loop does before each step: the
    page faults of 49,152 × 576 fresh floats cost more than a tenth of a product. Not where so much idle memory would
    hurt.
    """
    if not others:
        return torch.zeros(like.shape, dtype=torch.float32)
    if like.numel() * 4 in POOLED_RESULTS:
        return buffer(like.numel()).view(like.shape)
    gradient = torch.empty(like.shape, dtype=torch.float32)
    if gradient.nbytes >= POOLED_RESULTS.stop:
        native.huge_pages(gradient.data_ptr(), gradient.nbytes)
    return gradient


def _add(out: Tensor, start: int, a: Tensor, b: Tensor, *, first: bool) -> None:
    """out[start:] += a · b, or = if it is the first contribution."""
    rows = out if a.shape[0] == out.shape[0] else out[start : start + a.shape[0]]
    if first:
        torch.mm(a, b, out=rows)
    else:
        rows.addmm_(a, b)


def chunks(m: int, most: int) -> list[tuple[int, int]]:
    """(start, stop) of chunks of at most `most` of m rows, about equal, and of whole blocks if one has room: a product
    of 293 rows takes 1.07 times as long for each as one of 304."""
    if most < m:
        block = BLOCK if most >= BLOCK else 1
        count = -(-m // (most // block * block))
        most = -(-m // (count * block)) * block
    return [(i, min(i + most, m)) for i in range(0, m, max(1, most))]


def _blocks(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    return [(i, min(size, stop - i)) for i in range(start, stop, size)]


def _view(buffer: Tensor, start: int, rows: int, columns: int) -> Tensor:
    """[rows, columns] of a flat buffer."""
    return buffer.as_strided((rows, columns), (columns, 1), start)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
