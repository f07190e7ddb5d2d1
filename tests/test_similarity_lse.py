"""similarity_lse against float64 truth: value and every gradient, on ragged shapes, masks, scales and ends of range.

How the sweep goes about it (what it multiplies and keeps, threads, compilers) is in test_similarity_sweep.py.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from similarity import (
    DIMS,
    LEAVES,
    assert_accurate,
    biased,
    embeddings,
    evaluate,
    generator,
    one_sign,
    tiles,
    unit,
)

from fastcontrast.ops import similarity_lse, trace
from fastcontrast.testing import RAGGED, SMALL, relative_error

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
WIDTHS = (1, 2, 3, 7, 16, 61, 64, 65, 127, 512, 4096)
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
    "implementation": (ValueError, "must be one of cpu, triton, reference.* 'gpu'", {"implementation": "gpu"}),
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
