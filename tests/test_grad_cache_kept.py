"""GradCache: which graphs of the first pass stay, what happens when memory runs out, buffers that a forward moves."""

import copy
import ctypes
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from two_towers import B, D, Loss, Tower, assert_equal, check, clear, float64, gradients

from fastcontrast import GradCache
from fastcontrast.grad_cache import graph_keeper as keeper
from fastcontrast.testing import ranks

double = pytest.fixture(autouse=True)(float64)


@pytest.mark.parametrize("keep, calls", [(0, 8), (1, 7), (3, 5), (4, 4), (9, 4), ("auto", 4)])
def test_kept_graphs_are_not_encoded_twice(keep, calls):
    a, loss = Tower(), Loss()
    cache = GradCache([a], 4, lambda q: loss(q, q.flip(0)), keep_graphs=keep)
    assert cache.kept_graphs is None
    cache(torch.randn(B, D))
    assert a.calls == calls and cache.kept_graphs == 8 - calls and loss.calls == 1
    assert cache.plan.extra_forward == (calls - 4) / 4


def test_an_int_fills_the_first_model_first():
    cache = GradCache([Tower(), Tower()], 4, Loss(), keep_graphs=5)
    cache(torch.randn(B, D), torch.randn(B, D))
    assert cache.plan.kept == (4, 1) and str(cache.plan).startswith("5 graphs kept, 38% of chunks")


