"""Compiles every Triton kernel in every case of its table, and every CUDA C++ kernel, without a GPU: `make gate`.

    python tests/compile_gate.py [--arch 80 90 100] [--kernels NAME ...] [--only TEXT] [--json FILE] [--without-cuda]

Prints kernel × case × architecture with registers a thread, stack (where spilled registers go), shared memory and
whether the chip's matrix units are used; fails on a spill, on what does not fit the chip, on a half-precision product
that misses the matrix units of sm_90 (wgmma) or sm_100 (tcgen05), or on loads of single numbers where rows allow more.
Kernels are found in kernels/*.py: each file says with `compile_cases(capability)` what there is; and in csrc/cuda/*.cu,
where there is an nvcc.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

ARCHITECTURES = (80, 90, 100)
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a program may have
REGISTERS = 255
MATRIX_UNITS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
NARROW = r"ld\.global\S*\.[bu]16 "
PROCESSES = 2
CSRC = Path(__file__).parents[1] / "csrc"
CUDA_TARGETS = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}


@dataclass
class Compiled:
    kernel: str
    case: str
    architecture: int
    registers: int = 0
    stack: int = 0
    shared: int = 0
    matrix_units: str = ""
    narrow_loads: int = 0  # of 16 bits
    seconds: float = 0.0
    fault: str = ""


def modules() -> list[str]:
    """Those of fastcontrast.kernels that have something to compile."""
    package = importlib.import_module("fastcontrast.kernels")
    names = sorted(path.stem for path in Path(package.__path__[0]).glob("*.py"))
    names = [name for name in names if name != "__init__"]
    return [name for name in names if hasattr(_module(name), "compile_cases")]


def _module(name: str):
    return importlib.import_module(f"fastcontrast.kernels.{name}")


class NoDevice:
    """Stands for the driver, so that Triton binds arguments and compiles for an architecture that is not here."""

    def __init__(self, architecture: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # kernels compiled for different targets are different kernels

    def get_current_stream(self, device=None) -> int:
        return 0


def cases(name: str, architecture: int) -> list:
    from triton.runtime import driver

    driver.set_active(NoDevice(architecture))
    return list(_module(name).compile_cases(divmod(architecture, 10)))


def compile_case(name: str, index: int, architecture: int) -> Compiled:
    case = cases(name, architecture)[index]
    row = Compiled(name, case.name, architecture)
    start = time.monotonic()
    try:
        launch = case.launch
        compiled = launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.constants, **launch.options)
    except Exception as error:  # also ptxas, whose message is the whole program
        row.fault = f"does not compile: {type(error).__name__}: {str(error).strip()[-300:]}"
        return row
    finally:
        row.seconds = time.monotonic() - start
    row.registers, row.stack = resources(compiled.asm["cubin"])
    row.shared = compiled.metadata.shared
    unit = MATRIX_UNITS[architecture]
    row.matrix_units = unit.split(".")[0] if unit in compiled.asm["ptx"] else ""
    row.narrow_loads = len(re.findall(NARROW, compiled.asm["ptx"]))
    row.fault = fault(row, case.matrix_units, case.wide_loads)
    return row


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack of the only kernel, as the assembler wrote them down."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        [(_, registers, stack, _)] = usage(Path(file.name))
    return registers, stack


def usage(cubin: Path) -> list[tuple[str, int, int, int]]:
    """Name, registers a thread, bytes of stack and bytes of shared memory of each kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    if not found:
        raise RuntimeError(f"cuobjdump said nothing of registers: {text[:300]}")
    return [(name, *map(int, numbers)) for name, *numbers in found]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=Path(home, "bin")) if home else shutil.which("nvcc")


