"""similarity_lse against float64 truth: value and every gradient, on ragged shapes, masks, scales and schedules.

Truth and the naive rival are both the op's reference, in float64 and on the very inputs under test; the reference
itself is tested against scalar loops and finite differences. Tiles are mostly shrunk to a few rows, so that matrices of
a hundred rows cross every boundary that the real ones (1024 × 2048) cross at ten thousand.
"""

import concurrent.futures
import contextlib
import importlib
import json
import math
import subprocess
import sys
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcontrast.ops import _sweep, set_workspace, similarity_lse, trace
from fastcontrast.testing import RAGGED, SMALL, assert_as_good_as, relative_error

module = importlib.import_module("fastcontrast.ops.similarity_lse")
FP32_LIMIT = 1e-5
DIMS = ("rows", "columns", "both")
LEAVES = ("queries", "keys", "scale", "key_bias")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, width, generator=generator(seed)), dim=-1)


@contextlib.contextmanager
def tiles(rows: int, columns: int, kept: int = 1, threads: int = 2):
    """Tiles of `rows` × `columns`, at least `kept` rows of logits kept, `threads` threads in the epilogues."""
    with (
        mock.patch.multiple(_sweep, ROWS=rows, COLUMNS=columns, MIN_KEPT_ROWS=kept),
        mock.patch.object(torch, "get_num_threads", lambda: threads),
    ):
        yield


def one_sign(i: int, shape: torch.Size) -> torch.Tensor:
    """Upstream gradients of one sign and about one size, as losses have them."""
    return 0.5 + torch.rand(shape, generator=generator(99 + i))


def evaluate(
    inputs: dict,
    options: dict,
    *,
    dtype: torch.dtype | None = None,
    needs=LEAVES,
    implementation: str | None = "cpu",
    upstream=one_sign,
    call=similarity_lse,
) -> dict:
    """Values and gradients by name. No `keys`, or None, stands for `keys is queries`. `upstream(i, shape)` is the
    gradient of the i-th output, None if the loss does not use it."""
    leaves = {name: x.detach().to(dtype or x.dtype) for name, x in inputs.items() if x is not None}
    leaves = {name: x.requires_grad_(name in needs) for name, x in leaves.items()}
    arguments = {"keys": leaves["queries"], **leaves, **options, "implementation": implementation}
    outputs = call(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"value {i}": output.detach() for i, output in enumerate(outputs)}
    loss = torch.zeros(())
    for i, output in enumerate(outputs):
        weight = upstream(i, output.shape)
        if weight is not None:
            loss = loss + (torch.where(output.isneginf(), 0.0, output) * weight).sum()
    wanted = [name for name in leaves if name in needs]
    for name, gradient in zip(wanted, torch.autograd.grad(loss, [leaves[n] for n in wanted]), strict=True):
        results[f"d{name}"] = gradient
    return results


def assert_accurate(
    inputs: dict, options: dict, *, strict=False, magnitude: float = 0.0, implementation="cpu", **how
) -> None:
    """fp32: relative error at most 1e-5, or, unless `strict`, as good as dense where the problem itself is worse
    conditioned than that. Half precision: as good as the same inputs upcast to fp32 logits densely."""
    actual = evaluate(inputs, options, implementation=implementation, **how)
    truth = evaluate(inputs, options, dtype=torch.float64, implementation="reference", **how)
    naive = evaluate(inputs, options, implementation="reference", **how)
    assert actual.keys() == truth.keys()
    for name in truth:
        like = inputs[name[1:]] if name.startswith("d") else None
        assert actual[name].dtype == (torch.float32 if like is None else like.dtype), name
        if inputs["queries"].dtype == torch.float32:
            error = relative_error(actual[name], truth[name])
            if error <= FP32_LIMIT:
                continue
            assert not strict, f"{name}: relative error {error:.2e}"
        try:
            assert_as_good_as(actual[name], truth[name], naive[name], magnitude=magnitude)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def assert_same(actual: dict, expected: dict, limit: float = 2e-6) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        error = relative_error(actual[name], expected[name])
        assert error <= limit, f"{name}: relative difference {error:.2e}"


# -------------------------------------------------------------------------------------------------------- the reference


def test_reference_equals_scalar_loops():
    m, n, d = 5, 7, 3
    q, k = unit(m, d, 1).double(), unit(n, d, 2).double()
    bias = torch.randn(n, generator=generator(3)).double()
    query_ids, key_ids = torch.tensor([0, 1, 2, 3, 9]), torch.tensor([0, 0, 1, 5, 2, 3, 3])
    positives = torch.tensor([1, -1, 4, 0, 6])
    guide_q, guide_k, limit = torch.arange(m)[:, None].double(), torch.arange(n)[:, None].double(), 7.5
    table = [[-math.inf] * n for _ in range(m)]
    for i in range(m):
        for j in range(n):
            masked = query_ids[i] == key_ids[j] or guide_q[i, 0] * guide_k[j, 0] > limit
            if j == positives[i] or not masked:
                table[i][j] = 3.0 * sum(float(q[i, e] * k[j, e]) for e in range(d)) + float(bias[j])
    r, c, positive_logits, rows_best, columns_best = similarity_lse(
        q,
        k,
        3.0,
        dim="both",
        key_bias=bias,
        query_ids=query_ids,
        key_ids=key_ids,
        positives=positives,
        guide=(guide_q, guide_k, limit),
        return_positives=True,
        return_best=True,
    )
    own = [line[j] if j >= 0 else -math.inf for line, j in zip(table, positives.tolist(), strict=True)]
    assert positive_logits.tolist() == pytest.approx(own, rel=1e-12)
    transposed = list(zip(*table, strict=True))
    for values, best, lines in ((r, rows_best, table), (c, columns_best, transposed)):
        for value, index, line in zip(values.tolist(), best.tolist(), lines, strict=True):
            assert value == pytest.approx(math.log(sum(map(math.exp, line))), rel=1e-12)
            assert index == line.index(max(line))


def test_reference_gradients_equal_finite_differences():
    ids = torch.tensor([0, 1, 1, 2])

    def function(q, k, scale, bias):
        options = {"dim": "both", "key_bias": bias, "query_ids": ids, "key_ids": ids[:3]}
        return similarity_lse(q, k, scale, **options)

    inputs = [unit(4, 3, 1), unit(3, 3, 2), torch.tensor(2.5), torch.tensor([0.3, -0.2, 0.1])]
    assert torch.autograd.gradcheck(function, [x.double().requires_grad_() for x in inputs])


