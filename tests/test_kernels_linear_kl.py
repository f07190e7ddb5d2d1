"""The Triton kernel of linear_kl and its schedule, in the interpreter, against float64 truth."""

import pytest
import torch
from interpreter import tiles
from language import LEAVES
from similarity import assert_accurate, assert_same, evaluate, one_sign
from test_linear_kl import DIRECTIONS, call, first_only, problem

from fastcontrast.ops import _divergence, linear_kl, trace
from fastcontrast.testing import relative_error

# Of numbers that a mask throws away.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HOW = {"implementation": "triton", "call": call}


@pytest.fixture(autouse=True)
def thin_chunks(monkeypatch):
    monkeypatch.setattr(_divergence, "MIN_ROWS", 1)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 200, 15), (30, 1, 16), (13, 33, 7), (17, 2100, 8), (40, 64, 64)])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_value_and_every_gradient(shape, direction, reduction):
    student, teacher = problem(*shape)
    options = {**teacher, "direction": direction, "reduction": reduction, "temperature": 1.5, "return_entropy": True}
    options["workspace"] = 10 * shape[1] * 11
    with tiles():
        assert_accurate(student, options, needs=LEAVES, magnitude=1.0, upstream=first_only, **HOW)


@pytest.mark.parametrize("needs", [("queries",), ("keys",), ("key_bias",)])
def test_what_is_frozen_gets_nothing(needs):
    student, teacher = problem(23, 41, 8)
    for direction in DIRECTIONS:
        with tiles():
            assert_accurate(student, {**teacher, "direction": direction}, needs=needs, **HOW)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_precision_is_as_good_as_dense_fp32_logits(dtype, direction, reduction):
    student, teacher = problem(50, 130, 24, dtype)
    options = {**teacher, "direction": direction, "reduction": reduction, "workspace": 10 * 130 * 20}
    with tiles():
        assert_accurate(student, options, needs=LEAVES, **HOW)


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_float16_weights_neither_vanish_nor_overflow(size):
    """Whatever the size of the upstream gradients, and with divergences of hundreds."""
    student, teacher = problem(20, 60, 8, torch.float16)
    teacher["teacher_hidden"] = teacher["teacher_hidden"] * 30
    for direction in ("forward", "reverse"):
        options = {**teacher, "direction": direction, "reduction": "none"}
        how = {"needs": ("queries",), "upstream": lambda i, shape: size * one_sign(i, shape)}
        student["queries"] = student["queries"].float()  # gradients in float32: half precision could not hold them
        student["keys"] = student["keys"].float()
        with tiles():
            results = evaluate(student, options, **how, **HOW)
            truth = evaluate(student, options, **how, call=call, dtype=torch.float64, implementation="reference")
        assert_same(results, truth, 1e-5)


def test_entries_of_probability_zero_and_rows_with_nothing_left():
    student, teacher = problem(9, 12, 4)
    ids = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 7]), torch.arange(12) % 4
    heads, upstream = (*student.values(), *teacher.values()), torch.ones(9)
    for shares in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)):
        masked = _divergence.Problem(*heads, *ids, 1.0, 1.0, *shares)
        runs = [run(masked.hidden, masked, upstream, (True, True, True), 1 << 20) for run in _divergence.RUNS.values()]
        for a, b in zip((*runs[0].rows, *runs[0].gradients), (*runs[1].rows, *runs[1].gradients), strict=True):
            assert relative_error(a, b) < 1e-5
        nothing = masked._replace(token_ids=torch.zeros(9).long(), vocabulary_ids=torch.zeros(12).long())
        found = _divergence.triton(nothing.hidden, nothing, upstream, (True, True, True), 1 << 20)
        assert all((x == 0).all() for x in (*found.rows, *found.gradients))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nan_comes_out_in_its_token_alone(direction):
    student, teacher = problem(10, 31, 8)
    student["queries"][3, 0] = float("nan")
    rows = call(**student, **teacher, direction=direction, reduction="none", implementation="triton")
    assert rows.isnan().tolist() == [i == 3 for i in range(10)]


@pytest.mark.parametrize("distance", [1e-1, 1e-3])
def test_a_student_near_its_teacher_keeps_the_digits(distance):
    student, _ = problem(10, 300, 16)
    h, w = student["queries"], student["keys"]
    teacher = h + distance * torch.linspace(-1, 1, h.numel()).view(h.shape)
    for direction in DIRECTIONS:
        rows = linear_kl(h, w, teacher, w, direction=direction, reduction="none", implementation="triton")
        truth = linear_kl(*(x.double() for x in (h, w, teacher, w)), direction=direction, reduction="none")
        assert relative_error(rows, truth) < 1e-6 + 2e-7 / distance


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (4, 5, 0)], ids=str)
def test_empty_sizes(shape):
    student, teacher = problem(*shape)
    inputs = {name: x.requires_grad_() for name, x in student.items()}
    loss = call(**inputs, **teacher, implementation="triton")
    gradients = torch.autograd.grad(loss, inputs.values())
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients)


def test_trace_names_it_and_runs_are_bit_identical():
    student, teacher = problem(20, 70, 8)
    results = []
    for _ in range(2):
        with trace() as ran:
            results.append(evaluate(student, teacher, needs=LEAVES, **HOW))
        assert [(choice.op, choice.implementation) for choice in ran] == [("linear_kl", "triton")]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
