"""ProCLIP against its definition: golden values, the dense formula, invariants, near and equal rows, ranks, a run."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from recipes import assert_ranks_equal_one, assert_resumes, close, gradients, train_a_little, unit, waves
from torch import nn

from fastcontrast import EMATeacher, clip_loss
from fastcontrast.distributed import exchange
from fastcontrast.recipes import proclip
from fastcontrast.recipes._parts import proclip_start
from fastcontrast.recipes.proclip import Adapter, imitation_loss, instance_loss, proclip_loss, structure_loss
from fastcontrast.testing import ranks

SCALE = 1 / 0.07
A, E = unit(waves(5, 6, 0)), unit(waves(5, 6, 1))
PENALTIES = {"smooth_l1": lambda x: torch.where(x.abs() < 1, x**2 / 2, x.abs() - 0.5), "square": torch.square}


def dense_structure(student, teacher, h="smooth_l1"):
    """Pair by pair."""
    total = student.sum() * 0
    for i in range(len(student)):
        for j in range(i + 1, len(student)):
            total = total + PENALTIES[h]((student[i] - student[j]).norm() - (teacher[i] - teacher[j]).norm())
    return total


def random_rows(n, width, seed, dtype=torch.float64):
    return unit(torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=dtype))


def test_golden_first_stage():
    close(instance_loss(A, E), 15.01255750)
    close(structure_loss(A, E), 0.25822217)
    close(structure_loss(A, E, h="square"), 0.51644434)
    value, gradient = gradients(lambda raw: imitation_loss(unit(raw), E), waves(5, 6, 0))
    close(value, 15.27077967)
    close(gradient.norm(), 2.16395005)


def second_stage(image, text, teacher, weight=4e-4):
    return proclip_loss(unit(image), unit(text), SCALE, unit(teacher), weight=weight)


def test_golden_second_stage():
    raw = [waves(5, 6, c) for c in (0, 2, 1)]
    value, image, text, teacher = gradients(second_stage, *raw)
    close(value, 9.09427929)
    close(image.norm(), 3.76893896)
    assert not teacher.any()
    # the adapter learns from CLIP's loss alone, which is all there is without the weight
    plain = gradients(lambda v, a: clip_loss(unit(v), unit(a), SCALE), *raw[:2])
    torch.testing.assert_close(text, plain[2])
    torch.testing.assert_close(gradients(lambda v, a: second_stage(v, a, raw[2], 0.0), *raw[:2]), plain)


@pytest.mark.parametrize("h", PENALTIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_sum_over_pairs(h, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(sys.modules["fastcontrast.ops.pairwise_reduce"], "CPU_BLOCK", 16)  # a function has its name
    teacher = random_rows(37, 7, 1)
    student = torch.linspace(0.1, 2.5, 37)[:, None] * random_rows(37, 11, 2)
    apart = torch.cdist(student, student) - torch.cdist(teacher, teacher)
    assert (apart > 1).any() and (apart < -1).any()  # all branches of h
    expected = gradients(lambda a: dense_structure(a, teacher, h), student)
    found = gradients(lambda a: structure_loss(a, teacher, h=h), student.to(dtype))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


def test_invariants():
    student, teacher = random_rows(9, 6, 1), random_rows(9, 6, 2)
    for same in (imitation_loss, lambda a, e: structure_loss(a, e, h="square")):
        value, gradient = gradients(lambda a, same=same: same(a, student), student)
        close(value, 0)
        close(gradient.norm(), 0)
    value = structure_loss(student, teacher)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    moved = structure_loss(student @ turn + 3, teacher @ turn.T - 2)
    torch.testing.assert_close(moved, value)
    assert (instance_loss(student @ turn, teacher) - instance_loss(student, teacher)).abs() > 0.1
    near = unit(student + 0.1 * teacher)
    torch.testing.assert_close(structure_loss(near, student, h="square"), 2 * structure_loss(near, student))
    order = torch.randperm(9)
    torch.testing.assert_close(imitation_loss(student[order], teacher[order]), imitation_loss(student, teacher))
    leaves = [x.clone().requires_grad_() for x in (student, teacher)]
    for loss in (imitation_loss, structure_loss, instance_loss):
        assert torch.autograd.grad(loss(*leaves), leaves, allow_unused=True)[1] is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_rows_are_at_distance_zero(dtype):
    """Where the student's rows coincide their distance is 0 to the digit, and draws nothing."""
    row = random_rows(1, 700, 1)
    student, teacher = row.expand(6, -1).to(dtype), random_rows(6, 700, 2).to(dtype)
    value, gradient = gradients(lambda a: structure_loss(a, teacher), student)
    torch.testing.assert_close(value.double(), dense_structure(student.double(), teacher.double()), rtol=1e-6, atol=0)
    assert not gradient.any()
    close(structure_loss(student, student.flip(0)), 0)
    pairs = random_rows(3, 700, 3).repeat(2, 1).to(dtype)  # each row twice: the others still draw
    value, gradient = gradients(lambda a: structure_loss(a, teacher), pairs)
    precise = pairs.double().requires_grad_()
    expected = torch.tensor(0.0, dtype=torch.float64)
    for i in range(6):
        for j in range(i + 1, 6):
            d = 0 if j == i + 3 else (precise[i] - precise[j]).norm()
            expected = expected + PENALTIES["smooth_l1"](d - (teacher[i].double() - teacher[j].double()).norm())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-6, atol=0)
    (wanted,) = torch.autograd.grad(expected, precise)
    assert (gradient.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("apart", [1e-1, 1e-2])
def test_a_narrow_cone_keeps_its_digits(apart):
    """2 − 2⟨a, b⟩ of rows so near each other would have lost three to five of seven."""
    student = unit(random_rows(1, 512, 1) + apart * random_rows(40, 512, 2)).float()
    teacher = unit(random_rows(1, 512, 1) + apart * random_rows(40, 512, 3)).float()
    expected = gradients(lambda a: dense_structure(a, teacher.double()), student.double())
    found = gradients(lambda a: structure_loss(a, teacher), student)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).norm() <= 2e-5 * theirs.norm()


