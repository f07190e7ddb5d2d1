"""PCP against its definition: golden values, dense formulas, masking, templates, tied and soft tokens, ranks, a run."""

import pytest
import torch
import torch.nn.functional as F
from golden_decoding import F as waves
from recipes import assert_ranks_equal_one, close, gradients, train_a_little
from torch import nn

from fastcontrast.ops import linear_cross_entropy
from fastcontrast.recipes._parts.pcp_prompt import Special
from fastcontrast.recipes.pcp import (
    MaskedHead,
    MaskedLM,
    Template,
    label_value_loss,
    label_word_loss,
    label_words,
    mask_tokens,
)

HIDDEN, WEIGHT = waves(6, 8, 0), waves(11, 8, 0.5)
TARGETS, BIAS = torch.tensor([3, -100, 7, 0, 10, -100]), torch.arange(11).double() / 10
WORDS, CLASSES = torch.tensor([2, 9]), torch.tensor([1, 0])
DTYPES = pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-11), (torch.float32, 3e-6)])


def bare_head(dtype=torch.float64, bias=None) -> MaskedHead:
    """A head without layers: states are what W multiplies."""
    head = MaskedHead(8, 11).to(dtype)
    head.hidden = lambda x: x
    if bias is not None:
        head.bias = nn.Parameter(bias.to(dtype))
    return head


