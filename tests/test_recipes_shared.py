"""What recipes of text share: sentences, ratings, a sentence encoder, small language models, steps in several parts."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from fastcontrast.data import MissingDataError
from fastcontrast.minilm import minilm_features
from fastcontrast.recipes._shared import language, report, texts
from fastcontrast.recipes._shared.encoder import Encoder, batches


def test_documents_hold_plain_sentences_once():
    documents = texts.documents(limit=60)
    sentences = [sentence for document in documents for sentence in document.sentences]
    assert 30 <= len(documents) <= 60 and len({document.module for document in documents}) > 5
    assert len(sentences) == len(set(sentences)) >= len(documents)
    for sentence in sentences:
        assert 4 <= len(sentence.split()) <= 40 and sentence[0].isupper() and sentence[-1] in ".!?"
        assert ">>>" not in sentence and "\n" not in sentence
    assert documents == texts.documents(limit=60)


def test_source_files_are_spread_evenly():
    every, some = texts.source_files(), texts.source_files(10)
    assert len(some) == 10 and some[0] == every[0] and some == [every[i * len(every) // 10] for i in range(10)]
    assert not any("test" in path.parts for path in every)


def test_ratings_of_people():
    pairs = {name: texts.word_ratings(name) for name in ("wordsim353", "simlex999")}
    assert [len(found) for found in pairs.values()] == [353, 999]
    assert pairs["wordsim353"][1] == texts.Rating("tiger", "cat", 7.35) and pairs["simlex999"][0].value == 1.58
    documents = texts.document_ratings()
    assert len(documents) == 50 * 49 // 2 and documents[0].value == 0.3 and documents[0].first != documents[0].second
    with pytest.raises(ValueError, match="name must be one of wordsim353, simlex999, got 'rg65'"):
        texts.word_ratings("rg65")


def test_ratings_that_are_missing_say_how_to_get_them(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDataError, match="gensim is missing; get it with"):
        texts.word_ratings()


def test_rank_correlation_ignores_what_keeps_the_order():
    ratings = [texts.Rating("", "", value) for value in (0.0, 1.0, 1.0, 4.0)]
    assert texts.spearman(torch.tensor([-5.0, 0.1, 0.1, 0.2]), ratings) == pytest.approx(100)
    assert texts.spearman(-torch.tensor([-5.0, 0.1, 0.1, 0.2]), ratings) == pytest.approx(-100)


def test_recall_and_split():
    keys = torch.eye(4)
    assert texts.recall_at_1(keys, keys) == 100 and texts.recall_at_1(keys.roll(1, 0), keys) == 0
    assert texts.recall_at_1(keys[:2], keys, torch.tensor([0, 3])) == 50
    train, test = texts.split(10, 3, 0)
    assert len(test) == 3 and sorted([*train.tolist(), *test.tolist()]) == [*range(10)]
    assert [len(x) for x in texts.split(10, 9, 0)] == [5, 5]
    assert not torch.equal(train, texts.split(10, 3, 1)[0])


TEXTS = ["Return the current time formatted for logging.", "A queue of tasks."]


def test_all_six_layers_are_minilm(one_thread):
    found = Encoder(6, longest=128).encode(TEXTS)
    torch.testing.assert_close(found, minilm_features(TEXTS, cache=False, progress=False), rtol=1e-4, atol=1e-5)


def test_an_encoder_learns_pools_and_drops(one_thread):
    encoder = Encoder(1)
    assert encoder.training and not torch.equal(encoder(TEXTS), encoder(TEXTS))  # dropout
    torch.testing.assert_close(encoder.encode(TEXTS), encoder.encode(TEXTS[::-1]).flip(0), rtol=1e-5, atol=1e-6)
    assert encoder.training and encoder.encode(TEXTS).norm(dim=1).tolist() == pytest.approx([1, 1])
    encoder(TEXTS).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    ids, mask = encoder.tokens(TEXTS)
    assert mask.sum(1).tolist() == [11, 7] and not ids[1, 7:].any()
    states = torch.randn(2, 3, 4)
    real = torch.tensor([[True, True, False], [True] * 3])
    torch.testing.assert_close(encoder.pool(states, real), torch.stack([states[0, :2].mean(0), states[1].mean(0)]))
    first = Encoder(1, pooling="first", longest=5)
    torch.testing.assert_close(first.pool(states, real), states[:, 0])
    assert first.tokens(TEXTS)[0].shape == (2, 5)
    for wrong in ({"pooling": "last"}, {"layers": 7}):
        with pytest.raises(ValueError, match=r"Encoder: (pooling|layers) must"):
            Encoder(**wrong)


def test_batches_take_each_index_once_an_epoch():
    drawn = batches(10, 3, 0)
    epochs = [[i for _ in range(3) for i in next(drawn).tolist()] for _ in range(2)]
    assert all(len(set(epoch)) == 9 for epoch in epochs) and epochs[0] != epochs[1]
    assert len(next(batches(4, 9, 0))) == 4


@pytest.fixture
def tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(language, "cache_folder", lambda: tmp_path)
    return language.vocabulary(["the cat and the hat", "the bat"] * 3, 270, ("<mask>",))


def test_a_vocabulary_is_kept_and_ordered(tokenizer, tmp_path):
    assert tokenizer.get_vocab_size() == 270
    assert tokenizer.token_to_id(language.END) == 0 and tokenizer.token_to_id("<mask>") == 1
    ids = tokenizer.encode(" the cat" + language.END).ids
    assert ids[-1] == 0 and tokenizer.decode(ids) == " the cat"
    (kept,) = tmp_path.iterdir()
    again = language.vocabulary(["the cat and the hat", "the bat"] * 3, 270, ("<mask>",))
    assert again.get_vocab() == tokenizer.get_vocab() and [*tmp_path.iterdir()] == [kept]


def test_blocks_overlap_by_a_token(tokenizer):
    blocks = language.pack(tokenizer, ["the cat", "the bat and the hat"], 4)
    whole = tokenizer.encode("the cat" + language.END).ids + tokenizer.encode("the bat and the hat" + language.END).ids
    assert blocks.shape == ((len(whole) - 1) // 4, 5)
    assert torch.equal(blocks[1:, 0], blocks[:-1, -1]) and blocks[:, :-1].flatten().tolist() == whole[: 4 * len(blocks)]
    assert language.pack(tokenizer, ["a"], 100).shape == language.pack(tokenizer, [], 100).shape == (0, 101)


def test_a_small_llama_is_transformers(one_thread):
    torch.manual_seed(0)
    model = language.llama(50, width=24, layers=2, heads=4, kv_heads=2).double()
    blocks = torch.randint(50, (3, 9))
    logits = model(input_ids=blocks[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
    torch.testing.assert_close(language.next_token_loss(model, blocks), expected)
    torch.testing.assert_close(-language.token_logprobs(model, blocks).mean(), expected)
    assert language.perplexity(model, blocks, batch=2) == pytest.approx(math.exp(expected.item()))
    assert model.training and model.lm_head.weight is model.model.embed_tokens.weight
    untied = language.llama(50, width=24, layers=1, tied=False, hidden=40)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert untied.model.layers[0].mlp.up_proj.out_features == 40


def test_a_step_in_parts_and_a_schedule(one_thread):
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 1, bias=False)
    x, other, start = torch.randn(4, 3), copy.deepcopy(layer), layer.weight.detach().clone()
    parts = report.train(
        "parts", 3, layer, lambda _: (layer(part).square().mean() / 2 for part in x.chunk(2)), rate=0.1
    )
    whole = report.train("whole", 3, other, lambda _: other(x).square().mean(), rate=0.1)
    assert parts == pytest.approx(whole)
    torch.testing.assert_close(layer.weight, other.weight)
    still = torch.nn.Linear(3, 1, bias=False)
    still.load_state_dict({"weight": start})
    report.train("still", 2, still, lambda _: still(x).square().mean(), rate=0.1, schedule=lambda i: 0.0)
    assert torch.equal(still.weight, start)


def test_a_report_without_weights(tmp_path, capsys):
    found = report.Report("decoded", tmp_path, steps=1, seed=0)
    for label, value in (("a", 1.5), ("b", 2.5)):
        with found.model(label) as one:
            one.metrics = {"right, %": value}
    results = found.close(None)
    assert results["models"]["b"]["metrics"] == {"right, %": 2.5} and "2.50" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"decoded.png", "decoded.json"}
