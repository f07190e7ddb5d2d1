"""`fastcontrast recipes`: every recipe with its paper, the operations that it stands on, and its data."""

from __future__ import annotations

import argparse

from . import RECIPES


def configure(parser: argparse.ArgumentParser) -> None:
    """No options."""


def main(args: argparse.Namespace) -> int:
    """Prints the table; no recipe is imported for it."""
    for name, entry in RECIPES.items():
        lines = entry.title, entry.citation, f"stands on {entry.primitive}", f"trains on {entry.data}"
        print(f"{name:17s}" + f"\n{'':17s}".join(lines))
    print("\n`fastcontrast train NAME` runs one.")
    return 0
