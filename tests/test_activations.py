"""QuickGELU against its three operations."""

import pytest
import torch

from fastcontrast.activations import QuickGELU, quick_gelu


def three_operations(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (7, 5, 33)])
def test_same_value_and_gradient(shape, dtype):
    x = normal(*shape, dtype=dtype)
    out = QuickGELU()(x)
    assert torch.equal(out, three_operations(x))
    upstream = torch.randn_like(out)
    (ours,) = torch.autograd.grad(out, x, upstream)
    exact = x.detach().double().requires_grad_()
    (theirs,) = torch.autograd.grad(three_operations(exact), exact, upstream.double())
    assert ours.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def test_large_inputs():
    x = torch.tensor([-1e30, -1e4, -0.0, 1e4, 1e30], requires_grad=True)
    out = quick_gelu(x)
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(out, torch.tensor([-0.0, -0.0, -0.0, 1e4, 1e30]))
    assert torch.equal(dx, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


def test_infinity_of_half_precision():
    """Where 1.702 · x has no float16 any more, but x has."""
    x = torch.tensor([-6e4, -4e4, 4e4, 6e4], dtype=torch.float16, requires_grad=True)
    (ours,), (theirs,) = (torch.autograd.grad(f(x).sum(dtype=torch.float32), x) for f in (quick_gelu, three_operations))
    assert torch.equal(ours, theirs) and torch.equal(ours, torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float16))


def test_first_and_second_derivative():
    x = normal(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(quick_gelu, x) and torch.autograd.gradgradcheck(quick_gelu, x)


def test_the_input_alone_is_kept():
    x, kept = normal(5, 6), []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        quick_gelu(x)
    assert [y.data_ptr() for y in kept] == [x.data_ptr()]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does it
def test_under_vmap_and_compile():
    x = normal(3, 4)
    each = torch.func.vmap(torch.func.grad(lambda y: quick_gelu(y).sum()))(x)
    (whole,) = torch.autograd.grad(three_operations(x).sum(), x)
    torch.testing.assert_close(each, whole)
    compiled = torch.compile(quick_gelu, backend="aot_eager", fullgraph=True)
    (again,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(again, whole)
