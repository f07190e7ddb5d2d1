"""The CUDA C++ kernels compile for every architecture without a spill, and are harmless where there is no device."""

import importlib
import os
import re
import runpy
from pathlib import Path

import compile_gate
import pytest
import torch

ROOT = Path(__file__).parents[1]
needs_nvcc = pytest.mark.skipif(compile_gate.find_nvcc() is None, reason="there is no nvcc")
without_device = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@needs_nvcc
def test_every_kernel_compiles_without_a_spill():
    pytest.importorskip("triton")  # for its cuobjdump
    rows = compile_gate.run_cuda([*compile_gate.ARCHITECTURES])
    assert [f"{row.kernel} {row.case} sm_{row.architecture}: {row.fault}" for row in rows if row.fault] == []
    for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
        names = re.findall(r"__global__[^;{]*?(\w+_kernel)\(", source.read_text())
        assert len(names) == source.read_text().count("__global__")
        for architecture in compile_gate.ARCHITECTURES:
            found = [row.case for row in rows if (row.kernel, row.architecture) == (source.name, architecture)]
            assert all(any(name in case for case in found) for name in names), found


@needs_nvcc
def test_a_spill_is_seen(tmp_path):
    pytest.importorskip("triton")
    source = tmp_path / "spill.cu"
    source.write_text("""
        __global__ void __launch_bounds__(1024, 2) spill(float* x) {  // 32 registers
            float kept[96];
        #pragma unroll
            for (int i = 0; i < 96; ++i) kept[i] = x[i * 1024 + threadIdx.x];
            __syncthreads();
        #pragma unroll
            for (int i = 0; i < 96; ++i) x[i * 1024 + threadIdx.x] = kept[95 - i] * kept[i];
        }
    """)
    [row] = compile_gate.compile_cuda(source, 90)
    assert row.stack and row.fault.startswith("spills:")


@needs_nvcc
def test_what_does_not_compile_is_a_fault(tmp_path):
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void wrong() { return 1; }")
    [row] = compile_gate.compile_cuda(source, 80)
    assert row.fault.startswith("does not compile:")


def built():
    if compile_gate.find_nvcc() is None or os.environ.get("FASTCONTRAST_CUDA") == "0":
        pytest.skip("the CUDA kernels are not built here")
    return importlib.import_module("fastcontrast._CUDA")  # which needs no driver


@without_device
def test_calls_without_a_device_return_an_error():
    native = built()
    cosines = native.Cosines(0, 0, 0, b=1, k=1, t=1, d=1, candidate_batch=1, candidate_row=1, context_batch=1,
                             context_row=1, dtype=0, multiprocessors=1)  # fmt: skip
    sizes = {"device": 0, "stream": 0}
    statuses = [
        native.probe(0),
        native.max_cosine(cosines, 0, 0, 0, **sizes),
        native.contrastive_candidates(0, 0, 0, 0, b=1, v=1, k=1, stride=1, splits=1, dtype=0, **sizes),
        native.contrastive_select(cosines, 0, 0, 0, 0, 0, alpha=0.5, **sizes),
        native.two_logit_mix(0, 0, 0, 0, 0, 0, 0, rows=1, v=1, stride1=1, stride0=1, keep=1.0, floor=0.0,
                             threshold=0.0, diverge=True, dtype=0, splits=1, **sizes),
    ]  # fmt: skip
    assert all(statuses)
    assert all(native.error_string(status) for status in statuses)


@pytest.mark.parametrize(
    ("b", "t"), [(1, 1), (1, 7), (1, 512), (1, 4096), (1, 1 << 20), (8, 4096), (400, 4096), (1, 0), (70_000, 3)]
)
def test_a_split_for_every_size(b, t):
    native = built()
    for k in (1, 4, 5, 100):
        for multiprocessors in (1, 108, 132):
            problem = native.Cosines(0, 0, 0, b, k, t, 768, k * 768, 768, t * 768, 768, 1, multiprocessors)
            splits = problem.workspace // (b * k)
            assert 1 <= splits <= max(1, (t + 3) // 4) + 1
            assert b * splits <= 2 * multiprocessors + 2 * b
            assert 1 <= native.row_splits(b, max(t, 1), 1, multiprocessors) <= max(1, 4 * multiprocessors // b)


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({"FASTCONTRAST_CUDA": "0"}, ["fastcontrast._C"]),
        ({"CUDA_HOME": "/nowhere"}, ["fastcontrast._C"]),
        ({"FASTCONTRAST_SANITIZE": "address"}, ["fastcontrast._C"]),
        pytest.param({}, ["fastcontrast._C", "fastcontrast._CUDA"], marks=needs_nvcc),
    ],
    ids=str,
)
def test_what_setup_builds(environment, names, monkeypatch):
    pytest.importorskip("pybind11")
    setuptools = pytest.importorskip("setuptools")
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
    for name in ("FASTCONTRAST_CUDA", "FASTCONTRAST_SANITIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    runpy.run_path(str(ROOT / "setup.py"))
    command = given["cmdclass"]["build_ext"](setuptools.Distribution({"ext_modules": [*given["ext_modules"]]}))
    command.finalize_options()
    assert [extension.name for extension in command.extensions] == names
    assert all(extension.optional for extension in given["ext_modules"])
    assert not any("cuda" in source for source in given["ext_modules"][0].sources)
