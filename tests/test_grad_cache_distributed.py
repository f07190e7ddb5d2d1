"""GradCache on several ranks: gradients equal those of one process with the whole batch, reduced once a step."""

import copy
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from two_towers import B, D, Loss, Tower, assert_equal, clear, float64, gradients

from fastcontrast import GradCache
from fastcontrast.distributed import gather, mean_gradient
from fastcontrast.testing import ranks

double = pytest.fixture(autouse=True)(float64)


class Synced(nn.Module):
    """What DistributedDataParallel looks like: remembers under what each forward and backward ran."""

    def __init__(self, tower):
        super().__init__()
        self.tower, self.quiet, self.log = tower, False, []

    @contextmanager
    def no_sync(self):
        before, self.quiet = self.quiet, True
        yield
        self.quiet = before

    def forward(self, x):
        out = self.tower(x)
        if out.requires_grad:
            assert torch.is_grad_enabled()
            forward = self.quiet
            out.register_hook(lambda g: self.log.append((forward, self.quiet)))
        return out


@pytest.mark.parametrize("keep", [0, 3, "auto", 99])
@pytest.mark.parametrize("flag", [True, False])
def test_no_sync_except_last(keep, flag):
    a, loss = Tower(), Loss()
    model = Synced(a)
    x, y = torch.randn(B, D), torch.randn(B, D)
    cache = GradCache([model, model], 4, loss, keep_graphs=keep)
    cache(x, y, no_sync_except_last=flag)
    # Forward and backward of a graph under the same rule, and one reduction, though the model comes twice.
    assert model.log == [(True, True)] * 7 + [(False, False)]
    ours = gradients(a)
    clear(a, loss)
    loss(a(x), a(y)).backward()
    assert_equal(ours, gradients(a))
    assert cache.kept_graphs == {0: 0, 3: 3, "auto": 6, 99: 6}[keep]


SHARDS = [(13,), (10, 2), (5, 1, 7)]  # in chunks of three: different numbers of them


class ShardLoss(nn.Module):
    """`Loss` of all ranks' rows, of which each rank has its own against all, weighted so that the mean over ranks of
    values and gradients is that of one process."""

    def __init__(self, sizes):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.sizes = sizes

    def forward(self, q, k):
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        labels = sum(self.sizes[: dist.get_rank()]) + torch.arange(len(q))
        scale, total = mean_gradient(self.log_scale).exp(), 0
        for own, other in ((q, k), (k, q)):
            total = total + F.cross_entropy(scale * own @ gather(other).T, labels, reduction="sum")
        return total * len(self.sizes) / (2 * sum(self.sizes))


