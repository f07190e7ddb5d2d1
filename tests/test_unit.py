"""Rows of length 1 against torch's own."""

import pytest
import torch
from torch.nn import functional as F

from fastcontrast.ops._unit import unit_rows


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (7, 5), (33, 100)])
@pytest.mark.parametrize("eps", [1e-12, 0.5])
def test_values_and_gradients_are_those_of_normalize(shape, eps):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64) * torch.rand(shape[0], 1, dtype=torch.float64)
    x[:1] = 0.0  # where the length is clamped: the gradient is that of x / eps
    gradient = torch.randn(shape, dtype=torch.float64)
    found, expected = [], []
    for function, into in ((unit_rows, found), (lambda x, eps: F.normalize(x, dim=1, eps=eps), expected)):
        leaf = x.clone().requires_grad_()
        out = function(leaf, eps)
        into += [out.detach(), *torch.autograd.grad(out, leaf, gradient)]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_inside_and_around_the_backward(dtype):
    torch.manual_seed(0)
    x = torch.randn(9, 40).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    weights = torch.randn(9, 40)
    with torch.autocast("cpu", torch.bfloat16):
        out = unit_rows(x)
        assert out.dtype == torch.float32
        (out * weights).sum().backward()
    (F.normalize(exact, dim=1) * weights).sum().backward()
    torch.testing.assert_close(x.grad, exact.grad.to(dtype))


def test_no_gradient_of_its_gradient():
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(NotImplementedError, match="unit_rows: no gradient of its gradient"):
        torch.autograd.grad(unit_rows(x).sum(), x, create_graph=True)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # what the compiler does with any Function
def test_large_rows_strided_expanded_and_compiled():
    """Whose results come from memory that was used before, and that a compiler must not see."""
    torch.manual_seed(0)
    x = torch.randn(1100, 1024).t()  # 4.3 MiB, columns apart
    for gradient in (torch.randn(1024, 1100), torch.randn(1, 1100).expand(1024, -1)):
        results = []
        for function in (lambda x: F.normalize(x, dim=1), unit_rows, torch.compile(unit_rows, backend="aot_eager")):
            leaf = x.detach().requires_grad_()
            out = function(leaf)
            results.append([out.detach(), *torch.autograd.grad(out, leaf, gradient)])
        torch.testing.assert_close(results[1], results[0])
        torch.testing.assert_close(results[2], results[0])
