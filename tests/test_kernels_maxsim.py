"""The Triton kernels of maxsim, in the interpreter, against float64 truth."""

import interpreter  # noqa: F401 (leaves this file out where there is none)
import pytest
import torch
from fastcontrast.kernels import maxsim as kernels
from similarity import generator

from fastcontrast.ops import maxsim, set_workspace, trace
from fastcontrast.testing import assert_as_good_as, relative_error

# Of numbers that a mask throws away.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for name, size in {"BM": 16, "BN": 16, "BM_EXACT": 16, "BN_EXACT": 16, "GROUP": 2, "BC": 2, "BE": 2}.items():
        monkeypatch.setattr(kernels, name, size)


def tokens(b: int, tq: int, c: int, td: int, d: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    shapes = ((b, tq, d), (c, td, d))
    return tuple(torch.randn(shape, generator=generator(i)).to(dtype) for i, shape in enumerate(shapes))


def masks(b: int, tq: int, c: int, td: int) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([td, 0, td // 2] * c)[:c, None]
    query_mask = torch.rand(b, tq, generator=generator(5)) < 0.7
    return {"query_mask": query_mask, "document_mask": torch.arange(td) < lengths}


def evaluate(queries, documents, needs=(True, True), implementation="triton", **options) -> list[torch.Tensor]:
    inputs = [x.detach().clone().requires_grad_(need) for x, need in zip((queries, documents), needs, strict=True)]
    scores = maxsim(*inputs, implementation=implementation, **options)
    upstream = torch.randn(scores.shape, generator=generator(9), dtype=torch.float64).to(scores.dtype)
    return [scores.detach(), *torch.autograd.grad(scores, [x for x in inputs if x.requires_grad], upstream)]


def truth(queries, documents, **options) -> list[torch.Tensor]:
    return evaluate(queries.double(), documents.double(), implementation="reference", **options)


def check(queries, documents, **options) -> None:
    for x, y in zip(evaluate(queries, documents, **options), truth(queries, documents, **options), strict=True):
        assert relative_error(x, y) < 1e-5


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 16), (2, 3, 3, 17, 40), (3, 7, 2, 33, 65), (1, 20, 4, 5, 1)], ids=str)
@pytest.mark.parametrize("masked", ["neg_inf", "zero"])
def test_ragged_shapes(shape, masked):
    check(*tokens(*shape))
    check(*tokens(*shape), **masks(*shape[:4]), masked=masked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    problem, options = tokens(2, 5, 3, 20, 24, dtype), masks(2, 5, 3, 20)
    naive = evaluate(*problem, implementation="reference", **options)
    for ours, exact, theirs in zip(evaluate(*problem, **options), truth(*problem, **options), naive, strict=True):
        assert_as_good_as(ours, exact, theirs)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_frozen_sides(needs):
    both = evaluate(*tokens(2, 3, 3, 18, 8))
    assert torch.equal(evaluate(*tokens(2, 3, 3, 18, 8), needs)[1], both[1 if needs[0] else 2])


def test_documents_in_parts_that_the_workspace_can_sort():
    problem = tokens(2, 5, 5, 20, 8)
    whole = evaluate(*problem)
    set_workspace(2 * 10 * kernels.SORTED_BYTES)
    try:
        parts = evaluate(*problem)
    finally:
        set_workspace(None)
    assert all(torch.equal(x, y) for x, y in zip(whole, parts, strict=True))


def test_a_token_that_wins_every_query_token():
    queries, documents = torch.rand(4, 9, 8, generator=generator(1)), torch.zeros(2, 20, 8)
    documents[0, 7] = documents[0, 18] = documents[1, 19] = 1.0
    check(queries, documents)
    assert evaluate(queries, documents)[2].any(2).nonzero().tolist() == [[0, 7], [1, 19]]


def test_a_masked_token_that_wins_with_zero_has_no_gradient():
    queries, documents = torch.ones(1, 1, 2), -torch.ones(1, 20, 2)
    real = torch.arange(20)[None] != 17
    scores, dq, dd = evaluate(queries, documents, document_mask=real, masked="zero")
    assert scores.item() == 0 and not dq.any() and not dd.any()
    documents[0, 18] = 0.0
    assert not evaluate(queries, documents, document_mask=real, masked="zero")[2].any()
    documents[0, 3] = 0.0
    assert evaluate(queries, documents, document_mask=real, masked="zero")[2].any(2).nonzero().tolist() == [[0, 3]]


def test_nan_is_the_largest_and_the_first_one_wins():
    queries, documents = tokens(2, 3, 3, 40, 8)
    clean = evaluate(queries, documents)
    documents[1, [18, 19, 35], 2] = NAN
    scores, _, dd = evaluate(queries, documents)
    assert scores[:, 1].isnan().all() and torch.equal(scores[:, [0, 2]], clean[0][:, [0, 2]])
    assert dd[1].any(1).nonzero().tolist() == [[18]]
    queries[0, 1, 0] = NAN
    scores = evaluate(queries, documents)[0]
    assert scores[0].isnan().all() and scores[1].isnan().tolist() == [False, True, False]


def test_nothing_is_read_from_padding():
    queries, documents = tokens(2, 5, 3, 20, 8)
    options = masks(2, 5, 3, 20)
    clean = evaluate(queries, documents, **options)
    assert clean[0][0, 1] == -INF
    queries[~options["query_mask"]] = documents[~options["document_mask"]] = NAN
    assert all(torch.equal(x, y) for x, y in zip(clean, evaluate(queries, documents, **options), strict=True))


def test_strided_inputs():
    queries, documents = tokens(2, 5, 3, 20, 16)
    expected = evaluate(queries, documents)
    leaves = [torch.cat([x, x], 1)[:, : x.shape[1]].requires_grad_() for x in (queries, documents)]
    scores = maxsim(*leaves, implementation="triton")
    upstream = torch.randn(scores.shape, generator=generator(9), dtype=torch.float64).float()
    found = scores, *torch.autograd.grad(scores, leaves, upstream)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 5), (2, 0, 3, 4, 5), (2, 3, 0, 4, 5), (2, 3, 2, 0, 5), (2, 3, 2, 4, 0)])
def test_empty_sizes(shape):
    queries, documents = tokens(*shape)
    scores, dq, dd = evaluate(queries, documents)
    assert torch.equal(scores, torch.full((shape[0], shape[2]), -INF if shape[3] == 0 else 0.0))
    assert dq.shape == queries.shape and dd.shape == documents.shape and not dq.any() and not dd.any()


def test_trace_names_it_and_runs_are_bit_identical():
    problem = tokens(2, 5, 3, 40, 8)
    with trace() as ran:
        results = [evaluate(*problem) for _ in range(2)]
    assert [(choice.op, choice.implementation) for choice in ran] == [("maxsim", "triton")] * 2
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