# ------------------------------------------------------------------------------------------------- accuracy, everywhere

SIZES = (0, 1, 2, 3, 5, 7, 13, 15, 16, 17, 31, 32, 33, 63, 64, 65, 79, 80, 81, 127, 129, 303)
WIDTHS = (1, 2, 3, 7, 16, 61, 64, 65, 127, 512)
# Rows and columns of a tile: about a group of rows (16), thinner and wider than the lanes (64), and the real ones,
# which alone give several threads something to do.
TILES = ((16, 32), (15, 63), (48, 80), (33, 130), (1024, 2048))


@st.composite
def problems(draw, symmetric=False):
    m, n = draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES))
    n = m if symmetric else n
    d, seed = draw(st.sampled_from(WIDTHS)), draw(st.integers(0, 1000))
    dtype = draw(st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16)))
    kind = draw(st.sampled_from(("random", "random", "matched", "collapsed", "orthogonal", "long")))
    q, k = unit(m, d, seed), unit(n, d, seed + 1)
    if kind == "matched":
        k[: min(m, n)] = torch.nn.functional.normalize(q[: min(m, n)] + 0.2 * k[: min(m, n)], dim=-1)
    elif kind == "collapsed":
        q[:], k[:] = q[:1].clone() if m else q, q[:1].clone() if m else k
    elif kind == "orthogonal":
        q, k = torch.eye(max(m, n), d)[:m], torch.eye(max(m, n), d)[:n]
    elif kind == "long":
        q, k = q * 3.0, k * 2.0
    scale = draw(st.sampled_from((1.0, 2.66, 14.3, 50.0, 100.0)))
    inputs = {"queries": q.to(dtype), "keys": k.to(dtype), "scale": torch.tensor(scale)}
    options = {"dim": draw(st.sampled_from(DIMS)), "workspace": draw(st.sampled_from((0, 20_000, 60_000, None)))}
    if not symmetric and draw(st.booleans()):
        inputs["key_bias"] = torch.randn(n, generator=generator(seed + 2))
    options |= draw(masks(m, n, seed, symmetric))
    protects_none = isinstance(options["positives"], int)
    options["return_positives"] = not protects_none and not symmetric and draw(st.booleans())
    if symmetric:
        inputs["keys"], options["dim"] = None, "rows"
    tile = draw(st.sampled_from(TILES))
    schedule = {"rows": tile[0], "columns": tile[1], "kept": draw(st.sampled_from((1, 10)))}
    return inputs, options, schedule | {"threads": draw(st.sampled_from((1, 2, 3)))}


@st.composite
def masks(draw, m, n, seed, symmetric):
    """Options that mask: ids of few or one or no shared value, positives of each kind, a guide of exact integers."""
    random, options = generator(seed + 3), {}
    ids = draw(st.sampled_from((None, None, "few", "equal", "unique")))
    if ids is not None:
        high = {"few": 4, "equal": 1, "unique": 0}[ids]
        make = [torch.randint(high, (size,), generator=random) if high else torch.arange(size) for size in (m, n)]
        options["query_ids"], options["key_ids"] = (make[0], make[0]) if symmetric else make
        if draw(st.booleans()):
            options["query_ids"] = options["query_ids"].int()
            options["key_ids"] = options["query_ids"] if symmetric else options["key_ids"].int()
    options["positives"] = draw(st.sampled_from((None, -1)))
    if not symmetric and draw(st.booleans()):
        options["positives"] = torch.randint(-1, n, (m,), generator=random) if n else torch.full((m,), -1)
    if not symmetric and draw(st.integers(0, 3)) == 0:
        guide_q = torch.randint(-2, 3, (m, 3), generator=random).float()
        guide_k = torch.randint(-2, 3, (n, 3), generator=random).float()
        limit = draw(st.sampled_from((1.5, torch.randint(-1, 3, (m,), generator=random) + 0.5)))
        options["guide"] = (guide_q, guide_k, limit)
    return options


def conditioning(inputs: dict) -> float:
    """What cancels in a logit or in dscale: terms of size scale · |q| · |k|, a log-sum-exp of which may be near 0."""
    q, k = inputs["queries"], inputs["keys"] if inputs.get("keys") is not None else inputs["queries"]
    largest = [float(x.float().norm(dim=-1).max()) if x.numel() else 0.0 for x in (q, k)]
    return float(inputs["scale"].abs()) * largest[0] * largest[1]


@settings(max_examples=250)
@given(problems())
def test_value_and_every_gradient(problem):
    inputs, options, schedule = problem
    with tiles(**schedule):
        assert_accurate(inputs, options, magnitude=conditioning(inputs))


@settings(max_examples=80)
@given(problems(symmetric=True))
def test_symmetric_path_equals_truth(problem):
    inputs, options, schedule = problem
    with tiles(**schedule):
        assert_accurate(inputs, options, magnitude=conditioning(inputs))


@settings(max_examples=40)
@given(problems(), st.sampled_from(("queries", "scale", "queries and scale")))
def test_frozen_keys_equal_truth(problem, needs):
    inputs, options, schedule = problem
    inputs.pop("key_bias", None)
    with tiles(**schedule):
        assert_accurate(inputs, options | {"dim": "rows"}, needs=needs.split(" and "), magnitude=conditioning(inputs))


@pytest.mark.parametrize("shape", RAGGED, ids=lambda shape: shape.name)
@pytest.mark.parametrize("dim", DIMS)
def test_ragged_shapes_on_real_tiles(shape, dim):
    inputs = {"queries": unit(shape.m, shape.d, 1), "keys": unit(shape.n, shape.d, 2), "scale": torch.tensor(20.0)}
    assert_accurate(inputs, {"dim": dim}, strict=shape.d > 0)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("dim", DIMS)
def test_fp32_within_1e5_on_embeddings(dim, scale):
    inputs = {**embeddings(SMALL[1].m, SMALL[1].n, 64), "scale": torch.tensor(scale)}
    assert_accurate(inputs, {"dim": dim}, strict=True)


