"""The objective of every recipe at the sizes of its paper, against the dense form: one file each in `_recipes/`."""

from __future__ import annotations

import importlib
import pkgutil

from . import _pytest, _recipes
from ._harness import Workload


def workloads(quick: bool) -> list[Workload]:
    names = sorted(module.name for module in pkgutil.iter_modules(_recipes.__path__))
    files = [importlib.import_module(f"{_recipes.__name__}.{name}") for name in names]
    return [workload for file in files for workload in file.workloads(quick)]


def pytest_generate_tests(metafunc) -> None:
    _pytest.parametrise(metafunc, workloads)


def test_speed(benchmark, case) -> None:
    _pytest.measure(benchmark, case)
