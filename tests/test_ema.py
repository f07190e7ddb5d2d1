"""A teacher's weights are the moving average of its student's, in float32 whatever the student is in."""

from functools import partial

import pytest
import torch
from host_reads import host_reads
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastcontrast.ema import EMATeacher, cosine_momentum
from fastcontrast.testing import ranks


class Tied(nn.Module):
    """Odd shapes, a 0-dim scale, an integer buffer, and one matrix under two names."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.scale * self.head(self.drop(self.norm(self.embed(x))))


def stir(model: nn.Module, seed: int, size: float = 1.0) -> None:
    """Any change an optimizer and forwards may make."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in (*model.parameters(), *model.buffers()):
            change = size * torch.randn(x.shape, generator=generator)
            x.add_(change.to(x.dtype) if x.is_floating_point() else 1)


def expected(students: list[list[Tensor]], momenta: list[float]) -> list[Tensor]:
    """θ* after all updates, from the weights of the student at first and after each step; float64."""
    average = [x.double() for x in students[0]]
    for student, m in zip(students[1:], momenta, strict=True):
        average = [m * a + (1 - m) * x.double() for a, x in zip(average, student, strict=True)]
    return average


def copies(model: nn.Module) -> list[Tensor]:
    return [x.detach().clone() for x in model.parameters()]


@pytest.mark.parametrize(
    "momentum, momenta",
    [
        (0.9, [0.9] * 5),
        (0.0, [0.0] * 5),
        (1.0, [1.0] * 5),
        (lambda step: 1 / (step + 2), [1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6]),
        (partial(cosine_momentum, start=0.6, steps=4), [0.8 - 0.2 * c for c in (1, 0.5**0.5, 0, -(0.5**0.5), -1)]),
    ],
    ids=["constant", "zero", "one", "function", "cosine"],
)
def test_weights_are_the_moving_average(momentum, momenta):
    student = Tied()
    teacher, seen = EMATeacher(student, momentum), [copies(student)]
    for i in range(5):
        stir(student, i)
        student.embed.requires_grad_(bool(i % 2))
        seen.append(copies(student))
        teacher.update_parameters(student)
    for x, y in zip(teacher.parameters(), expected(seen, momenta), strict=True):
        assert (x.double() - y).norm() <= 1e-6 * y.norm()
        if momentum in (0.0, 1.0):
            assert torch.equal(x, y.float())
    assert teacher.module.head.weight is teacher.module.embed.weight
    assert not any(x.requires_grad for x in teacher.parameters())
    assert teacher.n_averaged == 5


def test_momentum_of_one_step():
    student = Tied()
    teacher = EMATeacher(student, 0.5)
    seen = [copies(student)]
    for i, momentum in enumerate((0.25, None, 1.0)):
        stir(student, i)
        seen.append(copies(student))
        teacher.update_parameters(student, momentum)
    for x, y in zip(teacher.parameters(), expected(seen, [0.25, 0.5, 1.0]), strict=True):
        assert (x.double() - y).norm() <= 1e-6 * y.norm()


def test_cosine_momentum_stays_at_one():
    momenta = [cosine_momentum(step, 0.99, 10) for step in range(30)]
    assert momenta[0] == pytest.approx(0.99, abs=1e-15) and momenta[5] == pytest.approx(0.995, abs=1e-15)
    assert momenta == sorted(momenta) and momenta[10:] == [1.0] * 20


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_precision_is_averaged_in_float32(dtype):
    student = Tied().to(dtype)
    momentum, steps = 0.999, 200
    teacher, naive = EMATeacher(student, momentum), AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(momentum))
    naive.update_parameters(student)
    seen = [copies(student)]
    stir(student, 0, 0.1)
    for _ in range(steps):
        seen.append(copies(student))
        teacher.update_parameters(student)
        naive.update_parameters(student)
    truth = expected(seen, [momentum] * steps)
    errors = {}
    for name, model in (("ours", teacher), ("naive", naive)):
        errors[name] = sum((x.double() - y).norm() ** 2 for x, y in zip(model.parameters(), truth, strict=True)) ** 0.5
    rounding = sum((y.to(dtype).double() - y).norm() ** 2 for y in truth) ** 0.5
    assert errors["ours"] <= 1.01 * rounding < errors["naive"] / 2
    for x, y in zip(teacher.masters.buffers(), truth, strict=True):
        assert x.dtype == torch.float32 and (x.double() - y).norm() <= 1e-5 * y.norm()
    out = teacher(torch.arange(3))
    assert out.dtype == dtype


def test_conversions_keep_the_float32_copies():
    student = Tied().bfloat16()
    teacher = EMATeacher(student, 0.9)
    stir(student, 0)
    teacher.update_parameters(student)
    before = [x.clone() for x in teacher.masters.buffers()]
    holder = nn.ModuleDict({"teacher": teacher}).half()
    assert {x.dtype for x in teacher.module.parameters()} == {torch.float16}
    for x, y in zip(holder["teacher"].masters.buffers(), before, strict=True):
        assert x.dtype == torch.float32 and torch.equal(x, y)
    with pytest.raises(ValueError, match="EMATeacher: weights were in float32 when it was made"):
        EMATeacher(Tied()).half().update_parameters(student)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_buffers_are_copied_averaged_or_left(dtype):
    student = Tied().to(dtype)
    teachers = {rule: EMATeacher(student, 0.75, buffers=rule) for rule in ("copy", "average", "own")}
    first = {name: x.clone() for name, x in student.named_buffers()}
    floating, seen = ("norm.running_mean", "norm.running_var"), []
    for i in range(3):
        stir(student, i)
        seen.append({name: x.clone() for name, x in student.named_buffers()})
        for teacher in teachers.values():
            teacher.update_parameters(student)
    found = {rule: dict(teacher.module.named_buffers()) for rule, teacher in teachers.items()}
    average = expected([[state[name] for name in floating] for state in (first, *seen)], [0.75] * 3)
    for name, x in first.items():
        assert torch.equal(found["copy"][name], seen[-1][name]) and not torch.equal(seen[-1][name], x)
        assert torch.equal(found["own"][name], x)
    for name, x in zip(floating, average, strict=True):
        assert torch.allclose(found["average"][name], x.to(dtype), rtol=2 * torch.finfo(dtype).eps)
    assert found["average"]["norm.num_batches_tracked"] == 3


