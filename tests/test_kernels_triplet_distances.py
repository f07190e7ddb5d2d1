"""The Triton kernels of triplet_distances, in the interpreter, against float64 truth."""

import interpreter  # noqa: F401 (leaves this file out where there is none)
import pytest
import torch
from fastcontrast.kernels import triplet_distances as kernels
from similarity import generator

from fastcontrast.ops import trace, triplet_distances
from fastcontrast.testing import assert_as_good_as, relative_error

# Of numbers that a mask throws away.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 32)
    monkeypatch.setattr(kernels, "CHUNK", 64)


def samples(*shape: int, dtype=torch.float32) -> list[torch.Tensor]:
    target = torch.randn(shape, generator=generator(1))
    others = [target + size * torch.randn(shape, generator=generator(i)) for i, size in ((2, 0.1), (3, 0.12))]
    return [x.to(dtype) for x in (target, *others)]


def evaluate(inputs, needs=(True, True, True), implementation="triton") -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
    distances = triplet_distances(*leaves, implementation=implementation)
    upstream = [torch.randn(x.shape, generator=generator(4 + i)).to(x.dtype) for i, x in enumerate(distances)]
    wanted = [x for x in leaves if x.requires_grad]
    return [*(x.detach() for x in distances), *(torch.autograd.grad(distances, wanted, upstream) if wanted else ())]


def truth(inputs) -> list[torch.Tensor]:
    return evaluate([x.double() for x in inputs], implementation="reference")


@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 31), (2, 64), (3, 65), (2, 3, 5, 9), (2, 2000)], ids=str)
def test_ragged_shapes(shape):
    for x, y in zip(evaluate(samples(*shape)), truth(samples(*shape)), strict=True):
        assert relative_error(x, y) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    inputs = samples(3, 100, dtype=dtype)
    actual, naive = evaluate(inputs), evaluate(inputs, implementation="reference")
    assert {x.dtype for x in actual[2:]} == {dtype}
    for ours, exact, theirs in zip(actual, truth(inputs), naive, strict=True):
        assert_as_good_as(ours, exact, theirs)


@pytest.mark.parametrize("number", range(1, 8))
def test_gradients_that_are_wanted(number):
    needs = [bool(number >> i & 1) for i in range(3)]
    everything = evaluate(samples(2, 70))[2:]
    wanted = [x for x, need in zip(everything, needs, strict=True) if need]
    assert all(torch.equal(x, y) for x, y in zip(evaluate(samples(2, 70), needs)[2:], wanted, strict=True))


def test_samples_with_gaps_between_them():
    inputs = samples(3, 70)
    apart = [torch.cat([x, x], 1)[:, :70] for x in inputs]
    assert all(torch.equal(x, y) for x, y in zip(evaluate(apart), evaluate(inputs), strict=True))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)], ids=str)
def test_empty_sizes(shape):
    found = evaluate(samples(*shape))
    assert [x.shape for x in found] == [(shape[0],)] * 2 + [shape] * 3 and not any(x.any() for x in found)


def test_nan_stays_in_its_sample():
    inputs = samples(3, 100)
    clean = evaluate(inputs)
    inputs[1][1, 80] = float("nan")
    found = evaluate(inputs)
    assert all(torch.equal(x[[0, 2]], y[[0, 2]]) for x, y in zip(clean, found, strict=True))
    assert found[0][1].isnan() and found[1][1] == clean[1][1] and int(found[3].isnan().sum()) == 1


def test_trace_names_it_and_runs_are_bit_identical():
    with trace() as ran:
        results = [evaluate(samples(2, 300)) for _ in range(2)]
    assert [(choice.op, choice.implementation) for choice in ran] == [("triplet_distances", "triton")] * 2
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
