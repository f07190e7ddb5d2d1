"""Everything that needs a CUDA device, in one run of under nine minutes: `make gpu`.

    python tests/gpu.py        on a machine with torch, Triton, pytest and this checkout; nothing is installed

Builds the package into build/gpu, runs `pytest -m gpu`, compute-sanitizer on small shapes, then
`fastcontrast bench --gpu` against the rivals that are there (those that are not are named). Tables, plots, JSON and a
summary go to the folder that FASTCONTRAST_GPU_OUTPUT names (default gpu-output). Every step runs, whatever became of
those before; the exit status says whether all went well.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "gpu"
OUTPUT = Path(os.environ.get("FASTCONTRAST_GPU_OUTPUT", "gpu-output")).resolve()
SECONDS = float(os.environ.get("FASTCONTRAST_GPU_SECONDS", 520))  # of the whole; benchmarks get what is left
LIMITS = {"build": 120, "tests": 300, "memory checker": 90}
TESTS = ("test_gpu.py", "test_gpu_attention.py")
SMALL = (
    "test_small_lse or test_small_softplus or test_small_topk or test_small_linear_kl or test_small_decoding"
    " or test_small_attention"
)


def commands(seconds_left: float) -> dict[str, list[str] | str]:
    """What each step runs; a sentence where it cannot."""
    python = sys.executable
    files = [str(ROOT / "tests" / name) for name in TESTS]
    tests = [python, "-m", "pytest", "-m", "gpu", *files, "-p", "no:cacheprovider"]
    checker = shutil.which("compute-sanitizer")
    memory: list[str] | str = "compute-sanitizer is not on the PATH"
    if checker:
        memory = [checker, "--tool", "memcheck", "--error-exitcode", "9", *tests, "-x", "-k", SMALL]
    bench = [python, "-m", "fastcontrast.cli", "bench", "--gpu", "--output", str(OUTPUT)]
    return {
        "build": [
            python,
            "setup.py",
            "-q",
            "build",
            "--build-lib",
            str(BUILD),
            "--build-temp",
            str(BUILD) + "-objects",
        ],
        "tests": tests,
        "memory checker": memory,
        "benchmarks": [*bench, "--seconds", f"{max(0.0, seconds_left - 45):.0f}"],
    }


def run(name: str, start: float) -> dict:
    """One step: its exit status, 124 if it ran out of time, and its seconds."""
    left = SECONDS - (time.monotonic() - start)
    command = commands(left)[name]
    if isinstance(command, str):
        print(f"== {name}: left out, {command}", flush=True)
        return {"status": None, "seconds": 0.0, "note": command}
    print(f"== {name}: {' '.join(command)}", flush=True)
    # The build comes first on the path, and the working folder holds no second copy of the package.
    environment = {**os.environ, "PYTHONPATH": str(BUILD), "PYTHONSAFEPATH": "1"}
    began = time.monotonic()
    try:
        folder = ROOT if name == "build" else OUTPUT
        limit = min(LIMITS.get(name, left), left) if left > 0 else 1
        status = subprocess.run(command, cwd=folder, env=environment, timeout=limit, check=False).returncode
    except subprocess.TimeoutExpired:
        status = 124
    return {"status": status, "seconds": round(time.monotonic() - began, 1)}


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print("torch sees no CUDA device: nothing was run", file=sys.stderr)
        return 2
    shutil.rmtree(BUILD, ignore_errors=True)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    done = {name: run(name, start) for name in commands(0.0)}
    summary = {"device": torch.cuda.get_device_name(), "seconds": round(time.monotonic() - start, 1), "steps": done}
    (OUTPUT / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    for name, result in done.items():
        status = result["status"]
        said = result.get("note") or (
            "passed" if status == 0 else "out of time" if status == 124 else f"status {status}"
        )
        print(f"{name:16s}{result['seconds']:7.1f} s  {said}")
    print(f"written to {OUTPUT}")
    return 0 if all(result["status"] in (0, None) for result in done.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
