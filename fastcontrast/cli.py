"""The command line: `fastcontrast COMMAND`. Each command is a module with `configure(parser)` and `main(args)`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": (
        "fastcontrast.demo.command",
        "train a CLIP from scratch on real data, its loss beside the dense one",
    ),
    "generate": (
        "fastcontrast.generation.command",
        "a small language model continues a text, contrastively or otherwise",
    ),
    "train": ("fastcontrast.recipes._train", "train a recipe on real data that ships inside packages"),
    "recipes": ("fastcontrast.recipes._list", "the recipes: papers, and the operations that they stand on"),
    "bench": ("fastcontrast.benchmarks._harness", "measure operations against floors and rivals"),
    "doctor": ("fastcontrast.doctor", "what would run here, and why not the rest"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its module is imported only then. Exit status: 0 if all went well."""
    lines = [f"  {name:10s}{text}" for name, (_, text) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="fastcontrast",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(lines) + "\n\n`fastcontrast COMMAND --help` lists a command's options.",
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("options", nargs=argparse.REMAINDER)
    chosen = parser.parse_args(argv)
    name, text = COMMANDS[chosen.command]
    module = importlib.import_module(name)
    options = argparse.ArgumentParser(prog=f"fastcontrast {chosen.command}", description=text)
    module.configure(options)
    return module.main(options.parse_args(chosen.options)) or 0


if __name__ == "__main__":
    sys.exit(main())
