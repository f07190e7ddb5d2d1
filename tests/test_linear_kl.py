"""linear_kl against dense divergences in float64: values, every gradient, and the sheets' golden values."""

import pytest
import torch
import torch.nn.functional as F
from language import LEAVES, head, waves
from similarity import assert_accurate, assert_same, evaluate, generator, one_sign, tiles

from fastcontrast.ops import _divergence, linear_cross_entropy, linear_kl, trace
from fastcontrast.testing import relative_error

DIRECTIONS = ("forward", "reverse", "symmetric")
SIZES = [(1, 1, 1), (1, 7, 3), (5, 1, 4), (13, 33, 7), (64, 65, 16), (67, 131, 61), (130, 257, 24), (303, 79, 1)]


def problem(tokens: int, vocabulary: int, width: int, dtype=torch.float32) -> tuple[dict, dict]:
    """A student under the names of `evaluate`, and a wider teacher that mostly agrees with it."""
    student = head(tokens, vocabulary, width, dtype)
    other = head(tokens, vocabulary, 5, seed=1)
    teacher = {
        "teacher_hidden": torch.cat([student["queries"].float(), 0.6 * other["queries"]], 1).to(dtype),
        "teacher_weight": torch.cat([student["keys"].float(), other["keys"]], 1).to(dtype),
        "teacher_bias": other["key_bias"],
    }
    return student, teacher


def call(queries, keys, key_bias=None, *, teacher_hidden, teacher_weight, teacher_bias=None, **options):
    dtype = torch.float64 if queries.dtype == torch.float64 else None  # `evaluate` casts its own leaves alone
    teacher = [x if x is None or dtype is None else x.to(dtype) for x in (teacher_hidden, teacher_weight, teacher_bias)]
    bias = {"bias": key_bias, "teacher_bias": teacher[2]}
    return linear_kl(queries, keys, *teacher[:2], **bias, **options)


@pytest.fixture(autouse=True)
def thin_chunks(monkeypatch):
    monkeypatch.setattr(_divergence, "MIN_ROWS", 1)


# -------------------------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_reference_is_kl_div_of_dense_logits(reduction, temperature):
    student, teacher = problem(20, 11, 6)
    inputs = {name: x.double().requires_grad_() for name, x in student.items()}
    log_p = ((inputs["queries"] @ inputs["keys"].T + inputs["key_bias"]) / temperature).log_softmax(1)
    logits = teacher["teacher_hidden"].double() @ teacher["teacher_weight"].double().T + teacher["teacher_bias"]
    log_t = (logits / temperature).log_softmax(1)
    forward = F.kl_div(log_p, log_t, log_target=True, reduction="none").sum(1)
    reverse = F.kl_div(log_t, log_p, log_target=True, reduction="none").sum(1)
    expected = {"forward": forward, "reverse": reverse, "symmetric": (forward + reverse) / 2}
    for direction, rows in expected.items():
        exact = rows if reduction == "none" else getattr(rows, reduction)()
        options = {"temperature": temperature, "direction": direction, "reduction": reduction, "return_entropy": True}
        loss, entropy = call(**inputs, **teacher, **options, implementation="reference")
        torch.testing.assert_close(loss, exact, rtol=1e-11, atol=1e-12)
        h = -(log_t.exp() * log_t).sum(1)
        torch.testing.assert_close(entropy, h if reduction == "none" else getattr(h, reduction)())
        gradients = torch.autograd.grad(loss.sum(), inputs.values(), retain_graph=True)
        truth = torch.autograd.grad(exact.sum(), inputs.values(), retain_graph=True)
        for actual, right in zip(gradients, truth, strict=True):
            torch.testing.assert_close(actual, right, rtol=1e-10, atol=1e-12)


def test_reference_gradients_equal_finite_differences():
    student, teacher = problem(4, 5, 3)
    inputs = [x.double().requires_grad_() for x in student.values()]
    for direction in DIRECTIONS:

        def loss(*leaves, direction=direction):
            return call(*leaves, **teacher, temperature=1.3, direction=direction, reduction="none")

        assert torch.autograd.gradcheck(loss, inputs)


