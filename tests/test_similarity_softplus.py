"""similarity_softplus against float64 truth: value and every gradient, on ragged shapes, targets, masks, ends of range.

The triton implementation has the same tests, smaller, in test_kernels_softplus.py.
"""

import math

import pytest
import torch
from similarity import assert_accurate, assert_same, embeddings, evaluate, generator, tiles, unit
from torch.nn import functional as F

from fastcontrast.ops import similarity_softplus, trace
from fastcontrast.testing import RAGGED, relative_error

LEAVES = ("queries", "keys", "scale", "bias")
SHAPES = ((0, 7), (7, 0), (1, 1), (1, 130), (129, 1), (61, 97), (97, 61), (64, 64), (130, 257))


def problem(m: int, n: int, d: int = 24, dtype=torch.float32, scale: float = 10.0, bias: float = -10.0) -> dict:
    return {**embeddings(m, n, d, dtype), "scale": torch.tensor(scale), "bias": torch.tensor(bias)}


def targets(m: int, n: int) -> dict[str, dict]:
    """Options that say what is positive, by name."""
    labels = {"query_labels": torch.arange(m) % 5, "key_labels": torch.arange(n) % 7}
    soft = torch.rand(m, n, generator=generator(4))
    index = 3 * torch.arange(m) % n if n else torch.full((m,), -1)
    return {
        "own": {},
        "positives": {"positives": index},
        "some without": {"positives": torch.where(torch.arange(m) % 2 == 0, -1, index)},
        "none": {"positives": -1},
        "labels": labels,
        "labels, smoothed": {**labels, "label_smoothing": 0.2},
        "own, smoothed": {"label_smoothing": 0.1},
        "soft": {"targets": soft},
        "soft, half precision": {"targets": soft.bfloat16().t().contiguous().t()},
        "hard, bool": {"targets": soft > 0.9},
    }


def masks(m: int, n: int) -> dict[str, dict]:
    ids = {"query_ids": torch.arange(m) % 11, "key_ids": torch.arange(n) % 13}
    guide = (unit(m, 5, 7), unit(n, 5, 8), torch.linspace(-0.5, 0.9, max(m, 1))[:m])
    return {"ids": ids, "guide": {"guide": guide}, "both": {**ids, "guide": guide}}


def check(inputs: dict, options: dict, **how) -> None:
    assert_accurate(inputs, options, call=similarity_softplus, **{"needs": LEAVES, **how})


# -------------------------------------------------------------------------------------------------------- the reference


def test_reference_equals_scalar_loops():
    m, n = 4, 6
    q, k = unit(m, 3, 1).double(), unit(n, 3, 2).double()
    query_labels, key_labels = torch.tensor([0, 1, 2, 7]), torch.tensor([0, 0, 2, 1, 1, 1])
    query_ids, key_ids = torch.tensor([1, 2, 3, 4]), torch.tensor([1, 9, 3, 2, 9, 1])
    expected = []
    for i in range(m):
        total = 0.0
        for j in range(n):
            if query_ids[i] == key_ids[j] and i != j:
                continue
            logit = 3.0 * float(q[i] @ k[j]) - 1.0
            sign = 1 if query_labels[i] == key_labels[j] else -1
            total += math.log1p(math.exp(-sign * logit))
        expected.append(total)
    labels = {"query_labels": query_labels, "key_labels": key_labels}
    rows = similarity_softplus(q, k, 3.0, -1.0, **labels, query_ids=query_ids, key_ids=key_ids)
    assert rows.tolist() == pytest.approx(expected, rel=1e-12)


def test_reference_gradients_equal_finite_differences():
    def function(q, k, scale, bias):
        return similarity_softplus(q, k, scale, bias, query_ids=torch.tensor([0, 1, 1, 2]), key_ids=torch.arange(3))

    inputs = [unit(4, 3, 1), unit(3, 3, 2), torch.tensor(2.5), torch.tensor(-0.5)]
    assert torch.autograd.gradcheck(function, [x.double().requires_grad_() for x in inputs])


def test_it_is_binary_cross_entropy():
    inputs = problem(40, 50)
    soft = torch.rand(40, 50, generator=generator(1))
    logits = inputs["scale"] * inputs["queries"] @ inputs["keys"].t() + inputs["bias"]
    dense = F.binary_cross_entropy_with_logits(logits, soft, reduction="none").sum(1)
    assert relative_error(similarity_softplus(**inputs, targets=soft), dense) < 1e-6
    # And for hard labels the sum of log-sigmoids with signs.
    sign = 2 * torch.eye(40, 50) - 1
    assert relative_error(similarity_softplus(**inputs), -F.logsigmoid(sign * logits).sum(1)) < 1e-6


