"""Features of earlier batches, first in, first out: the queue of a loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed._collectives import all_rows, shards
from .ops import _check as check


class MemoryBank(nn.Module):
    """The last Q rows enqueued: row t of all that ever were lies in slot t mod Q, and `features` are the slots in use.

        bank = MemoryBank(65536, 128)
        loss = info_nce(queries, keys, scale, queue=bank.features)
        loss.backward()
        bank.enqueue(keys)

    Rows are stored as they come: normalise them before. They carry no gradient. Enqueue after the backward: a loss may
    keep the rows for it, and autograd refuses those that were overwritten. (Or give it `bank.features.clone()`.)

    A bank starts empty, and `features` has as many rows as came, [0, D] at first; MoCo starts with random ones:
    `bank.enqueue(F.normalize(torch.randn(Q, D)))`. Banks by name (a language, a task) are
    `nn.ModuleDict({name: MemoryBank(Q, D) for name in names})`.

    Under `torch.distributed` the rows of all ranks are enqueued by all, in the order of the ranks, so that banks stay
    equal; ranks may bring different numbers of rows, also none, but all must call it, of the same bank. Keep a bank
    beside the model that DistributedDataParallel wraps: inside, it is right too, but sent to all ranks in every step.

    Everything is in `state_dict`. Nothing waits for a GPU but `features` and `ids` of a bank that is not full yet, and
    the exchange of row counts between ranks.

    Args:
        size, width: Q and D.
        with_ids: an integer goes with each row (`queue_ids` of `info_nce`; a label, an index of the sample).
        gather: False: each rank enqueues its own rows alone.
        group: the process group to gather over; default all ranks.
        device, dtype: of the stored rows; what is enqueued is converted to this dtype.

    Raises: ValueError or TypeError for sizes below 1, and for rows or ids that do not fit.
    Source: He et al. 2020 (MoCo); Wang et al. 2020 (cross-batch memory).
    """

    rows: Tensor  # [Q, D]
    row_ids: Tensor | None  # [Q]
    enqueued: Tensor  # [], how many rows ever came

    def __init__(
        self,
        size: int,
        width: int,
        *,
        with_ids: bool = False,
        gather: bool = True,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if size < 1 or width < 1:
            raise ValueError(f"MemoryBank: size and width must be at least 1, got {size} and {width}")
        self.gather, self.group = gather, group
        self.register_buffer("rows", torch.zeros(size, width, device=device, dtype=dtype))
        ids = torch.zeros(size, dtype=torch.int64, device=device) if with_ids else None
        self.register_buffer("row_ids", ids)
        self.register_buffer("enqueued", torch.zeros((), dtype=torch.int64, device=device))
        # A bank that was seen full stays so, and nobody needs to ask its device again.
        self._full = False

    @property
    def features(self) -> Tensor:
        """The stored rows [min(rows enqueued, Q), D], a view in the order of slots: until it is full, oldest first."""
        return self._used(self.rows)

    @property
    def ids(self) -> Tensor | None:
        """The ids of `features`, or None where the bank has none."""
        return None if self.row_ids is None else self._used(self.row_ids)

    @torch.no_grad()
    def enqueue(self, features: Tensor, ids: Tensor | None = None) -> None:  # [B, D], [B] integer
        """Stores rows in the place of the oldest; of more than Q, the last Q."""
        op, (size, width) = "MemoryBank.enqueue", self.rows.shape
        check.matrix(op, "features", features, width, like="the bank")
        check.same_kind(op, "features", features, self.rows, dtype=False, like_name="the bank")
        arriving, stored = [features.to(self.rows.dtype)], [self.rows]
        if (ids is None) != (self.row_ids is None):
            expected = "not be given to a bank without ids" if self.row_ids is None else "be given to a bank with_ids"
            raise ValueError(f"{op}: ids must {expected}")
        if ids is not None:
            check.vector(op, "ids", ids, features.shape[0], features, floating=False)
            arriving, stored = [*arriving, ids.long()], [*stored, self.row_ids]
        if self.gather:
            held = shards(features.shape[0], features.device, self.group)
            arriving = [all_rows(x, held, self.group) for x in arriving]
        count = arriving[0].shape[0]
        start = max(count - size, 0)
        slots = (self.enqueued + torch.arange(start, count, device=self.rows.device)) % size
        for place, x in zip(stored, arriving, strict=True):
            place.index_copy_(0, slots, x[start:])
        self.enqueued += count

    def _used(self, x: Tensor) -> Tensor:
        if not self._full:
            count = int(self.enqueued)
            if count < x.shape[0]:
                return x[:count]
            self._full = True
        return x

    def _load_from_state_dict(self, *args: Any) -> None:
        self._full = False
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        size, width = self.rows.shape
        return f"{size}, {width}, with_ids={self.row_ids is not None}, gather={self.gather}"
