"""`fastcontrast demo`: train a CLIP from scratch in minutes, on real pairs; measure what it learned and cost.

Icons are drawn from fonts; a small CNN reads the glyph, a linear head reads frozen sentence features of the name; a
step sees thousands of pairs through `GradCache` and `ClipLoss`, in which equal names are no negatives of each other.
Then:

1. recall on names that training never saw, before and after;
2. seconds and memory, and the loss stage of one batch side by side: `clip_loss`, and the same loss with its matrix
stored;
3. weights, a picture, results as JSON, and five lines of Python that load the weights and ask them something.

`--data wordnet | docstrings` trains a hashed bag of words on text pairs instead, with the same measurements.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import data
from .demo_picture import draw
from .grad_cache import GradCache
from .losses import ClipLoss, clip_loss
from .ops import trace
from .towers import TwoTowers, encode

CUTOFFS = (1, 10)


@dataclass(frozen=True)
class Recipe:
    """What one kind of pairs trains well with. Rates are peaks: linear warm-up, then a cosine to zero."""

    steps: int
    adam: float  # learning rate of AdamW: biases, norms, the scale, and tables of embeddings
    muon: float  # learning rate of Muon: matrices and convolutions
    scale: float  # first value of the learned 1 / temperature
    shift: int  # glyphs move by up to this many pixels
    chunk: int  # rows a tower sees at a time
    sides: tuple[str, str]  # what an item and a name are, in print
    queries: tuple[str, ...]  # free texts for the picture

    @property
    def ways(self) -> dict[str, str]:
        """Printed form of `recall`'s two directions."""
        item, name = self.sides
        return {"item_to_name": f"{item} → {name}", "name_to_item": f"{name} → {item}"}


# Few steps of a giant batch leave little room to converge: on the icons, 45 steps of Muon reach a recall@1 of 29 %
# where 45 of AdamW reach 13 %. Tables of embeddings have sparse gradients, for which Muon is not made.
RECIPES = {
    "icons": Recipe(
        steps=45, adam=4e-3, muon=0.05, scale=15.0, shift=2, chunk=1024, sides=("image", "text"),
        queries=("bad weather", "riding a bicycle", "pay the bill", "somebody is sleeping", "a phone call", "warning"),
    ),
    "wordnet": Recipe(
        steps=75, adam=4e-3, muon=0.0, scale=20.0, shift=0, chunk=4096, sides=("gloss", "words"),
        queries=("a large wild cat", "to move quickly on foot", "very happy"),
    ),
    "docstrings": Recipe(
        steps=20, adam=4e-3, muon=0.0, scale=20.0, shift=0, chunk=4096, sides=("code", "docstring"),
        queries=("delete a directory tree", "send an email", "parse a date"),
    ),
}  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's options."""
    parser.add_argument("--data", choices=sorted(RECIPES), default="icons", help="what to train on (default: icons)")
    parser.add_argument("--batch", type=int, default=4096, help="pairs a step (default: 4096)")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: " + _defaults("steps") + ")")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", metavar="DIR", default="demo-output", help="folder for weights, picture and results"
    )


def main(args: argparse.Namespace) -> int:
    """Runs the demo as the command line asks. Returns the exit status."""
    try:
        run(args.data, batch=args.batch, steps=args.steps, device=args.device, seed=args.seed, output=args.output)
    except data.MissingDataError as error:
        print(f"fastcontrast demo: {error}", file=sys.stderr)
        return 1
    return 0


