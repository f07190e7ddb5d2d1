"""Linear layers for few rows: the C++ products against torch's; which layers they stand in for, and for how long."""

import threading
from collections import Counter

import pytest
import torch
from decoding import make
from torch import nn
from torch.nn import functional as F

from fastcontrast.decoding._few_rows import MOST, few_rows, gated, rms_norm
from fastcontrast.ops._dispatch import native
from fastcontrast.ops._sweep import address


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 16), (37, 100), (512, 64), (515, 33), (3, 1000), (1025, 6)])
def test_products(n, d, bias):
    for rows in range(1, MOST + 1):
        x, weight, shift = torch.randn(rows, d), torch.randn(n, d), torch.randn(n)
        out = torch.full((rows, n), torch.nan)
        native.few_rows(x.data_ptr(), weight.data_ptr(), shift.data_ptr() if bias else 0, out.data_ptr(), rows, n, d, 2)
        exact = x.double() @ weight.double().t() + (shift.double() if bias else 0)
        scale = x.double().abs() @ weight.double().abs().t() + (shift.double().abs() if bias else 0) + 1e-9
        assert ((out - exact).abs() / scale).max() < 1e-6


@pytest.mark.parametrize("d", [1, 15, 16, 100, 576])
def test_norms(d):
    for rows, eps in ((1, 1e-6), (5, 1e-2), (8, 0.5)):
        x, weight, out = torch.randn(rows, d), torch.randn(d), torch.full((rows, d), torch.nan)
        native.rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, d, eps)
        exact = F.rms_norm(x.double(), (d,), weight.double(), eps)
        torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (37, 100), (515, 33), (1025, 6)])
def test_gates(n, d, bias):
    for rows in range(1, MOST + 1):
        x, gate, up = torch.randn(rows, d), torch.randn(n, d), torch.randn(n, d)
        shifts = [torch.randn(n) if bias else None for _ in range(2)]
        out = torch.full((rows, n), torch.nan)
        native.few_rows_gated(x.data_ptr(), gate.data_ptr(), up.data_ptr(), *(address(b) for b in shifts),
                              out.data_ptr(), rows, n, d, 2)  # fmt: skip
        parts = [F.linear(x.double(), w.double(), b if b is None else b.double())
                 for w, b in zip((gate, up), shifts, strict=True)]  # fmt: skip
        torch.testing.assert_close(out.double(), F.silu(parts[0]) * parts[1], rtol=1e-5, atol=1e-5 * d**0.5)


def test_gates_of_any_size():
    """silu of what is so far from 0 that its exponential overflows, and of NaN."""
    x, gate = torch.ones(5, 1), torch.tensor([[-1e4], [-88.0], [0.0], [88.0], [1e4], [torch.nan]])
    out, up = torch.empty(5, 6), torch.ones(6, 1)
    native.few_rows_gated(x.data_ptr(), gate.data_ptr(), up.data_ptr(), 0, 0, out.data_ptr(), 5, 6, 1, 1)
    torch.testing.assert_close(out, F.silu(gate).T.expand(5, 6), equal_nan=True, rtol=1e-5, atol=1e-30)


class Adapted(nn.Linear):
    pass


def layers():
    model = nn.ModuleDict({"linear": nn.Linear(20, 30), "bare": nn.Linear(20, 30, bias=False),
                           "adapted": Adapted(20, 30), "rounded": nn.Linear(20, 30).bfloat16(),
                           "replaced": nn.Linear(20, 30)})  # fmt: skip
    model["replaced"].forward = lambda x: x * 2
    return model


@torch.no_grad()
def test_layers_inside_and_after():
    model = layers()
    x = torch.randn(1, 5, 20)
    plain = ("linear", "bare", "adapted", "replaced")
    before = {name: model[name](x) for name in plain}
    kept = model["replaced"].forward
    with few_rows(model):
        for name in ("linear", "bare"):
            assert "forward" in vars(model[name])
            torch.testing.assert_close(model[name](x), before[name])
            wide = torch.randn(MOST + 1, 20)
            assert torch.equal(model[name](wide), type(model[name]).forward(model[name], wide))
        assert "forward" not in vars(model["adapted"]) and "forward" not in vars(model["rounded"])
        assert model["replaced"].forward is kept
    assert not any("forward" in vars(model[name]) for name in ("linear", "bare", "adapted", "rounded"))
    assert all(torch.equal(model[name](x), before[name]) for name in plain)


def stood_in(model) -> dict:
    """By the layer's class: how many compute with which of our functions."""
    with few_rows(model):
        found = Counter((type(x).__name__, x.forward.func.__name__) for x in model.modules() if "forward" in vars(x))
    assert not any("forward" in vars(x) for x in model.modules())
    return dict(found)


@pytest.mark.parametrize(
    ("name", "family", "norms", "gates"),
    [("llama", "Llama", 5, 2), ("mistral", "Mistral", 5, 2), ("qwen2", "Qwen2", 5, 2), ("gemma", "Gemma", 0, 0),
     ("gpt2", "GPT2", 0, 0)],
)  # fmt: skip
def test_which_layers_of_a_model(name, family, norms, gates):
    """Gemma's norms multiply by 1 + weight, and its gate is no silu; GPT-2's are other classes."""
    model = make(name)
    found = stood_in(model)
    linears = sum(type(x) is nn.Linear for x in model.modules())
    expected = {
        ("Linear", "linear"): linears,
        (f"{family}RMSNorm", "rms_norm"): norms,
        (f"{family}MLP", "gated"): gates,
    }
    assert found == {key: count for key, count in expected.items() if count}


@torch.no_grad()
def test_norms_and_gates_of_a_model_inside():
    model = make("llama")
    layer = model.model.layers[0]
    x = torch.randn(1, 5, 48)
    before = [f(x) for f in (layer.input_layernorm, layer.mlp)]
    with few_rows(model):
        inside = [f(x) for f in (layer.input_layernorm, layer.mlp)]
        assert layer.mlp.forward.func is gated and layer.input_layernorm.forward.func is rms_norm
        wide = torch.randn(1, MOST + 1, 48)
        assert torch.equal(
            layer.input_layernorm(wide), type(layer.input_layernorm).forward(layer.input_layernorm, wide)
        )
    for ours, theirs in zip(inside, before, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert not torch.equal(ours, torch.zeros_like(ours))


def test_a_gate_that_somebody_watches_is_called():
    """Hooks of a layer run only if the layer is called, so its layer of gates stays as it is."""
    model = make("llama")
    seen = []
    first, second = (layer.mlp for layer in model.model.layers)
    first.gate_proj.register_forward_hook(lambda *_: seen.append("hook"))
    second.up_proj.forward = lambda x: x.new_zeros(*x.shape[:-1], 96)
    with few_rows(model), torch.no_grad():
        assert "forward" not in vars(first) and "forward" not in vars(second)
        first(torch.randn(1, 5, 48))
        assert not second(torch.randn(1, 5, 48)).any()
    assert seen == ["hook"]


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
