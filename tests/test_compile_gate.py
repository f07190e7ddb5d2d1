"""Every Triton kernel compiles without a spill: for sm_80 and sm_100 on the newest Triton, for sm_90 on the oldest.

`make gate` compiles for all three on both, and prints the tables. The oldest Triton lies in build/triton-3.6 (`make
test` puts it there), or where FASTCONTRAST_TRITON_OLD says.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import compile_gate
import pytest
from compile_gate import ARCHITECTURES, SHARED, Compiled, fault

ROOT = Path(__file__).parents[1]
OLDEST = Path(os.environ.get("FASTCONTRAST_TRITON_OLD", ROOT / "build" / "triton-3.6"))


# Half of the minutes each: the sweep of `similarity_lse`, and everything else.
HALVES = {"similarity_lse": lambda name: name == "similarity_lse", "the rest": lambda name: name != "similarity_lse"}


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("version", ["newest", "oldest"])
def test_every_kernel_compiles_and_fits(version, half, tmp_path):
    """Each architecture on one version, for they take minutes: sm_90 on the oldest, where there is one."""
    pytest.importorskip("triton")
    environment = {name: x for name, x in os.environ.items() if not name.startswith("TRITON")}
    there = (OLDEST / "triton").exists()
    if version == "oldest":
        if not there:
            pytest.skip(f"no Triton in {OLDEST}")
        environment["PYTHONPATH"] = str(OLDEST)
    architectures = {90} if version == "oldest" else {*ARCHITECTURES} - ({90} if there else set())
    kernels = [name for name in compile_gate.modules() if HALVES[half](name)]
    out = tmp_path / "gate.json"
    # The CUDA C++ kernels have a test of their own, and no version of Triton.
    command = [sys.executable, str(ROOT / "tests" / "compile_gate.py"), "--without-cuda", "--json", str(out)]
    command += ["--processes", "1", "--arch", *map(str, sorted(architectures)), "--kernels", *kernels]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert out.exists(), done.stderr[-3000:]
    found = json.loads(out.read_text())
    faults = [f"{row['kernel']} {row['case']} sm_{row['architecture']}: {row['fault']}" for row in found["rows"]]
    assert [text for text, row in zip(faults, found["rows"], strict=True) if row["fault"]] == []
    assert done.returncode == 0, done.stderr[-3000:]
    assert found["triton"].startswith("3.6") == (version == "oldest")
    for kernel in kernels:
        assert {row["architecture"] for row in found["rows"] if row["kernel"] == kernel} == architectures
    for architecture in architectures:
        assert any(row["matrix_units"] for row in found["rows"] if row["architecture"] == architecture), "no products"


def test_every_kernel_file_is_compiled():
    pytest.importorskip("triton")
    files = {path.stem for path in (ROOT / "kernels").glob("*.py")} - {"__init__", "_common", "_frames"}
    assert files <= {*compile_gate.modules()}


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ({"stack": 8}, "spills: 8 bytes of stack"),
        ({"registers": 256}, "256 registers"),
        ({"shared": SHARED[90] + 1}, "bytes of shared memory"),
        ({"matrix_units": ""}, "no wgmma.mma_async"),
        ({"narrow_loads": 3}, "3 loads of single numbers"),
        ({}, ""),
    ],
)
def test_what_counts_as_a_fault(measured, said):
    row = Compiled(
        "kernel", "case", 90, **{"registers": 255, "shared": SHARED[90], "matrix_units": "wgmma", **measured}
    )
    assert said in fault(row, needs_matrix_units=True, needs_wide_loads=True)
    assert bool(fault(row, needs_matrix_units=True, needs_wide_loads=True)) == bool(said)