def test_few_rows_and_what_is_not_finite():
    for n in (0, 1):
        rows, teacher = random_rows(n, 4, 1), random_rows(n, 4, 2)
        value, gradient = gradients(lambda a, e=teacher: structure_loss(a, e), rows)
        close(value, 0)
        assert not gradient.any()
    close(imitation_loss(random_rows(0, 4, 1), random_rows(0, 4, 1)), 0)
    broken = A.clone()
    broken[2, 3] = torch.nan
    assert structure_loss(broken, E).isnan() and structure_loss(E, broken).isnan()


def test_bf16_is_computed_in_float32():
    half = [x.to(torch.bfloat16) for x in (A, E)]
    value = imitation_loss(*half)
    assert value.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        inside = imitation_loss(*half)
    for found in (value, inside):
        torch.testing.assert_close(found, imitation_loss(*(x.float() for x in half)), rtol=0, atol=0)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"structure_loss: h must be one of 'smooth_l1', 'square', got 'huber'"):
        structure_loss(A, E, h="huber")
    for op, loss in (("structure_loss", structure_loss), ("instance_loss", instance_loss)):
        with pytest.raises(ValueError, match=f"{op}: teacher must have 5 rows to match student, got 4"):
            loss(A, E[:4])
    with pytest.raises(ValueError, match=r"instance_loss: teacher must be \[N, 6\] to match student, got \[5, 4\]"):
        imitation_loss(A, E[:, :4])
    with pytest.raises(ValueError, match=r"clip_loss: text_features must be \[N, 6\]"):
        proclip_loss(A, E[:, :4], SCALE, A)