def run(
    source: str = "icons",
    *,
    batch: int = 4096,
    steps: int | None = None,
    device: str | None = None,
    seed: int = 0,
    output: str | os.PathLike = "demo-output",
    pairs: data.Pairs | None = None,
) -> dict[str, Any]:
    """The whole demo. Writes into `output`, prints a report, returns the results that it also writes as JSON.

    `pairs` replaces the loader's, e.g. by a smaller set. Raises MissingDataError if a data package is not installed.
    """
    began, began_cpu = time.perf_counter(), time.process_time()
    recipe = RECIPES[source]
    steps = recipe.steps if steps is None else steps
    if batch < 2 or steps < 1:
        raise ValueError(f"demo: batch must be at least 2 and steps at least 1, got {batch} and {steps}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)

    pairs = data.LOADERS[source](seed=seed) if pairs is None else pairs
    model = TwoTowers(source)
    items, names = model.prepare_items(pairs.items), model.prepare_names(pairs.names, cache=True, progress=True)
    model.fit_names(names[~pairs.unseen])
    model.to(device)
    prepared = time.perf_counter()
    unseen = int(pairs.unseen.sum())
    print(f"{source}: {len(pairs.train):,} items to train on; {unseen:,} unseen names with {len(pairs.test):,} items")

    before = evaluate(model, items, names, pairs)
    started, started_cpu = time.perf_counter(), time.process_time()
    losses, scale = train(model, items, names, pairs, recipe, batch=batch, steps=steps, seed=seed)
    trained, trained_cpu = time.perf_counter(), time.process_time()
    after = evaluate(model, items, names, pairs)
    _print_recall(recipe, before, after, chance(pairs))

    rows = next(batches(pairs, batch, seed + 1))
    features = encode(model.item_tower, items[rows]), encode(model.name_tower, names[pairs.ids[rows]])
    stage = compare_loss(*features, scale, pairs.ids[rows], device)
    _print_stage(stage, batch)

    weights = folder / f"{source}.safetensors"
    model.cpu().save(weights)
    picture = folder / f"{source}.png"
    draw(picture, model, items, names, pairs, recipe.queries, recipe.ways, losses, before, after, seed)
    code = query_lines(source, weights, recipe.queries[0])
    results = {
        "data": source, "items": len(pairs), "names": len(pairs.names), "train_items": len(pairs.train),
        "unseen_names": unseen, "unseen_items": len(pairs.test),
        "batch": batch, "steps": steps, "seed": seed, "device": device, "threads": torch.get_num_threads(),
        "recipe": json.loads(json.dumps(asdict(recipe))),  # tuples as the lists that a reader of the file gets
        "recall_before": before, "recall_after": after, "recall_chance": chance(pairs),
        "losses": losses, "scale": scale, "loss_stage": stage,
        "seconds": {
            "data": prepared - began, "training": trained - started, "training_cpu": trained_cpu - started_cpu,
            "total": time.perf_counter() - began, "total_cpu": time.process_time() - began_cpu,
        },
        "peak_memory_mib": peak_memory(device), "code": code,
        "versions": {"python": platform.python_version(), "torch": torch.__version__}, "machine": platform.machine(),
    }  # fmt: skip
    (folder / f"{source}.json").write_text(json.dumps(results, indent=1) + "\n")
    seconds = results["seconds"]
    print(
        f"\n{seconds['total']:.0f} s in all, {seconds['training']:.0f} s of them training; "
        f"peak memory {results['peak_memory_mib']:,.0f} MiB\n{weights}\n{picture}\n{folder / f'{source}.json'}\n\n"
        f"Ask the trained towers:\n\n{textwrap.indent(code, '    ')}"
    )
    return results


def train(
    model: TwoTowers,
    items: Tensor,  # [N, ...]
    names: Tensor,  # [K, ...]
    pairs: data.Pairs,
    recipe: Recipe,
    *,
    batch: int,
    steps: int,
    seed: int,
) -> tuple[list[float], float]:
    """`steps` steps of `batch` pairs, in place. Returns the loss of every step, and the learned scale."""
    from tqdm import tqdm

    device = next(model.parameters()).device
    loss_fn = ClipLoss(recipe.scale, learnable=True).to(device)
    step = GradCache([model.item_tower, model.name_tower], recipe.chunk, loss_fn)
    optimizers = make_optimizers([*model.parameters(), *loss_fn.parameters()], recipe)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda i: warm_up_then_cosine(i, steps)) for o in optimizers]
    noise = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    model.train()
    with tqdm(
        zip(range(steps), batches(pairs, batch, seed), strict=False), total=steps, desc="training", unit="step"
    ) as bar:
        for _, rows in bar:
            ids = pairs.ids[rows]
            seen = shifted(items[rows], recipe.shift, noise)
            loss = step(seen.to(device), names[ids].to(device), ids=ids.to(device))
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses, min(loss_fn.log_scale.exp().item(), loss_fn.max_scale)