# -------------------------------------------------------------------------------------------------------- golden values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.122561949469), (2.0, 0.112468339190)])
def test_mend(dtype, temperature, expected):
    heads = [x.to(dtype) for x in (waves(6, 8, 0.0), waves(11, 8, 0.5), waves(6, 12, 0.2), waves(11, 12, 0.8))]
    loss = linear_kl(*heads, temperature=temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 1e-11)
    if temperature == 1.0:
        y = torch.tensor([3, -100, 7, 0, 10, -100])
        total = linear_cross_entropy(*heads[:2], y) + loss
        assert total.item() == pytest.approx(5.050227379743, rel=1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("rho", "omega", "expected"),
    [
        (1.0, 2 / 3, (2.953789200872, 0.848618409673, 0.734182961044)),
        (0.25, 2 / 3, (2.896974167746, 0.702149860492, 0.569747017068)),
        (1.0, 0.0, (2.949846809099, 0.973929971867, 0.781798457738)),
    ],
)
def test_salt_mixes_hard_and_soft_targets(dtype, rho, omega, expected):
    """(1 − ω) · NLL + ω · cross entropy of softmax(ρ · teacher): divergence + entropy; the student has no temperature.
    The teacher's logits are given: hidden states that are the logits, and a vocabulary of unit vectors."""
    hidden, weight = (x.to(dtype).requires_grad_() for x in (waves(4, 5, 0.0), waves(6, 5, 0.6)))
    teacher = (3 * waves(4, 6, 1.4)).to(dtype), torch.eye(6, dtype=dtype)
    soft, entropy = linear_kl(hidden, weight, *teacher, teacher_temperature=1 / rho, return_entropy=True)
    hard = linear_cross_entropy(hidden, weight, torch.tensor([0, 3, 5, 2]))
    loss = (1 - omega) * hard + omega * (soft + entropy)
    norms = [x.norm().item() for x in torch.autograd.grad(loss, [hidden, weight])]
    assert [loss.item(), *norms] == pytest.approx(expected, rel=2e-6 if dtype == torch.float32 else 1e-11)


# ------------------------------------------------------------------------------------------------------- against truth


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_value_and_every_gradient(shape, direction, reduction):
    student, teacher = problem(*shape)
    options = {**teacher, "direction": direction, "reduction": reduction, "temperature": 1.5, "return_entropy": True}
    for workspace in (8 * shape[1] * 20, None):
        with tiles(16, 32):
            how = {"needs": LEAVES, "call": call, "magnitude": 1.0, "upstream": first_only}
            assert_accurate(student, {**options, "workspace": workspace}, **how)


def first_only(i, shape):
    return one_sign(i, shape) if i == 0 else None  # the entropy has no gradient


@pytest.mark.parametrize("needs", [("queries",), ("keys",), ("key_bias",), ("queries", "keys")])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_what_is_frozen_gets_nothing(needs, direction, reduction):
    student, teacher = problem(67, 131, 16)
    with tiles(16, 32):
        options = {**teacher, "direction": direction, "reduction": reduction}
        assert_accurate(student, options, needs=needs, call=call)


@pytest.mark.parametrize("upstream", [one_sign, lambda i, shape: torch.randn(shape, generator=generator(i))])
def test_any_upstream_gradient_of_the_tokens(upstream):
    student, teacher = problem(67, 131, 16)
    with tiles(16, 32):
        for direction in DIRECTIONS:
            options = {**teacher, "direction": direction, "reduction": "none", "workspace": 8 * 131 * 20}
            assert_accurate(student, options, needs=LEAVES, call=call, upstream=upstream)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights(reduction):
    student, teacher = problem(67, 131, 16)
    weights = torch.linspace(-1, 3, 67).relu()
    options = {**teacher, "weights": weights, "reduction": reduction}
    with tiles(16, 32):
        results = evaluate(student, options, needs=LEAVES, call=call, implementation="cpu")
        truth = evaluate(student, options, needs=LEAVES, call=call, dtype=torch.float64, implementation="reference")
    assert_same(results, truth, 1e-5)
    rows = call(**student, **teacher, reduction="none")
    expected = {"mean": (rows * weights).sum() / weights.sum(), "sum": (rows * weights).sum(), "none": rows * weights}
    assert relative_error(results["value 0"], expected[reduction]) < 1e-6


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4])
def test_a_student_near_its_teacher_keeps_the_digits(direction, distance):
    """Divergences down to 1e-9, where terms that cancel would leave nothing: against float64 of the same float32 heads,
    the error is that of the logits' difference, about 1e-6 / distance."""
    h, w = head(40, 300, 16)["queries"], head(40, 300, 16)["keys"]
    teacher = h + distance * torch.randn(h.shape, generator=generator(3))
    rows = linear_kl(h, w, teacher, w, direction=direction, reduction="none")
    truth = linear_kl(*(x.double() for x in (h, w, teacher, w)), direction=direction, reduction="none")
    assert (rows >= 0).all()
    assert relative_error(rows, truth) < 1e-6 + 2e-7 / distance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_half_precision_is_as_good_as_dense_fp32_logits(dtype, direction):
    student, teacher = problem(130, 257, 64, dtype)
    with tiles(16, 32):
        options = {**teacher, "direction": direction, "workspace": 8 * 257 * 30}
        assert_accurate(student, options, needs=LEAVES, call=call)


