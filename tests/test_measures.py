"""Measures of representations and texts: against hand-computed values and dense definitions."""

import math
import subprocess
import sys

import pytest
import torch
from similarity import generator
from torch import nn

from fastcontrast.decoding.measures import coherence, diversity, isotropy, perplexity, rep_n

# ------------------------------------------------------------------------------------------------------------ isotropy


def golden() -> torch.Tensor:
    i, k = torch.arange(5, dtype=torch.float64)[:, None], torch.arange(8, dtype=torch.float64)
    return torch.stack([torch.sin(1 + c + 0.7 * i + 1.3 * k + 0.11 * i * k) for c in (0.0, 0.6)])


def test_isotropy_of_the_golden_texts():
    hidden = golden()
    assert isotropy(hidden, torch.tensor([5, 3])) == pytest.approx(1.079767430877, abs=1e-12)
    assert isotropy(iter([hidden[0], hidden[1, :3]])) == pytest.approx(1.079767430877, abs=1e-12)
    assert isotropy(hidden.float(), [5, 3]) == pytest.approx(1.079767430877, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_isotropy_is_the_dense_ratio_over_the_corpus(dtype):
    hidden = (3 + torch.randn(4, 300, 16, generator=generator(1))).to(dtype)
    lengths = [300, 7, 1, 0]
    cosines = pairs = 0.0
    for text, length in zip(hidden, lengths, strict=True):
        unit = nn.functional.normalize(text[:length].double(), dim=1)
        cosines += float((unit @ unit.T).fill_diagonal_(0).sum())
        pairs += length * (length - 1)
    assert isotropy(hidden, torch.tensor(lengths)) == pytest.approx(1 - cosines / pairs, rel=1e-12)


def test_isotropy_at_its_ends():
    same = torch.randn(1, 1, 8, generator=generator(1)).expand(1, 50, 8)
    assert isotropy(same) == pytest.approx(0.0, abs=1e-12)
    assert isotropy(torch.eye(8)[None]) == pytest.approx(1.0, abs=1e-12)
    assert isotropy(torch.zeros(1, 4, 8)) == 1.0
    with pytest.raises(ValueError, match=r"^isotropy: hidden must have a text of at least two tokens"):
        isotropy(torch.ones(3, 1, 8))


# --------------------------------------------------------------------------------------------- repetition and diversity

TEXTS = ([1, 2, 1, 2, 1], [1, 2, 3])
# Bigrams 12 21 12 21 | 12 23: 2 of 4 and 2 of 2 distinct. Trigrams 121 212 121 | 123: 2 of 3 and 1 of 1. Of 4: 2 of 2.


def test_repetition_by_hand():
    assert rep_n(TEXTS, 1) == pytest.approx(1 - 5 / 8)
    assert rep_n(TEXTS, 2) == pytest.approx(1 - 4 / 6)
    assert rep_n(TEXTS, 3) == pytest.approx(1 - 3 / 4)
    assert rep_n(TEXTS, 4) == 0.0
    assert rep_n(TEXTS, 6) == rep_n([], 2) == 0.0


def test_diversity_by_hand():
    assert diversity(TEXTS) == pytest.approx(4 / 6 * 3 / 4)
    assert diversity(TEXTS, (1, 2)) == pytest.approx(5 / 8 * 4 / 6)
    assert diversity(iter(TEXTS)) == diversity(TEXTS)


def test_the_official_counter_drops_the_last():
    # Bigrams 12 21 12 | 12: 2 of 3 and 1 of 1. Trigrams 121 212 | none: 2 of 2.
    assert rep_n(TEXTS, 2, official=True) == pytest.approx(1 - 3 / 4)
    assert rep_n(TEXTS, 3, official=True) == 0.0
    assert diversity(TEXTS, official=True) == pytest.approx(3 / 4)


def test_words_ids_and_tensors_count_alike():
    words = ["a b a b a", "a  b c\n"]
    for texts in (words, [text.split() for text in words], [torch.tensor(text) for text in TEXTS]):
        assert diversity(texts) == diversity(TEXTS)
    with pytest.raises(ValueError, match=r"^rep_n: n must be at least 1, got 0"):
        rep_n(TEXTS, 0)


# ------------------------------------------------------------------------------------------------------------ coherence


def test_coherence_is_the_mean_cosine():
    prompts, continuations = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [0.0, 2.0]])
    assert coherence(prompts, continuations) == pytest.approx((24 / 25 + 0) / 2)
    with pytest.raises(ValueError, match=r"^coherence: continuations must be \[2, 2\] like prompts, got \[1, 2\]"):
        coherence(prompts, continuations[:1])
    with pytest.raises(ValueError, match=r"^coherence: prompts must be \[N, D\] .* got \[0, 2\]"):
        coherence(prompts[:0], continuations[:0])


