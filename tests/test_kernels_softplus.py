"""The Triton kernels of similarity_softplus and their schedule, in the interpreter, against float64 truth."""

import math

import pytest
import torch
from interpreter import tiles
from similarity import assert_accurate, embeddings, evaluate, generator, unit

from fastcontrast.ops import similarity_softplus, trace
from fastcontrast.testing import assert_as_good_as, relative_error

# Of numbers that a mask throws away.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HOW = {"implementation": "triton", "call": similarity_softplus}
LEAVES = ("queries", "keys", "scale", "bias")


def problem(m: int, n: int, d: int, dtype=torch.float32, bias: float = -10.0) -> dict:
    return {**embeddings(m, n, d, dtype), "bias": torch.tensor(bias)}


def labels(m: int, n: int) -> dict:
    return {"query_labels": torch.arange(m) % 5, "key_labels": torch.arange(n) % 7}


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 200, 15), (130, 1, 16), (0, 7, 8), (7, 0, 8), (61, 97, 33), (33, 31, 100), (64, 64, 64)]
)
@pytest.mark.parametrize("options", ["own", "labels", "dense", "smoothed"])
def test_value_and_every_gradient(shape, options):
    m, n, _ = shape
    options = {
        "own": {},
        "labels": labels(m, n),
        "dense": {"targets": torch.rand(m, n, generator=generator(3))},
        "smoothed": {"label_smoothing": 0.1, "positives": -1},
    }[options]
    with tiles():
        assert_accurate(problem(*shape), options, needs=LEAVES, magnitude=30.0, **HOW)


@pytest.mark.parametrize("masked", ["ids", "guide", "both"])
@pytest.mark.parametrize("with_labels", [False, True])
def test_masked_pairs_count_for_nothing(masked, with_labels):
    m, n = 61, 97
    options = labels(m, n) if with_labels else {}
    if masked != "guide":
        options |= {"query_ids": torch.arange(m) % 3, "key_ids": torch.arange(n) % 4}
    if masked != "ids":
        guides = [torch.randint(-2, 3, (size, 3), generator=generator(size)).float() for size in (m, n)]
        options["guide"] = (*guides, torch.randint(-1, 3, (m,), generator=generator(5)) + 0.5)
    with tiles():
        assert_accurate(problem(m, n, 24), options, needs=LEAVES, magnitude=30.0, **HOW)


@pytest.mark.parametrize("bias", [-30.0, -10.0, 0.0, 20.0])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_losses_far_from_zero_keep_their_digits(bias, scale):
    """log(1 + e) of e = exp(−30), and σ − 1 of a pair that is learned, in full relative precision."""
    inputs = {**problem(61, 67, 32, bias=bias), "scale": torch.tensor(scale)}
    with tiles():
        assert_accurate(inputs, {}, needs=LEAVES, magnitude=0.0 if scale == 1.0 else 100.0, **HOW)


def test_a_collapsed_batch_far_below_zero():
    """All losses alike: an error that they share does not average out."""
    q = unit(1, 16, 1).expand(40, 16)
    inputs = {"queries": q, "keys": -q, "scale": torch.tensor(1.0), "bias": torch.tensor(-12.3)}
    with tiles():
        assert_accurate(inputs, {"positives": -1}, needs=LEAVES, strict=True, **HOW)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_dense_fp32_logits(dtype):
    """As for similarity_lse: in float16 the weights round as coarsely as the gradient itself does."""
    inputs, how = problem(129, 97, 64, dtype, bias=-3.0), {"call": similarity_softplus, "needs": LEAVES}
    with tiles():
        actual = evaluate(inputs, {}, implementation="triton", **how)
    truth = evaluate(inputs, {}, dtype=torch.float64, implementation="reference", **how)
    naive = evaluate(inputs, {}, implementation="reference", **how)
    for name in truth:
        factor = 1.5 if name in ("dqueries", "dkeys") and dtype == torch.float16 else 1.2
        assert_as_good_as(actual[name], truth[name], naive[name], factor, magnitude=20.0)


@pytest.mark.parametrize("needs", [("queries",), ("keys",), ("scale",), ("bias",), ("keys", "bias")], ids=" ".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_some_gradients_alone(needs, dtype):
    with tiles():
        assert_accurate(problem(61, 67, 24, dtype), {}, needs=needs, magnitude=30.0, **HOW)


def test_dense_targets_of_any_layout_and_dtype():
    y = torch.rand(67, 61, generator=generator(1)).bfloat16().t()
    with tiles():
        assert_accurate(problem(61, 67, 16), {"targets": y}, needs=LEAVES, magnitude=30.0, **HOW)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stays_in_its_row(value):
    inputs = problem(40, 50, 8)
    inputs["queries"][21, 3] = value
    with tiles():
        actual = evaluate(inputs, {}, needs=LEAVES, implementation="triton", call=similarity_softplus)
    truth = evaluate(inputs, {}, needs=LEAVES, implementation="reference", call=similarity_softplus)
    for name in ("value 0", "dqueries", "dkeys"):
        assert torch.equal(actual[name].isfinite(), truth[name].isfinite()), name


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_formed_in_the_forward(reduction, dtype):
    inputs = {name: x.requires_grad_() for name, x in problem(61, 67, 24, dtype).items()}
    options = {"reduction": reduction, "weights": torch.rand(61, generator=generator(2))}
    with tiles(), trace() as ran:
        loss = similarity_softplus(**inputs, **options, implementation="triton")
        actual = torch.autograd.grad(loss, [*inputs.values()])
    assert ran[0].implementation == "triton"
    dense = similarity_softplus(**inputs, **options, implementation="reference")
    assert relative_error(loss, dense) < 1e-5
    for a, b in zip(actual, torch.autograd.grad(dense, [*inputs.values()]), strict=True):
        assert relative_error(a.double(), b.double()) < (1e-5 if dtype == torch.float32 else 5e-3)


def test_runs_are_identical():
    with tiles():
        runs = [
            evaluate(problem(61, 67, 24), {}, needs=LEAVES, implementation="triton", call=similarity_softplus)
            for _ in range(2)
        ]
    for name, x in runs[0].items():
        assert torch.equal(x, runs[1][name]), name
