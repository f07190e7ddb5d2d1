"""Runs the tests of the Triton kernels in Triton's interpreter, each file in a process of its own.

The interpreter is chosen by TRITON_INTERPRET=1 before triton is imported, and no other test may see it. To run one of
them by hand: `TRITON_INTERPRET=1 python -m pytest tests/test_kernels_similarity_lse.py`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(TESTS.glob("test_kernels_*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_in_the_interpreter(path):
    pytest.importorskip("triton")
    # Two threads of tiny operations wait for each other more than they work.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout) or re.search(r"\[100%\]", done.stdout)
    assert passed and "skipped" not in done.stdout, done.stdout[-2000:]