# ----------------------------------------------------------------------------------------------------------- perplexity


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=1.0
    )
    return transformers.GPT2LMHeadModel(config)  # in training mode: its dropout must not be heard


IDS = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(1))


def dense(model: nn.Module, text: torch.Tensor, prompt: int) -> list[float]:
    """Log-probabilities of the tokens behind the prompt, one forward for each of them."""
    model.eval()
    with torch.no_grad():
        return [
            float(model(input_ids=text[None, :t]).logits[0, -1].double().log_softmax(0)[text[t]])
            for t in range(prompt, len(text))
        ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_perplexity_is_that_of_one_token_after_another(gpt2):
    expected = [dense(gpt2, text, 5) for text in IDS]
    gpt2.train()
    gpt2.transformer.h[0].eval()
    assert perplexity(gpt2, IDS, 5) == pytest.approx(math.exp(-mean([x for text in expected for x in text])), rel=1e-5)
    each = perplexity(gpt2, IDS, 5, per_text=True, batch_size=2)
    assert each.tolist() == pytest.approx([math.exp(-mean(x)) for x in expected], rel=1e-5)
    assert gpt2.training and not gpt2.transformer.h[0].training and not gpt2.transformer.h[0].attn.training
    marked = torch.arange(12) >= 5
    assert perplexity(gpt2, IDS, continuation=marked.expand(3, 12)) == pytest.approx(perplexity(gpt2, IDS, 5))
    assert perplexity(gpt2, IDS, 0) == pytest.approx(perplexity(gpt2, IDS))  # nothing is before the first


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(gpt2, side):
    lengths, prompts = (12, 7, 9), (5, 3, 1)
    ids, mask = torch.zeros_like(IDS), torch.zeros_like(IDS)
    for row, length in enumerate(lengths):
        where = slice(12 - length, 12) if side == "left" else slice(0, length)
        ids[row, where], mask[row, where] = IDS[row, :length], 1
    expected = [dense(gpt2, IDS[r, :length], p) for r, (length, p) in enumerate(zip(lengths, prompts, strict=True))]
    found = perplexity(gpt2, ids, torch.tensor(prompts), attention_mask=mask, per_text=True)
    assert found.tolist() == pytest.approx([math.exp(-mean(x)) for x in expected], rel=1e-4)
    total = perplexity(gpt2, ids, torch.tensor(prompts), attention_mask=mask, batch_size=1)
    assert total == pytest.approx(math.exp(-mean([x for text in expected for x in text])), rel=1e-4)


def test_coherence_of_the_second_paper_is_the_mean_log_probability(gpt2):
    expected = mean([mean(dense(gpt2, text, 5)) for text in IDS])
    assert float(-perplexity(gpt2, IDS, 5, per_text=True).log().mean()) == pytest.approx(expected, rel=1e-5)


def test_nothing_to_score(gpt2):
    assert math.isnan(perplexity(gpt2, IDS, 12))
    assert perplexity(gpt2, IDS, torch.tensor([12, 5, 12]), per_text=True).isnan().tolist() == [True, False, True]
    assert math.isnan(perplexity(gpt2, IDS[:0]))


REFUSED = {
    "isotropy: matrix": (lambda: isotropy(torch.zeros(4, 8)), r"isotropy: hidden must be \[B, S, D\] .* got \[4, 8\]"),
    "isotropy: text": (
        lambda: isotropy([torch.zeros(8)]),
        r"isotropy: texts of an iterable must be \[S, D\], got \[8\]",
    ),
    "isotropy: lengths": (lambda: isotropy(golden(), [5]), r"isotropy: lengths must be \[2\], got \[1\]"),
    "isotropy: long": (lambda: isotropy(golden(), [5, 6]), r"isotropy: lengths must lie in \[0, 5\], got .*\[5, 6\]"),
    "isotropy: both": (lambda: isotropy(iter(golden()), [5, 3]), r"isotropy: lengths go with hidden \[B, S, D\]"),
    "perplexity: ids": (lambda: perplexity(None, IDS[0]), r"perplexity: input_ids must be \[B, S\], got \[12\]"),
    "perplexity: mask": (
        lambda: perplexity(None, IDS, attention_mask=IDS[:, 1:]),
        r"perplexity: attention_mask must be \[3, 12\], got \[3, 11\]",
    ),
    "perplexity: continuation": (
        lambda: perplexity(None, IDS, continuation=IDS[0] > 0),
        r"perplexity: continuation must be \[3, 12\], got \[12\]",
    ),
    "perplexity: prompt": (
        lambda: perplexity(None, IDS, torch.ones(2)),
        r"perplexity: prompt_length must be a number or \[3\], got \[2\]",
    ),
    "perplexity: batch": (lambda: perplexity(None, IDS, batch_size=0), "perplexity: batch_size must be .* got 0"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_at_the_door(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_importing_loads_no_framework():
    code = "import sys, fastcontrast.decoding.measures; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
