"""UniME against its definition: golden values, dense forms, rows with few negatives, ties, ranks, GradCache, the
command."""

import math
import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_decoding import F as fixture
from recipes import assert_ranks_equal_one, close, gradients, train_a_little, unit, waves

from fastcontrast import GradCache, info_nce
from fastcontrast.data import docstrings
from fastcontrast.recipes import unime
from fastcontrast.recipes._parts.unime_negatives import UNDERFULL
from fastcontrast.recipes._parts.unime_student import word_means
from fastcontrast.recipes.unime import LowRank, distillation_loss, hard_negative_loss

Q, C = unit(fixture(6, 8, 0)), unit(fixture(6, 8, 0.6))
STUDENT, TEACHER = unit(fixture(5, 8, 0)), unit(fixture(5, 12, 0.4))
EXACT = [(torch.float64, 1e-12), (torch.float32, 1e-5)]


def dense(q, c, scale, k, beta, underfull="duplicate"):
    """Row by row, from the whole matrix."""
    scores, total = q @ c.T, 0.0
    for i, row in enumerate(scores):
        eligible = [j for j in range(len(c)) if j != i and row[j].item() <= scores[i, i].item() + beta]
        others = [j for j in range(len(c)) if j not in eligible]
        eligible.sort(key=lambda j, row=row: (-row[j].item(), j))
        chosen, m = eligible[:k], len(eligible)
        if m < k and underfull == "duplicate":
            chosen = [eligible[r % m] for r in range(k)] if m else []
        if m < k and underfull == "official":
            chosen = chosen + others[: k - m]
        total = total + (scale * row[[i, *chosen]]).logsumexp(0) - scale * row[i]
    return total / len(q)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-11), (torch.float32, 2e-6)])
@pytest.mark.parametrize("underfull", UNDERFULL)
def test_golden_hard_negatives(underfull, dtype, atol):
    for tau, k, beta, expected in [
        (0.2, 5, 10, 0.684347699297), (0.2, 3, 0.1, 0.683726231744), (0.2, 2, 0, 0.149550152697),
        (0.2, 3, -0.2, 0.042564994834), (0.2, 2, -1, 0.003283726323), (0.02, 5, 10, 1.674657287367),
        (0.02, 2, 0, 0.095938477270),
    ]:  # fmt: skip
        found = hard_negative_loss(Q.to(dtype), C.to(dtype), 1 / tau, k=k, beta=beta, underfull=underfull)
        close(found, expected, atol=atol)


@pytest.mark.parametrize(
    ("beta", "counts"),
    [(0.1, [5] * 6), (0, [5, 4, 4, 4, 5, 4]), (-0.2, [5, 4, 4, 4, 4, 4]), (-1, [2, 3, 2, 3, 2, 2])],
)
def test_golden_numbers_of_negatives(beta, counts):
    """A row's negatives are the candidates to which its loss gives a gradient, beside its own."""
    scores = (Q @ C.T).requires_grad_()
    assert [(row <= row[i] + beta).sum().item() - (beta >= 0) for i, row in enumerate(scores)] == counts
    for i, m in enumerate(counts):
        order = [i, *(j for j in range(6) if j != i)]
        one = torch.cat([Q[i : i + 1], torch.zeros(5, 8).double()])  # the other rows' gradients go to no candidate
        _, _, of_candidates = gradients(
            lambda q, c: hard_negative_loss(q, c, 5.0, k=5, beta=beta, underfull="mask"), one, C[order]
        )
        assert of_candidates.any(1).sum() == m + 1


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 2e-7)])
def test_golden_distillation(dtype, atol):
    student, teacher = STUDENT.to(dtype), TEACHER.to(dtype)
    for tau, *expected in [
        (1, 0.0157247237, 0.0149161567, 0.0243274754), (0.1, 0.0055145050, 0.0117476173, 0.2146609372),
    ]:  # fmt: skip
        for settings, value in zip(({}, {"direction": "reverse"}, {"exclude_self": True}), expected, strict=True):
            rows = distillation_loss(student, teacher, 1 / tau, reduction="none", **settings)
            close(rows.mean(), value, atol=atol)
            close(distillation_loss(student, teacher, 1 / tau, reduction="mean", **settings), value, atol=atol)
            close(distillation_loss(student, teacher, 1 / tau, **settings), 5 * value, atol=5 * atol)


def test_golden_collapse():
    close(distillation_loss(STUDENT, TEACHER, 50.0, reduction="mean"), 4.6e-11, atol=5e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), EXACT)
