"""SimCTG against its definition: golden values, the dense objective, padding, ranks, clipping, the decoder's measures,
the command. Decoding itself is tested in test_contrastive_search.py, the contrastive term in
test_token_contrast_margin.py."""

import pytest
import torch
from decoding import make
from golden_decoding import F
from recipes import assert_ranks_equal_one, close, gradients, train_a_little, unit

from fastcontrast import generate, token_contrast_margin
from fastcontrast.ops import max_cosine
from fastcontrast.recipes import simctg
from fastcontrast.recipes._parts import simctg_run
from fastcontrast.recipes.simctg import shift, simctg_loss

HIDDEN, LENGTHS = torch.stack([F(5, 8, 0), F(5, 8, 0.6)]), torch.tensor([5, 3])
HEAD = F(7, 8, 2)
LABELS = torch.tensor([[1, 2, 3, 4, 5], [6, 0, 1, -100, -100]])
BOTH = pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 1e-6)], ids=str)


def dense(hidden, head, labels, lengths, margin=0.5):
    """All logits, all cosines, pair by pair."""
    mle = torch.nn.functional.cross_entropy((hidden @ head.T).flatten(0, 1), labels.flatten())
    unit, total, pairs = hidden / hidden.norm(dim=2, keepdim=True), 0.0, 0
    for u, length in zip(unit, lengths.tolist(), strict=True):
        s = u[:length] @ u[:length].T
        other = ~torch.eye(length, dtype=torch.bool)
        total = total + (margin - s.diagonal()[:, None] + s).relu()[other].sum()
        pairs += length * (length - 1)
    return mle + total / pairs


@BOTH
@pytest.mark.parametrize(
    ("margin", "loss", "norm"), [(0.5, 0.005002332791, 0.063891079547), (0.9, 0.161718296952, 0.076309864956)]
)
def test_golden_contrastive_term(margin, loss, norm, dtype, atol):
    """Labels that are none leave L_cl alone."""
    none = torch.full_like(LABELS, -100)
    found = gradients(lambda h: simctg_loss(h, HEAD.to(dtype), none, LENGTHS, margin=margin), HIDDEN.to(dtype))
    assert found[0].dtype == dtype
    close(found[0], loss, atol=atol)
    close(found[1].norm(), norm, atol=atol)
    assert not found[1][1, 3:].any()  # padding


def test_golden_isotropy():
    assert simctg.isotropy(HIDDEN, LENGTHS) == pytest.approx(1.079767430877, abs=1e-10)
    cosines = [simctg.self_similarity(h[:length].double()).double() for h, length in zip(HIDDEN, (5, 3), strict=True)]
    mean = sum(s.sum() - s.trace() for s in cosines) / (5 * 4 + 3 * 2)
    close(1 - mean, 1.079767430877, atol=1e-6)


def test_golden_step_of_the_decoder():
    """What the states are for: the row of the context that is padding does not count."""
    valid = torch.ones(1, 6, dtype=torch.bool)
    valid[0, 0] = False
    context, candidates = unit(F(6, 8, 0)), F(4, 8, 0.6)[None]
    deg, row = max_cosine(candidates, context[None], valid)
    close(deg, 0.892655179093, 0.837044312075, 0.878611331840, 0.820756752557)
    assert row.tolist() == [[1, 1, 3, 4]]
    p, ids = (3 * F(1, 7, 0.3)).softmax(1).topk(4)
    close(p, 0.421831853559, 0.379802470645, 0.099035746695, 0.054941656664)
    close(0.4 * p - 0.6 * deg, -0.366860366032, -0.350305598987, -0.487552500426, -0.470477388869)
    assert ids.tolist() == [[5, 0, 1, 6]]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("margin", [0.5, 0.9])
def test_equals_the_dense_objective(margin, dtype, tolerance):
    expected = gradients(lambda h, w: dense(h, w, LABELS, LENGTHS, margin), HIDDEN, HEAD)
    found = gradients(lambda h, w: simctg_loss(h, w, LABELS, LENGTHS, margin=margin), HIDDEN.to(dtype), HEAD.to(dtype))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and (a.double() - b).norm() <= tolerance * b.norm()


