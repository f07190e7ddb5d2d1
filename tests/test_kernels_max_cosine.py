"""The Triton kernels of max_cosine, in the interpreter, against float64 truth."""

import interpreter  # noqa: F401 (leaves this file out where there is none)
import pytest
import torch
import triton
import triton.language as tl
from fastcontrast.kernels import max_cosine as kernels
from fastcontrast.kernels.max_cosine import pack
from similarity import generator

from fastcontrast.ops import max_cosine, trace
from fastcontrast.testing import relative_error

# Of numbers that a mask throws away.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def few_tiles_at_a_time(monkeypatch):
    monkeypatch.setattr(kernels, "BS", 2)


def problem(b: int, k: int, t: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(b, n, d, generator=generator(n)).to(dtype) for n in (k, t))


def run(*arguments):
    return max_cosine(*arguments, implementation="triton")


def truth(candidates, context, valid=None):
    return max_cosine(candidates.double(), context.double(), valid, implementation="reference")


def assert_right(candidates, context, valid=None, limit: float = 1e-6) -> None:
    """Values, and indices where no two cosines are near enough for rounding to decide."""
    (values, indices), (expected, first) = run(candidates, context, valid), truth(candidates, context, valid)
    assert values.dtype == torch.float32 and indices.dtype == torch.int64
    assert relative_error(values, expected) < limit
    assert torch.equal(indices, first)


@pytest.mark.parametrize("t", [1, 7, 65, 130])
@pytest.mark.parametrize("k", [1, 5, 9])
@pytest.mark.parametrize("d", [40, 65])
@pytest.mark.parametrize("with_valid", [False, True])
def test_values_and_indices(t, k, d, with_valid):
    valid = torch.rand(3, t, generator=generator(1)) < 0.7 if with_valid else None
    assert_right(*problem(3, k, t, d), valid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("programs", [1, 10**6])
def test_large_and_small_tiles_in_every_dtype(dtype, programs, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    assert_right(*problem(2, 6, 150, 48, dtype))


def test_more_candidates_than_a_tile_holds():
    assert_right(*problem(2, 37, 70, 24))


def test_width_one():
    """Every cosine is 1 or −1, and which of them rounds up is no matter."""
    candidates, context = problem(2, 5, 65, 1)
    values, indices = run(candidates, context)
    assert relative_error(values, truth(candidates, context)[0]) < 1e-6
    met = context.sign().expand(2, 65, 5).mT.gather(2, indices[..., None])[..., 0]
    assert torch.equal(met * candidates[..., 0].sign(), values.round())


@pytest.mark.parametrize("size", [1e-10, 1e15])
def test_lengths_do_not_matter(size):
    candidates, context = problem(2, 5, 40, 16)
    assert_right(candidates * size, context)
    assert_right(candidates, context * size)
    assert_right(candidates / size, context * size)


def test_any_strides():
    """A slice of a longer ring buffer, and batches within positions."""
    candidates, ring = problem(2, 5, 200, 40)
    wide = torch.randn(2, 5, 100, generator=generator(5))
    for context in (ring[:, 31:101], ring[:, ::2], ring.transpose(0, 1).contiguous().transpose(0, 1)):
        assert_right(candidates, context)
        assert_right(wide[:, :, 7:47], context)
    assert_right(candidates[:1].expand(2, 5, 40), ring[:1].expand(2, 200, 40))


def test_the_first_of_equals():
    """Directions along the axes, whose cosines are exact, each at several positions and equal in pairs."""
    d, t = 8, 130
    axes = torch.eye(d)[torch.randint(0, d, (2, t), generator=generator(2))]
    axes = axes * 2.0 ** torch.randint(-3, 4, (2, t, 1), generator=generator(3))
    weights = torch.tensor([0.5, 0.25, 0.5, 0.125, 0.0, -0.5, 0.25, -0.0])
    candidates = torch.stack([weights, -weights, weights * 0, weights.flip(0)]).expand(2, 4, d)
    assert_right(candidates, axes)
    assert_right(candidates, axes, torch.arange(t).expand(2, t) % 5 > 2)


def test_zero_vectors_have_cosine_zero():
    candidates, context = problem(1, 3, 40, 8)
    candidates[0, 1] = 0.0
    context[0, 10:] = 0.0
    assert_right(candidates, context)
    assert run(-context[:, :1], context[:, :1].repeat(1, 2, 1) * torch.tensor([[[1.0], [0.0]]]))[1].item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_is_the_largest_and_the_first_one_wins(dtype):
    candidates, context = problem(3, 4, 100, 20, dtype)
    context[0, 90, 3] = context[0, 41, 7] = context[1, 2, 0] = NAN
    context[2, 60, 0] = INF
    candidates[1, 2, 5] = NAN
    valid = torch.ones(3, 100, dtype=torch.bool)
    valid[1, :3] = False
    assert_right(candidates, context, valid)
    values, indices = run(candidates, context, valid)
    assert indices[0].tolist() == [41] * 4 and values[0].isnan().all()
    assert values[1].isnan().tolist() == [False, False, True, False] and indices[1, 2] == 3


def test_what_is_not_valid_counts_for_nothing():
    candidates, context = problem(3, 5, 70, 16)
    valid = torch.ones(3, 70, dtype=torch.bool)
    valid[0, 20:] = valid[1] = valid[2, :69] = False
    context[~valid] = NAN
    values, indices = run(candidates, context, valid)
    assert (values[1] == -INF).all() and (indices[1] == -1).all()
    assert (indices[0] < 20).all() and (indices[2] == 69).all()
    assert_right(candidates, context.nan_to_num(0.0), valid)
    alone = run(candidates[:1], context[:1, :20])
    assert torch.equal(alone[0], values[:1]) and torch.equal(alone[1], indices[:1])


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
def test_empty_sizes(shape):
    assert_right(*problem(*shape))


@triton.jit
def pack_kernel(values, keys, index, n, BN: tl.constexpr):
    o = tl.arange(0, BN)
    tl.store(keys + o, pack(tl.load(values + o, mask=o < n), tl.full((BN,), 0, tl.int64) + index), mask=o < n)


def test_keys_order_like_values_then_indices():
    values = torch.tensor([NAN, -NAN, INF, 2.0, 1e-40, 0.0, -0.0, -1e-40, -2.0, -INF])
    keys = torch.empty(4, 10, dtype=torch.int64)
    for row, index in zip(keys, (0, 1, 2**31, 2**32 - 1), strict=True):
        pack_kernel[(1,)](values, row, index, 10, BN=16)
    expected = [0, 0, 1, 2, 3, 4, 4, 5, 6, 7]  # rank of the value
    order = [(rank, i) for rank in expected for i in range(4)]
    ranked = sorted(range(40), key=lambda n: -keys.T.flatten()[n].item())
    assert [order[n] for n in ranked] == sorted(order)


def test_trace_names_it_and_runs_are_bit_identical():
    candidates, context = problem(2, 5, 130, 40)
    with trace() as ran:
        results = [run(candidates, context) for _ in range(2)]
    assert [(choice.op, choice.implementation) for choice in ran] == [("max_cosine", "triton")] * 2
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
