"""MEND against its definition: golden values, the dense formula, invariants, edges, alignment, ranks, the command."""

import math

import pytest
import torch
import torch.nn.functional as F
from golden_decoding import F as waves
from recipes import assert_ranks_equal_one, close, gradients, train_a_little

from fastcontrast import set_workspace
from fastcontrast.recipes._parts import mend_judge
from fastcontrast.recipes._parts.mend_tasks import word_tasks
from fastcontrast.recipes._shared.language import IGNORED, llama, states
from fastcontrast.recipes.mend import (
    Distiller,
    Example,
    align,
    behind,
    classify,
    collate,
    halves,
    mend_loss,
)

STUDENT, WEIGHT = waves(6, 8, 0), waves(11, 8, 0.5)
TEACHER, TEACHER_WEIGHT = waves(6, 12, 0.2), waves(11, 12, 0.8)
TARGETS = torch.tensor([3, -100, 7, 0, 10, -100])
KL, CE = 0.122561949469, 4.927665430274


def loss(student=STUDENT, targets=None, dtype=torch.float64, **settings):
    student, teacher, weight, other = (x.to(dtype) for x in (student, TEACHER, WEIGHT, TEACHER_WEIGHT))
    return mend_loss(student, teacher, weight, targets, teacher_weight=other, **settings)


def dense(student, teacher, weight, other, targets, distill, temperature):
    """Both matrices of logits."""
    z, t = student @ weight.T, teacher @ other.T
    kl = F.kl_div((z / temperature).log_softmax(1), (t / temperature).softmax(1), reduction="batchmean")
    return kl if targets is None else F.cross_entropy(z, targets) + distill * kl


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-8), (torch.float32, 2e-6)])
def test_golden(dtype, atol):
    close(loss(dtype=dtype), KL, atol=atol)
    close(loss(temperature=2.0, dtype=dtype), 0.112468339190, atol=atol)
    close(loss(targets=TARGETS, distill=0.0, dtype=dtype), CE, atol=atol)
    close(loss(targets=TARGETS, dtype=dtype), 5.050227379743, atol=2 * atol)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_dense_formula(dtype, tolerance):
    torch.manual_seed(0)
    student, teacher = torch.randn(37, 10).double(), torch.randn(37, 7).double()
    weight, other = torch.randn(101, 10).double(), torch.randn(101, 7).double()
    targets = torch.where(torch.arange(37) % 3 == 0, IGNORED, torch.randint(101, (37,)))
    for said, distill, temperature in ((None, 1.0, 1.0), (targets, 0.3, 2.5), (targets, 1.0, 1.0)):
        truth = gradients(lambda h, s=(said, distill, temperature): dense(h, teacher, weight, other, *s), student)
        options = {"distill": distill, "temperature": temperature, "teacher_weight": other.to(dtype)}
        fixed = teacher.to(dtype), weight.to(dtype), said
        found = gradients(lambda h, o=options, f=fixed: mend_loss(h, *f, **o), student.to(dtype))
        for ours, theirs in zip(found, truth, strict=True):
            assert ours.dtype == dtype and (ours.double() - theirs).norm() <= tolerance * theirs.norm()


def test_the_gradient_of_the_logits():
    """(p − t) / (N T), through a head that is the identity."""
    z, t = waves(5, 11, 0), waves(5, 11, 1.0)
    _, found = gradients(lambda z: mend_loss(z, t, torch.eye(11).double(), temperature=2.0), z)
    torch.testing.assert_close(found, ((z / 2).softmax(1) - (t / 2).softmax(1)) / (5 * 2))


def test_the_teacher_gets_no_gradient():
    head = WEIGHT.clone()
    _, student, teacher = gradients(lambda h, t: mend_loss(h, t, head), STUDENT, waves(6, 8, 0.2))
    assert student.any() and not teacher.any()


def test_invariants():
    same, moved = gradients(lambda h: mend_loss(h, STUDENT, WEIGHT), STUDENT)
    close(same, 0.0, atol=1e-15)
    close(moved.abs().max(), 0.0, atol=1e-15)
    assert loss(waves(6, 8, 3.0)) > 0
    wide = [torch.cat([x, torch.ones(len(x), 1).double()], 1) for x in (STUDENT, WEIGHT)]  # all logits of a row + 1
    close(mend_loss(wide[0], TEACHER, wide[1], TARGETS, teacher_weight=TEACHER_WEIGHT), KL + CE)
    apart, t = STUDENT @ WEIGHT.T - TEACHER @ TEACHER_WEIGHT.T, 1e4
    close(2 * t**2 * loss(temperature=t), apart.var(1, correction=0).mean(), atol=2e-3)
    certain = 1e4 * F.one_hot(TARGETS.clamp(min=0), 11).double()
    one_hot = mend_loss(STUDENT, certain, WEIGHT, teacher_weight=torch.eye(11).double())
    close(one_hot, F.cross_entropy(STUDENT @ WEIGHT.T, TARGETS.clamp(min=0)))


