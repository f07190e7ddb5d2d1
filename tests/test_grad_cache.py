"""GradCache: gradients equal those of the whole batch at once, whatever was cut or replayed."""

import copy
import io
import sys
from collections import OrderedDict, namedtuple
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn
from two_towers import B, D, Loss, Tower, assert_equal, check, clear, float64, gradients

from fastcontrast import GradCache
from fastcontrast.grad_cache import replay

double = pytest.fixture(autouse=True)(float64)


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


@pytest.mark.parametrize("keep", [0, "auto"])
def test_a_scaler_scales_every_gradient_and_skips_what_overflowed(keep):
    """Without rounding to float16 in the way: the loop of its documentation, the whole batch at once."""
    a, loss = Tower(dropout=0.5), Loss()
    twins = copy.deepcopy([a, loss])
    batches = [(torch.randn(B, D), torch.randn(B, D)) for _ in range(4)]
    batches[1][0][3, 2] = torch.inf

    def train(tower, loss, chunked):
        torch.manual_seed(1)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        parameters = [*tower.parameters(), *loss.parameters()]
        optimizer, log = torch.optim.AdamW(parameters, lr=0.1), []
        cache = GradCache([tower, tower], 4, loss, scaler=scaler, autocast=nullcontext, keep_graphs=keep)
        for x, y in batches:
            optimizer.zero_grad()
            if chunked:
                value = cache(x, y)
            else:
                value = loss(*(torch.cat([tower(c) for c in t.split(4)]) for t in (x, y)))
                scaler.scale(value).backward()
            log += [scaler.get_scale(), value.detach(), *gradients(tower, loss)]
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            scaler.step(optimizer)
            scaler.update()
            log += [scaler.get_scale(), *(p.detach().clone() for p in parameters)]
        return log

    ours, theirs = train(a, loss, True), train(*twins, False)
    assert [scale for scale in ours if isinstance(scale, float)] == [64, 64, 64, 32, 32, 32, 32, 64]
    for mine, whole in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("keep", [0, "auto"])
def test_a_resumed_run_goes_on_bit_for_bit(keep):
    batches = [(torch.randn(B, D), torch.randn(B, D)) for _ in range(5)]

    def make():
        tower = nn.Sequential(Tower(dropout=0.5), nn.BatchNorm1d(5, affine=False))
        parts = {"tower": tower, "loss": Loss(), "scaler": torch.amp.GradScaler("cpu", init_scale=4.0)}
        parts["optimizer"] = torch.optim.AdamW([*tower.parameters(), *parts["loss"].parameters()], lr=0.1)
        cache = GradCache(
            [tower, tower], 5, parts["loss"], scaler=parts["scaler"], autocast=torch.bfloat16, keep_graphs=keep
        )
        return parts, cache

    def train(parts, cache, batches):
        for x, y in batches:
            parts["optimizer"].zero_grad()
            loss = cache(x, y)
            parts["scaler"].step(parts["optimizer"])
            parts["scaler"].update()
        return [loss, *parts["tower"].state_dict().values(), *parts["loss"].state_dict().values(), torch.rand(3)]

    parts, cache = make()
    train(parts, cache, batches[:2])
    file = io.BytesIO()
    torch.save({"random": torch.get_rng_state(), **{name: part.state_dict() for name, part in parts.items()}}, file)
    straight = train(parts, cache, batches[2:])
    torch.manual_seed(7)
    parts, cache = make()
    file.seek(0)
    saved = torch.load(file)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    torch.set_rng_state(saved["random"])
    resumed = train(parts, cache, batches[2:])
    assert all(map(torch.equal, resumed, straight))


@pytest.mark.parametrize("kind", ["mps", "xpu", "none"])
def test_random_states_of_every_backend(monkeypatch, kind):
    """An accelerator in use is replayed, also for a plain function with its input elsewhere; that of MPS has functions
    without a device; CUDA is not asked where there is none."""
    device, calls, index = torch.device(kind if kind != "none" else "xpu", 0), [], () if kind == "mps" else (0,)
    states = [torch.tensor([i], dtype=torch.uint8) for i in range(9)]

    class Backend:
        def __init__(self):
            if kind != "mps":  # torch.mps has no such function
                self.is_initialized = lambda: kind != "none"

        def get_rng_state(self, *at):
            assert [torch.device(d).index for d in at] == list(index)
            calls.append("get")
            return states[len(calls)]

        def set_rng_state(self, state, **at):
            assert [torch.device(d).index for d in at.values()] == list(index)
            calls.append(int(state))

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(device.type))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    backend = Backend()
    monkeypatch.setattr(torch, "get_device_module", lambda _: backend)
    monkeypatch.setattr(torch, "cuda", None)
    assert replay.random_devices([], [X]) == [torch.device("cpu"), device][: 1 if kind == "none" else 2]
    state = replay.Replay(replay.random_devices([], []), {})
    with state:
        pass
    assert calls == ([] if kind == "none" else ["get", "get", 1, 2])  # now as then, afterwards as before


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
        (ValueError, "2 models need 1 or 2 chunk_sizes, got 3", lambda t, s: GradCache([t, t], [1, 2, 3], s)),
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