def rows(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------------------------------------- masked language models


@DTYPES
def test_golden_masked_loss(dtype, atol):
    hidden, weight = HIDDEN.to(dtype), WEIGHT.to(dtype)
    for bias, expected in ((None, 4.927665430274), (BIAS, 4.760265815417)):
        close(bare_head(dtype, bias)(hidden, weight, TARGETS), expected, atol=atol)
    close(linear_cross_entropy(hidden, weight, TARGETS, reduction="sum"), 4 * 4.927665430274, atol=4 * atol)
    shifted = bare_head(dtype, BIAS + 7)(hidden, weight, TARGETS)  # by a constant: nothing changes
    close(shifted, 4.760265815417, atol=2 * atol)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_gathered_rows_equal_all_rows(dtype, tolerance):
    torch.manual_seed(0)
    head = MaskedHead(8, 37).double()
    nn.init.normal_(head.bias)
    states, weight = rows(5, 13, 8), rows(37, 8, seed=1)
    targets = torch.randint(37, (5, 13)).masked_fill(torch.rand(5, 13) > 0.2, -100)
    names, parameters = zip(*head.named_parameters(), strict=True)

    def dense(states, weight, *given):
        p = dict(zip(names, given, strict=True))
        h = F.layer_norm(F.gelu(F.linear(states, p["dense.weight"], p["dense.bias"])), (8,),
                         p["norm.weight"], p["norm.bias"], 1e-12)  # fmt: skip
        return F.cross_entropy((h @ weight.T + p["bias"]).flatten(0, 1), targets.flatten())

    def ours(states, weight, *given):
        return torch.func.functional_call(head, dict(zip(names, given, strict=True)), (states, weight, targets))

    expected = gradients(dense, states, weight, *parameters)
    found = gradients(ours, *(x.to(dtype) for x in (states, weight, *parameters)))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and (a.double() - b).norm() <= tolerance * b.norm()


def test_no_target_is_a_loss_of_0():
    head, none = MaskedHead(8, 11).double(), torch.full((2, 3), -100)
    parameters = dict(head.named_parameters())
    value, *found = gradients(
        lambda states, weight, *given: torch.func.functional_call(
            head, dict(zip(parameters, given, strict=True)), (states, weight, none)
        ),
        rows(2, 3, 8), WEIGHT, *parameters.values(),
    )  # fmt: skip
    assert value == 0 and all(g.norm() == 0 for g in found)


def test_padding_of_the_vocabulary_gets_no_probability():
    padded = torch.cat([WEIGHT, 5 * rows(5, 8)])
    value, _, of_weight = gradients(lambda h, w: bare_head(bias=BIAS)(h, w, TARGETS), HIDDEN, padded)
    close(value, 4.760265815417)
    assert of_weight[11:].norm() == 0 and of_weight[:11].norm() > 0


def test_tied_weights_add_both_gradients():
    ids = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(1, 1).masked_fill(ids % 3 == 0, -100)

    def tied(weight):
        return bare_head(bias=BIAS)(F.embedding(ids, weight).tanh(), weight, targets)

    def dense(weight):
        return F.cross_entropy((weight[ids].tanh() @ weight.T + BIAS).flatten(0, 1), targets.flatten())

    torch.testing.assert_close(gradients(tied, WEIGHT), gradients(dense, WEIGHT))


def test_no_logits_are_kept():
    sizes = []

    def note(x):
        sizes.append(x.numel())
        return x

    head, weight = MaskedHead(16, 9001), rows(9001, 16, dtype=torch.float32).requires_grad_()
    targets = torch.arange(640).masked_fill(torch.arange(640) % 2 == 0, -100)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        head(rows(640, 16, dtype=torch.float32), weight, targets)
    assert max(sizes) <= weight.numel() < 320 * 9001 / 10


def masked_of_all(states, targets):
    return bare_head(bias=BIAS)(states, WEIGHT, targets) + label_word_loss(states, WEIGHT, WORDS, targets % 2, BIAS)


def test_ranks_equal_one():
    assert_ranks_equal_one(masked_of_all, [rows(5, 8), torch.tensor([3, -100, 7, -100, 10])], (3, 2))


def test_what_is_masked():
    ids = torch.randint(5, 100, (400, 50), generator=torch.Generator().manual_seed(0))
    maskable = torch.ones_like(ids, dtype=torch.bool)
    maskable[:, 0] = maskable[:, 40:] = False
    draw = {"mask_id": 3, "vocabulary": 100}
    inputs, targets = mask_tokens(ids, maskable, **draw, generator=torch.Generator().manual_seed(1))
    chosen = targets != -100
    assert not chosen[~maskable].any() and (inputs == ids)[~chosen].all() and (targets == ids)[chosen].all()
    count = chosen.sum().item()
    assert abs(count / maskable.sum().item() - 0.15) < 0.01
    hidden, same = (inputs == 3)[chosen].sum().item() / count, (inputs == ids)[chosen].sum().item() / count
    assert abs(hidden - 0.801) < 0.03 and abs(same - 0.101) < 0.03  # a random token may be the mask, or the same
    others = inputs[chosen & (inputs != 3) & (inputs != ids)]
    assert len(others.unique()) > 80 and int(others.min()) >= 0 and int(others.max()) < 100
    again = mask_tokens(ids, maskable, **draw, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again[0], inputs) and torch.equal(again[1], targets)


def test_masking_at_its_ends():
    ids, maskable = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.bool)
    maskable[:, 0] = maskable[1, 1] = False
    draw = {"mask_id": 3, "vocabulary": 100}
    none, targets = mask_tokens(ids, maskable, **draw, probability=0.0)
    assert torch.equal(none, ids) and (targets == -100).all()
    assert torch.equal(mask_tokens(ids, maskable, **draw, probability=1.0)[1] != -100, maskable)
    first = mask_tokens(ids, maskable, **draw, probability=0.0, always=1)[1]
    assert first[0, 1] == 1 and (first != -100).sum() == 1  # of the second row it is not maskable
    with pytest.raises(ValueError, match=r"mask_tokens: probability must lie in \[0, 1\], got 1.5"):
        mask_tokens(ids, maskable, **draw, probability=1.5)
    with pytest.raises(ValueError, match=r"mask_tokens: maskable must be bool \[2, 6\], got torch.bool \[6\]"):
        mask_tokens(ids, maskable[0], **draw)


# ------------------------------------------------------------------------------------------------------------- prompts


@DTYPES
def test_golden_label_words(dtype, atol):
    close(label_word_loss(HIDDEN[[0, 2]].to(dtype), WEIGHT.to(dtype), WORDS, CLASSES), 0.027882734431, atol=atol)


