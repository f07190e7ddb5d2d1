"""What a distributed loss must keep, over widths, precisions, scales and hard cases, on 1, 2 and 3 ranks."""

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

import fastcontrast as fc
from fastcontrast import distributed as fd
from fastcontrast.testing import assert_as_good_as, ranks

WIDTHS = (1, 15, 100, 384, 640, 1152, 4096)
SIZES = {1: (67,), 2: (50, 17), 3: (30, 37, 0)}
GEOMETRY = ("random", "orthogonal", "collapsed")


def _features(n: int, d: int, geometry: str) -> list[torch.Tensor]:
    """float64 pairs of unit vectors."""
    torch.manual_seed(d)
    q, k = torch.randn(2, n, d, dtype=torch.float64)
    if geometry == "collapsed":
        q, k = (torch.ones(d, dtype=torch.float64) + 1e-3 * x for x in (q, k))
    elif geometry == "orthogonal":
        q, k = ((torch.eye(max(n, d), dtype=torch.float64)[:n, :d] + 1e-3 * x) for x in (q, k))
    else:
        k = q + 2 * k
    return [F.normalize(x, dim=1) for x in (q, k)]


LOSSES = {
    "clip": lambda q, k, scale, bias: fc.clip_loss(q, k, scale),
    "siglip": lambda q, k, scale, bias: fc.siglip_loss(q, k, scale, bias),
}


def _step(loss, q, k, scale):
    leaves = [x.clone().requires_grad_() for x in (q, k, torch.tensor(scale), torch.tensor(-2.0))]
    value = LOSSES[loss](*leaves)
    (3.0 * value).backward()  # an upstream gradient that is not 1
    return [value.detach(), *(x.grad for x in leaves if x.grad is not None)]


def _cases():
    for loss in LOSSES:
        for d in WIDTHS:
            yield loss, d, torch.float32, 14.0, "random"
        for dtype in (torch.bfloat16, torch.float16):
            yield loss, 100, dtype, 20.0, "random"
        for scale in (1.0, 100.0):
            for geometry in GEOMETRY:
                yield loss, 48, torch.float32, scale, geometry


def _on_ranks(sizes, how):
    here, results = fd.Shards(sizes, 0).slices[dist.get_rank()], []
    for loss, d, dtype, scale, geometry in _cases():
        q, k = (x.to(dtype)[here] for x in _features(sum(sizes), d, geometry))
        with fd.exchange(how):
            results.append(_step(loss, q, k, scale))
            if d == 15:
                again = _step(loss, q, k, scale)
                assert all(map(torch.equal, again, results[-1])), "the same step gave other bits"
    return results


def _dense(loss, q, k, scale, bias):
    logits, target = scale * q @ k.T, torch.arange(len(q))
    if loss == "clip":
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return -F.logsigmoid((2 * torch.eye(len(q)).to(logits) - 1) * (logits + bias)).sum(1).mean()


def _dense_step(loss, q, k, scale, dtype):
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, torch.tensor(scale), torch.tensor(-2.0))]
    value = _dense(loss, *leaves)
    (3.0 * value).backward()
    return [value.detach(), *(x.grad for x in leaves if x.grad is not None)]


@pytest.mark.parametrize("how", ["gather", "ring"])
@pytest.mark.parametrize("world", SIZES)
def test_gradients_are_those_of_one_process(world, how):
    sizes = SIZES[world]
    by_rank = ranks.run(world, _on_ranks, sizes, how)
    for case, parts in zip(_cases(), zip(*by_rank, strict=True), strict=True):
        loss, d, dtype, scale, geometry = case
        q, k = (x.to(dtype) for x in _features(sum(sizes), d, geometry))
        truth, plain = (_dense_step(loss, q, k, scale, of) for of in (torch.float64, torch.float32))
        if dtype != torch.float32:  # the plain code rounds its gradients to what the features are
            plain[1:3] = (x.to(dtype) for x in plain[1:3])
        for i, (exact, dense) in enumerate(zip(truth, plain, strict=True)):
            found = [part[i].double() for part in parts]
            mean = torch.cat(found) / world if exact.ndim else sum(found) / world
            if dtype == torch.float32 and geometry == "random" and exact.ndim:
                assert (mean - exact).norm() <= 1e-5 * exact.norm(), (case, i)
            # The gradient of a scale is a sum of terms that cancel.
            assert_as_good_as(mean, exact, dense, magnitude=0.0 if exact.ndim else 3.0)


# ---------------------------------------------------------------------------------------------------------- hard cases


