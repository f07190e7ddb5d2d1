"""Builds fastcontrast: the Python package, and a C++ core that needs pybind11 and a C++17 compiler, no torch headers.

`kernels/` and `benchmarks/` stand at the top of the repository and are installed inside the package, as
`fastcontrast.kernels` and `fastcontrast.benchmarks`. Without a compiler the install goes on and every operation runs
on its reference path; `fastcontrast doctor` then says so.
"""

import os
import platform
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

ROOT = Path(__file__).parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))

# No -ffast-math: the kernels' own exp vectorises without it, and -inf and NaN must keep their meaning.
compile_args = ["-O3", "-Wall", "-Wextra", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
link_args = []
if sys.platform == "linux":
    compile_args.append("-fopenmp")
    link_args.append("-fopenmp")
    if platform.machine() == "x86_64":
        compile_args.append("-mprefer-vector-width=512")
# `make sanitize` builds with FASTCONTRAST_SANITIZE=address,undefined
if sanitize := os.environ.get("FASTCONTRAST_SANITIZE"):
    # no-recover: undefined behaviour ends the run, and is not a line that scrolls by.
    compile_args += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
    compile_args.append("-DFASTCONTRAST_NO_CLONES")
    link_args.append(f"-fsanitize={sanitize}")

core = Pybind11Extension(
    "fastcontrast._C",
    SOURCES,
    depends=HEADERS,
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=compile_args,
    extra_link_args=link_args,
)
core.optional = True  # no compiler: a warning, and the reference path

setup(
    ext_modules=[core],
    cmdclass={"build_ext": build_ext},
    package_dir={"fastcontrast.kernels": "kernels", "fastcontrast.benchmarks": "benchmarks"},
)
