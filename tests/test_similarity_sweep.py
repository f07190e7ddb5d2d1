"""How the similarity sweep goes about it: strides, symmetry, what it multiplies and keeps, threads, compilers."""

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
from similarity import (
    DIMS,
    LEAVES,
    assert_accurate,
    assert_same,
    biased,
    embeddings,
    evaluate,
    one_sign,
    tiles,
    unit,
)

from fastcontrast import nt_xent_loss
from fastcontrast.ops import set_workspace, similarity_lse
from fastcontrast.testing import relative_error

module = importlib.import_module("fastcontrast.ops.similarity_lse")

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
        *arguments, _ = arguments  # which passes run
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


def test_compiled_views_keep_the_symmetry():
    """A compiler cannot look at the values of own keys; NT-Xent without ids is symmetric without looking."""
    torch._dynamo.reset()
    views = [unit(83, 8, seed).requires_grad_() for seed in (1, 2)]

    def spent(loss) -> int:
        with tiles(16, 32), counted_products() as found:
            torch.autograd.grad(loss(*views, workspace=0), views)
        return sum(found)

    compiled = torch.compile(nt_xent_loss, fullgraph=True, backend="aot_eager")
    assert spent(compiled) < 3 * (2 * 83) ** 2 * 8
