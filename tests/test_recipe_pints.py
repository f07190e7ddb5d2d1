"""1.5-Pints against its definition: the losses of its three stages, accumulation, rates, sizes, the command."""

import copy
import math

import pytest
import torch
from golden_decoding import F
from recipes import assert_ranks_equal_one, close, gradients, train_a_little

from fastcontrast.ops import linear_cross_entropy, linear_logprob
from fastcontrast.recipes import pints
from fastcontrast.recipes._parts import pints_data
from fastcontrast.recipes._shared.language import END, IGNORED, llama
from fastcontrast.recipes._shared.report import train
from fastcontrast.recipes.pints import PINTS, SIBLING, accumulated, answer_logprobs, answer_loss, dpo_loss, rate_at

HIDDEN, WEIGHT, PAD = F(6, 5, 0), F(7, 5, 0.6), 6


def reading(hidden, weight, targets) -> torch.Tensor:
    return linear_cross_entropy(hidden, weight, torch.tensor(targets), ignore_index=PAD)


def in_two(hidden, weight, targets) -> torch.Tensor:
    halves = [(hidden[:3], targets[:3]), (hidden[3:], targets[3:])]
    return sum(accumulated(halves, lambda half: reading(half[0], weight, half[1])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_pre_training(dtype):
    atol = 1e-8 if dtype == torch.float64 else 2e-6
    even, uneven = [0, 3, 6, 2, 6, 1], [0, 3, 6, 6, 6, 1]
    given = HIDDEN.to(dtype), WEIGHT.to(dtype)
    for loss in (reading, in_two):  # two valid targets in either half
        value, of_hidden, of_weight = gradients(lambda h, w, loss=loss: loss(h, w, even), *given)
        close(torch.stack([value, of_hidden.norm(), of_weight.norm()]), 3.128007290988, 1.008577447092, 0.836864279493,
              atol=atol)  # fmt: skip
    close(reading(*given, uneven), 3.873473914930, atol=atol)
    value, _, of_weight = gradients(lambda h, w: in_two(h, w, uneven), *given)
    close(torch.stack([value, of_weight.norm()]), 4.312052082873, 1.186612096541, atol=atol)


def test_pads_alone_add_nothing():
    value, *found = gradients(lambda h, w: reading(h, w, [PAD] * 6), HIDDEN, WEIGHT)
    assert value == 0 and not any(g.any() for g in found)
    half = gradients(lambda h, w: in_two(h, w, [0, 3, 2, PAD, PAD, PAD]), HIDDEN, WEIGHT)
    alone = gradients(lambda h, w: reading(h[:3], w, [0, 3, 2]) / 2, HIDDEN, WEIGHT)
    torch.testing.assert_close(half, alone)


def test_accumulation_holds_one_graph_and_equals_one_batch():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(3, 1), torch.randn(4, 3)
    other, graphs = copy.deepcopy(layer), []

    def loss_of(part):
        graphs.append(sum(p.grad is not None for p in layer.parameters()))
        return layer(part).square().mean()

    found = train("in parts", 2, layer, lambda _: accumulated(x.chunk(4), loss_of), rate=0.1)
    expected = train("at once", 2, other, lambda _: other(x).square().mean(), rate=0.1)
    assert graphs[:4] == [0, 2, 2, 2]  # the backward of one comes before the next
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close([*layer.parameters()], [*other.parameters()])


CHOSEN = [(F(4, 5, 0), [-100, 0, 3, 6]), (F(4, 5, 1.4), [-100, -100, 1, 4])]
REJECTED = [(F(3, 5, 0.3), [-100, 2, 5]), (F(3, 5, 2.2), [-100, 6, 0])]


def of_sequences(weight, sequences) -> torch.Tensor:
    return torch.stack([linear_logprob(h.to(weight.dtype), weight, torch.tensor(y)).sum() for h, y in sequences])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("beta", "loss", "norm"), [(0.1, 0.704518539002, 0.119614626097), (1.0, 0.813481490587, 1.314427728415)]
)
def test_golden_preferences(dtype, beta, loss, norm):
    frozen = F(7, 5, 0.7).to(dtype)
    before = [of_sequences(frozen, some) for some in (CHOSEN, REJECTED)]

    def objective(weight):
        return dpo_loss(of_sequences(weight, CHOSEN), of_sequences(weight, REJECTED), *before, beta=beta)

    value, of_weight = gradients(objective, WEIGHT.to(dtype))
    close(torch.stack([value, of_weight.norm()]), loss, norm, atol=1e-8 if dtype == torch.float64 else 3e-6)
    if dtype == torch.float64:
        now = [of_sequences(WEIGHT, some) for some in (CHOSEN, REJECTED)]
        close((now[0] - before[0]) - (now[1] - before[1]), -0.136321444340, -0.315578664507)


def test_preferences_are_differences_to_a_frozen_reference():
    a, b, c, d = F(4, 5, 0).unbind(1)[:4]
    expected = torch.nn.functional.softplus(-0.3 * (a - c - b + d)).mean()
    torch.testing.assert_close(dpo_loss(a, b, c, d, beta=0.3), expected)
    _, *found = gradients(lambda *x: dpo_loss(*x, beta=0.3), a, b, c, d)
    assert found[0].any() and not found[2].any() and not found[3].any()
    torch.testing.assert_close(found[0], -found[1])
    close(dpo_loss(a, b, a, b), math.log(2))
    close(dpo_loss(a + 1e4, b, a, b), 0)
    close(dpo_loss(a - 1e4, b, a, b), 1e3)  # no overflow
    with pytest.raises(ValueError, match=r"dpo_loss: reference_worse must be \[4\] to match better, got \[3\]"):
        dpo_loss(a, b, c, d[:3])


def test_ranks_equal_one():
    assert_ranks_equal_one(dpo_loss, [*F(5, 4, 0).unbind(1)], (2, 3))


def test_golden_rates():
    accumulation = 8
    warmup, total = 2000 * accumulation, 96180 * accumulation
    found = [rate_at(it, total, warmup) for it in (0, 8000, 16000, 200000, 500000, 769440)]
    expected = 0, 2e-4, 4e-4, 3.495719639639e-4, 1.421405846797e-4, 4e-5
    close(torch.tensor(found, dtype=torch.float64), *expected, atol=1e-12)


@pytest.mark.parametrize(("size", "count"), [(PINTS, 1.566e9), (SIBLING, 0.12e9)])
def test_sizes(size, count):
    with torch.device("meta"):
        model = llama(**size)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, rel=0.05 if size is SIBLING else 1e-3)
    assert not any(name.endswith("bias") for name, _ in model.named_parameters()) and size["vocabulary"] % 64 == 0