@pytest.mark.parametrize("underfull", UNDERFULL)
def test_equals_the_dense_form(underfull, dtype, tolerance):
    """Of 37 rows, some with no negative left, with a learned scale."""
    torch.manual_seed(0)
    q = unit(torch.randn(37, 11, dtype=torch.float64))
    c = unit(0.5 * q + 0.3 * torch.randn(37, 11, dtype=torch.float64))
    leaves = q, c, torch.tensor(2.0, dtype=torch.float64)
    for k, beta in ((8, 0.1), (5, -0.6), (36, -0.2), (3, -1.5)):
        few = ((q @ c.T) <= (q * c).sum(1, keepdim=True) + beta).sum(1)
        assert beta > 0 or ((few < k).any() and (beta > -1 or (few == 0).any()))
        settings = {"k": k, "beta": beta, "underfull": underfull}
        expected = gradients(lambda q, c, s, o=settings: dense(q, c, s, **o), *leaves)
        found = gradients(lambda q, c, s, o=settings: hard_negative_loss(q, c, s, **o), *(x.to(dtype) for x in leaves))
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == dtype
            assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_distillation_equals_the_dense_form(exclude_self, direction):
    def dense_kl(student, teacher):
        logits = [5.0 * x @ x.T for x in (student, teacher)]
        if exclude_self:
            there = ~torch.eye(5, dtype=torch.bool)
            logits = [x[there].view(5, 4) for x in logits]
        p, q = (x.log_softmax(1) for x in logits)
        a, b = (q, p) if direction == "forward" else (p, q)
        return (a.exp() * (a - b)).sum()

    expected = gradients(lambda s: dense_kl(s, TEACHER), STUDENT)
    settings = {"direction": direction, "exclude_self": exclude_self}
    value, student, teacher = gradients(lambda s, t: distillation_loss(s, t, 5.0, **settings), STUDENT, TEACHER)
    torch.testing.assert_close((value, student), expected)
    assert not teacher.any()


def test_all_negatives_are_those_of_info_nce():
    settings = {"k": 5, "beta": math.inf}
    torch.testing.assert_close(
        gradients(lambda q, c: hard_negative_loss(q, c, 50.0, **settings), Q, C),
        gradients(lambda q, c: info_nce(q, c, 50.0), Q, C),
    )


def test_one_negative_is_the_hardest():
    scores = Q @ C.T
    hardest = scores.masked_fill(torch.eye(6, dtype=torch.bool), -9).amax(1)
    expected = F.softplus(20 * (hardest - scores.diagonal())).mean()
    torch.testing.assert_close(hard_negative_loss(Q, C, 20.0, k=1, beta=9.0), expected)


def test_a_row_without_negatives_counts_and_moves_nothing():
    scale = torch.tensor(20.0, dtype=torch.float64)
    for underfull in ("duplicate", "mask"):
        value, *moved = gradients(
            lambda q, c, s, u=underfull: hard_negative_loss(q, c, s, beta=-3.0, k=2, underfull=u), Q, C, scale
        )
        assert value == 0 and not any(x.any() for x in moved)
    q, c = torch.eye(3, 4).double(), torch.eye(3, 4).double()
    c[2] = c[1]  # the third query is as near to all: no negative at beta −0.5; the others have one at least
    found = hard_negative_loss(q, c, 1.0, k=1, beta=-0.5)
    torch.testing.assert_close(found, 2 / 3 * torch.tensor(-1.0).exp().log1p().double())


def test_a_duplicate_of_the_positive_stays_a_negative():
    """Its similarity is s_ii, which is not above s_ii + 0; rounding must not say otherwise."""
    torch.manual_seed(0)
    q, c = (F.normalize(torch.randn(64, 384), dim=1) for _ in range(2))
    c[1::2] = c[::2]
    found = hard_negative_loss(q, c, 1.0, k=63, beta=0.0, underfull="mask")
    exact = q.double() @ c.double().T
    eligible = exact <= exact.diagonal()[:, None] + 1e-9
    expected = (exact.masked_fill(~eligible, -math.inf).logsumexp(1) - exact.diagonal()).mean()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_of_equal_negatives_the_first_is_taken():
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    c = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]])
    _, gradient = gradients(lambda c: hard_negative_loss(q, c, 1.0, k=1, beta=9.0), c)
    assert gradient[1, 0] > 0 and gradient[2, 0] == 0  # row 0 alone looks at that coordinate