def test_the_softmax_of_label_words_is_that_of_all_renormalised():
    hidden, classes, words = rows(7, 8), torch.tensor([0, 2, 1, 1, 0, 2, 2]), torch.tensor([4, 0, 9])

    def dense(hidden, weight, bias):
        every = (hidden @ weight.T + bias).softmax(1)[:, words]
        return -(every / every.sum(1, keepdim=True)).log()[torch.arange(7), classes].mean()

    found = gradients(lambda h, w, b: label_word_loss(h, w, words, classes, b), hidden, WEIGHT, BIAS)
    torch.testing.assert_close(found, gradients(dense, hidden, WEIGHT, BIAS))
    assert found[2][[1, 2, 3]].norm() == 0  # other words take no part
    close(label_word_loss(hidden[:0], WEIGHT, words, classes[:0], BIAS), 0)


@pytest.mark.parametrize("log_target", [False, True])
def test_values_between_two_words(log_target):
    hidden, values = rows(5, 8), torch.tensor([0.0, 5.0, 2.5, 1.0, 4.2]).double()

    def dense(hidden, weight, bias):
        total = 0.0
        for h, y in zip(hidden, values, strict=True):
            log_p = (weight[WORDS] @ h + bias[WORDS]).log_softmax(0)
            for c, t in enumerate((1 - y / 5, y / 5)):
                if log_target:
                    total = total + t.exp() * (t - log_p[c])
                elif t > 0:  # 0 log 0 = 0
                    total = total + t * (t.log() - log_p[c])
        return total / (2 * len(hidden))

    def ours(hidden, weight, bias):
        return label_value_loss(hidden, weight, WORDS, values, bias=bias, log_target=log_target)

    found = gradients(ours, hidden, WEIGHT, BIAS)
    torch.testing.assert_close(found, gradients(dense, hidden, WEIGHT, BIAS))
    scaled = label_value_loss(hidden, WEIGHT, WORDS, 10 + 2 * values, 10, 20, BIAS, log_target=log_target)
    torch.testing.assert_close(scaled, found[0])
    with pytest.raises(ValueError, match=r"label_value_loss: words must be two, .* got 3"):
        label_value_loss(hidden, WEIGHT, torch.tensor([1, 2, 3]), values)


SPECIAL = Special(first=1, last=2, mask=3, padding=0)


def letters(text):
    """A token a letter; spaces are none."""
    return [ord(c) for c in text if c != " "]


def said(row):
    return "".join("-<>_"[i] if i < 4 else chr(i) for i in row.tolist())


def test_templates():
    template = Template("{text} It is {word}.", letters, SPECIAL, longest=12)
    prompts = template(["ab", "abcdefgh"])
    assert [said(row) for row in prompts.ids] == ["<abItis_.>--", "<abcdItis_.>"]  # the text is cut, and nothing else
    assert prompts.real.tolist() == [[True] * 10 + [False] * 2, [True] * 12]
    assert [said(row[keep]) for row, keep in zip(prompts.ids, prompts.maskable, strict=True)] == [
        "abItis_.",
        "abcdItis_.",
    ]
    assert (prompts.ids[torch.arange(2), prompts.places] == 3).all()
    answered = template(["ab", "abcdefgh"], [ord("y"), ord("n")])
    assert [said(row) for row in answered.ids] == ["<abItisy.>--", "<abcdItisn.>"]
    assert [said(row) for row in answered.take(torch.tensor([0])).ids] == ["<abItisy.>"]
    soft = template.soft({i: i + 1 for i in template.tokens})(["Itis"])
    assert said(soft.ids[0]) == "<ItisJujt_/>"  # of the template, not of the text


