"""maxsim against golden values, its definition in loops, and dense float64 autograd: ragged sizes, padding, ties, ends.

Tiles are mostly shrunk to a few tokens, so that sequences of twenty cross every boundary of the real ones (2048 × 512).
"""

import sys
from unittest import mock

import pytest
import torch
from similarity import generator
from torch.nn import functional as F

from fastcontrast import ops
from fastcontrast.ops import maxsim
from fastcontrast.testing import assert_as_good_as, relative_error

MODULE = sys.modules["fastcontrast.ops.maxsim"]
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["cpu", "reference"])
MODES = pytest.mark.parametrize("masked", ["neg_inf", "zero"])
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def few_threads(one_thread):
    """Models so small; those that are about threads ask for them."""


def tiles(rows: int, columns: int):
    return mock.patch.multiple(MODULE, ROWS=rows, COLUMNS=columns)


def tokens(b: int, tq: int, c: int, td: int, d: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    shapes = ((b, tq, d), (c, td, d))
    return tuple(torch.randn(shape, generator=generator(i)).to(dtype) for i, shape in enumerate(shapes))


def masks(b: int, tq: int, c: int, td: int) -> dict[str, torch.Tensor]:
    """Holes; padding on the right for documents, one of which has nothing real; and a query that has nothing."""
    query_mask = torch.rand(b, tq, generator=generator(5)) < 0.7
    lengths = torch.tensor([td, 0, 1, max(td - 1, 0), td // 2] * c)[:c, None]
    document_mask = torch.arange(td) < lengths
    if b > 1:
        query_mask[1] = False
    return {"query_mask": query_mask, "document_mask": document_mask}


def evaluate(queries, documents, needs=(True, True), **options) -> list[torch.Tensor]:
    """Scores and the wanted gradients, of upstream gradients of both signs."""
    inputs = [x.detach().clone().requires_grad_(need) for x, need in zip((queries, documents), needs, strict=True)]
    scores = maxsim(*inputs, **options)
    upstream = torch.randn(scores.shape, generator=generator(9), dtype=torch.float64).to(scores.dtype)
    wanted = [x for x in inputs if x.requires_grad]
    return [scores.detach(), *(torch.autograd.grad(scores, wanted, upstream) if wanted else ())]


def check(queries, documents, limit: float = 1e-5, **options) -> None:
    actual = evaluate(queries, documents, **options)
    truth = evaluate(queries.double(), documents.double(), **options | {"implementation": "reference"})
    assert actual[0].dtype == torch.float32
    for x, y in zip(actual, truth, strict=True):
        assert relative_error(x, y) <= limit


# -------------------------------------------------------------------------------------------------------- the reference


def golden(n: int, shift: float) -> torch.Tensor:
    i, k = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(8, dtype=torch.float64)
    return F.normalize(torch.sin(1 + shift + 0.7 * i + 1.3 * k + 0.11 * i * k), dim=1)


@pytest.mark.parametrize(
    ("masked", "loss", "row"),
    [
        ("zero", 1.157565819705, (1.412014639538, 1.474700056410, 2.233758452192)),
        ("neg_inf", 1.646828637582, (-0.201818394904, 0.510026625940, 2.233758452192)),
    ],
)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-11), (torch.float32, 1e-6)], ids=str)
def test_golden_values(masked, loss, row, dtype, limit):
    queries = torch.stack([golden(5, shift) for shift in (0.0, 0.4, 0.8)]).to(dtype)
    documents = -torch.stack([golden(3, shift) for shift in (0.1, 0.5, 0.9)]).to(dtype)
    document_mask = torch.ones(3, 3, dtype=torch.bool)
    document_mask[0, 1:] = document_mask[1, 2] = False
    scores = maxsim(queries, documents, document_mask=document_mask, masked=masked)
    assert scores[0].tolist() == pytest.approx(row, rel=limit)
    assert float(F.cross_entropy(scores.double(), torch.arange(3))) == pytest.approx(loss, rel=limit)