def test_heads_of_two_dtypes():
    student, teacher = problem(30, 50, 8)
    exact = call(**student, **teacher)
    half = {name: x.bfloat16() for name, x in teacher.items()}
    rounded = {name: x.float() for name, x in half.items()}
    assert call(**student, **half).item() == pytest.approx(call(**student, **rounded).item(), rel=1e-6)
    assert call(**student, **{n: x.double() for n, x in teacher.items()}).item() == pytest.approx(
        exact.item(), rel=1e-6
    )


def test_any_leading_shape():
    student, teacher = problem(24, 31, 8)
    flat = call(**student, **teacher, reduction="none", return_entropy=True)
    student["queries"] = student["queries"].view(2, 3, 4, 8)
    teacher["teacher_hidden"] = teacher["teacher_hidden"].view(2, 3, 4, -1)
    for a, b in zip(call(**student, **teacher, reduction="none", return_entropy=True), flat, strict=True):
        assert torch.equal(a, b.view(2, 3, 4))


# ----------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_student_equal_to_teacher_gives_zero_and_no_gradient(direction):
    student, _ = problem(30, 50, 8)
    inputs = {name: x.requires_grad_() for name, x in student.items()}
    heads = (inputs["queries"], inputs["keys"])
    loss = linear_kl(*heads, *heads, bias=inputs["key_bias"], teacher_bias=inputs["key_bias"], direction=direction)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, inputs.values()):
        assert gradient.abs().max() < 1e-7


def test_the_teacher_gets_no_gradient():
    student, teacher = problem(10, 12, 4)
    teacher = {name: x.requires_grad_() for name, x in teacher.items()}
    for reduction in ("mean", "none"):
        loss = call(**{n: x.requires_grad_() for n, x in student.items()}, **teacher, reduction=reduction)
        found = torch.autograd.grad(loss.sum(), teacher.values(), allow_unused=True)
        assert found == (None,) * 3


def test_a_constant_added_to_a_rows_logits_changes_nothing():
    student, teacher = problem(30, 50, 8)
    shifted = {**student, "key_bias": student["key_bias"] + 8.0}
    assert relative_error(call(**shifted, **teacher), call(**student, **teacher)) < 1e-5


def test_directions_mirror_each_other():
    student, teacher = problem(30, 50, 8)
    turned = linear_kl(
        *list(teacher.values())[:2], student["queries"], student["keys"], bias=teacher["teacher_bias"],
        teacher_bias=student["key_bias"], direction="reverse",
    )  # fmt: skip
    assert relative_error(turned, call(**student, **teacher)) < 1e-6
    both = [call(**student, **teacher, direction=direction) for direction in DIRECTIONS]
    assert relative_error((both[0] + both[1]) / 2, both[2]) < 1e-6


def test_a_certain_teacher_gives_cross_entropy():
    student, _ = problem(20, 31, 8)
    y = torch.randint(31, (20,), generator=generator(1))
    certain = 200.0 * F.one_hot(y, 31).float(), torch.eye(31)
    loss = linear_kl(student["queries"], student["keys"], *certain, bias=student["key_bias"])
    expected = linear_cross_entropy(student["queries"], student["keys"], y, bias=student["key_bias"])
    assert relative_error(loss, expected) < 1e-6


