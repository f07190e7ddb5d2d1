"""similarity_topk: every implementation selects exactly what the definition says: ties, masks, limits, NaN."""

import importlib
import json
import math
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from similarity import assert_accurate, assert_same, embeddings, evaluate, generator, one_sign, tiles, unit

from fastcontrast.ops import explain, similarity_topk, trace
from fastcontrast.testing import assert_as_good_as, relative_error

module = importlib.import_module("fastcontrast.ops.similarity_topk")
IMPLEMENTATIONS = ("cpu", "torch", "reference")
FAST = ("cpu", "torch")
NAN, INF = math.nan, math.inf


def values_alone(**arguments) -> torch.Tensor:
    arguments.pop("scale", None)
    return similarity_topk(**arguments)[0]


def whole_numbers(rows: int, width: int, seed: int) -> torch.Tensor:
    """Products of these are exact, and full of ties."""
    return torch.randint(-1, 2, (rows, width), generator=generator(seed)).float()


def assert_selects_the_same(actual, expected) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------------------------- the definition


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("largest", [True, False])
def test_equals_sorting_in_python(implementation, largest):
    q, k = whole_numbers(6, 4, 1), whole_numbers(9, 4, 2)
    query_ids, key_ids, limit = torch.arange(6) % 3, torch.arange(9) % 4, torch.tensor([9.0, 1.0, 0.0, -1.0, 2.0, -9.0])
    limit = limit if largest else -limit
    values, indices = similarity_topk(
        q, k, 5, query_ids=query_ids, key_ids=key_ids, limit=limit, largest=largest, implementation=implementation
    )
    sign = 1 if largest else -1
    for i in range(6):
        ranked = []
        for j in range(9):
            score = sum(float(a * b) for a, b in zip(q[i], k[j], strict=True))
            if query_ids[i] != key_ids[j] and not sign * score > sign * limit[i]:
                ranked.append((-sign * score, j))
        ranked = [(-sign * score, j) for score, j in sorted(ranked)[:5]]
        ranked += [(-sign * INF, -1)] * (5 - len(ranked))
        assert [*zip(values[i].tolist(), indices[i].tolist(), strict=True)] == ranked


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_torch_topk_where_nothing_ties(implementation):
    q, k = unit(40, 16, 1), unit(300, 16, 2)
    for largest in (True, False):
        expected = torch.topk(q.double() @ k.double().t(), 11, dim=1, largest=largest)
        with tiles(16, 32):
            values, indices = similarity_topk(q, k, 11, largest=largest, implementation=implementation)
        assert torch.equal(indices, expected.indices)
        assert relative_error(values, expected.values) < 1e-6


# ------------------------------------------------------------------------------------------------ UniME: hard negatives


def wave(n: int, d: int, c: float) -> torch.Tensor:
    i, k = torch.arange(n)[:, None].double(), torch.arange(d).double()
    return F.normalize(torch.sin(1 + c + 0.7 * i + 1.3 * k + 0.11 * i * k), dim=1)


ELIGIBLE = {0.1: [5] * 6, 0.0: [5, 4, 4, 4, 5, 4], -0.2: [5, 4, 4, 4, 4, 4], -1.0: [2, 3, 2, 3, 2, 2]}
LOSSES = (
    (0.2, 5, 10.0, 0.684347699297), (0.2, 3, 0.1, 0.683726231744), (0.2, 2, 0.0, 0.149550152697),
    (0.2, 3, -0.2, 0.042564994834), (0.2, 2, -1.0, 0.003283726323), (0.02, 5, 10.0, 1.674657287367),
    (0.02, 2, 0.0, 0.095938477270),
)  # fmt: skip
ITSELF = {"query_ids": torch.arange(6), "key_ids": torch.arange(6)}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("beta", ELIGIBLE)
def test_golden_eligible_negatives(implementation, beta):
    q, c = wave(6, 8, 0), wave(6, 8, 0.6)
    limit = (q * c).sum(1) + beta
    dtype = torch.float64 if implementation == "reference" else torch.float32
    run = {**ITSELF, "limit": limit.to(dtype), "implementation": implementation}
    _, indices = similarity_topk(q.to(dtype), c.to(dtype), 5, **run)
    assert (indices >= 0).sum(1).tolist() == ELIGIBLE[beta]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("tau", "k", "beta", "expected"), LOSSES)
