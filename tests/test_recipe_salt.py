"""SALT against its definition: golden values, the dense formula, teachers of every kind, scores, schedules, edges."""

import math

import pytest
import torch
import torch.nn.functional as F_
from golden_decoding import F
from recipes import assert_ranks_equal_one, close, gradients, train_a_little
from torch import Tensor

from fastcontrast import set_workspace
from fastcontrast.ops import linear_cross_entropy
from fastcontrast.recipes._parts import salt_blend, salt_teacher
from fastcontrast.recipes.salt import Heads, TopK, omega_at, salt_loss, score_sequences, select, top_k

H, W, TEACHER = F(4, 5, 0), F(6, 5, 0.6), 3 * F(4, 6, 1.4)
GOLD = torch.tensor([0, 3, 5, 2])
MASS = 0.958526787517, 0.975461864060, 0.983992616891, 0.967942118780


def dense(hidden: Tensor, weight: Tensor, gold: Tensor, q: Tensor, omega: float) -> Tensor:
    """The cross entropy of torch with soft targets, of tokens that count."""
    counted = gold != -100
    hard = F_.one_hot(gold[counted], len(weight)).to(q.dtype)
    return F_.cross_entropy((hidden @ weight.T)[counted], (1 - omega) * hard + omega * q[counted])


def norms(found: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([found[0], *(x.norm() for x in found[1:])])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rho": 1.0}, (2.953789200872, 0.848618409673, 0.734182961044)),
        ({"rho": 0.25}, (2.896974167746, 0.702149860492, 0.569747017068)),
        ({"omega": 0.0}, (2.949846809099, 0.973929971867, 0.781798457738)),
        ({"k": 3, "rest": "renormalise"}, (2.947002609174, 0.854420775411, 0.741184473644)),
        ({"k": 3, "rest": "tail"}, (2.952037615005, 0.845407792196, 0.731432668232)),
        ({"k": 3, "rest": "renormalise", "of_top": 0.25}, (2.875915705289,)),
        ({"k": 3, "rest": "tail", "of_top": 0.25}, (2.896259923651,)),
    ],
)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-8), (torch.float32, 1e-6)])
def test_golden_losses(settings, expected, dtype, atol):
    settings = dict(settings)
    k, of_top = settings.pop("k", None), settings.pop("of_top", 1.0)
    teacher = TEACHER.to(dtype) if k is None else top_k(TEACHER.to(dtype), k, of_top)
    found = norms(gradients(lambda h, w: salt_loss(h, w, GOLD, teacher, **settings), H.to(dtype), W.to(dtype)))
    assert found.dtype == dtype
    close(found[: len(expected)], *expected, atol=atol)


def test_golden_mass_that_is_kept():
    close(top_k(TEACHER, 3).mass, *MASS)


@pytest.mark.parametrize(
    ("count", "mask", "expected"),
    [
        (5, "zero", 0.482862395264), (5, "drop", 0.955396131130),
        (6, "zero", 0.955396131130), (6, "drop", 1.427929866995),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-8), (torch.float32, 1e-6)])
def test_golden_scores(count, mask, expected, dtype, atol):
    logits, gold = 3 * F(count, 6, 1.4), torch.tensor([0, 3, 5, 2, 1, 4])[:count]
    close(score_sequences(logits.to(dtype)[None], gold[None], 3, mask=mask), expected, atol=atol)


def problem(tokens: int, vocabulary: int, width: int, dtype=torch.float64):
    """States, vocabulary, gold tokens of which two do not count, and a teacher's states and vocabulary."""
    torch.manual_seed(0)
    sizes = (tokens, width), (vocabulary, width), (tokens, width + 2), (vocabulary, width + 2)
    h, w, taught, of_teacher = (torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes)
    gold = torch.randint(vocabulary, (tokens,))
    gold[[1, tokens - 1]] = -100
    return h, w, gold, Heads(taught, of_teacher)


