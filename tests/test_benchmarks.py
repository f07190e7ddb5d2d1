"""The harness: wrong, missing and broken providers are named, floors and bars are right, reports are whole."""

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastcontrast.benchmarks import _gpu, _gpu_attention, _memory, _pairs, _report, _rivals, _video, similarity_lse
from fastcontrast.benchmarks import _harness as harness

from fastcontrast import cli
from fastcontrast.ops import frame_rules
from fastcontrast.testing.shapes import Shape, video

TINY = Shape("tiny", 48, 48, 8)

# Doubling a vector: its truth is exact, and each provider's fault is one.
FAULTY = """
import time
import torch
from fastcontrast.benchmarks._harness import Bar, Floor, Provider, Workload

def step(seconds=0.0, error=0.0, scratch=0):
    def make(x):
        def run():
            if scratch:
                torch.ones(scratch, dtype=torch.uint8)
            time.sleep(seconds)
            return (x * (2 + error),)
        return run
    return make

def absent(x):
    raise ImportError("nothing-like-this is not installed")

def broken(x):
    return lambda: torch.mm(x, x)

def workloads(quick):
    providers = {
        "fastcontrast": Provider(step(0.01), memory=True),
        "greedy": Provider(step(0.01, scratch=100 << 20), memory=True),
        "wrong": Provider(step(error=1e-3)),
        "not a number": Provider(step(error=float("nan"))),
        "absent": Provider(absent),
        "broken": Provider(broken),
        "too large": Provider(step(), needs=1 << 60),
        "slow": Provider(step(0.06), reps=2),
    }
    floors = {"sleep": Floor({"slow": step(0.05), "fast": step(0.002)})}
    bars = (
        Bar("fastcontrast", "sleep", at_most=1e3),
        Bar("fastcontrast", "sleep", at_most=1.0),
        Bar("slow", "fastcontrast", at_least=2.0),
        Bar("wrong", "fastcontrast", at_least=2.0),
        Bar("fastcontrast", at_most=90 << 20, what="peak_extra_bytes"),
        Bar("greedy", at_most=90 << 20, what="peak_extra_bytes"),
    )
    x = torch.ones(1000)
    inputs = lambda shape: torch.ones(shape)
    return [Workload("double", 1000, 10, inputs, lambda x: (2 * x.double(),), providers, floors, bars, reps=3)]
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine would take the time of these tests a hundredfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows of the faulty module, by provider. It lies in a file, because memory is measured in a new process."""
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "faulty_benchmark.py").write_text(FAULTY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder))
        import faulty_benchmark

        (workload,) = faulty_benchmark.workloads(True)
        yield {row.provider: row for row in harness.run(workload, "faulty_benchmark", quick=True, reps=None)}
        sys.modules.pop("faulty_benchmark")


def test_wrong_providers_get_no_speed(rows):
    for name in ("wrong", "not a number"):
        assert rows[name].status == "wrong" and rows[name].seconds is None and rows[name].ratio is None
    assert rows["wrong"].error == pytest.approx(5e-4, rel=1e-3)
    assert rows["not a number"].error == math.inf
    assert rows["fastcontrast"].status == "ok" and rows["fastcontrast"].error == 0


def test_what_cannot_run_says_why(rows):
    assert (rows["absent"].status, rows["absent"].note) == ("missing", "nothing-like-this is not installed")
    assert rows["broken"].status == "failed" and "RuntimeError" in rows["broken"].note
    assert rows["too large"].status == "skipped" and "available" in rows["too large"].note


def test_floor_is_the_faster_variant_of_the_same_run(rows):
    assert 0.002 <= rows["sleep, fast"].seconds < rows["sleep, slow"].seconds
    row = rows["fastcontrast"]
    assert row.floor == "sleep" and row.floor_seconds == rows["sleep, fast"].seconds
    assert row.ratio == row.seconds / row.floor_seconds > 1
    assert row.min_seconds <= row.seconds and (row.reps, rows["slow"].reps) == (3, 2)