# -------------------------------------------------------------------------------------------------------- ends of range


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_entry_that_neither_head_allows(direction):
    """Biases of −inf on both sides: 0 · infinity counts as 0, and the rest is as without the entry."""
    student, teacher = problem(20, 31, 8)
    student["key_bias"][30] = teacher["teacher_bias"][30] = -torch.inf
    options = {**teacher, "direction": direction}
    for implementation in ("cpu", "reference"):
        results = evaluate(student, options, needs=("queries", "keys"), call=call, implementation=implementation)
        less = {name: x[:30] if name != "queries" else x for name, x in student.items()}
        fewer = {name: x[:30] if name != "teacher_hidden" else x for name, x in teacher.items()}
        expected = evaluate(less, {**fewer, "direction": direction}, needs=("queries", "keys"), call=call)
        assert relative_error(results["value 0"], expected["value 0"]) < 1e-6
        assert relative_error(results["dqueries"], expected["dqueries"]) < 1e-5
        assert (results["dkeys"][30] == 0).all()


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_an_entry_that_only_one_head_allows(implementation):
    student, teacher = problem(20, 31, 8)
    run = {"reduction": "none", "implementation": implementation}
    only_teacher = {**student, "key_bias": student["key_bias"].clone()}
    only_teacher["key_bias"][30] = -torch.inf
    assert (call(**only_teacher, **teacher, **run) == torch.inf).all()
    assert call(**only_teacher, **teacher, direction="reverse", **run).isfinite().all()
    only_student = {**teacher, "teacher_bias": teacher["teacher_bias"].clone()}
    only_student["teacher_bias"][30] = -torch.inf
    assert (call(**student, **only_student, direction="reverse", **run) == torch.inf).all()
    results = evaluate(student, {**only_student, **run}, needs=LEAVES, call=call, implementation=implementation)
    assert all(x.isfinite().all() for x in results.values())


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("where", ["queries", "teacher_hidden"])
def test_nan_comes_out_in_its_token_alone(direction, where):
    student, teacher = problem(20, 31, 8)
    (student if where == "queries" else teacher)[where][3, 0] = float("nan")
    rows = call(**student, **teacher, direction=direction, reduction="none")
    assert rows.isnan().tolist() == [i == 3 for i in range(20)]
    weights = (torch.arange(20) != 3).float()  # a token of weight 0 is not looked at
    results = evaluate(student, {**teacher, "direction": direction, "weights": weights}, needs=LEAVES, call=call)
    assert all(x.isfinite().all() for x in results.values())


def test_logits_of_hundreds():
    """Probabilities of 0 and 1, and divergences of hundreds, in both directions."""
    student, teacher = problem(30, 50, 8)
    student["queries"] *= 40
    teacher["teacher_hidden"] *= 40
    for direction in DIRECTIONS:
        assert_accurate(student, {**teacher, "direction": direction}, needs=LEAVES, call=call, magnitude=1.0)


