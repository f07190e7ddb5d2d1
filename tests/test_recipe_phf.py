"""PHF against its definition: golden values, dense formulas, quirks, control, packing, sampling, the command."""

import math
from functools import partial

import pytest
import torch
from golden_decoding import F
from recipes import assert_ranks_equal_one, assert_resumes, close, gradients, train_a_little
from torch import Tensor

from fastcontrast.ops import linear_logprob
from fastcontrast.recipes._parts.phf_text import ALIGNED, MISALIGNED, score_line
from fastcontrast.recipes._shared import language
from fastcontrast.recipes.phf import (
    Control,
    Segment,
    ValueHead,
    add_control_tokens,
    average,
    awr_loss,
    code,
    keep,
    mle_loss,
    pack_segments,
    rwr_loss,
    sample,
    shuffled,
    unlikelihood_loss,
)

H, W, ROW = F(6, 5, 0), F(7, 5, 0.6), F(1, 5, 1.4)[0]
Y, S = torch.tensor([0, 3, 6, 2, 5, 1]), torch.tensor([0, 0.1, 0.9, 0.5, 0.2, 1], dtype=torch.float64)


def value_of(hidden: Tensor, v: Tensor) -> Tensor:
    head = ValueHead(len(v)).to(v.dtype)
    return torch.func.functional_call(head, {"v": v}, (hidden,))


def found(objective, *leaves: Tensor, scores=S) -> tuple[Tensor, ...]:
    """Value and gradients of `objective(logprobs, scores, values)` to states, vocabulary and value head."""

    def loss(h, w, v):
        return objective(linear_logprob(h, w, Y), scores.to(h.dtype), value_of(h, v))

    return gradients(loss, *leaves)


def mle(lp, s, v, **settings):
    return mle_loss(lp, **settings)


def unlikelihood(threshold, weight):
    return lambda lp, s, v, **settings: unlikelihood_loss(lp, s, threshold, weight, **settings)


GOLDEN = [
    (mle, 0, (3.184497413436, 0.813957255867, 0.810711838274, 0)),
    (unlikelihood(0.5, 1.0), 0, (1.631354481821, 0.553151416947, 0.565439181464, 0)),
    (unlikelihood(0.0, 1.0), 0, (1.479193997375, 0.473988426557, 0.451258725137, 0)),
    (unlikelihood(0.0, 0.01), 0, (1.429432843722, 0.479509812319, 0.468276868749, 0)),
    (rwr_loss, 0, (3.286168756029, 0.882704745550, 0.892210026338, 0)),
    (partial(awr_loss, alpha=0.5, beta=0.1), 0, (37.077178652853, 15.203198557921, 13.702519698337, 0.049590569087)),
    (partial(awr_loss, alpha=0.05), 1, (0.489888001950, 0.116087759615, 0.052150437004, 0.119045783005)),
    (partial(awr_loss, alpha=0.5, beta=0.1), 3, (501.133287071800, 228.851410378323, 167.514702965499, 0.024969538402)),
]


@pytest.mark.parametrize(("objective", "times", "expected"), GOLDEN)
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 0), (torch.float32, 1e-5)])
def test_golden_values(objective, times, expected, dtype, relative):
    value, *slopes = found(objective, *(x.to(dtype) for x in (H, W, times * ROW)))
    assert value.dtype == dtype
    for ours, theirs in zip((value, *(x.norm() for x in slopes)), expected, strict=True):
        close(ours, theirs, atol=max(1e-8, relative * theirs))


# ------------------------------------------------------------------------------------------------- dense formulas


def dense_awr(logits, scores, values, alpha, beta, normalise=False, baseline=None):
    lp = logits.log_softmax(1).gather(1, Y[:, None])[:, 0]
    advantage = -scores - (values.detach() if baseline is None else baseline)
    if normalise:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-10)
    weights = (advantage / beta).exp().clamp(0, 1000)
    return alpha * (-weights * lp).mean() + (1 - alpha) * ((-scores - values) ** 2).mean()


