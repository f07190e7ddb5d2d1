"""`fastcontrast demo`: train a CLIP from scratch in minutes, on real pairs; measure what it learned and cost.

Icons are drawn from fonts; a small CNN reads the glyph, a linear head reads frozen sentence features of the name; a
step sees thousands of pairs through `GradCache` and `ClipLoss`, in which equal names are no negatives of each other.
Then:

1. recall on names that training never saw, before and after;
2. seconds and memory, and the loss stage of one batch side by side: `clip_loss`, and the same loss with its matrix
stored;
3. weights, a picture, results as JSON, and five lines of Python that load the weights and ask them something.

`--nproc 2` trains on two processes of this machine: each encodes half of every batch, the loss is that of the whole.
`--data wordnet | docstrings` trains a hashed bag of words on text pairs instead, with the same measurements.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import textwrap
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastcontrast import data
from fastcontrast.distributed import world_size
from fastcontrast.towers import TwoTowers, encode

from . import ranks
from .loss_stage import compare_loss, peak_memory
from .picture import draw
from .recall import chance, evaluate
from .training import RECIPES, Recipe, batches, train


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's options."""
    parser.add_argument("--data", choices=sorted(RECIPES), default="icons", help="what to train on (default: icons)")
    parser.add_argument("--batch", type=int, default=4096, help="pairs a step (default: 4096)")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: " + _defaults("steps") + ")")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--nproc", type=int, default=1, help="processes that share a batch, by torchrun (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", metavar="DIR", default="demo-output", help="folder for weights, picture and results"
    )


def main(args: argparse.Namespace) -> int:
    """Runs the demo as the command line asks. Returns the exit status."""
    if args.nproc < 1:
        print(f"fastcontrast demo: --nproc must be at least 1, got {args.nproc}", file=sys.stderr)
        return 2
    if args.nproc > 1:
        return ranks.launch(args)
    try:
        with ranks.joined():
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
    On several ranks the first one measures, prints and writes; the others help it train, and return nothing.
    """
    began, began_cpu = time.perf_counter(), time.process_time()
    recipe = RECIPES[source]
    steps = recipe.steps if steps is None else steps
    if batch < 2 or steps < 1:
        raise ValueError(f"demo: batch must be at least 2 and steps at least 1, got {batch} and {steps}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    helps = dist.is_initialized() and dist.get_rank() > 0

    with ranks.first_rank_first():
        pairs = data.LOADERS[source](seed=seed) if pairs is None else pairs
        model = TwoTowers(source)
        items = model.prepare_items(pairs.items)
        names = model.prepare_names(pairs.names, cache=True, progress=True)
    model.fit_names(names[~pairs.unseen])
    model.to(device)
    if helps:
        train(model, items, names, pairs, recipe, batch=batch, steps=steps, seed=seed)
        return {}
    prepared = time.perf_counter()
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
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
        "processes": world_size(),
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


def query_lines(source: str, weights: Path, query: str) -> str:
    """The five lines of Python that load the weights and ask them for the best five of all items."""
    return (
        "from fastcontrast import data, towers\n"
        f"pairs = data.{source}()\n"
        f"model = towers.TwoTowers.load({str(weights)!r})\n"
        f"best = (model.names([{query!r}]) @ model.items(pairs.items).T).topk(5).indices[0]\n"
        "print([pairs.names[pairs.ids[i]] for i in best])\n"
    )


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
