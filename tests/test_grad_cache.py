"""GradCache: gradients equal those of the whole batch at once, whatever was kept, cut or replayed."""

import copy
import sys
from collections import OrderedDict, namedtuple
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastcontrast import GradCache
from fastcontrast.grad_cache import graph_keeper as keeper

B, D = 13, 6  # a prime: every chunk size leaves a ragged last chunk


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Tower(nn.Module):
    """Counts its forwards and rows; takes what the tests need by position or by name."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 5))
        self.calls = self.rows = 0

    def forward(self, x, mask=None, scale=1.0):
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        out = self.net(x) * scale
        return out if mask is None else out * mask[:, None]


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.calls = 0

    def forward(self, q, k, bias=0.0):
        self.calls += 1
        logits = self.log_scale.exp() * F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).T + bias
        labels = torch.arange(len(q))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def gradients(*modules):
    return [None if p.grad is None else p.grad.clone() for m in modules for p in m.parameters()]


def clear(*modules):
    for m in modules:
        m.zero_grad()


def assert_equal(ours, theirs, tolerance=1e-12):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def check(cache, inputs, reps, *modules, **loss_kwargs):
    """One step of `cache` against autograd through `reps()` at once, from the same random state."""
    clear(*modules)
    state = torch.get_rng_state()
    truth = cache.loss_fn(*reps(), **loss_kwargs)
    truth.backward()
    wanted, after = gradients(*modules), torch.rand(3)
    clear(*modules)
    torch.set_rng_state(state)
    loss = cache(*inputs, **loss_kwargs)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, truth.detach(), rtol=1e-12, atol=1e-12)
    assert_equal(gradients(*modules), wanted)
    assert any(g is not None and g.abs().max() > 1e-4 for g in wanted)
    assert torch.equal(torch.rand(3), after)  # the global stream: one forward of every chunk


@pytest.mark.parametrize("keep", [0, 1, 4, 99, "auto"])
@pytest.mark.parametrize("sizes", [1, 4, 13, 50, [5, 3]])
def test_two_towers_equal_the_full_batch(sizes, keep):
    a, b, loss = Tower(), Tower(), Loss()
    x, y = torch.randn(B, D), torch.randn(B, D)
    check(GradCache([a, b], sizes, loss, keep_graphs=keep), (x, y), lambda: (a(x), b(y)), a, b, loss)


@pytest.mark.parametrize("keep", [0, 3, 99])
def test_the_same_model_twice(keep):
    tower, loss = Tower(), Loss()
    x, y = torch.randn(B, D), torch.randn(B, D)
    check(GradCache([tower, tower], 4, loss, keep_graphs=keep), (x, y), lambda: (tower(x), tower(y)), tower, loss)


@pytest.mark.parametrize("keep", [0, 1, 5, "auto"])
def test_dropout_is_the_same_in_both_passes(keep):
    a, b, loss = Tower(dropout=0.5), Tower(dropout=0.5), Loss()
    x, y = torch.randn(B, D), torch.randn(B, D)

    def reps():
        return torch.cat([a(c) for c in x.split(4)]), torch.cat([b(c) for c in y.split(3)])

    check(GradCache([a, b], [4, 3], loss, keep_graphs=keep), (x, y), reps, a, b, loss)


class Mapped(dict):
    pass


Pair = namedtuple("Pair", "x mask")


@pytest.mark.parametrize(
    "pack",
    [
        lambda x, m: {"x": x, "mask": m},
        lambda x, m: Mapped(x=x, mask=m, scale=1.0),
        lambda x, m: [x, m],
        lambda x, m: (x, m),
        lambda x, m: Pair(x, m),
        lambda x, m: ([x], {"mask": m}),
        lambda x, m: ((x, m), {"scale": torch.tensor(1.0)}),
        lambda x, m: ([], {"x": x, "mask": m, "scale": 1.0}),
    ],
)
def test_inputs_of_every_shape(pack):
    a, loss = Tower(), Loss()
    x, y, mask = torch.randn(B, D), torch.randn(B, D), torch.rand(B)
    cache = GradCache([a, a], 4, loss, keep_graphs=2)
    check(cache, (pack(x, mask), y), lambda: (a(x, mask), a(y)), a, loss)


def test_batch_encoding_and_model_output():
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_outputs import BaseModelOutputWithPooling as Output

    tower, loss = Tower(), Loss()
    x, y = torch.randn(B, D), torch.randn(B, D)

    class Encoder(nn.Module):
        def forward(self, x):
            return Output(pooler_output=tower(x))

    cache = GradCache([Encoder(), tower], 4, lambda q, k: loss(q.pooler_output, k), keep_graphs=1)
    check_inputs = (transformers.BatchEncoding({"x": x}), y)
    truth = loss(tower(x), tower(y))
    truth.backward()
    wanted = gradients(tower, loss)
    clear(tower, loss)
    cache(*check_inputs)
    assert_equal(gradients(tower, loss), wanted)


def test_nested_inputs():
    a, loss = Tower(), Loss()
    x, y = torch.randn(B, D), torch.randn(B, D)

    def encode(views):
        return a(views["views"][0]) + a(views["views"][1]["x"])

    cache = GradCache([encode, a], 5, loss)
    check(cache, ([{"views": (x, {"x": y, "name": "second"})}], y), lambda: (a(x) + a(y), a(y)), a, loss)


def test_split_input_fn_may_cut_unevenly():
    a, b, loss = Tower(), Tower(), Loss()
    x, y = torch.randn(B, D), torch.randn(B, D)
    cache = GradCache([a, b], 4, loss, split_input_fn=lambda x, size: x.split([2, 1, 10]), keep_graphs=1)
    check(cache, (x, y), lambda: (a(x), b(y)), a, b, loss)
    assert cache.plan.chunks == (3, 3)


@pytest.mark.parametrize("keep", [0, 2, "auto"])
@pytest.mark.parametrize(
    "pack, unpack",
    [
        (lambda t, ids: (t, t[:, :2].exp(), ids), lambda r: r),
        (lambda t, ids: [t, (t[:, :2].exp(), ids)], lambda r: (r[0], *r[1])),
        (lambda t, ids: OrderedDict(t=t, e=t[:, :2].exp().repeat_interleave(2, 0)[::2], ids=ids), lambda r: r.values()),
    ],
)
def test_several_representations_a_model(pack, unpack, keep):
    a, loss = Tower(), Loss()
    x, y, ids = torch.randn(B, D), torch.randn(B, D), torch.arange(B)

    def model(x, ids):
        return pack(a(x), ids)

    def loss_fn(q, k):
        assert type(q) is type(pack(x, ids))
        t, e, i = unpack(q)
        return loss(t, k[torch.argsort(i)]) + e.mean()

    cache = GradCache([model, a], 4, loss_fn, keep_graphs=keep)
    check(cache, ((x, ids), y), lambda: (pack(a(x), ids), a(y)), a, loss)


def test_representations_with_other_row_counts_and_an_unused_one():
    a, loss = Tower(), Loss()
    x, y = torch.randn(B, D), torch.randn(B, D)

    def model(x):
        return {"unused": a(x), "twice": a(x).repeat_interleave(2, 0)}

    cache = GradCache([model, a], 4, lambda q, k: loss(q["twice"][::2], k), keep_graphs=2)
    check(cache, (x, y), lambda: (model(x), a(y)), a, loss)


def test_get_rep_fn_with_parameters_on_a_frozen_tower():
    a, head, loss = Tower(), nn.Linear(5, 5), Loss()
    a.requires_grad_(False)
    x, y = torch.randn(B, D), torch.randn(B, D)
    cache = GradCache([a, a], 4, loss, get_rep_fn=lambda out: head(out), keep_graphs=0)
    check(cache, (x, y), lambda: (head(a(x)), head(a(y))), head, loss)
    assert cache.plan.frozen == (False, False)


@pytest.mark.parametrize("keep", [0, "auto"])
def test_frozen_tower_is_encoded_once_and_its_side_takes_no_gradient(keep):
    a, b, loss = Tower(), Tower().requires_grad_(False), Loss()
    x, y = torch.randn(B, D), torch.randn(B, D)
    seen = []

    def loss_fn(q, k):
        seen.append((q.requires_grad, k.requires_grad))
        return loss(q, k)

    cache = GradCache([a, b], 4, loss_fn, keep_graphs=keep)
    cache(x, y)
    assert seen == [(True, False)] and b.calls == 4 and a.calls == (8 if keep == 0 else 4)
    assert cache.plan.frozen == (False, True)
    check(cache, (x, y), lambda: (a(x), b(y)), a, b, loss)


def test_only_the_loss_trains():
    a, loss = Tower().requires_grad_(False), Loss()
    x, y = torch.randn(B, D), torch.randn(B, D)
    cache = GradCache([a, a], 4, loss)
    check(cache, (x, y), lambda: (a(x), a(y)), a, loss)
    assert cache.kept_graphs == 0 and "no model trains" in cache.plan.reason


def test_loss_parameters_captured_and_passed():
    a = Tower()
    x, y = torch.randn(B, D), torch.randn(B, D)
    captured, passed = torch.tensor(2.0, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    cache = GradCache([a, a], 4, lambda q, k, *, s: (captured * q @ k.T * s.exp()).logsumexp(1).mean())
    wanted = torch.autograd.grad(cache.loss_fn(a(x), a(y), s=passed), [captured, passed, *a.parameters()])
    cache(x, y, s=passed)
    assert_equal([captured.grad, passed.grad, *gradients(a)], list(wanted))


@pytest.mark.parametrize("frozen", [False, True])
def test_inputs_that_require_grad(frozen):
    a, loss, stem = Tower().requires_grad_(not frozen), Loss(), nn.Linear(D, D)
    x, y = torch.randn(B, D), torch.randn(B, D, requires_grad=True)
    hidden = stem(x).tanh()  # saved tensors above the input: walked once, or autograd complains
    cache = GradCache([a, a], 4, loss, split_input_fn=lambda t, n: (t * t).split(n), keep_graphs=2)
    loss(a(hidden**2), a(y**2)).backward(retain_graph=True)
    wanted = [y.grad, *gradients(a, loss, stem)]
    y.grad = None
    clear(a, loss, stem)
    cache(hidden, y)
    assert_equal([y.grad, *gradients(a, loss, stem)], wanted)


def test_gradients_accumulate():
    a, loss = Tower(), Loss()
    x, y = torch.randn(B, D), torch.randn(B, D)
    cache = GradCache([a, a], 4, loss, keep_graphs=3)
    cache(x, y)
    once = gradients(a, loss)
    cache(x, y)
    assert_equal(gradients(a, loss), [2 * g for g in once])


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


def test_kept_graphs_go_before_anything_is_encoded_again(monkeypatch):
    a, order = Tower(), []
    answers = iter([False, True, False, True])  # as when the first chunk is the largest
    monkeypatch.setattr(keeper.GraphKeeper, "fits", lambda *_, **__: next(answers))

    def model(x):
        out = a(x)
        if out.requires_grad:
            row = x[0, 0].item()
            out.register_hook(lambda g: order.append(row))
        return out

    x = torch.arange(4.0)[:, None].expand(4, D)
    cache = GradCache([model], 1, lambda q: q.pow(2).sum())
    check(cache, (x,), lambda: (a(x),), a)
    assert order == [1, 3, 0, 2] and a.calls == 4 + 2 + 1


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


@pytest.mark.parametrize("fail_at", [1, 2, 3, 6])
def test_out_of_memory_while_keeping_drops_the_graphs(fail_at):
    loss = Loss()

    class Fragile(Tower):
        armed = True

        def forward(self, x):
            if torch.is_grad_enabled() and self.armed and self.calls == fail_at - 1:
                self.armed = False
                torch.rand(5)  # consumed half-way
                raise torch.OutOfMemoryError("out of memory")
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


def test_out_of_memory_beside_kept_graphs_without_a_graph_of_its_own(monkeypatch):
    a, failures = Tower(), iter([False, False, True])
    answers = iter([True, True, False, False])
    monkeypatch.setattr(keeper.GraphKeeper, "fits", lambda *_, **__: next(answers))

    def model(x):
        if next(failures, False):
            raise torch.OutOfMemoryError("out of memory")
        return a(x)

    x = torch.randn(B, D)
    cache = GradCache([model], 4, lambda q: q.pow(2).sum())
    cache(x)
    assert cache.kept_graphs == 0 and "with 2 graphs kept" in cache.plan.reason
    ours = gradients(a)
    clear(a)
    a(x).pow(2).sum().backward()
    assert_equal(ours, gradients(a))


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
    quiet = [entry == (True, True) for entry in model.log]
    assert set(model.log) <= {(True, True), (False, False)}  # forward and backward of a graph under the same rule
    assert len(quiet) == 8 and not quiet[-1]
    if flag:
        assert quiet == [True] * 7 + [False]  # one reduction a model, though it comes twice
    elif keep == 0:
        assert quiet == [False] * 8
    ours = gradients(a)
    clear(a, loss)
    loss(a(x), a(y)).backward()
    assert_equal(ours, gradients(a))
    assert cache.kept_graphs == {0: 0, 3: 3, "auto": 6, 99: 6}[keep]


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("keep", [0, 2, "auto"])
def test_distributed_data_parallel(tmp_path, keep, flag):
    dist = torch.distributed
    if not dist.is_available():
        pytest.skip("torch.distributed is not built")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = nn.Sequential(Tower(dropout=0.5), nn.BatchNorm1d(5))
        model, loss, reductions = nn.parallel.DistributedDataParallel(net), Loss(), []

        def hook(_, bucket):
            reductions.append(bucket.index())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        model.register_comm_hook(None, hook)
        x, y = torch.randn(B, D), torch.randn(B, D)
        cache = GradCache([model, model], 5, loss, keep_graphs=keep)
        for _ in range(2):
            clear(model, loss)
            reductions.clear()
            state, twin = torch.get_rng_state(), copy.deepcopy(net)
            cache(x, y, no_sync_except_last=flag)
            torch.set_rng_state(state)
            loss(torch.cat([twin(c) for c in x.split(5)]), torch.cat([twin(c) for c in y.split(5)])).backward()
            assert_equal(gradients(net), gradients(twin))
            if flag:
                assert reductions == [0]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("keep", [0, 2])
def test_fp16_with_a_scaler(keep):
    torch.set_default_dtype(torch.float32)
    a, loss = Tower(), Loss()
    x, y = torch.randn(B, D), torch.randn(B, D)
    dtypes = []

    def loss_fn(q, k):
        dtypes.append((q.dtype, torch.is_autocast_enabled("cpu")))
        return loss(q, k)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    cache = GradCache([a, a], 4, loss_fn, None, None, True, scaler, keep_graphs=keep)
    got = cache(x, y)
    with torch.autocast("cpu", torch.float16):
        truth = loss(a(x), a(y))
    assert dtypes == [(torch.float16, True)]
    torch.testing.assert_close(got, truth.detach(), rtol=1e-3, atol=1e-3)
    scaled = gradients(a, loss)
    clear(a, loss)
    scaler.scale(truth).backward()
    for ours, theirs in zip(scaled, gradients(a, loss), strict=True):
        assert (ours - theirs).norm() < 0.01 * theirs.norm() and theirs.norm() > 1
    optimizer = torch.optim.SGD(a.parameters(), lr=0.1)
    before = a.net[0].weight.clone()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(a.net[0].weight, before)


@pytest.mark.parametrize("keep", [0, 2])
@pytest.mark.parametrize(
    "autocast",
    [
        torch.bfloat16,
        torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    ],
)
def test_autocast(autocast, keep):
    torch.set_default_dtype(torch.float32)
    a, loss, seen = Tower(), Loss(), []
    x, y = torch.randn(B, D), torch.randn(B, D)

    def loss_fn(q, k):
        seen.append(q.dtype)
        return loss(q, k)

    cache = GradCache([a, a], 4, loss_fn, autocast=autocast, keep_graphs=keep)
    got = cache(x, y)
    ours = gradients(a, loss)
    clear(a, loss)
    with torch.autocast("cpu", torch.bfloat16):
        truth = loss(a(x), a(y))
    truth.backward()
    assert seen == [torch.bfloat16] and abs(got - truth) < 0.01
    for mine, theirs in zip(ours, gradients(a, loss), strict=True):
        assert (mine - theirs).norm() < 0.02 * theirs.norm()


def test_inside_the_callers_autocast():
    torch.set_default_dtype(torch.float32)
    a, loss = Tower(), Loss()
    x, y = torch.randn(B, D), torch.randn(B, D)
    with torch.autocast("cpu", torch.bfloat16):
        GradCache([a, a], 4, loss, keep_graphs=1)(x, y)
    assert all(g is not None and g.abs().sum() > 0 for g in gradients(a))


def test_progress_counts_chunk_passes(monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total, **_):
            self.total, self.n = total, 0
            bars.append(self)

        def update(self, n=1):
            self.n += n

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setitem(sys.modules, "tqdm", type(sys)("tqdm"))
    sys.modules["tqdm"].tqdm = Bar
    a, b, loss = Tower(), Tower().requires_grad_(False), Loss()
    x = torch.randn(B, D)
    GradCache([a, b], 4, loss, keep_graphs=2)(x, x)
    assert not bars
    GradCache([a, b], 4, loss, keep_graphs=2, progress=True)(x, x)
    assert [(bar.n, bar.total) for bar in bars] == [(12, 12)]  # 8 first passes, 4 second ones


def test_subclasses_override_the_original_hooks():
    """States and caches of a subclass's own are enough: nothing of ours is required in them."""
    a, loss, used = Tower(), Loss(), []
    x, y = torch.randn(B, D), torch.randn(B, D)

    class Mine(GradCache):
        def get_input_tensors(self, model_input):
            used.append("get_input_tensors")
            return super().get_input_tensors(model_input)

        def split_inputs(self, model_input, chunk_size):
            return list(model_input.split(chunk_size))

        def model_call(self, model, model_input):
            used.append("model_call")
            return {"rep": model(model_input)}

        def get_reps(self, model_out):
            return model_out["rep"]

        def compute_loss(self, *reps, **kwargs):
            used.append("compute_loss")
            return super().compute_loss(*reps, **kwargs)

        def build_cache(self, *reps, **kwargs):
            used.append("build_cache")
            return super().build_cache(*[r.detach() for r in reps], **kwargs)

    class Own(Mine):
        def forward_no_grad(self, model, model_inputs):
            with torch.no_grad():
                reps = torch.cat([self.get_reps(self.model_call(model, c)) for c in model_inputs])
            return reps, [contextmanager(lambda: iter([None]))() for _ in model_inputs]

    for kind in (Mine, Own):
        used.clear()
        check(kind([a, a], 4, loss, keep_graphs=2), (x, y), lambda: (a(x), a(y)), a, loss)
        assert {"model_call", "compute_loss", "build_cache", "get_input_tensors"} <= set(used)


