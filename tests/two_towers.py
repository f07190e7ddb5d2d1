"""Two small towers and a loss: what the tests of GradCache share, and the check that all of them come to."""

import torch
from torch import nn
from torch.nn import functional as F

B, D = 13, 6  # a prime: every chunk size leaves a ragged last chunk


def float64():
    """`double = pytest.fixture(autouse=True)(float64)` gives every test of a module this dtype and this seed."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Tower(nn.Module):
    """Counts its forwards and rows; takes what the tests need by position or by name."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 5))
        self.calls = self.rows = 0

    def forward(self, x, mask=None, scale=1.0):
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        out = self.net(x) * scale
        return out if mask is None else out * mask[:, None]


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.calls = 0

    def forward(self, q, k, bias=0.0):
        self.calls += 1
        logits = self.log_scale.exp() * F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).T + bias
        labels = torch.arange(len(q))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def gradients(*modules):
    return [None if p.grad is None else p.grad.clone() for m in modules for p in m.parameters()]


def clear(*modules):
    for m in modules:
        m.zero_grad()


def assert_equal(ours, theirs, tolerance=1e-12):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def check(cache, inputs, reps, *modules, **loss_kwargs):
    """One step of `cache` against autograd through `reps()` at once, from the same random state."""
    clear(*modules)
    state = torch.get_rng_state()
    truth = cache.loss_fn(*reps(), **loss_kwargs)
    truth.backward()
    wanted, after = gradients(*modules), torch.rand(3)
    clear(*modules)
    torch.set_rng_state(state)
    loss = cache(*inputs, **loss_kwargs)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, truth.detach(), rtol=1e-12, atol=1e-12)
    assert_equal(gradients(*modules), wanted)
    assert any(g is not None and g.abs().max() > 1e-4 for g in wanted)
    assert torch.equal(torch.rand(3), after)  # the global stream: one forward of every chunk