@IMPLEMENTATIONS
@MODES
def test_equals_the_definition_in_loops(implementation, masked):
    queries, documents = tokens(3, 4, 5, 6, 3)
    real = masks(3, 4, 5, 6)
    expected = torch.zeros(3, 5)
    for b in range(3):
        for c in range(5):
            for i in range(4):
                best = -INF
                for j in range(6):
                    if real["document_mask"][c, j]:
                        best = max(best, float(queries[b, i] @ documents[c, j]))
                    elif masked == "zero":
                        best = max(best, 0.0)
                if real["query_mask"][b, i]:
                    expected[b, c] += best
    found = maxsim(queries, documents, **real, masked=masked, implementation=implementation)
    assert torch.equal(found.isneginf(), expected.isneginf())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@IMPLEMENTATIONS
def test_one_token_on_each_side_is_the_dot_product(implementation):
    queries, documents = tokens(7, 1, 5, 1, 16)
    found = maxsim(queries, documents, implementation=implementation)
    assert relative_error(found, queries[:, 0].double() @ documents[:, 0].double().T) < 1e-6


@MODES
def test_reference_has_two_derivatives(masked):
    real = masks(2, 3, 3, 4)

    def function(*inputs):
        scores = maxsim(*inputs, **real, masked=masked, implementation="reference")
        return scores.masked_fill(scores.isneginf(), 0.0).square()

    inputs = [x.double().requires_grad_() for x in tokens(2, 3, 3, 4, 2)]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


# ------------------------------------------------------------------------------------------- values and every gradient

