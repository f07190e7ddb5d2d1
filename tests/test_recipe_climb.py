"""CLIMB against its definition: pace, the three curricula, heads over masked rows, pseudo-perplexity, the command."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from golden_decoding import F
from recipes import assert_ranks_equal_one, close, gradients, train_a_little
from torch import nn

from fastcontrast.recipes._parts import climb_data
from fastcontrast.recipes._parts.climb_curricula import SHAPES, TAGS
from fastcontrast.recipes._shared.masked import MaskedHead, mask_tokens
from fastcontrast.recipes.climb import (
    PLANS,
    Climber,
    Examples,
    HeadOptimizers,
    Unit,
    check_plan,
    pace,
    restrict,
    source_ranks,
    unigram_perplexity,
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------- pace


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", (0.141564039409, 0.584913793103, 0.917426108374)),
        ("quad", (0.101919521524, 0.361268207491, 0.842428269613)),
        ("root", (0.293410536083, 0.760622746954, 0.957719941203)),
        ("exp", (0.100023984395, 0.108897668679, 0.459544818127)),
        ("log", (0.723324085277, 0.944349456192, 0.991343415961)),
        ("step", (0.1, 0.1, 0.1)),
        ("none", (1, 1, 1)),
    ],
)
def test_golden_pace(shape, expected):
    close([pace(i, 1000, shape) for i in (100, 500, 800)], *expected, atol=1e-12)
    close([pace(i, 1000, shape) for i in (62, 875, 1000)], 1 if shape == "none" else 0.1, 1, 1, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_paces_rise_and_end(shape):
    found = [pace(i, 777, shape, start=0.1, end=0.7, first=0.2, most=0.9) for i in range(778)]
    assert found == sorted(found) and found[-1] == (1.0 if shape == "none" else 0.9)
    if shape not in ("none", "step"):
        at_start = pace(100, 1000, shape, start=0.1, end=0.7, first=0.2)
        assert at_start == pytest.approx(0.2, abs=1e-12)


@pytest.mark.parametrize(
    "wrong", [{"start": 0.5, "end": 0.5}, {"start": 0.6, "end": 0.5}, {"end": 1.5}, {"shape": "cubic"}]
)
def test_a_pace_needs_room(wrong):
    with pytest.raises(ValueError, match=r"pace: (start must lie before end|shape must be one of)"):
        pace(1, 10, **wrong)


# ----------------------------------------------------------------------------------------------------------- vocabulary

IDS = torch.tensor([0, 2, 5, 9, 12, 15, 7])
SPEECH = torch.tensor([11, 11, 0, 4, 3, 5, 8])
LIMITS = {"vocabulary": 20, "unknown": 3, "special": 4}


def restricted(share, by, ids=IDS, tags=SPEECH) -> list[int]:
    return restrict(ids, share, by=by, tags=None if by == "token_ids" else tags, **LIMITS).tolist()


def test_golden_vocabulary():
    assert restricted(0.5, "token_ids") == [0, 2, 5, 9, 3, 3, 7]
    assert restricted(0.5, "pos_tags") == [0, 2, 5, 9, 12, 15, 3]
    assert restricted(0.5, "pos_tags_and_token_ids") == [0, 2, 5, 9, 12, 3, 3]


def test_at_the_end_the_vocabulary_is_whole():
    assert restricted(1.0, "token_ids") == restricted(1.0, "pos_tags") == IDS.tolist()
    unknown = torch.tensor([11, 11, 11, 4, 11, 5, 8])  # X is mapped to the end, by the sum of both
    assert restricted(1.0, "pos_tags_and_token_ids", tags=unknown) == [0, 2, 3, 9, 3, 15, 7]


def test_special_tokens_and_ignored_labels_stay():
    labels = torch.tensor([-100, 0, 4, 19])
    assert restricted(0.0, "token_ids", labels) == [-100, 0, 4, 3]
    assert restricted(0.0, "pos_tags", labels, torch.tensor([11] * 4)) == [-100, 0, 4, 3]
    for wrong in ({"by": "length"}, {"by": "pos_tags"}, {"tags": SPEECH}):
        with pytest.raises(ValueError, match=r"restrict: (by must be|tags are for)"):
            restrict(IDS, 0.5, **LIMITS, **wrong)


# ----------------------------------------------------------------------------------------------------------------- data


def test_golden_percentile():
    scores = torch.tensor([5, 1, 4, 2, 3, 8])
    assert np.percentile(scores.numpy(), 46) == pytest.approx(3.3)
    assert Examples(scores).allowed(0.46).nonzero()[:, 0].tolist() == [1, 3, 4]


def test_examples_are_drawn_alike_below_the_percentile():
    examples = Examples(torch.arange(40.0), seed=3)
    drawn = torch.stack([examples.draw(i, 0.5, 5) for i in range(2000)])
    assert all(len(set(rows)) == 5 for rows in drawn.tolist()) and drawn.max() < 20
    counts = drawn.flatten().bincount(minlength=20).double()
    # Without replacement the variance is below that of chi-square with 19 degrees: its 99.9th percentile is 43.8.
    assert ((counts - 500) ** 2 / 500).sum() < 43.8
    assert torch.equal(examples.draw(7, 0.5, 5), Examples(torch.arange(40.0), seed=3).draw(7, 0.5, 5))
    by_score = torch.cat([Examples(torch.arange(40.0), even=False).draw(i, 0.5, 1) for i in range(2000)])
    assert by_score.double().mean() == pytest.approx(13, abs=0.5)  # Σ s² / Σ s of 0 … 19
    with pytest.raises(ValueError, match="a batch of 30 needs as many allowed examples, got 20"):
        examples.draw(0, 0.5, 30)


def test_scores():
    blocks = torch.tensor([[0, 0, 1, 0], [2, 3, 0, 0]])
    p = torch.tensor([5 / 8, 1 / 8, 1 / 8, 1 / 8])
    close(unigram_perplexity(blocks), (p[0] ** 3 * p[1]) ** -0.25, (p[0] ** 2 * p[2] * p[3]) ** -0.25, atol=1e-6)
    assert source_ranks(["b", "a", "b"], ["a", "b"]).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="order must name every source, got none for c"):
        source_ranks(["c"], ["a"])


# ------------------------------------------------------------------------------------------------------------ objective


def test_units_are_active_at_both_ends():
    unit = Unit("speech", TAGS, 0, 0.125)
    assert [unit.active(i, 1000) for i in (0, 125, 126)] == [True, True, False]
    tokens = PLANS["speech, then tokens"][1]
    assert [tokens.active(i, 1000) for i in (124, 125, 1000)] == [False, True, True]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([], "names of their own"),
        ([Unit("a"), Unit("a")], "names of their own"),
        ([Unit("a", TAGS)], "masked tokens must be one"),
        ([Unit("a", None, 0.5, 0.5)], "must begin before it ends"),
        ([Unit("a", ("ARTICLE",)), Unit("b")], "tags must be of"),
        ([Unit("a", TAGS, 0, 0.2), Unit("b", None, 0.3)], "none between 0.2 and 0.3"),
        ([Unit("a", None, 0, 0.9)], "none after 0.9"),
    ],
)
def test_a_plan_without_holes(plan, message):
    with pytest.raises(ValueError, match=message):
        check_plan(plan)


@pytest.mark.parametrize("plan", PLANS.values())
def test_the_paper_s_plans_are_plans(plan):
    assert check_plan(plan) == plan


def head(dtype=torch.float64) -> MaskedHead:
    found = MaskedHead(5, 7, 1e-5, tied=False).to(dtype)
    with torch.no_grad():
        found.dense.weight.copy_(F(5, 5, 0.2))
        found.dense.bias.zero_()
        found.weight.copy_(F(7, 5, 0.6))
        found.bias.copy_(F(1, 7, 0.9)[0])
    return found


LABELS = torch.tensor([-100, 3, -100, 0, 6, -100])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_head(dtype):
    ours, states = head(dtype), F(6, 5, 0).to(dtype).requires_grad_()
    loss = ours(states, None, LABELS)
    loss.backward()
    found = torch.stack([loss, states.grad.norm(), ours.weight.grad.norm()])
    expected = 4.390509431734, 1.377424537447, 1.658081485530
    close(found, *expected, atol=1e-8 if dtype == torch.float64 else 3e-6)


def dense(ours, states, labels) -> torch.Tensor:
    return nn.functional.cross_entropy(ours.logits(states).flatten(0, -2), labels.flatten())


def test_gathered_rows_equal_all_rows():
    found, expected = (gradients(lambda x, loss=loss: loss(head(), x), F(6, 5, 0)) for loss in (
        lambda ours, x: ours(x, None, LABELS), lambda ours, x: dense(ours, x, LABELS)))  # fmt: skip
    torch.testing.assert_close(found, expected)
    value, gradient = gradients(lambda x: head()(x, None, LABELS.clamp(max=-100)), F(6, 5, 0))
    assert value == 0 and not gradient.any()


def of_head(states, labels) -> torch.Tensor:
    return head()(states, None, labels)


def test_ranks_equal_one():
    assert_ranks_equal_one(of_head, [F(6, 5, 0), LABELS], (4, 2))


class Trunk(nn.Module):
    """State: an embedding of the token and of the mean of all."""

    def __init__(self, vocabulary=30, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(vocabulary, width)

    def forward(self, input_ids, attention_mask):
        x = self.table(input_ids)
        return type("Output", (), {"last_hidden_state": x + x.mean(1, keepdim=True)})


def climber(plan) -> Climber:
    torch.manual_seed(0)
    return Climber(Trunk(), PLANS[plan] if isinstance(plan, str) else plan, width=8, vocabulary=30, mask=2, special=2)


def drawn(rows=64, length=50) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(0)
    ids, tags = (torch.randint(most, (rows, length), generator=generator) for most in (30, len(TAGS)))
    return ids, tags, generator


def test_masked_tokens():
    ids, tags, generator = drawn()
    (unit,) = PLANS["tokens"]
    inputs, labels = climber("tokens").masked(unit, ids, tags, generator)
    chosen = labels >= 0
    assert (ids[chosen] > 2).all() and torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(inputs[~chosen], ids[~chosen])
    plain = ids > 2
    assert chosen.sum() / plain.sum() == pytest.approx(0.15, abs=0.02)
    assert (inputs[chosen] == 2).float().mean() == pytest.approx(0.9 + 0.1 / 30, abs=0.03)


def test_masked_speech():
    ids, tags, generator = drawn()
    told = torch.tensor([TAGS.index("NOUN"), TAGS.index("VERB")])
    unit = Unit("speech", ("NOUN", "VERB"))
    inputs, labels = climber([unit, Unit("tokens")]).masked(unit, ids, tags, generator)
    chosen = labels >= 0
    classes = (tags == told[0]) * 1 + (tags == told[1]) * 2
    assert torch.equal(labels[chosen], classes[chosen]) and unit.classes == 3
    shares = [chosen[classes > 0].float().mean(), chosen[(classes == 0) & (ids > 2)].float().mean()]
    close(shares, 0.4, 0.15, atol=0.04)
    assert not chosen[(classes == 0) & (ids <= 2)].any()  # special tokens of other parts of speech
    moved = inputs != ids
    assert (inputs[chosen] == 2).float().mean() == pytest.approx(0.8, abs=0.05) and not moved[~chosen].any()


def test_the_loss_is_the_sum_of_the_active_units_on_their_own():
    ids, tags, _ = drawn(4, 10)
    model = climber("both")
    both = gradients(lambda w: _loss(model, w, ids, tags, [0, 1]), model.trunk.table.weight)
    apart = [gradients(lambda w, i=i: _loss(model, w, ids, tags, [i]), model.trunk.table.weight) for i in (0, 1)]
    torch.testing.assert_close(both, tuple(a + b for a, b in zip(*apart, strict=True)))
    model = climber("speech, then tokens")
    step = [model(ids, tags, i, 1000, torch.Generator().manual_seed(1)) for i in (0, 125, 200)]
    assert step[1] > step[0] and step[1] > step[2]  # two units at the step where one follows the other


def _loss(model, weight, ids, tags, units) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    inputs = [model.masked(unit, ids, tags, generator) for unit in model.plan]
    model = copy.deepcopy(model)
    del model.trunk.table.weight
    model.trunk.table.weight = weight
    return sum(model.heads[model.plan[i].name](model.states(inputs[i][0]), None, inputs[i][1]) for i in units)


def test_a_restricted_vocabulary_reaches_tokens_and_not_labels_of_speech():
    seen = []

    def unknown(ids, tags):
        seen.append(ids.clone())
        return ids

    ids, tags, generator = drawn(4, 10)
    climber("both")(ids, tags, 1, 10, generator, unknown)
    assert len(seen) == 3  # inputs of both units, labels of tokens
    assert sum((x == -100).any().item() for x in seen) == 1


class Toy(Climber):
    """logits = W Σ_t E_t over the tokens of the masked input."""

    def states(self, ids):
        return F(7, 5, 0)[ids].sum(1, keepdim=True).expand(-1, ids.shape[1], -1)


class Linear(nn.Module):
    def logits(self, states):
        return states @ F(7, 5, 0.6).T


def toy(special=-1) -> Toy:
    model = Toy(nn.Module(), PLANS["tokens"], width=5, vocabulary=7, mask=0, special=special)
    model.heads["tokens"] = Linear()
    return model


def test_golden_pseudo_perplexity():
    ids = torch.tensor([[1, 4, 2, 6]])
    close(toy().pseudo_perplexity(ids), 395.655577682203)
    each = []
    for row in (two := torch.tensor([[1, 4, 2, 6], [3, 3, 5, 1]])):
        total = 0.0
        for i in range(4):
            masked = row.clone()
            masked[i] = 0
            total -= (F(7, 5, 0.6) @ F(7, 5, 0)[masked].sum(0)).log_softmax(0)[row[i]]
        each.append(math.exp(total / 4))
    close(toy().pseudo_perplexity(two), *each)


def test_special_tokens_are_not_counted():
    ids = torch.tensor([[1, 4, 2, 6], [1, 2, 1, 2]])
    logs = toy().log_probabilities(ids)
    close(toy(special=2).pseudo_perplexity(ids), (-(logs[0, 1] + logs[0, 3]) / 2).exp().item(), 1)


def test_heads_move_with_their_own_optimizers_and_resume():
    ids, tags, _ = drawn(4, 10)

    def go(model, heads, steps):
        for i in steps:
            model(ids, tags, i, 16, torch.Generator().manual_seed(i)).backward()
            heads.step(i)
            assert not any(p.grad is not None and p.grad.any() for p in model.heads.parameters())

    model = climber("speech, then tokens")
    heads = HeadOptimizers(model, 16)
    before = copy.deepcopy(model.heads.state_dict())
    go(model, heads, range(2))  # speech alone
    moved = {name.split(".")[0] for name, x in model.heads.state_dict().items() if not torch.equal(x, before[name])}
    assert moved == {"speech"}
    go(model, heads, range(2, 4))
    file = io.BytesIO()
    torch.save([model.state_dict(), heads.state_dict()], file)
    file.seek(0)
    again = climber("speech, then tokens")
    other = HeadOptimizers(again, 16)
    for target, state in zip((again, other), torch.load(file), strict=True):
        target.load_state_dict(state)
    for one, optimizers in ((model, heads), (again, other)):
        go(one, optimizers, range(4, 6))
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_masking_checks_what_it_gets():
    ids = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"mask_tokens: maskable must be bool \[2, 3\], got torch.bool \[3\]"):
        mask_tokens(ids, ids[0].bool(), mask_id=0, vocabulary=5)
    with pytest.raises(ValueError, match=r"probability must lie in \[0, 1\], got 2"):
        mask_tokens(ids, ids.bool(), mask_id=0, vocabulary=5, probability=2)


# ------------------------------------------------------------------------------------------------------------- the data


@pytest.mark.parametrize(
    ("word", "tag"),
    [("The", "DET"), ("quickly", "ADV"), ("parsing", "VERB"), ("file", "NOUN"), ("3.5", "NUM"), (".", "."), ("*", "X"),
     ("optional", "ADJ"), ("They", "PRON"), ("of", "ADP"), ("and", "CONJ"), ("not", "PRT")],
)  # fmt: skip
def test_parts_of_speech(word, tag):
    assert climb_data.tag(word) == tag


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    size = {"width": 16, "layers": 1, "heads": 2, "hidden": 16}
    settings = {"BATCH": 4, "LENGTH": 16, "VOCABULARY": 400, "SIZE": size, "TESTED": 2}
    results = train_a_little("climb", tmp_path, monkeypatch, **settings)
    assert [*results["models"]] == ["no curriculum", "vocabulary", "objective", "data"]
    losses = {label: found["losses"][0] for label, found in results["models"].items()}
    assert losses["objective"] < 3.5 < losses["no curriculum"]  # of 13 classes, and of 400 tokens
    for found in results["models"].values():
        assert len(found["losses"]) == 2 and found["metrics"]["pseudo-perplexity"] > 1
        assert "similarity_lse" in found["implementations"]
