"""All recipes: they are listed, read alike, and `docs/recipes.md` says what committed runs found."""

import ast
import importlib
import inspect
import json
import statistics
from pathlib import Path

import pytest

from fastcontrast import cli, recipes
from fastcontrast.recipes import RECIPES

ROOT = Path(__file__).parents[1]
FOLDER = Path(recipes.__file__).parent
RESULTS = ROOT / "benchmarks" / "results"
COMMANDS = ("__init__", "_list", "_train")


def row(name: str) -> str:
    """A recipe's line of the table: the first metric of every model of its committed run, in order; the last is the
    system."""
    run = json.loads((RESULTS / f"train_{name}.json").read_text())
    metric = next(iter(next(iter(run["models"].values()))["metrics"]))
    found = [f"{label} {model['metrics'][metric]:.3g}" for label, model in run["models"].items()]
    values = "; ".join([*found[:-1], f"**{found[-1]}**"])
    picture = f"[picture](../benchmarks/results/train_{name}.png)"
    return f"| `fastcontrast train {name}` | {metric} | {values} | {run['seconds']:.0f} s | {picture} |"


def costs() -> list[str]:
    """Lines of the second table: seconds and memory of each objective, ours, over the bare products, and dense."""
    found: dict[str, dict[str, dict]] = {}
    for line in json.loads((RESULTS / "recipes.json").read_text())["rows"]:
        found.setdefault(line["workload"], {})[line["provider"]] = line
    lines = []
    for workload, rows in found.items():
        ours, dense, compiled = (rows.get(name) for name in ("fastcontrast", "dense torch", "dense torch, compiled"))
        times = [f"{row['seconds']:.3g}" if row else "" for row in (ours, dense, compiled)]
        peaks = [row and row["peak_extra_bytes"] for row in (ours, dense)]
        memory = ["" if count is None else f"{count / 2**20:.0f}" for count in peaks]
        lines.append("| " + " | ".join([workload, times[0], f"{ours['ratio']:.2f}", *times[1:], *memory]) + " |")
    return lines


def test_the_list_names_them_all(capsys):
    assert cli.main(["recipes"]) == 0
    printed = capsys.readouterr().out
    for name, entry in RECIPES.items():
        assert f"\n{name} " in f"\n{printed}" and all(text in printed for text in entry)
    files = {path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_")}
    assert files == {*RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_they_read_alike(name):
    module = importlib.import_module(f"fastcontrast.recipes.{name}")
    assert str(inspect.signature(module.run)) == (
        "(steps: 'int | None' = None, *, output: 'str | os.PathLike' = 'train-output', seed: 'int' = 0, "
        "limit: 'int | None' = None) -> 'dict[str, Any]'"
    )
    assert "\nSource: " in module.__doc__ and "FAQ." in module.__doc__
    assert "run" in module.__all__ and all(hasattr(module, found) for found in module.__all__)
    arxiv = RECIPES[name].citation.rpartition(" ")[2]
    assert arxiv in module.__doc__, "docstring and list cite the same paper"


def test_the_median_recipe_is_short():
    assert statistics.median(len((FOLDER / f"{name}.py").read_text().splitlines()) for name in RECIPES) < 150


@pytest.mark.parametrize("name", RECIPES)
def test_the_table_says_what_the_committed_run_found(name):
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert row(name) in page
    assert (RESULTS / f"train_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_of_costs_says_what_the_committed_benchmark_measured():
    page = (ROOT / "docs" / "recipes.md").read_text()
    for line in costs():
        assert line in page
    rows = json.loads((RESULTS / "recipes.json").read_text())["rows"]
    missed = [(row["workload"], bar["value"]) for row in rows for bar in row["bars"] if bar["met"] is False]
    named = page.split("Missed in this run:")[1].strip().splitlines()
    for (workload, value), line in zip(missed, named, strict=True):
        assert line.startswith(f"- {workload}: {value:.3g} ")


@pytest.mark.parametrize("module", COMMANDS)
def test_the_commands_import_no_recipe_before_it_is_asked_for(module):
    imports = [node for node in ast.walk(ast.parse((FOLDER / f"{module}.py").read_text()))
               if isinstance(node, (ast.Import, ast.ImportFrom))]  # fmt: skip
    names = {alias.name for node in imports for alias in node.names}
    assert names <= {"annotations", "argparse", "importlib", "sys", "NamedTuple", "RECIPES", "MissingDataError"}
