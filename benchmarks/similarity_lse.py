"""`similarity_lse` and the losses on it: forward and backward, against bare matrix products and rivals, on the CPU.

A *product* is one matrix product of 2·M·N·D FLOP. Steps compute the loss and allocate its gradients; no provider
normalises its inputs unless all in its workload do.

`pytest benchmarks/similarity_lse.py --benchmark-enable` times single providers; `fastcontrast bench similarity_lse`
all of them in turns, with memory, bars and a report.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast import clip_loss, info_nce, nt_xent_loss, supcon_loss
from fastcontrast.ops._sweep import kept_rows
from fastcontrast.testing.shapes import Shape, named

from . import _grad_cache, _pytest
from . import _rivals as rivals
from ._harness import Bar, Floor, Provider, Step, Workload
from ._import_time import import_time
from ._pairs import SCALE, Batch, make_batch, make_views, truth
from ._products import floor, symmetric_floor, tiled

MIB = 1 << 20
TINY = Shape("tiny", 64, 64, 32)


# ----------------------------------------------------------------------------------------------------------- providers


def provider(loss: Callable[[], Callable], *names: str, normalise: bool = False, scale: float | None = None, **options):
    """`loss()(queries, keys, scale)` forward and backward, with gradients to the named fields of the batch.

    `scale`: a number instead of the batch's tensor. A field without gradient is passed detached.
    """

    def make(batch: Batch) -> Step:
        function = loss()
        inputs = [getattr(batch, name) for name in names]
        q, k = (getattr(batch, name) if name in names else getattr(batch, name).detach() for name in PAIR)
        s = batch.scale if scale is None else scale

        def step() -> tuple[Tensor, ...]:
            vectors = (F.normalize(x, dim=1) for x in (q, k)) if normalise else (q, k)
            value = function(*vectors, s)
            return (value.detach(), *torch.autograd.grad(value, inputs))

        return step

    return Provider(make, **options)


ALL = ("queries", "keys", "scale")
PAIR = ("queries", "keys")


def dense_clip(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    """The best of plain torch: one product forward, logits shared by both directions."""
    logits = scale * queries @ keys.T
    target = torch.arange(len(queries))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def dense_info_nce(queries: Tensor, keys: Tensor, scale: Tensor | float) -> Tensor:
    """Also what GradCache's SimpleContrastiveLoss computes, over the whole batch at once."""
    return F.cross_entropy(scale * queries @ keys.T, torch.arange(len(queries)))


def dense_nt_xent(view1: Tensor, view2: Tensor, scale: Tensor | float) -> Tensor:
    views, n = torch.cat([view1, view2]), len(view1)
    logits = (scale * views @ views.T).fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, torch.arange(2 * n).roll(n))


def dense_supcon(embeddings: Tensor, labels: Tensor, scale: float) -> Tensor:
    itself = torch.eye(len(labels), dtype=torch.bool)
    log_p = (scale * embeddings @ embeddings.T).masked_fill(itself, float("-inf")).log_softmax(1)
    positive = (labels[:, None] == labels) & ~itself
    valid = positive.any(1)
    return -(log_p.masked_fill(~positive, 0.0).sum(1)[valid] / positive.sum(1)[valid]).mean()


def with_ids(batch: Batch) -> Step:
    return provider(lambda: partial(clip_loss, ids=batch.ids), *ALL).make(batch)


def supcon(loss: Callable[[], Callable]) -> Provider:
    """`loss()(embeddings, labels)` on one normalised set."""

    def make(batch: Batch) -> Step:
        function, embeddings = loss(), batch.queries

        def step() -> tuple[Tensor, ...]:
            value = function(F.normalize(embeddings, dim=1), batch.ids)
            return (value.detach(), *torch.autograd.grad(value, [embeddings]))

        return step

    return Provider(make)


def cached_stage(scale: float, mini_batch: int, reps: int | None = None) -> Provider:
    def make(batch: Batch) -> Step:
        stage = rivals.sentence_transformers_cached(scale, mini_batch)
        reps = [[c.detach().requires_grad_() for c in x.split(mini_batch)] for x in (batch.queries, batch.keys)]

        def step() -> tuple[Tensor, ...]:
            loss = stage(reps)
            gradients = [torch.cat([chunk.grad for chunk in chunks]) for chunks in reps]
            for chunk in (*reps[0], *reps[1]):
                chunk.grad = None
            return (loss, *gradients)

        return step

    return Provider(make, reps=reps)


# ----------------------------------------------------------------------------------------------------------- workloads

WORKSPACE = 64 * MIB  # the default on a CPU
NEVER_SLOWER = (Bar("fastcontrast", "dense torch", at_most=1.0),)
OPEN_CLIP = Bar("open_clip.ClipLoss", "fastcontrast", at_least=2.0)


