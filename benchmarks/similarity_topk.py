"""`similarity_topk`: retrieval and hard negatives, against one bare product, torch.topk of products, and faiss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.ops import similarity_topk
from fastcontrast.testing.shapes import Shape, named

from . import _pytest
from ._harness import Bar, Provider, Step, Workload
from ._products import floor
from ._rivals import need

MIB = 1 << 20
TINY = Shape("tiny", 256, 256, 32)
CHUNK = 1024


class Problem(NamedTuple):
    queries: Tensor  # [M, D]
    keys: Tensor  # [N, D]
    ids: Tensor  # [M]: a query's own key
    limit: Tensor  # [M]: what is nearer is taken for a false negative
    upstream: Tensor  # [M, 1]


def make_problem(shape: Shape) -> Problem:
    """Unit vectors; each query's own key has a cosine of about 0.45."""
    random = torch.Generator().manual_seed(0)
    q, noise = (F.normalize(torch.randn(rows, shape.d, generator=random), dim=1) for rows in (shape.m, shape.n))
    k = noise if shape.m != shape.n else F.normalize(q + 2 * noise, dim=1)
    ids = torch.arange(shape.m)
    return Problem(
        q.requires_grad_(), k.requires_grad_(), ids, torch.full((shape.m,), 0.2), 0.5 + torch.rand(shape.m, 1)
    )


# ----------------------------------------------------------------------------------------------------------- providers


def chunked(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    """The best of plain torch: a block of rows at a time, which also is all that fits at any size."""
    return torch.cat([torch.topk(block @ keys.T, k, dim=1).values for block in queries.split(CHUNK)])


def dense(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    return torch.topk(queries @ keys.T, k, dim=1).values


def ours(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    return similarity_topk(queries, keys, k)[0]


def semantic_search() -> Callable:
    search = need("sentence_transformers", "sentence-transformers").util.semantic_search

    def run(queries: Tensor, keys: Tensor, k: int) -> Tensor:
        from sentence_transformers.util import dot_score

        hits = search(queries, keys, top_k=k, score_function=dot_score)
        return torch.tensor([[hit["score"] for hit in row] for row in hits])

    return run


def faiss() -> Callable:
    """IndexFlatIP, whose index of the keys is a copy made in each step: it takes a thousandth of the time."""
    library = need("faiss", "faiss-cpu")
    library.omp_set_num_threads(torch.get_num_threads())

    def run(queries: Tensor, keys: Tensor, k: int) -> Tensor:
        index = library.IndexFlatIP(keys.shape[1])
        index.add(keys.numpy())
        return torch.from_numpy(index.search(queries.numpy(), k)[0])

    return run


def search(function: Callable[[], Callable], k: int, **options) -> Provider:
    def make(problem: Problem) -> Step:
        topk, q, keys = function(), problem.queries.detach(), problem.keys.detach()
        return lambda: (topk(q, keys, k),)

    return Provider(make, **options)


def search_truth(problem: Problem, k: int) -> tuple[Tensor, ...]:
    q, keys = problem.queries.detach().double(), problem.keys.detach().double()
    return (chunked(q, keys, k),)


def our_negatives(problem: Problem, k: int) -> Tensor:
    ids = {"query_ids": problem.ids, "key_ids": problem.ids}
    return similarity_topk(problem.queries, problem.keys, k, **ids, limit=problem.limit)[0]


def dense_negatives(problem: Problem, k: int) -> Tensor:
    products = problem.queries @ problem.keys.T
    dropped = (products > problem.limit[:, None]) | (problem.ids[:, None] == problem.ids)
    return products.masked_fill(dropped, -torch.inf).topk(k, dim=1).values


def mine(negatives: Callable, k: int, **options) -> Provider:
    """Values and the gradients of a weighted sum of them."""

    def make(problem: Problem) -> Step:
        def step() -> tuple[Tensor, ...]:
            values = negatives(problem, k)
            total = (values * problem.upstream).sum()
            return (values.detach(), *torch.autograd.grad(total, [problem.queries, problem.keys]))

        return step

    return Provider(make, **options)


def mine_truth(problem: Problem, k: int) -> tuple[Tensor, ...]:
    """On the selection of float32: gradients of two that differ by less than it rounds are both right."""
    q, keys = problem.queries.detach().double(), problem.keys.detach().double()
    ids = {"query_ids": problem.ids, "key_ids": problem.ids}
    _, index = similarity_topk(problem.queries, problem.keys, k, **ids, limit=problem.limit, implementation="torch")
    weights = problem.upstream.double().expand(index.shape)
    dq = torch.zeros_like(q).index_add_(
        0, problem.ids.repeat_interleave(k), keys[index.flatten()] * weights.reshape(-1, 1)
    )
    dk = torch.zeros_like(keys).index_add_(0, index.flatten(), (q[:, None] * weights[..., None]).flatten(0, 1))
    return ((q[:, None] * keys[index]).sum(2), dq, dk)


# ----------------------------------------------------------------------------------------------------------- workloads


def retrieval(shape: Shape, k: int, bars: tuple[Bar, ...] = (), **options) -> Workload:
    products = 4 * shape.m * shape.n
    providers = {
        "fastcontrast": search(lambda: ours, k, memory=True),
        "torch, rows in chunks": search(lambda: chunked, k, memory=True),
        "dense torch": search(lambda: dense, k, needs=2 * products, memory=True),
        "faiss.IndexFlatIP": search(faiss, k, memory=True),
        "sentence_transformers.semantic_search": search(semantic_search, k, reps=1),
    }
    label, exact = f"top {k} of {shape.n}", partial(search_truth, k=k)
    return Workload(label, shape, TINY, make_problem, exact, providers, floor(1), bars, **options)


def hard_negatives(name: str, k: int, bars: tuple[Bar, ...] = (), **options) -> Workload:
    """UniME's: not the row's own, nothing beyond the limit, with gradients."""
    shape = named(name)
    needs = 6 * 4 * shape.m * shape.n
    providers = {
        "fastcontrast": mine(our_negatives, k, memory=True),
        "dense torch": mine(dense_negatives, k, memory=True, needs=needs),
    }
    label, exact = f"{k} hard negatives of {shape.n}", partial(mine_truth, k=k)
    return Workload(label, shape, TINY, make_problem, exact, providers, floor(1), bars, **options)


def workloads(quick: bool) -> list[Workload]:
    if quick:
        return [retrieval(named("batch_2048"), 10), retrieval(named("batch_2048"), 90), hard_negatives("batch_1024", 8)]
    name, large = "fastcontrast", named("batch_16384")
    faster = (Bar("torch, rows in chunks", name, at_least=1.4), Bar("faiss.IndexFlatIP", name, at_least=1.0))
    memory = Bar(name, at_most=64 * MIB, what="peak_extra_bytes")
    return [
        retrieval(large, 10, (Bar(name, "1 product", at_most=1.2), *faster, memory), reps=5),
        retrieval(large, 90, (Bar(name, "1 product", at_most=1.3), *faster, memory), reps=5),
        hard_negatives("batch_1024", 8, (Bar(name, "dense torch", at_most=1.0),), reps=15),
        hard_negatives("batch_8192", 8, (Bar("dense torch", name, at_least=3.0),), reps=5),
    ]


def pytest_generate_tests(metafunc) -> None:
    _pytest.parametrise(metafunc, workloads)


def test_speed(benchmark, case) -> None:
    _pytest.measure(benchmark, case)
