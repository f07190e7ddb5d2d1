"""upsampled_cross_entropy and its sigmoid form against F.interpolate and torch's losses in float64; ends; doors.

Tiles are mostly shrunk to a few pixels, so that small maps cross every boundary of the real ones.
"""

import json
import math
import subprocess
import sys
from unittest import mock

import pytest
import torch
from recipes import gradients
from similarity import generator
from torch.nn import functional as F

from fastcontrast.ops import trace, upsampled_binary_cross_entropy, upsampled_cross_entropy
from fastcontrast.testing import assert_as_good_as, relative_error

MODULE = sys.modules["fastcontrast.ops.upsampled_cross_entropy"]
BOTH = (upsampled_cross_entropy, upsampled_binary_cross_entropy)
SIZES = (  # from [h, w] to [H, W]: up by whole and odd factors, mixed, the same, down, ends
    ((2, 3), (8, 12)), ((3, 5), (17, 11)), ((4, 3), (4, 7)), ((5, 6), (5, 6)), ((9, 13), (4, 5)), ((1, 1), (5, 3)),
    ((7, 1), (1, 9)),
)  # fmt: skip


def maps(b: int, k: int, h: int, w: int) -> torch.Tensor:
    return torch.randn(b, k, h, w, generator=generator(1)).mul_(0.4)


def painted(b: int, k: int, height: int, width: int, call=upsampled_cross_entropy) -> tuple[torch.Tensor, ...]:
    """Labels of which a quarter is ignored, or targets and a mask."""
    hidden = torch.rand(b, height, width, generator=generator(2)) < 0.25
    if call is upsampled_cross_entropy:
        return (torch.randint(k, hidden.shape, generator=generator(3)).masked_fill(hidden, 255),)
    return torch.rand(b, k, height, width, generator=generator(3)) < 0.3, ~hidden


def small(pixels: int, k: int):
    return mock.patch.object(MODULE, "CPU_TILE", 4 * k * pixels)


def dense(scores, target, mask=None, scale=1.0, reduction="sum"):
    """Written apart from the reference: gathers rows and columns, and sums in plain terms."""
    z = scale * scores
    for dim, size in ((2, target.shape[-2]), (3, target.shape[-1])):
        at = ((torch.arange(size).double() + 0.5) * scores.shape[dim] / size - 0.5).clamp(min=0)
        low = at.long()
        high = (low + 1).clamp(max=scores.shape[dim] - 1)
        share = (at - low).to(z.dtype).view((-1,) + (1,) * (3 - dim))
        z = (1 - share) * z.index_select(dim, low) + share * z.index_select(dim, high)
    if mask is None:
        valid = target != 255
        own = z.gather(1, target.where(valid, 0)[:, None])[:, 0]
        total = ((z.logsumexp(1) - own) * valid).sum()
        return total / {"sum": 1, "valid": max(1, valid.sum()), "all": valid.numel()}[reduction]
    total = (((1 + z.exp()).log() - z * target) * mask[:, None]).sum()
    count = max(1, mask.sum())
    return total / {"sum": 1, "positions": count, "entries": count * z.shape[1]}[reduction]


def both_ways(call, scores, target, scale=2.0, **options):
    """Value, and gradients to scores and scale."""
    leaves = scores, torch.tensor(scale, dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32)
    return gradients(lambda s, factor: call(s, *target, scale=factor, **options), *leaves)


@pytest.mark.parametrize("call", BOTH)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_interpolation_and_torchs_loss(call, sizes):
    (h, w), (height, width) = sizes
    scores, target = maps(2, 5, h, w), painted(2, 5, height, width, call)
    for reduction in ("sum", "valid", "all") if call is upsampled_cross_entropy else ("sum", "positions", "entries"):
        expected = both_ways(dense, scores.double(), target, reduction=reduction)
        exact = both_ways(call, scores.double(), target, reduction=reduction)
        for x, y in zip(exact, expected, strict=True):
            assert relative_error(x, y) < 1e-12
        for pixels in (1, 6, 16, 1 << 16):
            with small(pixels, 5):
                found = both_ways(call, scores, target, reduction=reduction)
            for x, y in zip(found, expected, strict=True):
                assert x.dtype == torch.float32 and relative_error(x, y) < 2e-6