def embeddings(m: int, n: int, d: int, dtype=torch.float32) -> dict:
    """Unit vectors, each query near its own key."""
    k = unit(n, d, 2)
    q = unit(m, d, 1)
    shared = min(m, n)
    q[:shared] = torch.nn.functional.normalize(q[:shared] + k[:shared], dim=-1)
    return {"queries": q.to(dtype), "keys": k.to(dtype), "scale": torch.tensor(20.0)}


def biased(m: int, n: int, d: int, dtype=torch.float32) -> dict:
    return {**embeddings(m, n, d, dtype), "key_bias": torch.randn(n, generator=generator(5))}


@pytest.mark.parametrize("needs", [LEAVES, ("queries", "scale")], ids=["all", "frozen"])
@pytest.mark.parametrize("shape", [(40, 50), (50, 40), (7, 0)], ids=str)
@pytest.mark.parametrize("used", [(0, 1), (1,)], ids=["with the rows", "alone"])
def test_positive_logits_and_their_gradient(shape, needs, used):
    """By default row i's own key is i; rows beyond the last key have none. With no keys nothing is left at all."""
    inputs = embeddings(*shape, 8) if needs != LEAVES else biased(*shape, 8)

    def upstream(i, size):
        return one_sign(i, size) * (1, -2)[i] if i in used else None

    with tiles(16, 32):
        assert_accurate(inputs, {"return_positives": True}, needs=needs, upstream=upstream, magnitude=1.0)
        results = evaluate(inputs, {"return_positives": True}, needs=needs)
    assert torch.equal(results["value 1"].isneginf(), torch.arange(shape[0]) >= shape[1])


UPSTREAM = {
    "of both signs": lambda i, shape: torch.randn(shape, generator=generator(i)),
    "mostly zero": lambda i, shape: (torch.arange(shape[0]) % 7 == i).float(),
    "over ten decades": lambda i, shape: torch.logspace(-5, 5, shape[0]),
    "of the first output only": lambda i, shape: one_sign(i, shape) if i == 0 else None,
    "of the second output only": lambda i, shape: one_sign(i, shape) if i == 1 else None,
    "expanded from a scalar": lambda i, shape: torch.tensor(1.0 / 3).expand(shape),
}


@pytest.mark.parametrize("upstream", UPSTREAM.values(), ids=UPSTREAM)
def test_any_upstream_gradient(upstream):
    with tiles(16, 32):
        assert_accurate(biased(67, 83, 24), {"dim": "both"}, upstream=upstream, magnitude=1.0)


@pytest.mark.parametrize("scale", [0.0, -7.0, 1e-2, 1e-5])
@pytest.mark.parametrize("needs", [LEAVES, ("queries", "scale")], ids=["all", "frozen"])
def test_scales_that_no_loss_uses(scale, needs):
    inputs = {**embeddings(40, 50, 16), "scale": torch.tensor(scale)}
    with tiles(16, 32):
        assert_accurate(inputs, {}, needs=needs, magnitude=1.0)


def test_scale_in_every_form():
    inputs = embeddings(20, 30, 8)
    q, k = inputs["queries"], inputs["keys"]
    expected = similarity_lse(q, k, 3.0)
    for scale in (3, torch.tensor(3.0), torch.tensor([3.0]), torch.tensor(3.0, dtype=torch.float64)):
        assert torch.equal(similarity_lse(q, k, scale), expected)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        actual = evaluate({**inputs, "scale": torch.tensor(3.0, dtype=dtype)}, {})
        assert actual["dscale"].dtype == dtype
        assert relative_error(actual["dscale"], evaluate({**inputs, "scale": torch.tensor(3.0)}, {})["dscale"]) < 5e-3
    one = torch.tensor([3.0], requires_grad=True)
    similarity_lse(q, k, one).sum().backward()
    assert one.grad.shape == (1,)


@pytest.mark.parametrize("dim", DIMS)
def test_weights_sum_to_one_where_the_log_sum_exp_is_large(dim):
    """At L ≈ 10⁴ float32 keeps r to 5e-4 only; the weights of a row must still sum to 1, so their rounding is carried.
    Σ_j db_j is the sum of the upstream gradients, whatever the logits were rounded to."""
    inputs = {**biased(50, 70, 16), "scale": torch.tensor(1.0)}
    inputs["queries"] *= 100.0
    inputs["keys"] *= 100.0
    for columns in (32, 2048):
        with tiles(16, columns):
            db = evaluate(inputs, {"dim": dim}, upstream=lambda i, shape: torch.ones(shape))["dkey_bias"]
        count = {"rows": 50, "columns": 70, "both": 120}[dim]
        assert float(db.double().sum()) == pytest.approx(count, rel=2e-6)


def test_a_key_bias_common_to_all_shifts_the_value():
    inputs = embeddings(30, 40, 8)
    q, k = inputs["queries"], inputs["keys"]
    shifted = similarity_lse(q, k, 5.0, key_bias=torch.full((40,), 64.0))
    assert relative_error(shifted - 64.0, similarity_lse(q, k, 5.0)) < 1e-5


# ------------------------------------------------------------------------------------------------- masks, ends of range


@pytest.mark.parametrize("needs", [LEAVES, ("queries", "scale")], ids=["all", "frozen"])
@pytest.mark.parametrize("dim", DIMS)
def test_rows_with_nothing_left(dim, needs):
    """Ids all equal and no positive: −inf everywhere, and gradients of exactly 0."""
    ids = torch.zeros(37, dtype=torch.long)
    with tiles(16, 32):
        options = {"dim": dim, "query_ids": ids, "key_ids": ids, "positives": -1}
        inputs = embeddings(37, 37, 8) if dim != "rows" or needs != LEAVES else biased(37, 37, 8)
        results = evaluate(inputs, options, needs=needs, upstream=lambda i, shape: torch.ones(shape))
        used = similarity_lse(inputs["queries"].requires_grad_(), inputs["keys"], 2.0, **options)
    for name, x in results.items():
        assert (x.isneginf() if name.startswith("value") else x == 0).all(), name
    # Also when the loss does not look away from −inf.
    loss = sum(x.sum() for x in used) if dim == "both" else used.sum()
    assert (torch.autograd.grad(loss, inputs["queries"])[0] == 0).all()