# ---------------------------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", targets(1, 1))
@pytest.mark.parametrize("tile", [(16, 32), (33, 130)], ids=str)
def test_value_and_every_gradient(shape, kind, tile):
    with tiles(*tile):
        check(problem(*shape), targets(*shape)[kind])


@pytest.mark.parametrize("kind", ["own", "labels", "soft", "own, smoothed"])
@pytest.mark.parametrize("mask", masks(1, 1))
def test_masks(kind, mask):
    shape = (97, 130)
    with tiles(16, 32):
        check(problem(*shape), {**targets(*shape)[kind], **masks(*shape)[mask]})


@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_ragged_shapes_on_real_tiles(shape):
    check(problem(shape.m, shape.n, shape.d), {})
    check(problem(shape.m, shape.n, shape.d), {"reduction": "sum"})


@pytest.mark.parametrize(
    ("scale", "bias"), [(1.0, 0.0), (10.0, -10.0), (100.0, -16.0), (100.0, 40.0), (0.0, 1.0), (-5.0, 0.3)]
)
def test_scales_and_biases(scale, bias):
    check(problem(130, 97, scale=scale, bias=bias), {})
    check(problem(130, 97, scale=scale, bias=bias), {"reduction": "sum"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_half_precision_is_as_good_as_dense_fp32_logits(dtype, reduction):
    for scale in (10.0, 100.0):
        check(problem(257, 129, 64, dtype, scale=scale), {"reduction": reduction})


def test_nearly_solved_batch_keeps_its_digits():
    """Positives at L = 20 and negatives at −20: losses of 2e-9 that 1 − σ or softplus − L would round to 0."""
    q = torch.eye(33)
    inputs = {"queries": q, "keys": q.clone(), "scale": torch.tensor(40.0), "bias": torch.tensor(-20.0)}
    check(inputs, {}, strict=True)
    check(inputs, {"reduction": "sum"}, strict=True)


@pytest.mark.parametrize(
    "needs", [("queries",), ("keys",), ("scale",), ("bias",), ("keys", "scale"), ("scale", "bias")], ids=str
)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_any_subset_of_gradients(needs, reduction):
    with tiles(16, 32):
        check(problem(61, 97), {"reduction": reduction}, needs=needs)


def test_weights_of_rows():
    weights = torch.rand(61, generator=generator(3))
    weights[5] = 0.0
    with tiles(16, 32):
        for reduction in ("sum", "mean"):
            check(problem(61, 97), {"reduction": reduction, "weights": weights})


def test_the_sum_does_three_products_and_arbitrary_rows_four():
    inputs = problem(64, 64)
    counts = []
    for reduction in ("sum", "none"):
        with tiles(64, 64), torch.profiler.profile() as profile:
            evaluate(inputs, {"reduction": reduction}, needs=LEAVES, call=similarity_softplus)
        counts.append(sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm_")))
    assert counts == [3, 4]


def test_a_second_backward_through_the_sum():
    inputs = {name: x.requires_grad_() for name, x in problem(33, 47).items()}
    loss = similarity_softplus(**inputs, reduction="sum")
    first = torch.autograd.grad(3.0 * loss, list(inputs.values()), retain_graph=True)
    second = torch.autograd.grad(3.0 * loss, list(inputs.values()))
    for a, b in zip(first, second, strict=True):
        assert relative_error(a, b) < 1e-6


# --------------------------------------------------------------------------------------------------- ends of the range


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["queries", "keys"])
def test_nan_and_infinite_inputs(value, where):
    inputs = {name: x for name, x in problem(40, 50, 8).items() if name in ("queries", "keys")}
    inputs[where][21, 3] = value
    options = {"scale": 5.0, "bias": -3.0}
    with tiles(16, 32):
        actual = evaluate(inputs, options, needs=("queries", "keys"), call=similarity_softplus)
    if where == "queries" and math.isnan(value):
        assert torch.equal(actual["value 0"].isnan(), torch.arange(40) == 21)
        assert torch.equal(actual["dqueries"].isnan().any(1), torch.arange(40) == 21)
    else:
        assert not actual["value 0"].isfinite().all()


def test_rows_with_everything_masked_count_nothing():
    ids = {"query_ids": torch.zeros(20, dtype=torch.int64), "key_ids": torch.zeros(30, dtype=torch.int64)}
    with tiles(16, 32):
        results = evaluate(problem(20, 30), {**ids, "positives": -1}, needs=LEAVES, call=similarity_softplus)
    assert all((x == 0).all() for x in results.values())


def test_strided_and_expanded_inputs():
    inputs = problem(61, 97)
    strided = {
        **inputs,
        "queries": inputs["queries"].t().contiguous().t(),
        "keys": torch.cat([inputs["keys"]] * 2, 1)[:, :24],
    }
    assert_same(
        evaluate(strided, {}, needs=LEAVES, call=similarity_softplus),
        evaluate(inputs, {}, needs=LEAVES, call=similarity_softplus),
    )
    check({**inputs, "queries": inputs["queries"][:1].expand(61, -1)}, {})


@pytest.mark.parametrize("threads", [1, 3])
def test_runs_are_bit_identical(threads):
    inputs = problem(337, 523)
    with tiles(48, 80, threads=threads):
        first, second = (evaluate(inputs, {}, needs=LEAVES, call=similarity_softplus) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# ----------------------------------------------------------------------------------------------- compilers and contexts


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_compiled_into_one_graph(reduction):
    inputs = problem(33, 47)
    compiled = torch.compile(similarity_softplus, fullgraph=True, backend="aot_eager")
    actual = evaluate(inputs, {"reduction": reduction}, needs=LEAVES, call=compiled)
    assert_same(actual, evaluate(inputs, {"reduction": reduction}, needs=LEAVES, call=similarity_softplus))


@pytest.mark.parametrize("kind", ["own", "labels", "soft"])
def test_opcheck(kind):
    m, n = 9, 13
    given = targets(m, n)[kind]
    inputs = [x.clone().requires_grad_() for x in problem(m, n).values()]
    own = torch.arange(m) if kind == "own" else None
    labels = given.get("query_labels"), given.get("key_labels"), given.get("targets")
    arguments = (*inputs, None, None, own, None, None, None, *labels, 1.0, 0.0)
    torch.library.opcheck(torch.ops.fastcontrast.similarity_softplus, arguments)


def test_autocast_does_not_round_logits():
    inputs = problem(61, 97, scale=100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = evaluate(inputs, {}, needs=LEAVES, call=similarity_softplus)
    assert_same(actual, evaluate(inputs, {}, needs=LEAVES, call=similarity_softplus), limit=0.0)


def test_float64_runs_on_the_reference():
    with trace() as ran:
        rows = similarity_softplus(unit(5, 3, 1).double(), unit(7, 3, 2).double(), 2.0)
    assert rows.dtype == torch.float64
    assert [(choice.op, choice.implementation) for choice in ran] == [("similarity_softplus", "reference")]
    assert "float64" in ran[0].refused["cpu"]


def test_a_second_derivative_is_refused():
    q, k = unit(4, 3, 1).requires_grad_(), unit(4, 3, 2)
    for reduction in ("none", "sum"):
        loss = similarity_softplus(q, k, reduction=reduction).sum()
        with pytest.raises(NotImplementedError, match="reference"):
            torch.autograd.grad(loss, q, create_graph=True)


# ---------------------------------------------------------------------------------------------------------------- doors

Q, K = torch.zeros(4, 8), torch.zeros(6, 8)
LABELS = {"query_labels": torch.arange(4), "key_labels": torch.arange(6)}
REFUSED = {
    "keys: width": (ValueError, r"keys must be \[N, 8\] to match queries, got \[6, 7\]", {"keys": K[:, :7]}),
    "bias: text": (TypeError, "bias must be a number.* got str", {"bias": "1"}),
    "bias: vector": (ValueError, r"bias must be a number.* got \[6\]", {"bias": torch.zeros(6)}),
    "labels: one missing": (ValueError, "got no key_labels", {"query_labels": torch.arange(4)}),
    "labels: length": (ValueError, r"key_labels must be \[6\], got \[4\]", {**LABELS, "key_labels": torch.arange(4)}),
    "targets: shape": (ValueError, r"targets must be \[4, 6\], got \[6, 4\]", {"targets": torch.zeros(6, 4)}),
    "targets: integers": (TypeError, "targets must be.* got torch.int64", {"targets": torch.zeros(4, 6).long()}),
    "targets and labels": (ValueError, "cannot go with labels", {"targets": torch.zeros(4, 6), **LABELS}),
    "smoothing": (ValueError, "label_smoothing must lie in", {"label_smoothing": 1.5}),
    "weights: rows": (ValueError, "weights go with reduction 'mean' or 'sum'", {"weights": torch.ones(4)}),
    "weights: length": (ValueError, r"weights must be \[4\]", {"weights": torch.ones(6), "reduction": "sum"}),
    "weights: gradient": (
        ValueError,
        "must not require a gradient",
        {"weights": torch.ones(4, requires_grad=True), "reduction": "sum"},
    ),
    "reduction": (ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'max'", {"reduction": "max"}),
    "positives": (ValueError, r"positives must lie in \[-1, 6\)", {"positives": torch.tensor([0, 1, 2, 6])}),
}


@pytest.mark.parametrize(("error", "message", "changed"), REFUSED.values(), ids=REFUSED)
def test_refused_at_the_door(error, message, changed):
    with pytest.raises(error, match=f"^similarity_softplus: .*{message}"):
        similarity_softplus(**{"queries": Q, "keys": K, **changed})
