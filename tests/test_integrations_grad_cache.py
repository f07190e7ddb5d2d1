"""The names of the GradCache package: values and gradients of its formulas, on one process and on several ranks."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from fastcontrast import GradCache as OurGradCache
from fastcontrast.distributed import Shards
from fastcontrast.integrations.grad_cache import (
    DistributedContrastiveLoss,
    GradCache,
    SimpleContrastiveLoss,
    cached,
    cat_input_tensor,
    gather_input_tensor,
)
from fastcontrast.testing import ranks

D = 7
pytestmark = pytest.mark.usefixtures("one_thread")


def batch(m, n, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return (torch.randn(size, D, dtype=torch.float64).to(dtype).requires_grad_() for size in (m, n))


def dense(x, y, target=None, reduction="mean", hard=0):
    """What the package's loss computes."""
    target = torch.arange(0, len(x) * (hard + 1), hard + 1) if target is None else target
    return F.cross_entropy(x @ y.T, target, reduction=reduction)


def gradients(loss, *leaves):
    """Of a scalar, or of rows with different weights."""
    weight = torch.cos(torch.arange(loss.numel(), dtype=loss.dtype)).view_as(loss)
    return torch.autograd.grad((loss * weight).sum(), leaves)


def assert_close(ours, theirs, tolerance):
    error = (ours.double() - theirs).norm() / theirs.norm().clamp(min=1e-3)
    assert error <= tolerance, error


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("m, hard", [(1, 0), (1, 3), (13, 0), (37, 2), (131, 1)])
@pytest.mark.parametrize("own_target", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_simple_loss(m, hard, reduction, own_target, dtype, tolerance):
    x, y = batch(m, m * (hard + 1), dtype)
    target = torch.randint(len(y), (m,)) if own_target else None
    exact = [t.detach().double().requires_grad_() for t in (x, y)]
    theirs = dense(*exact, target, reduction, hard)
    ours = SimpleContrastiveLoss(hard)(x, y, target, reduction)
    assert ours.shape == theirs.shape
    assert_close(ours, theirs, tolerance)
    for mine, yours in zip(gradients(ours, x, y), gradients(theirs, *exact), strict=True):
        assert_close(mine, yours, tolerance)


def test_what_a_loss_refuses():
    x, y = batch(4, 6)
    with pytest.raises(ValueError, match="SimpleContrastiveLoss: expected 2 rows of y for each of the 4 of x, got 6"):
        SimpleContrastiveLoss(n_hard_negatives=1)(x, y)
    with pytest.raises(ValueError, match="DistributedContrastiveLoss: expected 1 rows of y for each of the 4 of x"):
        DistributedContrastiveLoss()(x, y)
    with pytest.raises(ValueError, match="reduction"):
        SimpleContrastiveLoss()(x, x, reduction="median")


# ------------------------------------------------------------------------------------------------------------- ranks

HARD = 2


def _distributed(sizes):
    """Values and gradients of this rank's rows, by name; each with the whole batch's target or the default one."""
    held = Shards(sizes, dist.get_rank())
    here = held.slices[held.rank]
    x, y = (t.detach() for t in batch(held.total, held.total * (HARD + 1)))
    target = torch.randint(len(y), (len(x),))
    x, y = x[here], y[here.start * (HARD + 1) : here.stop * (HARD + 1)]
    found = {}
    for reduction in ("mean", "sum", "none"):
        for t in (None, target):
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            loss = DistributedContrastiveLoss(HARD)(x, y, target=t, reduction=reduction)
            found[reduction, t is None] = loss.detach(), *gradients(loss, x, y)
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    loss = DistributedContrastiveLoss(HARD, scale_loss=True)(x, y)
    found["scaled", True] = loss.detach(), *gradients(loss, x, y)
    for axis in (0, 1):
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        a, b = (x, y) if axis == 0 else (x.T, y.T)
        every = gather_input_tensor(lambda x, y, scale, name: (scale * x, y), axis)
        gx, gy = every(a, y=b, scale=torch.tensor(2.0), name="not a tensor")
        loss = dense(*((gx / 2, gy) if axis == 0 else (gx.T / 2, gy.T)), hard=HARD)
        found["gathered", axis] = loss.detach(), *gradients(loss, x, y)
    return found


@pytest.mark.parametrize("sizes", [(5,), (4, 3), (3, 0, 5)], ids=str)
def test_distributed_loss(sizes):
    """Every rank has the whole loss, and the whole loss's gradient of its own rows."""
    x, y = batch(sum(sizes), sum(sizes) * (HARD + 1))
    target = torch.randint(len(y), (len(x),))
    results = ranks.run(len(sizes), _distributed, sizes)
    for name, default in results[0]:
        reduction = name if name in ("sum", "none") else "mean"
        whole = dense(x, y, None if name in ("gathered", "scaled") or default else target, reduction, HARD)
        whole = whole * len(sizes) if name == "scaled" else whole
        for value in (result[name, default][0] for result in results):
            torch.testing.assert_close(value, whole, rtol=1e-12, atol=1e-12)
        for i, wanted in enumerate(gradients(whole, x, y)):
            got = torch.cat([result[name, default][i + 1] for result in results])
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


# -------------------------------------------------------------------------------------------------------- functional


class Tower(nn.Module):
    """Draws random numbers, and moves a buffer."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, 5)).double()

    def forward(self, x, *, scale=1.0):
        return self.net(x) * scale


def assert_same_model(ours, theirs):
    for mine, yours in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, yours.grad, rtol=1e-10, atol=1e-12)
        assert yours.grad.abs().max() > 0 or yours.shape == (8,)  # a bias before BatchNorm
    for mine, yours in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, yours, rtol=0, atol=0)


def test_the_package_s_loop_is_autograd_of_all_chunks():
    """Chunks encoded one by one, a loss of all of them, then each chunk's second pass: with keyword arguments."""
    torch.manual_seed(3)
    ours = Tower()
    theirs = copy.deepcopy(ours)
    x, y = torch.randn(13, D, dtype=torch.float64), torch.randn(13, D, dtype=torch.float64)
    calls = []

    @cached
    def call_model(model, input, *, scale):
        calls.append(torch.is_grad_enabled())
        return model(input, scale=scale)

    state = torch.get_rng_state()
    chunks = [(a, b) for a, b in zip(x.split(5), y.split(5), strict=True)]
    reps = [(theirs(a, scale=2.0), theirs(b, scale=3.0)) for a, b in chunks]
    truth = dense(torch.cat([a for a, _ in reps]), torch.cat([b for _, b in reps]))
    truth.backward()
    after = torch.rand(2)

    torch.set_rng_state(state)
    cache_x, cache_y, closures = [], [], []
    for a, b in chunks:
        rx, cx = call_model(ours, input=a, scale=2.0)
        ry, cy = call_model(model=ours, input=b, scale=3.0)
        cache_x.append(rx)
        cache_y.append(ry)
        closures += [(cx, rx), (cy, ry)]
    assert torch.equal(torch.rand(2), after)
    loss_fn = cat_input_tensor(SimpleContrastiveLoss())
    loss = loss_fn(cache_x, y=cache_y, reduction="mean")
    loss.backward()
    for backward, leaf in closures:
        backward(leaf)
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=0)
    assert_same_model(ours, theirs)
    assert calls == [False] * 6 + [True] * 6


