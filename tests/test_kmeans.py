"""K-means against its definition in dense float64: ties, empty clusters, restarts, inertia, refusals."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from fastcontrast.kmeans import kmeans, nearest, segment_mean


def blobs(n: int = 300, d: int = 7, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    torch.manual_seed(0)
    return F.normalize(torch.randn(12, d)[torch.randint(12, (n,))] + 0.4 * torch.randn(n, d), dim=1).to(dtype)


def dense(x, first, iterations):
    """Lloyd's iterations over all distances, cluster by cluster; centroids, labels, inertia of each."""
    x, centroids, inertia = x.double(), x[first].double(), []
    for i in range(iterations + 1):
        distances = (x[:, None] - centroids).square().sum(2)
        labels = distances.argmin(1)
        inertia.append(distances.gather(1, labels[:, None]).sum())
        if i < iterations:
            means = [x[labels == k].mean(0) if (labels == k).any() else centroids[k] for k in range(len(first))]
            centroids = torch.stack(means)
    return centroids, labels, inertia


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_equals_dense_lloyd(dtype, tolerance):
    x = blobs(dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    starts = [torch.randperm(300, generator=generator)[:20] for _ in range(3)]
    results = [dense(x, first, 6) for first in starts]
    centroids, labels, inertia = min(results, key=lambda result: result[2][-1])
    assert len({float(result[2][-1]) for result in results}) == 3  # the choice between them is one
    found = kmeans(x, 20, iterations=6, seed=5)
    assert found.centroids.dtype == dtype and torch.equal(found.labels, labels)
    torch.testing.assert_close(found.centroids.double(), centroids, rtol=0, atol=tolerance)
    torch.testing.assert_close(found.inertia, inertia[-1], rtol=tolerance, atol=0)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-14), (torch.float32, 1e-7), (torch.bfloat16, 1e-7)])
def test_inertia_never_increases(dtype, rounding):
    x = blobs(dtype=dtype)
    inertia = [kmeans(x, 40, iterations=i, restarts=1).inertia.item() for i in range(12)]
    assert all(b <= a * (1 + rounding) for a, b in itertools.pairwise(inertia)) and inertia[-1] < inertia[0]


def test_converged_labels_are_of_the_returned_centroids():
    x = blobs(dtype=torch.float32)
    for iterations in (3, 100):  # before and after it stands still
        found = kmeans(x, 30, iterations=iterations)
        assert torch.equal(found.labels, nearest(x, found.centroids))
    torch.testing.assert_close(kmeans(x, 30, iterations=101), found, rtol=0, atol=0)
    assert not torch.equal(kmeans(x, 30, seed=1).labels, found.labels)


def test_ties_go_to_the_first_and_an_empty_cluster_stays():
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [-2.0, 0.0], [2.0, 0.0]])
    assert nearest(x, x[1:]).tolist() == [0, 0, 1, 0]
    same = torch.ones(5, 3)
    found = kmeans(same, 4)
    assert found.labels.tolist() == [0] * 5 and torch.equal(found.centroids, same[:4]) and found.inertia == 0


def test_as_many_clusters_as_rows_and_one():
    x = blobs(17, dtype=torch.float32)
    every = kmeans(x, 17)
    assert every.inertia == 0 and sorted(every.labels.tolist()) == list(range(17))  # each begins with a row of its own
    torch.testing.assert_close(kmeans(x, 1).centroids, x.mean(0, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_segment_mean(dtype):
    x, labels = blobs(9, 3, dtype), torch.tensor([3, 0, 3, 1, 1, 3, 0, 0, 5])
    means, counts = segment_mean(x, labels.int(), 7)
    assert counts.tolist() == [3, 2, 0, 3, 0, 1, 0] and not means[counts == 0].any()
    for k in (0, 1, 3, 5):
        torch.testing.assert_close(means[k], x[labels == k].to(means.dtype).mean(0))


@pytest.mark.parametrize(
    ("x", "settings", "message"),
    [
        (torch.ones(5, 2), {"k": 6}, r"kmeans: k must lie in \[1, 5\], the number of rows, got 6"),
        (torch.ones(5, 2), {"k": 0}, r"kmeans: k must lie in \[1, 5\], the number of rows, got 0"),
        (torch.ones(5, 2), {"k": 2, "restarts": 0}, "kmeans: restarts must be at least 1, got 0"),
        (torch.ones(5, 2), {"k": 2, "iterations": -1}, "kmeans: iterations must be at least 0, got -1"),
        (torch.tensor([[1.0], [math.nan]]), {"k": 1}, "kmeans: x must be finite"),
        (torch.ones(5), {"k": 1}, "kmeans: x must be a matrix .* got"),
    ],
)
def test_refusals(x, settings, message):
    with pytest.raises(ValueError, match=message):
        kmeans(x, **settings)
    with pytest.raises(ValueError, match=r"segment_mean: labels must lie in \[0, 2\)"):
        segment_mean(torch.ones(3, 1), torch.tensor([0, -1, 1]), 2)
