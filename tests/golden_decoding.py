"""F(n, d, c)[i, k] = sin(1 + c + 0.7 i + 1.3 k + 0.11 i k), float64: what the golden values are of."""

import torch


def F(n: int, d: int, c: float) -> torch.Tensor:
    i, k = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    return torch.sin(1 + c + 0.7 * i + 1.3 * k + 0.11 * i * k)