def test_bars(rows):
    high, low, memory = rows["fastcontrast"].bars[:1] + rows["fastcontrast"].bars[1:2] + rows["fastcontrast"].bars[-1:]
    assert high["met"] is True and high["value"] == rows["fastcontrast"].ratio
    assert low["met"] is False and low["claim"] == "fastcontrast / sleep ≤ 1"
    assert memory["met"] is True and memory["claim"] == "fastcontrast ≤ 90 MiB"
    # "slow / fastcontrast" speaks of us, and stands in our row; so does the one that cannot be judged
    faster, unjudged = rows["fastcontrast"].bars[2:4]
    assert faster["value"] == rows["slow"].seconds / rows["fastcontrast"].seconds and faster["met"] is True
    assert unjudged["met"] is None and unjudged["reason"] == "wrong wrong"
    (greedy,) = rows["greedy"].bars
    assert greedy["met"] is False


def test_memory_is_what_a_step_takes_beyond_its_outputs(rows):
    assert rows["greedy"].peak_extra_bytes == pytest.approx(100 << 20, rel=0.1)
    assert rows["fastcontrast"].peak_extra_bytes < 20 << 20
    # The mark does not remember what came before.
    torch.ones(200 << 20, dtype=torch.uint8)
    grown, outputs, seconds = _memory.peak_of(lambda: (torch.ones(1 << 20),))
    assert grown < 100 << 20 and outputs[0].nbytes == 4 << 20 and seconds > 0


def test_table_marks_everything(rows):
    text = _report.table(rows.values())
    for mark in ("WRONG", "MISSING", "FAILED", "SKIPPED", "MISSED (", "met (", "not judged", "≤ 90 MiB: met"):
        assert mark in text
    lines = text.splitlines()
    assert len(lines) == 2 + len(rows) and len({len(line) for line in lines}) == 1


def test_rounds_are_interleaved_and_shuffled():
    calls = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = harness.interleave(steps, dict.fromkeys("abc", 1), {"a": 4, "b": 4, "c": 2})
    assert [len(times[name]) for name in "abc"] == [4, 4, 2]
    rounds = [calls[:3], calls[3:6], calls[6:8], calls[8:10]]
    assert [sorted(r) for r in rounds] == [["a", "b", "c"]] * 2 + [["a", "b"]] * 2
    assert harness.seconds_of(lambda: time.sleep(0.001), 3) < 0.1
    workload = harness.Workload("none", None, None, None, None, {}, {})
    assert workload.calls_of(lambda: time.sleep(harness.LEAST_SECONDS), 0.0) == 1
    assert workload.calls_of(lambda: None, 0.0) == 1000 and workload.calls_of(lambda: None, first=1.0) == 1


@pytest.mark.parametrize("shape", [TINY, Shape("copies", 256, 256, 8)], ids=lambda shape: shape.name)
@pytest.mark.parametrize("kind", ["clip", "clip_ids", "info_nce"])
def test_truth_of_copies_is_the_truth_of_the_whole(kind, shape, monkeypatch):
    """The rescaled truth of the small batch, against dense float64 autograd over the whole."""
    monkeypatch.setattr(_pairs, "BASE", 64)
    small = (
        shape._replace(n=256) if hasattr(shape, "_replace") else Shape(shape.name, *[min(256, shape.n)] * 2, shape.d)
    )
    batch = _pairs.make_batch(small)
    assert batch.copies == (1 if shape is TINY else 4)
    leaves = [x.detach().double().requires_grad_() for x in (batch.queries, batch.keys, batch.scale)]
    logits = leaves[2] * leaves[0] @ leaves[1].T
    own = torch.eye(len(logits), dtype=torch.bool)
    masked = logits
    if kind == "clip_ids":
        masked = logits.masked_fill((batch.ids[:, None] == batch.ids) & ~own, -math.inf)
    loss = masked.logsumexp(1) - logits.diagonal()
    if kind.startswith("clip"):
        loss = (loss + masked.logsumexp(0) - logits.diagonal()) / 2
    exact = (loss.mean().detach(), *torch.autograd.grad(loss.mean(), leaves))
    assert harness.worst_error(_pairs.truth(kind, batch), exact) < 1e-12