def test_the_adapter():
    with torch.device("meta"):
        large = Adapter(4096, 1280)
    assert sum(p.numel() for p in large.block.parameters() if p.ndim > 1) == 268_435_456
    assert sum(p.numel() for p in large.parameters()) == 273_732_864
    torch.manual_seed(0)
    small, u = Adapter(12, 5, expansion=3).double(), torch.randn(7, 12, dtype=torch.float64)
    norm, first, _, second = small.block
    u1 = unit(u)
    middle = (u1 - u1.mean(1, keepdim=True)) / (u1.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    hidden = middle @ first.weight.T + first.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    x = u1 + hidden @ second.weight.T + second.bias
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    expected = unit(x @ small.head[1].weight.T + small.head[1].bias)
    torch.testing.assert_close(small(u), expected)
    torch.testing.assert_close(small(3 * u), expected)
    assert isinstance(norm, nn.LayerNorm) and norm.eps == small.head[0].eps == 1e-5


def global_part(image, text, teacher):
    return second_stage(image, text, teacher, weight=0.0)


def test_ranks_equal_one():
    raw = [waves(5, 6, c) for c in (0, 2, 1)]
    for sizes, how in (((3, 2), "gather"), ((1, 4), "ring")):
        assert_ranks_equal_one(global_part, raw, sizes, how)


def _on_a_rank(raw, sizes):
    image, text, teacher = (x.split(sizes)[dist.get_rank()].clone().requires_grad_() for x in raw)
    with exchange("gather"):
        value = second_stage(image, text, teacher, weight=0.1)
    return value.detach(), torch.autograd.grad(value, image)[0] / len(sizes)


def test_the_regulariser_is_of_a_ranks_own_rows():
    """CLIP's loss is the whole batch's; the mean over ranks adds the mean of the regularisers of each."""
    raw, sizes = [waves(5, 6, c) for c in (0, 2, 1)], [3, 2]

    def whole(image):
        parts = zip(image.split(sizes), raw[2].split(sizes), strict=True)
        return global_part(image, *raw[1:]) + sum(0.1 * imitation_loss(unit(v), unit(e)) for v, e in parts) / 2

    value, expected = gradients(whole, raw[0])
    found = ranks.run(2, _on_a_rank, raw, sizes)
    torch.testing.assert_close(sum(x for x, _ in found) / 2, value)
    torch.testing.assert_close(torch.cat([g for _, g in found]), expected)


class Tuned(nn.Module):
    """A student, its teacher, and one step of the second stage."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Linear(6, 4)
        self.teacher = EMATeacher(self.student, 0.9)

    def step(self, i: int) -> torch.Tensor:
        x, text = waves(5, 6, i).float(), unit(waves(5, 4, i + 1).float())
        loss = proclip_loss(unit(self.student(x)), text, SCALE, unit(self.teacher(x)), weight=0.1)
        loss.backward()
        with torch.no_grad():
            for p in self.student.parameters():
                p.sub_(0.1 * p.grad)
                p.grad = None
        self.teacher.update_parameters(self.student)
        return torch.stack([loss.detach(), self.teacher(x).norm()])


def test_resumes():
    assert_resumes(Tuned, Tuned.step)


def test_the_first_stage_learns_what_the_old_encoder_says(monkeypatch, one_thread):
    monkeypatch.setattr(proclip, "BATCH", 16)
    monkeypatch.setattr(proclip, "TEXT_STEPS", 30)
    monkeypatch.setattr(proclip, "TEXT_RATE", 1e-2)
    torch.manual_seed(0)
    adapter, layer, texts = Adapter(8, 6, 2), nn.Linear(5, 6), torch.randn(2, 20, 5)
    old = nn.Sequential(layer, nn.Softmax(-1))
    embedded, few = torch.cat([texts, texts.square()], 2)[..., :8], SimpleNamespace(pairs=SimpleNamespace())
    few.pairs.unseen = torch.arange(20) > 11
    taught, weight = old(texts[0, :12]), layer.weight.clone()
    before = imitation_loss(adapter(embedded[0, :12]), taught)
    proclip.imitate(adapter, old, embedded, texts, few, 0)
    assert imitation_loss(adapter(embedded[0, :12]), taught) < before / 2
    assert torch.equal(layer.weight, weight) and layer.weight.grad is None


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(proclip_start, "BATCH", 32)
    models = train_a_little("proclip", tmp_path, monkeypatch, BATCH=32, TEXT_STEPS=3, START_STEPS=4)["models"]
    assert list(models) == ["CLIP, bag of words", "2nd stage alone", "ProCLIP"]
    both = {"icon → name R@1, %", "name → icon R@1, %"}
    for label, found in models.items():
        assert both <= set(found["metrics"]) and len(found["losses"]) == (4 if "bag" in label else 2)
    assert models["ProCLIP"]["implementations"]["pairwise_reduce"] == "torch"
    assert {f"{name} after 1st stage" for name in both} <= set(models["ProCLIP"]["metrics"])