class Counted:
    """DistributedDataParallel whose reductions are counted."""

    def __init__(self, net, **options):
        self.count = 0
        self.model = DistributedDataParallel(net, **options)
        self.model.register_comm_hook(None, self.reduce)

    def reduce(self, _, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.count += bucket.is_last()
        done = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return done.get_future().then(lambda future: future.value()[0])


class Gated(nn.Module):
    """Its extra weights serve one row of the whole batch, and one of them none."""

    def __init__(self):
        super().__init__()
        self.tower, self.extra, self.idle = Tower(), nn.Linear(D, 5), nn.Linear(2, 2)

    def forward(self, x):
        special = x[:, 0] == 0
        out = self.tower(x)
        return out + self.extra(x) * special[:, None] if special.any() else out


class Nested(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = nn.ModuleDict({"model": model})

    def forward(self, x):
        return {"rep": self.inner["model"](x)}


def _shard(sizes, *whole):
    start = sum(sizes[: dist.get_rank()])
    return [t[start : start + sizes[dist.get_rank()]] for t in whole]


KINDS = {
    "two": {},
    "static": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
    "tied": {},
    "tied static": {"static_graph": True, "gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "frozen": {"find_unused_parameters": True},
    "nested": {},
}


def _replicated(sizes, kind, keep, flag):
    torch.manual_seed(3)
    a, b = (Gated(), Gated()) if kind == "unused" else (Tower(), Tower())
    if kind == "frozen":  # DistributedDataParallel refuses a model without anything to train, and needs none there
        b.requires_grad_(False)
        a.net[0].requires_grad_(False)
    b = a if "tied" in kind else b
    x, y = torch.randn(sum(sizes), D), torch.randn(sum(sizes), D)
    x[0, 0] = y[-1, 0] = 0
    twins, whole, loss = copy.deepcopy([a, b]), Loss(), ShardLoss(sizes)
    trained = [net for net in dict.fromkeys((a, b)) if any(p.requires_grad for p in net.parameters())]
    counted = {net: Counted(net, **KINDS[kind]) for net in trained}
    models = [counted[net].model if net in counted else net for net in (a, b)]
    get_rep_fn = None
    if kind == "nested":
        models, get_rep_fn = list(map(Nested, models)), lambda out: out["rep"]
    cache = GradCache(models, 3, loss, get_rep_fn=get_rep_fn, keep_graphs=keep)
    for step in range(2):
        clear(a, b, loss, *twins, whole)
        for tower in counted.values():
            tower.count = 0
        value = cache(*_shard(sizes, x, y), no_sync_except_last=flag)
        truth = whole(twins[0](x), twins[1](y))
        truth.backward()
        dist.all_reduce(value)
        torch.testing.assert_close(value / len(sizes), truth.detach(), rtol=1e-12, atol=1e-12)
        ours, wanted = gradients(a, b, loss), gradients(*twins, whole)
        for i, gradient in enumerate(wanted):
            if gradient is None and ours[i] is not None:  # no rank used it: DistributedDataParallel may make it zeros
                wanted[i] = torch.zeros_like(ours[i])
        assert_equal(ours, wanted)
        learns = step == 0 and "static" in kind
        assert [tower.count for tower in counted.values()] == [1 + learns] * len(counted), (kind, keep, flag, step)
    if keep == "auto" and kind != "frozen":
        assert all(kept == max(0, count - 1) for kept, count in zip(cache.plan.kept, cache.plan.chunks, strict=True))


def _replicated_all(sizes):
    torch.set_default_dtype(torch.float64)
    for kind in KINDS if len(sizes) > 1 else ("two", "tied static"):
        for keep, flag in ((0, True), (2, False), ("auto", True)):
            _replicated(sizes, kind, keep, flag)


@pytest.mark.parametrize("sizes", SHARDS, ids=str)
def test_distributed_data_parallel(sizes):
    ranks.run(len(sizes), _replicated_all, sizes)


class Moving(nn.Module):
    """The output depends on a buffer that every forward rewrites, and on one that stays."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(D, 5)
        self.register_buffer("drift", torch.ones(5))
        self.register_buffer("table", torch.rand(5))

    def forward(self, x):
        self.drift.mul_(1.1)
        return self.net(x) * self.drift + self.table


class Steady(Tower):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.rand(5))
        self.fail_at = 0

    def forward(self, x):
        out = super().forward(x) + self.table
        if self.calls == self.fail_at:
            raise torch.OutOfMemoryError("out of memory")
        return out


def _mean(t):
    dist.all_reduce(t)
    return t / dist.get_world_size()


def _buffers():
    """Rank 0's come before the first encoding, and the second encoding sees the same."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    net, steady, x = Moving(), Steady(), torch.randn(7, D) + dist.get_rank()
    drift = 1.1 ** torch.tensor([1.0, 1, 1, 2, 2, 2, 3])[:, None]
    wanted = torch.autograd.grad((net.net(x) * drift + net.table).pow(2).sum(), net.net.weight)[0]
    model, second = DistributedDataParallel(net), DistributedDataParallel(steady)
    for keep in (0, "auto"):
        net.drift.fill_(1.0 + dist.get_rank())
        net.zero_grad()
        cache = GradCache([model, second], 3, lambda q, k: q.pow(2).sum() + k.sum(), keep_graphs=keep)
        cache(x, x)
        torch.testing.assert_close(net.net.weight.grad, _mean(wanted.clone()))
        torch.testing.assert_close(net.drift, torch.full((5,), 1.1**3))
        assert cache.plan.kept == (0, 0 if keep == 0 else 2)


def _out_of_memory():
    """On one rank of two: beside kept graphs, in a model's first chunk and later, in the second pass."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    a, b = Steady(), Steady()
    sizes = (13, 9)
    x, y = torch.randn(22, D), torch.randn(22, D)
    twins, whole, loss = copy.deepcopy([a, b]), Loss(), ShardLoss(sizes)
    whole(twins[0](x), twins[1](y)).backward()
    towers = [Counted(a), Counted(b)]
    for fail_at in (1, 3, 0):
        clear(a, b, loss)
        cache = GradCache([t.model for t in towers], 3, loss)
        for tower in towers:
            tower.count = tower.model.module.calls = 0
        b.fail_at = fail_at if dist.get_rank() == 0 else 0
        a.fail_at = 6 if dist.get_rank() == 0 and fail_at == 0 else 0  # its armed chunk, b's graphs still there
        cache(*_shard(sizes, x, y))
        assert_equal(gradients(a, b, loss), gradients(*twins, whole))
        assert [t.count for t in towers] == [1, 1]
        assert ("out of memory with" in cache.plan.reason) == (dist.get_rank() == 0)


def _out_of_memory_in_the_loss():
    a, fails = Tower(), iter([True])

    def loss(q):
        if next(fails, False):
            raise torch.OutOfMemoryError("out of memory")
        return q.pow(2).sum()

    x = torch.randn(B, D)
    cache = GradCache([a], 4, loss)
    with pytest.raises(torch.OutOfMemoryError):
        cache(x)
    cache(x)
    assert cache.kept_graphs == 2


@pytest.mark.parametrize("world, fn", [(2, _buffers), (2, _out_of_memory), (1, _out_of_memory_in_the_loss)])
def test_on_ranks(world, fn):
    ranks.run(world, fn, collective_timeout=10.0)


def _sharded(sizes):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_default_dtype(torch.float64)
    mesh = init_device_mesh("cpu", (len(sizes),))
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    scatter, count = getattr(dist, name), [0]

    def counting(*args, **kwargs):
        count[0] += 1
        return scatter(*args, **kwargs)

    setattr(dist, name, counting)
    cases = [
        (0, True, ""),
        (0, False, ""),
        (1, True, ""),
        (99, False, "tied"),
        (99, True, "tied"),
        ("auto", True, "part"),
    ]
    for keep, flag, kind in cases:
        torch.manual_seed(0)
        a, b = Tower(), Tower()
        b = a if kind == "tied" else b
        x, y = torch.randn(sum(sizes), D), torch.randn(sum(sizes), D)
        twins, whole, loss = copy.deepcopy([a, b]), Loss(), ShardLoss(sizes)
        for net in {a: 0, b: 0}:
            for module in (net.net[0], net.net[3], *(() if kind == "part" else (net,))):
                fully_shard(module, mesh=mesh)
        cache = GradCache([a, b], 4, loss, keep_graphs=keep)
        for _ in range(2):
            clear(a, b, loss, *twins, whole)
            count[0] = 0
            cache(*_shard(sizes, x, y), no_sync_except_last=bool(flag))
            whole(twins[0](x), twins[1](y)).backward()
            ours = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients(a, b, loss)]
            assert_equal(ours, gradients(*twins, whole))
            backwards = 2 if kind == "tied" and flag else 1
            assert count[0] == 2 * 2 * (1 if flag else 2) // backwards, (keep, flag, kind, count)
        assert cache.kept_graphs == {0: 0, 1: 1, 99: 4, "auto": 0}[keep]
        assert keep != "auto" or "needs all ranks" in cache.plan.reason


def test_fully_sharded():
    ranks.run(3, _sharded, (5, 6, 8), collective_timeout=10.0)


def test_batch_norm_over_ranks_is_not_kept():
    """Ranks that kept different graphs would encode unequally often, and wait for each other in vain."""

    class OverRanks(nn.SyncBatchNorm):
        forward = nn.BatchNorm1d.forward  # no group here

        def _check_input_dim(self, x):
            pass

    model, x = nn.Sequential(Tower(), OverRanks(5, track_running_stats=False)), torch.randn(B, D)
    for train, kept in ((True, 0), (False, 3)):
        cache = GradCache([model.train(train)], 5, lambda q: q.pow(2).sum())
        cache(x)
        assert cache.kept_graphs == kept and ("needs all ranks" in cache.plan.reason) == (kept == 0)
