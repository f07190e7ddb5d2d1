"""Linear layers for few rows: the C++ products against torch's; which layers they stand in for, and for how long."""

import threading

import pytest
import torch
from decoding import make
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastcontrast.decoding._few_rows import MOST, few_rows
from fastcontrast.ops._dispatch import native


@pytest.mark.parametrize("by_input", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 16), (37, 100), (512, 64), (515, 33), (3, 1000), (1025, 6)])
def test_products(n, d, bias, by_input):
    product = native.few_rows_by_input if by_input else native.few_rows
    for rows in range(1, MOST + 1):
        x, weight, shift = torch.randn(rows, d), torch.randn(n, d), torch.randn(n)
        held = weight.t().contiguous() if by_input else weight
        out = torch.full((rows, n), torch.nan)
        product(x.data_ptr(), held.data_ptr(), shift.data_ptr() if bias else 0, out.data_ptr(), rows, n, d, 2)
        exact = x.double() @ weight.double().t() + (shift.double() if bias else 0)
        scale = x.double().abs() @ weight.double().abs().t() + (shift.double().abs() if bias else 0) + 1e-9
        assert ((out - exact).abs() / scale).max() < 1e-6


class Adapted(nn.Linear):
    pass


def layers():
    model = nn.ModuleDict({"linear": nn.Linear(20, 30), "bare": nn.Linear(20, 30, bias=False),
                           "conv": Conv1D(30, 20), "adapted": Adapted(20, 30), "rounded": nn.Linear(20, 30).bfloat16(),
                           "replaced": nn.Linear(20, 30), "mixed": nn.Linear(20, 30)})  # fmt: skip
    model["mixed"].bias.data = model["mixed"].bias.data.bfloat16()
    model["replaced"].forward = lambda x: x * 2
    return model


@torch.no_grad()
def test_layers_inside_and_after():
    model = layers()
    x = torch.randn(1, 5, 20)
    plain = ("linear", "bare", "conv", "adapted", "replaced")
    before = {name: model[name](x) for name in plain}
    kept = model["replaced"].forward
    with few_rows(model):
        for name in ("linear", "bare", "conv"):
            assert "forward" in vars(model[name])
            torch.testing.assert_close(model[name](x), before[name])
            wide = torch.randn(MOST + 1, 20)
            assert torch.equal(model[name](wide), type(model[name]).forward(model[name], wide))
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                model[name](torch.randn(5, 21))
        assert not any("forward" in vars(model[name]) for name in ("adapted", "rounded", "mixed"))
        assert model["replaced"].forward is kept
    assert not any("forward" in vars(model[name]) for name in ("linear", "bare", "conv", "adapted", "rounded"))
    assert all(torch.equal(model[name](x), before[name]) for name in plain)


def test_where_a_gradient_or_autocast_is_wanted_the_layer_is_itself():
    model = layers()
    x = torch.randn(3, 20, requires_grad=True)
    with few_rows(model):
        model["linear"](x).sum().backward()
        assert x.grad is not None
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert model["linear"](x).dtype == torch.bfloat16


def test_the_last_of_several_threads_puts_the_layers_back():
    model = make("gpt2")
    entered, leave = threading.Event(), threading.Event()

    def use():
        with few_rows(model):
            entered.set()
            leave.wait(20)

    thread = threading.Thread(target=use)
    thread.start()
    entered.wait(20)
    with few_rows(model):
        pass
    assert "forward" in vars(model.lm_head)
    leave.set()
    thread.join(20)
    assert not any("forward" in vars(layer) for layer in model.modules())


def test_an_error_inside_puts_the_layers_back():
    model = layers()
    with pytest.raises(RuntimeError, match="inside"), few_rows(model):
        raise RuntimeError("inside")
    assert "forward" not in vars(model["linear"])
