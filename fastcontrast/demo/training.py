"""How the demo trains: GradCache, ClipLoss with names that mask their equals, Muon, and a schedule for few steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastcontrast.data import Pairs
from fastcontrast.distributed import world_size
from fastcontrast.grad_cache import GradCache
from fastcontrast.losses import ClipLoss, DistributedLoss
from fastcontrast.towers import TwoTowers


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


def train(
    model: TwoTowers,
    items: Tensor,  # [N, ...]
    names: Tensor,  # [K, ...]
    pairs: Pairs,
    recipe: Recipe,
    *,
    batch: int,
    steps: int,
    seed: int,
) -> tuple[list[float], float]:
    """`steps` steps of `batch` pairs, in place. Returns the loss of every step, and the learned scale.

    On several ranks each encodes its share of a batch, and all of them end with the weights of one process that
    encodes all, to rounding: no tower mixes rows, and what is random is drawn for the whole batch.
    """
    from tqdm import tqdm

    device = next(model.parameters()).device
    loss_fn = DistributedLoss(ClipLoss(recipe.scale, learnable=True)).to(device)
    towers: list[nn.Module] = [model.item_tower, model.name_tower]
    world, rank = world_size(), 0
    if world > 1:
        rank = dist.get_rank()
        towers = [nn.parallel.DistributedDataParallel(tower) for tower in towers]
    step = GradCache(towers, recipe.chunk, loss_fn)
    optimizers = make_optimizers([*model.parameters(), *loss_fn.parameters()], recipe)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda i: warm_up_then_cosine(i, steps)) for o in optimizers]
    noise = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    model.train()
    with tqdm(
        zip(range(steps), batches(pairs, batch, seed), strict=False),
        total=steps,
        desc="training",
        unit="step",
    ) as bar:
        for _, rows in bar:
            seen = shifted(items[rows], recipe.shift, noise).tensor_split(world)[rank]
            ids = pairs.ids[rows].tensor_split(world)[rank]
            loss = step(seen.to(device), names[ids].to(device), ids=ids.to(device))
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses, min(loss_fn.loss.scale.item(), loss_fn.loss.max_scale)


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


def batches(pairs: Pairs, batch: int, seed: int) -> Iterator[Tensor]:
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