@pytest.mark.parametrize("fit", [0, 1, 2, 3, 4])
def test_auto_keeps_what_fits_and_says_why(monkeypatch, fit):
    a = Tower()
    one = 4 * 8 * 8  # of a chunk, tanh and the second Linear save the same [4, 8]: counted once, the input not at all
    free = 2 * (fit * one + one // 2)
    left = iter([free, *(free - one * kept for kept in (1, 1, 2, 3))])  # read before the step, then before each chunk
    monkeypatch.setattr(keeper, "free_bytes", lambda device: next(left))
    GradCache([a], 4, lambda q: q.sum(), keep_graphs=0)(torch.randn(B, D))  # allocates the gradients
    cache = GradCache([a], 4, lambda q: q.pow(2).sum())
    cache(torch.randn(B, D))
    assert cache.plan.chunk_bytes == one and cache.plan.budget_bytes == free // 2
    assert cache.kept_graphs == fit
    assert ("every graph fits" if fit == 4 else "the next graph needs 0 MiB on cpu") in cache.plan.reason


@pytest.mark.parametrize("keep", [1, 3, 5, "auto", [1], [2, 0], [0, 1]])
def test_what_is_kept_changes_no_bit(monkeypatch, keep):
    """Also where memory is tight at one moment and not at the next: a list says before which chunks it was."""
    a, b, loss = Tower(dropout=0.5), Tower(dropout=0.5), Loss()
    x, y = torch.randn(B, D), torch.randn(B, D)

    def step(keep):
        clear(a, b, loss)
        torch.manual_seed(1)
        cache = GradCache([a, b], 4, loss, keep_graphs=keep)
        return cache(x, y), gradients(a, b, loss), cache.plan.kept

    value, wanted, _ = step(0)
    if isinstance(keep, list):
        tight = [iter([i == at for i in range(5)]) for at in keep * 2]
        turns, opened = iter(tight), []
        original = keeper.GraphKeeper.open

        def opens(self, *args):
            opened.append(next(turns))
            original(self, *args)

        monkeypatch.setattr(keeper.GraphKeeper, "open", opens)
        monkeypatch.setattr(keeper.GraphKeeper, "_refusal", lambda *_: "tight" if next(opened[-1]) else "")
        again, ours, kept = step("auto")
        assert kept == tuple((keep * 2)[:2])
    else:
        again, ours, _ = step(keep)
    assert torch.equal(again, value) and all(map(torch.equal, ours, wanted))


@pytest.mark.parametrize("allocated", [False, True])
def test_auto_leaves_room_for_gradients(monkeypatch, allocated):
    a = Tower()
    if allocated:
        a.net(torch.randn(B, D)).sum().backward()
    monkeypatch.setattr(keeper, "free_bytes", lambda device: sum(p.nbytes for p in a.parameters()) + 300)
    cache = GradCache([a], 4, lambda q: q.pow(2).sum())
    cache(torch.randn(B, D))
    assert (cache.kept_graphs > 0) == allocated


def test_auto_heeds_what_the_meter_cannot_see(monkeypatch):
    a = Tower()
    free = iter([10**9, 4 * 10**8])
    monkeypatch.setattr(keeper, "free_bytes", lambda device: next(free, 4 * 10**8))
    cache = GradCache([a], 4, lambda q: q.pow(2).sum())
    cache(torch.randn(B, D))
    assert cache.kept_graphs == 0 and "would stay free" in cache.plan.reason


def test_auto_survives_a_model_that_cannot_be_measured():
    a, loss = Tower(dropout=0.5), Loss()
    x, y = torch.randn(B, D), torch.randn(B, D)

    def model(x):
        return a(x) + torch.func.grad(lambda v: a.net[0](v).pow(2).sum())(x).sum()

    def reps():
        return torch.cat([model(c) for c in x.split(4)]), torch.cat([a(c) for c in y.split(4)])

    cache = GradCache([model, a], 4, loss)
    check(cache, (x, y), reps, a, loss)
    assert cache.plan.kept == (0, 4) and "forbids saved tensor hooks" in cache.plan.reason


def test_free_host_memory_is_known_here():
    assert keeper.free_bytes(torch.device("cpu")) > 0 or sys.platform != "linux"


ERRORS = {
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "python": MemoryError(),
    "host": RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB, max allowed: 18.1 GB)."),
    "handle": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("fail_at", [1, 2, 3, 6])
def test_out_of_memory_while_keeping_drops_the_graphs(fail_at, error):
    loss = Loss()

    class Fragile(Tower):
        armed = True

        def forward(self, x):
            if torch.is_grad_enabled() and self.armed and self.calls == fail_at - 1:
                self.armed = False
                torch.rand(5)  # consumed half-way
                raise ERRORS[error]
            return super().forward(x)

    a = Fragile(dropout=0.5)
    x, y = torch.randn(B, D), torch.randn(B, D)
    a.armed = False

    def reps():
        return torch.cat([a(c) for c in x.split(4)]), torch.cat([a(c) for c in y.split(4)])

    def arm(q, k):
        return loss(q, k)

    cache = GradCache([a, a], 4, arm)
    state = torch.get_rng_state()
    loss(*reps()).backward()
    wanted = gradients(a, loss)
    clear(a, loss)
    torch.set_rng_state(state)
    a.armed, a.calls = True, 0
    cache(x, y)
    assert not a.armed
    assert_equal(gradients(a, loss), wanted)
    assert cache.kept_graphs == 0 and f"out of memory with {fail_at - 1} graphs kept" in cache.plan.reason
    cache(x, y)  # the next step tries less
    assert cache.kept_graphs == (fail_at - 1) // 2


def runs_out(tower, *calls):
    """`tower`, except that memory runs out in those of its calls."""
    count = iter(range(10**6))

    def model(x):
        if next(count) in calls:
            torch.rand(5)
            raise torch.OutOfMemoryError("out of memory")
        return tower(x)

    return model


def test_out_of_memory_beside_kept_graphs_without_a_graph_of_its_own(monkeypatch):
    a = Tower()
    answers = iter([True, True, False])
    monkeypatch.setattr(keeper.GraphKeeper, "fits", lambda *_, **__: next(answers, False))
    x = torch.randn(B, D)
    cache = GradCache([runs_out(a, 2)], 4, lambda q: q.pow(2).sum())
    cache(x)
    assert cache.kept_graphs == 0 and "with 2 graphs kept" in cache.plan.reason
    ours = gradients(a)
    clear(a)
    a(x).pow(2).sum().backward()
    assert_equal(ours, gradients(a))


def test_out_of_memory_in_the_second_pass():
    """Graphs of models still to come are dropped; those that are through were encoded once."""
    a, c = Tower(dropout=0.5), Tower(dropout=0.5)
    x = torch.randn(B, D)

    class Rewriting(Tower):  # so that "auto" keeps none of it
        def __init__(self):
            super().__init__(dropout=0.5)
            self.register_buffer("drift", torch.ones(5))
            self.fail_at = ()

        def forward(self, x):
            self.drift.add_(1)
            out = super().forward(x)
            if self.calls in self.fail_at:
                raise torch.OutOfMemoryError("out of memory")
            return out * self.drift

    b = Rewriting()
    cache = GradCache([a, b, c], 4, lambda q, k, t: (q * k * t).pow(2).sum())
    state = torch.get_rng_state()
    cache(x, x, x)
    wanted = gradients(a, b, c)
    assert cache.plan.kept == (4, 0, 4)
    clear(a, b, c)
    b.calls, b.fail_at, c.calls = 0, (6,), 0  # four in the first pass
    with torch.no_grad():
        b.drift.fill_(1)
    torch.set_rng_state(state)
    cache(x, x, x)
    assert_equal(gradients(a, b, c), wanted, tolerance=0)
    assert cache.plan.kept == (4, 0, 0) and c.calls == 8 and b.calls == 4 + 5
    assert "out of memory with 8 graphs kept" in cache.plan.reason
    cache(x, x, x)
    assert cache.plan.kept == (4, 0, 0) and "at most 4" in cache.plan.reason  # half as many
    b.calls, b.fail_at = 0, (6,)
    with pytest.raises(torch.OutOfMemoryError):  # nothing left to drop
        cache(x, x, x)


class Faulty(Loss):
    """Draws random numbers, counts rows in a buffer, and runs out of memory where it is told to."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.fails = ""

    def forward(self, q, k):
        self.seen += len(q)
        q = Passing.apply(q * torch.rand(len(q), 1), self)
        if self.fails == "forward":
            self.fails = ""
            raise MemoryError
        return super().forward(q, k)


class Passing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, loss):
        ctx.loss = loss
        return q.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.loss.fails == "backward":
            ctx.loss.fails = ""
            assert ctx.loss.log_scale.grad is not None  # accumulated already
            raise torch.OutOfMemoryError("out of memory")
        return gradient, None


@pytest.mark.parametrize("before", [None, 3.0])
@pytest.mark.parametrize("fails", ["forward", "backward"])
def test_out_of_memory_in_the_loss(fails, before):
    """Once more without the kept graphs, from the same random state, and nothing counts twice."""
    a, loss = Tower(dropout=0.5), Faulty()
    x, y = torch.randn(B, D), torch.randn(B, D)

    def step(keep, fails=""):
        clear(a, loss)
        if before is not None:
            loss.log_scale.grad = torch.tensor(before)
        torch.manual_seed(1)
        loss.fails = fails
        cache = GradCache([a, a], 4, loss, keep_graphs=keep)
        value = cache(x, y)
        return cache, value, gradients(a, loss), torch.rand(3)

    _, value, wanted, after = step(0)
    loss.seen.zero_()
    cache, again, ours, stream = step("auto", fails)
    assert torch.equal(again, value) and all(map(torch.equal, ours, wanted)) and torch.equal(stream, after)
    assert loss.seen == B and not loss.fails
    assert cache.kept_graphs == 0 and "with 8 graphs kept" in cache.plan.reason
    cache(x, y)
    assert cache.kept_graphs == 4
    loss.fails = fails
    with pytest.raises((MemoryError, torch.OutOfMemoryError)):
        step(8, fails)  # a number was asked for


def test_out_of_memory_in_a_backward_of_the_encoder_is_raised():
    """It may have accumulated already. The next step keeps half as many."""
    a = Tower()
    x, fails = torch.randn(B, D), iter([False, True])

    def model(x):
        out = a(x)
        if out.requires_grad:
            out.register_hook(hook)
        return out

    def hook(gradient):
        if next(fails, False):
            raise torch.OutOfMemoryError("out of memory")

    cache = GradCache([model], 4, lambda q: q.pow(2).sum())
    with pytest.raises(torch.OutOfMemoryError):
        cache(x)
    check(cache, (x,), lambda: (a(x),), a)
    assert cache.kept_graphs == 2


def test_joining_chunks_may_run_out_of_memory(monkeypatch):
    a, join, fails = Tower(), torch.cat, iter([True])

    def cat(*args):
        if next(fails, False):
            raise ERRORS["host"]
        return join(*args)

    x = torch.randn(B, D)
    cache = GradCache([a], 4, lambda q: q.pow(2).sum())
    monkeypatch.setattr(torch, "cat", cat)
    cache(x)
    ours = gradients(a)
    clear(a)
    a(x).pow(2).sum().backward()
    assert_equal(ours, gradients(a))
    assert cache.kept_graphs == 0 and "with 4 graphs kept" in cache.plan.reason


def _little_memory():
    """The host's allocator itself refuses, some chunks after the first."""
    import resource  # not everywhere

    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed is the system's again
    weight = torch.ones(1 << 17, requires_grad=True)  # a chunk of 8 rows saves 8 MiB

    def model(x):
        return (x[:, :1] * weight).tanh().mean(1, keepdim=True)

    x = torch.randn(128, 1)
    wanted = torch.autograd.grad(sum(model(c).pow(2).sum() for c in x.split(8)), weight)[0]
    cache = GradCache([model], 8, lambda q: q.pow(2).sum())
    keeper.free_bytes = lambda device: 1 << 40
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
    cache(x)
    torch.testing.assert_close(weight.grad, wanted)
    return cache.plan.reason, cache._ceiling


@pytest.mark.skipif(sys.platform != "linux", reason="limits and reads its address space as Linux has them")
def test_the_hosts_own_out_of_memory():
    [(reason, ceiling)] = ranks.run(1, _little_memory)
    assert "out of memory with" in reason and 0 < ceiling < 8


def test_out_of_memory_is_not_swallowed_when_a_number_was_asked():
    def model(x):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        GradCache([model], 4, Loss(), keep_graphs=2)(torch.randn(B, D))


@pytest.mark.parametrize("keep", [0, 2, "auto"])
def test_buffers_move_once_a_chunk(keep):
    net = nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5), nn.Linear(5, 5))
    twin, loss, buffers = copy.deepcopy(net), Loss(), list(net.buffers())
    x, y = torch.randn(B, D), torch.randn(B, D)
    GradCache([net, net], 5, loss, keep_graphs=keep)(x, y)
    ours = gradients(net)
    loss(torch.cat([twin(c) for c in x.split(5)]), torch.cat([twin(c) for c in y.split(5)])).backward()
    assert_equal(ours, gradients(twin))
    for a, b, before in zip(net.buffers(), twin.buffers(), buffers, strict=True):
        assert torch.equal(a, b)
        assert a is before  # whoever holds the buffer (an average of models, a reducer) still holds the model's
    assert net[1].num_batches_tracked == 6


class Drifting(nn.Module):
    """The output depends on a buffer that every forward rewrites: the second encoding must see the first one's."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(D, 5)
        self.register_buffer("drift", torch.ones(5))

    def forward(self, x):
        self.drift.mul_(1.1)
        return self.net(x) * self.drift


@pytest.mark.parametrize("keep", [0, "auto"])
def test_buffers_are_replayed(keep):
    net = Drifting()
    x = torch.randn(B, D)
    cache = GradCache([net], 4, lambda q: q.pow(2).sum(), keep_graphs=keep)
    cache(x)
    ours = gradients(net)
    clear(net)
    drift = 1.1 ** torch.arange(1, 5).repeat_interleave(4)[:B, None]
    (net.net(x) * drift).pow(2).sum().backward()
    assert_equal(ours, gradients(net))
    torch.testing.assert_close(net.drift, torch.full((5,), 1.1**4))
    if keep == "auto":  # autograd saved the buffer of each chunk, and the next chunk overwrote it
        assert cache.kept_graphs == 0 and "rewrites" in cache.plan.reason
