"""SPACE-2 against its definition: golden trees and losses, the dense formula, invariants, edges, ranks, fine-tuning,
masked words, the data, the command."""

import ast
import math

import pytest
import torch
from golden_decoding import F
from recipes import assert_ranks_equal_one, close, gradients, train_a_little, unit

from fastcontrast import nt_xent_loss, supcon_loss
from fastcontrast.recipes._parts import space2_dialogs
from fastcontrast.recipes._parts.space2_dialogs import inner, slots, verb
from fastcontrast.recipes._shared.encoder import Encoder
from fastcontrast.recipes._shared.masked import IGNORED, mask_tokens
from fastcontrast.recipes.space2 import (
    MaskedWords,
    Space2,
    TreeScores,
    labels_of,
    r_drop_loss,
    scores_of,
    soft_supcon_loss,
    tree_loss,
)

A = {"hotel": {"inform": {"area": ["north"], "stars": ["4"]}}}
B = {"hotel": {"inform": {"area": ["south"]}, "request": {"phone": []}}}
C = {"hotel": {"inform": {"area": ["north"]}}}
ROWS = torch.cat([unit(F(4, 8, 0)), unit(F(4, 8, 0.2))])
SOFT = torch.tensor([[1, 0.5, 0, 0.25], [0.5, 1, 0.75, 0], [0, 0.75, 1, 0.1], [0.25, 0, 0.1, 1]], dtype=torch.float64)


def dense(z, weights, tau=0.07, base_tau=0.07):
    """On the matrix [N, N], with the weights tiled; rows without a weight give 0."""
    own = torch.eye(len(z), dtype=torch.bool)
    w = weights.repeat(len(z) // len(weights), len(z) // len(weights)).to(z.dtype).masked_fill(own, 0)
    logs = (z @ z.T / tau).masked_fill(own, -math.inf).log_softmax(1).masked_fill(own, 0)
    return -tau / base_tau * ((w * logs).sum(1) / w.sum(1).clamp(min=1e-300)).mean()


# ------------------------------------------------------------------------------------------------------------ the trees


@pytest.mark.parametrize(
    ("other", "expected"),
    [(B, (1, 0.5, 1 / 3, 0, 0.5, 1 / 3, 0, 1 / 3, 0, 0, 0.3)),
     (C, (1, 1, 0.5, 0.5, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.65)),
     (A, (1,) * 11), ({}, (0,) * 11)],
)  # fmt: skip
def test_golden_trees(other, expected):
    for a, b in ((A, other), (other, A)):
        close(scores_of(labels_of(a), labels_of(b)), *expected)
    matrix = TreeScores([A, other])
    close(matrix([0, 1])[:, 0, 1], *expected[:-1], atol=1e-7)
    close(matrix.combined([0, 1]), 1, expected[-1], expected[-1], 1, atol=1e-7)


def test_edges_of_trees():
    assert scores_of(labels_of({}), labels_of({})) == (0,) * 11  # empty comes before equal
    assert scores_of(labels_of({" Hotel": {"INFORM ": {"Area": [" North"]}}}), labels_of(C)) == (1,) * 11
    assert scores_of(labels_of({"a": {"b": {"c": ["x", "x"]}}}), labels_of({"a": {"b": {"c": ["x"]}}})) == (1,) * 11
    no_values = scores_of(labels_of({"a": {"b": {"c": []}}}), labels_of({"a": {"b": {"c": []}}}))
    assert no_values == (1, 1, 1, 0, 1, 1, 0, 1, 0, 0, 1)  # views that both lack are 0 and count in no mean
    halves = scores_of(labels_of({"a": {"b": {}}}), labels_of({"a": {"c": {}}}))
    assert halves[-1] == pytest.approx(1 / 3)  # D, I and DI count
    one, other = {"a": {"b": {"c-d": []}}}, {"a": {"b-c": {"d": []}}}  # a separator joins nothing
    assert scores_of(labels_of(one), labels_of(other))[5] == 0


def test_placeholders_are_in_no_view():
    none, also = ({"hotel": {"None": {"area": ["north"]}}} for _ in range(2))
    d, i, s, v, di, is_, sv, dis, isv, disv, _ = labels_of(none, {"none "})
    assert d == {("hotel",)} and s == {("area",)} and v == {("north",)} and sv == {("area", "north")}
    assert not i | di | is_ | dis | isv | disv
    assert scores_of(labels_of(none, {"none"}), labels_of(also, {"none"})) == (1, 0, 1, 1, 0, 0, 1, 0, 0, 0, 1)
    close(scores_of(labels_of(none, {"none"}), labels_of(C, {"none"}))[-1], 4 / 10)


def test_pairs_are_kept_by_their_ids():
    scores = TreeScores([A, B, C, {}])
    first = scores([2, 0, 1, 3])
    assert scores.pair.cache_info().misses == 6
    order = torch.tensor([1, 2, 0, 3])
    assert torch.equal(scores(torch.tensor([0, 1, 2, 3])), first[:, order][:, :, order])
    assert scores.pair.cache_info().misses == 6 and scores.pair.cache_info().hits == 6
    assert torch.equal(first, first.mT) and (first.diagonal(dim1=1, dim2=2) == 1).all()
    assert scores([3]).tolist() == [[[1.0]]] * 10 and scores([]).shape == (10, 0, 0)
    assert scores([0, 0])[:, 0, 1].tolist() == [1.0] * 10


# ------------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize(
    ("weights", "expected"), [(SOFT, 6.529777042577), (torch.eye(4), 0.007908936), (torch.ones(4, 4), 12.614294347289)]
)
def test_golden_losses(weights, expected):
    close(soft_supcon_loss(ROWS, weights.double()), expected)
    close(soft_supcon_loss(ROWS.float(), weights.float()), expected, atol=5e-6)
    close(soft_supcon_loss(ROWS, weights.double(), base_tau=0.14), expected / 2)
    views = torch.stack([ROWS, ROWS], 1)
    close(tree_loss(views, torch.stack([weights.double(), SOFT])), (expected + 6.529777042577) / 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("count", "copies"), [(37, 2), (13, 3), (29, 1)])
