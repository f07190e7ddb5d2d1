"""What the tests of Triton kernels share: small tiles, chunks and panels, so that matrices of a hundred rows cross
every boundary that the real ones cross at ten thousand. They run in Triton's interpreter, on CPU tensors."""

import contextlib
import os
from unittest import mock

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    # It must be set before triton is imported, and no other test may see it.
    pytest.skip("TRITON_INTERPRET=1 is for a process of their own: see test_kernels.py", allow_module_level=True)

from fastcontrast.kernels import _common, _operands, similarity_lse, similarity_softplus
from fastcontrast.kernels._common import Config

from fastcontrast.ops import _device_sweep

TILE = Config(32, 32, 16, warps=4, stages=1, group=2, parts=2)


@contextlib.contextmanager
def tiles(config: Config = TILE, chunk: int = 32, workspace: int = 20_000, parts: int = 2_000):
    """Tiles of `config`, chunks of rows whose weights fit `workspace` bytes, panels whose parts fit `parts` bytes."""
    with (
        mock.patch.object(_common, "ladder", lambda *arguments: ((float("inf"), config),)),
        mock.patch.multiple(_device_sweep, CHUNK_ROWS=chunk, workspace_bytes=lambda *arguments: workspace),
        mock.patch.object(similarity_lse, "PARTS_BYTES", parts),
        mock.patch.object(similarity_softplus, "PARTS_BYTES", parts),
        mock.patch.object(_operands, "SLOTS", 4),
    ):
        yield