class Letters:
    """A tokenizer whose ids are code points; `END` is 0."""

    def encode(self, text):
        ids = [ord(letter) for letter in text.removesuffix(END)] + [0] * text.endswith(END)
        return type("Encoding", (), {"ids": ids})


def test_only_answers_count(monkeypatch):
    monkeypatch.setattr(pints_data, "LONGEST", 6)
    ids, labels = pints.encode(Letters(), ["ab", "abcd"], ["xy", "uvw"])
    assert ids.tolist() == [[97, 98, 10, 120, 121, 0], [97, 98, 99, 100, 10, 117]]
    assert labels.tolist() == [[IGNORED, IGNORED, 120, 121, 0], [IGNORED] * 4 + [117]]
    torch.manual_seed(0)
    model = llama(128, width=16, layers=1, heads=2).double()
    logits = model(input_ids=ids[:, :-1]).logits.log_softmax(-1)
    each = [logits[0, 2, 120], logits[0, 3, 121], logits[0, 4, 0], logits[1, 4, 117]]
    torch.testing.assert_close(answer_loss(model, ids, labels), -torch.stack(each).mean())
    torch.testing.assert_close(answer_logprobs(model, ids, labels), torch.stack([sum(each[:3]), each[3]]))


def test_the_wrong_answer_has_the_words_of_the_right_one_in_another_order():
    found = pints_data.questions(0, limit=40)
    assert len(found) > 20 and found == pints_data.questions(0, limit=40) != pints_data.questions(1, limit=40)
    assert len({question.right for question in found}) == len(found)
    assert all(question.right != question.wrong for question in found)
    assert all(sorted(question.right.split()) == sorted(question.wrong.split()) for question in found)


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(pints, "news_texts", lambda: ["The senate met on Monday. " * 60])
    size = {"width": 32, "layers": 1, "heads": 2, "kv_heads": 1, "hidden": 32}
    results = train_a_little("pints", tmp_path, monkeypatch, BATCH=4, LENGTH=32, VOCABULARY=512, SIZE=size)
    assert [*results["models"]] == ["source", "1.5-Pints, prose"]
    for found in results["models"].values():
        assert len(found["losses"]) == 2 and found["losses"][0] == pytest.approx(math.log(512), abs=0.5)
        assert set(found["metrics"]) == {"news, bits a byte", "right answer preferred, %"}
        assert "similarity_lse" in found["implementations"]
