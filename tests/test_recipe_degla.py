"""DeGLA against its definition: golden values, the dense formula, edges, ranks, the teacher, the command."""

import math
import random

import pytest
import torch
from recipes import assert_ranks_equal_one, assert_resumes, close, gradients, train_a_little, unit, waves
from torch import nn
from torch.nn import functional as F

from fastcontrast import EMATeacher, clip_loss
from fastcontrast.recipes._parts.degla_corruptions import corruptions_of
from fastcontrast.recipes._shared.report import Scale
from fastcontrast.recipes.degla import Features, base_loss, degla_loss, distance, local_loss, released_order

S = 14.0
RAW = waves(3, 6, 0), waves(3, 6, 1), waves(6, 6, 2).view(3, 2, 6)
RAW_TEACHER = waves(3, 6, 3), waves(3, 6, 4), waves(6, 6, 5).view(3, 2, 6)
MASK = torch.tensor([[True, False], [False, False], [True, True]])


def units(*raw) -> Features:
    return Features(*(unit(x) for x in raw))


STUDENT, TEACHER = units(*RAW), units(*RAW_TEACHER)


def dense(student, teacher, scale, mask=None, *, base="all", tgc="own", of_igc=0.1, of_tgc=0.1, of_distance=0.005):
    """As the source computes it: all positives, then all corruptions, [B, B + B·K] with −inf where none belongs."""
    v, t, n = student
    b, k, _ = n.shape
    there = torch.ones(b, k, dtype=torch.bool) if mask is None else mask
    flat, used, target = n.flatten(0, 1), there.flatten(), torch.arange(b)
    of_sample = torch.arange(b * k) // max(k, 1)  # the list is sample-major
    own = of_sample == target[:, None]
    released = torch.arange(b * k) % b == target[:, None]

    def term(logits, negatives, keep, positives):
        table = torch.cat([logits, negatives], 1).masked_fill(~torch.cat([positives, keep & used], 1), -math.inf)
        return F.cross_entropy(table, target)

    everything, diagonal = torch.ones(b, b, dtype=torch.bool), torch.eye(b, dtype=torch.bool)
    of_base = torch.ones_like(own) if base == "all" else own
    total = term(scale * v @ t.T, scale * v @ flat.T, of_base, everything) / 2
    total = total + F.cross_entropy(scale * t @ v.T, target) / 2
    total = total + of_igc * term(scale * v @ t.T, scale * v @ flat.T, own, diagonal)
    of_text = own if tgc == "own" else released
    total = total + of_tgc * term(10 * t @ teacher.text.detach().T, 10 * t @ flat.T, of_text, diagonal)
    apart = [(x - y.detach()).square() for x, y in zip(student, teacher, strict=True)]
    return total + of_distance * (apart[0].sum() + apart[1].sum() + (apart[2].sum(2) * there).sum())


def of_batch(*tensors, **options):
    """Raw features of the student, of the teacher, a mask: everything is used."""
    return degla_loss(units(*tensors[:3]), units(*tensors[3:6]), S, tensors[6], **options)


def of_batch_as_released(*tensors):
    return of_batch(*tensors, base="own", tgc="released")


def test_golden_values():
    v, t, n = STUDENT
    close(base_loss(v, t, n, S, None, base="all"), 15.74885386)
    close(base_loss(v, t, n, S, None, base="own"), 13.90540430)
    close(local_loss(v, t, n, S), 8.76375654)
    close(local_loss(t, TEACHER.text, n, 10.0), 1.41006049)
    close(local_loss(t, TEACHER.text, released_order(n), 10.0), 1.50022562)
    close(distance(STUDENT, TEACHER), 23.66403939)
    value, *found = gradients(lambda *raw: degla_loss(units(*raw), TEACHER, S), *RAW)
    close(value, 16.88455576)
    close(torch.stack([g.norm() for g in found]), 5.74510915, 4.01201693, 1.40415610)
    close(degla_loss(*(Features(*(x.float() for x in y)) for y in (STUDENT, TEACHER)), S), 16.88455576, atol=1e-4)


