"""Builds fastcontrast: the Python package, and a C++ core that needs pybind11 and a C++17 compiler, no torch headers.

`kernels/` and `benchmarks/` stand at the top of the repository and are installed inside the package, as
`fastcontrast.kernels` and `fastcontrast.benchmarks`. Without a compiler the install goes on and every operation runs
on its reference path; `fastcontrast doctor` then says so. The CUDA kernels of `csrc/cuda` are a second extension, built
where nvcc is found (in CUDA_HOME or on the PATH) and FASTCONTRAST_CUDA is not 0; it needs neither a GPU nor a driver.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError

ROOT = Path(__file__).parent


def files(*patterns: str) -> list[str]:
    """Those of csrc that match, from the root."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


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
    files("*.cpp", "cpu/*.cpp"),
    depends=files("common/*.h", "cpu/*.h"),
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=compile_args,
    extra_link_args=link_args,
)
core.optional = True  # no compiler: a warning, and the reference path

# ------------------------------------------------------------------------------------------------------ CUDA kernels

NVCC_FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC", "-I", str(ROOT / "csrc")]
# sm_80 also as PTX, for chips that are newer than all of these.
for virtual, real in (("80", "[sm_80,compute_80]"), ("90a", "sm_90a"), ("100a", "sm_100a")):
    NVCC_FLAGS += ["-gencode", f"arch=compute_{virtual},code={real}"]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=Path(home, "bin")) if home else shutil.which("nvcc")


def reason_without_cuda() -> str | None:
    """Why the CUDA kernels are not built, or None."""
    if os.environ.get("FASTCONTRAST_CUDA") == "0":
        return "FASTCONTRAST_CUDA is 0"
    if sanitize:
        return "the sanitizers check the CPU core"
    if sys.platform != "linux":
        return f"they are built on linux, this is {sys.platform}"
    return None if find_nvcc() else "there is no nvcc in CUDA_HOME or on the PATH"


def run_nvcc(*arguments: str) -> str:
    """What nvcc says on its error stream."""
    done = subprocess.run([find_nvcc(), *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise CompileError(f"nvcc failed: {done.stderr[-3000:]}")
    return done.stderr


class Build(build_ext):
    def finalize_options(self):
        super().finalize_options()
        if reason_without_cuda():  # left out here, for a source archive has them in any case
            self.extensions = [extension for extension in self.extensions if extension is not kernels]

    def run(self):
        if reason := reason_without_cuda():
            print(f"fastcontrast: the CUDA kernels are left out, {reason}.")
        super().run()

    def build_extension(self, extension):
        if extension is kernels:
            extension.extra_objects = self.compile_kernels(files("cuda/*.cu"))
            # The toolkit's own libraries, wherever its nvcc keeps them.
            [settings] = re.findall("^#\\$ LIBRARIES=(.*)", run_nvcc("--dryrun", *files("cuda/*.cu")), re.MULTILINE)
            extension.library_dirs = re.findall('-L([^" ]+)', settings)
        super().build_extension(extension)

    def compile_kernels(self, sources: list[str]) -> list[str]:
        folder = Path(self.build_temp).resolve() / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        objects = [str(folder / f"{Path(source).stem}.o") for source in sources]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda source, target: run_nvcc(*NVCC_FLAGS, "-c", source, "-o", target), sources, objects))
        return objects


# The runtime is linked in, so that the module imports where there is no driver.
kernels = Pybind11Extension(
    "fastcontrast._CUDA",
    files("cuda/*.cpp"),
    depends=files("cuda/*.h", "cuda/*.cuh", "cuda/*.cu"),
    include_dirs=["csrc"],
    libraries=["cudart_static", "dl", "rt", "pthread"],
    cxx_std=17,
)
kernels.optional = True

ParallelCompile(default=os.cpu_count() or 1).install()
setup(
    ext_modules=[core, kernels],
    cmdclass={"build_ext": Build},
    package_dir={"fastcontrast.kernels": "kernels", "fastcontrast.benchmarks": "benchmarks"},
)