@pytest.mark.parametrize(
    "settings", [{"alpha": 0.3, "beta": 0.5}, {"alpha": 0.7, "beta": 1.0, "normalise": True},
                 {"alpha": 0.5, "beta": 1.0, "baseline": 0.2}]
)  # fmt: skip
def test_awr_equals_the_dense_formula(settings):
    leaves = H, W, ROW

    def dense(h, w, v):
        return dense_awr(h @ w.T, S, -torch.sigmoid(h @ v), **settings)

    torch.testing.assert_close(found(partial(awr_loss, **settings), *leaves), gradients(dense, *leaves))


def test_unlikelihood_equals_the_dense_formula():
    def dense(h, w, v):
        p = (h @ w.T).softmax(1).gather(1, Y[:, None])[:, 0]
        c = (S <= 0.2).double()
        return (-c * p.log() - 0.3 * (1 - c) * (1 - p).clamp(min=1e-20).log()).mean()

    torch.testing.assert_close(found(unlikelihood(0.2, 0.3), H, W, ROW), gradients(dense, H, W, ROW))


def test_what_is_a_special_case_of_what():
    usual = found(mle, H, W, ROW)
    same = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-15)
    same(found(unlikelihood(1.0, 5.0), H, W, ROW), usual)  # all are aligned
    masked = found(lambda lp, s, v: mle_loss(lp * (s <= 0.4)), H, W, ROW)
    same(found(unlikelihood(0.4, 0.0), H, W, ROW), masked)
    even = torch.full_like(S, 0.3)
    scaled = [math.exp((-0.3 + 0.7) / 0.5) * x for x in usual]
    same(found(partial(rwr_loss, beta=0.5, fixed=-0.7), H, W, ROW, scores=even), tuple(scaled))
    same(found(partial(rwr_loss, beta=1e15), H, W, ROW), usual)  # w = 1
    same(found(partial(rwr_loss, beta=1.0, fixed=0.0), H, W, ROW), found(rwr_loss, H, W, ROW))  # counts as not given
    textbook = found(partial(rwr_loss, beta=0.7, baseline=0.0), H, W, 0 * ROW)
    same(found(partial(rwr_loss, beta=0.7), H, W, 0 * ROW), tuple(math.exp(0.5 / 0.7) * x for x in textbook))
    same(found(partial(awr_loss, clamp=True), H, W, ROW), found(awr_loss, H, W, ROW))
    assert not torch.equal(*(awr_loss(-S, S, 3 * S, clamp=clamp) for clamp in (True, False)))


def test_with_alpha_zero_only_values_learn():
    value, dh, dw, dv = found(partial(awr_loss, alpha=0.0), H, W, ROW)
    close(value, (-S - value_of(H, ROW)).square().mean())
    assert not dw.any() and dh.any() and dv.any()


def test_no_gradient_passes_through_weights_or_advantages():
    v = value_of(H, ROW).requires_grad_()
    lp = torch.full((6,), -1.0).double().requires_grad_()
    for settings in ({}, {"normalise": True}):
        to_lp, to_v = torch.autograd.grad(awr_loss(lp, S, v, **settings), [lp, v])
        torch.testing.assert_close(to_v, (v.detach() + S) / 6)  # of the second mean alone
        assert to_lp.any()
    assert torch.autograd.grad(rwr_loss(lp, S, v), v, allow_unused=True) == (None,)


def test_the_cap_of_weights():
    """β = 0.1: active from an advantage of ln(1000)/10 = 0.69."""
    lp, values = -torch.ones(2).double(), torch.tensor([-0.690, -0.692], dtype=torch.float64)
    close(rwr_loss(lp, 0 * lp, values, beta=0.1), (math.exp(6.9) + 1000) / 2)
    close(rwr_loss(lp, 0 * lp, values, beta=0.1, largest=7.0), 7)


