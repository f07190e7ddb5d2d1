"""Runs the tests of the Triton kernels in Triton's interpreter, in processes of their own.

TRITON_INTERPRET=1 must be set before triton is imported, and no other test may see it. By hand:
`TRITON_INTERPRET=1 python -m pytest tests/test_kernels_similarity_lse.py`.
"""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize("path", sorted(TESTS.glob("test_kernels_*.py")), ids=lambda path: path.stem)
def test_in_the_interpreter(path):
    pytest.importorskip("triton")
    if tuple(map(int, version("triton").split(".")[:2])) < (3, 7):
        pytest.skip("the interpreter of Triton before 3.7 cannot loop with NumPy 2.4")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
