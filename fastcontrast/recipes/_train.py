"""`fastcontrast train NAME`: runs a recipe on real data that ships inside packages."""

from __future__ import annotations

import argparse
import importlib
import sys

from fastcontrast.data import MissingDataError

from . import RECIPES


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("name", choices=RECIPES, help="which recipe; `fastcontrast recipes` lists them")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: the recipe's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, metavar="N", help="use about so many items of the data, for a quick look")
    parser.add_argument(
        "--output", metavar="DIR", default="train-output", help="folder for weights, picture and results"
    )


def main(args: argparse.Namespace) -> int:
    """Runs the recipe. Exit status: 2 if the options make no sense, 1 if a package is missing."""
    for option in ("steps", "limit"):
        if (number := getattr(args, option)) is not None and number < 1:
            print(f"fastcontrast train: --{option} must be at least 1, got {number}", file=sys.stderr)
            return 2
    try:
        recipe = importlib.import_module(f"fastcontrast.recipes.{args.name}")
        recipe.run(args.steps, output=args.output, seed=args.seed, limit=args.limit)
    except MissingDataError as error:
        print(f"fastcontrast train: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"fastcontrast train: the package {error.name} is missing; get it with `pip install -e '.[train]'`",
              file=sys.stderr)  # fmt: skip
        return 1
    return 0
