"""triplet_distances against golden values and dense float64 autograd: ragged sizes, strides, precision, ends."""

import sys
from unittest import mock

import pytest
import torch
from similarity import generator

from fastcontrast import ops
from fastcontrast.ops import triplet_distances
from fastcontrast.testing import assert_as_good_as, relative_error

MODULE = sys.modules["fastcontrast.ops.triplet_distances"]
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["cpu", "reference"])
NAMES = ("target", "positive", "negative")
ALL = (True, True, True)


@pytest.fixture(autouse=True)
def few_threads(one_thread):
    """Samples so small; those that are about threads ask for them."""


def samples(*shape: int, dtype=torch.float32) -> list[torch.Tensor]:
    """Near to each other, as predictions of one noise are."""
    target = torch.randn(shape, generator=generator(1))
    others = [target + size * torch.randn(shape, generator=generator(i)) for i, size in ((2, 0.1), (3, 0.12))]
    return [x.to(dtype) for x in (target, *others)]


def evaluate(inputs, needs=ALL, **options) -> list[torch.Tensor]:
    """Both distances and the wanted gradients, of upstream gradients of both signs."""
    leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
    distances = triplet_distances(*leaves, **options)
    upstream = [torch.randn(x.shape, generator=generator(4 + i)).to(x.dtype) for i, x in enumerate(distances)]
    wanted = [x for x in leaves if x.requires_grad]
    gradients = torch.autograd.grad(distances, wanted, upstream) if wanted else ()
    return [*(x.detach() for x in distances), *gradients]


def truth(inputs, needs=ALL) -> list[torch.Tensor]:
    return evaluate([x.double() for x in inputs], needs, implementation="reference")


def check(inputs, limit: float = 1e-6) -> None:
    actual = evaluate(inputs)
    assert actual[0].dtype == actual[1].dtype == torch.float32
    for x, y in zip(actual, truth(inputs), strict=True):
        assert relative_error(x, y) <= limit


# -------------------------------------------------------------------------------------------------------- the reference


def waves(shift: float) -> torch.Tensor:
    i, k = torch.arange(4, dtype=torch.float64)[:, None], torch.arange(16, dtype=torch.float64)
    return torch.sin(1 + shift + 0.7 * i + 1.3 * k + 0.11 * i * k).view(4, 4, 2, 2)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-6)], ids=str)
def test_golden_values(dtype, limit):
    y = waves(0.0)
    near, far = triplet_distances(*(x.to(dtype) for x in (y, y + 0.3 * waves(0.5), y + 0.3 * waves(2.0))))
    assert near.tolist() == pytest.approx([0.047367556391, 0.046403112934, 0.043062486242, 0.042775128728], rel=limit)
    assert far.tolist() == pytest.approx([0.042469753329, 0.043523154331, 0.047010455852, 0.047277471132], rel=limit)


@IMPLEMENTATIONS
def test_equals_the_mean_squared_error_of_each_sample(implementation):
    target, positive, negative = samples(3, 4, 5)
    found = triplet_distances(target, positive, negative, implementation=implementation)
    for distances, other in zip(found, (positive, negative), strict=True):
        expected = [torch.nn.functional.mse_loss(x, y).item() for x, y in zip(other, target, strict=True)]
        assert distances.tolist() == pytest.approx(expected, rel=1e-6)


def test_reference_has_two_derivatives():
    inputs = [x.double().requires_grad_() for x in samples(2, 3)]

    def function(*inputs):
        return triplet_distances(*inputs, implementation="reference")

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


# ------------------------------------------------------------------------------------------- values and every gradient


@pytest.mark.parametrize(
    "shape", [(1,), (5,), (3, 1), (2, 63), (2, 64), (3, 65), (2, 4097), (1, 32769), (3, 2, 1000, 17), (70, 4, 8, 8)],
    ids=str,
)  # fmt: skip
def test_ragged_shapes(shape):
    check(samples(*shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 33, 33)], ids=str)