def test_any_chunk_gives_the_dense_value():
    torch.manual_seed(0)
    student, teacher, weight = torch.randn(300, 16), torch.randn(300, 16), torch.randn(1001, 16)
    targets = torch.randint(1001, (300,))
    truth = dense(*(x.double() for x in (student, teacher, weight, weight)), targets, 1.0, 1.0)
    for workspace in (1 << 12, 1 << 18, None):
        set_workspace(workspace)
        try:
            close(mend_loss(student, teacher, weight, targets) / truth, 1.0, atol=1e-6)
        finally:
            set_workspace(None)


def test_nothing_to_learn_from_costs_nothing():
    none = torch.empty(0, 8).double()
    close(mend_loss(none, none, WEIGHT), 0.0)
    close(mend_loss(none, none, WEIGHT, torch.empty(0).long()), 0.0)
    close(loss(targets=torch.full((6,), IGNORED)), KL)  # a query without an answer


def test_half_precision_sums_in_float32():
    halves = [x.bfloat16() for x in (STUDENT, waves(6, 8, 0.3), WEIGHT)]
    found, truth = (mend_loss(*x, TARGETS) for x in (halves, [x.float() for x in halves]))
    close(found, truth.item(), atol=1e-5)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="mend_loss: teacher must have a row a token, 6, got 5"):
        mend_loss(STUDENT, STUDENT[:5], WEIGHT)
    with pytest.raises(ValueError, match="vocabulary"):
        mend_loss(STUDENT, TEACHER, WEIGHT, teacher_weight=TEACHER_WEIGHT[:7])


def loss_of(student, teacher, targets):
    return mend_loss(student, teacher, WEIGHT, targets, distill=0.7)


def test_ranks_equal_one():
    """The first rank has tokens, and no answer."""
    targets = torch.tensor([-100, -100, 7, 0, 10, -100])
    assert_ranks_equal_one(loss_of, [STUDENT, waves(6, 8, 0.2), targets], (2, 4))


# ------------------------------------------------------------------------------------------ between model and distiller


def tiny(width=16, seed=0, **shape):
    torch.manual_seed(seed)
    return llama(50, width=width, layers=2, heads=2, **shape).requires_grad_(False).eval()


def example(demonstrations, query, answer=0):
    return Example(torch.arange(1, demonstrations + 1), torch.arange(30, 30 + query), answer)


def test_plain_text_is_cut_at_four_fifths_rounded_down():
    one = halves(torch.arange(9))
    assert one.demonstrations.tolist() == [*range(7)] and one.query.tolist() == [7, 8] and one.answer == 0
    assert len(halves(torch.arange(1)).query) == 1 and len(halves(torch.arange(0)).query) == 0


def test_batches_say_what_stands_where():
    batch = collate([example(4, 3, 2), example(2, 2, 1), example(3, 2)])
    assert batch.demonstrations.tolist() == [[1, 2, 3, 4], [1, 2, 0, 0], [1, 2, 3, 0]]
    assert batch.lengths.tolist() == [4, 2, 3]
    assert batch.query.tolist() == [[30, 31, 32], [30, 31, 0], [30, 31, 0]]
    assert batch.targets.tolist() == [[31, 32, IGNORED], [31, IGNORED, IGNORED], [IGNORED] * 3]
    assert batch.whole.tolist() == [[1, 2, 3, 4, 30, 31, 32], [1, 2, 30, 31, 0, 0, 0], [1, 2, 3, 30, 31, 0, 0]]
    assert torch.equal(batch.whole[batch.whole_mask], batch.query[batch.mask])


def test_texts_are_cut_on_the_left():
    batch = collate([example(9, 3, 1)], longest=8, longest_student=4)
    assert batch.whole.tolist() == [[5, 6, 7, 8, 9, 30, 31, 32]]
    assert batch.demonstrations.tolist() == [[6, 7, 8, 9]]
    assert batch.whole_mask.sum() == batch.mask.sum() == 3


def test_rows_that_do_not_match_are_refused():
    """A query longer than what the teacher may read; and two whose sum would match."""
    batch = collate([example(2, 6)], longest=4)
    with pytest.raises(ValueError, match=r"align: teacher and student must see as many .* got \[4\] and \[6\]"):
        align(torch.zeros(1, 6, 2), batch.mask, torch.zeros(1, 4, 2), batch.whole_mask)
    one, other = (torch.tensor(x).bool() for x in ([[1, 1], [1, 0]], [[1, 0], [1, 1]]))
    with pytest.raises(ValueError, match=r"got \[1, 2\] and \[2, 1\]"):
        align(torch.zeros(2, 2, 1), one, torch.zeros(2, 2, 1), other)


