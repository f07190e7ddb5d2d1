"""MultiCSR against its definition: golden values, the dense formula, invariants, edges, ranks, rules, the command."""

import math

import pytest
import torch
from golden_decoding import F
from recipes import assert_ranks_equal_one, assert_resumes, close, gradients, train_a_little, unit

from fastcontrast import info_nce
from fastcontrast.recipes._parts import multicsr_rows, multicsr_triplets
from fastcontrast.recipes._parts.multicsr_triplets import Writer
from fastcontrast.recipes.multicsr import Best, Pooler, Triplet, in_roles, is_good, multicsr_loss, rating

RAW = [F(6, 8, c) for c in (0, 0.3, 1.1)]
GUIDE = tuple(unit(F(6, 8, c)) for c in (0.1, 0.25, 0.9))
MODES, FORMS = ("zero_logit", "neg_inf"), ("bce_over_softmax", "cross_entropy")


def golden(*raw, dtype=torch.float64, **settings):
    guide = tuple(x.to(dtype) for x in GUIDE)
    return multicsr_loss(*(unit(x.to(dtype)) for x in raw), guide, **settings)


def dense(a, p, n, ga, gp, gn, limit=0.95, mask_mode="zero_logit", form="bce_over_softmax", scale=20.0):
    """The formula with all its matrices."""
    logits = scale * torch.cat([a @ p.T, a @ n.T], 1)
    own = torch.eye(*logits.shape, dtype=torch.bool)
    masked = (torch.cat([ga @ gp.T, ga @ gn.T], 1) > limit) & ~own
    logp = logits.masked_fill(masked, {"zero_logit": 0.0, "neg_inf": -math.inf}[mask_mode]).log_softmax(1)
    if form == "cross_entropy":
        return -logp[own].mean()
    return -torch.where(own, logp, torch.log1p(-logp.exp())).mean()