SHAPES = [(1, 1, 1, 1, 1), (2, 3, 4, 15, 8), (3, 5, 2, 16, 7), (2, 4, 5, 17, 33), (5, 7, 3, 40, 64), (1, 40, 1, 70, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("columns", [3, 512])
@MODES
def test_ragged_shapes(shape, columns, masked):
    with tiles(40 if columns == 3 else 2048, columns):
        check(*tokens(*shape))
        check(*tokens(*shape), **masks(*shape[:4]), masked=masked)


@pytest.mark.parametrize("which", ["query_mask", "document_mask"])
@MODES
def test_one_mask_alone(which, masked):
    shape = (3, 5, 4, 19)
    check(*tokens(*shape, 8), **{which: masks(*shape)[which]}, masked=masked)


@pytest.mark.parametrize("width", [2, 100, 1024])
def test_widths(width):
    check(*tokens(2, 3, 4, 18, width))


def test_more_tokens_than_two_bytes_count():
    """Winners are int32 from here on. Two tokens that cannot be told apart by their first 15 bits."""
    queries, documents = torch.ones(1, 1, 2), torch.zeros(2, 33_000, 2)
    documents[0, 32_800], documents[0, 32], documents[1, 32_767] = 2.0, 1.0, 3.0
    scores, _, dd = evaluate(queries, documents)
    assert scores.tolist() == [[4.0, 6.0]]
    assert dd[0].any(1).nonzero().tolist() == [[32_800]] and dd[1].any(1).nonzero().tolist() == [[32_767]]
    check(queries, documents)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@MODES
def test_half_precision_is_as_good_as_dense_fp32_scores(dtype, masked):
    queries, documents = tokens(3, 9, 5, 33, 64, dtype)
    options = {**masks(3, 9, 5, 33), "masked": masked}
    actual = evaluate(queries, documents, **options)
    naive = evaluate(queries, documents, **options, implementation="reference")
    truth = evaluate(queries.double(), documents.double(), **options, implementation="reference")
    assert actual[0].dtype == torch.float32 and actual[1].dtype == actual[2].dtype == dtype
    for ours, exact, theirs in zip(actual, truth, naive, strict=True):
        assert_as_good_as(ours, exact, theirs)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_frozen_sides(needs):
    queries, documents = tokens(3, 4, 5, 20, 8)
    both = evaluate(queries, documents)
    alone = evaluate(queries, documents, needs)
    assert torch.equal(alone[1], both[1 if needs[0] else 2])


def test_a_set_against_itself_has_both_gradients():
    _, x = tokens(1, 1, 4, 18, 8)
    doubles = x.double().requires_grad_()
    x.requires_grad_()
    (found,), (truth,) = (torch.autograd.grad(maxsim(y, y).square().sum(), y) for y in (x, doubles))
    assert relative_error(found, truth) < 1e-5


# ----------------------------------------------------------------------------------------------------------------- ties


@IMPLEMENTATIONS
def test_the_first_of_equals_has_the_gradient(implementation):
    queries, documents = torch.ones(1, 1, 2), torch.zeros(1, 40, 2)
    documents[0, [3, 19, 20, 35]] = 1.0
    _, _, dd = evaluate(queries, documents, implementation=implementation)
    assert dd[0].any(1).nonzero().tolist() == [[3]]
    real = torch.ones(1, 40, dtype=torch.bool)
    real[0, 3] = False
    _, _, dd = evaluate(queries, documents, document_mask=real, implementation=implementation)
    assert dd[0].any(1).nonzero().tolist() == [[19]]


@IMPLEMENTATIONS
@pytest.mark.parametrize("length", [4, 20])
def test_a_masked_token_that_wins_with_zero_has_no_gradient(implementation, length):
    queries, documents = torch.ones(1, 1, 2), -torch.ones(1, length, 2)
    real = torch.arange(length)[None] != 2

    def run(**options):
        return evaluate(queries, documents, document_mask=real, implementation=implementation, **options)

    scores, dq, dd = run(masked="zero")
    assert scores.item() == 0 and not dq.any() and not dd.any()
    documents[0, 3] = 0.0  # a real 0 behind the masked one loses, one before it wins
    assert not run(masked="zero")[2].any()
    documents[0, 1] = 0.0
    assert run(masked="zero")[2][0].any(1).nonzero().tolist() == [[1]]
    assert run(masked="neg_inf")[2][0].any(1).nonzero().tolist() == [[1]]


# --------------------------------------------------------------------------------------------------- ends of the range


@IMPLEMENTATIONS
def test_without_a_real_token(implementation):
    queries, documents = tokens(2, 3, 2, 18, 4)
    options = {"implementation": implementation}
    query_mask = torch.tensor([[True, False, True], [False] * 3])
    document_mask = torch.stack([torch.zeros(18, dtype=torch.bool), torch.arange(18) < 5])
    scores, dq, dd = evaluate(queries, documents, query_mask=query_mask, document_mask=document_mask, **options)
    assert scores[0, 0] == -INF and scores[0, 1].isfinite() and scores[1].tolist() == [0.0, 0.0]
    assert dq[0, [0, 2]].all() and not dq[1].any() and not dq[0, 1].any()
    assert not dd[0].any() and dd[1].isfinite().all() and not dd[1, 5:].any()
    zero = evaluate(queries, documents, document_mask=document_mask, masked="zero", **options)
    assert zero[0][:, 0].tolist() == [0.0, 0.0] and not zero[2][0].any()


@IMPLEMENTATIONS
@MODES
@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 5), (2, 0, 3, 4, 5), (2, 3, 0, 4, 5), (2, 3, 4, 5, 0)], ids=str)
def test_empty_sizes(implementation, masked, shape):
    queries, documents = tokens(*shape)
    for options in ({}, masks(*shape[:4])):
        if shape[4] == 0:
            options = {}
        scores, dq, dd = evaluate(queries, documents, implementation=implementation, masked=masked, **options)
        assert scores.shape == (shape[0], shape[2]) and not scores.any()
        assert dq.shape == queries.shape and dd.shape == documents.shape and not dq.any() and not dd.any()


@IMPLEMENTATIONS
@MODES
def test_documents_of_no_length(implementation, masked):
    queries, documents = tokens(2, 3, 4, 0, 5)
    scores, dq, dd = evaluate(
        queries, documents, query_mask=torch.tensor([[True] * 3, [False] * 3]), masked=masked,
        implementation=implementation,
    )  # fmt: skip
    assert (scores[0] == -INF).all() and not scores[1].any() and not dq.any() and dd.shape == (4, 0, 5)


@IMPLEMENTATIONS
def test_a_score_that_overflows_has_no_gradient(implementation):
    queries, documents = torch.full((1, 2, 2), 1e30), torch.full((2, 20, 2), -1e30)
    documents[1, 3] = 1.0
    scores, dq, dd = evaluate(queries, documents, implementation=implementation)
    assert scores[0, 0] == -INF and scores[0, 1] == pytest.approx(4e30)
    assert not dd[0].any() and dd[1].any(1).nonzero().tolist() == [[3]] and dq.isfinite().all()