def test_equal_distributions_cost_nothing():
    for settings in ({}, {"direction": "reverse"}, {"exclude_self": True}):
        value, gradient = gradients(lambda s, o=settings: distillation_loss(s, STUDENT, 10.0, **o), STUDENT)
        assert abs(value) < 1e-14 and gradient.abs().max() < 1e-14


def test_rotations_change_nothing():
    rotation = torch.linalg.qr(fixture(8, 8, 0.3) + torch.eye(8)).Q
    torch.testing.assert_close(
        distillation_loss(STUDENT @ rotation, TEACHER, 10.0), distillation_loss(STUDENT, TEACHER, 10.0)
    )
    torch.testing.assert_close(
        distillation_loss(TEACHER[:, :8], STUDENT @ rotation, 1.0), distillation_loss(TEACHER[:, :8], STUDENT, 1.0)
    )


def both(q, c):
    q, c = unit(q), unit(c)
    hard = sum(hard_negative_loss(q, c, 20.0, k=4, beta=b, underfull=u) for b in (0.1, -0.5) for u in UNDERFULL)
    return hard + distillation_loss(q, c, 5.0, exclude_self=True)


def test_ranks_equal_one():
    """Negatives of one rank's rows lie on the other, and the gradient comes back to it."""
    assert_ranks_equal_one(both, [waves(7, 6, 0), waves(7, 6, 1)], (5, 2))


def test_grad_cache_gives_the_gradients_of_the_whole_batch():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh()).double()

    def loss(q, c):
        return hard_negative_loss(F.normalize(q, dim=1), F.normalize(c, dim=1), k=3)

    loss(model(Q), model(C)).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    GradCache([model, model], 2, loss)(Q, C)
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


def test_an_adapter_starts_at_its_map_and_merges_into_it():
    weight, x = fixture(8, 8, 0.2).float(), fixture(5, 8, 0.9).float()
    model = LowRank(weight, 3, alpha=6.0)
    torch.testing.assert_close(model(x), F.normalize(x @ weight.T, dim=1))
    assert {name for name, _ in model.named_parameters()} == {"down", "up"}
    torch.nn.init.normal_(model.up)
    torch.testing.assert_close(model.merge(), weight + 2 * model.up.detach() @ model.down.detach())
    torch.testing.assert_close(LowRank(model.merge(), 2)(x), model(x), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match=r"LowRank: rank must lie in \[1, 8\], got 9"):
        LowRank(weight, 9)


def test_word_means_do_not_see_the_neighbours():
    several, alone = word_means(["open a file", "the file"], ["a file", "close it and open the file"]), []
    for text in ("a file", "close it and open the file"):
        alone.append(word_means(["open a file", "the file"], [text])[1])
    torch.testing.assert_close(several[1], torch.cat(alone))
    torch.testing.assert_close(several[0].norm(dim=1), torch.full((2,), 384**0.5))
    torch.testing.assert_close(several[0][0], -several[0][1], atol=1e-4, rtol=0)  # about their mean


def test_what_does_not_fit_is_named():
    for call, message in (
        (lambda: hard_negative_loss(Q, C[:5]), "candidates must be as many as queries, 6, got 5"),
        (lambda: hard_negative_loss(Q, C[:, :7]), r"candidates must be \[N, 8\]"),
        (lambda: hard_negative_loss(Q, C, k=6), r"k must lie in \[1, 6\), .* got 6"),
        (lambda: hard_negative_loss(Q, C, k=2, underfull="repeat"), "underfull must be one of"),
        (lambda: distillation_loss(STUDENT, TEACHER[:4], 1.0), "teacher must have 5 rows like student, got 4"),
        (lambda: distillation_loss(STUDENT, TEACHER, 1.0, direction="both"), "divergence_direction must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    some = partial(docstrings, folder=Path(os.__file__).parent / "email")  # all of the library take seconds to read
    monkeypatch.setattr(unime, "docstrings", some)
    results = train_a_little("unime", tmp_path, monkeypatch, BATCH=(32, 32))
    labels = ["start", "1st stage", "InfoNCE", "2nd stage alone", "1st stage, InfoNCE", "UniME"]
    assert list(results["models"]) == labels
    for label, found in results["models"].items():
        assert len(found["losses"]) == (0 if label == "start" else 2)
        assert set(found["metrics"]) == {"docstring → code R@1, %", "code → docstring R@1, %"}
    assert "similarity_topk" in results["models"]["UniME"]["implementations"]
