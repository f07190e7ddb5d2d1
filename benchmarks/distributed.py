"""A symmetric loss on two gloo ranks of this machine: seconds, memory a rank, and the simulation of a ring.

Every process has one thread, also the single one that it is compared with. Each measurement is one in fresh processes,
as often as asked for, and the median of those.
"""

from __future__ import annotations

import statistics
import time
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from fastcontrast import clip_loss
from fastcontrast.distributed import exchange
from fastcontrast.distributed._exchange import Exchange, _Transfer
from fastcontrast.distributed._lse import _block_backward, _block_forward, _Problem
from fastcontrast.distributed.plan import plan, ring_seconds
from fastcontrast.ops._sweep import Masks
from fastcontrast.testing import ranks
from fastcontrast.testing.shapes import Shape, named

from ._harness import Bar, Row
from ._memory import peak_of

MIB = 1 << 20
SCALE = 20.0


def features(shape: Shape, rows: slice) -> list[Tensor]:
    """This rank's rows of a batch that is the same on any number of ranks."""
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(shape.m, shape.d), dim=1) for _ in range(2))
    k = F.normalize(0.3 * q + k, dim=1)  # alike, but not so that nothing is left to learn
    return [x[rows].clone().requires_grad_() for x in (q, k)]


def step(how: str | None, shape: Shape) -> dict:
    """One measured step of this rank, after one of tiny size: its seconds, memory, loss and gradients."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def loss_and_gradients(shape: Shape) -> tuple[Tensor, ...]:
        n = shape.m // world
        q, k = features(shape, slice(rank * n, (rank + 1) * n))
        if world > 1:
            dist.barrier()

        def run() -> tuple[Tensor, ...]:
            with exchange(how or "gather", equal=True):
                loss = clip_loss(q, k, SCALE)
            return (loss.detach(), *torch.autograd.grad(loss, [q, k]))

        return peak_of(run)

    loss_and_gradients(Shape("tiny", 64, 64, 32))
    grown, (loss, *gradients), seconds = loss_and_gradients(shape)
    return {"seconds": seconds, "bytes": grown, "loss": loss.item(), "gradients": [g / world for g in gradients]}


def parts(shape: Shape) -> dict[str, float]:
    """Seconds of a block's work and of its hops, apart, while all ranks do the same."""
    n, world = shape.m // dist.get_world_size(), dist.get_world_size()
    q, k = (x.detach() for x in features(shape, slice(0, n)))
    how = Exchange("ring", None, True)
    problem = _Problem(how, how.shards(n, q.device), "cpu", True, True, True, False, 0)
    masks, scale = Masks(positives=torch.arange(n)), torch.tensor(SCALE)
    found = _block_forward(problem, q, k, scale, None, masks)
    r, c = found.rows, found.columns
    g = torch.full((n,), 0.5 / n)
    backward = partial(_block_backward, problem, q, k, scale, None, masks, g, g, -2 * g, r, c)

    def hop(*shapes_and_types):
        out = [torch.zeros(size, dtype=dtype) for size, dtype in shapes_and_types]
        into = [torch.empty_like(x) for x in out]
        return lambda: _Transfer(None, out, into).wait()

    matrix, vector, double = ((n, shape.d), torch.float32), (n, torch.float32), (n, torch.float64)
    timed = {
        "block_forward": lambda: _block_forward(problem, q, k, scale, None, masks),
        "block_backward": lambda: backward((True, True, False, False)),
        "keys_forward": hop(matrix), "found_forward": hop(double),
        "keys_backward": hop(matrix, vector, double), "found_backward": hop(matrix),
    }  # fmt: skip
    seconds = {}
    for name, work in timed.items():
        work()
        times = []
        for _ in range(5):
            dist.barrier()
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        seconds[name] = statistics.median(times)
    return seconds | {"world": world}


def simulated(apart: dict[str, float]) -> float:
    """Both passes of a ring from the seconds of its parts."""
    passes = ((apart[f"block_{x}"], apart[f"keys_{x}"], apart[f"found_{x}"]) for x in ("forward", "backward"))
    return sum(ring_seconds(int(apart["world"]), *seconds) for seconds in passes)


def two_ranks(shape: Shape, reps: int) -> list[Row]:
    one, gathered, ring = "fastcontrast, one process", "fastcontrast, gather", "fastcontrast, ring"
    ways = {one: (1, None), gathered: (2, "gather"), ring: (2, "ring")}
    rows = {name: Row("distributed", f"clip {shape.m} × {shape.d}", name) for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    grown: dict[str, list[int]] = {name: [] for name in ways}
    simulations, last = [], {}
    for _ in range(reps):
        for name, (world, how) in ways.items():
            last[name] = found = ranks.run(world, step, how, shape)
            seconds[name].append(max(x["seconds"] for x in found))
            grown[name].append(max(x["bytes"] for x in found))
        apart = ranks.run(2, parts, shape)
        simulations.append(max(simulated(x) for x in apart))
    gradients = {name: [torch.cat(g) for g in zip(*(x["gradients"] for x in last[name]), strict=True)] for name in ways}
    for name, row in rows.items():
        row.timed(seconds[name])
        row.peak_extra_bytes = int(statistics.median(grown[name]))
        pairs = zip(gradients[name], gradients[one], strict=True)
        row.error = max(float((ours - exact).norm() / exact.norm()) for ours, exact in pairs)
        if row.error > 1e-5:
            row.status, row.note = "wrong", f"gradients differ from one process's by {row.error:.1e}"
    for name in (gathered, ring):
        beyond = rows[name].peak_extra_bytes - rows[one].peak_extra_bytes / 2
        bar = Bar(f"{name}, beyond half of one process's", at_most=64 * MIB, what="peak_extra_bytes")
        rows[name].judge(bar, beyond)
    ratios = [a / b for a, b in zip(simulations, seconds[ring], strict=True)]
    rows[ring].note = f"simulated {statistics.median(simulations) * 1e3:.0f} ms"
    if shape.m >= 8192:  # in shorter steps what is simulated, work and hops, is not most of what there is
        rows[ring].judge(Bar("simulated", ring, at_most=1.25), statistics.median(ratios))
        rows[ring].judge(Bar("simulated", ring, at_least=0.75), statistics.median(ratios))
    planned = plan(shape.m, shape.d, 2, feature_bytes=4, flops=1.0, bandwidth=1.0).held_bytes
    beyond = rows[ring].peak_extra_bytes / (planned + 64 * MIB)
    rows[ring].judge(Bar("memory", "planned, with the workspace", at_most=1.0), beyond)
    return list(rows.values())


def two_gloo_ranks(quick: bool, reps: int | None) -> list[Row]:
    shapes = (Shape("batch_1024", 1024, 1024, 512),) if quick else (named("batch_2048"), named("batch_8192"))
    return [row for shape in shapes for row in two_ranks(shape, reps or (1 if quick else 5))]


def workloads(quick: bool) -> list:
    return []


measurements = {"two gloo ranks": two_gloo_ranks}