def test_gradients_are_those_of_differences():
    def small(h, w):
        return simctg_loss(h, w, LABELS[:, :3], torch.tensor([3, 2]), margin=0.9)

    assert torch.autograd.gradcheck(
        small, (HIDDEN[:, :3, :4].clone().requires_grad_(), HEAD[:, :4].clone().requires_grad_())
    )


def test_invariants():
    none = torch.full_like(LABELS, -100)

    def contrast(hidden, margin, lengths=LENGTHS):
        return simctg_loss(hidden, HEAD, none, lengths, margin=margin)

    close(contrast(HIDDEN, 0.0), 0)  # no cosine exceeds 1
    close(contrast(F(1, 8, 0).expand(2, 5, 8), 0.3), 0.3)  # tokens that are all alike give ρ
    factors = torch.tensor([2.0, 0.1, 5, 1, 3]).double()[:, None]
    close(contrast(HIDDEN * factors, 0.9), contrast(HIDDEN, 0.9))
    order = torch.tensor([2, 0, 1, 4, 3])
    close(contrast(HIDDEN[:, order], 0.9), contrast(HIDDEN, 0.9))
    for lengths in (torch.tensor([1, 0]), torch.tensor([0, 0])):  # Z = 0
        value, slope = gradients(lambda h, lengths=lengths: contrast(h, 0.9, lengths), HIDDEN)
        assert value == 0 and not slope.any()
    whole = simctg_loss(HIDDEN, HEAD, LABELS, LENGTHS)
    mle = simctg_loss(HIDDEN, HEAD, LABELS, LENGTHS, contrast=0.0)
    close(whole - mle, 0.005002332791)
    close(simctg_loss(HIDDEN, HEAD, LABELS, LENGTHS, contrast=3.0) - mle, 3 * 0.005002332791)
    close(mle, torch.nn.functional.cross_entropy((HIDDEN @ HEAD.T).flatten(0, 1), LABELS.flatten()))


def test_both_tokens_of_a_pair_learn():
    pair = torch.tensor([[[1.0, 0.0], [0.8, 0.6]]]).double()
    slope = gradients(lambda h: token_contrast_margin(h, margin=0.9), pair)[1][0]
    assert (slope.norm(dim=1) > 0.1).all()


def test_shift_marks_padding():
    ids = torch.tensor([[5, 6, 7, 8], [9, 5, 0, 0], [6, 0, 0, 0], [0, 0, 0, 0]])
    inputs, labels, lengths = shift(ids, pad=0)
    assert inputs.tolist() == [[5, 6, 7], [9, 5, 0], [6, 0, 0], [0, 0, 0]]
    assert labels.tolist() == [[6, 7, 8], [5, -100, -100], [-100] * 3, [-100] * 3]
    assert lengths.tolist() == [3, 2, 1, 0]
    inputs, labels, lengths = shift(ids)
    assert labels.tolist() == ids[:, 1:].tolist() and lengths.tolist() == [3] * 4
    with pytest.raises(ValueError, match="shift: padding must be on the right"):
        shift(torch.tensor([[0, 5, 6]]), pad=0)


def test_a_text_that_is_padding_counts_for_nothing():
    more = torch.cat([HIDDEN, F(5, 8, 3)[None]])
    labels, lengths = torch.cat([LABELS, torch.full((1, 5), -100)]), torch.tensor([5, 3, 0])
    close(simctg_loss(more, HEAD, labels, lengths), simctg_loss(HIDDEN, HEAD, LABELS, LENGTHS))


def test_the_norm_is_clipped_after_every_micro_step():
    vectors = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0]), torch.tensor([-1.0, 0.5])]

    def run(**how):
        x = torch.zeros(2, requires_grad=True)
        mean = simctg.accumulate((v @ x + 6 for v in vectors), 3, [x], **how)
        assert mean == pytest.approx(6)
        return x.grad

    whole = sum(vectors) / 3
    close(run(clip=100.0), *whole, atol=1e-6)
    close(run(clip=0.5, each=False), *(0.5 * whole / whole.norm()), atol=1e-5)
    expected = torch.zeros(2)
    for v in vectors:
        expected = expected + v / 3
        expected = expected * min(1.0, 0.5 / expected.norm().item())
    close(run(clip=0.5), *expected, atol=1e-5)
    assert (run(clip=0.5) - run(clip=0.5, each=False)).norm() > 0.1


