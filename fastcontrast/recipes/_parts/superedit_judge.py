"""How well a network edits icons that it has not seen: does the right instruction help it, and what does it draw?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcontrast.figures import GREY
from fastcontrast.ops.triplet_distances import triplet_distances

from .superedit_diffusion import Network, Schedule, guided
from .superedit_edits import Edits

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

TESTED, NOISES = 512, 4  # pairs, and noises of each
SHOWN, SAMPLING, TEXT_SCALE, IMAGE_SCALE = 8, 20, 3.0, 1.5


@torch.no_grad()
def judge(network: Network, edits: Edits, schedule: Schedule, seed: int) -> dict[str, float]:
    """Per cent of pairs and noises of which the right instruction predicts better than a wrong one, 50 by chance; and
    the error of the right one."""
    draws, distances = torch.Generator().manual_seed(seed), []
    for rows in NOISES * _some(edits, TESTED, seed).split(128):
        clean, image, *said = edits.of(rows, draws)
        noisy, t, target = schedule.draw(clean, draws)
        distances.append(triplet_distances(target, *(network(noisy, t, image, edits.texts[text]) for text in said)))
    near, far = (torch.cat(x) for x in zip(*distances, strict=True))
    return {"right instruction is better, %": 100 * (near < far).float().mean().item(), "error": near.mean().item()}


@torch.no_grad()
def edit(network: Network, edits: Edits, schedule: Schedule, rows: Tensor, seed: int) -> Tensor:
    """The network's edits of pairs' originals by the right instructions, [B, 32, 32] in [−1, 1], white on black."""
    image, text = edits.latents(edits.original[rows]), edits.texts[edits.right[rows]]
    null = edits.texts[:1].expand_as(text)

    def predict(z: Tensor, t: Tensor) -> Tensor:
        return guided(network, z, t, image, text, null, TEXT_SCALE, IMAGE_SCALE)

    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    return F.pixel_shuffle(schedule.sample(predict, noise, SAMPLING), 2)[:, 0]


def draw(panel: SubFigure, network: Network, edits: Edits, schedule: Schedule, seed: int) -> None:
    """Originals, instructions, true edits, and what the network draws."""
    rows = _some(edits, SHOWN, seed)
    given = (edits.glyphs[x[rows]] for x in (edits.original, edits.edited))
    lines = *given, edit(network, edits, schedule, rows, seed)
    axes = panel.subplots(len(lines), SHOWN, squeeze=False)
    for line, images, label in zip(axes, lines, ("original", "edited", "the network's"), strict=True):
        for ax in line:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        for ax, image in zip(line, images, strict=False):
            ax.imshow(image.numpy(), cmap="Greys")
        line[0].set_ylabel(label, fontsize=9, color=GREY)
    for ax, said in zip(axes[0], edits.right[rows].tolist(), strict=False):
        ax.set_title(edits.instructions[said], fontsize=8)


def _some(edits: Edits, count: int, seed: int) -> Tensor:
    return edits.test[torch.randperm(len(edits.test), generator=torch.Generator().manual_seed(seed))[:count]]
