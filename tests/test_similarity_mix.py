"""similarity_mix against float64 truth: values, every gradient, masks, ends of range; what it multiplies; compilers."""

import importlib
import math
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from similarity import (
    LEAVES,
    assert_accurate,
    assert_same,
    biased,
    embeddings,
    evaluate,
    generator,
    one_sign,
    tiles,
    unit,
)
from test_similarity_lse import UPSTREAM, conditioning, problems
from test_similarity_sweep import counted_products

from fastcontrast.ops import explain, similarity_lse, similarity_mix, trace
from fastcontrast.testing import RAGGED, relative_error

module = importlib.import_module("fastcontrast.ops.similarity_mix")
ALL = (*LEAVES, "values")


def mix(**arguments):
    """The operation, its half-precision results upcast: a gradient of them is still rounded, as in training."""
    outputs = similarity_mix(**{"return_lse": True, **arguments})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in outputs)


def with_values(inputs: dict, width: int = 7) -> dict:
    q = inputs["queries"]
    n = (q if inputs.get("keys") is None else inputs["keys"]).shape[0]
    return {**inputs, "values": torch.randn(n, width, generator=generator(77)).to(q.dtype)}


def accurate(inputs: dict, options: dict, needs=ALL, **how) -> None:
    needs = tuple(name for name in needs if name in inputs)
    assert_accurate(inputs, options, needs=needs, call=mix, **how)


def measured(inputs: dict, options: dict, needs=ALL, **how) -> dict:
    return evaluate(inputs, options, needs=[name for name in needs if name in inputs], call=mix, **how)


# -------------------------------------------------------------------------------------------------------- the reference


def test_reference_equals_scalar_loops():
    m, n, d = 5, 7, 3
    q, k, v = (unit(rows, d, rows).double() for rows in (m, n, n + 1))
    v, bias = v[:n], torch.randn(n, generator=generator(3)).double()
    query_ids, key_ids = torch.tensor([0, 1, 2, 3, 9]), torch.tensor([0, 0, 1, 5, 2, 3, 3])
    positives = torch.tensor([1, -1, 4, 0, 6])
    guide = (torch.arange(m)[:, None].double(), torch.arange(n)[:, None].double(), 7.5)
    masks = {"key_bias": bias, "query_ids": query_ids, "key_ids": key_ids, "positives": positives, "guide": guide}
    out, lse = similarity_mix(q, k, v, 3.0, **masks, return_lse=True)
    for i in range(m):
        left = [j for j in range(n) if j == positives[i] or not (query_ids[i] == key_ids[j] or i * j > 7.5)]
        weights = [math.exp(3.0 * sum(float(q[i, e] * k[j, e]) for e in range(d)) + float(bias[j])) for j in left]
        assert lse[i].item() == pytest.approx(math.log(sum(weights)), rel=1e-12)
        for e in range(d):
            mean = sum(w * float(v[j, e]) for w, j in zip(weights, left, strict=True)) / sum(weights)
            assert out[i, e].item() == pytest.approx(mean, rel=1e-11, abs=1e-13)


def test_reference_gradients_equal_finite_differences():
    ids = torch.tensor([0, 1, 1, 2])

    def function(q, k, v, scale, bias):
        return similarity_mix(q, k, v, scale, key_bias=bias, query_ids=ids, key_ids=ids[:3], return_lse=True)

    inputs = [unit(4, 3, 1), unit(3, 3, 2), unit(3, 2, 3), torch.tensor(2.5), torch.tensor([0.3, -0.2, 0.1])]
    inputs = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_equals_attention_of_one_head(implementation):
    inputs = with_values(embeddings(67, 83, 24), 16)
    actual = measured(inputs, {"return_lse": False}, ("queries", "keys", "values"), implementation=implementation)

    def attention(queries, keys, scale, values, implementation, return_lse):
        return F.scaled_dot_product_attention(queries[None], keys[None], values[None], scale=float(scale))[0]

    wanted = {"needs": ("queries", "keys", "values"), "call": attention, "dtype": torch.float64}
    assert_same(actual, evaluate(inputs, {"return_lse": False}, **wanted), 1e-5)


