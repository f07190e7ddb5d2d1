"""AdaCAD's recipe: its questions, what it asks the model twice, and the command. The decoding itself is tested in
`test_two_logits.py`, its equation and golden values in `test_two_logit_mix.py`."""

from types import SimpleNamespace

import pytest
import torch
from decoding import make
from prefix import Words
from recipes import train_a_little

from fastcontrast import smollm2
from fastcontrast.ops import two_logit_mix
from fastcontrast.recipes import adacad
from fastcontrast.recipes._parts.adacad_questions import FACTS, KINDS, Question, capitals, questions


class Batch(Words):
    """`Words` for several texts, padded on the left."""

    pad_token_id = 0

    def __call__(self, texts, return_tensors, padding):
        rows = [super(Batch, self).__call__(text).input_ids for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return SimpleNamespace(input_ids=ids, attention_mask=mask)

    def batch_decode(self, ids, skip_special_tokens):
        return [self.decode(row) for row in ids.tolist()]


def test_documents_contradict_agree_or_are_silent():
    known, found = capitals(), questions(20, 0)
    assert len(known) == 116 and known["France"] == "Paris"
    assert [sum(question.kind == kind for question in found) for kind in KINDS] == [20] * 3
    for question in found:
        country = question.text.removeprefix("Question: What is the capital of ").split("?")[0]
        lines = dict(line.removeprefix("The capital of ").rstrip(".").split(" is ")
                     for line in question.document.split(". "))  # fmt: skip
        assert len(lines) == FACTS and question.with_document.endswith(f"The capital of {country} is")
        if question.kind == "is silent":
            assert country not in lines and question.answer == known[country]
        else:
            assert lines[country] == question.answer
            assert (question.answer == known[country]) == (question.kind == "agrees")
    assert found == questions(20, 0) != questions(20, 1)


def test_both_readings_meet_in_the_mix():
    model, asked = make("llama"), [Question("ab", "cdef", "g", KINDS[0]), Question("bcd", "a", "h", KINDS[0])]
    said, weights = adacad.answers(model, Batch(), asked, 3, method="adacad")
    plain, none = adacad.answers(model, Batch(), asked, 3, method="greedy")
    assert len(said) == len(plain) == 2 and none.isnan().all()
    for question, weight in zip(asked, weights, strict=True):
        z1, z0 = (
            model(torch.tensor([Words()(text).input_ids])).logits[:, -1]
            for text in (question.with_document, question.text)
        )
        torch.testing.assert_close(two_logit_mix(z1, z0).weight, weight[None], rtol=1e-4, atol=1e-6)
    other = [question._replace(document="zzz") for question in asked]
    alone = [adacad.answers(model, Batch(), some, 3, document=False, method="greedy")[0] for some in (asked, other)]
    assert alone[0] == alone[1]
    _, fixed = adacad.answers(model, Batch(), asked, 1, method="cad", weight=1.0)
    assert fixed.tolist() == [1, 1]


@pytest.mark.parametrize(("text", "expected"), [(" Paris.", True), ("paris", True), ("In Paris", False), ("", False)])
def test_an_answer_begins_with_the_right_word(text, expected):
    assert adacad.right([text], [Question("", "", "Paris", KINDS[1])]).tolist() == [expected]


def test_the_command_decodes_and_writes(tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(smollm2, "load", lambda progress: (make("llama"), Batch()))
    results = train_a_little("adacad", tmp_path, monkeypatch, weights=False)
    assert [*results["models"]] == [*adacad.METHODS]
    for label, found in results["models"].items():
        assert set(found["metrics"]) == {"right, %", *(f"{kind}, %" for kind in KINDS)} and not found["losses"]
        assert ("two_logit_mix" in found["implementations"]) == (label in ("CAD, a = 1", "AdaCAD"))