def make_optimizers(parameters: list[Tensor], recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for matrices (if the recipe gives it a rate), AdamW for the rest, without decay on vectors and scalars."""
    matrices = [p for p in parameters if p.dim() == 2]
    groups = [{"params": [p for p in parameters if p.dim() != 2], "weight_decay": 0.0}]
    if recipe.muon == 0:
        return [
            torch.optim.AdamW([*groups, {"params": matrices, "weight_decay": 0.0}], lr=recipe.adam, betas=(0.9, 0.95))
        ]
    return [
        torch.optim.AdamW(groups, lr=recipe.adam, betas=(0.9, 0.95)),
        torch.optim.Muon(matrices, lr=recipe.muon, momentum=0.9, weight_decay=0.05),
    ]


def warm_up_then_cosine(step: int, steps: int, warm_up: float = 0.15) -> float:
    """Share of the peak learning rate: linear over the first 15 % of steps, then a half cosine down to 2 %."""
    ramp = max(1, round(warm_up * steps))
    if step < ramp:
        return (step + 1) / ramp
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


def batches(pairs: data.Pairs, batch: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of item indices [batch]: seen names in random order, and for each a random one of its items.

    Going by name gives every name the same weight however many fonts draw it, and a batch hardly any pair to mask.
    """
    generator = torch.Generator().manual_seed(seed)
    train = pairs.train
    train = train[pairs.ids[train].argsort(stable=True)]  # items of one name side by side
    seen, count = pairs.ids[train].unique_consecutive(return_counts=True)
    first = count.cumsum(0) - count
    queue = torch.empty(0, dtype=torch.int64)
    while True:
        while len(queue) < batch:
            queue = torch.cat([queue, torch.randperm(len(seen), generator=generator)])
        chosen, queue = queue[:batch], queue[batch:]
        yield train[first[chosen] + (torch.rand(batch, generator=generator) * count[chosen]).long()]


def shifted(glyphs: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Glyphs [B, H, W], each moved by up to `most` pixels either way, black moving in; for 0 any input as it is."""
    if most == 0:
        return glyphs
    count, height, width = glyphs.shape
    padded = F.pad(glyphs, [most] * 4)
    y, x = torch.randint(0, 2 * most + 1, (2, count, 1), generator=generator)
    rows, columns = y + torch.arange(height), x + torch.arange(width)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def evaluate(model: TwoTowers, items: Tensor, names: Tensor, pairs: data.Pairs) -> dict[str, dict[str, float]]:
    """`recall` on the unseen names and all their items."""
    unseen = pairs.unseen.nonzero()[:, 0]
    labels = torch.searchsorted(unseen, pairs.ids[pairs.test])
    return recall(encode(model.item_tower, items[pairs.test]), encode(model.name_tower, names[unseen]), labels)


def recall(
    items: Tensor,  # [N, D]
    names: Tensor,  # [K, D]
    labels: Tensor,  # [N]
) -> dict[str, dict[str, float]]:
    """Share of queries with a right answer among the k most similar, k = 1 and 10; `names[labels[i]]` is item i's name.

    item -> name: all N items ask the K names. name -> item: the K names ask the N items, right if one of the first k
    carries the name. A wrong answer as similar as the best right one counts as ahead of it, so that equal features
    score nothing.

    Returns {"item_to_name": {"1": share, "10": share}, "name_to_item": …}.
    """
    similarity = items @ names.T  # [N, K]
    own = F.one_hot(labels, len(names)).bool()
    right = similarity.masked_fill(~own, -math.inf)
    wrong = similarity.masked_fill(own, -math.inf)
    ahead = {
        "item_to_name": (wrong >= right.amax(1, keepdim=True)).sum(1),
        "name_to_item": (wrong >= right.amax(0, keepdim=True)).sum(0),
    }
    return {way: {str(k): (rank < k).float().mean().item() for k in CUTOFFS} for way, rank in ahead.items()}


def chance(pairs: data.Pairs) -> dict[str, dict[str, float]]:
    """Recall of a random order: k / K for items; for names the mean of 1 − C(N − n, k) / C(N, k), n of N items
    right."""
    unseen = pairs.unseen.nonzero()[:, 0].tolist()
    counts = torch.bincount(pairs.ids, minlength=len(pairs.names)).tolist()
    total = len(pairs.test)

    def found(own: int, k: int) -> float:
        return 1 - math.comb(total - own, k) / math.comb(total, k)

    return {
        "item_to_name": {str(k): min(1.0, k / len(unseen)) for k in CUTOFFS},
        "name_to_item": {str(k): statistics.fmean(found(counts[i], k) for i in unseen) for k in CUTOFFS},
    }


def dense_loss(images: Tensor, texts: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    """`clip_loss` with the matrix stored: what one writes without a library."""
    logits = scale * images @ texts.T
    same = ids[:, None] == ids
    logits = logits.masked_fill(same.fill_diagonal_(False), -math.inf)
    target = torch.arange(len(ids), device=ids.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def our_loss(images: Tensor, texts: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    return clip_loss(images, texts, scale, ids=ids)


STAGES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {"ours": our_loss, "dense": dense_loss}


def compare_loss(
    images: Tensor, texts: Tensor, scale: float, ids: Tensor, device: str, repeats: int = 5
) -> dict[str, Any]:
    """Forward and backward of the symmetric loss on features [N, D], by `clip_loss` and densely.

    Milliseconds: median of `repeats`, both taking turns in this process. MiB: what the stage adds to the peak, from the
    allocator on CUDA, else from the operating system in a process of its own (see `measure_stage`). `loss`: both
    values; `gradient_difference`: ‖ours − dense‖ / ‖dense‖ over the features' gradients; `implementation`: of ours.
    """
    inputs = [images.to(device), texts.to(device), torch.tensor(scale, device=device), ids.to(device)]
    outcomes = {kind: _backward(loss, inputs) for kind, loss in STAGES.items()}  # also the warm-up
    times: dict[str, list[float]] = {kind: [] for kind in STAGES}
    for _ in range(repeats):
        for kind, loss in STAGES.items():
            _wait(device)
            begin = time.perf_counter()
            _backward(loss, inputs)
            _wait(device)
            times[kind].append(1e3 * (time.perf_counter() - begin))
    (_, ours), (_, dense) = outcomes["ours"], outcomes["dense"]
    result: dict[str, Any] = {
        kind: {"ms": statistics.median(times[kind]), "mib": _stage_memory(kind, inputs), "loss": outcomes[kind][0]}
        for kind in STAGES
    }
    with trace() as ran:
        our_loss(*inputs)
    difference = ((ours - dense).norm() / dense.norm()).item()
    return result | {"gradient_difference": difference, "implementation": ran[0].implementation}


def measure_stage(kind: str, path: str) -> float:
    """MiB that one stage adds to this process's peak memory, for the features in `path`.

    Meant for a fresh process: nothing freed earlier lies about to be used again unseen. A small stage runs first, so
    that threads and libraries are up. Then the peak is set back to what is resident now (Linux lets a process do so);
    elsewhere the peak so far is the start, which can only make the result too small.
    """
    from safetensors.torch import load_file

    held = load_file(path)
    inputs = [held[name] for name in ("images", "texts", "scale", "ids")]
    _backward(STAGES[kind], [x[:64] if x.dim() else x for x in inputs])
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    start = _peak_of_process()
    _backward(STAGES[kind], inputs)
    return _peak_of_process() - start


def query_lines(source: str, weights: Path, query: str) -> str:
    """The five lines of Python that load the weights and ask them for the best five of all items."""
    return (
        "from fastcontrast import data, towers\n"
        f"pairs = data.{source}()\n"
        f"model = towers.TwoTowers.load({str(weights)!r})\n"
        f"best = (model.names([{query!r}]) @ model.items(pairs.items).T).topk(5).indices[0]\n"
        "print([pairs.names[pairs.ids[i]] for i in best])\n"
    )


def peak_memory(device: str) -> float:
    """Peak memory in MiB: of the GPU on CUDA, else of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return _peak_of_process()


def _backward(loss: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[float, Tensor]:
    """Value, and the gradient of all features [2N, D]."""
    images, texts, scale = (x.detach().requires_grad_() for x in inputs[:3])
    value = loss(images, texts, scale, inputs[3])
    value.backward()
    return value.item(), torch.cat([images.grad, texts.grad])


def _stage_memory(kind: str, inputs: list[Tensor]) -> float:
    from safetensors.torch import save_file

    device = inputs[0].device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        _backward(STAGES[kind], inputs)
        return (torch.cuda.max_memory_allocated(device) - start) / 2**20
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "features.safetensors")
        save_file(
            {name: x.contiguous() for name, x in zip(("images", "texts", "scale", "ids"), inputs, strict=True)}, path
        )
        code = "import sys; from fastcontrast.demo import measure_stage; print(measure_stage(*sys.argv[1:]))"
        where = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            [sys.executable, "-c", code, kind, path], env=where, check=True, stdout=subprocess.PIPE, text=True
        )
    return float(done.stdout.split()[-1])


def _peak_of_process() -> float:
    """Peak resident memory of this process, MiB."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    except (OSError, IndexError):
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _defaults(field: str) -> str:
    return ", ".join(f"{getattr(recipe, field)} for {source}" for source, recipe in RECIPES.items())


def _print_recall(recipe: Recipe, before: dict, after: dict, by_chance: dict) -> None:
    print(f"\n{'recall on unseen names, %':<28}{'before':>8}{'after':>8}{'chance':>8}")
    for way in after:
        for k in after[way]:
            values = "".join(f"{100 * share[way][k]:8.1f}" for share in (before, after, by_chance))
            print(f"{recipe.ways[way]} @{k}".ljust(28) + values)


def _print_stage(stage: dict, batch: int) -> None:
    print(f"\n{f'loss stage, batch {batch:,}':<34}{'ms':>8}{'MiB':>8}{'loss':>10}")
    for kind, label in (("ours", f"fastcontrast.clip_loss, {stage['implementation']}"), ("dense", "matrix stored")):
        print(f"{label:<34}{stage[kind]['ms']:8.0f}{stage[kind]['mib']:8.0f}{stage[kind]['loss']:10.5f}")
    print(f"gradients differ by {stage['gradient_difference']:.1e} of their length")