def test_equals_the_dense_formula(count, copies, dtype, tolerance):
    """Weights neither symmetric nor below 1, an empty row, and one whose sole weight is its own."""
    torch.manual_seed(0)
    z = unit(torch.randn(copies * count, 11, dtype=torch.float64))
    weights = 3 * torch.rand(count, count, dtype=torch.float64) * (torch.rand(count, count) < 0.3)
    weights[4], weights[5] = 0, 0
    weights[5, 5] = 2
    expected = gradients(lambda x: dense(x, weights, 0.1, 0.07), z)
    found = gradients(lambda x, w: soft_supcon_loss(x, w, 0.1), z.to(dtype), weights.to(dtype))
    assert not found[2].any()  # weights are constants
    for ours, theirs in zip(found, expected, strict=False):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_special_weights(dtype):
    z, atol = ROWS.to(dtype), 1e-10 if dtype == torch.float64 else 5e-6
    first, second = z.chunk(2)
    eye, classes = torch.eye(4, dtype=dtype), torch.tensor([0, 1, 0, 2])
    close(soft_supcon_loss(z, eye), nt_xent_loss(first, second, 1 / 0.07), atol=atol)
    hard = (classes[:, None] == classes).to(dtype)
    close(soft_supcon_loss(z, hard), supcon_loss(z, classes.repeat(2), 1 / 0.07), atol=atol)
    factors = torch.tensor([[0.5], [3], [7], [1]])
    close(soft_supcon_loss(z, factors * SOFT), soft_supcon_loss(z, SOFT), atol=atol)
    views = torch.stack([z, z.flip(1).roll(1, 0)], 1)
    close(tree_loss(views), tree_loss(views, eye.expand(2, 4, 4)), atol=atol)
    close(tree_loss(views, tau=0.1, base_tau=0.2), tree_loss(views, eye.expand(2, 4, 4), 0.1, base_tau=0.2), atol=atol)
    close(tree_loss(views[:, :1], SOFT[None]), soft_supcon_loss(z, SOFT), atol=atol)