REAL_WORKLOADS = similarity_lse.workloads


def tiny(workload: harness.Workload) -> harness.Workload:
    """The same providers of ours, floors and truth, repeated once at a size of no time and no memory to speak of."""
    checked = {
        n: p for n, p in workload.providers.items() if n.startswith((harness.OURS, "dense torch")) and not p.compiles
    }
    providers = {name: replace(p, memory=False) for name, p in checked.items()}
    bars = tuple(bar for bar in workload.bars if bar.of in providers)
    return replace(workload, shape=TINY, reps=1, alone=False, providers=providers, bars=bars)


def test_every_workload_is_right_at_a_tiny_size(tmp_path, monkeypatch, capsys):
    """Our losses and the dense ones against their truths, through the command line to table, plot and JSON."""
    monkeypatch.setattr(similarity_lse, "workloads", lambda quick: [tiny(w) for w in REAL_WORKLOADS(False)])
    status = cli.main(["bench", "similarity_lse", "--large", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    record = json.loads((tmp_path / "similarity_lse.json").read_text())
    assert record["machine"]["cores"] >= 1 and record["machine"]["threads"] == torch.get_num_threads()
    assert record["versions"]["torch"] == torch.__version__ and record["date"].endswith("+00:00")
    assert set(record) == {"op", "date", "quick", "machine", "versions", "git", "rows"}
    assert record["git"] is None or len(record["git"]["commit"]) == 40
    wanted = {"op", "workload", "provider", "status", "seconds", "min_seconds", "reps", "floor", "floor_seconds"}
    wanted |= {"ratio", "peak_extra_bytes", "error", "bars", "note"}
    assert all(set(row) == wanted for row in record["rows"])
    ours = [row for row in record["rows"] if row["status"] != "floor"]
    assert {row["status"] for row in ours} == {"ok"}
    timed = [row for row in ours if not row["workload"].startswith("import")]
    assert all(row["seconds"] > 0 and row["error"] < 1e-5 for row in timed)
    assert all(row["floor_seconds"] > 0 for row in timed if not row["workload"].startswith("GradCache"))
    assert (tmp_path / "similarity_lse.md").read_text().count("\n|") == len(record["rows"]) + 2
    assert "bars:" in printed
    if not (tmp_path / "similarity_lse.png").exists():
        assert "no plot" in printed


def test_a_rival_that_is_not_installed_is_named(monkeypatch):
    _rivals._open_clip_loss.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    makers = (
        ("open_clip_torch", _rivals.open_clip),
        ("lightly", lambda: _rivals.lightly_nt_xent(10.0)),
        ("pytorch-metric-learning", lambda: _rivals.metric_learning_supcon(10.0)),
        ("sentence-transformers", lambda: _rivals.sentence_transformers_cached(20.0, 32)),
    )
    for package, make in makers:
        with pytest.raises(ImportError, match=package):
            make()


def test_command_line_names_unknown_operations(capsys):
    parser = argparse.ArgumentParser()
    harness.configure(parser)
    assert harness.main(parser.parse_args(["no_such_op"])) == 2
    assert "no_such_op" in capsys.readouterr().err
    assert "similarity_lse" in harness.operations()
    files = {path.stem for path in Path(harness.__file__).parent.glob("*.py")}
    assert set(harness.operations()) == {name for name in files if not name.startswith("_")}


def test_a_run_that_is_interrupted_keeps_what_it_has_measured(tmp_path, monkeypatch):
    """The second workload is interrupted, as by Ctrl-C."""
    done, run = [], harness.run

    def interrupted(workload, *rest):
        if done:
            raise KeyboardInterrupt
        done.append(workload.name)
        return run(workload, *rest)

    monkeypatch.setattr(harness, "run", interrupted)
    parser = argparse.ArgumentParser()
    harness.configure(parser)
    with pytest.raises(KeyboardInterrupt):
        harness.main(parser.parse_args(["recipes", "--only", "saha", "--quick", "--output", str(tmp_path)]))
    assert {row["workload"] for row in json.loads((tmp_path / "recipes.json").read_text())["rows"]} == {*done}


def test_results_of_a_workload_measured_again_join_those_of_the_others(tmp_path, capsys):
    parser, path = argparse.ArgumentParser(), tmp_path / "recipes.json"
    harness.configure(parser)

    def run(only: str) -> dict:
        assert harness.main(parser.parse_args(["recipes", "--only", only, "--quick", "--output", str(tmp_path)])) == 0
        return json.loads(path.read_text())

    before, after = run("saha"), run("saha loss")
    clusters, loss = dict.fromkeys(row["workload"] for row in before["rows"])
    assert [row["workload"] for row in after["rows"]] == [row["workload"] for row in before["rows"]]
    assert {**after, "rows": [], "again": {}} == {**before, "rows": [], "again": {}}
    assert [*after["again"]] == [loss] and set(after["again"][loss]) == {"date", "git"}
    same = [old == new for old, new in zip(before["rows"], after["rows"], strict=True)]
    assert same == [row["workload"] == clusters for row in before["rows"]]

    path.write_text(json.dumps({**after, "machine": {}}))
    assert harness.main(parser.parse_args(["recipes", "--only", "saha", "--quick", "--output", str(tmp_path)])) == 2
    assert "whose machine differs" in capsys.readouterr().err and json.loads(path.read_text())["machine"] == {}


def test_workloads_of_a_gpu_are_right_where_there_is_none():
    """Everything but the clock and the kernels: the same inputs, truths, providers and bars, small, on the CPU."""
    workloads = [w for op in harness.operations() for w in _gpu.workloads(op, quick=True, device="cpu")]
    of_attention = {"animatediff_l2, tiny", "tune_mid, tiny, forward", "selfforcing, tiny, forward"}
    assert {"clip 256 × 64", "siglip 256 × 64", *of_attention} <= {w.name for w in workloads}
    for workload in workloads:
        providers = {name: replace(provider, memory=False) for name, provider in workload.providers.items()}
        rows = harness.run(replace(workload, providers=providers, bars=()), "fastcontrast.benchmarks.none", True, 1)
        for row in rows:
            assert row.status in ("ok", "floor", "missing"), f"{workload.name}, {row.provider}: {row.note}"
        ours = [row for row in rows if row.provider.startswith("fastcontrast")]
        assert ours and all(row.status == "ok" for row in ours)
    (beside,) = _gpu.measurements("contrastive_search")["beside the model"](True, 1, device="cpu")
    # The difference of two times, which noise alone may turn round here.
    assert beside.status == "ok" and math.isfinite(beside.seconds) and len(beside.bars) == 1
    full = [w for op in harness.operations() for w in _gpu.workloads(op, quick=False)]
    assert len({w.name for w in full}) == len(full)
    for workload in full:
        names = {*workload.providers, *workload.floors}
        assert all(bar.of in names and bar.over in {*names, None} for bar in workload.bars)


def test_xformers_gets_what_it_takes(monkeypatch):
    """Tokens before heads, as xformers has them, with torch in its place."""

    def attend(q, k, v):
        out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2)

    monkeypatch.setattr(_rivals, "need", lambda *_: SimpleNamespace(memory_efficient_attention=attend))
    workload = _gpu_attention.frame("cpu", _video.tiny(video("xclip_frame")), backward=True)
    only = {_gpu_attention.XFORMERS: workload.providers[_gpu_attention.XFORMERS]}
    (row,) = harness.run(replace(workload, providers=only), "fastcontrast.benchmarks.none", True, 1)
    assert row.status == "ok", row.note


def test_a_mask_says_all_of_a_rule_whose_frames_count_their_keys_alike():
    """Frames 0 and 1 attend frame 0 twice and nothing else under first_previous; with a third entry, frame 1 more."""
    rules = ("first", "all", "causal", "first_previous", frame_rules.frames("first", -1, 0))
    counts = [frame_rules.count_matrix(rule, 4) for rule in rules]
    assert [_gpu_attention.masked(count) for count in counts] == [True, True, True, True, False]


def test_a_gpu_is_needed_for_its_benchmarks(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert cli.main(["bench", "similarity_lse", "--gpu"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
