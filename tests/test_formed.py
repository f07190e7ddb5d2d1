"""Losses with gradients formed in the forward, on a small one whose gradients are known: Σ a² b."""

import pytest
import torch

from fastcontrast.ops._formed import formed


class Run:
    """Σ a² b with gradients 2ab and a²; notes how often it ran and what was asked for."""

    def __init__(self):
        self.calls = []

    def __call__(self, inputs, needs):
        assert not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        self.calls.append(needs)
        a, b = (x.float() for x in inputs[:2])
        gradients = (2 * a * b if needs[0] else None, a * a if needs[1] else None, None)
        return (a * a * b).sum(), gradients


def leaves(dtype=torch.float32):
    a, b = torch.tensor([1.0, 2.0, 3.0], dtype=dtype), torch.tensor([0.5, -1.0, 2.0], dtype=dtype)
    return a.requires_grad_(), b.requires_grad_()


@pytest.mark.parametrize("upstream", [1.0, -3.0, 65536.0])
def test_gradients_are_multiplied_by_what_comes(upstream):
    (a, b), run = leaves(), Run()
    loss = formed(run, a, b, None)
    (loss * upstream).backward()
    assert loss.item() == 14.5 and len(run.calls) == 1
    assert torch.equal(a.grad, upstream * 2 * (a * b).detach()) and torch.equal(b.grad, upstream * (a * a).detach())


def test_a_second_backward_runs_again_and_is_right():
    (a, b), run = leaves(), Run()
    loss = formed(run, a, b, None)
    first = torch.autograd.grad(2 * loss, (a, b), retain_graph=True)
    again = torch.autograd.grad(loss, (a, b), retain_graph=True)
    only = torch.autograd.grad(3 * loss, b)
    assert run.calls == [(True, True, False)] * 3
    assert all(torch.equal(x, 2 * y) for x, y in zip(first, again, strict=True)) and torch.equal(only[0], 3 * again[1])


def test_an_input_that_changed_is_noticed_only_where_it_matters():
    (a, b), run = leaves(), Run()
    loss = formed(run, a, b, None)
    with torch.no_grad():
        a.add_(1.0)
    torch.autograd.grad(loss, a, retain_graph=True)  # formed before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, a)


def test_a_graph_that_was_let_go_is_gone():
    (a, b), run = leaves(), Run()
    loss = formed(run, a, b, None)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_what_requires_a_gradient_is_asked_for(frozen):
    inputs, run = list(leaves()), Run()
    inputs[frozen] = inputs[frozen].detach()
    formed(run, *inputs, None).backward()
    assert run.calls == [(frozen == 1, frozen == 0, False)]


def test_nothing_is_formed_without_grad_mode_or_leaves():
    (a, b), run = leaves(), Run()
    with torch.no_grad():
        assert not formed(run, a, b, None).requires_grad
    assert not formed(run, a.detach(), b.detach(), None).requires_grad
    assert run.calls == [(False, False, False)] * 2


def test_gradients_come_in_the_inputs_dtypes_and_autocast_is_off():
    (a, b), run = leaves(torch.bfloat16), Run()
    with torch.autocast("cpu", torch.bfloat16):
        loss = formed(run, a, b, None)
        gradients = torch.autograd.grad(loss, (a, b), retain_graph=True)
        torch.autograd.grad(loss, a)
    assert loss.dtype == torch.float32 and [g.dtype for g in gradients] == [torch.bfloat16] * 2


def test_a_gradient_of_the_gradient_is_refused():
    a, b = leaves()
    loss = formed(Run(), a, b, None, op="sums")
    with pytest.raises(NotImplementedError, match=r"^sums: no gradient of its gradient .*reference"):
        torch.autograd.grad(loss, a, create_graph=True)
