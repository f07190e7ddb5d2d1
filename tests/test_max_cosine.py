"""Largest cosines: the reference against the definition, the CPU path against the reference in float64."""

import pytest
import torch
from golden_decoding import F

from fastcontrast import ops
from fastcontrast.ops import max_cosine

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)


def batch(b, k, t, d, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    candidates, context = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((b, k, d), (b, t, d)))
    return candidates, context, torch.rand(b, t, generator=generator) < 0.7


def exact(candidates, context, valid=None):
    return max_cosine(candidates.double(), context.double(), valid, implementation="reference")


def check(got, candidates, context, valid=None, tolerance=1e-6):
    values, indices = exact(candidates, context, valid)
    assert got[0].dtype == torch.float32 and got[1].dtype == torch.int64
    torch.testing.assert_close(got[0].double(), values, rtol=0, atol=tolerance)
    # An index may differ where two cosines differ by less than float32 rounds.
    found = got[1] >= 0
    assert torch.equal(found, indices >= 0)
    rows = torch.arange(len(context))[:, None].expand_as(found)[found]
    reached = torch.cosine_similarity(candidates.double()[found], context.double()[rows, got[1][found]], dim=1)
    torch.testing.assert_close(reached, values[found], rtol=0, atol=tolerance)
    if valid is not None:
        assert valid[rows, got[1][found]].all()


def test_golden_values():
    valid = torch.ones(1, 6, dtype=torch.bool)
    valid[0, 0] = False
    values = torch.tensor([[0.892655179093, 0.837044312075, 0.878611331840, 0.820756752557]], dtype=torch.float64)
    got = max_cosine(F(4, 8, 0.6)[None], F(6, 8, 0)[None], valid)
    torch.testing.assert_close(got[0], values, rtol=0, atol=1e-12)
    assert got[1].tolist() == [[1, 1, 3, 4]]
    got = max_cosine(F(4, 8, 0.6)[None].float(), F(6, 8, 0)[None].float(), valid, implementation="cpu")
    torch.testing.assert_close(got[0].double(), values, rtol=0, atol=1e-6)
    assert got[1].tolist() == [[1, 1, 3, 4]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 15, 16, 40, 100, 768, 1039, 2064])  # longer than a slice of the core, too
@pytest.mark.parametrize(("b", "k", "t"), [(1, 1, 1), (1, 5, 130), (2, 8, 7), (3, 4, 33), (2, 17, 9), (5, 3, 2)])
def test_it_equals_the_reference(b, k, t, d, dtype):
    candidates, context, valid = batch(b, k, t, d, dtype)
    check(max_cosine(candidates, context, implementation="cpu"), candidates, context)
    check(max_cosine(candidates, context, valid, implementation="cpu"), candidates, context, valid)


def test_a_long_context_is_shared_among_threads():
    candidates, context, valid = batch(1, 5, 5000, 96)
    check(max_cosine(candidates, context, valid), candidates, context, valid)
    first = max_cosine(candidates, context, valid)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, max_cosine(candidates, context, valid), strict=True))


def test_a_slice_of_a_longer_store_is_read_in_place(monkeypatch):
    store = torch.randn(3, 50, 40)
    candidates = torch.randn(4, 3, 40).transpose(0, 1)
    context = store[:, 5:42]
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: pytest.fail("copied"))
    check(max_cosine(candidates, context, implementation="cpu"), candidates, context)
    monkeypatch.undo()
    odd = candidates[..., ::2], context[..., ::2]
    check(max_cosine(*odd, implementation="cpu"), *odd)


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_ties_lengths_and_zeros(implementation):
    context = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 0.0]]])
    candidates = torch.tensor([[[2.0, 0.0], [0.0, -1.0], [0.0, 0.0]]])
    values, indices = max_cosine(candidates, context, implementation=implementation)
    assert values.tolist() == [[1.0, 0.0, 0.0]] and indices.tolist() == [[0, 0, 0]]
    valid = torch.tensor([[False, True, True, False]])
    values, indices = max_cosine(candidates, context, valid, implementation=implementation)
    assert values.tolist() == [[1.0, 0.0, 0.0]] and indices.tolist() == [[2, 2, 1]]