@IMPLEMENTATIONS
@pytest.mark.parametrize("length", [6, 40])
def test_nan_stays_in_its_pairs(implementation, length):
    queries, documents = tokens(3, 4, 5, length, 8)
    clean = maxsim(queries, documents, implementation=implementation)
    documents[2, [3, 5], 1] = NAN
    queries[1, 2, 0] = NAN
    scores, _, dd = evaluate(queries, documents, implementation=implementation)
    untouched = torch.ones(3, 5, dtype=torch.bool)
    untouched[1] = untouched[:, 2] = False
    assert scores[~untouched].isnan().all() and torch.equal(scores[untouched], clean[untouched])
    if implementation == "reference":
        return  # whose scores without a gradient carry NaN all the same: 0 · NaN
    assert dd[2, 3].any() and not dd[2, [1, 2, 4, 5]].any()  # the first NaN; of a NaN query, the first token
    assert dd[:, 0].isnan().any(1).all() and dd[:, 1:].isfinite().all()
    finite = evaluate(queries[[0, 2]], documents[[0, 1, 3, 4]], implementation=implementation)
    assert all(x.isfinite().all() for x in finite)


@IMPLEMENTATIONS
@MODES
def test_nothing_is_read_from_padding(implementation, masked):
    shape = (3, 5, 5, 20)
    queries, documents = tokens(*shape, 8)
    options = {**masks(*shape), "masked": masked, "implementation": implementation}
    clean = evaluate(queries, documents, **options)
    for value in (NAN, INF, 1e30):
        queries[~options["query_mask"]] = value
        documents[~options["document_mask"]] = value
        found = evaluate(queries, documents, **options)
        assert all(torch.equal(x, y) for x, y in zip(clean, found, strict=True))
        assert not found[1][~options["query_mask"]].any() and not found[2][~options["document_mask"]].any()


def test_any_strides():
    queries, documents = tokens(3, 5, 4, 20, 16)
    expected = evaluate(queries, documents)

    def views(x):
        yield x.transpose(0, 1).contiguous().transpose(0, 1)
        yield x.mT.contiguous().mT
        yield torch.cat([x, x], 2)[..., :16]
        yield torch.cat([x, x], 1)[:, : x.shape[1]]

    for q, d in zip(views(queries), views(documents), strict=True):
        leaves = [x.detach().requires_grad_() for x in (q, d)]
        scores = maxsim(*leaves)
        upstream = torch.randn(scores.shape, generator=generator(9), dtype=torch.float64).float()
        for x, y in zip((scores, *torch.autograd.grad(scores, leaves, upstream)), expected, strict=True):
            assert relative_error(x, y) < 1e-6
    real = masks(3, 5, 4, 20)
    strided = {name: mask.T.contiguous().T for name, mask in real.items()}
    assert torch.equal(maxsim(queries, documents, **real), maxsim(queries, documents, **strided))
    assert torch.equal(maxsim(queries[:1].expand(3, 5, 16), documents)[2], maxsim(queries, documents)[0])


# ------------------------------------------------------------------------------------------------ what runs, what stays


def test_runs_and_threads_give_the_same_bits():
    shape = (7, 33, 9, 90)
    options, results = masks(*shape), []
    for threads in (1, 2, 3, 3):
        with mock.patch.object(torch, "get_num_threads", lambda threads=threads: threads), tiles(300, 100):
            results.append(evaluate(*tokens(*shape, 24), **options))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_of_the_scores_nothing_is_kept():
    """Inputs and two bytes for each token of a query and document; without a gradient to come, nothing."""
    queries, documents = (x.requires_grad_() for x in tokens(4, 6, 5, 30, 8))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        maxsim(queries, documents)
    assert sorted(x.nbytes for x in kept) == sorted([queries.nbytes, documents.nbytes, 2 * 4 * 6 * 5])
    queries, documents = queries.detach(), documents.detach()
    assert MODULE._forward(queries, documents, None, None, False, False, "cpu")[1].numel() == 0