@pytest.mark.parametrize("shape", [(0, 5, 3), (0, 0, 3), (4, 0, 3), (4, 5, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_empty_sizes(shape, reduction, implementation):
    student, teacher = problem(*shape)
    inputs = {name: x.requires_grad_() for name, x in student.items()}
    loss = call(**inputs, **teacher, reduction=reduction, implementation=implementation)
    gradients = torch.autograd.grad(loss.sum(), inputs.values())
    assert loss.isfinite().all() and all(g.isfinite().all() for g in gradients)
    assert all(shape[:2]) or (loss == 0).all()


def test_weights_that_sum_to_zero_give_zero():
    student, teacher = problem(6, 5, 3)
    inputs = {name: x.requires_grad_() for name, x in student.items()}
    for implementation in ("cpu", "reference"):
        loss = call(**inputs, **teacher, weights=torch.zeros(6), implementation=implementation)
        assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, inputs.values()))


# ------------------------------------------------------------------------------------------------ how it goes about it


@pytest.mark.parametrize(("reduction", "products"), [("mean", 4), ("sum", 4), ("none", 6)])
@pytest.mark.parametrize("frozen", [False, True])
def test_products(reduction, products, frozen, monkeypatch):
    """Counted where they are made: student and teacher logits, then G · W and Gᵀ · h."""
    flop = []
    for name in ("mm", "addmm_"):
        owner = torch if name == "mm" else torch.Tensor
        original = getattr(owner, name)

        def noted(*operands, original=original, **how):
            a, b = operands[-2:]
            flop.append(a.shape[0] * a.shape[1] * b.shape[1])
            return original(*operands, **how)

        monkeypatch.setattr(owner, name, noted)
    student, teacher = problem(60, 90, 16)
    teacher = {name: x[:, :16] if x.ndim == 2 else x for name, x in teacher.items()}
    needs = ("queries",) if frozen else ("queries", "keys")
    with tiles(16, 32):
        evaluate(student, {**teacher, "reduction": reduction, "workspace": 8 * 90 * 25}, needs=needs, call=call)
    assert sum(flop) == (products - frozen) * 60 * 90 * 16


def test_trace_and_a_second_backward():
    student, teacher = problem(40, 50, 8)
    inputs = {name: x.requires_grad_() for name, x in student.items()}
    with trace() as ran:
        loss = call(**inputs, **teacher)
    assert [(choice.op, choice.implementation) for choice in ran] == [("linear_kl", "cpu")]
    first = torch.autograd.grad(loss, inputs.values(), retain_graph=True)
    again = torch.autograd.grad(3 * loss, inputs.values(), retain_graph=True)
    for x, y in zip(first, again, strict=True):
        assert relative_error(y, 3 * x) < 1e-6
    with pytest.raises(NotImplementedError, match=r"linear_kl: .*reference"):
        torch.autograd.grad(loss, inputs.values(), create_graph=True)
    rows = call(**inputs, **teacher, reduction="none")
    with pytest.raises(NotImplementedError, match=r"linear_kl: .*reference"):
        (slope,) = torch.autograd.grad(rows.sum(), inputs["queries"], create_graph=True)
        torch.autograd.grad(slope.sum(), inputs["keys"])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_compiles_without_a_break(reduction, direction):
    student, teacher = problem(20, 31, 8)
    options = {"reduction": reduction, "direction": direction, "weights": torch.linspace(0, 2, 20)}

    def step(queries, keys, key_bias):
        return call(queries, keys, key_bias, **teacher, **options)

    leaves = [x.requires_grad_() for x in student.values()]
    expected = step(*leaves)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (actual, expected)), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("with_ids", [False, True])
def test_registered_operation(with_ids):
    student, teacher = problem(9, 11, 4)
    leaves = [x.requires_grad_() for x in student.values()]
    ids = (torch.arange(9) % 3, torch.arange(11) % 4) if with_ids else (None, None)
    rest = (*teacher.values(), *ids, 0.5, 0.7, 0.25, 0.75)
    torch.library.opcheck(torch.ops.fastcontrast.linear_kl, (*leaves, *rest, 1 << 20, "cpu"))
    detached = [x.detach() for x in leaves]
    arguments = (*detached, *rest, torch.ones(9), [True, True, True], 1 << 20, "cpu")
    torch.library.opcheck(torch.ops.fastcontrast.linear_kl_backward, arguments)


def test_autocast_rounds_nothing_and_runs_are_bit_identical():
    student, teacher = problem(67, 131, 16)
    inputs = {name: x.requires_grad_() for name, x in student.items()}
    for reduction in ("mean", "none"):
        results = []
        for enabled in (False, True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled), tiles(16, 32, threads=3):
                loss = call(**inputs, **teacher, direction="symmetric", reduction=reduction)
                results.append((loss, *torch.autograd.grad(loss.sum(), inputs.values())))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_ids_mask_both_heads_and_a_row_may_have_nothing_left():
    """Through the registered operation, which losses on similarities use."""
    student, teacher = problem(9, 12, 4)
    ids = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 7]), torch.arange(12) % 4
    heads = (*student.values(), *teacher.values())
    for shares in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)):
        problem_ = _divergence.Problem(*heads, *ids, 1.0, 1.0, *shares)
        rows = _divergence.cpu(problem_.hidden, problem_, None, (), 1 << 20).rows
        truth = _divergence.reference(problem_.hidden.double(), problem_._replace(hidden=student["queries"].double()))
        assert_same(rows._asdict(), {n: x.detach() for n, x in truth._asdict().items()}, 1e-5)
        nothing = problem_._replace(token_ids=torch.zeros(9).long(), vocabulary_ids=torch.zeros(12).long())
        upstream = torch.ones(9)
        found = _divergence.cpu(nothing.hidden, nothing, upstream, (True, True, True), 1 << 20)
        assert all((x == 0).all() for x in (*found.rows, *found.gradients))