def products(shape: Shape) -> int:
    """Of the floor with the default workspace: 3 where most logits fit into it, else 4."""
    return 3 if 2 * kept_rows(shape.m, shape.n, WORKSPACE, False) >= shape.m else 4


def clip(name: str, *, bars: tuple[Bar, ...] = (), kept: bool = False, compile: bool = True, **options) -> Workload:
    """CLIP's symmetric loss, gradients to both features and the scale."""
    shape = named(name)
    logits = 4 * shape.m * shape.n
    ours = partial(clip_loss, workspace=WORKSPACE)
    providers = {"fastcontrast": provider(lambda: ours, *ALL, memory=True)}
    if kept:
        many = partial(clip_loss, workspace=logits)
        providers["fastcontrast, 4N² bytes"] = provider(lambda: many, *ALL, floor="3 products", memory=True)
    # Rivals store the matrix, so that 3 products would do. Five of its size exist at once, measured.
    rival = partial(provider, memory=True, needs=6 * logits, floor="3 products" if kept else None)
    providers["open_clip.ClipLoss"] = rival(rivals.open_clip, *ALL)
    providers["dense torch"] = rival(lambda: dense_clip, *ALL)
    if compile:
        providers["dense torch, compiled"] = rival(lambda: rivals.compiled(dense_clip), *ALL, compiles=True)
    floors = floor(products(shape)) | (floor(3) if kept else {})
    return Workload(
        f"clip {shape.n}", shape, TINY, make_batch, partial(truth, "clip"), providers, floors, bars, **options
    )


def small_batch(name: str, compile: bool = True) -> Workload:
    """All logits fit into the workspace: the floor is 3 products."""
    shape = named(name)
    providers = {
        "fastcontrast": provider(lambda: clip_loss, *ALL),
        "dense torch": provider(lambda: dense_clip, *ALL),
    }
    if compile:
        providers["dense torch, compiled"] = provider(lambda: rivals.compiled(dense_clip), *ALL, compiles=True)
    label = f"clip, small {shape.n}"
    return Workload(label, shape, TINY, make_batch, partial(truth, "clip"), providers, floor(3), NEVER_SLOWER, reps=15)


def id_masks(name: str) -> Workload:
    shape = named(name)
    masked = Provider(with_ids, truth=partial(truth, "clip_ids"))
    providers = {"fastcontrast": provider(lambda: clip_loss, *ALL), "fastcontrast, ids": masked}
    bars, floors = (Bar("fastcontrast, ids", "fastcontrast", at_most=1.10),), floor(products(shape))
    return Workload(
        f"clip, id masks {shape.n}", shape, TINY, make_batch, partial(truth, "clip"), providers, floors, bars, reps=5
    )


def pre_training_65536() -> Workload:
    """Once, in its own process: minutes a step. Its floor is that of a sixteenth of the rows, 16 times."""
    shape = named("batch_65536")
    floors = {"4 products": Floor({"tiled": partial(tiled, 4, part=16)}, times=16)}
    bars = (Bar("fastcontrast", at_most=256 * MIB, what="peak_extra_bytes"),)
    providers = {"fastcontrast": provider(lambda: clip_loss, *ALL)}
    return Workload("clip 65536", shape, TINY, make_batch, partial(truth, "clip"), providers, floors, bars, alone=True)


def one_direction(name: str, bars: tuple[Bar, ...] = (), **options) -> Workload:
    """A mean over rows alone: gradients are formed a chunk of rows at a time, from logits that are still there."""
    shape = named(name)
    logits = 4 * shape.m * shape.n
    providers = {
        "fastcontrast": provider(lambda: info_nce, *ALL, memory=True),
        "dense torch": provider(lambda: dense_info_nce, *ALL, memory=True, needs=5 * logits),
    }
    exact = partial(truth, "info_nce")
    return Workload(f"info_nce {shape.n}", shape, TINY, make_batch, exact, providers, floor(3), bars, **options)


def frozen_keys(name: str, bars: tuple[Bar, ...] = (), **options) -> Workload:
    """One direction, keys without gradient: image towers under locked text, queues, classifiers of class names."""
    shape = named(name)
    providers = {
        "fastcontrast": provider(lambda: info_nce, "queries", "scale"),
        "dense torch": provider(lambda: dense_info_nce, "queries", "scale", needs=16 * shape.m * shape.n),
    }
    exact = partial(truth, "info_nce", keys=False)
    label = f"info_nce, keys frozen {shape.n}"
    return Workload(label, shape, TINY, make_batch, exact, providers, floor(2), bars, **options)


