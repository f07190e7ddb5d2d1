"""LiMBeR against its definition: labels, the loss of a prefix token by token, what is frozen, ranks, the command."""

import pytest
import torch
from decoding import make
from prefix import END, Causal, Words, language_model
from recipes import assert_ranks_equal_one, close, gradients, train_a_little, waves

from fastcontrast.recipes import limber
from fastcontrast.recipes._shared import namer
from fastcontrast.recipes._shared.namer import say, tokens_of, word_f1
from fastcontrast.recipes._shared.prefix import Prefix, caption_labels, prefix_loss
from fastcontrast.towers import GlyphTower

CAPTIONS = torch.tensor([[5, 7, END, END], [3, 4, 5, 6], [END] * 4, [9, END, END, END], [8, 8, END, 7]])
PREFIX = waves(5, 3 * 4, 5).view(5, 3, 4)


def test_golden_labels():
    close(caption_labels(torch.tensor([[5, 7, END, END]]), 2, END), -100, -100, 5, 7, END, -100)
    close(caption_labels(CAPTIONS[1:2], 1, END), -100, 3, 4, 5, 6)  # without an end it keeps all
    close(caption_labels(CAPTIONS[2:3], 1, END), *[-100] * 5)  # empty
    close(caption_labels(CAPTIONS[4:], 0, END), 8, 8, END, -100)
    assert caption_labels(CAPTIONS[:, :0], 2, END).tolist() == [[-100, -100]] * 5


def token_by_token(model, prefix, captions) -> torch.Tensor:
    """The mean over kept tokens, each predicted from a text that ends before it."""
    losses = []
    for p, caption in zip(prefix, captions.tolist(), strict=True):
        kept = caption[: caption.index(END) + 1] if END in caption else caption
        for t, token in enumerate(kept if kept != [END] else []):
            inputs = torch.cat([p, model.embedding(torch.tensor(kept[:t], dtype=torch.int64))])
            losses.append(-model.head(inputs.sum(0).tanh()).log_softmax(0)[token])
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_loss_token_by_token(dtype, tolerance):
    exact, model = Causal(), Causal().to(dtype)
    expected = gradients(lambda p: token_by_token(exact, p, CAPTIONS), PREFIX)
    found = gradients(lambda p: prefix_loss(model, p, CAPTIONS, END), PREFIX.to(dtype))
    token_by_token(exact, PREFIX, CAPTIONS).backward()
    prefix_loss(model, PREFIX.to(dtype), CAPTIONS, END).backward()
    pairs = zip(exact.parameters(), model.parameters(), strict=True)
    for theirs, ours in (*zip(expected, found, strict=True), *((a.grad, b.grad) for a, b in pairs)):
        assert ours.dtype == dtype and (ours.double() - theirs).norm() <= tolerance * theirs.norm()


def test_rows_without_tokens_count_for_nothing():
    model = Causal()
    without = [0, 1, 3, 4]
    both = (prefix_loss(model, PREFIX[rows], CAPTIONS[rows], END) for rows in (without, slice(None)))
    torch.testing.assert_close(*both)
    for rows, columns in ((slice(2, 3), slice(None)), (slice(None), slice(0)), (slice(0), slice(None))):
        value, gradient = gradients(lambda p, c=CAPTIONS[rows, columns]: prefix_loss(model, p, c, END), PREFIX[rows])
        assert value == 0 and not gradient.any()


def test_a_llama_gives_the_loss_that_transformers_gives(one_thread):
    """And only W and b learn: the model takes no gradient, though it passes one on."""
    model = make("llama").requires_grad_(False)
    torch.manual_seed(0)
    prefix = Prefix(6, 48)
    features, captions = waves(4, 18, 0).view(4, 3, 6).float(), CAPTIONS[[0, 1, 3, 4]]
    loss = prefix_loss(model, prefix(features), captions, END)
    inputs = torch.cat([prefix(features), model.get_input_embeddings()(captions)], 1)
    expected = model(inputs_embeds=inputs, labels=caption_labels(captions, 3, END)).loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, list(prefix.parameters()), retain_graph=True),
        torch.autograd.grad(expected, list(prefix.parameters())),
    )
    loss.backward()
    assert all(p.grad is None for p in model.parameters())