# ------------------------------------------------------------------------------------------------------------- the door

H, W, TH, TW = torch.zeros(2, 3, 8), torch.zeros(5, 8), torch.zeros(2, 3, 4), torch.zeros(5, 4)
REFUSED = {
    "hidden": (ValueError, r"hidden must be \[..., width\], got \[8\]", {"hidden": H[0, 0]}),
    "weight: width": (ValueError, r"weight must be \[N, 8\] to match hidden, got \[5, 7\]", {"weight": W[:, :7]}),
    "weight: dtype": (TypeError, "weight must be float32 like hidden, got bfloat16", {"weight": W.bfloat16()}),
    "teacher_weight: width": (
        ValueError,
        r"teacher_weight must be \[N, 4\] to match teacher_hidden, got \[5, 8\]",
        {"teacher_weight": W},
    ),
    "teacher_weight: vocabulary": (
        ValueError,
        "teacher_weight must have the vocabulary of weight, got 4 and 5 rows",
        {"teacher_weight": TW[:4]},
    ),
    "teacher_hidden: tokens": (
        ValueError,
        r"teacher_hidden must have the tokens of hidden, got \[2, 2\] and \[2, 3\]",
        {"teacher_hidden": TH[:, :2]},
    ),
    "teacher_hidden: device": (
        ValueError,
        "teacher_weight must be on meta like teacher_hidden, got cpu",
        {"teacher_hidden": TH.to("meta")},
    ),
    "teacher: device": (
        ValueError,
        "teacher_hidden must be on cpu like hidden, got meta",
        {"teacher_hidden": TH.to("meta"), "teacher_weight": TW.to("meta")},
    ),
    "bias": (ValueError, r"bias must be \[5\], got \[8\]", {"bias": torch.zeros(8)}),
    "teacher_bias": (ValueError, r"teacher_bias must be \[5\], got \[4\]", {"teacher_bias": torch.zeros(4)}),
    "temperature: zero": (ValueError, "temperature must be positive, got 0.0", {"temperature": 0.0}),
    "temperature: nan": (ValueError, "temperature must be positive, got nan", {"temperature": float("nan")}),
    "temperature: tensor": (TypeError, "temperature must be a number, got Tensor", {"temperature": torch.ones(())}),
    "teacher_temperature": (ValueError, "teacher_temperature must be positive, got -1", {"teacher_temperature": -1}),
    "direction": (ValueError, "direction must be one of 'forward', 'reverse'", {"direction": "backward"}),
    "weights: shape": (ValueError, r"weights must be \[2, 3\], one a token, got \[2\]", {"weights": torch.ones(2)}),
    "weights: gradient": (
        ValueError,
        "weights must not require a gradient",
        {"weights": torch.ones(2, 3, requires_grad=True)},
    ),
    "reduction": (ValueError, "reduction must be one of .* got 'batchmean'", {"reduction": "batchmean"}),
    "workspace": (ValueError, "workspace must be at least 0 bytes, got -1", {"workspace": -1}),
    "implementation": (ValueError, "implementation must be one of cpu.* got 'gpu'", {"implementation": "gpu"}),
    "implementation for float64": (
        NotImplementedError,
        "'cpu' cannot run: it takes float32, bfloat16 or float16, got float64",
        {"teacher_hidden": TH.double(), "teacher_weight": TW.double(), "implementation": "cpu"},
    ),
}


@pytest.mark.parametrize(("error", "message", "changed"), REFUSED.values(), ids=REFUSED)
def test_refused_at_the_door(error, message, changed):
    inputs = {"hidden": H, "weight": W, "teacher_hidden": TH, "teacher_weight": TW}
    with pytest.raises(error, match=f"^linear_kl: .*{message}"):
        linear_kl(**{**inputs, **changed})
