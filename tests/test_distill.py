"""Distillation of similarities against dense code in float64, open_clip's own loss, and UniME's golden values."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from language import waves
from similarity import generator, unit

from fastcontrast import DistillLoss, distill_loss
from fastcontrast.ops import _divergence, trace
from fastcontrast.testing import assert_as_good_as, relative_error

LEAVES = ("queries", "keys", "scale")
BOTH = ("query_to_key", "key_to_query")


def batch(m: int, n: int, d: int = 16, dtype=torch.float32) -> dict:
    q, k = unit(m, d, 1), unit(n, d, 2)
    shared = min(m, n)
    q[:shared] = F.normalize(q[:shared] + k[:shared], dim=1)
    teacher = [F.normalize(x @ torch.randn(d, 24, generator=generator(3)), dim=1) for x in (q, k)]
    names = ("queries", "keys", "teacher_queries", "teacher_keys")
    tensors = (x.to(dtype) for x in (q, k, *teacher))
    return {**dict(zip(names, tensors, strict=True)), "scale": torch.tensor(20.0), "teacher_scale": torch.tensor(30.0)}


def dense(queries, keys, teacher_queries, teacher_keys, scale, teacher_scale, *, directions=BOTH, form="cross_entropy",
          divergence_direction="forward", exclude_self=False, weights=None, reduction="mean"):  # fmt: skip
    rows = []
    for direction in directions:
        logits, taught = scale * queries @ keys.T, teacher_scale * teacher_queries @ teacher_keys.T
        if direction == "key_to_query":
            logits, taught = logits.T, taught.T
        if exclude_self:
            itself = torch.eye(*logits.shape, dtype=torch.bool)
            logits, taught = logits.masked_fill(itself, -1e4), taught.masked_fill(itself, -1e4)
        log_p, log_t = logits.log_softmax(1), taught.log_softmax(1)
        forward, reverse = (log_t.exp() * (log_t - log_p)).sum(1), (log_p.exp() * (log_p - log_t)).sum(1)
        each = {"forward": forward, "reverse": reverse, "symmetric": (forward + reverse) / 2}[divergence_direction]
        rows.append(each if form == "kl" else -(log_t.exp() * log_p).sum(1))
    loss = sum(rows) / len(rows)
    loss = loss if weights is None else loss * weights
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def value_and_gradients(function, inputs: dict, options: dict, dtype) -> tuple[torch.Tensor, ...]:
    leaves = {name: x.to(dtype) for name, x in inputs.items()}
    leaves = {name: x.detach().requires_grad_(name in LEAVES) for name, x in leaves.items()}
    loss = function(**leaves, **options)
    weight = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return (loss.detach(), *torch.autograd.grad((loss * weight).sum(), [leaves[name] for name in LEAVES]))


FORMS = {
    "cross entropy": {},
    "kl": {"form": "kl"},
    "reverse": {"form": "kl", "divergence_direction": "reverse"},
    "symmetric": {"form": "kl", "divergence_direction": "symmetric"},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("directions", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "rows", "columns"])
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_dense_code(form, directions, exclude_self, reduction, monkeypatch):
    monkeypatch.setattr(_divergence, "MIN_ROWS", 1)
    options = {**form, "directions": directions, "exclude_self": exclude_self, "reduction": reduction}
    options["weights"] = torch.linspace(0, 2, 40)
    truth = value_and_gradients(dense, batch(40, 40), options, torch.float64)
    run = {**options, "workspace": 8 * 40 * 11}
    for actual, exact in zip(value_and_gradients(distill_loss, batch(40, 40), run, torch.float64), truth, strict=True):
        assert relative_error(actual, exact) < 1e-10
    assert_accurate(batch(40, 40), run, truth)


def assert_accurate(inputs: dict, options: dict, truth: tuple[torch.Tensor, ...]) -> None:
    """float32 within 1e-5, or as good as dense where the problem is worse conditioned: terms of logits, up to 20."""
    naive = value_and_gradients(dense, inputs, {n: x for n, x in options.items() if n != "workspace"}, torch.float32)
    actual = value_and_gradients(distill_loss, inputs, options, torch.float32)
    for x, exact, theirs in zip(actual, truth, naive, strict=True):
        if relative_error(x, exact) > 1e-5:
            assert_as_good_as(x, exact, theirs, magnitude=1.0)


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (37, 61), (61, 37)], ids=str)
def test_rows_alone_may_have_any_number_of_keys(shape):
    options = {"directions": BOTH[:1], "form": "kl"}
    assert_accurate(batch(*shape), options, value_and_gradients(dense, batch(*shape), options, torch.float64))


def open_clip_loss():
    """open_clip/loss.py by its path, as the benchmarks load it: it needs torch alone, the package more."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("open_clip_torch is not installed")
    found = importlib.util.spec_from_file_location(
        "open_clip_loss", Path(spec.submodule_search_locations[0]) / "loss.py"
    )
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.DistillClipLoss()


