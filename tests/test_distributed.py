"""Features that lie on several ranks."""

import pytest
import ranks
import torch

from fastcontrast import distributed as fd

SIZES = [(3,), (4, 4), (1, 4), (0, 3), (3, 3, 3), (5, 1, 2), (0, 2, 0)]


def _rows(rank: int, size: int) -> torch.Tensor:
    return torch.arange(2.0 * size).view(-1, 2) + 100 * rank


def _gathered(sizes):
    rank = torch.distributed.get_rank()
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
    for (every, gradient), expected in zip(
        ranks.run(len(sizes), _gathered, sizes), weights.split(list(sizes)), strict=True
    ):
        assert torch.equal(every, whole)
        assert torch.equal(gradient, total * expected)
