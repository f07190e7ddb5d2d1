"""The picture is tested too: imports point down, importing is cheap and loads nothing it should not, an operation has
its files."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastcontrast.ops import explain, operations
from fastcontrast.ops._dispatch import runs_through

ROOT = Path(__file__).parents[1]
FOLDERS = {"fastcontrast": ROOT / "fastcontrast", "fastcontrast.kernels": ROOT / "kernels"}

# From the bottom up. A module imports from its own layer and below. Private helpers at the root stand with grad_cache;
# a name not listed (the command line, the demo, a recipe) is at the top. `testing` is beside: see below.
LAYERS = (
    {"_C", "_CUDA", "kernels"},
    {"ops"},
    {"grad_cache", "distributed", "memory", "ema"},
    {"losses", "attention", "decoding"},
)
HELPERS, TOP = 2, len(LAYERS)


def layer(module: str) -> int:
    _, _, inside = module.partition(".")
    part = inside.split(".")[0]
    default = HELPERS if part.startswith("_") else TOP
    return next((height for height, names in enumerate(LAYERS) if part in names), default)


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


def imports(module: str, path: Path) -> set[str]:
    """Absolute names of what a module imports, at its top or inside a function."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])]
                )
            # `from fastcontrast import _C` imports fastcontrast._C: the name itself may be a module.
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "fastcontrast" else {base}
    return found


MODULES = modules()


def test_the_walk_finds_modules_and_relative_imports():
    assert {"fastcontrast", "fastcontrast.ops._dispatch", "fastcontrast.losses.clip", "fastcontrast.kernels"} <= {
        *MODULES
    }
    assert "fastcontrast.ops._dispatch" in imports("fastcontrast.ops._sweep", MODULES["fastcontrast.ops._sweep"])
    assert "fastcontrast._C" in imports("fastcontrast.ops._dispatch", MODULES["fastcontrast.ops._dispatch"])
    assert (
        layer("fastcontrast._C") < layer("fastcontrast.ops.x") < layer("fastcontrast.losses.x") < layer("fastcontrast")
    )


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("fastcontrast.testing")])
def test_imports_point_down(module):
    for imported in imports(module, MODULES[module]):
        if imported.split(".")[0] == "fastcontrast":
            assert layer(imported) <= layer(module), f"{module} imports {imported} from a layer above"


def test_operations_do_not_know_each_other_through_dispatch():
    for module in ("_dispatch", "_precision"):
        for imported in imports(f"fastcontrast.ops.{module}", MODULES[f"fastcontrast.ops.{module}"]):
            assert not imported.startswith("fastcontrast.ops"), imported


def test_kernels_are_never_imported_bare():
    """Another package owns the name `kernels`, and a bare import makes a second copy."""
    for module, path in MODULES.items():
        assert not {name for name in imports(module, path) if name.split(".")[0] == "kernels"}, module


def test_testing_imports_only_torch():
    for module, path in MODULES.items():
        if module.startswith("fastcontrast.testing"):
            outside = {
                name.split(".")[0] for name in imports(module, path) if not name.startswith("fastcontrast.testing")
            }
            assert outside <= {"torch", *sys.stdlib_module_names}, module


@pytest.mark.parametrize("op", operations())
def test_an_operation_has_its_files(op):
    expected = [f"fastcontrast/ops/{op}.py", f"tests/test_{op}.py", f"benchmarks/{op}.py"]
    by_implementation = {"cpu": f"csrc/cpu/{op}.cpp", "triton": f"kernels/{op}.py", "cuda": f"csrc/cuda/{op}.cu"}
    if runs_through(op) is None:
        expected += [by_implementation[name] for name in explain(op) if name in by_implementation]
    assert [path for path in expected if not (ROOT / path).exists()] == []


# ------------------------------------------------------------------------------------------------------- a bare import

FORBIDDEN = {
    "triton", "transformers", "sentence_transformers", "open_clip", "lightning", "pytorch_lightning", "torchvision",
    "PIL", "matplotlib", "tqdm", "scipy", "sklearn", "pandas", "safetensors", "hypothesis", "pytest",
    "diffusers", "av",
}  # fmt: skip

IMPORT = """
import json, sys, time
begin = time.process_time()
import torch
tiny = float("1e-310")
before, start = set(sys.modules), time.process_time()
import fastcontrast
seconds = {"torch": start - begin, "ours": time.process_time() - start}
import fastcontrast.ops
small = torch.tensor([1e-310], dtype=torch.float64)
q = torch.randn(300, 8, requires_grad=True)
fastcontrast.ops.similarity_lse(q, q).sum().backward()
kept = [tiny * 0.5, float(small * 0.5), float((small.expand(1 << 17) * 0.5).min())]
print(json.dumps({"seconds": seconds, "modules": sorted(set(sys.modules) - before), "denormals": kept}))
"""


@pytest.fixture(scope="module")
def fresh_imports() -> list[dict]:
    """What three fresh interpreters say. Processor time, so that other processes on the machine do not count; and with
    bytecode, which an environment may forbid to keep: compiling our files in each process would take as long again."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def run() -> dict:
        command = [sys.executable, "-c", IMPORT]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return [run() for _ in range(3)]


def test_importing_adds_less_than_a_seventh_of_torch_itself(fresh_imports):
    """That is a fifth of a second where torch takes 1.4 s, on a machine of any speed."""
    ours, torch = (min(run["seconds"][name] for run in fresh_imports) for name in ("ours", "torch"))
    assert ours < torch / 7


def test_importing_loads_no_backend_and_no_framework(fresh_imports):
    loaded = {name.split(".")[0] for name in fresh_imports[0]["modules"]}
    assert "fastcontrast" in loaded
    assert loaded & FORBIDDEN == set()
    assert not [name for name in fresh_imports[0]["modules"] if name.startswith(("torch._dynamo", "torch._inductor"))]


def test_the_native_core_leaves_denormals_alone(fresh_imports):
    """A library linked with -ffast-math switches them off for the whole process."""
    assert "fastcontrast._C" in fresh_imports[0]["modules"]
    assert fresh_imports[0]["denormals"] == [5e-311] * 3


def test_importing_works_without_the_native_core():
    code = """
import sys
sys.modules["fastcontrast._C"] = None
import torch
from fastcontrast.ops import explain, similarity_lse
q = torch.zeros(3, 2)
assert similarity_lse(q, q).shape == (3,)
print(explain("similarity_lse")["cpu"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the C++ core is not built" in done.stdout
    assert "compiler" in done.stdout