# ------------------------------------------------------------------------------------------- uCLIP: a bank of features


def fixture(n: int, d: int, c: int) -> torch.Tensor:
    p, q = torch.arange(1, n + 1)[:, None].double(), torch.arange(1, d + 1).double()
    return F.normalize(torch.sin(p * q + (c + 1) * (0.7 * p + 0.3 * q)), dim=1)


GOLDEN = (
    (1, 2, 7, 0.01, (-0.33791634, -0.46861100, 0.38103054, 0.43355457, -0.42091940, -0.39482819)),
    (0, 3, 5, 0.01, (0.45284395, 0.41952832, 0.42834739, 0.39337928, 0.39216495, 0.35623905)),
    (1, 2, 7, 0.1, (-0.32810565, -0.48372050, 0.37061096, 0.44369966, -0.40749463, -0.39760208)),
)


@pytest.mark.parametrize(("queries", "bank", "rows", "temperature", "expected"), GOLDEN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_soft_retrieval(queries, bank, rows, temperature, expected, dtype):
    q, bank = fixture(4, 6, queries).to(dtype), fixture(rows, 6, bank).to(dtype)
    retrieved = F.normalize(similarity_mix(q, bank, bank, 1 / temperature), dim=1)[0]
    assert retrieved.tolist() == pytest.approx(expected, abs=1e-8 if dtype == torch.float64 else 1e-5)


def test_limits_of_the_temperature():
    q, bank = unit(40, 16, 1), unit(300, 16, 2)
    with tiles(16, 32):
        assert relative_error(similarity_mix(q, bank, bank, 0.0), bank.mean(0).expand(40, -1)) < 1e-6
        nearest = bank[(q.double() @ bank.double().t()).argmax(1)]
        assert relative_error(similarity_mix(q, bank, bank, 1e6), nearest) < 1e-6


def test_the_order_of_the_bank_changes_nothing():
    inputs = with_values(biased(40, 300, 16))
    order = torch.randperm(300, generator=generator(1))
    moved = {name: x[order] if name in ("keys", "values", "key_bias") else x for name, x in inputs.items()}
    with tiles(16, 32):
        expected, actual = measured(inputs, {}), measured(moved, {})
    for name in ("dkeys", "dvalues", "dkey_bias"):
        expected[name] = expected[name][order]
    assert_same(actual, expected, 5e-6)


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_parts_of_a_bank_merge_to_the_whole(parts):
    """(out, r) of each part, merged by ordinary torch, has the value and the gradients of the whole."""
    inputs = with_values(embeddings(40, 300, 16))

    def merged(queries, keys, scale, values, implementation):
        shards = zip(keys.tensor_split(parts), values.tensor_split(parts), strict=True)
        run = {"implementation": implementation, "return_lse": True}
        outs, lses = zip(*(similarity_mix(queries, k, v, scale, **run) for k, v in shards), strict=True)
        weights = torch.stack(lses).softmax(0)
        return torch.einsum("pm,pmd->md", weights, torch.stack(outs)), torch.stack(lses).logsumexp(0)

    with tiles(16, 32):
        actual = evaluate(inputs, {}, needs=("queries", "keys", "scale", "values"), call=merged)
        assert_same(actual, measured(inputs, {}), 1e-5)


# ------------------------------------------------------------------------------------------------- accuracy, everywhere


@settings(max_examples=150)
@given(problems())
def test_value_and_every_gradient(problem):
    inputs, options, schedule = problem
    options = {name: x for name, x in options.items() if name not in ("dim", "return_positives")}
    inputs = with_values(inputs)
    # What a logit's rounding changes in a share of the softmax is multiplied by values, here of norms beyond 1.
    magnitude = conditioning(inputs) * max([1.0, *inputs["values"].float().norm(dim=1).tolist()])
    with tiles(**schedule):
        accurate(inputs, options, magnitude=magnitude)


@pytest.mark.parametrize("shape", RAGGED, ids=lambda shape: shape.name)
def test_ragged_shapes_on_real_tiles(shape):
    inputs = {"queries": unit(shape.m, shape.d, 1), "keys": unit(shape.n, shape.d, 2), "scale": torch.tensor(20.0)}
    accurate(with_values(inputs, 5), {}, magnitude=1.0)


@pytest.mark.parametrize("width", [0, 1, 61])
def test_widths_of_the_values(width):
    with tiles(16, 32):
        accurate(with_values(biased(40, 50, 8), width), {}, strict=True)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("workspace", [0, None])
def test_fp32_within_1e5_on_embeddings(scale, workspace):
    inputs = {**with_values(biased(300, 400, 64), 64), "scale": torch.tensor(scale)}
    with tiles(64, 128):
        accurate(inputs, {"workspace": workspace}, strict=True)


@pytest.mark.parametrize("scale", [0.0, -7.0, 1e-5])
def test_scales_that_no_loss_uses(scale):
    with tiles(16, 32):
        accurate({**with_values(biased(40, 50, 16)), "scale": torch.tensor(scale)}, {}, strict=True)


@pytest.mark.parametrize("upstream", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("workspace", [0, None])
def test_any_upstream_gradient(upstream, workspace):
    def of_shape(i, shape):
        gradient = upstream(i, shape)
        return gradient[:, None].expand(shape) if gradient is not None and gradient.ndim < len(shape) else gradient

    needs = ALL if upstream(0, torch.Size([1])) is not None else LEAVES  # the values are not used otherwise
    with tiles(16, 32):
        accurate(with_values(biased(67, 83, 24)), {"workspace": workspace}, needs, upstream=of_shape, magnitude=1.0)


def test_a_loss_of_the_log_sum_exps_alone_leaves_the_values_a_gradient_of_zero():
    q, k, v = (unit(rows, 8, rows).requires_grad_() for rows in (40, 50, 51))
    _, lse = similarity_mix(q, k, v[:50], 5.0, return_lse=True)
    expected = torch.autograd.grad(similarity_lse(q, k, 5.0).sum(), (q, k))
    actual = torch.autograd.grad(lse.sum(), (q, k, v))
    assert all(relative_error(a, b) < 2e-6 for a, b in zip(actual, (*expected, torch.zeros(51, 8)), strict=True))


def test_weights_below_the_smallest_normal_number():
    """At scale 100 weights reach 1e-38; a slope of them below that is 0, and no product slows down."""
    q = unit(300, 8, 1)
    inputs = {"queries": q, "keys": q.clone(), "scale": torch.tensor(50.0), "values": 1e-3 * unit(300, 8, 3)}
    for workspace in (0, None):
        with tiles(64, 128), mock.patch.object(torch, "mm", wraps=torch.mm) as mm:
            accurate(inputs, {"workspace": workspace}, strict=True)
        for call in mm.call_args_list:
            for x in call.args:
                assert not ((x != 0) & (x.abs() < torch.finfo(torch.float32).tiny)).any() or x.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_half_precision_is_as_good_as_dense_fp32_logits(dtype, scale):
    inputs = {**with_values(biased(257, 129, 64, dtype), 33), "scale": torch.tensor(scale)}
    out, lse = similarity_mix(inputs["queries"], inputs["keys"], inputs["values"], return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    for workspace in (0, None):
        with tiles(64, 48):
            accurate(inputs, {"workspace": workspace})


# ------------------------------------------------------------------------------------------------- masks, ends of range


@pytest.mark.parametrize("workspace", [0, None])
def test_rows_with_nothing_left(workspace):
    """Ids all equal and no positive: 0, and gradients of exactly 0, also where the loss looks at −inf."""
    ids = torch.zeros(37, dtype=torch.long)
    options = {"query_ids": ids, "key_ids": ids, "positives": -1, "workspace": workspace}
    with tiles(16, 32):
        results = measured(with_values(biased(37, 37, 8)), options, upstream=lambda i, shape: torch.ones(shape))
    assert results.pop("value 1").isneginf().all()
    for name, x in results.items():
        assert (x == 0).all(), name
    options["query_ids"] = torch.arange(37) % 3
    with tiles(16, 32):
        accurate(with_values(biased(37, 37, 8)), options, strict=True)
        out = similarity_mix(unit(37, 8, 1), unit(37, 8, 2), unit(37, 8, 3), **options)
    assert torch.equal((out == 0).all(1), options["query_ids"] == 0)


def test_no_keys_and_no_queries():
    for m, n in ((3, 0), (0, 5), (0, 0)):
        results = measured(with_values(biased(m, n, 4), 2), {})
        assert results["value 0"].shape == (m, 2)
        assert all((x == 0).all() for name, x in results.items() if name != "value 1")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["queries", "keys", "values"])
@pytest.mark.parametrize("workspace", [0, None])
def test_nan_and_infinite_inputs(value, where, workspace):
    """What is not finite comes out exactly where dense code has it, in values and gradients."""
    inputs = with_values({name: x for name, x in embeddings(40, 50, 8).items() if name != "scale"})
    inputs[where][21, 3] = value
    needs, options = ("queries", "keys", "values"), {"scale": 5.0, "workspace": workspace}
    with tiles(16, 32):
        actual = measured(inputs, options, needs)
        truth = measured(inputs, options, needs, implementation="reference")
    for name in truth:
        assert torch.equal(actual[name].isfinite(), truth[name].isfinite()), name
    assert not truth["value 0"].isfinite().all()
    if where == "queries":
        assert truth["value 0"].isfinite().all(1).sum() == 39


# ------------------------------------------------------------------------------------------------ what a sweep may cost

COSTS = {
    # needs: products of value and gradients when nothing may be kept, and when everything may
    ("values",): (4, 3),
    ("queries",): (5, 4),
    ("scale",): (5, 4),
    ("keys", "scale"): (5, 4),
    ("key_bias",): (4, 3),
    ("queries", "values"): (6, 5),
    ("queries", "keys"): (6, 5),
    ALL: (7, 6),
}


def products(inputs: dict, options: dict, **how) -> float:
    """Of M·N·D each, D being also the width of the values."""
    (m, d), n = inputs["queries"].shape, inputs["keys"].shape[0]
    with counted_products() as spent:
        measured(inputs, options, **how)
    return sum(spent) / (m * n * d)


@pytest.mark.parametrize(("needs", "cost"), COSTS.items(), ids=lambda value: " ".join(map(str, value)))
def test_only_what_is_needed_is_multiplied(needs, cost):
    inputs = with_values(biased(67, 83, 8), 8)
    with tiles(16, 32):
        for workspace, expected in zip((0, 1 << 20), cost, strict=True):
            options = {"workspace": workspace, "return_lse": False}
            assert products(inputs, options, needs=needs) == expected
            both, alone = (measured(inputs, options, names) for names in (ALL, needs))
            assert_same(alone, {name: x for name, x in both.items() if name in alone})


def test_values_alone_cost_two_products_and_keep_nothing():
    inputs = with_values(biased(67, 83, 8), 8)
    with tiles(16, 32), torch.no_grad(), counted_products() as spent:
        similarity_mix(**inputs)
    assert sum(spent) == 2 * 67 * 83 * 8


def test_workspace_saves_products_and_changes_nothing_else():
    inputs = with_values(biased(150, 170, 8), 8)
    options = {"query_ids": torch.arange(150) % 11, "key_ids": torch.arange(170) % 7}
    options["guide"] = (unit(150, 4, 7), unit(170, 4, 8), 0.6)
    with tiles(16, 32, kept=20):
        sizes = (0, 20_000, 45_000, 80_000, 1 << 20)
        costs = [products(inputs, options | {"workspace": size}) for size in sizes]
        results = [measured(inputs, options | {"workspace": size}) for size in sizes]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) >= 4
    for result in results[1:]:
        assert_same(result, results[0])


MEMORY = """
import json, resource, torch
from fastcontrast.ops import similarity_mix

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def step(q, k, v):
    similarity_mix(q, k, v, 20.0, workspace=40 << 20).sum().backward()
    assert q.grad.isfinite().all()

step(*(torch.randn(2100, 8).requires_grad_() for _ in range(3)))
inputs = [torch.nn.functional.normalize(torch.randn(20_000, 16)).requires_grad_() for _ in range(3)]
before = peak()
step(*inputs)
print(json.dumps(peak() - before))
"""


def test_peak_memory_is_workspace_plus_rows():
    """Dense weights would be 1.6 GB. 64 MiB are for tile buffers and what the allocator and the thread pools take."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < (40 << 20) + 8 * 4 * 40_000 * 17 + (64 << 20)


# ----------------------------------------------------------------------------------------- autograd, threads, compilers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(dtype):
    inputs = with_values(embeddings(40, 50, 16, dtype), 16)
    expected = measured(inputs, {})
    wide = torch.zeros(50, 100, dtype=dtype)
    wide[:, 1:97:6] = inputs["values"]
    views = (inputs["queries"].t().contiguous().t(), torch.cat([inputs["keys"]] * 2, 1)[:, 16:], wide[:, 1:97:6])
    leaves = [x.detach().requires_grad_() for x in views]
    assert [x.stride() for x in leaves] == [x.stride() for x in views]
    with tiles(16, 32):
        outputs = mix(**dict(zip(("queries", "keys", "values"), leaves, strict=True)), scale=20.0)
        loss = sum((x * one_sign(i, x.shape)).sum() for i, x in enumerate(outputs))
        gradients = torch.autograd.grad(loss, leaves)
    names = ("value 0", "value 1", "dqueries", "dkeys", "dvalues")
    actual = dict(zip(names, (*(x.detach() for x in outputs), *gradients), strict=True))
    assert_same(actual, {name: expected[name] for name in names}, 2e-6 if dtype == torch.float32 else 5e-3)
    rows = unit(1, 8, 1).expand(40, 8)
    assert relative_error(similarity_mix(rows, rows, rows), rows) < 1e-6


def test_keys_that_are_also_queries_and_values():
    def gradient(dtype, implementation):
        x = unit(40, 8, 1).to(dtype).requires_grad_()
        out = similarity_mix(x, x, x, 5.0, implementation=implementation)
        return torch.autograd.grad((out * out.detach().roll(1, 0)).sum(), x)[0]

    with tiles(16, 32):
        assert relative_error(gradient(torch.float32, "cpu"), gradient(torch.float64, "reference")) < 1e-5


def test_backward_twice_over_one_graph():
    inputs = {name: x.requires_grad_() for name, x in with_values(biased(67, 83, 8)).items()}
    with tiles(16, 32):
        loss = sum(x.sum() for x in mix(**inputs, workspace=20_000))
        first = torch.autograd.grad(loss, [*inputs.values()], retain_graph=True)
        second = torch.autograd.grad(2.0 * loss, [*inputs.values()])
    for a, b in zip(first, second, strict=True):
        assert torch.equal(2.0 * a, b)


def test_a_second_derivative_is_refused_not_wrong():
    q, k, v = (unit(rows, 4, rows).requires_grad_() for rows in (7, 9, 9))
    (gradient,) = torch.autograd.grad(similarity_mix(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^similarity_mix: .*reference"):
        gradient.square().sum().backward()


def test_inputs_and_upstream_gradients_are_not_written_to():
    inputs = with_values(biased(67, 83, 8))
    before, upstream = {name: x.clone() for name, x in inputs.items()}, torch.ones(67, 7)
    with tiles(16, 32):
        measured(inputs, {}, upstream=lambda i, shape: upstream[:, 0] if i else upstream)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)
    assert (upstream == 1).all()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_two_runs_have_the_same_bits(threads):
    inputs = with_values(biased(403, 507, 24))
    with tiles(1024, 2048, threads=threads):
        first = measured(inputs, {})
        for _ in range(3):
            assert_same(measured(inputs, {}), first, 0.0)


def test_autocast_does_not_round_the_logits():
    inputs = with_values(biased(67, 83, 16))
    expected = measured(inputs, {})
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(measured(inputs, {}), expected, 0.0)

    def under_autocast(**arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return similarity_mix(**arguments)

    assert_same(
        evaluate(inputs, {"return_lse": True}, needs=ALL, implementation="reference", call=under_autocast),
        expected,
        1e-5,
    )


ids = torch.arange(33) % 5
VARIANTS = {
    "plain": {},
    "lse": {"return_lse": True, "workspace": 0},
    "ids": {"query_ids": ids, "key_ids": torch.arange(40) % 4, "positives": torch.arange(33).flip(0)},
    "guide": {"return_lse": True, "guide": (unit(33, 4, 1), unit(40, 4, 2), 0.5)},
    "values": {},
}


def variant(name: str) -> tuple[dict, dict, tuple[str, ...]]:
    inputs = with_values(biased(33, 40, 8))
    return inputs, {"return_lse": False, **VARIANTS[name]}, ("values",) if name == "values" else ALL


@pytest.mark.parametrize("name", VARIANTS)
def test_opcheck(name):
    inputs, options, needs = variant(name)
    passed = []

    def registered(*arguments):
        passed.append(arguments[:-1])
        return torch.ops.fastcontrast.similarity_mix(*arguments[:-1])

    with tiles(16, 32, kept=8), mock.patch.object(module._Eager, "apply", registered):
        similarity_mix(**{key: x.clone().requires_grad_(key in needs) for key, x in inputs.items()}, **options)
        torch.library.opcheck(torch.ops.fastcontrast.similarity_mix.default, passed[0])


COMPILED = [(name, "aot_eager", False) for name in VARIANTS] + [
    ("lse", "aot_eager", True),
    ("plain", "inductor", False),
]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # from within inductor
@pytest.mark.parametrize(("name", "backend", "dynamic"), COMPILED)
def test_compiled_equals_eager(name, backend, dynamic):
    torch._dynamo.reset()
    inputs, options, needs = variant(name)
    compiled = torch.compile(similarity_mix, fullgraph=True, backend=backend, dynamic=dynamic)
    actual = evaluate(inputs, options, needs=needs, implementation=None, call=compiled)
    assert_same(actual, evaluate(inputs, options, needs=needs, call=similarity_mix))


# ------------------------------------------------------------------------------------------------------ choosing, doors


def test_it_runs_on_what_similarity_lse_runs_on():
    assert list(explain("similarity_mix")) == list(explain("similarity_lse"))
    q = unit(5, 3, 1)
    with trace() as ran:
        similarity_mix(q, q, q)
        assert similarity_mix(q.double(), q.double(), q.double()).dtype == torch.float64
    assert [(choice.op, choice.implementation) for choice in ran] == [
        ("similarity_mix", "cpu"),
        ("similarity_mix", "reference"),
    ]


Q, K, V = torch.zeros(4, 8), torch.zeros(6, 8), torch.zeros(6, 3)
REFUSED = {
    "queries": (TypeError, "queries must be a tensor, got list", {"queries": [[1.0]]}),
    "keys: width": (ValueError, r"keys must be \[N, 8\] to match queries, got \[6, 7\]", {"keys": K[:, :7]}),
    "values: None": (TypeError, "values must be a tensor, got NoneType", {"values": None}),
    "values: rows": (ValueError, r"values must be \[6, Dv\] to match keys, got \[4, 8\]", {"values": Q}),
    "values: one dimension": (ValueError, r"values must be a matrix.* got \[6\]", {"values": V[:, 0]}),
    "values: dtype": (TypeError, "values must be float32 like queries, got bfloat16", {"values": V.bfloat16()}),
    "values: integers": (TypeError, "values must be float32.* got int64", {"values": V.long()}),
    "values: device": (ValueError, "values must be on cpu like queries, got meta", {"values": V.to("meta")}),
    "scale": (TypeError, "scale must be a number.* got str", {"scale": "1"}),
    "key_bias": (ValueError, r"key_bias must be \[6\], got \[4\]", {"key_bias": torch.zeros(4)}),
    "ids": (ValueError, "got no key_ids", {"query_ids": torch.arange(4)}),
    "guide": (ValueError, "guide must have 4 queries and 6 keys, got 6 and 6", {"guide": (K, K, 0.5)}),
    "workspace": (ValueError, "workspace must be .* got -1", {"workspace": -1}),
    "implementation": (ValueError, "implementation must be one of cpu.* 'gpu'", {"implementation": "gpu"}),
}


@pytest.mark.parametrize(("error", "message", "changed"), REFUSED.values(), ids=REFUSED)
def test_refused_at_the_door(error, message, changed):
    with pytest.raises(error, match=f"^similarity_mix: .*{message}"):
        similarity_mix(**{"queries": Q, "keys": K, "values": V, **changed})
