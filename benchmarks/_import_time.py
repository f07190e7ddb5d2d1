"""What `import fastcontrast` adds to `import torch`, in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys

from ._harness import Bar, Row

CODE = "import time, torch; start = time.perf_counter(); import fastcontrast; print(time.perf_counter() - start)"


def import_time(quick: bool, reps: int | None) -> list[Row]:
    row = Row("similarity_lse", "import, on top of torch", "fastcontrast")
    # The first process may find the files outside the page cache, and is not counted.
    row.timed([_seconds() for _ in range(1 + (reps or (2 if quick else 7)))][1:])
    row.judge(Bar("fastcontrast", at_most=0.2), row.seconds)
    return [row]


def _seconds() -> float:
    command = [sys.executable, "-c", CODE]
    # An environment may forbid to keep bytecode: then each process would compile our files, and torch's not.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return float(subprocess.run(command, env=kept, capture_output=True, text=True, check=True).stdout)