def test_equals_open_clip():
    theirs = open_clip_loss()

    def term(queries, keys, teacher_queries, teacher_keys, scale, teacher_scale):
        return theirs(queries, keys, scale, teacher_queries, teacher_keys, teacher_scale)[1]

    actual = value_and_gradients(distill_loss, batch(40, 40), {}, torch.float32)
    for x, exact in zip(actual, value_and_gradients(term, batch(40, 40), {}, torch.float64), strict=True):
        assert relative_error(x, exact) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("tau", "forward", "reverse", "without_diagonal"),
    [(1.0, 0.0157247237, 0.0149161567, 0.0243274754), (0.1, 0.0055145050, 0.0117476173, 0.2146609372)],
)
def test_unime_stage_1(dtype, tau, forward, reverse, without_diagonal):
    student, teacher = (F.normalize(x, dim=1).to(dtype) for x in (waves(5, 8, 0.0), waves(5, 12, 0.4)))
    sets = (student, student, teacher, teacher, 1 / tau)
    options = {"form": "kl", "directions": ("query_to_key",)}
    found = [
        distill_loss(*sets, **options),
        distill_loss(*sets, **options, divergence_direction="reverse"),
        distill_loss(*sets, **options, exclude_self=True),
    ]
    assert [x.item() for x in found] == pytest.approx([forward, reverse, without_diagonal], rel=2e-6, abs=6e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_unime_collapses_onto_the_diagonal(dtype):
    """4.6e-11 at temperature 0.02: what terms that cancel would lose in float32."""
    student, teacher = (F.normalize(x, dim=1).to(dtype) for x in (waves(5, 8, 0.0), waves(5, 12, 0.4)))
    loss = distill_loss(student, student, teacher, teacher, 50.0, form="kl", directions=("query_to_key",))
    assert loss.item() == pytest.approx(4.6e-11, rel=0.02)


def test_one_set_against_itself_gets_the_gradient_of_both_roles():
    z, teacher = batch(30, 30)["queries"], batch(30, 30)["teacher_queries"]
    results = []
    for dtype, function in ((torch.float32, distill_loss), (torch.float64, dense)):
        x, t = z.to(dtype).requires_grad_(), teacher.to(dtype)
        loss = function(x, x, t, t, 10.0, teacher_scale=20.0, exclude_self=True)
        results.append(torch.autograd.grad(loss, x)[0])
    assert relative_error(*results) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    inputs = batch(40, 40, dtype=dtype)
    actual = value_and_gradients(distill_loss, inputs, {}, None)
    truth = value_and_gradients(distill_loss, inputs, {}, torch.float64)
    upcast = value_and_gradients(distill_loss, inputs, {"implementation": "reference"}, None)
    for x, exact, naive in zip(actual, truth, upcast, strict=True):
        assert_as_good_as(x, exact, naive)


def test_the_teacher_gets_no_gradient_and_its_scale_defaults_to_the_students():
    inputs = {name: x.requires_grad_() for name, x in batch(20, 20).items()}
    loss = distill_loss(**inputs)
    names = ("teacher_queries", "teacher_keys", "teacher_scale")
    assert torch.autograd.grad(loss, [inputs[n] for n in names], allow_unused=True) == (None,) * 3
    inputs.pop("teacher_scale")
    assert torch.equal(distill_loss(**inputs), distill_loss(**inputs, teacher_scale=20.0))


@pytest.mark.parametrize("directions", [BOTH, BOTH[:1]])
def test_a_batch_of_one_and_of_none(directions):
    for count in (0, 1):
        inputs = {name: x.requires_grad_() for name, x in batch(count, count).items()}
        loss = distill_loss(**inputs, directions=directions, exclude_self=True)
        assert loss == 0
        assert all((g == 0).all() for g in torch.autograd.grad(loss, [inputs[name] for name in LEAVES]))


def test_runs_through_linear_kl_and_compiles():
    inputs = {name: x.requires_grad_(name in LEAVES) for name, x in batch(20, 20).items()}
    with trace() as ran:
        loss = distill_loss(**inputs)
    assert [(choice.op, choice.implementation) for choice in ran] == [("linear_kl", "cpu")] * 2
    compiled = torch.compile(distill_loss, fullgraph=True, backend="aot_eager")(**inputs)
    torch.testing.assert_close(compiled, loss)
    for a, b in zip(*(torch.autograd.grad(x, [inputs[n] for n in LEAVES]) for x in (compiled, loss)), strict=True):
        assert relative_error(a, b) < 1e-5


def test_autocast_rounds_nothing():
    inputs = batch(20, 20)
    expected = value_and_gradients(distill_loss, inputs, {}, None)
    with torch.autocast("cpu", torch.bfloat16):
        actual = value_and_gradients(distill_loss, inputs, {}, None)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_the_module_holds_scale_and_settings():
    inputs = batch(20, 20)
    arguments = [inputs[name] for name in ("queries", "keys", "teacher_queries", "teacher_keys")]
    module = DistillLoss(scale=20.0, learnable=True, teacher_scale=30.0, form="kl")
    loss = module(*arguments)
    assert loss.item() == pytest.approx(distill_loss(**inputs, form="kl").item(), rel=1e-6)
    loss.backward()
    assert module.log_scale.grad.abs() > 0
    assert DistillLoss().scale.item() == pytest.approx(1 / 0.07)
    other = module(*arguments, form="cross_entropy", teacher_scale=10.0)
    assert other.item() == pytest.approx(distill_loss(*arguments, 20.0, teacher_scale=10.0).item(), rel=1e-6)
    assert math.isfinite(loss.item())


X, T = torch.ones(4, 8), torch.ones(4, 3)
REFUSED = {
    "keys: width": (ValueError, r"keys must be \[N, 8\] to match queries", {"keys": X[:, :7]}),
    "teacher_keys: width": (
        ValueError,
        r"teacher_keys must be \[N, 3\] to match teacher_queries",
        {"teacher_keys": X},
    ),
    "teacher_queries: rows": (
        ValueError,
        "teacher_queries must have the 4 rows of queries, got 2",
        {"teacher_queries": T[:2]},
    ),
    "teacher_keys: rows": (ValueError, "teacher_keys must have the 4 rows of keys, got 3", {"teacher_keys": T[:3]}),
    "teacher_keys: device": (ValueError, "teacher_keys must be on cpu", {"teacher_keys": T.to("meta")}),
    "both of M and N": (
        ValueError,
        '"key_to_query" needs as many queries as keys, got 4 and 2',
        {"keys": X[:2], "teacher_keys": T[:2]},
    ),
    "directions: text": (ValueError, "directions must be one or both of", {"directions": "query_to_key"}),
    "directions: none": (ValueError, "directions must be one or both of", {"directions": ()}),
    "directions: twice": (ValueError, "directions must be one or both of", {"directions": BOTH[:1] * 2}),
    "directions: unknown": (ValueError, "directions must be one or both of", {"directions": ("rows",)}),
    "form": (ValueError, "form must be one of 'cross_entropy', 'kl', got 'ce'", {"form": "ce"}),
    "divergence_direction": (
        ValueError,
        "divergence_direction must be one of",
        {"divergence_direction": "both", "form": "kl"},
    ),
    "reverse cross entropy": (
        ValueError,
        'form "cross_entropy" goes with divergence_direction "forward"',
        {"divergence_direction": "reverse"},
    ),
    "scale": (TypeError, "scale must be a number", {"scale": "1"}),
    "teacher_scale": (ValueError, r"teacher_scale must be a number .* got \[2\]", {"teacher_scale": torch.ones(2)}),
    "weights": (ValueError, r"weights must be \[4\], got \[3\]", {"weights": torch.ones(3)}),
    "weights: gradient": (
        ValueError,
        "weights must not require a gradient",
        {"weights": torch.ones(4, requires_grad=True)},
    ),
    "reduction": (ValueError, "reduction must be one of", {"reduction": "max"}),
    "workspace": (ValueError, "workspace must be at least 0 bytes", {"workspace": -1}),
}


@pytest.mark.parametrize(("error", "message", "changed"), REFUSED.values(), ids=REFUSED)
def test_refused_at_the_door(error, message, changed):
    with pytest.raises(error, match=f"^distill_loss: .*{message}"):
        distill_loss(**{"queries": X, "keys": X, "teacher_queries": T, "teacher_keys": T, **changed})