def test_half_precision_is_as_good_as_dense_fp32(dtype, shape):
    inputs = samples(*shape, dtype=dtype)
    actual = evaluate(inputs)
    assert {x.dtype for x in actual[:2]} == {torch.float32} and {x.dtype for x in actual[2:]} == {dtype}
    for ours, exact, theirs in zip(actual, truth(inputs), evaluate(inputs, implementation="reference"), strict=True):
        assert_as_good_as(ours, exact, theirs)


def test_small_differences_survive_many_numbers():
    """A margin of 5e-4 between distances of 1, over 2²² numbers: a running sum in float32 would be off by as much."""
    target = torch.zeros(1, 1 << 22)
    positive, negative = torch.ones_like(target), torch.full_like(target, 1.0005**0.5)
    near, far = triplet_distances(target, positive, negative)
    exact = negative[0, 0].double().square()
    assert near.item() == 1.0 and abs(float(far) - float(exact)) < 5e-7  # a thousandth of the margin


@pytest.mark.parametrize("number", range(8))
def test_gradients_that_are_wanted(number):
    needs = tuple(bool(number >> i & 1) for i in range(3))
    inputs = samples(3, 4, 100)
    everything = dict(zip(NAMES, evaluate(inputs)[2:], strict=True))
    with mock.patch.dict(MODULE.IMPLEMENTATIONS):
        forward, backward = MODULE.IMPLEMENTATIONS["cpu"]
        written = []

        def noted(*arguments):
            found = backward(*arguments)
            written.append([x is not None for x in found])
            return found

        MODULE.IMPLEMENTATIONS["cpu"] = forward, noted
        gradients = evaluate(inputs, needs)[2:]
    wanted = [name for name, need in zip(NAMES, needs, strict=True) if need]
    assert all(torch.equal(x, everything[name]) for x, name in zip(gradients, wanted, strict=True))
    assert written == ([list(needs)] if any(needs) else [])


def test_one_distance_used_alone():
    target, positive, negative = (x.requires_grad_() for x in samples(2, 50))
    gradients = torch.autograd.grad(triplet_distances(target, positive, negative)[0].sum(), (positive, negative))
    assert relative_error(gradients[0], (2 / 50 * (positive - target)).detach().double()) < 1e-6
    assert not gradients[1].any()


def test_only_the_inputs_are_kept():
    inputs = [x.requires_grad_() for x in samples(2, 3, 20)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        triplet_distances(*inputs)
    assert sorted(x.data_ptr() for x in kept) == sorted(x.data_ptr() for x in inputs)


# -------------------------------------------------------------------------------------------------------------- strides


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:  # [B, C, H, W]
    wide = torch.cat([x, x], 3)
    return {
        "contiguous": x,
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "samples with gaps": wide[..., : x.shape[3]],
        "every other": torch.stack([x, x], 4).flatten(3)[..., ::2],
        "batch strided": torch.stack([x, x], 1)[:, 0],
    }


@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
@pytest.mark.parametrize("which", ["all", "target", "negative"])
def test_any_strides(layout, which):
    inputs = samples(3, 4, 9, 7)
    expected = evaluate(inputs)
    changed = [layouts(x)[layout] if which in ("all", name) else x for x, name in zip(inputs, NAMES, strict=True)]
    for found, exact in zip(evaluate(changed), expected, strict=True):
        assert relative_error(found, exact.double()) < 1e-6


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "batch strided"])
def test_samples_without_gaps_are_not_copied(layout):
    inputs = [layouts(x)[layout] for x in samples(3, 4, 9, 7)]
    flat = MODULE._samples(*inputs)
    assert [x.data_ptr() for x in flat] == [x.data_ptr() for x in inputs]
    assert all(x.stride(1) == 1 for x in flat)


def test_expanded_target():
    target, positive, negative = samples(3, 4, 9)
    expanded = target[:1].expand(3, 4, 9)
    actual, expected = (evaluate((x, positive, negative)) for x in (expanded, expanded.contiguous()))
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


# --------------------------------------------------------------------------------------------------- ends of the range


