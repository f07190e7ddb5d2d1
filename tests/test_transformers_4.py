"""Tests that run models of transformers, once more with the oldest that is supported (4.57.6), in a process apart."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OLD = ROOT / "build" / "transformers-4.57"
FILES = ("test_contrastive_search.py", "test_two_logits.py", "test_measures.py", "test_few_rows.py", "test_siblings.py",
         "test_llama_layer.py", "test_integrations_transformers.py", "test_integrations_transformers_clip.py",
         "test_x_clip.py")  # fmt: skip


@pytest.mark.skipif(not OLD.exists(), reason="`make build/transformers-4.57` has not installed it")
def test_with_the_oldest_transformers():
    environment = {**os.environ, "PYTHONPATH": str(OLD)}
    version = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    said = subprocess.run(version, env=environment, capture_output=True, text=True)
    assert said.stdout.strip() == "4.57.6", said.stderr
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *(str(ROOT / "tests" / x) for x in FILES)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
