"""What keeping K of C graphs saves: `python -m fastcontrast.benchmarks.grad_cache`.

The line to hold: (3 + (C − K)/C) / 4 of a step that keeps none, where backward costs two forwards. Wide square layers
are that case: every product of the forward has two of its size in the backward, and activations cost little beside
them (at width 1024 the page faults of keeping 100 MB already cost 5 points). Ratios are taken within a round, and the
table shows medians. `cpu ratio` is of processor time on one thread: what else runs on the machine hardly moves it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcontrast import GradCache

from ._harness import Row

WIDTH, DEPTH, CHUNK, CHUNKS = 2048, 3, 256, 8
KEEP = (0, 2, 4, 6, 8)


class Counted(nn.Sequential):
    """An MLP that knows how many times it ran."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def info_nce(reps: Tensor) -> Tensor:
    """Neighbouring rows are pairs. Small against the encoder, as it is in training."""
    q, k = F.normalize(reps, dim=-1).view(-1, 2, reps.shape[-1]).unbind(1)
    return F.cross_entropy(20.0 * q @ k.T, torch.arange(len(q), device=reps.device))


def measure(rounds: int = 5, device: str = "cpu", width: int = WIDTH) -> list[dict[str, Any]]:
    """One row a number of kept graphs, and one for the whole batch at once; gradients are checked before any timing."""
    torch.manual_seed(0)
    # Inputs as wide as the layers, and a first layer that passes a gradient on, so that backward is two forwards.
    layers = [part for _ in range(DEPTH) for part in (nn.Linear(width, width, bias=False), nn.ReLU(inplace=True))][:-1]
    model = Counted(*layers).to(device)
    x = torch.randn(CHUNK * CHUNKS, width, device=device, requires_grad=True)
    caches = {keep: GradCache([model], CHUNK, info_nce, keep_graphs=keep) for keep in KEEP}
    steps: dict[int | None, Callable[[], Any]] = {k: lambda c=c: c(x) for k, c in caches.items()}
    steps[None] = lambda: info_nce(model(x)).backward()
    truth = _gradients(model, x, steps[None])
    rows = []
    for keep, step in steps.items():
        model.calls = 0
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(_gradients(model, x, step), truth, strict=True)]
        if not max(errors) < 1e-5:
            raise AssertionError(f"grad_cache: gradients with keep_graphs={keep} differ by {max(errors):.1e}")
        line = 0.75 if keep is None else (3 + (CHUNKS - keep) / CHUNKS) / 4
        rows.append({"keep": keep, "of": CHUNKS, "line": line, "forwards": model.calls, "error": max(errors)})
    times = [{keep: _time(step, device) for keep, step in steps.items()} for _ in range(rounds)]
    for row in rows:
        wall, processor = zip(*(t[row["keep"]] for t in times), strict=True)
        row["times"], row["seconds"] = wall, statistics.median(wall)
        row["ratio"] = statistics.median(a / t[0][0] for a, t in zip(wall, times, strict=True))
        row["cpu_ratio"] = statistics.median(a / t[0][1] for a, t in zip(processor, times, strict=True))
    return rows


def rows(quick: bool, reps: int | None) -> list[Row]:
    """For `fastcontrast bench`. A row's floor is its line: `line` times the seconds of the step that keeps none."""
    width = WIDTH // 2 if quick else WIDTH
    measured = measure(reps or (2 if quick else 5), width=width)
    result = []
    for found in measured:
        kept = "whole batch at once" if found["keep"] is None else f"fastcontrast, {found['keep']} of {CHUNKS} kept"
        row = Row("grad_cache", f"MLP {DEPTH} × {width}, {CHUNKS} × {CHUNK}", kept)
        row.timed(found["times"])
        row.ratio, row.error = found["ratio"] / found["line"], found["error"]
        row.floor, row.floor_seconds = f"{found['line']:.3f} of 0 kept", row.seconds / row.ratio
        row.note = f"{found['forwards']} forwards; {100 * (found['ratio'] - found['line']):+.1f} points off the line"
        result.append(row)
    return result


def _gradients(model: nn.Module, x: Tensor, step: Callable[[], Any]) -> list[Tensor]:
    leaves = [x, *model.parameters()]
    for leaf in leaves:
        leaf.grad = None
    step()
    return [leaf.grad.clone() for leaf in leaves]


def _time(step: Callable[[], Any], device: str) -> tuple[float, float]:
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start, start_cpu = time.perf_counter(), time.process_time()
    step()
    synchronize()
    return time.perf_counter() - start, time.process_time() - start_cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"MLP {DEPTH} x {WIDTH}, {CHUNKS} chunks of {CHUNK}, {args.device}, medians of {args.rounds} rounds")
    print("| graphs kept | forwards | seconds | ratio | cpu ratio | line | gradient error |")
    print("|---|---|---|---|---|---|---|")
    for row in measure(args.rounds, args.device):
        kept = "whole batch" if row["keep"] is None else f"{row['keep']} of {row['of']}"
        print(
            f"| {kept} | {row['forwards']} | {row['seconds']:.3f} | {row['ratio']:.3f} | {row['cpu_ratio']:.3f} "
            f"| {row['line']:.3f} | {row['error']:.0e} |"
        )


if __name__ == "__main__":
    main()
