"""The demo, small: its measurements against plain loops, a few steps of training, and what it leaves behind."""

import argparse
import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fastcontrast import GradCache, clip_loss, data, towers
from fastcontrast.demo import command, loss_stage, training
from fastcontrast.demo.recall import chance, recall
from fastcontrast.testing import ranks


@pytest.fixture(scope="module")
def few_icons() -> data.Pairs:
    return data.icons(unseen=40, limit=500, progress=False)


@pytest.fixture
def texts() -> data.Pairs:
    names = [f"word{i} number {i}" for i in range(60)]
    return data._pairs("wordnet", [f"the word number {i} of sixty" for i in range(60)], names, 20, seed=0)


def brute_force_recall(items, names, labels, k):
    """The definition, by loops."""
    similarity = [[float(a @ b) for b in names] for a in items]
    found = {"item_to_name": [], "name_to_item": []}
    for row, own in zip(similarity, labels.tolist(), strict=True):
        order = sorted(range(len(names)), key=lambda j: -row[j])
        found["item_to_name"].append(own in order[:k])
    for name in range(len(names)):
        order = sorted(range(len(items)), key=lambda i: -similarity[i][name])
        found["name_to_item"].append(any(int(labels[i]) == name for i in order[:k]))
    return {way: sum(hits) / len(hits) for way, hits in found.items()}


@pytest.mark.parametrize("seed", range(5))
def test_recall_is_the_definition(seed):
    torch.manual_seed(seed)
    labels = torch.cat([torch.arange(23), torch.randint(0, 23, (24,))])
    items, names = torch.randn(47, 5), torch.randn(23, 5)
    measured = recall(items, names, labels)
    for k in (1, 10):
        expected = brute_force_recall(items, names, labels, k)
        assert {way: pytest.approx(share[str(k)]) for way, share in measured.items()} == expected


def test_recall_of_equal_features_is_nothing():
    measured = recall(torch.ones(30, 4), torch.ones(15, 4), torch.arange(30) % 15)
    assert [share for ways in measured.values() for share in ways.values()] == [0.0] * 4


def test_chance_is_what_random_features_reach():
    pairs = data._pairs("icons", torch.zeros(90, 1), [str(i % 31) for i in range(90)], 30, seed=0)
    torch.manual_seed(0)
    unseen = pairs.unseen.nonzero()[:, 0]
    labels = torch.searchsorted(unseen, pairs.ids[pairs.test])
    trials = [recall(torch.randn(len(labels), 8), torch.randn(30, 8), labels) for _ in range(300)]
    for way, shares in chance(pairs).items():
        for k, share in shares.items():
            assert sum(t[way][k] for t in trials) / 300 == pytest.approx(share, abs=0.02)


