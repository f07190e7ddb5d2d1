"""A memory bank is the last Q rows, on one process and on several ranks, and what a loss makes of them."""

import pytest
import torch
from host_reads import host_reads
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fastcontrast import info_nce
from fastcontrast.distributed import exchange
from fastcontrast.memory import MemoryBank
from fastcontrast.testing import ranks


def rows(count: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def in_slots(every: list[Tensor], size: int) -> Tensor:
    """Row t of all that came, in slot t mod `size`: written one at a time."""
    slots: list[Tensor] = []
    for t, row in enumerate(every):
        slots[t % size : t % size + 1] = [row]
    return torch.stack(slots) if slots else torch.empty(0)


BATCHES = {
    1: (1, 0, 3, 1),
    5: (0, 2, 1, 4, 5, 0, 13, 3),
    7: (7, 2, 7, 14),
    64: (24, 24, 24, 1, 0, 61),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("size", BATCHES)
def test_the_last_rows_lie_in_their_slots(size, dtype):
    bank, every, every_id = MemoryBank(size, 3, with_ids=True, dtype=dtype), [], []
    assert bank.features.shape == (0, 3) and bank.ids.shape == (0,)
    for i, count in enumerate(BATCHES[size]):
        features, ids = rows(count, 3, i), torch.arange(count, dtype=torch.int32) + 100 * i
        bank.enqueue(features.requires_grad_(), ids)
        every += features.detach().to(dtype)
        every_id += ids.long()
        fresh = MemoryBank(size, 3, with_ids=True, dtype=dtype)
        fresh.enqueue(rows(2 * size, 3, 99), torch.zeros(2 * size, dtype=torch.int64))
        assert fresh.features.shape[0] == size  # seen full, which a bank that is loaded into it need not be
        fresh.load_state_dict(bank.state_dict())
        for one in (bank, fresh):
            assert one.features.dtype == dtype and not one.features.requires_grad
            assert one.features.tolist() == in_slots(every, size).tolist()
            assert one.ids.tolist() == in_slots(every_id, size).tolist()
            assert one.features.shape[0] == min(len(every), size)
        bank = fresh if i % 2 else bank  # what was loaded goes on as the other would have


def test_conversions_move_features_and_leave_ids_and_counter_alone():
    bank = MemoryBank(5, 3, with_ids=True)
    features, ids = rows(7, 3, 0), torch.arange(7) + (1 << 40)
    bank.enqueue(features, ids)
    bank.to(torch.float16)
    assert torch.equal(bank.features, in_slots(list(features.half()), 5))
    assert bank.ids.tolist() == in_slots(list(ids), 5).tolist()
    bank.enqueue(features[:1].double(), ids[:1])
    assert bank.features.dtype == torch.float16 and bank.enqueued == 8
    assert torch.equal(bank.features[2], features[0].half())
    assert {name: x.shape for name, x in bank.state_dict().items()} == {
        "rows": (5, 3),
        "row_ids": (5,),
        "enqueued": (),
    }


def dense_moco(q: Tensor, k: Tensor, scale: Tensor, queue: list[Tensor], same: list[list[bool]]) -> Tensor:
    """Row by row: the own key and the queue's rows of other ids."""
    total = q.new_zeros(())
    for i in range(q.shape[0]):
        others = [key for j, key in enumerate(queue) if not same[i][j]]
        logits = scale * (torch.stack([k[i], *others]) @ q[i])
        total = total + torch.logsumexp(logits, 0) - logits[0]
    return total / q.shape[0]


@pytest.mark.parametrize("with_ids", (False, True))
@pytest.mark.parametrize("came", (0, 1, 7, 11, 40))
def test_a_loss_with_a_bank_is_that_of_the_rows_that_came(came, with_ids):
    m, size, width = 5, 11, 7
    bank = MemoryBank(size, width, with_ids=with_ids)
    every, ids = rows(came, width, 1), torch.arange(came) % 4
    for part, part_ids in zip(every.split(3), ids.split(3), strict=True):
        bank.enqueue(part, part_ids if with_ids else None)
    query_ids = torch.arange(m) % 3
    same = [[with_ids and int(i) == int(j) for j in ids[-size:]] for i in query_ids]
    q, k = rows(m, width, 2), rows(m, width, 3)
    leaves = [x.clone().requires_grad_() for x in (q, k, torch.tensor(9.0))]
    masks = {"query_ids": query_ids, "key_ids": torch.full((m,), 3), "queue_ids": bank.ids} if with_ids else {}
    # One key: the other rows' keys are no candidates of MoCo.
    value = sum(
        info_nce(
            leaves[0][i : i + 1],
            leaves[1][i : i + 1],
            leaves[2],
            queue=bank.features,
            **{n: x if n == "queue_ids" else x[i : i + 1] for n, x in masks.items()},
        )
        for i in range(m)
    ) / m  # fmt: skip
    truth_leaves = [x.detach().double().requires_grad_() for x in leaves]
    truth = dense_moco(*truth_leaves, list(every.double()[-size:]), same)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    expected = torch.autograd.grad(truth, truth_leaves)
    assert abs(value.item() - truth.item()) <= 1e-5 * max(1.0, truth.item())
    for gradient, true in zip(gradients, expected, strict=True):
        assert (gradient.double() - true).norm() <= 1e-5 * max(true.norm().item(), 1e-2)


def test_autograd_refuses_rows_that_were_overwritten_before_the_backward():
    bank, q, k = MemoryBank(6, 4), rows(3, 4, 0), rows(3, 4, 1)
    bank.enqueue(rows(6, 4, 2))
    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(info_nce(leaf, k, queue=bank.features), leaf)
    copied = info_nce(leaf, k, queue=bank.features.clone())
    in_place = info_nce(leaf, k, queue=bank.features)
    bank.enqueue(k)
    assert torch.equal(torch.autograd.grad(copied, leaf)[0], expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(in_place, leaf)


def test_nothing_waits_for_the_device_once_the_bank_is_full():
    bank = MemoryBank(4, 3, with_ids=True)
    with host_reads() as count:
        bank.enqueue(rows(3, 3, 0), torch.arange(3))
    assert count() == 0
    with host_reads() as count:
        assert bank.features.shape[0] == 3
    assert count() == 1  # so reads are seen
    bank.enqueue(rows(3, 3, 0), torch.arange(3))
    assert bank.features.shape[0] == 4
    with host_reads() as count:
        for i in range(3):
            bank.enqueue(rows(3, 3, i), torch.arange(3))
            assert bank.features.shape[0] == bank.ids.shape[0] == 4
    assert count() == 0


def test_banks_by_name_are_a_module_dict():
    banks = nn.ModuleDict({language: MemoryBank(4, 3) for language in ("en", "sw")})
    banks["sw"].enqueue(rows(2, 3, 0))
    fresh = nn.ModuleDict({language: MemoryBank(4, 3) for language in ("en", "sw")})
    fresh.load_state_dict(banks.state_dict())
    assert fresh["en"].features.shape == (0, 3)
    assert torch.equal(fresh["sw"].features, rows(2, 3, 0))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: MemoryBank(0, 3), ValueError, "MemoryBank: size and width must be at least 1, got 0 and 3"),
        (lambda: MemoryBank(4, 0), ValueError, "MemoryBank: size and width must be at least 1, got 4 and 0"),
        (lambda: MemoryBank(4, 3).enqueue(torch.zeros(2, 5)), ValueError, r"features must be \[N, 3\] .*got \[2, 5\]"),
        (lambda: MemoryBank(4, 3).enqueue(torch.zeros(3)), ValueError, r"features must be a matrix .*got \[3\]"),
        (
            lambda: MemoryBank(4, 3).enqueue(torch.zeros(2, 3, device="meta")),
            ValueError,
            "must be on cpu like the bank",
        ),
        (lambda: MemoryBank(4, 3).enqueue(torch.zeros(2, 3).long()), TypeError, "features must be float32.*got int64"),
        (lambda: MemoryBank(4, 3).enqueue(torch.zeros(2, 3), torch.arange(2)), ValueError, "ids must not be given"),
        (lambda: MemoryBank(4, 3, with_ids=True).enqueue(torch.zeros(2, 3)), ValueError, "ids must be given"),
        (
            lambda: MemoryBank(4, 3, with_ids=True).enqueue(torch.zeros(2, 3), torch.arange(3)),
            ValueError,
            r"MemoryBank.enqueue: ids must be \[2\], got \[3\]",
        ),
        (
            lambda: MemoryBank(4, 3, with_ids=True).enqueue(torch.zeros(2, 3), torch.zeros(2)),
            TypeError,
            "ids must be an integer tensor, got float32",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ------------------------------------------------------------------------------------------------------ several ranks

STEPS = {2: ((3, 1), (0, 2), (5, 9), (0, 0), (4, 4)), 3: ((1, 0, 2), (2, 7, 3))}


def _enqueued(steps):
    rank = torch.distributed.get_rank()
    banks = [MemoryBank(6, 3, with_ids=True, gather=gather) for gather in (True, False)]
    for i, sizes in enumerate(steps):
        features, ids = rows(sizes[rank], 3, 10 * i + rank), torch.arange(sizes[rank]) + 10 * rank + 100 * i
        for bank in banks:  # a rank that computes in another precision sends what the bank stores
            bank.enqueue(features.double() if rank else features, ids)
    return [bank.state_dict() for bank in banks]


@pytest.mark.parametrize("world", STEPS)
def test_ranks_hold_the_bank_of_one_process(world):
    steps = STEPS[world]
    for rank, states in enumerate(ranks.run(world, _enqueued, steps)):
        for state, sources in zip(states, (range(world), [rank]), strict=True):
            one = MemoryBank(6, 3, with_ids=True)
            for i, sizes in enumerate(steps):
                for r in sources:
                    one.enqueue(rows(sizes[r], 3, 10 * i + r), torch.arange(sizes[r]) + 10 * r + 100 * i)
            for name, x in one.state_dict().items():
                assert torch.equal(state[name], x), name


class Tower(nn.Module):
    """A model that holds its bank, and enqueues in its forward."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.bank = MemoryBank(7, 3)

    def forward(self, x):
        before = self.bank.features.clone()
        out = self.linear(x)
        self.bank.enqueue(out)
        return out, before


def _inside_ddp():
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    tower = Tower()
    if rank == 0:  # rank 0 alone has read a checkpoint: DistributedDataParallel sends it to the others
        held = MemoryBank(7, 3, gather=False)
        held.enqueue(rows(3, 3, 50))
        tower.bank.load_state_dict(held.state_dict())
    model = DistributedDataParallel(tower)  # which broadcasts buffers in each forward
    seen = [tower.bank.features.clone()]
    for i in range(4):
        out, before = model(rows((2, 1)[rank], 3, 10 * i + rank))
        (out * before.sum()).sum().backward()
        seen.append(tower.bank.features.clone())
    return seen


def test_a_bank_inside_ddp_is_one_bank():
    first, second = ranks.run(2, _inside_ddp)
    assert [x.shape[0] for x in first] == [3, 6, 7, 7, 7]
    assert torch.equal(first[0], rows(3, 3, 50))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


def _exchanged(q, k, bank_rows, sizes):
    rank = torch.distributed.get_rank()
    bank = MemoryBank(9, q.shape[1])
    bank.enqueue(bank_rows.split(sizes)[rank])
    mine = [x.split(sizes)[rank].clone().requires_grad_() for x in (q, k)]
    with exchange():
        value = info_nce(*mine, 5.0, queue=bank.features)
    return value.detach(), torch.autograd.grad(value, mine)


def test_a_loss_over_ranks_with_their_bank_is_that_of_one_process():
    sizes = [4, 1]
    q, k, old = (rows(5, 6, i) for i in range(3))
    truth_leaves = [x.double().requires_grad_() for x in (q, k)]
    truth_bank = MemoryBank(9, 6, dtype=torch.float64)
    truth_bank.enqueue(old)
    truth = info_nce(*truth_leaves, 5.0, queue=truth_bank.features)
    expected = torch.autograd.grad(truth, truth_leaves)
    found = ranks.run(2, _exchanged, q, k, old, sizes)
    for rank, (value, gradients) in enumerate(found):
        assert abs(value.item() - truth.item()) <= 1e-5 * truth.item()
        for gradient, true in zip(gradients, expected, strict=True):
            # ranks' gradients are averaged by the data-parallel mean
            mine = true.split(sizes)[rank]
            assert (gradient.double() / 2 - mine).norm() <= 1e-5 * mine.norm()