@IMPLEMENTATIONS
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (0, 0), (2, 3, 0)], ids=str)
def test_empty_sizes(implementation, shape):
    found = evaluate(samples(*shape), implementation=implementation)
    assert [x.shape for x in found] == [(shape[0],)] * 2 + [shape] * 3
    assert not any(x.any() for x in found)


@IMPLEMENTATIONS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", range(3))
def test_nan_and_infinity_stay_in_their_sample(implementation, value, which):
    inputs = samples(3, 70)
    clean = evaluate(inputs, implementation=implementation)
    inputs[which][1, 65] = value
    found = evaluate(inputs, implementation=implementation)
    assert all(torch.equal(x[[0, 2]], y[[0, 2]]) for x, y in zip(clean, found, strict=True))
    assert [bool(x[1].isfinite()) for x in found[:2]] == [which == 2, which == 1]


def test_runs_and_threads_give_the_same_bits():
    inputs, results = samples(3, 70_000), []
    for threads in (1, 2, 3, 3):
        with mock.patch.object(torch, "get_num_threads", lambda threads=threads: threads):
            results.append(evaluate(inputs))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


# ------------------------------------------------------------------------------------------------ errors and compilers


def test_the_second_gradient_is_refused():
    inputs = [x.requires_grad_() for x in samples(2, 6)]
    with pytest.raises(NotImplementedError, match=r"triplet_distances: no gradient of its gradient .*='reference' has"):
        torch.autograd.grad(triplet_distances(*inputs)[0].sum(), inputs, create_graph=True)
    distances = torch.ops.fastcontrast.triplet_distances(*inputs, "cpu")  # as compiled code has it
    first, *_ = torch.autograd.grad(distances.square().sum(), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match="triplet_distances: a gradient of its gradient is not implemented"):
        first.sum().backward()


def test_trace_names_what_ran():
    with ops.trace() as ran:
        triplet_distances(*samples(1, 2))
        triplet_distances(*samples(1, 2, dtype=torch.float64))
    assert [choice.implementation for choice in ran] == ["cpu", "reference"]


def test_registration_opcheck():
    inputs = [x.requires_grad_() for x in samples(3, 20)]
    torch.library.opcheck(torch.ops.fastcontrast.triplet_distances, (*inputs, "cpu"))
    detached = [x.detach() for x in inputs]
    for needs in ([True, True, True], [False, True, False]):
        arguments = (*detached, torch.rand(2, 3), needs, "cpu")
        torch.library.opcheck(torch.ops.fastcontrast.triplet_distances_backward, arguments)


def test_compiled_into_one_graph():
    inputs = [x.to(memory_format=torch.channels_last) for x in samples(3, 4, 5, 6)]
    compiled = torch.compile(lambda *x: triplet_distances(*x), fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, triplet_distances):
        leaves = [x.clone().requires_grad_() for x in inputs]
        distances = run(*leaves)
        results.append([*distances, *torch.autograd.grad(distances[0].sum() - distances[1].sum(), leaves)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": 1.0}, TypeError, "target must be a tensor, got float"),
        ({"target": torch.zeros(())}, ValueError, r"target must be \[B, ...\], got \[\]"),
        ({"target": torch.zeros(2, 3).int()}, TypeError, "target must be float32, .* got int32"),
        ({"positive": torch.zeros(2, 4)}, ValueError, r"positive must be \[2, 3\] like target, got \[2, 4\]"),
        ({"negative": torch.zeros(2, 1)}, ValueError, r"negative must be \[2, 3\] like target, got \[2, 1\]"),
        ({"negative": torch.zeros(2, 3).half()}, TypeError, "negative must be float32 like target, got float16"),
        ({"implementation": "fast"}, ValueError, "implementation must be one of cpu, triton, reference or None"),
        ({"implementation": "triton"}, NotImplementedError, "implementation 'triton' cannot run: it runs on cuda"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=f"triplet_distances: {message}"):
        triplet_distances(**{name: torch.zeros(2, 3) for name in NAMES} | change)