def compile_cuda(source: Path, architecture: int) -> list[Compiled]:
    """A row for each kernel of the file."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "out.cubin")
        command = [find_nvcc(), "-cubin", f"-arch={CUDA_TARGETS[architecture]}", "-O3", "-std=c++17"]
        command += ["--expt-relaxed-constexpr", "-I", str(CSRC), str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.monotonic() - start
        if done.returncode:
            said = f"does not compile: {done.stderr.strip()[-300:]}"
            return [Compiled(source.name, "", architecture, seconds=seconds, fault=said)]
        found = usage(cubin)
    rows = []
    for name, registers, stack, shared in found:
        row = Compiled(source.name, readable(name), architecture, registers, stack, shared, seconds=seconds)
        row.fault = fault(row, needs_matrix_units=False)
        rows.append(row)
    return sorted(rows, key=lambda row: row.case)


def readable(symbol: str) -> str:
    """`kernel<float, true>` for its mangled name, where there is a c++filt."""
    if (tool := shutil.which("c++filt")) is None:
        return symbol
    text = subprocess.run([tool, symbol], capture_output=True, text=True, check=True).stdout.strip()
    text = re.sub(r"fastcontrast::cuda::|\(anonymous namespace\)::|^void ", "", text)
    return re.sub(r"\(.*", "", text)


def run_cuda(architectures: list[int], only: str = "") -> list[Compiled]:
    jobs = [(source, architecture) for source in sorted((CSRC / "cuda").glob("*.cu")) for architecture in architectures]
    with ThreadPoolExecutor(PROCESSES) as pool:
        rows = [row for rows in pool.map(compile_cuda, *zip(*jobs, strict=True)) for row in rows]
    return [row for row in rows if only in f"{row.kernel} {row.case}"]


def fault(row: Compiled, needs_matrix_units: bool, needs_wide_loads: bool = False) -> str:
    if row.stack:
        return f"spills: {row.stack} bytes of stack"
    if row.registers > REGISTERS:
        return f"{row.registers} registers"
    if row.shared > SHARED[row.architecture]:
        return f"{row.shared} bytes of shared memory, the chip has {SHARED[row.architecture]}"
    if needs_matrix_units and not row.matrix_units:
        return f"no {MATRIX_UNITS[row.architecture]}"
    if needs_wide_loads and row.narrow_loads:
        return f"{row.narrow_loads} loads of single numbers"
    return ""


def run(architectures: list[int], kernels: list[str], only: str, processes: int = PROCESSES) -> list[Compiled]:
    jobs = []
    for name in kernels:
        for architecture in architectures:
            found = enumerate(cases(name, architecture))
            jobs += [(name, i, architecture) for i, case in found if only in f"{name} {case.name}"]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_case, *zip(*jobs, strict=True))) if jobs else []


def table(rows: list[Compiled]) -> str:
    lines = [("kernel", "case", "sm", "registers", "stack", "shared", "matrix units", "")]
    for row in rows:
        sizes = (str(row.registers), str(row.stack), f"{row.shared / 1024:.0f} KiB", row.matrix_units)
        lines.append((row.kernel, row.case, str(row.architecture), *sizes, row.fault and f"FAULT: {row.fault}"))
    widths = [max(len(line[i]) for line in lines) for i in range(7)]
    return "\n".join("  ".join([*map(str.ljust, line, widths), line[7]]).rstrip() for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="only these files of kernels/")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose kernel and name contain this")
    parser.add_argument("--without-cuda", action="store_true", help="Triton kernels alone")
    arguments = parser.parse_args()
    import triton

    with tempfile.TemporaryDirectory() as cache:
        # A cache of its own; and multiply-add fusion as the kernels are meant, whatever the version's default.
        os.environ.update(TRITON_CACHE_DIR=cache, TRITON_DEFAULT_FP_FUSION="1")
        rows = run(arguments.arch, arguments.kernels or modules(), arguments.only, arguments.processes)
    if not arguments.without_cuda and find_nvcc() is None:
        print("The CUDA C++ kernels are left out: there is no nvcc in CUDA_HOME or on the PATH.")
    elif not arguments.without_cuda:
        rows += run_cuda(arguments.arch, arguments.only)
    faults = [row for row in rows if row.fault]
    print(f"Triton {triton.__version__}\n{table(rows)}\n{len(rows)} kernels compiled, {len(faults)} faults")
    if arguments.json:
        record = {"triton": triton.__version__, "rows": [asdict(row) for row in rows]}
        Path(arguments.json).write_text(json.dumps(record, indent=1) + "\n")
    return 1 if faults or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