def triplets(rows=37, width=11, count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [unit(torch.randn(rows, width, generator=generator, dtype=torch.float64)) for _ in range(count)]


GOLDEN = [
    (2.0, *MODES[:1], 0.1168681082, 0.7029924408),
    (2.0, *MODES[1:], 0.1168681082, 0.7029924408),
    (0.95, *MODES[:1], 0.0920700848, 0.5536857706),
    (0.95, *MODES[1:], 0.0920700847, 0.5536857699),
    (0.9, *MODES[:1], 0.00102819496, 0.00616936376),
    (0.9, *MODES[1:], 0.00102819427, 0.00616935962),
]


@pytest.mark.parametrize(("limit", "mask_mode", "bce", "ce"), GOLDEN)
def test_golden_losses(limit, mask_mode, bce, ce):
    for form, expected, atol in zip(FORMS, (bce, ce), (2e-7, 1e-6), strict=True):  # logits of 20 have digits of 2e-6
        settings = {"limit": limit, "mask_mode": mask_mode, "form": form}
        close(golden(*RAW, **settings), expected, atol=1e-10)
        close(golden(*RAW, dtype=torch.float32, **settings), expected, atol=atol)


def test_golden_fixture_and_counts():
    close(F(2, 3, 0)[0], 0.8414709848, 0.7457052122, -0.4425204433, atol=1e-10)
    cosines = torch.cat([GUIDE[0] @ x.T for x in GUIDE[1:]], 1)
    own = torch.eye(6, 12, dtype=torch.bool)
    assert [int(((cosines <= limit) | own).sum()) for limit in (2, 0.95, 0.9)] == [72, 71, 67]


def test_golden_gradients():
    for dtype, atol in ((torch.float64, 1e-10), (torch.float32, 1e-8)):
        _, *found = gradients(lambda *raw, dtype=dtype: golden(*raw, dtype=dtype, limit=0.9), *RAW)
        for gradient, expected in zip(found, (0.0049695991, 0.0042386378, 5.252752e-05), strict=True):
            close(gradient.norm(), expected, atol=atol)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask_mode", MODES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_equals_the_dense_formula(form, mask_mode, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(multicsr_rows, "CELLS", 5 * 74)  # eight tiles, the last of two rows
    *triplet, ga, gp, gn = triplets()
    settings = {"limit": 0.3, "mask_mode": mask_mode, "form": form}
    expected = gradients(lambda *x: 3 * dense(*x, ga, gp, gn, **settings), *triplet)
    guide = [x.to(dtype) for x in (ga, gp, gn)]
    found = gradients(lambda *x: 3 * multicsr_loss(*x, guide, **settings), *(x.to(dtype) for x in triplet))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


def test_the_stated_gradient():
    """(1/2B²)(P − t + [k ≠ i] P/(1 − P) − P·S) of the logits, through the cosines to the features."""
    a, p, n, *_ = triplets(7, 5)
    logits = 20 * a @ torch.cat([p, n]).T
    own, prob = torch.eye(*logits.shape, dtype=torch.float64), logits.softmax(1)
    odds = (1 - own) * prob / (1 - prob)
    stated = (prob - own + odds - prob * odds.sum(1, keepdim=True)) / logits.numel()
    _, gradient, *_ = gradients(multicsr_loss, a, p, n)
    torch.testing.assert_close(gradient, 20 * stated @ torch.cat([p, n]))


def test_the_guide_gets_no_gradient_and_moves_nothing_else():
    *triplet, ga, gp, gn = triplets()
    _, *found = gradients(lambda *x: multicsr_loss(*x[:3], x[3:], limit=0.3), *triplet, ga, gp, gn)
    assert all(bool(g.any()) for g in found[:3]) and not any(bool(g.any()) for g in found[3:])


def test_without_a_mask_it_is_simcse_with_hard_negatives():
    a, p, n, *guide = triplets()
    found = {mode: multicsr_loss(a, p, n, guide, limit=2.0, mask_mode=mode, form=FORMS[1]) for mode in MODES}
    plain = info_nce(a, torch.cat([p, n]), 20.0)
    for value in (*found.values(), multicsr_loss(a, p, n, form=FORMS[1])):
        torch.testing.assert_close(value, plain, rtol=1e-13, atol=0)
    bce = [multicsr_loss(a, p, n, guide, limit=2.0, mask_mode=mode) for mode in MODES]
    torch.testing.assert_close(*bce, rtol=0, atol=0)


def test_a_removed_key_is_a_deleted_column():
    a, p, n, *_ = triplets(5, 4)
    ga, gp, gn = (torch.zeros(5, 2, dtype=torch.float64) for _ in range(3))
    ga[:, 0] = gn[3, 0] = 1  # the fourth contradiction is masked in every row
    found = gradients(lambda *x: multicsr_loss(*x, (ga, gp, gn), mask_mode="neg_inf", form=FORMS[1]), a, p, n)
    expected = gradients(lambda a, p, n: info_nce(a, torch.cat([p, n[[0, 1, 2, 4]]]), 20.0), a, p, n)
    torch.testing.assert_close(found, expected)


def test_permuted_rows_change_nothing():
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    guide = tuple(x[order] for x in GUIDE)
    permuted = multicsr_loss(*(unit(x)[order] for x in RAW), guide, limit=0.9)
    torch.testing.assert_close(permuted, golden(*RAW, limit=0.9), rtol=1e-13, atol=0)


def test_a_cosine_at_the_limit_stays():
    a, p, n, *_ = triplets(3, 4)
    ga, gp, gn = (torch.eye(3, dtype=torch.float64) for _ in range(3))
    gp = gp.roll(1, 0)  # (0, 1), (1, 2), (2, 0) and the own contradictions have a cosine of exactly 1
    plain = multicsr_loss(a, p, n)
    torch.testing.assert_close(multicsr_loss(a, p, n, (ga, gp, gn), limit=1.0), plain, rtol=0, atol=0)
    assert multicsr_loss(a, p, n, (ga, gp, gn), limit=0.999) != plain


def test_the_limit_does_not_depend_on_the_temperature():
    *triplet, ga, gp, gn = triplets()
    found = multicsr_loss(*triplet, (ga, gp, gn), 7.0, limit=0.3)
    torch.testing.assert_close(found, dense(*triplet, ga, gp, gn, limit=0.3, scale=7.0))


def test_everything_masked_is_finite():
    a, p, n, *_ = triplets(4, 3)
    same = (torch.ones(4, 1, dtype=torch.float64),) * 3
    own = 20 * torch.linalg.vecdot(a, p)
    expected = (torch.logaddexp(own, torch.tensor(math.log(2 * 4 - 1.0))) - own).mean()
    torch.testing.assert_close(multicsr_loss(a, p, n, same, form=FORMS[1]), expected)
    for form in FORMS:  # only the positive is left
        found = gradients(lambda *x, form=form: multicsr_loss(*x, same, mask_mode="neg_inf", form=form), a, p, n)
        assert all(not bool(x.any()) for x in found)


def test_duplicates_are_masked():
    a, p, n, *_ = triplets(6, 8)
    a, p, n = (torch.cat([x, x[:1]]) for x in (a, p, n))  # the last triplet is the first again
    guide = (p, p, n)
    kept = gradients(lambda *x: multicsr_loss(*x, guide, mask_mode="neg_inf", form=FORMS[1]), a, p, n)
    logits = 20 * a @ torch.cat([p, n]).T
    logits[0, 6] = logits[6, 0] = -math.inf
    torch.testing.assert_close(kept[0], -logits.log_softmax(1).diagonal().mean())


@pytest.mark.parametrize("scale", [20.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_that_is_sure_of_a_wrong_key_is_finite_and_exact(scale, dtype):
    """1 − P of the wrong key is 1e-17 and less: it has no digits in float32 and none, at 200, in float64."""
    a = torch.eye(4, dtype=torch.float64)
    p, n = -a, a.clone()  # the contradiction is the sentence itself
    value, *found = gradients(lambda *x: multicsr_loss(*x, scale=scale), *(x.to(dtype) for x in (a, p, n)))
    # log P_ii and log(1 − P_i,B+i) in closed form: logits −s, s, and six of 0
    rest = math.log(6) + math.log1p(math.exp(-scale) / 6)
    top = scale + math.log1p(math.exp(rest - scale))
    others = 6 * math.log1p(-math.exp(-top))
    close(value / scale, ((scale + top) + (top - rest) - others) / 8 / scale, atol=1e-6)
    assert all(bool(g.isfinite().all()) for g in found)
    # the wrong key is pushed away with its whole weight, 2 of 1/(2B²), the positive drawn near with 1
    close(found[2].diagonal(), *[2 * scale / 32] * 4, atol=1e-3 * scale)
    close(found[1].diagonal(), *[-scale / 32] * 4, atol=1e-3 * scale)


def test_half_precision_is_summed_in_float32():
    halves = [x.to(torch.bfloat16) for x in triplets()]
    wide = [x.float() for x in halves]
    found, expected = (multicsr_loss(*x[:3], x[3:], limit=0.3) for x in (halves, wide))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_small_batches(form):
    nothing = [torch.zeros(0, 3, requires_grad=True) for _ in range(3)]
    loss = multicsr_loss(*nothing, form=form)
    loss.backward()
    assert loss == 0 and nothing[0].grad.shape == (0, 3)
    one = triplets(1, 3)
    torch.testing.assert_close(multicsr_loss(*one[:3], one[3:], form=form), dense(*one, form=form))


def test_what_does_not_fit_is_named():
    a, p, n, *guide = triplets(4, 3)
    for wrong, match in (
        ((a[:3], p, n), "positive must have the 3 rows of anchor, got 4"),
        ((a, p, n[:, :2]), "negative must be .N, 3. to match anchor"),
        ((a, p, n, [*guide[:2], guide[2][:2]]), "guide negative must have the 4 rows"),
        ((a, p, n, [x[:2] for x in guide]), "guide must have the 4 rows of anchor, got 2"),
    ):
        with pytest.raises(ValueError, match=f"multicsr_loss: {match}"):
            multicsr_loss(*wrong)
    for name in ("mask_mode", "form"):
        with pytest.raises(ValueError, match=f"multicsr_loss: {name} must be one of"):
            multicsr_loss(a, p, n, **{name: "none"})


def of_raw(*rows):
    return multicsr_loss(*(unit(x) for x in rows[:3]), rows[3:], limit=0.3)


@pytest.mark.parametrize(("sizes", "how"), [((4, 2), "gather")])
def test_ranks_equal_one(sizes, how):
    rows = triplets(6, 5)
    assert not torch.equal(of_raw(*rows), multicsr_loss(*rows[:3]))  # something is masked
    assert_ranks_equal_one(of_raw, rows, sizes, how)


# ------------------------------------------------------------------------------------------------- what is written


def test_ratings_are_numbers_from_0_to_5():
    said = ("0", "5.0", " 3.5\n", "5.1", "-1", "4 of 5", "good", "", "nan", 2)
    assert [rating(x) for x in said] == [0.0, 5.0, 3.5, None, None, None, None, None, None, 2.0]


def test_roles_are_swapped_and_bad_rows_dropped():
    assert in_roles("s", "e", "c", ("4", "1")) == Triplet("s", "e", "c", (4.0, 1.0))
    assert in_roles("s", "e", "c", ("1", "4")) == Triplet("s", "c", "e", (4.0, 1.0))
    assert in_roles("s", "e", "c", ("5", "4")) == Triplet("s", "e", "c", (5.0, 4.0))  # at most 4.0 is good enough
    assert in_roles("s", "e", "c", ("4.1", "5")) is None
    assert in_roles("s", "e", "c", ("5", "no")) is None and in_roles("s", "e", "c", ("6", "1")) is None
    assert in_roles("s", "", "c", ("5", "1")) is None


def test_lines_and_gap():
    def good(high, low, **settings):
        return is_good(Triplet("s", "e", "c", (high, low)), **settings)

    assert good(3, 2.9) and good(5, 3) and not good(2.9, 1) and not good(5, 3.1)
    assert not good(3, 3) and good(3, 3, gap=False)
    assert good(4, 3.5, positive_line=4, negative_line=3.5)


@pytest.fixture(scope="module")
def writer():
    from fastcontrast import smollm2

    model, tokenizer = smollm2.load()
    return Writer(smollm2.early_exit(model, 2).double(), tokenizer)  # behind two layers logits are large


def test_a_batch_after_a_prompt_read_once_is_each_sentence_alone(writer, one_thread):
    sentences, said = ["Rain fell all night.", "He will travel to Paris on Monday, she said."], ["It rained.", "No."]
    together = writer.ratings(sentences, said)
    for i, (sentence, line) in enumerate(zip(sentences, said, strict=True)):
        logp = []
        for prompt, asked in zip(writer.prompts, ("Same meaning", "Opposite meaning"), strict=True):
            texts = f"Sentence: {sentence}\n{asked}:", f" {line}\n"
            head, tail = (writer.tokenizer(text, return_tensors="pt").input_ids for text in texts)
            ids, first = torch.cat([prompt, head, tail], 1), prompt.shape[1] + head.shape[1]
            with torch.no_grad():
                logits = writer.model(ids[:, :-1]).logits.log_softmax(-1)
            logp.append(logits.gather(2, ids[:, 1:, None])[0, first - 1 :].sum())
        close(together[i], 5 * torch.sigmoid(logp[0] - logp[1]), atol=1e-8)
    lines = writer.write(sentences, 0)
    assert lines == [writer.write([s], 0)[0] for s in sentences] and not any("\n" in x for x in lines)


# -------------------------------------------------------------------------------------------------------- the loop


def test_the_head_is_for_training_alone():
    pooler, x = Pooler(5), torch.randn(3, 5)
    torch.testing.assert_close(pooler(x), unit(torch.tanh(pooler.linear(x))))
    torch.testing.assert_close(pooler.eval()(x), unit(x))


def test_the_best_weights_are_kept_and_go_on():
    model = torch.nn.Linear(1, 1, bias=False)
    best = Best(model)
    for weight, score in ((1.0, 3.0), (2.0, 5.0), (3.0, 4.0)):
        model.weight.data.fill_(weight)
        best.offer(model, score)
    best.restore(model)
    assert model.weight.item() == 2.0 and best.score == 5.0

    def step(best, i):
        moving = torch.nn.Linear(1, 1, bias=False)
        moving.weight.data.fill_(float(i))
        best.offer(moving, [2.0, 1.0, 1.5][i])
        return best.model.weight.clone(), best.score.clone()

    assert_resumes(lambda: Best(torch.nn.Linear(1, 1, bias=False)), step)


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(multicsr_triplets, "cache_folder", lambda: tmp_path / "cache")
    results = train_a_little("multicsr", tmp_path, monkeypatch, BATCH=4, LAYERS=2)
    assert set(results["models"]) == {"SimCSE", "MultiCSR, no mask", "MultiCSR"} and results["triplets"]
    for found in results["models"].values():
        assert len(found["losses"]) == 2
        assert set(found["metrics"]) == {f"{x}, Spearman" for x in ("WordSim-353", "Lee-50", "SimLex-999")}
    assert len(list((tmp_path / "cache").iterdir())) == 1  # what was written is kept
