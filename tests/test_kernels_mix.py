"""similarity_mix on the Triton kernels, in the interpreter: the schedule of its two passes, against float64 truth."""

import pytest
import torch
from interpreter import tiles
from similarity import generator, unit

from fastcontrast.ops import _device_sweep
from fastcontrast.ops._sweep import Masks
from fastcontrast.ops.similarity_lse import reference_logits, reference_lse
from fastcontrast.testing import assert_as_good_as, relative_error

# Of numbers that a mask throws away.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NAMES = ("queries", "keys", "scale", "key_bias", "values")
FP32_LIMIT = 1e-5


def problem(m: int, n: int, d: int, dv: int, dtype=torch.float32) -> list[torch.Tensor]:
    random = generator(7)
    return [
        unit(m, d, 1).to(dtype),
        unit(n, d, 2).to(dtype),
        torch.tensor(14.0),
        torch.randn(n, generator=random),
        torch.randn(n, dv, generator=random).to(dtype),
    ]


def dense(inputs, masks: Masks, upstream, lse_gradient, dtype):
    """(out, lse) and their gradients, of the dense definition in `dtype`."""
    leaves = [x.to(dtype if dtype == torch.float64 else x.dtype).requires_grad_() for x in inputs]
    queries, keys, scale, key_bias, values = leaves
    logits = reference_logits(queries, keys, scale, key_bias, masks)
    lse = reference_lse(logits, 1)
    weights = torch.exp(logits - lse.masked_fill(lse.isneginf(), 0.0)[:, None])
    out = weights @ values.to(weights.dtype)
    loss = (out * upstream).sum() + (lse.masked_fill(lse.isneginf(), 0.0) * lse_gradient).sum()
    return out.detach(), lse.detach(), torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (61, 97, 33, 24), (67, 5, 16, 130)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_value_and_every_gradient(shape, dtype, masked):
    m, n = shape[:2]
    inputs, masks = problem(*shape, dtype), Masks()
    if masked:  # the first rows have nothing left
        ids = torch.zeros(n, dtype=torch.long)
        masks = Masks(torch.arange(m).clamp(max=1), ids)
    # Through the cast of the result, a gradient comes in the dtype of the values.
    upstream = torch.randn(m, shape[3], generator=generator(4)).to(dtype).float()
    lse_gradient = torch.randn(m, generator=generator(5))
    with tiles():
        high, low, out = _device_sweep.mix(*inputs[:2], inputs[4], *inputs[2:4], masks)
        arguments = (*inputs[:2], inputs[4], *inputs[2:4], masks, upstream, lse_gradient, out, high, low)
        gradients = _device_sweep.mix_backward(*arguments, (True,) * 5)
        alone = [_device_sweep.mix_backward(*arguments, tuple(i == k for i in range(5)))[k] for k in range(5)]
    truth = dense(inputs, masks, upstream, lse_gradient, torch.float64)
    naive = dense(inputs, masks, upstream, lse_gradient, torch.float32)
    results = {"out": (out, truth[0], naive[0]), "lse": (high.double() + low, truth[1], naive[1])}
    results |= {name: each for name, *each in zip(NAMES, gradients, truth[2], naive[2], strict=True)}
    for name, (actual, true, plain) in results.items():
        # In half precision weights round to 11 bits before a gradient rounds to its own 8 or 11. The others are fp32.
        if dtype != torch.float32 and name not in ("lse", "scale", "key_bias"):
            assert relative_error(actual, true) < (2.0**-8 if dtype == torch.bfloat16 else 2.0**-10), name
        elif relative_error(actual, true) > FP32_LIMIT:
            assert_as_good_as(actual, true, plain, magnitude=20.0)
    for name, x, y in zip(NAMES, gradients, alone, strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
def test_empty_matrices(shape):
    inputs = problem(*shape, 8, 4)
    high, low, out = _device_sweep.mix(*inputs[:2], inputs[4], *inputs[2:4], Masks())
    assert out.shape == (shape[0], 4)
    assert (out == 0).all()
    assert high.isneginf().all()
    gradients = _device_sweep.mix_backward(
        *inputs[:2], inputs[4], *inputs[2:4], Masks(), torch.ones_like(out), None, out, high, low, (True,) * 5
    )
    for x, like in zip(gradients, inputs, strict=True):
        assert x.shape == like.shape
        assert (x == 0).all()
