"""Runs the tests of the native core under AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.

    python tests/sanitize.py FOLDER [OPTIONS]      FOLDER holds fastcontrast/_C*.so, built with FASTCONTRAST_SANITIZE;
                                                   OPTIONS go to pytest

The instrumented core takes the place of the normal one before anything imports it, and the tensors that the tests hand
to it come from the sanitizer's allocator, so that one byte read or written outside of one ends the process. Threads are
Python's and OpenMP's. Leaks are not looked for: the interpreter leaks on exit, and the core owns no memory but
std::vector. Tests that start processes or compilers of their own, or that measure, are left out.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parent
LEFT_OUT = "not peak and not compiled and not opcheck"


class Counted:
    """A module whose functions and classes count their calls."""

    def __init__(self, module):
        self._module, self.calls = module, Counter()

    def __getattr__(self, name):
        value = getattr(self._module, name)
        if not callable(value):
            return value

        def counted(*arguments, **named):
            self.calls[name] += 1
            return value(*arguments, **named)

        return counted


def instrumented_core(folder: Path) -> Counted:
    (path,) = folder.glob("fastcontrast/_C*.so")
    symbols = path.read_bytes()
    assert b"__asan_report_store" in symbols, f"{path} is not instrumented for addresses"
    assert b"__ubsan_handle" in symbols, f"{path} is not instrumented for undefined behaviour"
    assert b"__ubsan_handle_pointer_overflow_abort" in symbols, f"{path} would go on after undefined behaviour"
    assert "libasan" in Path("/proc/self/maps").read_text(), "preload libasan, so that tensors have guarded edges"
    spec = importlib.util.spec_from_file_location("fastcontrast._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Counted(module)


def main(folder: str, *options: str) -> int:
    core = sys.modules["fastcontrast._C"] = instrumented_core(Path(folder))
    os.environ.pop("LD_PRELOAD", None)  # not for processes started from here
    import pytest

    from fastcontrast.ops import _dispatch, _workspace

    assert _dispatch.native is core, "the normal core was imported first"
    # A buffer used again may be longer than what was asked for, and hide a write behind its end.
    _workspace._pool._give_back = lambda block: None
    kinds = ("similarity_*", "linear_*", "max_cosine", "maxsim", "contrastive_select", "two_logit_mix", "few_rows",
             "siblings", "llama_layer", "frame_attention", "temporal_attention", "triplet_distances")  # fmt: skip
    files = sorted(str(path) for kind in kinds for path in TESTS.glob(f"test_{kind}.py"))
    status = pytest.main([*files, "-k", LEFT_OUT, "-p", "no:cacheprovider", *options])
    offered = {name for name in dir(core._module) if callable(getattr(core._module, name)) and name[0] != "_"}
    missed = sorted(offered - core.calls.keys())
    print(f"calls under the sanitizers: {dict(core.calls)}")
    if missed:
        print(f"never called: {', '.join(missed)}")
    return int(status) or bool(missed)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
