"""linear_cross_entropy against F.cross_entropy of dense logits, in value and every gradient."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from language import LEAVES, head, named, targets, waves
from similarity import assert_accurate, evaluate, tiles

from fastcontrast.ops import linear_cross_entropy, similarity_cross_entropy, trace
from fastcontrast.testing import relative_error

call = named(linear_cross_entropy)
SIZES = [(1, 1, 1), (1, 7, 3), (5, 1, 4), (13, 33, 7), (64, 65, 16), (67, 131, 61), (130, 257, 24), (303, 79, 1)]


# -------------------------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_reference_is_cross_entropy_of_dense_logits(reduction, ignore_index):
    inputs = {name: x.double().requires_grad_() for name, x in head(20, 11, 6).items()}
    y = targets(20, 11, ignore_index=ignore_index)
    options = {"targets": y, "ignore_index": ignore_index, "reduction": reduction, "implementation": "reference"}
    loss = call(**inputs, **options)
    logits = inputs["queries"] @ inputs["keys"].T + inputs["key_bias"]
    expected = F.cross_entropy(logits, y, ignore_index=ignore_index, reduction=reduction)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(loss.sum(), inputs.values())
    for actual, exact in zip(gradients, torch.autograd.grad(expected.sum(), inputs.values()), strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12)


def test_golden_value():
    hidden, weight = waves(6, 8, 0.0), waves(11, 8, 0.5)
    y = torch.tensor([3, -100, 7, 0, 10, -100])
    assert linear_cross_entropy(hidden, weight, y).item() == pytest.approx(4.927665430274, abs=1e-12)
    assert linear_cross_entropy(hidden.float(), weight.float(), y).item() == pytest.approx(4.927665430274, rel=1e-6)


def test_golden_gradients():
    hidden, weight = waves(4, 5, 0.0).float().requires_grad_(), waves(6, 5, 0.6).float().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 3, 5, 2]))
    norms = [x.norm().item() for x in torch.autograd.grad(loss, [hidden, weight])]
    assert [loss.item(), *norms] == pytest.approx([2.949846809099, 0.973929971867, 0.781798457738], rel=1e-6)


# ------------------------------------------------------------------------------------------------------- against truth


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("workspace", [0, 4 * 257 * 10, None])
def test_value_and_every_gradient(shape, reduction, workspace, monkeypatch):
    monkeypatch.setattr(importlib.import_module(similarity_cross_entropy.__module__), "MIN_ROWS", 1)
    t, v, d = shape
    with tiles(16, 32):
        options = {"targets": targets(t, v), "reduction": reduction, "workspace": workspace}
        assert_accurate(head(t, v, d), options, needs=LEAVES, call=call, magnitude=1.0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("needs", [("queries",), ("keys",), ("key_bias",), ("queries", "keys")])
def test_what_is_frozen_gets_nothing(needs, reduction):
    options = {"targets": targets(67, 131), "reduction": reduction}
    with tiles(16, 32):
        assert_accurate(head(67, 131, 16), options, needs=needs, call=call)


@pytest.mark.parametrize("bias", [False, True])
def test_weighted_tokens(bias):
    inputs, y = head(67, 131, 16), targets(67, 131)
    inputs["key_bias"] = inputs["key_bias"] if bias else None
    weights = torch.linspace(0, 3, 67)
    for reduction in ("mean", "sum", "none"):
        options = {"targets": y, "weights": weights, "reduction": reduction}
        with tiles(16, 32):
            assert_accurate(inputs, options, needs=LEAVES, call=call)
    losses = call(**inputs, targets=y, reduction="none")
    assert relative_error(call(**inputs, targets=y, weights=weights, reduction="none"), losses * weights) < 1e-6
    mean = call(**inputs, targets=y, weights=weights)
    assert mean.item() == pytest.approx(float((losses * weights).sum() / weights[y >= 0].sum()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_precision_is_as_good_as_dense_fp32_logits(dtype, reduction):
    inputs = head(130, 257, 64, dtype)
    inputs["key_bias"] = inputs["key_bias"].to(dtype)
    with tiles(16, 32):
        options = {"targets": targets(130, 257), "reduction": reduction, "workspace": 4 * 257 * 30}
        assert_accurate(inputs, options, needs=LEAVES, call=call)


def test_any_leading_shape_and_strides():
    inputs = head(24, 31, 8)
    y = targets(24, 31)
    flat = call(**inputs, targets=y, reduction="none")
    shaped = linear_cross_entropy(
        inputs["queries"].view(2, 3, 4, 8), inputs["keys"], y.view(2, 3, 4), bias=inputs["key_bias"], reduction="none"
    )
    assert torch.equal(shaped, flat.view(2, 3, 4))
    wide = torch.cat([inputs["queries"], inputs["queries"]], 1)[:, ::2].contiguous().repeat_interleave(2, 1)[:, ::2]
    transposed = inputs["keys"].t().contiguous().t()
    expected = linear_cross_entropy(wide.contiguous(), inputs["keys"], y)
    assert linear_cross_entropy(wide, transposed, y).item() == pytest.approx(expected.item(), rel=1e-6)


# ------------------------------------------------------------------------------------------------------- ends of range


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("weights", [None, torch.ones(7)])
def test_nothing_left_gives_zero_and_gradients_of_zero(implementation, weights):
    inputs = {name: x.requires_grad_() for name, x in head(7, 5, 3).items()}
    y = torch.full((7,), -100)
    for reduction in ("mean", "sum", "none"):
        loss = call(**inputs, targets=y, weights=weights, reduction=reduction, implementation=implementation)
        assert loss.shape == ((7,) if reduction == "none" else ()) and (loss == 0).all()
        for gradient in torch.autograd.grad(loss.sum(), inputs.values()):
            assert (gradient == 0).all()


@pytest.mark.parametrize("shape", [(0, 5, 3), (0, 0, 3), (4, 0, 3), (4, 5, 0)], ids=str)
def test_empty_sizes(shape):
    t, v, d = shape
    inputs = {name: x.requires_grad_() for name, x in head(t, v, d).items()}
    y = torch.zeros(t).long() if v else torch.full((t,), -100)
    loss = call(**inputs, targets=y)
    gradients = torch.autograd.grad(loss, inputs.values())
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients)
    assert (v and t) or loss == 0


def test_weights_that_sum_to_zero():
    inputs = head(6, 5, 3)
    assert call(**inputs, targets=torch.zeros(6).long(), weights=torch.zeros(6)) == 0


def test_nan_in_an_ignored_token_stays_there():
    inputs, y = head(20, 31, 8), targets(20, 31)
    inputs["queries"][y < 0] = float("nan")
    results = evaluate(inputs, {"targets": y}, needs=LEAVES, call=call)
    assert all(x.isfinite().all() for x in results.values())


def test_nan_in_a_token_that_counts_comes_out():
    inputs, y = head(20, 31, 8), torch.zeros(20).long()
    inputs["queries"][3, 0] = float("nan")
    losses = call(**inputs, targets=y, reduction="none")
    assert losses.isnan().tolist() == [i == 3 for i in range(20)]
    assert call(**inputs, targets=y).isnan()


def test_a_vocabulary_entry_of_probability_zero():
    """A bias of −inf takes an entry out."""
    inputs, y = head(20, 31, 8), targets(20, 30)
    inputs["key_bias"][30] = -torch.inf
    results = evaluate(inputs, {"targets": y}, needs=("queries", "keys"), call=call)
    less = {name: x[:30] if name != "queries" else x for name, x in inputs.items()}
    expected = evaluate(less, {"targets": y}, needs=("queries", "keys"), call=call)
    assert relative_error(results["dqueries"], expected["dqueries"]) < 1e-5
    assert (results["dkeys"][30] == 0).all()


# ------------------------------------------------------------------------------------------------ how it goes about it


def test_ignored_tokens_are_never_multiplied(monkeypatch):
    rows = []
    product = torch.mm

    def noted(a, b, **how):
        rows.append(a.shape[0])
        return product(a, b, **how)

    monkeypatch.setattr(torch, "mm", noted)
    inputs, y = head(60, 31, 8), torch.full((60,), -100)
    y[17], y[44] = 3, 5
    for reduction in ("mean", "none"):
        call(**inputs, targets=y, reduction=reduction)
    assert set(rows) == {2}


def test_runs_through_similarity_lse():
    inputs = head(20, 31, 8)
    for implementation in ("cpu", "reference"):
        with trace() as ran:
            call(**inputs, targets=targets(20, 31), implementation=implementation)
        assert [(choice.op, choice.implementation) for choice in ran] == [("similarity_lse", implementation)]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_compiles_without_a_break(reduction, weighted):
    inputs, y = head(20, 31, 8), targets(20, 31)
    options = {"reduction": reduction, "weights": torch.linspace(0, 2, 20) if weighted else None}

    def step(queries, keys, key_bias):
        return call(queries, keys, key_bias, targets=y, **options)

    leaves = [x.requires_grad_() for x in inputs.values()]
    expected = step(*leaves)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    weight = torch.linspace(0.5, 1, actual.numel()).view(actual.shape)
    gradients = (torch.autograd.grad((x * weight).sum(), leaves) for x in (actual, expected))
    for a, b in zip(*gradients, strict=True):
        assert relative_error(a, b) < 1e-5


def test_autocast_rounds_nothing():
    inputs, y = {name: x.requires_grad_() for name, x in head(20, 31, 8).items()}, targets(20, 31)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = [call(**inputs, targets=y, reduction=reduction) for reduction in ("mean", "none")]
            results.append([x for loss in losses for x in (loss, *torch.autograd.grad(loss.sum(), inputs.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bit_identical_runs():
    inputs, y = head(67, 131, 16), targets(67, 131)
    with tiles(16, 32, threads=3):
        first, second = (evaluate(inputs, {"targets": y}, needs=LEAVES, call=call) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------------------------------------------------- the door

H, W, Y = torch.zeros(2, 3, 8), torch.zeros(5, 8), torch.zeros(2, 3).long()
REFUSED = {
    "hidden: a vector": (ValueError, r"hidden must be \[..., width\], got \[8\]", {"hidden": H[0, 0]}),
    "hidden: a list": (TypeError, "hidden must be a tensor, got list", {"hidden": [1.0]}),
    "weight: width": (ValueError, r"weight must be \[N, 8\] to match hidden, got \[5, 7\]", {"weight": W[:, :7]}),
    "weight: dtype": (TypeError, "weight must be float32 like hidden, got bfloat16", {"weight": W.bfloat16()}),
    "weight: device": (ValueError, "weight must be on cpu like hidden, got meta", {"weight": W.to("meta")}),
    "bias: length": (ValueError, r"bias must be \[5\], got \[8\]", {"bias": torch.zeros(8)}),
    "targets: shape": (ValueError, r"targets must be \[2, 3\], one a token, got \[6\]", {"targets": Y.flatten()}),
    "targets: floats": (TypeError, "targets must be an integer tensor, got float32", {"targets": Y.float()}),
    "targets: too large": (ValueError, r"targets must lie in \[0, 5\), got values in \[5, 5\]", {"targets": Y + 5}),
    "targets: negative": (ValueError, r"targets must lie in \[0, 5\), got values in \[-1, -1\]", {"targets": Y - 1}),
    "targets: None": (TypeError, "targets must be a tensor, got NoneType", {"targets": None}),
    "weights: shape": (ValueError, r"weights must be \[2, 3\], one a token, got \[2\]", {"weights": torch.ones(2)}),
    "weights: integers": (TypeError, "weights must be floating point, got int64", {"weights": Y}),
    "reduction": (ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'max'", {"reduction": "max"}),
    "workspace": (ValueError, "workspace must be at least 0 bytes, got -1", {"workspace": -1}),
    "implementation": (ValueError, "implementation must be one of cpu.* got 'gpu'", {"implementation": "gpu"}),
    "implementation for float64": (
        NotImplementedError,
        "'cpu' cannot run: it takes float32, bfloat16 or float16, got float64",
        {"hidden": H.double(), "weight": W.double(), "implementation": "cpu"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize(("error", "message", "changed"), REFUSED.values(), ids=REFUSED)
def test_refused_at_the_door(error, message, changed, implementation):
    with pytest.raises(error, match=f"^linear_cross_entropy: .*{message}"):
        linear_cross_entropy(**{"hidden": H, "weight": W, "targets": Y, "implementation": implementation, **changed})


def test_no_gradient_of_its_gradient():
    inputs = [x.requires_grad_() for x in head(20, 31, 8).values()]
    loss = call(*inputs, targets=targets(20, 31))
    with pytest.raises(NotImplementedError, match="reference"):
        torch.autograd.grad(loss, inputs, create_graph=True)