def test_a_positive_factor_changes_nothing():
    candidates, context, _ = batch(2, 5, 60, 33)
    factor = 2.0 ** torch.randint(-20, 20, (2, 60, 1))
    first, second = max_cosine(candidates, context), max_cosine(candidates, context * factor)
    torch.testing.assert_close(first[0], second[0])
    order = torch.randperm(60)
    torch.testing.assert_close(max_cosine(candidates, context[:, order])[0], first[0])


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_nothing_to_look_at(implementation):
    candidates, context, _ = batch(2, 3, 4, 8)
    valid = torch.tensor([[False] * 4, [True] * 4])
    values, indices = max_cosine(candidates, context, valid, implementation=implementation)
    assert values[0].tolist() == [-torch.inf] * 3 and indices[0].tolist() == [-1] * 3 and indices[1].min() >= 0
    values, indices = max_cosine(candidates, context[:, :0], implementation=implementation)
    assert (values == -torch.inf).all() and (indices == -1).all()
    assert max_cosine(candidates[:0], context[:0], implementation=implementation)[0].shape == (0, 3)
    assert max_cosine(candidates[:, :0], context, implementation=implementation)[0].shape == (2, 0)


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_where_it_is(implementation, dtype):
    candidates, context, _ = batch(2, 3, 20, 16, dtype)
    clean = max_cosine(candidates, context, implementation=implementation)
    context[0, 7, 3] = torch.nan
    candidates[1, 2, 0] = torch.nan
    values, indices = max_cosine(candidates, context, implementation=implementation)
    assert values[0].isnan().all() and indices[0].tolist() == [7] * 3
    assert values[1, 2].isnan() and torch.equal(values[1, :2], clean[0][1, :2])
    hidden = torch.ones(2, 20, dtype=torch.bool)
    hidden[0, 7] = False
    assert not max_cosine(candidates, context, hidden, implementation=implementation)[0][0].isnan().any()


def test_the_reference_alone_has_gradients():
    candidates, context, _ = batch(1, 2, 6, 8)
    context.requires_grad_()
    with ops.trace() as ran:
        values, _ = max_cosine(candidates, context)
    assert ran[0].implementation == "reference" and "no backward" in ran[0].refused["cpu"]
    values.sum().backward()
    assert context.grad.abs().sum() > 0
    with pytest.raises(NotImplementedError, match="implementation 'cpu' cannot run: it has no backward"):
        max_cosine(candidates, context, implementation="cpu")
    with torch.no_grad(), ops.trace() as ran:
        max_cosine(candidates, context)
    assert ran[0].implementation == "cpu"


def test_registration_and_compilation():
    candidates, context, valid = batch(2, 3, 20, 16)
    torch.library.opcheck(torch.ops.fastcontrast.max_cosine, (candidates, context, valid, "cpu"))
    compiled = torch.compile(lambda *x: max_cosine(*x), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(candidates, context, valid), max_cosine(candidates, context, valid), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"candidates": torch.zeros(2, 8)}, ValueError, r"candidates must be \[B, K, D\], got \[2, 8\]"),
        ({"candidates": torch.zeros(2, 3, 8).long()}, TypeError, "candidates must be float32, .* got int64"),
        ({"context": [1]}, TypeError, "context must be a tensor, got list"),
        ({"context": torch.zeros(2, 4, 7)}, ValueError, r"context must be \[2, T, 8\] to match .* \[2, 4, 7\]"),
        ({"context": torch.zeros(1, 4, 8)}, ValueError, r"context must be \[2, T, 8\]"),
        ({"context": torch.zeros(2, 4, 8).half()}, ValueError, "context must be float32 on cpu .* got float16"),
        ({"valid": torch.ones(2, 4)}, TypeError, "valid must be a bool tensor, got float32"),
        ({"valid": torch.ones(2, 5) > 0}, ValueError, r"valid must be \[2, 4\] like context, got \[2, 5\]"),
        ({"implementation": "fast"}, ValueError, "implementation must be one of cuda, triton, cpu, reference or None"),
        ({"implementation": "cuda"}, NotImplementedError, "'cuda' cannot run: it runs on cuda tensors"),
    ],
)
def test_errors(change, error, message):
    problem = {"candidates": torch.zeros(2, 3, 8), "context": torch.zeros(2, 4, 8), "valid": None, **change}
    with pytest.raises(error, match=f"max_cosine: (implementation )?{message}"):
        max_cosine(**problem)