def test_the_rate_rises_and_falls_in_straight_lines():
    rates = [simctg.linear_rate(i, 40) for i in range(41)]
    close(torch.tensor(rates[:5]), 0, 0.25, 0.5, 0.75, 1, atol=1e-6)
    close(torch.tensor(rates[4:]).diff(), *[-1 / 36] * 36, atol=1e-6)
    assert rates[40] == 0 and simctg.linear_rate(0, 1) == 0 and simctg.linear_rate(0, 1, warmup=0) == 1


def objective(hidden, labels, lengths):
    return simctg_loss(hidden, HEAD, labels, lengths, margin=0.9)


def test_ranks_equal_one():
    """Of texts of unequal lengths, so that a mean of the ranks' means would be another."""
    hidden = torch.stack([F(5, 8, c) for c in (0, 0.6, 1.7)])
    labels = torch.cat([LABELS, LABELS[:1].flip(1)])
    assert_ranks_equal_one(objective, [hidden, labels, torch.tensor([5, 3, 4])], (2, 1))


def test_published_measures_of_repetition():
    """Of the published counter, which drops the last n-gram of each text, and of ours, which does not."""
    text = [[1, 2, 3, 1, 2, 3, 1]]  # 12 23 31 12 23 31: 3 of 6; without the last 3 of 5
    assert simctg.rep_n(text, 2) == pytest.approx(0.5)
    assert simctg.rep_n(text, 2, official=True) == pytest.approx(1 - 3 / 5)
    assert simctg.diversity(text) == pytest.approx(3 / 6 * 3 / 5 * 3 / 4)
    assert simctg.diversity(text, official=True) == pytest.approx(3 / 5 * 3 / 4 * 3 / 3)


def test_contrastive_search_reads_the_states_that_the_loss_pushes_apart(one_thread):
    """One step of `generate` is that of the definition on the states of `simctg_loss`."""
    model = make("llama").eval()
    prompt = torch.tensor([[5, 9, 11, 40, 23, 7]])
    with torch.no_grad():
        hidden = model.model(input_ids=prompt).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden), model(prompt).logits)
        p, ids = (hidden[:, -1] @ model.lm_head.weight.T).softmax(1).topk(4)
        scores = []
        for v, likely in zip(ids[0], p[0], strict=True):
            new = model.model(input_ids=torch.cat([prompt, v.view(1, 1)], 1)).last_hidden_state[0]
            cosines = simctg.self_similarity(new)[-1, :-1]
            scores.append(0.4 * likely - 0.6 * cosines.max())
    found = generate(model, prompt, attention_mask=torch.ones_like(prompt), penalty_alpha=0.6, top_k=4,
                     max_new_tokens=1)  # fmt: skip
    assert found[0, -1] == ids[0, torch.stack(scores).argmax()]


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    for name, value in {"VOCABULARY": 300, "WIDTH": 32, "LAYERS": 1, "LENGTH": 24, "PROMPT": 8, "NEW": 6}.items():
        monkeypatch.setattr(simctg_run, name, value)
    results = train_a_little("simctg", tmp_path, monkeypatch, BATCH=8, START_STEPS=2)
    assert list(results["models"]) == ["start", "MLE", "SimCTG"]
    for found in results["models"].values():
        assert list(found["metrics"]) == [
            "isotropy", "perplexity", "diversity, greedy, %", "diversity, contrastive search, %"
        ]  # fmt: skip
    contrasted = results["models"]["SimCTG"]
    assert "token_contrast_margin" in contrasted["implementations"]
    assert "token_contrast_margin" not in results["models"]["MLE"]["implementations"]
    for by_method in results["written"].values():
        assert {*by_method} == {"greedy", "contrastive search"}
        assert all(0 <= found["rep-2, %"] <= 100 for found in by_method.values())