def test_a_teacher_stays_in_evaluation_unless_asked():
    student = Tied()
    student.norm.eval()
    frozen, like = EMATeacher(student), EMATeacher(student, eval_mode=False)
    assert not any(m.training for m in frozen.modules())
    assert [m.training for m in like.module.modules()] == [m.training for m in student.modules()]
    assert not EMATeacher(Tied().eval(), eval_mode=False).training
    holder = nn.ModuleList([frozen, like]).train()
    assert holder.training and not any(m.training for m in frozen.modules())
    assert all(m.training for m in like.modules())
    holder.eval()
    assert not any(m.training for m in like.modules())


def test_its_output_has_no_gradient_even_for_inputs_that_do():
    teacher = EMATeacher(nn.Linear(3, 3))
    assert not teacher(torch.ones(2, 3, requires_grad=True)).requires_grad


def test_a_compiled_student():
    plain = Tied()
    student = torch.compile(plain, backend="eager")
    teacher = EMATeacher(student, 0.5)
    assert type(teacher.module) is Tied
    seen = [copies(student)]
    stir(student, 0)
    seen.append(copies(student))
    teacher.update_parameters(student)
    for x, y in zip(teacher.parameters(), expected(seen, [0.5]), strict=True):
        assert (x.double() - y).norm() <= 1e-6 * y.norm()


def test_state_dict_is_that_of_an_averaged_model():
    student, other = Tied(), Tied()
    teacher = EMATeacher(student, 0.5)
    averaged = AveragedModel(other)
    for i in range(2):
        stir(student, i)
        teacher.update_parameters(student)
    averaged.load_state_dict(teacher.state_dict())
    back = EMATeacher(other)
    back.load_state_dict(averaged.state_dict())
    for name, x in teacher.state_dict().items():
        assert torch.equal(back.state_dict()[name], x), name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_loaded_teacher_goes_on_as_the_other_would(dtype):
    schedule = partial(cosine_momentum, start=0.9, steps=8)
    student = Tied().to(dtype)
    teacher = EMATeacher(student, schedule)
    fresh = nn.ModuleDict({"teacher": EMATeacher(Tied().to(dtype), schedule)})
    fresh["teacher"].update_parameters(student)  # a step of its own, which loading undoes
    for i in range(6):
        stir(student, i)
        teacher.update_parameters(student)
        if i == 2:
            fresh.load_state_dict({"teacher." + name: x for name, x in teacher.state_dict().items()})
        if i > 2:
            fresh["teacher"].update_parameters(student)
    for (name, x), y in zip(teacher.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_an_update_waits_for_no_device():
    student = Tied()
    teacher = EMATeacher(student, partial(cosine_momentum, start=0.9, steps=8))
    with host_reads() as count:
        teacher.update_parameters(student)
    assert count() == 1  # how many updates there were, once
    with host_reads() as count:
        for _ in range(3):
            teacher.update_parameters(student)
    assert count() == 0


def grown(model: Tied) -> Tied:
    model.more = nn.Linear(2, 2)
    return model


def other_width() -> Tied:
    model = Tied()
    model.scale = nn.Parameter(torch.zeros(1))
    return model


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: EMATeacher(Tied(), 1.5), r"EMATeacher: momentum must lie in \[0, 1\], got 1.5"),
        (lambda: EMATeacher(Tied(), lambda step: -1.0).update_parameters(Tied()), r"must lie in \[0, 1\], got -1.0"),
        (lambda: EMATeacher(Tied()).update_parameters(Tied(), float("nan")), r"must lie in \[0, 1\], got nan"),
        (lambda: EMATeacher(Tied(), buffers="mean"), "buffers must be one of 'copy', 'average', 'own', got 'mean'"),
        (lambda: EMATeacher(Tied()).update_parameters(grown(Tied())), "must have 4 tensors as at first, got 6"),
        (lambda: EMATeacher(Tied()).update_parameters(other_width()), r"must be as at first, \[\], got \[1\]"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------------------ several ranks

SIZES = ((3, 1), (2, 5), (1, 1))


def _on_ranks():
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    plain = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    student = DistributedDataParallel(plain)
    teacher = EMATeacher(student, 0.8)
    assert type(teacher.module) is nn.Sequential
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    seen = [copies(plain)]
    for i, sizes in enumerate(SIZES):
        x = torch.randn(sizes[rank], 3, generator=torch.Generator().manual_seed(10 * i + rank))
        student(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(copies(plain))
        teacher.update_parameters(student)
    return seen, copies(teacher)


def test_teachers_of_a_parallel_student_are_equal():
    (seen, first), (_, second) = ranks.run(2, _on_ranks)
    assert not torch.equal(seen[0][0], seen[-1][0])
    for x, y, truth in zip(first, second, expected(seen, [0.8] * len(SIZES)), strict=True):
        assert torch.equal(x, y)
        assert (x.double() - truth).norm() <= 1e-6 * truth.norm()
