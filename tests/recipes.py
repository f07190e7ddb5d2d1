"""What the tests of all recipes share: the fixture of golden values, and checks that each recipe must pass."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytest import MonkeyPatch
from torch import Tensor, nn

from fastcontrast import cli
from fastcontrast.distributed import exchange
from fastcontrast.recipes._shared import icons, language
from fastcontrast.testing import ranks


def waves(n: int, d: int, c: int) -> Tensor:
    """G(n, d, c)[i, j] = sin(p·q + (c + 1)(0.7 p + 0.3 q)), p = i + 1, q = j + 1, of which golden values are known."""
    p, q = torch.arange(1, n + 1).double()[:, None], torch.arange(1, d + 1).double()
    return torch.sin(p * q + (c + 1) * (0.7 * p + 0.3 * q))


def unit(x: Tensor) -> Tensor:
    """Rows of length 1."""
    return x / x.norm(dim=-1, keepdim=True)


def close(value: Any, *expected: float, atol: float = 1e-8) -> None:
    """To the eight digits that golden values have; pass `atol` for float32."""
    value = value.detach().double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    value = value.reshape(-1)
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


def gradients(objective: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
    """The value, and the gradient to every leaf: zeros where none arrives."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    value = objective(*leaves)
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    return (value.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)))


def _share(objective: Callable, tensors: Sequence[Tensor], sizes: Sequence[int], how: str):
    """One rank's value, and what it adds to the gradient after the data-parallel mean."""
    torch.set_default_dtype(tensors[0].dtype)
    mine = [x.split(list(sizes))[dist.get_rank()].clone() for x in tensors]
    leaves = [x.requires_grad_() for x in mine if x.is_floating_point()]
    with exchange(how):
        value = objective(*mine)
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    pairs = zip(leaves, found, strict=True)
    return value.detach(), [torch.zeros_like(x) if g is None else g / len(sizes) for x, g in pairs]


def assert_ranks_equal_one(
    objective: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    how: str = "gather",
    tolerance: float = 1e-10,
) -> None:
    """`objective` (a function at the top of a module) of rows that lie on gloo ranks, `sizes` of them on each: value
    and gradients are those of one process. `tensors` have a row a sample; those of integers take no gradient."""
    floating = [x for x in tensors if x.is_floating_point()]

    def whole(*leaves: Tensor) -> Tensor:
        given = iter(leaves)
        return objective(*(next(given) if x.is_floating_point() else x for x in tensors))

    value, *expected = gradients(whole, *floating)
    shares = ranks.run(len(sizes), _share, objective, tensors, sizes, how)
    for found, _ in shares:
        torch.testing.assert_close(found.to(value.dtype), value, rtol=tolerance, atol=tolerance)
    for parts, g in zip(zip(*(found for _, found in shares), strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(parts), g, rtol=tolerance, atol=tolerance)


def assert_resumes(make: Callable[[], nn.Module], step: Callable[[nn.Module, int], Any]) -> None:
    """A module that goes on from a checkpoint does what it would have done without: `step(module, i)` gives tensors."""
    module = make()
    for i in range(2):
        step(module, i)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    again = make()
    again.load_state_dict(torch.load(file))
    torch.testing.assert_close(step(again, 2), step(module, 2), rtol=0, atol=0)


def train_a_little(
    name: str, folder: Path, monkeypatch: MonkeyPatch, *, steps: int = 2, weights: bool = True, **constants: Any
) -> dict[str, Any]:
    """Runs `fastcontrast train name` on some 300 items, with `constants` of the recipe's module, such as BATCH, in
    place of its own. All its files are written, `weights` among them; returns what its JSON says."""
    for constant, value in constants.items():
        monkeypatch.setattr(importlib.import_module(f"fastcontrast.recipes.{name}"), constant, value)
    monkeypatch.setattr(icons, "START_STEPS", 2)
    monkeypatch.setattr(icons, "START_BATCH", 64)
    for module in (icons, language):
        monkeypatch.setattr(module, "cache_folder", lambda: folder / "cache")  # such a start is of use to nobody else
    output = folder / "output"
    assert cli.main(["train", name, "--steps", str(steps), "--limit", "300", "--output", str(output)]) == 0
    kinds = {"json", "png", *(["safetensors"] if weights else [])}
    assert {path.name for path in output.iterdir()} == {f"{name}.{kind}" for kind in kinds}
    return json.loads((output / f"{name}.json").read_text())