def test_batches_go_by_seen_name(few_icons):
    batches = training.batches(few_icons, 64, seed=0)
    seen = len(few_icons.names) - int(few_icons.unseen.sum())
    rows = [next(batches) for _ in range(seen // 64)]
    names = few_icons.ids[torch.cat(rows)]
    assert not few_icons.unseen[names].any()
    assert len(names.unique()) == len(names), "a name came twice within an epoch"
    assert len(next(training.batches(few_icons, 1000, seed=0))) == 1000, "a batch may be larger than the set"
    assert torch.equal(next(training.batches(few_icons, 64, seed=0)), rows[0])


def test_shifted_glyphs_keep_their_ink(few_icons):
    glyphs = few_icons.items[:50]
    moved = training.shifted(glyphs, 2, torch.Generator().manual_seed(0))
    assert moved.dtype == torch.uint8 and moved.shape == glyphs.shape and not torch.equal(moved, glyphs)
    lone = torch.zeros(200, 9, 9)
    lone[:, 4, 4] = 1
    places = training.shifted(lone, 2, torch.Generator().manual_seed(0)).flatten(1).argmax(1)
    assert {(int(p) // 9, int(p) % 9) for p in places} == {(y, x) for y in range(2, 7) for x in range(2, 7)}


def test_learning_rate_rises_and_falls():
    shares = [training.warm_up_then_cosine(i, 40) for i in range(40)]
    assert shares[5] == 1 and shares[:6] == sorted(shares[:6]) and shares[5:] == sorted(shares[5:], reverse=True)
    assert training.warm_up_then_cosine(0, 1) == 1


def test_chunks_do_not_change_the_gradient(few_icons):
    """Every tower treats rows alone, so GradCache in chunks of any size is the whole batch."""
    torch.manual_seed(0)
    model = towers.TwoTowers("icons")
    model.item_tower.bf16 = False
    glyphs, features, ids = few_icons.items[:48], torch.randn(48, 384), few_icons.ids[:48]
    clip_loss(model.item_tower(glyphs), model.name_tower(features), 10.0, ids=ids).backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    GradCache([model.item_tower, model.name_tower], [13, 48], clip_loss)(glyphs, features, scale=10.0, ids=ids)
    for p, expected in zip(model.parameters(), whole, strict=True):
        assert (p.grad - expected).norm() <= 1e-4 * expected.norm()


def test_convolution_is_weight_standardised():
    torch.manual_seed(0)
    layer = towers.Conv(3, 8, 3, stride=2)
    x = torch.randn(2, 3, 8, 8)
    weight = layer.weight.view(8, 3, 3, 3)
    weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), correction=0, keepdim=True)
    expected = F.conv2d(x, weight * (layer.GAIN / math.sqrt(27)), None, stride=2, padding=1)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_hash_words_is_stable():
    codes = towers.hash_words(["Big cat, big CAT!", "cat", ""])
    assert codes.shape == (3, 7) and codes[1].tolist()[1:] == [0] * 6 and codes[2].tolist() == [0] * 7
    big, pair, cat, other, again, _, last = codes[0].tolist()
    assert (big, cat) == (again, last) and pair != other and codes[1, 0] == cat == 37_592
    assert towers.hash_words(["a b c"], limit=2).shape == (1, 2)
    assert towers.HashedWords(dim=4)(codes).norm(dim=1).tolist() == pytest.approx([1, 1, 0])


def test_demo_on_few_icons(few_icons, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTCONTRAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loss_stage, "_stage_memory", lambda kind, inputs: 0.0)  # a process each: tested below, once
    results = command.run("icons", batch=128, steps=6, device="cpu", output=tmp_path / "out", pairs=few_icons)
    printed = capsys.readouterr().out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"icons.safetensors", "icons.png", "icons.json"}
    assert json.loads((tmp_path / "out" / "icons.json").read_text()) == results
    assert (tmp_path / "out" / "icons.png").read_bytes().startswith(b"\x89PNG")
    assert len(results["losses"]) == 6 and results["losses"][-1] < results["losses"][0]
    stage = results["loss_stage"]
    assert stage["ours"]["loss"] == pytest.approx(stage["dense"]["loss"], rel=1e-5)
    assert stage["gradient_difference"] < 1e-4
    assert "recall on unseen names" in printed and "MiB" in printed

    code = "".join(line[4:] + "\n" for line in printed.splitlines() if line.startswith("    "))
    assert code == results["code"] and code.count("\n") == 5
    monkeypatch.setattr(data, "icons", lambda: few_icons)
    exec(code, {})
    assert len(set(eval(capsys.readouterr().out)) & set(few_icons.names)) >= 1
    assert "item_tower.layers.0.weight" in load_file(tmp_path / "out" / "icons.safetensors")


def test_demo_on_texts(texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loss_stage, "_stage_memory", lambda kind, inputs: 0.0)
    results = command.run("wordnet", batch=32, steps=5, output=tmp_path, pairs=texts, device="cpu")
    assert results["recall_after"]["item_to_name"]["10"] > results["recall_chance"]["item_to_name"]["10"]
    monkeypatch.setattr(data, "wordnet", lambda: texts)
    capsys.readouterr()
    exec(results["code"], {})
    assert set(eval(capsys.readouterr().out)) <= set(texts.names)


def test_memory_of_a_stage_sees_the_matrix(tmp_path):
    """Dense needs at least its logits and their gradient, 2·N² floats; a page is not a MiB, hence the slack."""
    torch.manual_seed(0)
    n = 2048
    images, words = (F.normalize(torch.randn(n, 32), dim=1) for _ in range(2))
    dense = loss_stage._stage_memory("dense", [images, words, torch.tensor(10.0), torch.arange(n)])
    assert 2 * n * n * 4 / 2**20 <= dense <= 10 * n * n * 4 / 2**20


def test_weights_of_others_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="was not written by"):
        towers.TwoTowers.load(tmp_path / "x.safetensors")