def test_edges_of_the_loss():
    value, gradient = gradients(lambda z: soft_supcon_loss(z, torch.zeros(4, 4)), ROWS.float())
    assert value == 0 and not gradient.any()
    alone = SOFT.clone()
    alone[1:] = 0  # the divisor stays 2B
    close(soft_supcon_loss(ROWS, alone), dense(ROWS, alone))
    collapsed = unit(torch.ones(8, 3))
    close(soft_supcon_loss(collapsed, torch.ones(4, 4)), math.log(7), atol=5e-6)  # the least there is
    apart = SOFT * torch.eye(4)  # no label in common
    close(soft_supcon_loss(ROWS, apart), 0.007908936)
    assert soft_supcon_loss(torch.zeros(0, 3), torch.zeros(0, 0)) == 0
    value, gradient = gradients(lambda z: soft_supcon_loss(z, torch.ones(1, 1)), ROWS[:1].float())
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [(lambda: soft_supcon_loss(ROWS[0], SOFT), "soft_supcon_loss: z must be a matrix"),
     (lambda: soft_supcon_loss(ROWS[:7], SOFT), "soft_supcon_loss: z must have a multiple of 4 rows, .* got 7"),
     (lambda: soft_supcon_loss(ROWS, SOFT[:2]), "soft_supcon_loss: weights must be .* got \\[2, 4\\]"),
     (lambda: tree_loss(ROWS), "tree_loss: z must be \\[2B, views, D\\]"),
     (lambda: tree_loss(ROWS[:, None], SOFT), "tree_loss: weights must be \\[views, B, B\\]"),
     (lambda: tree_loss(ROWS[:, None], SOFT.expand(2, 4, 4)), "tree_loss: weights must be of 1 views, .* got 2")],
)  # fmt: skip
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def whole(first, second, weights):
    views = torch.stack([torch.cat([first, second])] * 2, 1)
    return tree_loss(views, torch.stack([weights, weights.square()]), 0.2) + tree_loss(views, tau=0.2)