def test_some_rows_with_nothing_left_leave_the_others_alone():
    inputs = biased(50, 40, 8)
    query_ids, key_ids = torch.arange(50) % 3, torch.zeros(40, dtype=torch.long)
    options = {"dim": "both", "query_ids": query_ids, "key_ids": key_ids, "positives": -1}
    with tiles(16, 32):
        assert_accurate(inputs, options, strict=True)
        r, _ = similarity_lse(inputs["queries"], inputs["keys"], 20.0, **options)
    assert torch.equal(r.isneginf(), query_ids == 0)


def test_all_equal_ids_leave_the_positive():
    inputs = embeddings(37, 37, 8)
    ids = torch.full((37,), 5)
    with tiles(16, 32):
        r = similarity_lse(inputs["queries"], inputs["keys"], 20.0, query_ids=ids, key_ids=ids)
    positives = 20.0 * (inputs["queries"].double() * inputs["keys"].double()).sum(-1)
    assert relative_error(r, positives) < 1e-6


def test_one_key():
    """A softmax over one key is 1: r is the logit, dq = scale · k, dk = scale · Σ q."""
    inputs = {**embeddings(9, 1, 16), "scale": torch.tensor(100.0)}
    results = evaluate(inputs, {}, upstream=lambda i, shape: torch.ones(shape))
    q, k = inputs["queries"], inputs["keys"]
    assert relative_error(results["value 0"], 100.0 * (q.double() @ k.double().t())[:, 0]) < 1e-6
    assert relative_error(results["dqueries"], 100.0 * k.double().expand(9, -1)) < 1e-6
    assert relative_error(results["dkeys"], 100.0 * q.double().sum(0, keepdim=True)) < 1e-6


def test_ids_of_64_bits_are_compared_whole():
    query_ids, key_ids = torch.tensor([2**40 + 1, -1]), torch.tensor([1, 2**40 + 1, -1])
    q, k = torch.zeros(2, 4), torch.zeros(3, 4)
    r = similarity_lse(q, k, query_ids=query_ids, key_ids=key_ids, positives=-1)
    assert r.tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["queries", "keys"])
@pytest.mark.parametrize("dim", DIMS)
def test_nan_and_infinite_inputs(value, where, dim):
    """What is not finite comes out exactly where dense code has it, in values and gradients."""
    inputs = {name: x for name, x in embeddings(40, 50, 8).items() if name != "scale"}
    inputs[where][21, 3] = value
    with tiles(16, 32):
        needs = ("queries", "keys")
        actual = evaluate(inputs, {"dim": dim, "scale": 5.0}, needs=needs)
        truth = evaluate(inputs, {"dim": dim, "scale": 5.0}, needs=needs, implementation="reference")
    for name in truth:
        assert torch.equal(actual[name].isfinite(), truth[name].isfinite()), name
        assert torch.equal(actual[name].isnan(), truth[name].isnan()), name
    assert not truth["value 0"].isfinite().all()
    if dim == "rows" and where == "queries":
        assert truth["value 0"].isfinite().sum() == 39
        assert relative_error(actual["value 0"], truth["value 0"]) < 1e-5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_keys_that_need_no_gradient(value):
    inputs = {name: x for name, x in embeddings(40, 50, 8).items() if name != "scale"}
    inputs["queries"][3, 0] = value
    with tiles(16, 32):
        actual = evaluate(inputs, {"scale": 5.0}, needs=("queries",))
    assert (actual["dqueries"].isfinite().all(1) == (torch.arange(40) != 3)).all()


def test_overflowing_logits_and_the_smallest_weights():
    """Logits of ±10³⁰ and of differences beyond the range of exp: neither inf − inf nor anything subnormal."""
    q = torch.tensor([[1e30], [-1e30], [60.0], [0.0]])
    k = torch.tensor([[1.0], [-1.0], [0.5], [0.0]])
    inputs = {"queries": q, "keys": k, "scale": torch.tensor(1.0)}
    assert_accurate(inputs, {"dim": "rows"}, needs=("queries",), strict=True)
    gradient = evaluate(inputs, {}, needs=("keys",))["dkeys"]
    assert gradient.isfinite().all()


# --------------------------------------------------------------------------------------------------------- best indices


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_best_is_the_first_of_the_largest(symmetric, threads):
    """Small integers, so that ties abound and every product is exact; some rows and columns have nothing left."""
    m, n = (303, 303) if symmetric else (303, 411)
    q = torch.randint(-1, 2, (m, 3), generator=generator(1)).float()
    k = q if symmetric else torch.randint(-1, 2, (n, 3), generator=generator(2)).float()
    query_ids = torch.arange(m) % 5
    key_ids = query_ids if symmetric else torch.arange(n) % 3
    logits = (q @ k.t()).masked_fill(query_ids[:, None] == key_ids[None], -math.inf)
    if not symmetric:
        key_ids[:] = 2
        logits = (q @ k.t()).masked_fill((query_ids == 2)[:, None], -math.inf)
    best = [torch.where(logits.isneginf().all(dim), -1, logits.argmax(dim)) for dim in (1, 0)]
    for size in ((16, 32), (48, 80), (1024, 2048)):
        with tiles(*size, threads=threads):
            options = {"query_ids": query_ids, "key_ids": key_ids, "positives": -1, "return_best": True}
            assert torch.equal(similarity_lse(q, k, **options)[1], best[0])
            if not symmetric:
                assert torch.equal(similarity_lse(q, k, dim="columns", **options)[1], best[1])
                both = similarity_lse(q, k, dim="both", **options)
                assert torch.equal(both[2], best[0])
                assert torch.equal(both[3], best[1])
                frozen = similarity_lse(q.clone().requires_grad_(), k, **options)
                assert torch.equal(frozen[1], best[0])
                assert not frozen[1].requires_grad


def test_best_of_an_empty_matrix():
    r, best = similarity_lse(torch.zeros(3, 2), torch.zeros(0, 2), return_best=True)
    assert r.tolist() == [-math.inf] * 3
    assert best.tolist() == [-1] * 3


