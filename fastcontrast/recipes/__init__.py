"""Recipes: one paper a file, with its citation, its equation and the settings that make it.

A recipe is a module `fastcontrast.recipes.NAME` with `run(steps, output=..., seed=...)`, which trains or decodes on
real data that ships inside packages. This table is all that `fastcontrast recipes` reads: a recipe is imported when it
runs.
"""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """What the table says of a recipe."""

    title: str
    citation: str
    primitive: str  # the operations that it stands on


RECIPES = {
    "x_clip": Entry(
        "Expanding Language-Image Pretrained Models for General Video Recognition",
        "Ni et al. 2022, arXiv 2208.02816",
        "temporal_attention, and frame_attention with a message as extra key",
    ),
}