def test_golden_losses_over_hard_negatives(implementation, tau, k, beta, expected):
    dtype = torch.float64 if implementation == "reference" else torch.float32
    q, c = wave(6, 8, 0).to(dtype), wave(6, 8, 0.6).to(dtype)
    own = (q * c).sum(1)
    hard, _ = similarity_topk(q, c, k, **ITSELF, limit=own + beta, implementation=implementation)
    logits = torch.cat([own[:, None], hard], 1) / tau
    loss = F.cross_entropy(logits, torch.zeros(6, dtype=torch.long))
    assert loss.item() == pytest.approx(expected, rel=1e-10 if dtype == torch.float64 else 2e-5)


# ------------------------------------------------------------------------------------------------ selection, everywhere

SIZES = (1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 129, 303)


@st.composite
def problems(draw):
    m, n = draw(st.sampled_from((0, *SIZES))), draw(st.sampled_from(SIZES))
    seed, width = draw(st.integers(0, 1000)), draw(st.sampled_from((0, 1, 3, 6)))
    k = draw(st.sampled_from(sorted({1, 2, min(n, 10), (n + 1) // 2, n})).filter(lambda k: k <= n))
    options = {"largest": draw(st.booleans())}
    if draw(st.booleans()):
        few = draw(st.sampled_from((1, 3, 50)))
        options["query_ids"], options["key_ids"] = torch.arange(m) % few, torch.arange(n) % (few + 1)
    limit = draw(st.sampled_from((None, 0.5, "rows", INF, NAN)))
    if limit is not None:
        options["limit"] = (
            torch.randint(-2, 3, (m,), generator=generator(seed + 2)).float() if limit == "rows" else limit
        )
    q, keys = whole_numbers(m, width, seed), whole_numbers(n, width, seed + 1)
    if width and m and draw(st.booleans()):
        special = draw(st.sampled_from((NAN, INF, -INF)))
        where = draw(st.sampled_from((q, keys)))
        where[seed % len(where), 0] = special
    tile = draw(st.sampled_from(((16, 32), (15, 63), (33, 130), (1024, 2048))))
    return (q, keys, k), options, {"rows": tile[0], "columns": tile[1], "threads": draw(st.sampled_from((1, 3)))}


@settings(max_examples=300)
@given(problems())
def test_every_implementation_selects_what_the_reference_does(problem):
    inputs, options, schedule = problem
    expected = similarity_topk(*inputs, **options, implementation="reference")
    with tiles(**schedule):
        for implementation in FAST:
            assert_selects_the_same(similarity_topk(*inputs, **options, implementation=implementation), expected)


@pytest.mark.parametrize("k", [1, 10, 90, 1000, 5000])
@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled", "equal"])
def test_long_rows_on_real_tiles(k, order):
    """Of 5,000 columns: a row that gets better all the time throws away what it had, again and again."""
    scores = torch.arange(5000).float()
    if order == "descending":
        scores = scores.flip(0)
    elif order == "shuffled":
        scores = scores[torch.randperm(5000, generator=generator(1))]
    elif order == "equal":
        scores = torch.ones(5000)
    q, keys = torch.tensor([[1.0], [-1.0]]), scores[:, None]
    for largest in (True, False):
        expected = similarity_topk(q, keys, k, largest=largest, implementation="reference")
        for implementation in FAST:
            actual = similarity_topk(q, keys, k, largest=largest, implementation=implementation)
            assert_selects_the_same(actual, expected)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("largest", [True, False])
def test_nan_comes_first_with_its_index(implementation, largest):
    q, k = torch.ones(2, 1), torch.tensor([[1.0], [NAN], [INF], [-INF], [-NAN], [0.0], [-0.0]])
    q[1] = NAN
    values, indices = similarity_topk(q, k, 7, largest=largest, limit=0.0, implementation=implementation)
    kept = [1, 4, 5, 6, 3] if largest else [1, 4, 5, 6, 0, 2]
    assert indices[0].tolist() == kept + [-1] * (7 - len(kept))
    assert indices[1].tolist() == [*range(7)]
    assert values.isnan().sum(1).tolist() == [2, 7]
    zeros = values[0, 2:4]
    assert (zeros == 0).all()
    assert not torch.signbit(zeros).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_infinite_product_is_a_candidate_and_a_missing_one_is_not(implementation):
    q, k = torch.ones(1, 1), torch.tensor([[-INF], [3.0], [-INF]])
    values, indices = similarity_topk(
        q, k, 3, query_ids=torch.tensor([7]), key_ids=torch.tensor([0, 0, 7]), implementation=implementation
    )
    assert (values.tolist(), indices.tolist()) == ([[3.0, -INF, -INF]], [[1, 0, -1]])


def test_ids_of_64_bits_are_compared_whole():
    ids = {"query_ids": torch.tensor([2**40 + 1]), "key_ids": torch.tensor([1, 2**40 + 1])}
    for implementation in IMPLEMENTATIONS:
        _, indices = similarity_topk(torch.ones(1, 1), torch.ones(2, 1), 2, **ids, implementation=implementation)
        assert indices.tolist() == [[0, -1]]


# ------------------------------------------------------------------------------------------------- values and gradients

OPTIONS = {
    "largest": {},
    "smallest": {"largest": False},
    "some rows short of candidates": {"query_ids": torch.arange(67) % 3, "key_ids": torch.zeros(83).long()},
    "limit": {"limit": torch.linspace(-0.5, 0.5, 67)},
}


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("k", [1, 10, 83])
@pytest.mark.parametrize("needs", [("queries", "keys"), ("queries",), ("keys",)], ids=" ".join)
def test_values_and_gradients(implementation, options, k, needs):
    inputs = embeddings(67, 83, 24)
    with tiles(16, 32):
        how = {"call": values_alone, "needs": needs, "implementation": implementation, "strict": True}
        assert_accurate(inputs, {"k": k, **options}, **how, upstream=lambda i, shape: one_sign(i, shape) - 1.2)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(implementation, dtype):
    inputs = embeddings(127, 257, 64, dtype)
    q, k = inputs["queries"], inputs["keys"]
    with tiles(16, 32):
        values, indices = similarity_topk(q, k, 10, implementation=implementation)
        assert values.dtype == torch.float32
        # Two products may differ by less than float32 rounds: what was selected is compared, not its order.
        truth, _ = similarity_topk(q.double(), k.double(), 10)
        assert relative_error(values, truth) < 1e-6
        gradients = evaluate(
            inputs, {"k": 10}, needs=("queries", "keys"), implementation=implementation, call=values_alone
        )
    weights = torch.zeros(127, 257, dtype=torch.float64).scatter_(1, indices, one_sign(0, indices.shape).double())
    for name, exact in (("dqueries", weights @ k.double()), ("dkeys", weights.t() @ q.double())):
        assert gradients[name].dtype == dtype
        assert_as_good_as(gradients[name], exact, exact.float().to(dtype))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_without_candidates(implementation):
    """Nothing left: −inf, −1, and a gradient of exactly 0, whatever the keys hold."""
    inputs = embeddings(37, 40, 8)
    inputs["keys"][0] = NAN if implementation != "reference" else 1.0  # 0 · NaN is NaN in dense code alone
    zeros = torch.zeros(37, dtype=torch.long), torch.zeros(40, dtype=torch.long)
    options = {"k": 3, "query_ids": zeros[0], "key_ids": zeros[1]}
    how = {"needs": ("queries", "keys"), "implementation": implementation, "call": values_alone}
    results = evaluate(inputs, options, upstream=lambda i, shape: torch.ones(shape), **how)
    assert results["value 0"].isneginf().all()
    assert (results["dqueries"] == 0).all()
    assert (results["dkeys"] == 0).all()
    for largest in (True, False):
        values, indices = similarity_topk(inputs["queries"], inputs["keys"], **options, largest=largest)
        assert (values == (-INF if largest else INF)).all()
        assert (indices == -1).all()


@pytest.mark.parametrize("implementation", FAST)
def test_a_key_that_was_not_selected_leaves_no_trace(implementation):
    inputs = embeddings(37, 40, 8)
    inputs["keys"][0] = NAN
    # 36 candidates for 38 places
    options = {"k": 38, "query_ids": torch.zeros(37).long(), "key_ids": (torch.arange(40) > 3).long()}
    how = {"needs": ("queries", "keys"), "implementation": implementation, "call": values_alone}
    results = evaluate(inputs, options, **how)
    assert results["value 0"][:, :36].isfinite().all()
    assert results["dqueries"].isfinite().all()
    assert results["dkeys"].isfinite().all()
    assert (results["dkeys"][:4] == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_queries_and_one_key(implementation):
    for m in (0, 3):
        leaves = unit(m, 4, 1).requires_grad_(), unit(1, 4, 2).requires_grad_()
        values, indices = similarity_topk(*leaves, 1, implementation=implementation)
        assert values.shape == indices.shape == (m, 1)
        dq, dk = torch.autograd.grad(values.sum(), leaves)
        assert relative_error(dq, leaves[1].detach().expand(m, 4)) < 1e-6
        assert relative_error(dk, leaves[0].detach().sum(0, keepdim=True)) < 1e-6


def test_the_reference_has_a_second_derivative_and_the_others_refuse_one():
    q, k = unit(7, 4, 1).double().requires_grad_(), unit(9, 4, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: similarity_topk(q, k, 3)[0], (q, k))
    assert torch.autograd.gradgradcheck(lambda q, k: similarity_topk(q, k, 3)[0], (q, k))
    for implementation in FAST:
        q, k = unit(7, 4, 1).requires_grad_(), unit(9, 4, 2).requires_grad_()
        values, _ = similarity_topk(q, k, 3, implementation=implementation)
        (gradient,) = torch.autograd.grad(values.sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"^similarity_topk: .*reference"):
            gradient.square().sum().backward()


# ----------------------------------------------------------------------------------------- strides, threads, compilers


@pytest.mark.parametrize("implementation", FAST)
def test_any_strides(implementation):
    q, k = unit(40, 16, 1), unit(50, 16, 2)
    expected = similarity_topk(q, k, 5, implementation="reference")
    limit, ids = torch.full((80,), 0.9)[::2], torch.stack([torch.arange(40)] * 2, 1)[:, 1]
    views = q.t().contiguous().t(), torch.cat([k, k], 1)[:, 16:]
    options = {
        "limit": limit,
        "query_ids": ids,
        "key_ids": torch.full((100,), -1)[::2],
        "implementation": implementation,
    }
    with tiles(16, 32):
        actual = similarity_topk(*views, 5, **options)
        spread = similarity_topk(q[:1].expand(40, 16), k[:1].expand(50, 16), 5, implementation=implementation)
    assert torch.equal(actual[1], expected[1])
    assert relative_error(actual[0], expected[0]) < 1e-6
    assert (spread[1] == torch.arange(5)).all()


@pytest.mark.parametrize("implementation", FAST)
def test_two_runs_have_the_same_bits_for_any_tiles_and_threads(implementation):
    """Small integers: the products are exact for any tiling, and most of them tie."""
    inputs = {"queries": whole_numbers(403, 5, 1), "keys": whole_numbers(1507, 5, 2)}
    runs = []
    for schedule in ((16, 32, 1), (48, 80, 3), (1024, 2048, 2), (1024, 2048, 2)):
        with tiles(*schedule[:2], threads=schedule[2]):
            options, how = {"k": 20}, {"needs": ("queries", "keys"), "implementation": implementation}
            runs.append(evaluate(inputs, options, call=values_alone, **how))
            selected = similarity_topk(**inputs, k=20, implementation=implementation)
            runs[-1]["indices"] = selected[1]
    for run in runs[1:]:
        assert_same(run, runs[0], 0.0)


def test_inputs_are_not_written_to():
    inputs = embeddings(40, 50, 8)
    before = {name: x.clone() for name, x in inputs.items()}
    limit = torch.full((40,), 0.3)
    for implementation in FAST:
        options = {"k": 5, "limit": limit, "largest": False}
        evaluate(inputs, options, needs=("queries", "keys"), implementation=implementation, call=values_alone)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)
    assert (limit == 0.3).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_does_not_round_the_products(implementation):
    q, k = unit(40, 64, 1), unit(50, 64, 2)
    expected = similarity_topk(q, k, 5, implementation=implementation)
    with torch.autocast("cpu", torch.bfloat16):
        assert_selects_the_same(similarity_topk(q, k, 5, implementation=implementation), expected)


MEMORY = """
import json, resource, sys, torch
from fastcontrast.ops import similarity_topk

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def step(q, k, implementation):
    similarity_topk(q, k, 20, implementation=implementation)[0].sum().backward()

warm = [torch.randn(2100, 8).requires_grad_() for _ in range(2)]
step(*warm, sys.argv[1])
q, k = (torch.randn(rows, 16).requires_grad_() for rows in (8_000, 12_000))
before = peak()
step(q, k, sys.argv[1])
print(json.dumps(peak() - before))
"""


@pytest.mark.parametrize("implementation", FAST)
def test_peak_memory_is_a_tile_and_the_result(implementation):
    """Dense products would be 384 MB. The results, and what the backward sorts, are 10 numbers of 8 bytes a selection;
    streamed by torch, tiles may fill the workspace of 64 MiB."""
    run = subprocess.run([sys.executable, "-c", MEMORY, implementation], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    tile = (16 << 20) if implementation == "cpu" else (96 << 20)
    assert json.loads(run.stdout) < tile + 8_000 * 20 * 8 * 10 + 4 * 16 * 20_000 * 4 + (32 << 20)


VARIANTS = {
    "plain": {"k": 4},
    "masks": {"k": 4, "query_ids": torch.arange(33) % 5, "key_ids": torch.arange(40) % 4, "limit": 0.4},
    "smallest": {"k": 40, "largest": False, "limit": torch.zeros(33)},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("implementation", FAST)
def test_opcheck(name, implementation):
    passed = []

    def registered(*arguments):
        passed.append(arguments)
        return torch.ops.fastcontrast.similarity_topk(*arguments)

    inputs = {key: x.requires_grad_() for key, x in embeddings(33, 40, 8).items() if key != "scale"}
    with mock.patch.object(module._Eager, "apply", registered):
        similarity_topk(**inputs, **VARIANTS[name], implementation=implementation)
    torch.library.opcheck(torch.ops.fastcontrast.similarity_topk.default, passed[0])


COMPILED = [(name, "aot_eager", False) for name in VARIANTS] + [
    ("masks", "aot_eager", True),
    ("plain", "inductor", False),
]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # from within inductor
@pytest.mark.parametrize(("name", "backend", "dynamic"), COMPILED)
@pytest.mark.parametrize("implementation", FAST)
def test_compiled_equals_eager(name, backend, dynamic, implementation):
    torch._dynamo.reset()
    inputs = embeddings(33, 40, 8)
    compiled = torch.compile(values_alone, fullgraph=True, backend=backend, dynamic=dynamic)
    how = {"needs": ("queries", "keys"), "implementation": implementation}
    actual = evaluate(inputs, VARIANTS[name], call=compiled, **how)
    assert_same(actual, evaluate(inputs, VARIANTS[name], call=values_alone, **how))


# ------------------------------------------------------------------------------------------------------ choosing, doors


def test_what_runs():
    q = unit(5, 3, 1)
    with trace() as ran:
        similarity_topk(q, q, 2)
        values, _ = similarity_topk(q.double(), q.double(), 2)
    assert values.dtype == torch.float64
    assert [(choice.op, choice.implementation) for choice in ran] == [
        ("similarity_topk", "cpu"),
        ("similarity_topk", "reference"),
    ]
    assert explain("similarity_topk", "meta")["torch"] is None
    assert "float64" in explain("similarity_topk", "cpu", torch.float64)["torch"]


Q, K = torch.zeros(4, 8), torch.zeros(6, 8)
REFUSED = {
    "queries": (TypeError, "queries must be a tensor, got list", {"queries": [[1.0]]}),
    "keys: width": (ValueError, r"keys must be \[N, 8\] to match queries, got \[6, 7\]", {"keys": K[:, :7]}),
    "keys: none": (ValueError, r"k must lie in \[1, 0\], the number of keys, got 2", {"keys": K[:0]}),
    "k: zero": (ValueError, r"k must lie in \[1, 6\].* got 0", {"k": 0}),
    "k: too large": (ValueError, r"k must lie in \[1, 6\].* got 7", {"k": 7}),
    "k: a fraction": (TypeError, "k must be an integer, got float", {"k": 2.0}),
    "k: bool": (TypeError, "k must be an integer, got bool", {"k": True}),
    "ids: one missing": (ValueError, "got no key_ids", {"query_ids": torch.arange(4)}),
    "ids: length": (
        ValueError,
        r"key_ids must be \[6\], got \[4\]",
        {"query_ids": torch.arange(4), "key_ids": torch.arange(4)},
    ),
    "limit: length": (ValueError, r"limit must be \[4\], got \[6\]", {"limit": torch.zeros(6)}),
    "limit: text": (TypeError, "limit must be a number.* got str", {"limit": "0.9"}),
    "limit: integers": (TypeError, "limit must be floating point, got int64", {"limit": torch.arange(4)}),
    "limit: device": (ValueError, "limit must be on cpu.* got meta", {"limit": torch.zeros(4, device="meta")}),
    "implementation": (ValueError, "implementation must be one of cpu, torch.* 'gpu'", {"implementation": "gpu"}),
    "implementation for float64": (
        NotImplementedError,
        "'torch' cannot run: it takes float32, bfloat16 or float16, got float64",
        {"queries": Q.double(), "keys": K.double(), "implementation": "torch"},
    ),
}


@pytest.mark.parametrize(("error", "message", "changed"), REFUSED.values(), ids=REFUSED)
def test_refused_at_the_door(error, message, changed):
    with pytest.raises(error, match=f"^similarity_topk: .*{message}"):
        similarity_topk(**{"queries": Q, "keys": K, "k": 2, **changed})