def test_cached_takes_a_model_and_several_representations():
    """One that the loss does not use, and one that nothing trains."""
    torch.manual_seed(4)

    class Two(Tower):
        def forward(self, x):
            out = self.net(x)
            return out, out * 2, x

    ours = Two()
    theirs = copy.deepcopy(ours)
    x = torch.randn(6, D, dtype=torch.float64)
    state = torch.get_rng_state()
    theirs(x)[0].square().sum().backward()
    torch.set_rng_state(state)
    *leaves, backward = cached(ours)(x)
    assert [leaf.is_leaf and leaf.requires_grad for leaf in leaves] == [True] * 3
    leaves[0].square().sum().backward()
    backward(tuple(leaves))
    assert_same_model(ours, theirs)
    with pytest.raises(ValueError, match="cached: expected the 3 leaves of one call, got 1"):
        backward(leaves[0])
    with pytest.raises(TypeError, match="cached: expected a tensor or a tuple of tensors, got dict"):
        cached(lambda x: {"x": x})(x)


def test_cached_inside_the_caller_s_autocast():
    """The half-precision weights that the first pass cast without a graph are not those of the second."""
    torch.manual_seed(5)
    tower, x = nn.Linear(D, 5), torch.randn(6, D)
    with torch.autocast("cpu", torch.bfloat16):
        leaf, backward = cached(tower)(x)
        leaf.float().square().sum().backward()
        backward(leaf)
        ours, tower.weight.grad = tower.weight.grad, None
        tower(x).float().square().sum().backward()
    torch.testing.assert_close(ours, tower.weight.grad, rtol=0, atol=0)


def test_cat_input_tensor_leaves_other_arguments():
    @cat_input_tensor
    def loss(*args, **kwargs):
        """A loss."""
        return args, kwargs

    x, y = torch.ones(2, 3), torch.zeros(1, 3)
    (a, b, c), kwargs = loss([x, y], x, [], k=[y, y], names=["a", "b"], pair=(x, y))
    assert torch.equal(a, torch.cat([x, y])) and b is x and c == []
    assert torch.equal(kwargs["k"], torch.zeros(2, 3))
    assert kwargs["names"] == ["a", "b"] and kwargs["pair"] == (x, y)
    assert loss.__doc__ == "A loss."


# --------------------------------------------------------------------------------------------------------- the class


def _step_on_ranks(sizes, scale):
    held = Shards(sizes, dist.get_rank())
    x, y = (t.detach()[held.slices[held.rank]] for t in batch(held.total, held.total))
    torch.manual_seed(6)
    towers = [nn.Linear(D, 5).double() for _ in range(2)]
    cache = GradCache(towers, 2, DistributedContrastiveLoss(scale_loss=scale))
    return cache(x, y, reduction="mean"), [p.grad for tower in towers for p in tower.parameters()]


@pytest.mark.parametrize("scale", [False, True])
def test_the_class_with_the_distributed_loss(scale):
    """Of data-parallel towers, whose gradients are the mean over ranks."""
    assert GradCache is OurGradCache
    sizes = (5, 4)
    x, y = batch(sum(sizes), sum(sizes))
    torch.manual_seed(6)
    towers = [nn.Linear(D, 5).double() for _ in range(2)]
    whole = dense(towers[0](x), towers[1](y))
    whole.backward()
    share = 1 if scale else 1 / len(sizes)
    losses, found = zip(*ranks.run(len(sizes), _step_on_ranks, sizes, scale), strict=True)
    for loss in losses:
        torch.testing.assert_close(loss, whole.detach() * (len(sizes) if scale else 1), rtol=1e-12, atol=0)
    wanted = [p.grad * share for tower in towers for p in tower.parameters()]
    for mine, yours in zip(zip(*found, strict=True), wanted, strict=True):
        torch.testing.assert_close(torch.stack(mine).mean(0), yours, rtol=1e-10, atol=1e-12)