def test_ranks_equal_one():
    weights = torch.rand(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_ranks_equal_one(whole, [unit(F(5, 8, 0)), unit(F(5, 8, 0.4)), weights], (3, 2))


# -------------------------------------------------------------------------------------------- the model, and its pieces


def test_r_drop():
    first, second, labels = F(4, 5, 0), F(4, 5, 0.3), torch.tensor([0, 3, 4, 3])
    p, q = first.softmax(1), second.softmax(1)
    cross = -(p[range(4), labels].log() + q[range(4), labels].log()).mean() / 2
    kl = [(a * (a / b).log()).sum(1).mean() for a, b in ((p, q), (q, p))]
    close(r_drop_loss(first, second, labels), cross + 5 * sum(kl) / 2)
    close(r_drop_loss(first, first, labels), torch.nn.functional.cross_entropy(first, labels))
    close(r_drop_loss(first, second, labels, 0.0), cross)


def test_words_are_hidden_as_bert_hides_them():
    torch.manual_seed(0)
    ids = torch.randint(1000, 2000, (200, 30))
    mask = torch.arange(30) < torch.randint(3, 31, (200, 1))
    inputs, targets = mask_tokens(ids, inner(mask), mask_id=7, vocabulary=500)
    hidden, within = targets != IGNORED, mask.clone()
    within[:, 0] = False
    within[torch.arange(200), mask.sum(1) - 1] = False
    assert not (hidden & ~within).any() and torch.equal(targets[hidden], ids[hidden])
    assert torch.equal(inputs[~hidden], ids[~hidden])
    share = hidden.sum() / within.sum()
    masked, other = (inputs[hidden] == 7).double().mean(), (inputs[hidden] < 500).double().mean() - 1 / 5000
    close(torch.stack([share, masked, other - masked]), 0.15, 0.8, 0.1, atol=0.03)


def test_the_loss_of_masked_words_is_a_cross_entropy_through_the_words():
    encoder = Encoder(1, dropout=0.0)
    words = MaskedWords(encoder)
    ids, mask = encoder.tokens(["Return the names of all files.", "Close it."])
    torch.manual_seed(2)
    inputs, targets = mask_tokens(ids, inner(mask), mask_id=words.mask_id, vocabulary=len(words.head.bias))
    assert (targets != IGNORED).any() and encoder.tokenizer.id_to_token(words.mask_id) == "[MASK]"
    torch.manual_seed(2)
    found = words(encoder, ids, mask)
    logits = words.head.logits(encoder.states(inputs, mask), encoder.bert.embeddings.word_embeddings.weight)
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    found.backward()
    assert encoder.bert.embeddings.word_embeddings.weight.grad.any(1).all()  # all words are classes
    assert words(encoder, ids, mask & False) == 0  # nothing to hide


def test_the_model_is_two_passes_ten_views_and_masked_words():
    torch.manual_seed(0)
    model = Space2(Encoder(1, dropout=0.2), width=6, of_words=0.5)
    texts = ["Return the names of all files.", "Close it.", "Open the file at a path."]
    weights = torch.rand(10, 3, 3)
    torch.manual_seed(1)
    found = model(texts, weights)
    torch.manual_seed(1)
    ids, mask = model.encoder.tokens(texts)
    h = model.encoder.pool(model.encoder.states(ids.repeat(2, 1), mask.repeat(2, 1)), mask.repeat(2, 1))
    assert not torch.equal(h[:3], h[3:])  # another dropout
    expected = 0.0
    for m in range(10):
        rows = slice(6 * m, 6 * m + 6)
        z = unit(torch.tanh(h @ model.views.weight[rows].T + model.views.bias[rows]))
        expected = expected + dense(z.double(), weights[m]) / 10
    torch.testing.assert_close(found, expected + 0.5 * model.words(model.encoder, ids, mask), check_dtype=False)


# ------------------------------------------------------------------------------------------------------------- the data


def test_functions_become_trees():
    node = ast.parse("def f(self, a, b=None, *, c, d=[1], e): ...").body[0]
    assert slots(node, "Sets b, c and d: `a1`.") == {"b": ["None"], "c": [], "d": ["[1]"]}
    assert [verb(x) for x in ("Returns x", "`Close` it", "Pass y", "Is it", "...")] == [
        "return",
        "close",
        "pass",
        "is",
        "",
    ]


def test_docstrings_have_trees(monkeypatch):
    monkeypatch.setattr(space2_dialogs, "INTENTS", 5)
    found = space2_dialogs.dialogs(80)
    assert len(found) > 30 and len({one.text for one in found}) == len(found)
    assert len({one.intent for one in found}) == 6 and any(one.intent == space2_dialogs.NONE for one in found)
    for one in found:
        ((package, intents),) = one.frame.items()
        assert package == one.domain and [*intents] == [one.intent]
        assert one.intent == space2_dialogs.NONE or verb(one.text) == one.intent
        assert all(name in one.text for name in intents[one.intent])


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    results = train_a_little("space2", tmp_path, monkeypatch, BATCH=4, TESTED=40)
    assert [*results["models"]] == ["the start", "dropout alone", "hard labels", "SPACE-2"]
    first = []
    for label, found in results["models"].items():
        assert [*found["metrics"]] == ["intent, %", "domain, %"]
        if label != "the start":
            assert len(found["losses"]) == 2 and {"similarity_lse", "similarity_topk"} == {*found["implementations"]}
            first.append(found["losses"][0])
    assert first[0] < first[2]  # soft positives that are not the other copy cost more