def test_the_second_gradient_is_refused():
    queries, documents = (x.requires_grad_() for x in tokens(2, 3, 4, 5, 6))
    with pytest.raises(NotImplementedError, match=r"maxsim: no gradient of its gradient .*='reference' has one"):
        torch.autograd.grad(maxsim(queries, documents).sum(), queries, create_graph=True)
    scores, _ = torch.ops.fastcontrast.maxsim(queries, documents, None, None, False, True, "cpu")  # as compiled
    (first,) = torch.autograd.grad(scores.square().sum(), queries, create_graph=True)
    with pytest.raises(NotImplementedError, match="maxsim: a gradient of its gradient is not implemented"):
        first.sum().backward()


def test_trace_names_what_ran():
    with ops.trace() as ran:
        maxsim(*tokens(1, 2, 2, 3, 4))
        maxsim(*tokens(1, 2, 2, 3, 4, torch.float64))
    assert [choice.implementation for choice in ran] == ["cpu", "reference"]
    assert "float64" in ran[1].refused["cpu"]


def test_autocast_does_not_round_scores():
    queries, documents = tokens(2, 3, 4, 20, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = maxsim(queries, documents), maxsim(queries, documents, implementation="reference")
    outside = maxsim(queries, documents), maxsim(queries, documents, implementation="reference")
    assert all(torch.equal(x, y) for x, y in zip(inside, outside, strict=True))


@pytest.mark.parametrize("need", [True, False])
def test_registration_opcheck(need):
    inputs = [x.requires_grad_(need) for x in tokens(2, 3, 4, 18, 8)]
    real = masks(2, 3, 4, 18).values()
    torch.library.opcheck(torch.ops.fastcontrast.maxsim, (*inputs, *real, False, need, "cpu"))
    _, winners = torch.ops.fastcontrast.maxsim(*inputs, *real, False, True, "cpu")
    detached = [x.detach() for x in inputs]
    for needs in ([True, True], [False, True]):
        arguments = (*detached, winners, torch.rand(2, 4), needs, "cpu")
        torch.library.opcheck(torch.ops.fastcontrast.maxsim_backward, arguments)


def test_compiled_into_one_graph():
    queries, documents = tokens(2, 3, 4, 18, 8)
    options = masks(2, 3, 4, 18)
    compiled = torch.compile(lambda q, d: maxsim(q, d, **options), fullgraph=True, backend="aot_eager")
    for run in (compiled, lambda q, d: maxsim(q, d, **options)):
        leaves = [x.clone().requires_grad_() for x in (queries, documents)]
        scores = run(*leaves)
        results = [scores.detach(), *torch.autograd.grad(scores, leaves, torch.ones_like(scores))]
        if run is compiled:
            expected = results
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))
    assert torch.equal(compiled(queries, documents), expected[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": torch.zeros(2, 8)}, ValueError, r"queries must be \[B, Tq, D\], got \[2, 8\]"),
        ({"queries": torch.zeros(2, 3, 8).long()}, TypeError, "queries must be float32, .* got int64"),
        ({"documents": [1]}, TypeError, "documents must be a tensor, got list"),
        ({"documents": torch.zeros(4, 5, 7)}, ValueError, r"documents must be \[C, Td, 8\] to match .* \[4, 5, 7\]"),
        ({"documents": torch.zeros(4, 5, 8).half()}, TypeError, "documents must be float32 like queries, got float16"),
        ({"query_mask": torch.ones(2, 3)}, TypeError, "query_mask must be a bool tensor, got float32"),
        ({"query_mask": True}, TypeError, "query_mask must be a bool tensor, got bool"),
        ({"document_mask": torch.ones(2, 5) > 0}, ValueError, r"document_mask must be \[4, 5\] like documents, .*2, 5"),
        ({"masked": "one"}, ValueError, "masked must be one of 'neg_inf', 'zero', got 'one'"),
        ({"implementation": "fast"}, ValueError, "implementation must be one of cpu, triton, reference or None"),
        ({"implementation": "triton"}, NotImplementedError, "implementation 'triton' cannot run: it runs on cuda"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=f"maxsim: {message}"):
        maxsim(**{"queries": torch.zeros(2, 3, 8), "documents": torch.zeros(4, 5, 8), **change})