@pytest.mark.parametrize(("base", "tgc"), [("all", "own"), ("own", "released")])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_dense_formula(base, tgc, masked, dtype, tolerance):
    torch.manual_seed(0)
    shapes = [(13, 9), (13, 9), (13, 3, 9)] * 2
    leaves = [*(unit(torch.randn(shape, dtype=torch.float64)) for shape in shapes), torch.tensor(S).double()]
    mask = torch.rand(13, 3) > 0.4 if masked else None

    def loss(function):
        return lambda *x: function(Features(*x[:3]), Features(*x[3:6]), x[6], mask, base=base, tgc=tgc)

    expected = gradients(loss(dense), *leaves)
    found = gradients(loss(degla_loss), *(x.to(dtype) for x in leaves))
    for ours, theirs in zip(found, expected, strict=True):  # to the teacher both are zeros
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()
    assert all(x.any() for x in (*found[:4], found[7]))


def test_without_corruptions_it_is_clip():
    none = [x._replace(corruptions=x.corruptions[:, :0]) for x in (STUDENT, TEACHER)]
    plain = clip_loss(STUDENT.image, STUDENT.text, S)
    for base in ("all", "own"):
        close(degla_loss(*none, S, base=base), plain + 0.005 * distance(*none))
        close(degla_loss(*none, S, base=base, tgc="released", of_igc=0, of_tgc=0, of_distance=0), plain)
    absent = torch.zeros(3, 2, dtype=torch.bool)
    close(degla_loss(STUDENT, TEACHER, S, absent), plain + 0.005 * distance(*none))


def test_one_negative_is_a_softplus():
    v, t, n = STUDENT
    own, other = (torch.linalg.vecdot(v, x) for x in (t, n[:, 0]))
    close(local_loss(v, t, n[:, :1], S), F.softplus(S * (other - own)).mean())
    # The negative is the text itself: log 2, nothing for the image, opposite gradients for the two equal rows.
    value, dv, dt, dn = gradients(lambda v, t, n: local_loss(v, t, n[:, None], S), v, t, t)
    close(value, math.log(2))
    assert not dv.any() and dt.any() and torch.equal(dt, -dn)


def test_the_order_of_a_row_does_not_count():
    order = torch.tensor([1, 0])
    swapped = [x._replace(corruptions=x.corruptions[:, order]) for x in (STUDENT, TEACHER)]
    for base in ("all", "own"):
        close(degla_loss(*swapped, S, MASK[:, order], base=base), degla_loss(STUDENT, TEACHER, S, MASK, base=base))


def test_missing_corruptions_count_nowhere():
    torch.testing.assert_close(released_order(torch.arange(6).view(3, 2)), torch.tensor([[0, 3], [1, 4], [2, 5]]))
    for options in ({"base": "all"}, {"base": "own"}, {"tgc": "released"}):
        holes = STUDENT.corruptions.masked_fill(~MASK[..., None], math.nan)
        value, *found = gradients(
            lambda *x, o=options: degla_loss(Features(*x), TEACHER, S, MASK, **o), *STUDENT[:2], holes
        )
        close(value, dense(STUDENT, TEACHER, S, MASK, **options))
        assert all(g.isfinite().all() for g in found) and not found[2][~MASK].any() and found[2][MASK].any()
    v, t, n = STUDENT  # a row without any: nothing to it, and the mean still divides by all rows
    value, dv, *_ = gradients(lambda v, t, n: local_loss(v, t, n, S, MASK), v, t, n)
    assert not dv[1].any() and dv[0].any()
    rows = [local_loss(v[i : i + 1], t[i : i + 1], n[i : i + 1][:, MASK[i]], S) for i in (0, 2)]
    close(value, sum(rows) / 3)


def test_half_precision_and_no_rows():
    halves = [Features(*(x.to(torch.bfloat16) for x in y)) for y in (STUDENT, TEACHER)]
    wide = [Features(*(x.float() for x in y)) for y in halves]
    torch.testing.assert_close(degla_loss(*halves, S), degla_loss(*wide, S))
    assert degla_loss(*(Features(*(x[:0] for x in y)) for y in (STUDENT, TEACHER)), S) == 0


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        ({"text": RAW[1][:, :5]}, {}, {}, r"text must be \[N, 6\] to match image, got \[3, 5\]"),
        ({"text": RAW[1][:2]}, {}, {}, r"text must be \[3, 6\], got \[2, 6\]"),
        ({"corruptions": RAW[0]}, {}, {}, r"corruptions must be \[B, K, D\], got \[3, 6\]"),
        ({"corruptions": RAW[2][:2]}, {}, {}, r"corruptions must be \[3, 2, 6\], got \[2, 2, 6\]"),
        ({}, {"corruptions": RAW[2][:, :1]}, {}, r"teacher's corruptions must be \[3, 2, 6\], got \[3, 1, 6\]"),
        ({}, {}, {"mask": MASK[:2]}, r"mask must be bool \[3, 2\], got torch.bool \[2, 2\]"),
        ({}, {}, {"base": "none"}, "base must be one of 'all', 'own', got 'none'"),
        ({}, {}, {"tgc": "all"}, "tgc must be one of 'own', 'released', got 'all'"),
    ],
)
def test_what_does_not_fit_is_named(student, teacher, options, message):
    with pytest.raises(ValueError, match=f"degla_loss: {message}"):
        degla_loss(STUDENT._replace(**student), TEACHER._replace(**teacher), S, **options)