def views(shape: Shape, *others: str, scale: float = SCALE, **options) -> Workload:
    """NT-Xent; D = 128 is SimCLR's projection. All normalise, as the rivals do inside."""
    known = {
        "dense torch": lambda: dense_nt_xent,
        "lightly.NTXentLoss": lambda: rivals.lightly_nt_xent(scale),
        "pytorch_metric_learning.NTXentLoss": lambda: rivals.metric_learning_nt_xent(scale),
    }
    losses = {"fastcontrast": lambda: nt_xent_loss, **{name: known[name] for name in others}}
    make = partial(provider, normalise=True, scale=scale)
    providers = {name: make(loss, *PAIR) for name, loss in losses.items()}
    exact = partial(truth, "nt_xent", scale=False, normalise=True)
    label = f"nt_xent {shape.n} × {shape.d}"
    return Workload(label, shape, TINY, make_views, exact, providers, symmetric_floor(), **options)


def classes(shape: Shape, **options) -> Workload:
    """Supervised contrast, at the same scale for all."""
    providers = {
        "fastcontrast": supcon(lambda: partial(supcon_loss, scale=SCALE)),
        "dense torch": supcon(lambda: partial(dense_supcon, scale=SCALE)),
        "pytorch_metric_learning.SupConLoss": supcon(lambda: rivals.metric_learning_supcon(SCALE)),
    }
    exact = partial(truth, "supcon", scale=False, normalise=True, keys=False)
    label = f"supcon {shape.n} × {shape.d}"
    return Workload(label, shape, TINY, make_batch, exact, providers, symmetric_floor(views=False), **options)


def sentences(n: int) -> Workload:
    """Loss stage of cached text training, cosine at scale 20; all normalise, as sentence-transformers does inside."""
    make = partial(provider, normalise=True, scale=20.0)
    providers = {
        "fastcontrast": make(lambda: info_nce, *PAIR),
        "dense, un-chunked (GradCache)": make(lambda: dense_info_nce, *PAIR),
        "sentence-transformers, 512 rows": cached_stage(20.0, 512, reps=3),
        "sentence-transformers, 32 rows": cached_stage(20.0, 32, reps=1),
    }
    exact = partial(truth, "info_nce", at=20.0, scale=False, normalise=True)
    shape = Shape(f"sentences_{n}", n, n, 384)
    return Workload(
        f"cached loss stage {n} × 384", shape, TINY, make_batch, exact, providers, floor(products(shape)), reps=5
    )


def workloads(quick: bool) -> list[Workload]:
    three_rivals = ("dense torch", "lightly.NTXentLoss", "pytorch_metric_learning.NTXentLoss")
    few = views(Shape("views_256", 256, 256, 128), *three_rivals)  # metric learning's needs 8N³ floats
    chunks = _grad_cache.workload(quick)
    if quick:
        return [
            clip("batch_2048", kept=True, compile=False),
            *(small_batch(f"batch_{n}", compile=False) for n in (128, 1024)),
            id_masks("batch_2048"),
            one_direction("batch_2048"),
            frozen_keys("batch_2048"),
            few,
            classes(Shape("classes_1024", 1024, 1024, 128)),
            sentences(512),
            chunks,
        ]
    ours, kept = "fastcontrast", "fastcontrast, 4N² bytes"
    bars = (Bar(ours, "4 products", at_most=1.10), Bar(kept, "3 products", at_most=1.20), OPEN_CLIP)
    larger, sizes = Bar("open_clip.ClipLoss", ours, at_least=2.5), (128, 256, 512, 1024, 2048)
    return [
        clip("batch_8192", kept=True, bars=bars, reps=5),
        clip("batch_16384", compile=False, bars=(larger,), reps=3),
        *(small_batch(f"batch_{n}") for n in sizes),
        *(frozen_keys(f"batch_{n}", NEVER_SLOWER, reps=15) for n in sizes),
        *(views(named(f"batch_{n}"), "dense torch", bars=NEVER_SLOWER, reps=15) for n in sizes),
        *(classes(named(f"batch_{n}"), bars=NEVER_SLOWER, reps=15) for n in sizes),
        id_masks("batch_8192"),
        one_direction("batch_8192", (Bar(ours, "3 products", at_most=1.15),), reps=5),
        frozen_keys("batch_8192", (Bar(ours, "2 products", at_most=1.15),), reps=5),
        views(named("batch_8192"), reps=5),
        views(Shape("views_4096", 4096, 4096, 128), *three_rivals[:2], reps=5),
        few,
        classes(Shape("classes_4096", 4096, 4096, 128), reps=5),
        sentences(4096),
        chunks,
        pre_training_65536(),
    ]


measurements = {"import time": import_time}


def pytest_generate_tests(metafunc) -> None:
    _pytest.parametrise(metafunc, workloads)


def test_speed(benchmark, case) -> None:
    _pytest.measure(benchmark, case)
