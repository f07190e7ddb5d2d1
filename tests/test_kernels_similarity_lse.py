"""The Triton kernels of similarity_lse and their schedule, in the interpreter, against float64 truth.

What the interpreter hides (products of K < 16, tf32, races, shared memory) is the compile gate's: test_compile_gate.py.
"""

import math
from unittest import mock

import pytest
import test_similarity_lse as everywhere
import torch
from fastcontrast.kernels import _common, similarity_softplus
from fastcontrast.kernels import similarity_lse as kernel
from fastcontrast.kernels._common import Config
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import TILE, tiles
from similarity import (
    DIMS,
    assert_accurate,
    biased,
    embeddings,
    evaluate,
    generator,
    unit,
)

from fastcontrast.ops import _device_sweep, similarity_cross_entropy, similarity_lse, trace
from fastcontrast.ops._sweep import Masks
from fastcontrast.testing import assert_as_good_as, relative_error
from fastcontrast.testing.tolerance import FLOOR

# Of numbers that a mask throws away.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

PAIR = ("queries", "keys")
TRITON = {"implementation": "triton"}

# One, beside a tile of 32, beside two, primes; widths beside a step of 16, and 8 · odd, which gets a hint of its own.
SIZES = (0, 1, 2, 7, 31, 32, 33, 61, 64, 65, 97)
WIDTHS = (0, 1, 2, 15, 16, 33, 40, 64, 100)


@st.composite
def problems(draw, **kind):
    with mock.patch.multiple(everywhere, SIZES=SIZES, WIDTHS=WIDTHS):
        inputs, options, _ = draw(everywhere.problems(**kind))
    schedule = {"workspace": draw(st.sampled_from((0, 9_000, 1 << 20))), "parts": draw(st.sampled_from((0, 1 << 20)))}
    return inputs, options, schedule


def assert_good(inputs, options, **how):
    """`assert_accurate`; for half precision with what the weights' own rounding to 11 bits may do to a few numbers,
    where luck decides which way the gradient is rounded. Larger matrices below are held to the ratio alone."""
    magnitude = everywhere.conditioning(inputs)
    if inputs["queries"].dtype == torch.float32:
        return assert_accurate(inputs, options, magnitude=magnitude, **TRITON, **how)
    actual = evaluate(inputs, options, **TRITON, **how)
    truth = evaluate(inputs, options, dtype=torch.float64, implementation="reference", **how)
    naive = evaluate(inputs, options, implementation="reference", **how)
    for name in truth:
        size = magnitude
        if name in ("dqueries", "dkeys"):
            # Each weight is off by at most 2⁻¹² of itself; a row of them sums to 3 at most, for upstreams below 1.5.
            longest = max(float(inputs[x].float().norm(dim=-1).amax()) if len(inputs[x]) else 0.0 for x in PAIR)
            terms = 4.5 * float(inputs["scale"]) * longest * max(len(inputs[x]) for x in PAIR)
            size = 2.0**-12 * terms / FLOOR
        assert_as_good_as(actual[name], truth[name], naive[name], magnitude=size)


@settings(max_examples=40)
@given(problems())
def test_value_and_every_gradient(problem):
    inputs, options, schedule = problem
    with tiles(**schedule):
        assert_good(inputs, options)