@pytest.mark.parametrize(("sizes", "how"), [((3, 2), "gather"), ((1, 4), "ring")])
@pytest.mark.parametrize("objective", [of_batch, of_batch_as_released])
def test_ranks_equal_one(sizes, how, objective):
    tensors = [waves(5, 6, 0), waves(5, 6, 1), waves(15, 6, 2).view(5, 3, 6)]
    tensors += [waves(5, 6, 3), waves(5, 6, 4), waves(15, 6, 5).view(5, 3, 6)]
    mask = torch.arange(15).view(5, 3) % 4 > 0
    assert_ranks_equal_one(objective, [*tensors, mask], sizes, how)


def follow(teacher: EMATeacher, step: int) -> list[torch.Tensor]:
    """The student of this step, and what its teacher then is."""
    student = model()
    with torch.no_grad():
        for i, x in enumerate(student.parameters()):
            x.copy_(waves(x.numel(), 1, step + i).view(x.shape))
    teacher.update_parameters(student)
    return [x.clone() for x in teacher.module.parameters()]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"tower": nn.Linear(2, 3), "scale": Scale()})


def test_the_teacher_follows():
    before = [x.clone() for x in model().parameters()]
    assert len(before) == 3  # the scale too
    frozen, copied, usual = (follow(EMATeacher(model(), m, buffers="own"), 1) for m in (1.0, 0.0, 0.9996))
    for x, f, c, u in zip(before, frozen, copied, usual, strict=True):
        assert torch.equal(f, x) and not torch.equal(c, x)
        torch.testing.assert_close(u, 0.9996 * x + 0.0004 * c)
    assert_resumes(lambda: EMATeacher(model(), 0.9996, buffers="own"), follow)
    scale = Scale(200.0)  # beyond the limit: the gradient is computed all the same, and the step then ends at it
    torch.manual_seed(0)
    close_pair = units(*(torch.randn(4, 6).double() for _ in range(2)), torch.randn(4, 2, 6).double())
    degla_loss(close_pair, close_pair, scale()).backward()
    assert scale.log.grad != 0
    scale.clamp()
    close(scale(), 100.0, atol=1e-4)


def test_at_first_nothing_is_apart():
    parts = degla_loss(STUDENT, STUDENT, S), degla_loss(STUDENT, STUDENT, S, of_distance=0.0)
    assert parts[0] == parts[1] and distance(STUDENT, STUDENT) == 0


def test_corruptions():
    draw, names = random.Random(0), ["account box", "bell", "red arrow left"]
    for name in ("account box", "arrow down left"):
        words = name.split()
        for _ in range(20):
            order, first, last, anywhere = corruptions_of(name, names, draw)
            assert sorted(order.split()) == sorted(words) and order != name
            assert first.split()[1:] == words[1:] and last.split()[:-1] == words[:-1]
            for text in (first, last, anywhere):
                assert sum(a != b for a, b in zip(text.split(), words, strict=True)) == 1
    assert corruptions_of("bye bye", names, draw)[0] is None


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    results = train_a_little("degla", tmp_path, monkeypatch, BATCH=32, NAMES=60)
    assert list(results["models"]) == ["CLIP, the start", "CLIP, trained on", "DeGLA"] and results["names"] == 60
    for found in results["models"].values():
        assert set(found["metrics"]) == {"name or corruption, %", "icon → name R@1, %", "name → icon R@1, %"}
    assert [len(found["losses"]) for found in results["models"].values()] == [0, 2, 2]
