"""Losses over a batch that lies on several ranks: value and gradients of one process that holds all of it."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

import fastcontrast as fc
from fastcontrast import distributed as fd
from fastcontrast.testing import ranks

SIZES = [(3,), (4, 4), (1, 4), (0, 3), (3, 3, 3), (5, 1, 2), (0, 2, 0)]


def _rows(rank: int, size: int) -> torch.Tensor:
    return torch.arange(2.0 * size).view(-1, 2) + 100 * rank


def _gathered(sizes):
    rank = dist.get_rank()
    x = _rows(rank, sizes[rank]).requires_grad_()
    every = fd.gather(x)
    weights = torch.arange(1.0, every.numel() + 1).view_as(every)
    (every * weights * (rank + 1)).sum().backward()
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool):
        assert torch.equal(fd.gather(x.detach().to(dtype)), every.detach().to(dtype))
    return every.detach(), x.grad


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gather_concatenates_and_its_gradient_is_the_sum(sizes):
    whole = torch.cat([_rows(i, n) for i, n in enumerate(sizes)])
    weights = torch.arange(1.0, whole.numel() + 1).view_as(whole)
    total = sum(range(1, len(sizes) + 1))
    results = ranks.run(len(sizes), _gathered, sizes)
    for (every, gradient), expected in zip(results, weights.split(list(sizes)), strict=True):
        assert torch.equal(every, whole)
        assert torch.equal(gradient, total * expected)


# ------------------------------------------------------------------------------------------------------------- losses

D, HARD, QUEUE, CLASSES = 15, 2, 6, 4


def _batch(n: int, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of a whole batch by name, and under `scale`, `bias`, `queue` what belongs to none."""
    torch.manual_seed(seed)
    rows = {name: F.normalize(torch.randn(n, D, dtype=torch.float64), dim=-1) for name in ("q", "k", "tq", "tk")}
    rows |= {
        "hard": F.normalize(torch.randn(n, HARD, D, dtype=torch.float64), dim=-1),
        "ids": torch.randint(max(2, 2 * n // 3), (n,)),
        "labels": torch.randint(CLASSES, (n,)),
        "lengths": torch.randint(1, HARD + 1, (n,)),
        "limit": torch.rand(n, dtype=torch.float64) - 0.2,
        "key_bias": torch.randn(n, dtype=torch.float64) * 0.3,
        "weights": torch.rand(n, dtype=torch.float64) + 0.5,
        "targets": torch.rand(n, n, dtype=torch.float64),
        "scale": torch.tensor(9.0, dtype=torch.float64),
        "bias": torch.tensor(-1.5, dtype=torch.float64),
        "queue": F.normalize(torch.randn(QUEUE, D, dtype=torch.float64), dim=-1),
    }
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in rows.items()}


def _distill(x, **settings):
    teacher = x["tq"], x["tk"]
    return fc.distill_loss(x["q"], x["k"], *teacher, x["scale"], teacher_scale=4.0, weights=x["weights"], **settings)


LEAVES = ("q", "k", "scale", "bias", "hard", "key_bias")
WHOLE = ("scale", "bias", "queue")
BOTH = {"directions": ("query_to_key", "key_to_query")}
ALL = {"directions": ("query_to_key", "key_to_query", "query_to_query", "key_to_key")}


def _info_nce(x, **settings):
    return fc.info_nce(x["q"], x["k"], x["scale"], **settings)


LOSSES = {
    "clip": lambda x: fc.clip_loss(x["q"], x["k"], x["scale"]),
    "clip, ids, weights, smoothing": lambda x: fc.clip_loss(
        x["q"], x["k"], x["scale"], ids=x["ids"], weights=x["weights"], label_smoothing=0.1
    ),
    "clip, accuracy": lambda x: fc.clip_loss(x["q"], x["k"], x["scale"], return_accuracy=True),
    "clip, sum": lambda x: fc.clip_loss(x["q"], x["k"], x["scale"], reduction="sum"),
    "info_nce": lambda x: _info_nce(x, key_bias=x["key_bias"]),
    "info_nce, hard negatives, queue": lambda x: _info_nce(x, hard_negatives=x["hard"], queue=x["queue"]),
    "info_nce, smoothing, hard negatives": lambda x: _info_nce(
        x, hard_negatives=x["hard"], label_smoothing=0.2, key_bias=x["key_bias"], query_ids=x["ids"], key_ids=x["ids"]
    ),
    "info_nce, columns": lambda x: _info_nce(x, directions=("key_to_query",), key_bias=x["key_bias"]),
    "info_nce, all joint": lambda x: _info_nce(x, **ALL, query_ids=x["ids"], key_ids=x["ids"]),
    "info_nce, all joint, no ids": lambda x: _info_nce(x, **ALL, count_positive_once=True),
    "info_nce, all apart": lambda x: _info_nce(x, **ALL, joint=False),
    "info_nce, guide": lambda x: _info_nce(x, **ALL, guide=(x["tq"], x["tk"], x["limit"])),
    "info_nce, positives": lambda x: _info_nce(x, **BOTH, joint=False, positives=x["reversed"]),
    "nt_xent": lambda x: fc.nt_xent_loss(x["q"], x["k"], x["scale"]),
    "nt_xent, ids, accuracy": lambda x: fc.nt_xent_loss(
        x["q"], x["k"], x["scale"], ids=x["ids"], return_accuracy=True
    ),
    "supcon": lambda x: fc.supcon_loss(x["q"], x["labels"], x["scale"], return_accuracy=True),
    "multi_positive": lambda x: fc.multi_positive_loss(
        x["q"], x["k"], x["scale"], query_labels=x["labels"], key_labels=x["labels"], query_ids=x["ids"],
        key_ids=x["ids"], key_bias=x["key_bias"],
    ),
    "multi_positive, listed": lambda x: fc.multi_positive_loss(
        x["q"], x["k"], x["scale"], positives=torch.stack([x["own"], x["reversed"]], 1), count_empty=True
    ),
    "distill": lambda x: _distill(x),
    "distill, one direction": lambda x: _distill(x, directions=("key_to_query",), form="kl"),
    "distill, symmetric": lambda x: _distill(x, form="kl", divergence_direction="symmetric", exclude_self=True),
    "token_contrast": lambda x: fc.token_contrast_margin(x["hard"], x["lengths"], margin=0.9),
    "siglip": lambda x: fc.siglip_loss(x["q"], x["k"], x["scale"], x["bias"]),
    "siglip, labels, ids, weights": lambda x: fc.siglip_loss(
        x["q"], x["k"], x["scale"], x["bias"], image_labels=x["labels"], text_labels=x["labels"],
        image_ids=x["ids"], text_ids=x["ids"], weights=x["weights"], label_smoothing=0.1,
    ),
    "siglip, targets": lambda x: fc.siglip_loss(x["q"], x["k"], x["scale"], x["bias"], targets=x["targets"]),
    "siglip, rows": lambda x: _mean_of_rows(
        x, fc.siglip_loss(x["q"], x["k"], x["scale"], x["bias"], reduction="none")
    ),
    "clip, rows": lambda x: _mean_of_rows(x, fc.clip_loss(x["q"], x["k"], x["scale"], reduction="none")),
}  # fmt: skip


def _mean_of_rows(x, rows):
    """Per-row losses are this rank's: whoever takes a mean takes it over the batch, and W times a rank's share."""
    world = fd.world_size() if x["on_ranks"] else 1
    return rows.sum() * world / x["total"], None


def _evaluate(loss, x):
    """Value, accuracy if any, and gradients by name."""
    for name in LEAVES:
        x[name] = x[name].detach().requires_grad_()
    value = loss(x)
    value, accuracy = value if isinstance(value, tuple) else (value, None)
    value.backward()
    gradients = {name: x[name].grad for name in LEAVES if x[name].grad is not None}
    return value.detach(), accuracy, gradients


def _with_own(x, size, start, **more):
    own = torch.arange(size) + start
    return {**x, "own": own, "reversed": own.flip(0), **more}


def _losses_on_ranks(sizes, how, dtype, names):
    held = fd.Shards(sizes, dist.get_rank())
    here, size = held.slices[held.rank], sizes[held.rank]
    results = {}
    for name in names:
        whole = _batch(sum(sizes), dtype)
        x = {key: value if key in WHOLE else value[here] for key, value in whole.items()}
        x = _with_own(x, size, 0, total=sum(sizes), on_ranks=True)
        with fd.exchange(how):
            results[name] = _evaluate(LOSSES[name], x)
    return results


@functools.cache
def _expected(sizes, names=tuple(LOSSES)):
    results = {}
    for name in names:
        x = _batch(sum(sizes), torch.float64)
        own = [_with_own({}, rows.stop - rows.start, rows.start) for rows in fd.Shards(sizes, 0).slices]
        x |= {key: torch.cat([part[key] for part in own]) for key in ("own", "reversed")}
        results[name] = _evaluate(LOSSES[name], {**x, "total": sum(sizes), "on_ranks": False})
    return results


def _check(sizes, results, tolerance):
    held = fd.Shards(sizes, 0)
    for name, (value, accuracy, gradients) in _expected(sizes).items():
        got = [result[name] for result in results]
        per_rank = name.endswith("rows")
        values = torch.stack([x[0] for x in got]).double()
        values = values.mean() if per_rank else values
        torch.testing.assert_close(values, value.expand_as(values), rtol=tolerance, atol=tolerance, msg=name)
        for _, said, _ in got:
            assert (said is None) == (accuracy is None), name
            assert accuracy is None or abs(float(said) - float(accuracy)) < 1e-6, name
        for leaf, expected in gradients.items():
            if leaf in WHOLE:  # as the mean over ranks that data parallelism takes
                mean = sum(x[2][leaf].double() for x in got) / len(got)
            else:
                mean = torch.cat([x[2][leaf].double() for x in got]) / len(got)
                assert [x[2][leaf].shape[0] for x in got] == list(held.sizes), (name, leaf)
            error = (mean - expected).norm() / expected.norm().clamp(min=0.01)
            assert error < tolerance, f"{name}, gradient of {leaf}: {error}"


@pytest.mark.parametrize("how", ["gather", "ring"])
@pytest.mark.parametrize("sizes", [(4, 4), (0, 5), (13, 5, 9), (1, 0, 6)], ids=str)
def test_every_loss_is_that_of_one_process(sizes, how):
    _check(sizes, ranks.run(len(sizes), _losses_on_ranks, sizes, how, torch.float32, tuple(LOSSES)), 1e-5)


@pytest.mark.parametrize("how", ["gather", "ring"])
def test_float64_is_exact(how):
    sizes = (5, 2, 4)
    _check(sizes, ranks.run(len(sizes), _losses_on_ranks, sizes, how, torch.float64, tuple(LOSSES)), 1e-11)


# ---------------------------------------------------------------------------------------------------------- training


def _towers(seed: int = 0) -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(seed)
    return torch.nn.Linear(7, D), torch.nn.Linear(6, D)


def _train(loss_fn, towers, images, texts, steps=3):
    """Losses of some steps; the towers' and the loss's parameters change."""
    parameters = [p for module in (*towers, loss_fn) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    losses = []
    for _ in range(steps):
        features = [F.normalize(tower(x), dim=-1) for tower, x in zip(towers, (images, texts), strict=True)]
        loss = loss_fn(*features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach().clone() for p in parameters]


def _pairs(n: int):
    torch.manual_seed(1)
    return torch.randn(n, 7), torch.randn(n, 6)


def _modules():
    return {
        "clip": fc.ClipLoss(learnable=True, scale=5.0),
        "siglip": fc.SigLipLoss(learnable=True, bias=-2.0),
        "nt_xent": fc.NTXentLoss(learnable=True),
    }


def _training_on_ranks(sizes, how, wrap_loss):
    from torch.nn.parallel import DistributedDataParallel as Ddp

    rank, results = dist.get_rank(), {}
    here = fd.Shards(sizes, 0).slices[rank]
    equal = len(set(sizes)) == 1
    for name, loss in _modules().items():
        towers = [Ddp(tower) for tower in _towers()]
        loss_fn = fc.DistributedLoss(loss, how, equal=equal)
        images, texts = _pairs(sum(sizes))
        results[name] = _train(Ddp(loss_fn) if wrap_loss else loss_fn, towers, images[here], texts[here])
    return results


@pytest.mark.parametrize("sizes, how, wrap_loss", [((5, 5), "ring", True), ((4, 5, 2), "gather", False)])
def test_training_under_ddp_is_that_of_one_process(sizes, how, wrap_loss):
    """A learned scale and bias included, inside DDP or outside."""
    results = ranks.run(len(sizes), _training_on_ranks, sizes, how, wrap_loss)
    for name, loss in _modules().items():
        losses, parameters = _train(loss, _towers(), *_pairs(sum(sizes)))
        for result in results:
            torch.testing.assert_close(result[name][0], losses, rtol=1e-5, atol=1e-5)
            # AdamW divides by the gradient's size: it magnifies rounding where a gradient is next to nothing.
            torch.testing.assert_close(result[name][1], parameters, rtol=1e-3, atol=1e-4)
            assert all(map(torch.equal, result[name][1], results[0][name][1])), "replicas went apart"


def test_one_process_needs_no_group():
    q, k = (F.normalize(torch.randn(9, D), dim=-1) for _ in range(2))
    loss = fc.DistributedLoss(fc.ClipLoss(), "ring")
    assert torch.equal(loss(q, k), fc.ClipLoss()(q, k))
    assert fd.gather(q) is q
    assert "exchange='ring'" in repr(loss)


def test_refusals():
    with pytest.raises(TypeError, match=r"one of fastcontrast\.losses, got CrossEntropyLoss"):
        fc.DistributedLoss(torch.nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="exchange must be one of 'gather', 'ring', got 'tree'"):
        fc.DistributedLoss(fc.ClipLoss(), "tree")
    with pytest.raises(ValueError, match="how must be one of"), fd.exchange("tree"):
        pass


# ------------------------------------------------------------------------------------------------- order and failure


def _order_of_events():
    """What a rank of a ring posts, computes and waits for, in order."""
    from fastcontrast.distributed import _exchange

    events = []
    post, wait = _exchange._Transfer.__init__, _exchange._Transfer.wait

    def posted(self, group, out, into):
        post(self, group, out, into)
        if self.work:
            events.append("post")

    def waited(self):
        if self.work:
            events.append("wait")
        wait(self)

    _exchange._Transfer.__init__, _exchange._Transfer.wait = posted, waited
    how = _exchange.Exchange("ring", None, True)
    held = how.shards(2, torch.device("cpu"))
    x = torch.full((2, 3), float(dist.get_rank()))

    def work(rows, block):
        events.append("work")
        assert torch.equal(block[0], torch.full((2, 3), float(rows.start // 2)))
        return [block[0] * 10.0 ** dist.get_rank()]

    (home,) = _exchange.visit(how, held, [x], work, [_exchange.Sum])
    assert torch.equal(home, x * 111.0)
    return events


def test_a_ring_sends_while_it_computes():
    for events in ranks.run(3, _order_of_events):
        # The next block is under way during every work but the last, and what was found during the next one.
        first, middle, last = "post work post wait", "post work wait post wait", "work wait post wait"
        assert " ".join(events) == f"{first} {middle} {last}"


def _one_dies(how):
    import os
    import time

    start = time.monotonic()
    q = torch.randn(8, D, requires_grad=True)
    with fd.exchange(how, equal=True):
        fc.clip_loss(q, q.detach(), 5.0).backward()
        if dist.get_rank() == 1:
            os._exit(3)
        try:
            fc.clip_loss(q, q.detach(), 5.0).backward()
        except RuntimeError as error:
            return time.monotonic() - start, str(error)
    raise AssertionError("nobody noticed")


@pytest.mark.parametrize("how", ["gather", "ring"])
def test_a_dead_rank_ends_the_others_with_an_error(how):
    timeout = 5.0
    results = ranks.run(3, _one_dies, how, collective_timeout=timeout, dead=(1,))
    assert results[1] is None
    for seconds, _ in (results[0], results[2]):
        assert seconds < 2 * timeout
