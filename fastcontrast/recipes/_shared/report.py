"""What the runs of all recipes share: the training loop, and a report of models that had the same start.

report = Report("alip", output, seed=seed, steps=steps)
for label, loss in losses.items():
    model = towers()                                          # the same start
    with report.model(label) as found:                        # times it, and notes which implementations ran
        found.losses = train(label, steps, model, lambda i: loss(...), rate=1e-3)
        found.metrics = {"recall@1, %": ...}                  # the first is the one that the system claims
return report.close(model, draw)                              # prints the table; weights, picture, JSON
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastcontrast.demo.training import warm_up_then_cosine
from fastcontrast.figures import BLUE, GREEN, GREY, INK, ORANGE, figure, plain
from fastcontrast.ops import trace

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

COLOURS = (GREY, BLUE, ORANGE, GREEN, INK, "#9333ea")


@dataclass
class Found:
    """What became of one model."""

    metrics: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    implementations: dict[str, str] = field(default_factory=dict)


class Report:
    """Collects models, then prints, draws and saves. Raises ValueError where there is no step to do.

    Args:
        name: the recipe's; files are called `name.json`, `name.png` and `name.safetensors`.
        output: a folder, made if it is not there.
        settings: what the run was made with, for the JSON; `steps` and `seed` are among them.
    """

    def __init__(self, name: str, output: str | os.PathLike, *, steps: int, seed: int, **settings: Any):
        if steps < 1:
            raise ValueError(f"{name}: steps must be at least 1, got {steps}")
        self.name, self.folder = name, Path(output)
        self.settings = {"steps": steps, "seed": seed, **settings}
        self.models: dict[str, Found] = {}
        self.began = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def model(self, label: str) -> Iterator[Found]:
        """A model's `Found`, to be filled: losses and metrics."""
        found, began = Found(), time.perf_counter()
        with trace() as ran:
            yield found
        found.seconds = time.perf_counter() - began
        found.implementations = {choice.op: choice.implementation for choice in ran}
        self.models[label] = found

    def close(
        self, weights: nn.Module | None, draw: Callable[[SubFigure], None] | None = None, **more: Any
    ) -> dict[str, Any]:
        """Prints the table and writes the files: weights, the results as JSON, and a picture of losses and metrics;
        `draw` adds to it what there is to see. Returns the results. A system that only decodes has no weights."""
        self._print()
        kinds = ("png", "json") if weights is None else ("safetensors", "png", "json")
        paths = {kind: self.folder / f"{self.name}.{kind}" for kind in kinds}
        if weights is not None:
            from safetensors.torch import save_model

            save_model(weights, str(paths["safetensors"]), metadata={"fastcontrast": json.dumps(self.settings)})
        self._draw(paths["png"], draw)
        results = {
            "recipe": self.name, **self.settings, **more,
            "models": {label: vars(found) for label, found in self.models.items()},
            "threads": torch.get_num_threads(), "seconds": time.perf_counter() - self.began,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "machine": platform.machine(),
        }  # fmt: skip
        paths["json"].write_text(json.dumps(results, indent=1) + "\n")
        print(f"\n{results['seconds']:.0f} s in all", *paths.values(), sep="\n")
        return results

    def _print(self) -> None:
        wide = max(map(len, self.models))
        names = [*dict.fromkeys(name for found in self.models.values() for name in found.metrics)]
        print(f"\n{'':{wide}}" + "".join(f"  {name}" for name in names) + "  loss, first → last")
        for label, found in self.models.items():
            cells = [f"{found.metrics[n]:{len(n) + 2}.2f}" if n in found.metrics else " " * (len(n) + 2) for n in names]
            tail = found.losses[-10:]
            ends = f"  {found.losses[0]:.3f} → {sum(tail) / len(tail):.3f}" if tail else ""
            print(f"{label:{wide}}" + "".join(cells) + ends)

    def _draw(self, path: Path, draw: Callable[[SubFigure], None] | None) -> None:
        with figure(path, figsize=(12 if draw else 8, 4.6), dpi=130, layout="constrained") as whole:
            left, right = whole.subfigures(1, 2, width_ratios=(1, 2)) if draw else (whole, None)
            trained = any(found.losses for found in self.models.values())
            panels = left.subplots(*((2, 1) if draw else (1, 2)) if trained else (1, 1), squeeze=False).flat
            top, bottom = panels[0] if trained else None, panels[-1]
            headline = next(iter(next(iter(self.models.values())).metrics))
            for (label, found), colour in zip(self.models.items(), COLOURS, strict=False):
                if top:
                    top.plot(range(1, len(found.losses) + 1), found.losses, color=colour, label=label, linewidth=1)
                value = found.metrics.get(headline, math.nan)
                bar = bottom.barh(label, value, color=colour)
                bottom.bar_label(bar, [f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"], padding=3, fontsize=8)
            if top:
                top.set_xlabel("step")
                top.legend(frameon=False, fontsize=8)
                plain(top, "training loss")
            bottom.invert_yaxis()
            bottom.margins(x=0.15)
            plain(bottom, headline, grid="x")
            if draw:
                draw(right)


def train(
    label: str,
    steps: int,
    parameters: nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]],
    step: Callable[[int], Tensor | Iterable[Tensor]],
    *,
    rate: float,
    decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.98),
    clip: float | None = None,
    schedule: Callable[[int], float] | None = None,
    after: Callable[[int], None] | None = None,
) -> list[float]:
    """`steps` times: loss = step(i), its backward, AdamW, then after(i) (clamps, EMA, gates). Returns the losses.

    A step that yields several losses, whose sum counts, has the backward of each before it makes the next: it
    accumulates gradients in the memory of one. `schedule` gives the share of the rate at step i; by default it rises
    over the first steps and falls as a half cosine. Vectors and scalars do not decay; `clip` bounds the norm of the
    gradient. `parameters` may be in groups as optimisers take them, {"params": ..., "lr": ...}. Raises
    FloatingPointError at a loss that is not finite.
    """
    from tqdm import tqdm

    given = [*(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)]
    groups = []
    for group in given if isinstance(given[0], dict) else [{"params": given}]:
        learned = [p for p in group["params"] if p.requires_grad]
        for matrix in (True, False):
            some = [p for p in learned if (p.ndim > 1) == matrix]
            groups.append({**group, "params": some, "weight_decay": decay * matrix})
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=betas)
    share = schedule or (lambda i: warm_up_then_cosine(i, steps))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    losses: list[float] = []
    with tqdm(range(steps), desc=f"training {label}", unit="step") as bar:
        for i in bar:
            optimizer.zero_grad()
            parts, total = step(i), 0.0
            for loss in (parts,) if isinstance(parts, Tensor) else parts:
                loss.backward()
                total += loss.item()
            if clip is not None:
                nn.utils.clip_grad_norm_((p for group in groups for p in group["params"]), clip)
            optimizer.step()
            scheduler.step()
            if after is not None:
                after(i)
            losses.append(total)
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"{label}: the loss of step {i + 1} is {losses[-1]}")
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


class Scale(nn.Module):
    """s = exp(a), a learned: 1 / temperature. `clamp()` after each optimiser step keeps s in [1, largest]."""

    def __init__(self, first: float = 1 / 0.07, largest: float = 100.0):
        super().__init__()
        self.log = nn.Parameter(torch.tensor(math.log(first)))
        self.largest = largest

    def forward(self) -> Tensor:
        return self.log.exp()

    @torch.no_grad()
    def clamp(self, *_: Any) -> None:
        self.log.clamp_(0.0, math.log(self.largest))