X = torch.zeros(4, D, dtype=torch.float64)


@pytest.mark.parametrize(
    "error, message, make",
    [
        (ValueError, "2 models need 2 inputs, got 1", lambda t, s: GradCache([t, t], 2, s)(X)),
        (ValueError, "2 models need one chunk size or 2, got 3", lambda t, s: GradCache([t, t], [1, 2, 3], s)),
        (ValueError, "chunk_sizes must be an integer of at least 1, got 0", lambda t, s: GradCache([t], 0, s)),
        (ValueError, "at least 1, got 2.5", lambda t, s: GradCache([t], [2.5], s)),
        (
            ValueError,
            "keep_graphs must be an integer of at least 0, got -1",
            lambda t, s: GradCache([t], 1, s, keep_graphs=-1),
        ),
        (ValueError, "keep_graphs .* got 'all'", lambda t, s: GradCache([t], 1, s, keep_graphs="all")),
        (ValueError, "keep_graphs .* got True", lambda t, s: GradCache([t], 1, s, keep_graphs=True)),
        (ValueError, "at least one model", lambda t, s: GradCache([], 1, s)),
        (TypeError, "models must be a list", lambda t, s: GradCache(nn.Sequential(t), 1, s)),
        (ValueError, "fp16=True needs scaler", lambda t, s: GradCache([t], 1, s, fp16=True)),
        (ValueError, "scaler needs fp16", lambda t, s: GradCache([t], 1, s, scaler=torch.amp.GradScaler("cpu"))),
        (TypeError, "autocast must be", lambda t, s: GradCache([t], 1, s, autocast=16)),
        (ValueError, r"batch size must be at least 1, got \[\(0, 6\)\]", lambda t, s: GradCache([t], 2, s)(X[:0])),
        (
            ValueError,
            r"share dimension 0, got \[\(4, 6\), \(3,\)\]",
            lambda t, s: GradCache([t], 2, s)({"x": X, "nested": [torch.zeros(3)]}),
        ),
        (TypeError, "no tensor to split in a str", lambda t, s: GradCache([t], 2, s)("text")),
        (TypeError, "list of 4 str", lambda t, s: GradCache([t], 2, s)({"x": X, "texts": list("abcd")})),
        (ValueError, "at least one chunk", lambda t, s: GradCache([t], 2, s, split_input_fn=lambda *_: [])(X)),
        (TypeError, "got str; get_rep_fn", lambda t, s: GradCache([lambda x: {"a": x, "b": "text"}], 2, s)(X)),
        (TypeError, "0-dimensional", lambda t, s: GradCache([lambda x: x.sum()], 2, s)(X)),
        (
            ValueError,
            r"agree beyond dimension 0, got \[\(3, 3\), \(1, 1\)\]",
            lambda t, s: GradCache([lambda x: x[:, : len(x)]], 3, s)(X),
        ),
        (TypeError, r"scalar tensor, got \(4, 5\)", lambda t, s: GradCache([t], 2, lambda q: q)(X)),
        (RuntimeError, "nothing requires grad", lambda t, s: GradCache([t], 2, lambda q: q.detach().sum())(X)),
        (RuntimeError, "nothing requires grad", lambda t, s: GradCache([lambda x: x], 2, lambda q: q.sum())(X)),
    ],
)
def test_errors_say_what_came(error, message, make):
    with pytest.raises(error, match=message):
        make(Tower(), lambda q: q.pow(2).mean())


def test_a_failed_step_leaves_the_next_one_alone():
    a, loss = Tower(), Loss()
    x, y = torch.randn(B, D), torch.randn(B, D)
    cache = GradCache([a, a], 4, lambda q, k, fail=False: q.foo if fail else loss(q, k), keep_graphs=3)
    with pytest.raises(AttributeError):
        cache(x, y, fail=True)
    check(cache, (x, y), lambda: (a(x), a(y)), a, loss)