def test_padding_inside_the_prefix_is_not_seen(one_thread):
    """Questions of two lengths behind a token: masked, both cost what they cost alone."""
    model = make("llama")
    x, mask = waves(2, 4 * 48, 0).view(2, 4, 48).float(), torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    captions = torch.tensor([[5, 7, END], [9, 8, 7]])
    alone = [prefix_loss(model, x[i : i + 1, mask[i]], captions[i : i + 1], END) for i in range(2)]
    torch.testing.assert_close(prefix_loss(model, x, captions, END, mask=mask), sum(alone) / 2)
    with pytest.raises(ValueError, match=r"prefix_loss: mask must be \[2, 4\] and True in its last column"):
        prefix_loss(model, x, captions, END, mask=mask.flip(1).roll(1, 1))


def test_the_map_is_the_same_everywhere_and_drops_a_tenth():
    torch.manual_seed(0)
    prefix, features = Prefix(6, 4000, dropout=limber.DROPOUT), waves(5, 18, 0).view(5, 3, 6).float()
    dropped = prefix(features)
    kept = prefix.eval()(features)
    torch.testing.assert_close(kept[2, 1], prefix(features[2:3, 1])[0, 0])
    close((dropped == 0).float().mean(), 0.1, atol=5e-3)
    torch.testing.assert_close(dropped[dropped != 0], kept[dropped != 0] / 0.9)


def test_features_are_those_before_pooling():
    torch.manual_seed(0)
    tower, glyphs = GlyphTower(bf16=False), torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    found = limber.positions(tower, glyphs)
    assert found.shape == (3, 16, 192) and not found.requires_grad
    pooled = tower.layers[-2:](found.mT.unflatten(2, (4, 4)))
    torch.testing.assert_close(torch.nn.functional.normalize(pooled, dim=1), tower(glyphs))


@pytest.mark.parametrize(
    ("prefix", "captions", "message"),
    [
        (PREFIX[:, :0], CAPTIONS, r"prefix must be \[B, S, 4\] with S at least 1, got \[5, 0, 4\]"),
        (PREFIX[..., :3], CAPTIONS, r"prefix must be \[B, S, 4\] .* got \[5, 3, 3\]"),
        (PREFIX[0], CAPTIONS, r"prefix must be \[B, S, 4\], got \[3, 4\]"),
        (PREFIX, CAPTIONS[:4], r"captions must be integers \[5, T\], got \[4, 4\]"),
        (PREFIX, CAPTIONS.double(), r"captions must be integers \[5, T\], got \[5, 4\] of torch.float64"),
    ],
)
def test_what_does_not_fit_is_named(prefix, captions, message):
    with pytest.raises(ValueError, match=f"prefix_loss: {message}"):
        prefix_loss(Causal(), prefix, captions, END)


def objective(prefix, captions):
    return prefix_loss(Causal(), prefix, captions, END)


@pytest.mark.parametrize(("sizes", "how"), [((3, 2), "gather"), ((0, 2, 3), "ring")])
def test_ranks_equal_one(sizes, how):
    """Means over unequal numbers of tokens; one rank has no row, or a row without a token."""
    assert_ranks_equal_one(objective, [PREFIX, CAPTIONS], sizes, how)


def test_what_is_said_is_the_likeliest_token_by_token(one_thread):
    model, tokenizer = make("llama"), Words()
    prefix = waves(5, 4 * 48, 0).view(5, 4, 48).float()
    inputs = prefix
    rows = torch.empty(5, 0, dtype=torch.int64)
    for _ in range(6):
        best = model(inputs_embeds=inputs).logits[:, -1:].argmax(2)
        inputs = torch.cat([inputs, model.get_input_embeddings()(best)], 1)
        rows = torch.cat([rows, best], 1)
    expected = [tokenizer.decode(row[: [*row, END].index(END)]) for row in rows.tolist()]
    assert say(model, tokenizer, prefix, 6, END, batch=2) == expected
    assert len(say(model, tokenizer, prefix, 6, END, num_beams=5)) == 5


def test_texts_become_tokens_and_words_are_counted():
    close(tokens_of(Words(), ["aC", "b"], END), 3, 5, END, 4, END, END)
    f1 = word_f1(["Account box", "box box", "", "x"], ["box account", "box", "box", "y"])
    assert f1 == pytest.approx((100 + 200 / 3) / 4)


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(namer, "language_model", language_model)
    results = train_a_little("limber", tmp_path, monkeypatch)
    assert list(results["models"])[-1] == "LiMBeR" and "blind" in results["models"]
    for found in results["models"].values():
        assert len(found["losses"]) == 2 and set(found["implementations"]) == {"similarity_lse"}
        assert set(found["metrics"]) == {f"F1 of words, {kind} names, %" for kind in ("unseen", "seen")}