def test_rows_are_those_of_the_same_tokens():
    batch = collate([example(4, 3, 2), example(2, 2, 1), example(3, 2), example(3, 0)])
    student, teacher = align(batch.query[..., None], batch.mask, batch.whole[..., None], batch.whole_mask)
    assert torch.equal(student, teacher) and len(student) == 7


@pytest.mark.parametrize("width", [16, 24])
def test_a_distiller_reads_each_text_as_if_alone(width):
    """Padding and its neighbours change nothing; of no demonstrations the prompts remain."""
    distiller = Distiller(tiny(), 3, width).requires_grad_(True)
    batch = collate([example(5, 1), example(2, 1), example(0, 1)])
    found = distiller(batch.demonstrations, batch.lengths)
    assert found.shape == (3, 3, width) and (distiller.adapter is None) == (width == 16)
    for row, length in enumerate((5, 2, 0)):
        words = distiller.reader.embed_tokens(torch.arange(1, length + 1))
        inputs = torch.cat([words, distiller.prompts])[None]
        alone = distiller.reader(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, -3:]
        if distiller.adapter is not None:
            alone = torch.tanh(distiller.adapter[0](alone))
        torch.testing.assert_close(found[row], alone[0], rtol=1e-4, atol=1e-5)


def test_states_behind_vectors_are_those_of_one_sequence():
    model = tiny()
    batch = collate([example(4, 3), example(2, 2)])
    words = model.get_input_embeddings()(batch.demonstrations[:1])
    whole = states(model, torch.cat([batch.demonstrations, batch.query], 1)[:1])
    torch.testing.assert_close(behind(model, words, batch.query[:1]), whole[:, 4:])


def test_the_gradient_reaches_the_distiller_alone():
    model, reader = tiny(24), tiny(16, seed=1)
    distiller = Distiller(reader, 3, 24).requires_grad_(True)
    batch, head = collate([example(4, 3, 2), example(2, 2, 1)]), model.get_output_embeddings().weight
    found = behind(model, distiller(batch.demonstrations, batch.lengths), batch.query)
    rows = align(found, batch.mask, states(model, batch.whole), batch.whole_mask)
    mend_loss(*rows, head, batch.targets[batch.mask]).backward()
    assert all(p.grad is None for p in model.parameters())
    learned = dict(distiller.named_parameters())
    assert learned and all(p.grad is not None and p.grad.any() for p in learned.values())


def test_what_stands_for_the_demonstrations_itself_is_perfect():
    """Vectors that are the demonstrations' embeddings: nothing is left to distil."""
    model, one = tiny(), example(4, 3, 2)
    batch = collate([one])
    found = behind(model, model.get_input_embeddings()(batch.demonstrations), batch.query)
    rows = align(found, batch.mask, states(model, batch.whole), batch.whole_mask)
    close(mend_loss(*rows, model.get_output_embeddings().weight), 0.0, atol=1e-6)


def test_an_answer_is_the_one_that_costs_least_a_token():
    model, question = tiny(), torch.tensor([5, 6])
    model.lm_head.weight.mul_(30)  # so that answers differ
    vectors = torch.randn(3, 16)
    answers = [torch.tensor(x) for x in ([7], [8, 9, 10], [11, 12])]
    costs = []
    for answer in answers:
        inputs = torch.cat([vectors, model.get_input_embeddings()(torch.cat([question, answer]))])[None]
        logits = model(inputs_embeds=inputs, use_cache=False).logits[0, -len(answer) - 1 : -1]
        costs.append(F.cross_entropy(logits, answer).item())
    best = min(range(3), key=costs.__getitem__)
    assert classify(model, vectors, question, answers) == best
    order = [answers[best], *(a for i, a in enumerate(answers) if i != best)]
    assert classify(model, vectors, question, order) == 0


def test_tasks_are_what_lines_show():
    tasks = word_tasks()
    there, back = (tasks[f"gram3-comparative{kind}"] for kind in ("", ", inverse"))
    assert ("big", "bigger") in there and ("bigger", "big") in back
    assert ("Athens", "Greece") in tasks["capital-world"] and "city-in-state, inverse" not in tasks  # of many cities
    for name, pairs in tasks.items():
        assert len({a for a, _ in pairs}) == len(pairs), f"{name}: a question with two answers"


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(mend_judge, "TESTED", 16)
    results = train_a_little("mend", tmp_path, monkeypatch, BATCH=4, START_BATCH=4)
    told, zero, alone, ours = results["models"].values()
    assert [*results["models"]] == ["16 demonstrations", "no demonstrations", "vectors alone", "MEND"]
    assert told["metrics"]["KL to demonstrations"] < 1e-6 < zero["metrics"]["KL to demonstrations"]
    for found in (alone, ours):
        assert len(found["losses"]) == 2 and "linear_kl" in found["implementations"]
        assert all(math.isfinite(x) for x in found["metrics"].values())