@settings(max_examples=20)
@given(problems(symmetric=True))
def test_one_set_against_itself(problem):
    inputs, options, schedule = problem
    with tiles(**schedule):
        assert_accurate(
            {**inputs, "queries": inputs["queries"].float()},
            options,
            magnitude=everywhere.conditioning(inputs),
            **TRITON,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", DIMS)
def test_half_precision_is_as_good_as_dense_fp32_logits(dtype, dim):
    """bfloat16 within 1.2 ×. In float16 the weights round as coarsely as the gradient itself does, so √2 × in all."""
    inputs, options = biased(129, 97, 64, dtype), {"dim": dim, "return_positives": dim != "columns"}
    with tiles():
        actual = evaluate(inputs, options, **TRITON)
    truth = evaluate(inputs, options, dtype=torch.float64, implementation="reference")
    naive = evaluate(inputs, options, implementation="reference")
    for name in truth:
        gradient = name in ("dqueries", "dkeys")
        factor = 1.5 if gradient and dtype == torch.float16 else 1.2
        assert_as_good_as(actual[name], truth[name], naive[name], factor, magnitude=20.0)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("dim", DIMS)
def test_fp32_within_1e5_on_embeddings(dim, scale):
    inputs = {**embeddings(97, 97, 64), "scale": torch.tensor(scale)}
    with tiles():
        assert_accurate(
            inputs, {"dim": dim, "return_positives": dim != "columns"}, strict=True, magnitude=1.0, **TRITON
        )


def spread(m: int, n: int) -> dict:
    """Log-sum-exps of rows and of columns between −200 and 200, side by side in every tile."""
    q, k = unit(m, 16, 1), unit(n, 16, 2)
    q[:, 0], k[:, 0] = torch.linspace(-15, 15, m), torch.linspace(-15, 15, n).roll(7)
    return {"queries": q, "keys": k, "scale": torch.tensor(1.0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_tiles_in_which_one_exponential_does_not_serve_rows_and_columns(dtype, masked):
    """Against the tile's maximum most rows' sums would be 0."""
    inputs = {name: x.to(dtype) if x.ndim else x for name, x in spread(67, 97).items()}
    inputs["key_bias"] = torch.randn(97, generator=generator(3))
    ids = {"query_ids": torch.arange(67) % 3, "key_ids": torch.arange(97) % 4} if masked else {}
    with tiles():
        assert_accurate(inputs, {"dim": "both", "return_positives": True, **ids}, magnitude=225.0, **TRITON)


UPSTREAM = {name: everywhere.UPSTREAM[name] for name in ("of both signs", "mostly zero", "over ten decades")}
UPSTREAM |= {name: everywhere.UPSTREAM[name] for name in everywhere.UPSTREAM if name.startswith(("of the", "exp"))}


@pytest.mark.parametrize("upstream", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_upstream_gradient(upstream, dtype):
    with tiles():
        assert_accurate(biased(67, 83, 24, dtype), {"dim": "both"}, upstream=upstream, magnitude=1.0, **TRITON)


@pytest.mark.parametrize("needs", [("queries",), ("keys",), ("scale",), ("key_bias",), ("keys", "scale")], ids=" ".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_some_gradients_alone(needs, dtype):
    with tiles():
        assert_accurate(biased(67, 83, 24, dtype), {"return_positives": True}, needs=needs, magnitude=1.0, **TRITON)


@pytest.mark.parametrize("scale", [0.0, -7.0, 1e-5])
def test_scales_without_a_logarithm(scale):
    with tiles():
        inputs = {**biased(40, 50, 8), "scale": torch.tensor(scale)}
        assert_accurate(inputs, {"dim": "both", "return_positives": True}, magnitude=10.0, **TRITON)


@pytest.mark.parametrize("dim", DIMS)
def test_rows_with_nothing_left(dim):
    ids = torch.zeros(37, dtype=torch.long)
    options = {"dim": dim, "query_ids": ids, "key_ids": ids, "positives": -1}
    inputs = biased(37, 37, 8)
    with tiles():
        results = evaluate(inputs, options, upstream=lambda i, shape: torch.ones(shape), **TRITON)
        query_ids = torch.arange(37) % 3
        some = {**options, "query_ids": query_ids}
        assert_accurate(inputs, some, strict=True, **TRITON)
    for name, x in results.items():
        assert (x.isneginf() if name.startswith("value") else x == 0).all(), name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["queries", "keys"])
@pytest.mark.parametrize("dim", DIMS)
def test_nan_and_infinite_inputs(value, where, dim):
    """What is not finite comes out exactly where dense code has it, in values and gradients."""
    inputs = {name: x for name, x in embeddings(40, 50, 8).items() if name != "scale"}
    inputs[where][21, 3] = value
    options, needs = {"dim": dim, "scale": 5.0}, ("queries", "keys")
    with tiles():
        actual = evaluate(inputs, options, needs=needs, **TRITON)
    truth = evaluate(inputs, options, needs=needs, implementation="reference")
    for name in truth:
        assert torch.equal(actual[name].isfinite(), truth[name].isfinite()), name
        assert torch.equal(actual[name].isnan(), truth[name].isnan()), name
    if dim == "rows" and where == "queries":
        assert relative_error(actual["value 0"], truth["value 0"]) < 1e-5


def test_a_nan_query_in_half_precision_leaves_the_other_rows_alone():
    """The powers of two are taken from finite numbers alone."""
    inputs = {**embeddings(40, 50, 8, torch.bfloat16), "scale": torch.tensor(5.0)}
    clean = evaluate(inputs, {}, implementation="reference")
    inputs["queries"][21, 3] = math.nan
    with tiles():
        dq = evaluate(inputs, {}, **TRITON)["dqueries"]
    others = torch.arange(40) != 21
    assert dq[21].isnan().any()
    assert relative_error(dq[others].double(), clean["dqueries"][others].double()) < 2.0**-8


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e4, 1e30])
def test_bfloat16_features_of_any_size(size):
    """What lies beyond float16 comes back by powers of two."""
    inputs = embeddings(40, 50, 24)
    inputs = {"queries": inputs["queries"] / size, "keys": inputs["keys"] * size, "scale": inputs["scale"]}
    inputs = {name: x.bfloat16() if x.ndim else x for name, x in inputs.items()}
    with tiles():
        assert_accurate(inputs, {"dim": "both", "return_positives": True}, magnitude=1.0, **TRITON)


def test_best_is_the_first_of_the_largest():
    m, n = 67, 97
    q = torch.randint(-1, 2, (m, 3), generator=generator(1)).float()
    k = torch.randint(-1, 2, (n, 3), generator=generator(2)).float()
    query_ids, key_ids = torch.arange(m) % 5, torch.full((n,), 2)
    logits = (q @ k.t()).masked_fill((query_ids == 2)[:, None], -math.inf)
    expected = [torch.where(logits.isneginf().all(dim), -1, logits.argmax(dim)) for dim in (1, 0)]
    options = {"query_ids": query_ids, "key_ids": key_ids, "positives": -1, "return_best": True, **TRITON}
    with tiles():
        *_, rows, columns = similarity_lse(q, k, dim="both", **options)
        assert torch.equal(similarity_lse(q, k, **options)[1], expected[0])
        assert torch.equal(similarity_lse(q, k, dim="columns", **options)[1], expected[1])
        assert similarity_lse(q, k[:0], return_best=True, **TRITON)[1].tolist() == [-1] * m
    assert torch.equal(rows, expected[0])
    assert torch.equal(columns, expected[1])


def layouts() -> dict:
    wide = torch.randn(61, 3, 33, generator=generator(7))
    return {
        "rows far apart": wide[:, 1],
        "columns far apart": torch.randn(33, 61, generator=generator(8)).t(),
        "one row for all": wide[:1, 0].expand(61, 33),
        "overlapping rows": torch.randn(93, generator=generator(9)).unfold(0, 33, 1),
        "one column": wide[:, 0, :1],
    }


@pytest.mark.parametrize("x", layouts().values(), ids=layouts())
def test_any_strides(x):
    keys = torch.randn(x.shape, generator=generator(10))
    for q, k in ((x, keys), (keys, x)):
        q, k = q.requires_grad_(), k.detach().requires_grad_()
        with tiles():
            actual = torch.autograd.grad(similarity_lse(q, k, 0.3, dim="both", **TRITON)[0].sum(), (q, k))
        dense = similarity_lse(q, k, 0.3, dim="both", implementation="reference")[0].sum()
        expected = torch.autograd.grad(dense, (q, k))
        for a, b in zip(actual, expected, strict=True):
            assert relative_error(a, b) < 1e-5


def test_results_do_not_depend_on_tiles_chunks_and_panels():
    inputs, options = biased(97, 83, 40), {"dim": "both", "return_positives": True}
    schedules = ({}, {"workspace": 0, "parts": 1 << 20}, {"workspace": 1 << 20, "parts": 0})
    configs = (TILE, Config(64, 32, 32, 4, 1), Config(16, 64, 16, 4, 1, group=1), Config(128, 128, 16, 4, 1))
    for config in configs:
        for schedule in schedules if config is TILE else schedules[:1]:
            with tiles(config, **schedule):
                assert_accurate(inputs, options, strict=True, magnitude=1.0, **TRITON)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_are_identical(dtype):
    with tiles():
        first, second = (evaluate(biased(97, 83, 33, dtype), {"dim": "both"}, **TRITON) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


def test_mean_losses_through_the_kernels():
    q, k = (x.requires_grad_() for x in (unit(61, 24, 1), unit(61, 24, 2)))
    for both in (False, True):
        options = {"scale": 20.0, "both": both}
        with tiles(), trace() as ran:
            actual = similarity_cross_entropy(q, k, **options, **TRITON)
            gradients = torch.autograd.grad(actual, (q, k))
        expected = similarity_cross_entropy(q, k, **options, implementation="reference")
        assert {choice.implementation for choice in ran} == {"triton"}
        assert relative_error(actual, expected) < 1e-5
        for a, b in zip(gradients, torch.autograd.grad(expected, (q, k)), strict=True):
            assert relative_error(a, b) < 1e-5


def test_a_second_gradient_is_refused():
    q = unit(5, 3, 1).requires_grad_()
    with tiles():
        (gradient,) = torch.autograd.grad(similarity_lse(q, q, **TRITON).sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match="a gradient of its gradient"):
            gradient.sum().backward()


# ----------------------------------------------------------------------------------------------- the schedule's choices


def test_no_product_is_spent_on_what_needs_no_gradient():
    counted = []

    def product(a, b, out=None, **how):
        counted.append((a.shape, b.shape))
        return original(a, b, out, **how)

    original = _device_sweep.product
    with tiles(workspace=1 << 20), mock.patch.object(_device_sweep, "product", product):
        for needs, products in (("queries", 1), ("keys", 1), ("scale", 0), ("key_bias", 0)):
            counted.clear()
            evaluate(biased(40, 50, 8), {}, needs=(needs,), **TRITON)
            assert len(counted) == products, needs


def test_chunks_fit_the_workspace():
    for m, n, workspace in ((65_536, 65_536, 512 << 20), (1000, 50_000, 64 << 20), (1, 1, 0), (300, 7, 0)):
        with mock.patch.object(_device_sweep, "workspace_bytes", lambda *_, given=workspace: given):
            blocks = _device_sweep.chunks(m, n, 2, torch.device("cuda"))
        assert sum(rows for _, rows in blocks) == m
        assert all(start % 128 == 0 for start, _ in blocks)
        assert max(rows for _, rows in blocks) * n * 2 <= max(workspace, 128 * (n + 16) * 2)


def test_tensor_descriptors_read_the_same():
    """The loads of the tensor memory accelerator, where the interpreter has them (Triton 3.7 on)."""
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip("this interpreter cannot read through descriptors")
    config = Config(32, 32, 16, 4, 1, tma=True)
    seen = []
    original = kernel.descriptors

    def descriptors(*arguments):
        seen.append(original(*arguments))
        return seen[-1]

    for dtype in (torch.float32, torch.bfloat16):
        with tiles(config), mock.patch.object(kernel, "descriptors", descriptors):
            assert_accurate(biased(61, 67, 24, dtype), {"dim": "both"}, **TRITON)
    assert seen
    assert all(one is not None for pair in seen for one in pair)


def test_operands_that_cannot_be_described_are_read_through_pointers():
    small, large = TILE, Config(32, 32, 16, 4, 1, tma=True)
    rungs = ((100.0, small), (math.inf, large))
    for width, chosen in ((9, small), (16, large)):  # rows of 36 and of 64 bytes
        x = torch.randn(40, width, generator=generator(1))
        problem = _common.problem_of(x, x, torch.ones(()), None, Masks())
        assert _common.pick(rungs, problem) is chosen


# --------------------------------------------------------------------------------------------------------------- tuning


def test_tuning_finds_configurations_that_then_serve(tmp_path):
    """Times them with a clock that prefers small tiles, and reads back what it wrote."""
    clock = iter(range(1, 1000))

    def do_bench(launch):
        launch()
        return next(clock)

    x = torch.randn(40, 16, generator=generator(1))
    with (
        mock.patch.object(_common, "TUNED", tmp_path),
        mock.patch("triton.testing.do_bench", do_bench),
    ):
        timed = kernel.tune(40, 33, 16, torch.float32, "cpu", write=True)
        assert [*timed] == ["lse float32", "weights float32", "weights dots float32"]
        problem = _common.problem_of(x, x, torch.ones(()), None, Masks())
        for name, found in timed.items():
            served = _common.config_for(kernel.OP, kernel.TABLE, name.removesuffix(" float32"), problem)
            assert served == found[0][1]
            assert [time for time, _ in found] == sorted(time for time, _ in found)
    _common._tuned.cache_clear()
    assert _common.config_for(kernel.OP, kernel.TABLE, "lse", problem).BM == 64


def test_softplus_tunes_too(tmp_path):
    with mock.patch("triton.testing.do_bench", lambda launch: launch() or 1.0):
        assert [*similarity_softplus.tune(40, 33, 16, torch.float32, "cpu")] == ["softplus float32"]


def test_every_problem_has_a_ladder():
    """For each kernel, dtype, mask and architecture; the widest tile alone asks for the descriptors."""
    for arch in ("sm_80", "sm_90", "sm_100"):
        for kind in ("half", "tf32", "float32"):
            for extra in _common.EXTRAS:
                for name in ("lse", "weights", "weights dots", "slopes"):
                    rungs = kernel.TABLE[f"{name} {kind}{extra} {arch}"]
                    assert rungs[-1][0] == math.inf
                    assert arch != "sm_80" or not any(config.tma for _, config in rungs)
                    assert any(not config.tma for _, config in rungs)
                    assert all(config.BN % kernel.STRIP.value == 0 for _, config in rungs)
                assert similarity_softplus.TABLE[f"softplus {kind}{extra} {arch}"][-1][0] == math.inf