def test_templates_of_pairs_and_of_none():
    template = Template("{text}? {word}, {second}", letters, SPECIAL, longest=12)
    both = template(["abcdef"], second=["vwxyz"])  # the longer is cut first
    assert said(both.ids[0]) == "<abc?_,vwxy>"
    assert said(template(["a"], second=["rstuvwxyz"]).ids[0]) == "<a?_,rstuvw>"
    first = Template("{word}: {text}", letters, SPECIAL, longest=9)(["abcdefgh"])
    assert said(first.ids[0]) == "<_:abcde>" and first.places.tolist() == [1]
    assert said(Template("{text}", letters, SPECIAL, longest=6)(["abcdefgh"]).ids[0]) == "<abcd>"
    assert said(template([""], second=[""]).ids[0]) == "<?_,>"
    for pattern in ("It was {word}.", "{text} {word} {word}"):
        with pytest.raises(ValueError, match="Template: pattern must hold"):
            Template(pattern, letters, SPECIAL)
    with pytest.raises(ValueError, match="Template: longest must leave room for a text beside 7 tokens, got 7"):
        Template("{text} cut {word}.", letters, SPECIAL, longest=7)


def test_label_words():
    assert label_words(letters, ["y", "n"]).tolist() == [ord("y"), ord("n")]
    with pytest.raises(ValueError, match="label_words: a label word must be one token, got 'yes' of 3"):
        label_words(letters, ["yes", "n"])
    with pytest.raises(ValueError, match="label_words: classes must have different words"):
        label_words(letters, ["y", "y"])


# --------------------------------------------------------------------------------------------------- model and the run


def test_the_model(one_thread):
    texts = ["Parse a message from a socket.", "A turtle draws.", "It is about email."]
    model = MaskedLM(texts, layers=1).eval()
    assert len(model.weight) == len(model.head.bias) < 50 and model.weight[0].shape == (384,)
    template = Template("{text} It is about {word}.", model.pieces, model.special, longest=24)
    words = label_words(model.pieces, ["email", "turtle"])
    prompts = template(texts[:2])
    old = {new: old for old, new in model.index.items()}
    text = model.tokenizer.decode([old[i] for i in prompts.ids[1].tolist()])  # without special tokens
    assert text == "a turtle draws. it is about."
    with torch.no_grad():
        logits = F.linear(model.at_word(prompts), model.weight[words], model.head.bias[words])
        assert torch.equal(model.classes(prompts, words, batch=1), logits.argmax(1))
        padded = template([texts[1]])
        torch.testing.assert_close(model.at_word(padded), model.at_word(prompts)[1:], rtol=1e-4, atol=1e-5)

    used = torch.tensor(sorted({*template.tokens}))
    new = model.soften(torch.cat([used, words]))
    soft, soft_words = template.soft(dict(zip(used.tolist(), new.tolist(), strict=False))), new[-2:]
    softened = soft(texts[:2])
    found = F.linear(model.at_word(softened), model.weight[soft_words], model.head.bias[soft_words])
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)  # new tokens start as the real ones
    label_word_loss(model.at_word(softened), model.weight, soft_words, torch.tensor([0, 1]), model.head.bias).backward()
    assert (model.soft.grad.norm(dim=1) > 0).all()
    of_words = model.encoder.bert.embeddings.word_embeddings.weight.grad
    only = set(used.tolist()) - set(prompts.ids[:, :5].flatten().tolist())
    assert of_words[sorted(only)].norm() == 0 and of_words[prompts.ids[0, 1]].norm() > 0
    answered = soft(texts[:2], soft_words)
    assert model.masked_loss(answered, torch.Generator().manual_seed(0), always=1) > 0


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    small = {"BATCH": 8, "START_STEPS": 2, "TUNING_STEPS": 3, "TUNING_BATCH": 8}
    results = train_a_little("pcp", tmp_path, monkeypatch, **small)
    assert [*results["models"]] == ["prompts alone", "texts, then prompts", "PCP"]
    for found in results["models"].values():
        assert len(found["losses"]) == 3 and next(iter(found["metrics"])) == "accuracy, %"
    first = [found["losses"][0] for found in results["models"].values()]
    assert len({*first}) == 3  # two steps of different pretraining lie before