def _hard_cases(how):
    rank, size = dist.get_rank(), 4
    torch.manual_seed(rank)
    q, k = (F.normalize(torch.randn(size, 7), dim=1).requires_grad_() for _ in range(2))
    scale = torch.tensor(9.0, requires_grad=True)
    same = torch.zeros(size, dtype=torch.int64)
    found = {}

    def record(name, loss):
        gradients = torch.autograd.grad(loss, [q, k, scale], allow_unused=True)
        found[name] = [loss.detach(), *(torch.zeros(()) if g is None else g for g in gradients)]

    with fd.exchange(how):
        # No negative is left: log 1.
        record("all one id", fc.clip_loss(q, k, scale, ids=same))
        # Nothing is left at all, of positives and of negatives.
        record("all masked", fc.multi_positive_loss(
            q, k, scale, query_labels=same, key_labels=same, query_ids=same, key_ids=same
        ))  # fmt: skip
        # Rows of which only rank 1's have a positive.
        labels = torch.full((size,), rank) if rank == 1 else torch.arange(size) + 10 * (rank + 1)
        record("few positives", fc.supcon_loss(q, labels, scale))
        # Guided away but for the own pair, with a learned temperature.
        record("guided away", fc.info_nce(q, k, scale, guide=(q.detach(), k.detach(), -2.0)))
    return found


@pytest.mark.parametrize("how", ["gather", "ring"])
def test_rows_with_nothing_left_give_nothing(how):
    results = ranks.run(3, _hard_cases, how)
    for name in ("all one id", "all masked", "guided away"):
        for result in results:
            for x in result[name]:
                assert torch.equal(x, torch.zeros_like(x)), (name, x)
    for rank, result in enumerate(results):
        assert all(x.isfinite().all() for x in result["few positives"])
        assert result["few positives"][0] > 0, "the loss is the whole batch's on every rank"
        assert result["few positives"][1].any(), f"rank {rank} is among the negatives of rank 1"


def _one_pair(how):
    q = F.normalize(torch.ones(1, 3), dim=1).requires_grad_()
    rows = q if dist.get_rank() == 1 else q[:0]
    with fd.exchange(how):
        loss = fc.clip_loss(rows, rows, 5.0)
        nothing = fc.clip_loss(q[:0], q[:0], 5.0)
    (loss + nothing).backward()
    return loss.item(), nothing.item(), q.grad


@pytest.mark.parametrize("how", ["gather", "ring"])
def test_one_pair_and_none(how):
    for loss, nothing, gradient in ranks.run(2, _one_pair, how):
        assert loss == pytest.approx(0.0, abs=1e-6)
        assert nothing == 0.0
        assert gradient is None or gradient.abs().max() < 1e-6


def _scaled(how):
    """float16 under a GradScaler: gradients of 2**16 times the loss, unscaled, are those of the loss."""
    torch.manual_seed(dist.get_rank())
    tower, loss_fn = torch.nn.Linear(9, 6), fc.DistributedLoss(fc.ClipLoss(learnable=True), how)
    tower = torch.nn.parallel.DistributedDataParallel(tower)
    x, y = torch.randn(2, 5, 9)
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**16)):
        parameters = [*tower.parameters(), *loss_fn.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.0)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_fn(F.normalize(tower(x), dim=1), F.normalize(tower(y), dim=1))
        assert loss.dtype == torch.float32
        if scaler is None:
            loss.backward()
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
        found.append([p.grad.clone() for p in parameters])
    return found


@pytest.mark.parametrize("how", ["gather", "ring"])
def test_a_gradient_scaler_changes_nothing(how):
    for plain, scaled in ranks.run(2, _scaled, how):
        torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=1e-9)


def _backward_in_autocast(how):
    torch.manual_seed(dist.get_rank())
    q, k, tq, tk = (F.normalize(torch.randn(21, 30), dim=1) for _ in range(4))
    labels, found = torch.arange(21) % 5, []
    for inside in (False, True):
        leaves = [x.clone().requires_grad_() for x in (q, k)]
        with fd.exchange(how), torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss = fc.distill_loss(*leaves, tq, tk, 8.0) + fc.clip_loss(*leaves, 8.0, ids=labels, label_smoothing=0.1)
            loss = loss + fc.multi_positive_loss(*leaves, 8.0, query_labels=labels, key_labels=labels)
            (loss + fc.siglip_loss(*leaves, 8.0, -2.0, reduction="none").sum()).backward()
        found.append([loss.detach(), *(x.grad for x in leaves)])
    return found


@pytest.mark.parametrize("how", ["gather", "ring"])
def test_autocast_rounds_nothing_also_around_the_backward(how):
    for outside, inside in ranks.run(2, _backward_in_autocast, how):
        assert all(map(torch.equal, inside, outside))


def _implementations(how):
    torch.manual_seed(dist.get_rank())
    q, k = (F.normalize(torch.randn(21, 30), dim=1).requires_grad_() for _ in range(2))
    found = []
    for implementation in ("cpu", "reference"):
        with fd.exchange(how), fc.ops.trace() as ran:
            loss = fc.info_nce(q, k, 8.0, directions=("query_to_key", "key_to_query"), implementation=implementation)
        assert {choice.implementation for choice in ran} == {implementation}
        found.append([loss.detach(), *torch.autograd.grad(loss, [q, k])])
    return found


@pytest.mark.parametrize("how", ["gather", "ring"])
def test_fused_is_reference(how):
    for fused, reference in ranks.run(2, _implementations, how):
        torch.testing.assert_close(fused, reference, rtol=1e-5, atol=1e-6)