# ---------------------------------------------------------------------------------------------------- strides and views


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(dtype):
    inputs = embeddings(40, 50, 16, dtype)
    q, k = inputs["queries"], inputs["keys"]
    expected = evaluate(inputs, {"dim": "both"}, needs=("queries", "keys"))
    wide = torch.zeros(40, 100, dtype=dtype)
    wide[:, 1:97:6] = q
    views = {
        "transposed": (q.t().contiguous().t(), k.t().contiguous().t()),
        "columns of a wider matrix": (wide[:, 1:97:6], torch.cat([k, k], 1)[:, 16:]),
        "every other row": (q.repeat_interleave(2, 0)[::2], torch.cat([k, k])[50:]),
    }
    for name, (a, b) in views.items():
        with tiles(16, 32):
            q2, k2 = a.detach(), b.detach()
            assert q2.stride() == a.stride(), name
            q2.requires_grad_()
            k2.requires_grad_()
            outputs = similarity_lse(q2, k2, 20.0, dim="both")
            loss = sum((x * one_sign(i, x.shape)).sum() for i, x in enumerate(outputs))
            gradients = torch.autograd.grad(loss, (q2, k2))
        actual = dict(zip(expected, (*(x.detach() for x in outputs), *gradients), strict=True))
        assert_same(actual, expected, 2e-6 if dtype == torch.float32 else 5e-3)


def test_rows_of_stride_zero():
    q, k = unit(1, 8, 1).expand(40, 8), unit(1, 8, 2).expand(50, 8)
    with tiles(16, 32):
        r = similarity_lse(q, k, 5.0)
    assert relative_error(r, 5.0 * (q.double() * k[0].double()).sum(-1) + math.log(50)) < 1e-6


def test_strided_masks_and_bias():
    inputs = biased(40, 50, 8)
    ids, key_ids = torch.arange(80) % 7, torch.arange(50) % 5
    positives = torch.arange(40).flip(0)
    limit = torch.linspace(-0.5, 0.5, 80)
    guide = (unit(40, 6, 8), unit(50, 6, 9))
    plain = {"query_ids": ids[::2].contiguous(), "key_ids": key_ids, "positives": positives}
    strided = {"query_ids": ids[::2], "key_ids": torch.stack([key_ids] * 2, 1)[:, 1], "positives": positives}
    plain["guide"] = (*guide, limit[::2].contiguous())
    strided["guide"] = (guide[0].t().contiguous().t(), torch.cat([guide[1]] * 2, 1)[:, :6], limit[::2])
    with tiles(16, 32):
        expected = evaluate(inputs, {**plain, "dim": "both"})
        spaced = torch.stack([inputs["key_bias"]] * 2, 1)[:, 0]
        assert_same(evaluate({**inputs, "key_bias": spaced}, {**strided, "dim": "both"}), expected, 0.0)


class ReversedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


@pytest.mark.parametrize("transform", [lambda x: x.view_as(x), ReversedGradient.apply, lambda x: x[:]])
def test_a_view_of_the_queries_has_a_gradient_of_its_own(transform):
    def gradient(dtype, implementation):
        q = embeddings(40, 50, 8)["queries"].to(dtype).requires_grad_()
        r = similarity_lse(q, transform(q), 5.0, implementation=implementation)
        return torch.autograd.grad((r * one_sign(0, r.shape)).sum(), q)[0]

    with tiles(16, 32):
        assert relative_error(gradient(torch.float32, "cpu"), gradient(torch.float64, "reference")) < 1e-5


def test_symmetric_equals_general():
    q = embeddings(83, 83, 16)["queries"]
    ids = torch.arange(83)
    for options in (
        {},
        {"query_ids": ids, "key_ids": ids, "positives": -1},
        {"query_ids": ids % 9, "key_ids": ids % 9},
    ):
        if "query_ids" in options:
            options["key_ids"] = options["query_ids"]
        with tiles(16, 32):
            general = {"queries": q, "keys": q.clone(), "scale": torch.tensor(9.0)}
            expected = evaluate(general, options)
            expected["dqueries"] = expected["dqueries"] + expected.pop("dkeys")
            assert_same(evaluate({"queries": q, "scale": general["scale"]}, options), expected)


@pytest.mark.parametrize("ids", ["shared", "apart", None])
def test_own_keys_in_pairs_keep_the_symmetry(ids):
    """Row i's own key is j and row j's is i, or it has none: half of the tiles give own logits and their gradient."""
    q, index = unit(83, 16, 1), torch.arange(83)
    positives = torch.cat([index[40:80], index[:40], torch.tensor([-1, 81, -1])])
    codes = index.where(index < 40, index - 40) if ids == "shared" else index
    options = {"positives": positives, "return_positives": True, "workspace": 0}
    if ids is not None:
        options |= {"query_ids": codes, "key_ids": codes}
    inputs = {"queries": q, "scale": torch.tensor(9.0)}
    with tiles(16, 32):
        assert_accurate(inputs, options, strict=True, upstream=lambda i, shape: one_sign(i, shape) * (1, -2)[i])
        assert products(inputs, options) == products(inputs, {"workspace": 0}) < 3


ASYMMETRIES = {
    "positives": {"query_ids": torch.arange(50) % 3, "positives": torch.arange(50).roll(7)},
    "key_bias": {"key_bias": torch.linspace(-1, 1, 50)},
    "ids": {"query_ids": torch.arange(50) % 3, "key_ids": torch.arange(50) % 4},
    "guide": {"guide": (unit(50, 4, 1), unit(50, 4, 2), 0.3)},
    "columns": {"dim": "columns", "guide": (unit(50, 4, 1), unit(50, 4, 2), 0.3)},
    "both": {"dim": "both"},
    "return_positives": {"return_positives": True},
}


@pytest.mark.parametrize("options", ASYMMETRIES.values(), ids=ASYMMETRIES)
def test_what_breaks_the_symmetry_of_one_tensor_with_itself(options):
    if "query_ids" in options:
        options = {"key_ids": options["query_ids"], **options}
    with tiles(16, 32):
        assert_accurate({"queries": unit(50, 8, 1), "scale": torch.tensor(9.0)}, options, strict=True)


# ------------------------------------------------------------------------------------------------ what a sweep may cost


@contextlib.contextmanager
def counted_products():
    """A list to which each matrix product adds its multiplications."""
    spent, mm, addmm_ = [], torch.mm, torch.Tensor.addmm_

    def counted_mm(a, b, **out):
        spent.append(a.shape[0] * a.shape[1] * b.shape[1])
        return mm(a, b, **out)

    def counted_addmm_(self, a, b):
        spent.append(a.shape[0] * a.shape[1] * b.shape[1])
        return addmm_(self, a, b)

    with mock.patch.object(torch, "mm", counted_mm), mock.patch.object(torch.Tensor, "addmm_", counted_addmm_):
        yield spent


