"""`fastcontrast doctor` says for every operation what would run here and why not the others."""

import torch

from fastcontrast import doctor, ops
from fastcontrast.ops import _dispatch


def test_every_operation_and_every_reason_is_there():
    text = "\n".join(doctor.report())
    for op in ops.operations():
        for dtype in (torch.float32, torch.float64):
            verdicts = ops.explain(op, "cpu", dtype)
            runs = [name for name, reason in verdicts.items() if reason is None]
            chosen = next(name for name in runs if _dispatch.serves(op, name) is None)
            line = next(x for x in text.splitlines() if x.split()[:1] == [op] and str(dtype).split(".")[1] in x)
            assert chosen in line
            for name, reason in verdicts.items():
                assert reason is None or f"not {name}: {reason}" in text
            for name in runs[: runs.index(chosen)]:
                assert f"{name} for {_dispatch.serves(op, name)}" in text


def test_an_operation_on_another_names_it(monkeypatch):
    monkeypatch.setitem(_dispatch._registry, "algebra", _dispatch._registry["similarity_lse"])
    monkeypatch.setitem(_dispatch._through, "algebra", "similarity_lse")
    lines = [line for line in doctor.report() if line.split()[:1] == ["algebra"]]
    assert lines[0].endswith("(that of similarity_lse)")
    assert lines[-1].endswith("reference")


def test_its_status_says_whether_the_core_is_there(monkeypatch, capsys):
    assert doctor.main(None) == (1 if _dispatch.native_missing else 0)
    monkeypatch.setattr(doctor, "native_missing", "the C++ core is not built")
    assert doctor.main(None) == 1
    assert "the C++ core is not built" in capsys.readouterr().out
