"""Training with a teacher, a bank and a learned scale, stopped and resumed from a file, goes on bit for bit."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fastcontrast import InfoNCELoss
from fastcontrast.distributed import exchange
from fastcontrast.ema import EMATeacher, cosine_momentum
from fastcontrast.memory import MemoryBank
from fastcontrast.testing import ranks

STEPS, STOP = 7, 4
SIZES = ((5, 3), (4, 4), (1, 6), (6, 0), (3, 3), (2, 5), (5, 5))  # rows of two ranks; one process takes the first
PARTS = ("student", "teacher", "bank", "loss", "optimizer", "random")


def tower() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 5))


class Run:
    """MoCo with a learned temperature: queries of the student against keys of its teacher, and earlier keys."""

    def __init__(self, queue: int, seed: int):
        torch.manual_seed(seed)
        self.rank, self.parallel = (dist.get_rank(), True) if dist.is_initialized() else (0, False)
        self.student = tower()
        if self.parallel:
            self.student = DistributedDataParallel(self.student)
        self.teacher = EMATeacher(self.student, partial(cosine_momentum, start=0.5, steps=STEPS))
        self.bank = MemoryBank(queue, 5, with_ids=True)
        self.loss = InfoNCELoss(5.0, learnable=True)
        self.optimizer = torch.optim.AdamW([*self.student.parameters(), *self.loss.parameters()], lr=0.02)
        torch.manual_seed(100 * seed + self.rank)

    def step(self, i: int) -> Tensor:
        generator = torch.Generator().manual_seed(10 * i + self.rank)
        x, ids = torch.randn(SIZES[i][self.rank], 6, generator=generator), torch.arange(SIZES[i][self.rank])
        queries = F.normalize(self.student(x + 0.1 * torch.randn_like(x)), dim=1)
        keys = F.normalize(self.teacher(x + 0.1 * torch.randn_like(x)), dim=1)
        with exchange() if self.parallel else nullcontext():
            loss = self.loss(
                queries, keys, query_ids=ids, key_ids=ids + 50, queue=self.bank.features, queue_ids=self.bank.ids
            )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.teacher.update_parameters(self.student)
        self.bank.enqueue(keys, ids)
        return loss.detach()

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {name: getattr(self, name) for name in PARTS if name != "random"}

    def state(self) -> dict:
        return {name: part.state_dict() for name, part in self.parts().items()} | {"random": torch.get_rng_state()}

    def load(self, path: Path, forget: str | None) -> None:
        """What rank 0 saved, and this rank's own random state."""
        state = torch.load(path / "0")
        for name, part in self.parts().items():
            if name != forget:
                part.load_state_dict(state[name])
        if forget != "random":
            torch.set_rng_state(torch.load(path / str(self.rank))["random"])


def train(path: Path, queue: int, forgets: tuple[str | None, ...]) -> tuple[list, list[list]]:
    """Losses and the last state of a run, and of those resumed in its middle, each of which forgets a part."""
    run, losses = Run(queue, 0), []
    for i in range(STEPS):
        if i == STOP:
            torch.save(run.state(), path / str(run.rank))
            filled = run.bank.features.shape[0]
            assert filled == min(queue, sum(sum(n) if run.parallel else n[0] for n in SIZES[:STOP]))
        losses.append(run.step(i))
    whole = [losses[STOP:], run.state()]
    if run.parallel:
        dist.barrier()
    resumed = []
    for forget in forgets:
        fresh = Run(queue, 1)
        fresh.load(path, forget)
        resumed.append([[fresh.step(i) for i in range(STOP, STEPS)], fresh.state()])
    return whole, resumed


def same(a, b) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, (dict, list)):
        keys = a.keys() if isinstance(a, dict) else range(len(a))
        return len(a) == len(b) and all(same(a[key], b[key]) for key in keys)
    return a == b


@pytest.mark.parametrize("queue", (11, 64), ids=("wrapped round", "not yet full"))
def test_a_resumed_run_is_the_run_that_went_on(one_thread, tmp_path, queue):
    whole, (resumed, *forgetful) = train(tmp_path, queue, (None, *PARTS))
    assert same(whole, resumed)
    for part, other in zip(PARTS, forgetful, strict=True):
        assert not same(whole[0], other[0]), f"without {part} it would have gone on as well"


def test_on_two_ranks(tmp_path):
    found = ranks.run(2, train, tmp_path, 29, (None, "bank"))
    for whole, (resumed, forgetful) in found:
        assert same(whole, resumed)
        assert not same(whole[0], forgetful[0])
    (first, _), (second, _) = found
    for part in ("student", "teacher", "bank", "loss"):
        assert same(first[1][part], second[1][part]), part
    assert same(first[0], second[0])  # the loss is that of the whole batch
    assert not same(first[1]["random"], second[1]["random"])