def products(inputs: dict, options: dict, **how) -> float:
    """Products of M·N·D that value and gradients cost."""
    q = inputs["queries"]
    with counted_products() as spent:
        evaluate(inputs, options, **how)
    return sum(spent) / (q.shape[0] * inputs.get("keys", q).shape[0] * q.shape[1])


COSTS = {
    # needs: products when nothing may be kept, and when everything may
    ("queries", "keys"): (4, 3),
    ("queries", "keys", "scale", "key_bias"): (4, 3),
    ("keys",): (3, 2),
    ("keys", "scale"): (3, 2),
    ("key_bias",): (2, 1),
    ("queries", "key_bias"): (3, 2),
}


@pytest.mark.parametrize(("needs", "cost"), COSTS.items(), ids=lambda value: " ".join(map(str, value)))
@pytest.mark.parametrize("dim", DIMS)
def test_only_what_is_needed_is_multiplied(needs, cost, dim):
    with tiles(16, 32):
        for workspace, expected in zip((0, 1 << 20), cost, strict=True):
            assert products(biased(67, 83, 8), {"dim": dim, "workspace": workspace}, needs=needs) == expected


@pytest.mark.parametrize("needs", [("queries",), ("scale",), ("queries", "scale")], ids=" ".join)
def test_frozen_keys_cost_two_products(needs):
    inputs = embeddings(67, 83, 8)
    with tiles(16, 32):
        for workspace in (0, 1 << 20):
            assert products(inputs, {"workspace": workspace}, needs=needs) == 2
        frozen, general = evaluate(inputs, {}, needs=needs), evaluate(inputs, {})
    assert_same(frozen, {name: x for name, x in general.items() if name in frozen})


def test_values_alone_cost_one_product_and_keep_nothing():
    inputs = embeddings(67, 83, 8)
    with tiles(16, 32):
        for needs in ((), ("queries", "keys")):
            leaves = {name: x.requires_grad_(name in needs) for name, x in inputs.items()}
            with torch.no_grad(), counted_products() as spent:
                similarity_lse(**leaves, dim="both")
            assert sum(spent) == 67 * 83 * 8


def test_symmetry_saves_products():
    """On and above the diagonal of 7 × 7 tiles: 28 of 49 for the logits, all for the gradient."""
    inputs = {"queries": unit(7 * 16, 8, 1), "scale": torch.tensor(5.0)}
    with tiles(16, 16):
        assert products(inputs, {"workspace": 0}) == pytest.approx(28 / 49 * 2 + 1)
        assert products(inputs, {"workspace": 1 << 20}) == pytest.approx(28 / 49 + 1)


@pytest.mark.parametrize("symmetric", [False, True])
def test_workspace_saves_products_and_changes_nothing_else(symmetric):
    inputs = {"queries": unit(150, 8, 1), "scale": torch.tensor(9.0)} if symmetric else biased(150, 170, 8)
    options = {"query_ids": torch.arange(150) % 11, "positives": -1}
    options["key_ids"] = options["query_ids"] if symmetric else torch.arange(170) % 7
    if not symmetric:
        options |= {"dim": "both", "guide": (unit(150, 4, 7), unit(170, 4, 8), 0.6)}
    with tiles(16, 32, kept=20):
        sizes = (0, 20_000, 45_000, 80_000, 110_000, 1 << 20)
        costs = [products(inputs, options | {"workspace": size}) for size in sizes]
        results = [evaluate(inputs, options | {"workspace": size}) for size in sizes]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) >= 4
    for result in results[1:]:
        assert_same(result, results[0])


def test_workspace_default_can_be_set():
    inputs = embeddings(150, 170, 8)
    with tiles(16, 32, kept=20):
        try:
            set_workspace(0)
            assert products(inputs, {}) == 4
            assert products(inputs, {"workspace": 1 << 20}) == 3
        finally:
            set_workspace(None)
        assert products(inputs, {}) == 3


MEMORY = """
import json, resource, sys, torch
from fastcontrast.ops import similarity_lse

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

m, n, d, dim, gradients, workspace = json.loads(sys.argv[1])
torch.manual_seed(0)
warm = torch.randn(2100, 8, requires_grad=True)
similarity_lse(warm, warm.detach().requires_grad_()).sum().backward()
q, k = (torch.nn.functional.normalize(torch.randn(rows, d), dim=-1).requires_grad_(gradients) for rows in (m, n))
before = peak()
out = similarity_lse(q, k, 20.0, dim=dim, workspace=workspace)
if gradients:
    sum(x.sum() for x in out).backward()
    assert q.grad.isfinite().all()
print(json.dumps(peak() - before))
"""