def test_command_line(monkeypatch, capsys):
    parser = argparse.ArgumentParser()
    command.configure(parser)
    args = parser.parse_args(["--data", "wordnet"])
    assert args.batch >= 4096 and args.data == "wordnet"

    def missing(seed):
        raise data.MissingDataError("get it so")

    monkeypatch.setitem(data.LOADERS, "wordnet", missing)
    monkeypatch.setattr(command.Path, "mkdir", lambda *args, **settings: None)
    assert command.main(args) == 1
    assert capsys.readouterr().err == "fastcontrast demo: get it so\n"


def test_demo_refuses_nonsense(tmp_path):
    with pytest.raises(ValueError, match="batch must be at least 2 and steps at least 1, got 1 and 3"):
        command.run("icons", batch=1, steps=3, output=tmp_path)


def test_importing_the_demo_is_cheap():
    code = (
        "import sys, fastcontrast.demo.command\n"
        "print([m for m in ('transformers', 'PIL', 'matplotlib', 'safetensors', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


# ------------------------------------------------------------------------------------------------------ several ranks


def _trained_on_a_rank(pairs):
    model = towers.TwoTowers("wordnet")
    items, names = model.prepare_items(pairs.items), model.prepare_names(pairs.names)
    torch.manual_seed(0)
    model = towers.TwoTowers("wordnet")
    losses, scale = training.train(model, items, names, pairs, training.RECIPES["wordnet"], batch=21, steps=3, seed=0)
    return losses, scale, [p.detach() for p in model.parameters()]


def test_ranks_train_what_one_process_trains(texts, one_thread):
    """21 rows on 2 ranks: 11 and 10."""
    expected = _trained_on_a_rank(texts)
    for losses, scale, weights in ranks.run(2, _trained_on_a_rank, texts):
        assert losses == pytest.approx(expected[0], rel=1e-5)
        assert scale == pytest.approx(expected[1], rel=1e-4)
        # AdamW divides by the gradient's size: it magnifies rounding where a gradient is next to nothing.
        torch.testing.assert_close(weights, expected[2], rtol=1e-3, atol=1e-4)


def test_nproc_starts_torchrun(monkeypatch):
    ran = []
    monkeypatch.setattr(
        subprocess, "run", lambda command, env: ran.append((command, env)) or argparse.Namespace(returncode=7)
    )
    parser = argparse.ArgumentParser()
    command.configure(parser)
    assert command.main(parser.parse_args(["--nproc", "2", "--batch", "64", "--data", "docstrings"])) == 7
    [(line, environment)] = ran
    assert line[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert line[line.index("fastcontrast.cli") + 1] == "demo"
    again = parser.parse_args(line[line.index("demo") + 1 :])
    assert again == parser.parse_args(["--batch", "64", "--data", "docstrings"]), "the ranks start no further ranks"
    assert environment["OMP_NUM_THREADS"]


RANK = """
import sys
from fastcontrast import data
from fastcontrast.demo import command, ranks
codes, words = [f"code {i} of sixty" for i in range(60)], [f"word{i}" for i in range(60)]
pairs = data._pairs("docstrings", codes, words, 20, seed=0)
with ranks.joined():
    command.run("docstrings", batch=16, steps=1, output=sys.argv[1], pairs=pairs)
"""


def test_under_torchrun_the_first_rank_reports(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, tmp_path / "rank.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "docstrings.json").read_text())
    assert results["processes"] == 2
    assert len(results["losses"]) == 1
    assert done.stdout.count("recall on unseen names") == 1
