"""GradCache on text: chunks by number of tokens, padding cut off, models that take one mapping and write into it."""

import pytest
import torch
from torch import nn
from two_towers import Loss, check, float64

from fastcontrast import GradCache
from fastcontrast.grad_cache import tokens

double = pytest.fixture(autouse=True)(float64)


class Text(nn.Module):
    """A small transformer with positions, types and mean pooling, called as transformers' models are."""

    def __init__(self, width=8, most=40):
        super().__init__()
        self.ids, self.types, self.at = (nn.Embedding(n, width) for n in (50, 2, most))
        self.layer = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True)
        self.out, self.shapes = nn.Linear(width, 5), []

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, inputs_embeds=None):
        x = self.ids(input_ids.view(-1).view(input_ids.shape)) if inputs_embeds is None else inputs_embeds
        self.shapes.append(tuple(x.shape[:2]))
        x = x + self.at(torch.arange(x.shape[1]))
        if token_type_ids is not None:
            x = x + self.types(token_type_ids)
        x = self.layer(x, src_key_padding_mask=attention_mask == 0)
        weight = attention_mask[..., None].to(x.dtype)
        return self.out((x * weight).sum(1) / weight.sum(1))


class Sentences(nn.Module):
    """Called as sentence-transformers' models are: one mapping in, the same one out with more in it."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def forward(self, features):
        assert features["task"] == "query" and "sentence_embedding" not in features
        kept = {k: v for k, v in features.items() if k in ("input_ids", "attention_mask", "token_type_ids")}
        features["sentence_embedding"] = self.text(**kept)
        return features


def batch(lengths, width, left=False, mask_dtype=torch.int64):
    mask = torch.stack([(torch.arange(width) < n).flip(0) if left else torch.arange(width) < n for n in lengths])
    ids = torch.randint(1, 50, mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask.to(mask_dtype), "token_type_ids": torch.randint(2, mask.shape)}


LENGTHS = [3, 1, 7, 11, 2, 2, 2, 30, 5, 4, 6, 1, 1]


@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.bool, torch.float64])
@pytest.mark.parametrize(
    "rows, budget, shapes",
    [
        (99, 21, [(3, 7), (1, 11), (3, 2), (1, 30), (3, 6), (2, 1)]),
        (2, 24, [(2, 3), (2, 11), (2, 2), (1, 2), (1, 30), (2, 5), (2, 6), (1, 1)]),
        (13, 1, [(1, n) for n in LENGTHS]),
        (50, 10**6, [(13, 30)]),
    ],
)
def test_rows_times_longest_stays_within_the_budget(rows, budget, shapes, mask_dtype):
    a, b, loss = Text(), Text(), Loss()
    x, y = batch(LENGTHS, 33, mask_dtype=mask_dtype), batch(LENGTHS[::-1], 33)
    cache = GradCache([a, b], [rows, 4], loss, chunk_tokens=[budget, None], keep_graphs=0)
    check(cache, (x, y), lambda: (a(**x), b(**y)), a, b, loss)
    assert a.shapes[1:] == shapes * 2 and b.shapes[1] == (4, 33)


@pytest.mark.parametrize("keep", [0, "auto"])
@pytest.mark.parametrize("pack", [lambda f: [f], lambda f: (f,), lambda f: ([f], {}), lambda f: ((), {"features": f})])
def test_models_that_take_one_mapping_and_write_into_it(pack, keep):
    text, loss = Text(), Loss()
    model = Sentences(text)
    x, y = batch(LENGTHS, 31), batch(LENGTHS[::-1], 31)
    inputs = [pack({**features, "task": "query", "prompt_length": 2}) for features in (x, y)]
    cache = GradCache(
        [model, model], 5, loss, get_rep_fn=lambda out: out["sentence_embedding"], chunk_tokens=64, keep_graphs=keep
    )
    check(cache, inputs, lambda: (text(**x), text(**y)), text, loss)
    assert all(rows * longest <= 64 for rows, longest in text.shapes[2:])


def test_several_texts_in_one_input_add_up():
    a, loss = Text(), Loss()
    x, y = batch(LENGTHS, 33), batch([2] * 13, 9)

    def model(pair):
        return a(**pair["query"]) * a(**pair["document"])

    cache = GradCache([model, a], 99, loss, chunk_tokens=40)
    check(cache, ([{"query": x, "document": y}], x), lambda: (a(**x) * a(**y), a(**x)), a, loss)
    chunks = tokens.split_tokens({"query": x, "document": y}, 99, 40)
    assert [(*c["query"]["input_ids"].shape, c["document"]["input_ids"].shape[1]) for c in chunks] == [
        (3, 7, 2), (3, 11, 2), (1, 2, 2), (1, 30, 2), (5, 6, 2),
    ]  # fmt: skip


def test_padding_on_the_left_and_holes_stay():
    a, loss = Text(), Loss()
    x, y = batch(LENGTHS, 33, left=True), batch(LENGTHS, 33)
    y["attention_mask"][:, 0] = 0  # a hole at the start, and rows of one token left with nothing to attend to
    y["attention_mask"][:, 4] = 1
    cache = GradCache([a, a], 99, loss, chunk_tokens=99)
    check(cache, (x, y), lambda: (a(**x), a(**y)), a, loss)
    assert {width for _, width in a.shapes[2:]} >= {33, 11}


def test_embedded_inputs_are_cut_and_get_their_gradient():
    a, loss, embed = Text(), Loss(), nn.Embedding(50, 8)
    x, y = batch(LENGTHS, 33), batch(LENGTHS, 33)

    def embedded(text):
        return {"inputs_embeds": embed(text["input_ids"]), "attention_mask": text["attention_mask"]}

    loss(a(**embedded(x)), a(**y)).backward()
    wanted = embed.weight.grad.clone()
    embed.zero_grad()
    a.shapes.clear()
    GradCache([a, a], 99, loss, chunk_tokens=21)(embedded(x), y)
    torch.testing.assert_close(embed.weight.grad, wanted)
    assert a.shapes[0] == (3, 7)


def test_what_is_not_per_token_is_cut_by_rows_alone():
    x = {**batch([2, 1], 7), "pixel_values": torch.rand(2, 7), "side": torch.ones(2, 3, dtype=torch.int64)}
    first, second = tokens.split_tokens(x, 1, 100)
    assert {k: tuple(v.shape) for k, v in first.items()} == {
        "input_ids": (1, 2), "attention_mask": (1, 2), "token_type_ids": (1, 2), "pixel_values": (1, 7), "side": (1, 3),
    }  # fmt: skip
    assert second["input_ids"].shape == (1, 1)


def test_a_row_without_tokens_keeps_a_column():
    assert tokens.split_tokens(batch([0, 0], 5), 9, 9)[0]["input_ids"].shape == (2, 1)


@pytest.mark.parametrize(
    "error, message, make",
    [
        (
            ValueError,
            "needs an attention_mask .* got a Tensor without",
            lambda t, x: t(chunk_tokens=9)(torch.ones(2, 3)),
        ),
        (ValueError, "got a dict without", lambda t, x: t(chunk_tokens=9)({"attention_mask": torch.ones(2, 1, 3, 3)})),
        (ValueError, "chunk_tokens must be an integer of at least 1, got 0", lambda t, x: t(chunk_tokens=0)),
        (ValueError, "1 models need 1 or 1 chunk_tokens, got 2", lambda t, x: t(chunk_tokens=[1, 2])),
        (ValueError, "both cut the input", lambda t, x: t(chunk_tokens=9, split_input_fn=lambda x, n: [x])),
        (
            ValueError,
            r"share dimension 0, got \[\(3, 5\), \(2, 5\)\]",
            lambda t, x: t(chunk_tokens=9)({"attention_mask": torch.ones(3, 5), "input_ids": torch.ones(2, 5)}),
        ),
        (ValueError, "batch size must be at least 1", lambda t, x: t(chunk_tokens=9)({"attention_mask": x[:0]})),
    ],
)
def test_errors_say_what_came(error, message, make):
    with pytest.raises(error, match=message):
        make(lambda **options: GradCache([Text()], 4, Loss(), **options), torch.ones(2, 3))