@pytest.mark.parametrize("omega", [0.3, 1.0])
@pytest.mark.parametrize("kind", ["heads", "logits", "all tokens", "a few", "a few and the tail"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_dense_in_chunks_and_tiles(omega, kind, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(salt_blend, "TILE", 7 * 53)
    h, w, gold, heads = problem(171, 53, 6)
    rho, logits = 0.5, heads.hidden @ heads.weight.T
    q = (rho * logits).softmax(1)
    narrow = Heads(*(x.to(dtype) for x in heads))
    teacher, run = {"heads": narrow, "logits": logits.to(dtype)}.get(kind), {"rho": rho}
    if teacher is None:
        k = 53 if kind == "all tokens" else 4
        teacher, run = top_k(narrow, k, rho), {"rest": "tail" if "tail" in kind else "renormalise"}
        best = q.topk(k).indices
        kept = torch.zeros_like(q).scatter(1, best, q.gather(1, best))
        others = (1 - kept.sum(1, keepdim=True)) / max(53 - k, 1)
        q = torch.where(kept > 0, kept, others) if run["rest"] == "tail" else kept / kept.sum(1, keepdim=True)
    expected = gradients(lambda h, w: dense(h, w, gold, q, omega), h, w)
    set_workspace(1)  # chunks of 64 tokens
    try:
        found = gradients(lambda h, w: salt_loss(h, w, gold, teacher, omega, **run), h.to(dtype), w.to(dtype))
    finally:
        set_workspace(None)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()
    assert not found[1][[1, 170]].any()


def test_half_precision_and_leading_dimensions():
    h, w, gold, heads = problem(12, 53, 6, torch.bfloat16)
    teacher = Heads(heads.hidden.view(3, 4, -1), heads.weight)
    found = gradients(lambda h, w: salt_loss(h, w, gold.view(3, 4), teacher), h.view(3, 4, -1), w)
    q = (heads.hidden.double() @ heads.weight.double().T).softmax(1)
    expected = gradients(lambda h, w: dense(h, w, gold, q, 2 / 3), h.double(), w.double())
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double().view(theirs.shape) - theirs).norm() <= 1e-2 * theirs.norm()


def test_the_gradient_is_that_of_finite_differences():
    leaves = [x.clone().requires_grad_() for x in (H, W)]
    assert torch.autograd.gradcheck(lambda h, w: salt_loss(h, w, GOLD, TEACHER, 0.4, 0.7), leaves)


@pytest.mark.parametrize("kind", ["heads", "logits", "top"])
def test_nothing_reaches_the_teacher(kind):
    leaves = [x.clone().requires_grad_() for x in (F(4, 3, 2), F(6, 3, 1))]
    teacher = Heads(*leaves)
    if kind == "logits":
        teacher = leaves[0] @ leaves[1].T
    elif kind == "top":
        teacher = TopK(torch.arange(3).expand(4, 3), (leaves[0] @ leaves[1].T).log_softmax(1)[:, :3])
    loss = salt_loss(H.clone().requires_grad_(), W, GOLD, teacher)
    assert loss.requires_grad
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert found == (None, None)


def test_without_omega_it_is_the_cross_entropy_bit_for_bit_and_no_teacher_runs():
    h, w, gold, _ = problem(40, 53, 6, torch.float32)

    def teacher():
        raise AssertionError("the teacher ran")

    found = gradients(lambda h, w: salt_loss(h, w, gold, teacher, 0.0), h, w)
    expected = gradients(lambda h, w: linear_cross_entropy(h, w, gold, reduction="sum") / 38, h, w)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(AssertionError, match="the teacher ran"):
        salt_loss(h, w, gold, teacher, 0.5)
    assert salt_loss(h, w, gold, None, 0.0).isfinite()


def test_teachers_that_say_something_simple():
    nll, uniform = salt_loss(H, W, GOLD, None, 0.0), torch.zeros(4, 6, dtype=torch.float64)
    sure = TopK(GOLD[:, None], torch.zeros(4, 1, dtype=torch.float64))
    for omega in (0.2, 1.0):
        for rest in salt_teacher.REST:
            close(salt_loss(H, W, GOLD, sure, omega, rest=rest), nll, atol=1e-14)
        smoothed = F_.cross_entropy(H @ W.T, GOLD, label_smoothing=omega)
        close(salt_loss(H, W, GOLD, uniform, omega), smoothed, atol=1e-14)
    value, *itself = gradients(lambda h, w: salt_loss(h, w, GOLD, Heads(H, W), 1.0), H, W)
    assert max(x.abs().max() for x in itself) < 1e-15 and value > 1  # its own entropy
    other = gradients(lambda h, w: salt_loss(h, w, GOLD.flip(0), TEACHER, 1.0), H, W)
    torch.testing.assert_close(other, gradients(lambda h, w: salt_loss(h, w, GOLD, TEACHER, 1.0), H, W))
    missing = TopK(torch.tensor([[1], [1], [1], [1]]), torch.zeros(4, 1, dtype=torch.float64))  # never the gold token
    close(salt_loss(H, W, GOLD, missing, 0.25) - 0.25 * salt_loss(H, W, GOLD, missing, 1.0), 0.75 * nll)


def test_rows_of_the_gradient_of_logits_sum_to_zero():
    z = torch.randn(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, g = gradients(lambda z: salt_loss(z, torch.eye(7).double(), torch.arange(9) % 7, 2 * z.detach() + 1), z)
    close(g.sum(1), *[0.0] * 9, atol=1e-15)
    assert g.norm() > 0.1


def test_what_the_teacher_excludes_may_be_impossible():
    h, w = torch.tensor([[10.0, 1.0]]), torch.tensor([[0.1, 0.0], [0.0, 1.0], [-3e38, 0.0]])  # logits 1, 1, −∞
    teacher = torch.tensor([[0.0, 0.0, -torch.inf]])
    value, *found = gradients(lambda h, w: salt_loss(h, w, torch.tensor([0]), teacher), h, w)
    close(value, math.log(2), atol=1e-6)
    assert all(x.isfinite().all() for x in found)
    assert salt_loss(h, w, torch.tensor([2]), teacher, 1.0).isfinite()  # without a share of the gold token
    assert salt_loss(h, w, torch.tensor([0]), torch.zeros(1, 3)) == torch.inf


@pytest.mark.parametrize("omega", [0.0, 0.5])
@pytest.mark.parametrize("count", [4, 0])
def test_without_tokens_there_is_no_loss(omega, count):
    ignored = torch.full((count,), -100)
    value, *found = gradients(lambda h, w: salt_loss(h, w, ignored, TEACHER[:count], omega), H[:count], W)
    assert value == 0 and not any(x.any() for x in found)


def test_padded_vocabularies_equal_those_that_are_not():
    padding = 50 * F(2, 5, 3)
    wide, taught = torch.cat([W, padding]), torch.cat([F(6, 5, 2), padding, padding])
    value, dh, dw = gradients(lambda h, w: salt_loss(h, w, GOLD, Heads(H, taught), vocabulary=6), H, wide)
    expected = gradients(lambda h, w: salt_loss(h, w, GOLD, Heads(H, taught[:6])), H, W)
    torch.testing.assert_close((value, dh, dw[:6]), expected, rtol=0, atol=0)
    assert not dw[6:].any()
    logits = torch.cat([TEACHER, torch.full((4, 1), 1e3, dtype=torch.float64)], 1)
    close(salt_loss(H, wide, GOLD, logits, vocabulary=6), 2.953789200872)
    with pytest.raises(ValueError, match="targets must lie in"):
        salt_loss(H, wide, GOLD + 1, Heads(H, taught), vocabulary=6)


HEADS = Heads(F(4, 3, 2), F(6, 3, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"omega": 1.5}, "omega must lie in"),
        ({"rho": 0.0}, "rho must be positive"),
        ({"vocabulary": 7}, r"vocabulary must lie in \[1, 6\], got 7"),
        ({"vocabulary": 0}, "vocabulary must lie in"),
        ({"rest": "drop"}, "rest must be one of"),
        ({"targets": GOLD + 1}, "targets must lie in"),
        ({"teacher": TEACHER[:, :5]}, "teacher must have the vocabulary of 6, got 5"),
        ({"teacher": Heads(HEADS.hidden, F(7, 3, 1))}, "teacher must have the vocabulary of 6, got 7"),
        ({"teacher": Heads(HEADS.hidden, F(5, 3, 1)), "vocabulary": 6}, "teacher must have the vocabulary of 6, got 5"),
        ({"teacher": Heads(HEADS.hidden, F(6, 4, 1))}, "weight of the teacher must be"),
        ({"teacher": TEACHER[:3]}, r"teacher must have the tokens \[4\], got \[3\]"),
        ({"teacher": TopK(torch.full((4, 1), 6), torch.zeros(4, 1))}, "ids of the teacher must lie in"),
        ({"teacher": TopK(GOLD[:, None], torch.zeros(4, 2))}, "ids and logprobs of the teacher must be"),
        ({"teacher": top_k(TEACHER, 2), "rho": 0.5}, "rho must be 1 with TopK"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    given = {"hidden": H, "weight": W, "targets": GOLD, "teacher": HEADS, **change}
    with pytest.raises(ValueError, match=f"salt_loss: {message}"):
        salt_loss(**given)


def test_a_teacher_in_another_precision():
    half, wide = salt_loss(H.float(), W.float(), GOLD, TEACHER), salt_loss(H, W, GOLD, TEACHER.float())
    assert (half.dtype, wide.dtype) == (torch.float32, torch.float64)
    close(torch.stack([half, wide]), *[2.953789200872] * 2, atol=1e-6)


def test_other_errors():
    with pytest.raises(TypeError, match="teacher must be Heads, TopK or logits, got NoneType"):
        salt_loss(H, W, GOLD, None)
    with pytest.raises(ValueError, match=r"top_k: k must lie in \[1, 6\], got 7"):
        top_k(TEACHER, 7)
    with pytest.raises(ValueError, match="score_sequences: k must be at least 1"):
        score_sequences(TEACHER[None], GOLD[None], 0)
    with pytest.raises(ValueError, match="score_sequences: mask must be one of"):
        score_sequences(TEACHER[None], GOLD[None], mask="drops")
    with pytest.raises(ValueError, match="score_sequences: teacher must have the tokens"):
        score_sequences(TEACHER[None], GOLD[None, :3])
    with pytest.raises(ValueError, match=r"score_sequences: targets must be \[B, T\]"):
        score_sequences(TEACHER, GOLD)


def rank_loss(h: Tensor, gold: Tensor, taught: Tensor) -> Tensor:
    return salt_loss(h, W.to(h), gold, Heads(taught.detach(), W.flip(0)), 0.4)


def test_ranks_equal_one():
    gold = torch.tensor([0, -100, 5, -100, 1])  # 1 and 2 of them count
    assert_ranks_equal_one(rank_loss, [F(5, 5, 0), gold, F(5, 5, 2)], (2, 3))


# ---------------------------------------------------------------------------------------------------------- scores


def test_a_score_by_hand():
    """−log P of the gold tokens is 1, 2, 3, 4, 5 nats; the second and fifth have the three others before them."""
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).double()
    p = torch.zeros(5, 4, dtype=torch.float64)
    p[:, 0] = (-losses).exp()
    before = torch.tensor([1, 3, 2, 1, 3])
    for i, n in enumerate(before):
        p[i, 1 : n + 1] = (1 - p[i, 0] - 1e-9 * (3 - n)) / n
        p[i, n + 1 :] = 1e-9
    gold = torch.zeros(1, 5).long()
    close(score_sequences(p.log()[None], gold, 3), 1.0)  # 1, 0, 3, 4, 0
    close(score_sequences(p.log()[None], gold, 3, mask="drop"), 3.0)  # 1, 3, 4
    gold[0, 0] = -100
    close(score_sequences(p.log()[None], gold, 3), 1.5)  # 0, 3, 4, 0
    close(score_sequences(p.log()[None], gold, 3, mask="drop"), 3.5)


def test_scores_equal_a_sorted_vocabulary():
    set_workspace(1)  # chunks of 64 tokens
    try:
        _, _, gold, heads = problem(3 * 50, 53, 6)
        gold, shaped = gold.view(3, 50), Heads(heads.hidden.view(3, 50, -1), heads.weight)
        found = {mask: score_sequences(shaped, gold, mask=mask) for mask in ("zero", "drop")}
    finally:
        set_workspace(None)
    logits = (heads.hidden @ heads.weight.T).view(3, 50, -1)
    loss, inside = -logits.log_softmax(2), torch.zeros(logits.shape, dtype=torch.bool)
    inside.scatter_(2, logits.topk(10).indices, True)
    for i in range(3):
        at = (gold[i] != -100).nonzero()[:, 0], gold[i][gold[i] != -100]
        values, kept = loss[i][at], inside[i][at]
        assert 0 < kept.sum() < len(kept)
        for mask, x in (("zero", values * kept), ("drop", values[kept])):
            close(found[mask][i], torch.quantile(x, 0.5))  # the mean of the middle two


def test_edges_of_scores():
    tied = torch.zeros(1, 2, 5)  # no logit is greater than the gold one: inside for any k
    close(score_sequences(tied, torch.tensor([[0, 4]]), 1), math.log(5), atol=1e-6)
    outside, gold = torch.tensor([[[0.0, 1.0, 2.0]] * 2] * 3), torch.tensor([[0, 0], [-100, -100], [2, -100]])
    assert score_sequences(outside, gold, 2)[:2].tolist() == [0, 0]
    dropped = score_sequences(outside, gold, 2, mask="drop")
    assert dropped[:2].tolist() == [-torch.inf] * 2 and dropped[2] > 0
    assert select(dropped, 3).tolist() == [2]


def test_selection_is_of_the_highest_and_of_equal_ones_the_first():
    scores = torch.tensor([1.0, 3.0, 1.0, 3.0, 2.0, 1.0])
    assert select(scores, 4).tolist() == [1, 3, 4, 0]
    assert select(scores, 0).tolist() == [] and len(select(scores, 99)) == 6


def test_a_teacher_kept_in_a_few_tokens_of_each_position():
    shaped = TEACHER.view(2, 2, 6)
    kept = top_k(shaped, 3, 0.25)
    assert kept.ids.shape == kept.logprobs.shape == (2, 2, 3)
    torch.testing.assert_close(kept.logprobs, (0.25 * shaped).log_softmax(2).gather(2, kept.ids))
    close(salt_loss(H.view(2, 2, 5), W, GOLD.view(2, 2), kept, rest="tail"), 2.896259923651)


# ------------------------------------------------------------------------------------------------------------ loop


def test_transitions():
    hard = [omega_at(i, 3, 0.5) for i in range(5)]
    assert hard == [0.5, 0.5, 0.5, 0, 0]
    linear = [omega_at(i, 2, 0.5, transition="linear", window=2) for i in range(6)]
    close(torch.tensor(linear), 0.5, 0.5, 0.5, 0.25, 0, 0)
    ratio = [omega_at(i, 2, 2 / 3, transition="ratio", window=2) for i in range(6)]
    close(torch.tensor(ratio), 2 / 3, 2 / 3, 2 / 3, 0.5, 0, 0, atol=1e-7)  # ω / (1 − ω) = 2, 2, 2, 1, 0, 0
    assert {omega_at(i, 0) for i in range(9)} == {0.0}
    assert {omega_at(i, 9) for i in range(9)} == {2 / 3}
    with pytest.raises(ValueError, match="omega_at: omega must be below 1 for a ratio"):
        omega_at(0, 1, 1.0, transition="ratio")
    with pytest.raises(ValueError, match="omega_at: transition must be one of"):
        omega_at(0, 1, transition="soft")


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    sizes = {"BATCH": 4, "VOCABULARY": 512, "LENGTH": 32, "TESTED": 4}
    small = {"TEACHER": {"width": 16, "layers": 1}, "STUDENT": {"width": 32, "layers": 1}}
    results = train_a_little("salt", tmp_path, monkeypatch, **sizes, **small)
    models = results["models"]
    assert [*models] == ["teacher", "student alone", "RKD", "SALT_DS", "SALT"]
    assert len(models["teacher"]["losses"]) == 5 and results["taught"] == 1
    for label, found in models.items():
        assert len(found["losses"]) == 2 or label == "teacher"
        assert set(found["metrics"]) == {"perplexity, held out"}
    assert models["RKD"]["losses"][0] == models["SALT"]["losses"][0] != models["student alone"]["losses"][0]