@pytest.mark.parametrize(
    ("m", "n", "d", "dim", "gradients", "workspace"),
    [(20_000, 20_000, 16, "both", True, 40 << 20), (16_384, 65_536, 4, "rows", False, 0)],
    ids=["forward and backward", "forward"],
)
def test_peak_memory_is_workspace_plus_rows(m, n, d, dim, gradients, workspace):
    """Dense logits would be 1.6 GB and 4.3 GB. Beside the workspace, tile buffers (8 MiB each, part of it when logits
    are kept) and 64 MiB for what the allocator and the thread pools take, growth is a few vectors and gradients."""
    arguments = json.dumps([m, n, d, dim, gradients, workspace])
    run = subprocess.run([sys.executable, "-c", MEMORY, arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) < workspace + 8 * 4 * (m + n) * (1 + d) + (72 << 20)


# ----------------------------------------------------------------------------------------- autograd, threads, compilers


@pytest.mark.parametrize("dim", ["rows", "both"])
@pytest.mark.parametrize("frozen", [False, True])
def test_backward_twice_over_one_graph(dim, frozen):
    inputs = {name: x.requires_grad_(name != "keys" or not frozen) for name, x in embeddings(67, 83, 8).items()}
    leaves = [x for x in inputs.values() if x.requires_grad]
    with tiles(16, 32):
        outputs = similarity_lse(**inputs, dim=dim)
        loss = sum(x.sum() for x in (outputs if dim == "both" else (outputs,)))
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        second = torch.autograd.grad(loss, leaves, retain_graph=True)
        doubled = torch.autograd.grad(2.0 * loss, leaves)
    for a, b, c in zip(first, second, doubled, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(2.0 * a, c)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_second_derivative_is_refused_not_wrong(frozen):
    inputs = embeddings(7, 9, 4)
    q, k = inputs["queries"].requires_grad_(), inputs["keys"].requires_grad_(not frozen)
    (gradient,) = torch.autograd.grad(similarity_lse(q, k).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^similarity_lse: .*reference"):
        gradient.square().sum().backward()
    exact = torch.autograd.grad(similarity_lse(q, k, implementation="reference").sum(), q, create_graph=True)[0]
    assert relative_error(gradient, exact) < 1e-6
    assert exact.requires_grad


def test_inputs_and_upstream_gradients_are_not_written_to():
    inputs = biased(67, 83, 8)
    before = {name: x.clone() for name, x in inputs.items()}
    upstream = one_sign(0, torch.Size([67]))
    with tiles(16, 32):
        evaluate(inputs, {}, upstream=lambda i, shape: upstream)
        evaluate(inputs, {}, upstream=lambda i, shape: upstream, needs=("queries",))
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)
    assert torch.equal(upstream, one_sign(0, torch.Size([67])))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_two_runs_have_the_same_bits(threads):
    inputs = biased(403, 507, 24)
    with tiles(1024, 2048, threads=threads):
        first = evaluate(inputs, {"dim": "both"})
        for _ in range(3):
            assert_same(evaluate(inputs, {"dim": "both"}), first, 0.0)


def test_many_python_threads_at_once():
    """Each thread has its own problem; all must come out as they do alone, bit for bit."""
    problems = [
        (biased(100 + 13 * i, 230 - 7 * i, 16), {"dim": DIMS[i % 3], "workspace": (0, None)[i % 2]}) for i in range(12)
    ]
    with tiles(48, 80):
        alone = [evaluate(*problem) for problem in problems]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for _ in range(3):
                together = list(pool.map(lambda problem: evaluate(*problem), problems))
                for actual, expected in zip(together, alone, strict=True):
                    assert_same(actual, expected, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_round_the_logits(dtype):
    inputs = biased(67, 83, 16, dtype)
    expected = evaluate(inputs, {"dim": "both"})
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(evaluate(inputs, {"dim": "both"}), expected, 0.0)

    def under_autocast(**arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return similarity_lse(**arguments)

    reference = evaluate(inputs, {"dim": "both"}, implementation="reference", call=under_autocast)
    assert_same(reference, expected, 1e-5 if dtype == torch.float32 else 5e-3)


ids = torch.arange(33) % 5
VARIANTS = {
    "rows": {},
    "both": {"dim": "both", "return_best": True},
    "columns": {"dim": "columns", "workspace": 0},
    "ids": {"query_ids": ids, "key_ids": torch.arange(40) % 4},
    "ids and positives": {"query_ids": ids, "key_ids": torch.arange(40) % 4, "positives": torch.arange(33).flip(0)},
    "guide": {"dim": "both", "guide": (unit(33, 4, 1), unit(40, 4, 2), 0.5)},
    "positives": {"dim": "both", "return_positives": True},
    "symmetric": {"query_ids": ids, "key_ids": ids, "positives": -1, "workspace": 0},
    "frozen": {},
    "frozen positives": {"return_positives": True},
}


def variant(name: str) -> tuple[dict, dict, tuple[str, ...]]:
    inputs = biased(33, 40, 8)
    if name == "symmetric":
        inputs = {"queries": inputs["queries"], "scale": inputs["scale"]}
    frozen = name.startswith("frozen")
    if frozen or name == "ids":
        del inputs["key_bias"]
    return inputs, VARIANTS[name], ("queries", "scale") if frozen else LEAVES


@pytest.mark.parametrize("name", VARIANTS)
def test_opcheck(name):
    """The arguments are those that the public function passes on. Symmetric, nothing is kept: of the kept logits the
    tiles below the diagonal are never written, and opcheck compares every entry of every output."""
    inputs, options, needs = variant(name)
    passed = []

    def registered(*arguments):
        passed.append(arguments)
        return torch.ops.fastcontrast.similarity_lse(*arguments)

    with tiles(16, 32, kept=8), mock.patch.object(module._Eager, "apply", registered):
        leaves = {key: x.clone().requires_grad_(key in needs) for key, x in inputs.items()}
        similarity_lse(**{"keys": leaves["queries"], **leaves, **options})
        torch.library.opcheck(torch.ops.fastcontrast.similarity_lse.default, passed[0])


COMPILED = [(name, "aot_eager", False) for name in VARIANTS] + [
    ("both", "aot_eager", True),
    ("rows", "inductor", False),
]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # from within inductor
@pytest.mark.parametrize(("name", "backend", "dynamic"), COMPILED)
def test_compiled_equals_eager(name, backend, dynamic):
    torch._dynamo.reset()
    inputs, options, needs = variant(name)
    options = {key: value for key, value in options.items() if key != "return_best"}
    compiled = torch.compile(similarity_lse, fullgraph=True, backend=backend, dynamic=dynamic)
    actual = evaluate(inputs, options, needs=needs, implementation=None, call=compiled)
    assert_same(actual, evaluate(inputs, options, needs=needs))


# ------------------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_half_precision_is_as_good_as_dense_fp32_logits(dtype, scale):
    inputs = {**biased(257, 129, 64, dtype), "scale": torch.tensor(scale)}
    for needs in (LEAVES, ("queries", "scale")):
        chosen = inputs if needs == LEAVES else {name: x for name, x in inputs.items() if name != "key_bias"}
        assert_accurate(chosen, {"dim": "both" if needs == LEAVES else "rows"}, needs=needs)


# ---------------------------------------------------------------------------------------------------------------- doors

Q, K = torch.zeros(4, 8), torch.zeros(6, 8)
REFUSED = {
    "queries: a list": (TypeError, "queries must be a tensor, got list", {"queries": [[1.0]]}),
    "queries: integers": (TypeError, "queries must be float32.* got int64", {"queries": Q.long()}),
    "queries: one dimension": (ValueError, r"queries must be a matrix.* got \[8\]", {"queries": Q[0]}),
    "keys: None": (TypeError, "keys must be a tensor, got NoneType", {"keys": None}),
    "keys: three dimensions": (ValueError, r"keys must be a matrix.* got \[1, 6, 8\]", {"keys": K[None]}),
    "keys: width": (ValueError, r"keys must be \[N, 8\] to match queries, got \[6, 7\]", {"keys": K[:, :7]}),
    "keys: dtype": (TypeError, "keys must be float32 like queries, got bfloat16", {"keys": K.bfloat16()}),
    "keys: device": (ValueError, "keys must be on cpu like queries, got meta", {"keys": K.to("meta")}),
    "queries: device": (ValueError, "keys must be on meta like queries, got cpu", {"queries": Q.to("meta")}),
    "scale: text": (TypeError, "scale must be a number.* got str", {"scale": "1"}),
    "scale: bool": (TypeError, "scale must be a number.* got bool", {"scale": True}),
    "scale: two": (ValueError, r"scale must be a number.* got \[2\]", {"scale": torch.ones(2)}),
    "scale: integer tensor": (TypeError, "scale must be floating point, got int64", {"scale": torch.tensor(1)}),
    "scale: device": (ValueError, "scale must be on cpu.* got meta", {"scale": torch.tensor(1.0, device="meta")}),
    "dim": (ValueError, "dim must be one of 'rows', 'columns', 'both', got 'cols'", {"dim": "cols"}),
    "key_bias: length": (ValueError, r"key_bias must be \[6\], got \[4\]", {"key_bias": torch.zeros(4)}),
    "key_bias: integers": (TypeError, "key_bias must be floating.* got int64", {"key_bias": torch.arange(6)}),
    "key_bias: list": (TypeError, "key_bias must be a tensor, got list", {"key_bias": [0.0] * 6}),
    "key_bias: device": (ValueError, "key_bias must be on cpu.* got meta", {"key_bias": torch.zeros(6, device="meta")}),
    "ids: one missing": (ValueError, "got no key_ids", {"query_ids": torch.arange(4)}),
    "ids: other missing": (ValueError, "got no query_ids", {"key_ids": torch.arange(6)}),
    "ids: floats": (
        TypeError,
        "query_ids must be an integer tensor, got float32",
        {"query_ids": torch.zeros(4), "key_ids": torch.arange(6)},
    ),
    "ids: bools": (
        TypeError,
        "key_ids must be an integer tensor, got bool",
        {"query_ids": torch.arange(4), "key_ids": torch.zeros(6).bool()},
    ),
    "ids: length": (
        ValueError,
        r"key_ids must be \[6\], got \[4\]",
        {"query_ids": torch.arange(4), "key_ids": torch.arange(4)},
    ),
    "ids: device": (
        ValueError,
        "query_ids must be on cpu.* got meta",
        {"query_ids": torch.arange(4, device="meta"), "key_ids": torch.arange(6)},
    ),
    "positives: a number": (ValueError, r"positives must be a tensor \[4\].* got 3", {"positives": 3}),
    "positives: asked for, none given": (
        ValueError,
        "return_positives needs positives, got -1",
        {"positives": -1, "return_positives": True},
    ),
    "positives: length": (ValueError, r"positives must be \[4\], got \[6\]", {"positives": torch.arange(6)}),
    "positives: floats": (TypeError, "positives must be an integer.* got float32", {"positives": torch.zeros(4)}),
    "positives: too large": (ValueError, r"positives must lie in \[-1, 6\)", {"positives": torch.tensor([0, 1, 2, 6])}),
    "positives: too small": (
        ValueError,
        r"positives must lie in \[-1, 6\)",
        {"positives": torch.tensor([0, 1, 2, -2])},
    ),
    "guide: two parts": (TypeError, "guide must be .* got", {"guide": (Q, K)}),
    "guide: rows": (ValueError, "guide must have 4 queries and 6 keys, got 6 and 6", {"guide": (K, K, 0.5)}),
    "guide: width": (ValueError, r"guide_keys must be \[N, 8\]", {"guide": (Q, K[:, :3], 0.5)}),
    "guide: integers": (TypeError, "guide_queries must be float32.* got int64", {"guide": (Q.long(), K, 0.5)}),
    "guide: limit": (ValueError, r"guide limit must be \[4\], got \[6\]", {"guide": (Q, K, torch.zeros(6))}),
    "guide: no limit": (TypeError, "guide limit must be a number.* got NoneType", {"guide": (Q, K, None)}),
    "guide: device": (ValueError, "guide_queries must be on cpu.* got meta", {"guide": (Q.to("meta"), K, 0.5)}),
    "workspace: negative": (ValueError, "workspace must be .* got -1", {"workspace": -1}),
    "workspace: a fraction": (TypeError, "workspace must be .* got float", {"workspace": 0.5}),
    "implementation": (ValueError, "implementation must be one of cpu, reference.* 'gpu'", {"implementation": "gpu"}),
    "implementation for float64": (
        NotImplementedError,
        "'cpu' cannot run: it takes float32, bfloat16 or float16, got float64",
        {"queries": Q.double(), "keys": K.double(), "implementation": "cpu"},
    ),
}


@pytest.mark.parametrize(("error", "message", "changed"), REFUSED.values(), ids=REFUSED)
def test_refused_at_the_door(error, message, changed):
    with pytest.raises(error, match=f"^similarity_lse: .*{message}"):
        similarity_lse(**{"queries": Q, "keys": K, **changed})


def test_float64_runs_on_the_reference():
    q, k = unit(5, 3, 1).double(), unit(7, 3, 2).double()
    with trace() as ran:
        r = similarity_lse(q, k, 2.0)
    assert r.dtype == torch.float64
    assert relative_error(r, torch.logsumexp(2.0 * q @ k.t(), 1)) < 1e-14
    assert [(choice.op, choice.implementation) for choice in ran] == [("similarity_lse", "reference")]
    assert "float64" in ran[0].refused["cpu"]


def test_positives_of_one_set_against_itself_break_the_symmetry():
    """Row 0 protects its pair with row 1, row 1 does not protect its pair with row 0."""
    x = unit(6, 8, 1)
    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    positives = torch.tensor([1, -1, 3, 2, -1, 4])
    results = []
    for dtype, implementation in ((torch.float32, "cpu"), (torch.float64, "reference")):
        leaf = x.to(dtype, copy=True).requires_grad_()
        lse = similarity_lse(
            leaf, leaf, 5.0, query_ids=ids, key_ids=ids, positives=positives, implementation=implementation
        )
        results.append((lse, *torch.autograd.grad(lse.square().sum(), leaf)))
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).norm() <= 1e-5 * expected.norm()