@pytest.mark.parametrize("p", [1e-6, 0.5, 1 - 1e-6])
def test_the_slope_of_unlikelihood(p):
    lp = torch.tensor([math.log(p)], dtype=torch.float64, requires_grad=True)
    loss = lambda x: unlikelihood_loss(x, torch.ones(1).double(), 0.5, 0.3)  # noqa: E731
    (slope,) = torch.autograd.grad(loss(lp), lp)
    torch.testing.assert_close(slope, torch.tensor([0.3 * p / (1 - p)], dtype=torch.float64), rtol=1e-8, atol=0)
    step = 1e-4 * min(1, abs(lp.item()))
    differences = (loss(lp.detach() + step) - loss(lp.detach() - step)) / (2 * step)
    torch.testing.assert_close(slope[0], differences, rtol=1e-6, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_tokens_are_clamped_and_teach_nothing(dtype):
    lp = torch.tensor([0.0, -1e-30, 1e-7], dtype=dtype, requires_grad=True)  # the last of a sum that was rounded
    loss = unlikelihood_loss(lp, torch.ones(3, dtype=dtype), 0.5)
    close(loss, -math.log(1e-20), atol=1e-5)
    assert not torch.autograd.grad(loss, lp)[0].any()


def test_scores_at_the_threshold_are_aligned_and_a_threshold_of_zero_is_soft_unless_told():
    lp, s = torch.tensor([-1.0, -2.0]).double(), torch.tensor([0.5, 0.75]).double()
    of_bad = -math.log(1 - math.exp(-2))
    close(unlikelihood_loss(lp, s, 0.5), (1 + of_bad) / 2)
    s = torch.tensor([0.0, 0.75]).double()
    close(unlikelihood_loss(lp, s, 0.0, zero_threshold="hard"), (1 + of_bad) / 2)
    close(unlikelihood_loss(lp, s, 0.0), (1 + 0.25 * 2 + 0.75 * of_bad) / 2)
    with pytest.raises(ValueError, match="unlikelihood_loss: scores must lie in"):
        unlikelihood_loss(lp, 2 * s, 0.0)
    assert unlikelihood_loss(lp, 2 * s, 0.5).isfinite()
    outside = torch.tensor([True, False])
    close(unlikelihood_loss(lp, 2 * s, 0.0, valid=outside), 1.0)


ALL = [mle, unlikelihood(0.5, 1.0), unlikelihood(0.0, 1.0), rwr_loss, awr_loss, partial(awr_loss, normalise=True)]


@pytest.mark.parametrize("objective", ALL)
def test_positions_that_are_not_valid_are_in_no_mean(objective):
    valid = torch.tensor([True, False, True, True, False, True])
    targets = Y.masked_fill(~valid, -100)
    garbage = S.masked_fill(~valid, math.nan)

    def padded(h, w, v):
        return objective(linear_logprob(h, w, targets), garbage, value_of(h, v), valid=valid)

    def without(h, w, v):
        return objective(linear_logprob(h[valid], w, Y[valid]), S[valid], value_of(h[valid], v))

    torch.testing.assert_close(gradients(padded, H, W, ROW), gradients(without, H, W, ROW))


@pytest.mark.parametrize("objective", ALL)
def test_an_empty_batch_has_no_loss(objective):
    value, slope = gradients(lambda x: objective(x, S[:0], S[:0]), S[:0])
    assert value == 0 and slope.shape == (0,)
    nothing = torch.zeros(6).bool()
    value, slope = gradients(lambda x: objective(x, S, S, valid=nothing), S)
    assert value == 0 and not slope.any()


def test_halves_of_a_batch_add_up():
    """Gradients of equal micro-batches average to those of the whole."""
    for objective in ALL[:-1]:
        lp, v = -1 - S, value_of(H, ROW)
        halves = [objective(lp[i : i + 3], S[i : i + 3], v[i : i + 3]) for i in (0, 3)]
        close(sum(halves) / 2, objective(lp, S, v))


def test_errors():
    lp, v = -S, -S
    with pytest.raises(ValueError, match=r"unlikelihood_loss: scores must be \[6\] like logprobs, got \[5\]"):
        unlikelihood_loss(lp, S[:5], 0.5)
    with pytest.raises(ValueError, match=r"awr_loss: values must be \[6\]"):
        awr_loss(lp, S, v[:5])
    with pytest.raises(ValueError, match=r"mle_loss: valid must be \[6\]"):
        mle_loss(lp, valid=torch.ones(5).bool())
    with pytest.raises(ValueError, match="unlikelihood_loss: zero_threshold must be one of"):
        unlikelihood_loss(lp, S, 0.0, zero_threshold="maybe")
    for wrong in ({"alpha": 1.5}, {"beta": 0.0}):
        with pytest.raises(ValueError, match="awr_loss: alpha must lie in"):
            awr_loss(lp, S, v, **wrong)


def rank_loss(h: Tensor, y: Tensor, s: Tensor) -> Tensor:
    lp, v = linear_logprob(h, W.to(h), y), value_of(h, ROW)
    normal = awr_loss(lp, s.detach(), v, normalise=True, alpha=0.3)
    return normal + unlikelihood_loss(lp, s.detach(), 0.5) + mle_loss(lp)


def test_ranks_equal_one():
    assert_ranks_equal_one(rank_loss, [H, Y, S], (2, 4))


def test_a_value_head_starts_at_a_half_and_resumes():
    assert ValueHead(5)(H.float()).tolist() == [-0.5] * 6
    assert ValueHead(5)(H.bfloat16()).dtype == torch.float32

    def step(head: ValueHead, i: int) -> Tensor:
        value = head(F(6, 5, i).float())
        (slope,) = torch.autograd.grad(value.sum(), head.v)
        with torch.no_grad():
            head.v -= slope
        return value

    assert_resumes(lambda: ValueHead(5), step)


# ------------------------------------------------------------------------------------------------------------ text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "cache_folder", lambda: folder)
        return language.vocabulary(["def f(x):\n    return x\n"], 270)


DOCUMENTS = [[Segment("def f(x):\n", 0.0), Segment("  return x\n", 0.75)], [], [Segment("x = 1\n", 0.5)]]


def test_rules_for_lines():
    good = ["", "\n", "    \n", "x = 1", "    x = f(a, b)\n", "x = (1,)  # a tuple", "f[:, 1]", "a.  B", "x" * 60, "->"]
    bad = ["x" * 61, " x", "  x = 1", "     x", "x   = 1", "\tx", "x\t= 1", "x;", "f(a,b)", "a==b", "a<b"]
    assert [score_line(line) for line in good] == [0] * len(good)
    assert [score_line(line) for line in bad] == [1] * len(bad)


def test_documents_are_filtered_by_their_average():
    assert average(DOCUMENTS[0]) == 0.375 and average([]) == 0
    assert keep(DOCUMENTS, 0.375) == DOCUMENTS[:2]  # a score at the threshold is kept
    assert keep(DOCUMENTS, 0.37) == [[]] and keep(DOCUMENTS, -1) == []


def test_packing_copies_scores_to_tokens(tokenizer):
    ids, scores = pack_segments(tokenizer, DOCUMENTS, 5)
    encoded = [tokenizer.encode(text).ids for text in ("def f(x):\n", "  return x\n", "x = 1\n")]
    flat = [0, *encoded[0], *encoded[1], 0, *encoded[2]]
    each = [*[0.0] * (1 + len(encoded[0])), *[0.75] * len(encoded[1]), *[0.5] * (1 + len(encoded[2]))]
    count = len(flat) // 5
    assert ids.shape == scores.shape == (count, 5) and len(flat) % 5
    assert ids.flatten().tolist() == flat[: 5 * count]
    assert scores.flatten().tolist() == each[: 5 * count]
    none, nothing = pack_segments(tokenizer, [], 5)
    assert none.shape == nothing.shape == (0, 5)


def test_tokens_of_control_stand_before_segments(tokenizer):
    control = Control(901, 902, threshold=0.5, drop=0.0)
    ids, scores = pack_segments(tokenizer, DOCUMENTS, 1, control)
    plain, _ = pack_segments(tokenizer, DOCUMENTS, 1)
    ids, scores = ids.flatten(), scores.flatten()
    assert ids[ids >= 901].tolist() == [901, 902, 901]  # the last at the threshold
    assert scores[ids >= 901].tolist() == [0, 0.75, 0.5]
    assert ids[ids < 901].tolist() == plain.flatten().tolist() and ids[:2].tolist() == [0, 901]


def test_a_share_of_the_tokens_of_control_is_dropped_alike_for_one_seed():
    segments = [Segment("", i % 2) for i in range(4000)]
    drawn = [[*Control(1, 2, 0.0, 0.1, seed).tokens(segments)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for parity in (0, 1):  # of either kind
        missing = sum(not tokens for tokens in drawn[0][parity::2])
        assert abs(missing - 200) < 3 * math.sqrt(180)
        assert {token for tokens in drawn[0][parity::2] for token in tokens} == {1 + parity}
    assert not any([*Control(1, 2, drop=1.0).tokens(segments)])


def test_a_buffer_shuffles_a_stream():
    found = [*shuffled(iter(range(50)), 8, 0)]
    assert sorted(found) == [*range(50)] and found != sorted(found)
    assert all(item < position + 8 for position, item in enumerate(found))  # none comes before it was read
    assert found == [*shuffled(range(50), 8, 0)] != [*shuffled(range(50), 8, 1)]
    assert [*shuffled(range(5), 1, 0)] == [*range(5)] and [*shuffled([], 8, 0)] == []


def test_the_library_has_good_and_bad_lines():
    documents = code(40)
    assert len(documents) == 40 and all(document[0].text.endswith("\n") for document in documents)
    scores = [segment.score for document in documents for segment in document]
    assert 0.05 < sum(scores) / len(scores) < 0.5


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_start_at_the_mean_of_the_head(tokenizer, tied):
    model = language.llama(270, width=16, layers=1, heads=2, tied=tied)
    before = model.lm_head.weight.detach().clone()
    state = torch.get_rng_state()
    ids = add_control_tokens(model, tokenizer, seed=3)
    assert torch.equal(state, torch.get_rng_state()) and ids == add_control_tokens(model, tokenizer, seed=3)
    assert tokenizer.encode(f"{ALIGNED}x{MISALIGNED}").ids == [ids[0], *tokenizer.encode("x").ids, ids[1]]
    head, embeddings = model.lm_head.weight, model.get_input_embeddings().weight
    assert head.shape == embeddings.shape == (272, 16)
    assert torch.equal(head[:270], before)
    away = head[[*ids]] - before.mean(0)
    assert 0.005 < away.std() < 0.02 and not torch.equal(*away)
    assert torch.equal(embeddings[[*ids]], head[[*ids]])


def test_sampling_never_writes_what_is_banned(tokenizer):
    torch.manual_seed(0)
    model = language.llama(272, width=16, layers=1, heads=2)
    with torch.no_grad():
        model.lm_head.weight[270:] = model.lm_head.weight[270:] * 0 + 30 * model.lm_head.weight[:1]
    draw = partial(sample, model, [[0, 270], [0, 5, 7, 270]] * 8, 12, temperature=5.0)
    free, held = draw(), draw(banned=[270, 271])
    assert any(token >= 270 for row in free for token in row)
    assert not any(token >= 270 or token == 0 for row in held for token in row)
    assert all(len(row) <= 12 for row in held) and held == draw(banned=[270, 271]) != draw(banned=[270, 271], seed=1)
    assert model.training


def test_what_a_sample_continues_does_not_depend_on_its_neighbours(tokenizer):
    torch.manual_seed(0)
    model = language.llama(270, width=16, layers=1, heads=2)
    sure = partial(sample, model, longest=6, temperature=1e-3, banned=[0])
    together = sure([[0, 9], [0, 5, 7, 11, 13]])
    assert together == [*sure([[0, 9]]), *sure([[0, 5, 7, 11, 13]])]


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    sizes = {"BATCH": 4, "VOCABULARY": 512, "LENGTH": 32, "TESTED": 4, "SAMPLES": 8, "LONGEST": 24}
    results = train_a_little("phf", tmp_path, monkeypatch, **sizes, SIZE={"width": 32, "layers": 1})
    assert [*results["models"]] == ["MLE", "filtering", "unlikelihood", "RWR", "AWR", "conditional"]
    for found in results["models"].values():
        assert len(found["losses"]) == 2 and set(found["implementations"]) == {"similarity_lse"}
        assert [*found["metrics"]] == ["bad lines written, %", "perplexity of good lines"]
        assert 0 <= found["metrics"]["bad lines written, %"] <= 100
    first = {label: found["losses"][0] for label, found in results["models"].items()}
    assert first["unlikelihood"] < first["MLE"] < first["RWR"]
