"""`fastcontrast recipes`: every recipe with its paper and the operations that it stands on."""

from __future__ import annotations

import argparse

from . import RECIPES


def configure(parser: argparse.ArgumentParser) -> None:
    """No options."""


def main(args: argparse.Namespace) -> int:
    """Prints the table; no recipe is imported for it."""
    for name, entry in RECIPES.items():
        print(f"{name:16s}{entry.title}\n{'':16s}{entry.citation}\n{'':16s}stands on {entry.primitive}")
    print("\n`fastcontrast train NAME` runs one.")
    return 0