@pytest.mark.parametrize("call", BOTH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_dense_fp32(call, dtype):
    scores, target = maps(2, 7, 6, 5).to(dtype), painted(2, 7, 32, 21, call)
    found, naive = (both_ways(call, scores, target, 14.0, implementation=x) for x in (None, "reference"))
    exact = both_ways(call, scores.double(), target, 14.0)
    assert found[1].dtype == dtype
    for ours, truth, theirs in zip(found, exact, naive, strict=True):
        assert_as_good_as(ours, truth, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(scores, *target, 14.0), found[0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_integer_type_and_strides(dtype):
    scores, (labels,) = maps(2, 5, 4, 4), painted(2, 5, 9, 9)
    expected = both_ways(upsampled_cross_entropy, scores, (labels,))
    strided = scores.to(memory_format=torch.channels_last), labels.mT.contiguous().mT.to(dtype)
    for x, y in zip(both_ways(upsampled_cross_entropy, strided[0], strided[1:]), expected, strict=True):
        assert relative_error(x, y) < 1e-6


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_what_is_ignored_has_no_loss_and_no_gradient(implementation):
    scores, (labels,) = maps(2, 5, 4, 4), painted(2, 5, 8, 8)
    options = {"implementation": implementation}
    for reduction in ("valid", "all", "sum"):
        value, *found = both_ways(upsampled_cross_entropy, scores, (torch.full_like(labels, 255),), reduction=reduction)
        assert value == 0 and all((g == 0).all() for g in found)
    _, *found = both_ways(upsampled_binary_cross_entropy, scores,
                          (torch.ones(2, 5, 8, 8).bool(), torch.zeros(2, 8, 8).bool()), **options)  # fmt: skip
    assert all((g == 0).all() for g in found)
    labels[1] = 255
    _, gradient, _ = both_ways(upsampled_cross_entropy, scores, (labels,), **options)
    assert (gradient[1] == 0).all() and (gradient[0] != 0).all()
    other = labels.where(labels != 255, -7)  # any other index may stand for it
    assert torch.equal(upsampled_cross_entropy(scores, other, ignore_index=-7, **options),
                       upsampled_cross_entropy(scores, labels, **options))  # fmt: skip


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_scores_far_apart_lose_no_loss(implementation):
    """A probability of e⁻³⁰⁰ is 0 in float32; its loss is 300."""
    scores = torch.tensor([300.0, 0.0]).view(1, 2, 1, 1)
    for label, expected in ((0, 0.0), (1, 300.0)):
        value, gradient, _ = both_ways(upsampled_cross_entropy, scores, (torch.full((1, 4, 4), label),), 1.0,
                                       implementation=implementation)  # fmt: skip
        assert value == expected and torch.equal(gradient.flatten(), torch.tensor([label * 1.0, -label * 1.0]))


def test_constant_maps_stay_constant_and_classes_may_change_places():
    scores, (labels,) = maps(2, 5, 1, 1), painted(2, 5, 13, 7)
    expected = F.cross_entropy(scores.expand(2, 5, 13, 7), labels, ignore_index=255)
    assert relative_error(upsampled_cross_entropy(scores.expand(2, 5, 3, 4), labels), expected) < 1e-6
    order = torch.tensor([3, 1, 4, 0, 2])
    moved = order.argsort()[labels.where(labels != 255, 0)].where(labels != 255, 255)
    scores = maps(2, 5, 4, 4)
    found = both_ways(upsampled_cross_entropy, scores[:, order], (moved,))
    value, gradient, _ = both_ways(upsampled_cross_entropy, scores, (labels,))
    assert relative_error(found[0], value) < 1e-6 and relative_error(found[1], gradient[:, order]) < 1e-6


def test_no_images_have_no_loss():
    for implementation in ("torch", None):
        value, gradient, _ = both_ways(upsampled_cross_entropy, maps(0, 5, 4, 4), painted(0, 5, 8, 8),
                                       implementation=implementation)  # fmt: skip
        assert value == 0 and gradient.shape == (0, 5, 4, 4)


def test_nan_stays_in_its_image():
    scores, target = maps(2, 5, 4, 4), painted(2, 5, 8, 8)
    clean = both_ways(upsampled_cross_entropy, scores, target, reduction="sum")[1]
    scores[1, 2, 1, 1] = math.nan
    value, gradient, _ = both_ways(upsampled_cross_entropy, scores, target, reduction="sum")
    assert value.isnan() and gradient[1].isnan().any() and torch.equal(gradient[0], clean[0])


@pytest.mark.parametrize("call", BOTH)
def test_derivatives_of_the_reference_and_what_has_none(call):
    scores, target = maps(1, 3, 2, 2).double().requires_grad_(), painted(1, 3, 3, 5, call)
    assert torch.autograd.gradcheck(lambda s: call(s, *target), scores)
    assert torch.autograd.gradgradcheck(lambda s: call(s, *target), scores)
    leaf = scores.detach().float().requires_grad_()
    with pytest.raises(NotImplementedError, match="implementation='reference' has one"):
        torch.autograd.grad(call(leaf, *target), leaf, create_graph=True)


MEMORY = """
import json, torch
from fastcontrast.benchmarks._memory import peak_of
from fastcontrast.ops import upsampled_cross_entropy

def step(b, k, h, size):
    s, y = torch.randn(b, k, h, h).requires_grad_(), torch.randint(k, (b, size, size))
    return lambda: torch.autograd.grad(upsampled_cross_entropy(s, y, 14.0), s)

step(1, 20, 4, 64)()
print(json.dumps(peak_of(step(2, 150, 8, 256))[0]))
"""


def test_peak_memory_is_that_of_tiles():
    """The upsampled maps of two images would be 75 MiB, and dense torch makes several of them."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) < 16 << 20


def test_a_tile_fits_into_its_workspace():
    seen, tile = [], MODULE._softmax_tile

    def noted(logits, *rest):
        seen.append(logits.numel() * 4)
        return tile(logits, *rest)

    with mock.patch.object(MODULE, "_softmax_tile", noted):
        for workspace in (0, 1000, 10_000, 1 << 30):
            seen.clear()
            upsampled_cross_entropy(maps(1, 5, 6, 7), torch.zeros(1, 40, 61).long(), workspace=workspace)
            assert sum(seen) == 40 * 61 * 5 * 4 and max(seen) <= max(workspace, 20)
    assert len(seen) == 1


@pytest.mark.parametrize("call", BOTH)
def test_registered_operation_and_compiled(call):
    scores, target = maps(2, 5, 4, 3).requires_grad_(), painted(2, 5, 9, 11, call)
    for mask_need in (True, False):
        arguments = (scores, target[0], (*target, None)[1], 255, 1 << 12, mask_need)
        tests = ("test_schema", "test_faketensor") + ("test_autograd_registration",) * mask_need
        torch.library.opcheck(torch.ops.fastcontrast.upsampled_cross_entropy, arguments, test_utils=tests)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = [both_ways(f, scores, target) for f in (compiled, call)]
    for x, y in zip(*results, strict=True):
        assert relative_error(x, y) < 1e-6


def test_what_runs():
    scores, labels = maps(1, 5, 2, 2), torch.zeros(1, 4, 4).long()
    with trace() as ran:
        upsampled_cross_entropy(scores, labels)
        upsampled_cross_entropy(scores.double(), labels)
        upsampled_binary_cross_entropy(scores, torch.ones(1, 5, 4, 4).bool(), torch.ones(1, 4, 4).bool())
    assert {choice.op for choice in ran} == {"upsampled_cross_entropy"}
    assert [choice.implementation for choice in ran] == ["torch", "reference", "torch"]
    with pytest.raises(NotImplementedError, match="float64"):
        upsampled_cross_entropy(scores.double(), labels, implementation="torch")


SCORES, LABELS = torch.zeros(2, 5, 4, 3), torch.zeros(2, 8, 6).long()
REFUSED = {
    "scores: None": (TypeError, "scores must be a tensor, got NoneType", {"scores": None}),
    "scores: integers": (TypeError, "scores must be float32.* got int64", {"scores": LABELS}),
    "scores: dimensions": (ValueError, r"scores must be \[B, K, h, w\], got \[5, 4, 3\]", {"scores": SCORES[0]}),
    "scores: empty": (ValueError, r"scores must have a class .* got \[2, 5, 0, 3\]", {"scores": SCORES[:, :, :0]}),
    "labels: None": (TypeError, "labels must be a tensor, got NoneType", {"labels": None}),
    "labels: floating": (TypeError, "labels must be an integer tensor, got float32", {"labels": LABELS.float()}),
    "labels: batch": (ValueError, r"labels must be \[2, H, W\] .* got \[1, 8, 6\]", {"labels": LABELS[:1]}),
    "labels: empty": (ValueError, r"labels must be \[2, H, W\] .* got \[2, 8, 0\]", {"labels": LABELS[:, :, :0]}),
    "labels: one map": (ValueError, r"labels must be \[2, H, W\] .* got \[8, 6\]", {"labels": LABELS[0]}),
    "labels: too large": (ValueError, r"labels must lie in \[0, 5\), got .*\[5, 5\]", {"labels": LABELS + 5}),
    "labels: below": (ValueError, r"labels must lie in \[0, 5\), got", {"labels": LABELS - 1}),
    "labels: device": (ValueError, "labels must be on cpu like scores, got meta", {"labels": LABELS.to("meta")}),
    "scale": (ValueError, r"scale must be a number .* got \[2\]", {"scale": torch.ones(2)}),
    "reduction": (ValueError, "reduction must be one of 'valid', 'all', 'sum', got 'mean'", {"reduction": "mean"}),
    "workspace": (ValueError, "workspace must be at least 0 bytes, got -1", {"workspace": -1}),
    "implementation": (ValueError, "implementation must be one of torch, reference", {"implementation": "cpu"}),
}
TARGETS, MASK = torch.zeros(2, 5, 8, 6).bool(), torch.ones(2, 8, 6).bool()
REFUSED_BINARY = {
    "targets: dtype": (TypeError, "targets must be bool, got float32", {"targets": TARGETS.float()}),
    "targets: classes": (ValueError, r"targets must be \[2, 5, H, W\] .* got \[2, 4, 8, 6\]",
                         {"targets": TARGETS[:, :4]}),
    "mask: dtype": (TypeError, "mask must be bool, got int64", {"mask": MASK.long()}),
    "mask: shape": (ValueError, r"mask must be \[2, 8, 6\] .* got \[2, 6, 8\]", {"mask": MASK.mT}),
    "reduction": (ValueError, "reduction must be one of 'positions'.* got 'valid'", {"reduction": "valid"}),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changed"), REFUSED.values(), ids=REFUSED)
def test_refused_at_the_door(error, message, changed):
    with pytest.raises(error, match=f"^upsampled_cross_entropy: .*{message}"):
        upsampled_cross_entropy(**{"scores": SCORES, "labels": LABELS, **changed})


@pytest.mark.parametrize(("error", "message", "changed"), REFUSED_BINARY.values(), ids=REFUSED_BINARY)
def test_refused_at_the_other_door(error, message, changed):
    with pytest.raises(error, match=f"^upsampled_binary_cross_entropy: .*{message}"):
        upsampled_binary_cross_entropy(**{"scores": SCORES, "targets": TARGETS, "mask": MASK, **changed})
