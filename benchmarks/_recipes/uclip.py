"""uCLIP: soft retrieval of a batch of 512 from a bank at width 512. The paper's bank has 2,000,000 rows: alone, since
the dense form's weights would be 4 GB, and the rows in float32 another 4."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.recipes.uclip import retrieve

from .._harness import Bar, Floor, Provider, Workload
from . import MIB, _bare, against_dense

CHUNK = 1 << 15


def inputs(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Queries, and a bank some of whose rows resemble them."""
    count, bank, width = shape
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(bank, width, generator=generator), dim=1)
    noise = F.normalize(torch.randn(count, width, generator=generator), dim=1)
    return F.normalize(rows[torch.randint(bank, (count,), generator=generator)] + noise, dim=1), rows


def dense(queries: Tensor, bank: Tensor) -> Tensor:
    return F.normalize((queries @ bank.T / 0.01).softmax(1) @ bank, dim=1)


def large_inputs(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The bank in float16, made in parts."""
    count, bank, width = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [min(CHUNK, bank - first) for first in range(0, bank, CHUNK)]
    rows = torch.empty(bank, width, dtype=torch.float16)
    for part, size in zip(rows.split(CHUNK), sizes, strict=True):
        part.copy_(F.normalize(torch.randn(size, width, generator=generator), dim=1))
    noise = F.normalize(torch.randn(count, width, generator=generator), dim=1)
    return F.normalize(rows[torch.randint(bank, (count,), generator=generator)].float() + noise, dim=1), rows


def truth(problem: tuple[Tensor, Tensor]) -> tuple[Tensor]:
    """In float64: no logit is above 100, and e^−200 is far from its smallest number."""
    queries, bank = problem
    total = torch.zeros(queries.shape, dtype=torch.float64)
    for part in bank.split(CHUNK):
        part = part.double()
        total += (queries.double() @ part.T / 0.01 - 100).exp() @ part
    return (total / total.norm(dim=1, keepdim=True),)


def large(shape: tuple[int, int, int]) -> Workload:
    count, bank, width = shape
    bare = _bare([(count, CHUNK, width, round(2 * bank / CHUNK))])
    providers = {"fastcontrast": Provider(lambda problem: lambda: (retrieve(*problem),), memory=1)}
    bars = (Bar("fastcontrast", at_most=256 * MIB, what="peak_extra_bytes"),)
    return Workload(
        f"uclip {count} × {bank}, float16", shape, (64, 3000, 32), large_inputs, truth, providers,
        {"products": Floor({"bare": lambda problem: bare})}, bars, alone=True,
    )  # fmt: skip


def workloads(quick: bool) -> list[Workload]:
    count, bank, width = shape = (64, 5000, 64) if quick else (512, 200_000, 512)
    bars = (Bar("dense torch", "fastcontrast", at_least=10.0, what="peak_extra_bytes"),)
    usual = against_dense(
        f"uclip {count} × {bank}", shape, (64, 3000, 32), inputs, retrieve, dense,
        products=[(count, bank, width, 2)], bars=() if quick else bars, needs=12 * count * bank, compile=not quick,
        truth=lambda queries, bank: truth((queries, bank))[0],
    )  # fmt: skip
    return [usual] if quick else [usual, large((512, 2_000_000, 512))]
