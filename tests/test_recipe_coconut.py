"""COCONUT against its definition: golden values, the dense formula with every switch, edges, ranks, memory, resume, the
speech, the command."""

import io
import math
import shutil
import wave

import pytest
import torch
from golden_decoding import F
from recipes import assert_ranks_equal_one, assert_resumes, close, gradients, train_a_little, unit
from torch.nn.functional import pad

from fastcontrast import clip_loss, supcon_loss
from fastcontrast.recipes import coconut as recipe
from fastcontrast.recipes._parts import coconut_speech
from fastcontrast.recipes._parts.coconut_memory import herd
from fastcontrast.recipes._parts.coconut_speech import IGNORED, Batch
from fastcontrast.recipes.coconut import Coconut, Rehearsal, SpeechToIntent, mm_loss, nspt_loss

STUDENT, TEACHER, AUDIO, TEXT = (unit(F(6, 8, c)) for c in (0, 0.3, 0.1, 0.45))
LABELS = torch.tensor([0, 1, 0, 1, 2, 3])
REPLAYED = torch.tensor([True, True, True, True, False, False])
SWITCHES = [(own, bank) for own in (True, False) for bank in ("student", "mixed")]
BANKS = ("student", "mixed", "teacher")
NONE = torch.zeros(6, dtype=torch.bool)


def dense_nspt(student, teacher, labels, replayed, tau=0.1, bank="student", include_own_teacher=True):
    """Two Gram matrices and boolean masks, over anchors that have a positive."""
    own = torch.eye(len(labels), dtype=torch.bool)
    alike = labels[:, None] == labels
    positives = alike if include_own_teacher else alike & ~own
    of_teacher, of_student = student @ teacher.T / tau, student @ student.T / tau
    kept = {
        "student": of_student.masked_fill(own, -math.inf),
        "mixed": torch.cat(
            [of_student.masked_fill(alike, -math.inf), of_teacher.masked_fill(~positives, -math.inf)], 1
        ),
        "teacher": of_teacher if include_own_teacher else of_teacher.masked_fill(own, -math.inf),
    }[bank]
    anchors = replayed & positives.any(1)
    logs = of_teacher[anchors] - kept[anchors].logsumexp(1)[:, None]
    return -((logs * positives[anchors]).sum(1) / positives[anchors].sum(1)).mean()


def dense_mm(audio, text, labels, anchors, tau=0.1, hard=False):
    total, logits = 0.0, audio @ text.T / tau
    positives = torch.eye(len(labels)) if hard else (labels[:, None] == labels).double()
    for x in (logits, logits.T):
        total = total - ((x.log_softmax(1) * positives).sum(1) / positives.sum(1))[anchors].sum()
    return total


@pytest.mark.parametrize(
    ("tau", "expected"),
    [(0.1, (2.876626536396, 7.109760613196, 9.971434240639, 9.971664628679)),
     (0.5, (1.288053762668, 2.052461552484, 2.707015303516, 2.714194574098))],
)  # fmt: skip
def test_golden_nspt(tau, expected):
    for (own, bank), value in zip(SWITCHES, expected, strict=True):
        how = {"bank": bank, "include_own_teacher": own}
        close(nspt_loss(STUDENT, TEACHER, LABELS, REPLAYED, tau, **how), value)
        close(nspt_loss(STUDENT, TEACHER[:4], LABELS, REPLAYED, tau, **how), value)  # the teacher of the replayed alone
        close(nspt_loss(STUDENT.float(), TEACHER.float(), LABELS, REPLAYED, tau, **how), value, atol=5e-6)
        close(nspt_loss(STUDENT, TEACHER, LABELS, REPLAYED, tau, reduction="sum", **how), 4 * value, atol=4e-8)
        close(nspt_loss(STUDENT, TEACHER, LABELS, REPLAYED, tau, reduction="none", **how).mean(), value)


def test_golden_mm():
    new, every = ~REPLAYED, 1.223752858927
    for hard in (False, True):
        close(mm_loss(AUDIO, TEXT, LABELS, new, hard=hard), 0.395339809041)
        # A sum over rows of differences of two numbers up to 9.5, which float32 has to 2⁻²⁰: four such, over all rows.
        close(mm_loss(AUDIO.float(), TEXT.float(), LABELS, new, hard=hard), 0.395339809041, atol=4e-6)
    close(mm_loss(AUDIO, TEXT, LABELS, hard=True), every)
    close(mm_loss(AUDIO.float(), TEXT.float(), LABELS, hard=True), every, atol=5e-6)
    close(mm_loss(AUDIO, TEXT, LABELS, hard=True, reduction="mean"), every / 6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("own", [True, False])
def test_nspt_equals_the_dense_formula(bank, own, dtype, tolerance):
    """Labels beyond 2²⁴ and below 0; an anchor, and a new sample of an old class that has a teacher."""
    torch.manual_seed(0)
    student, teacher = (unit(torch.randn(37, 11, dtype=torch.float64)) for _ in range(2))
    labels = torch.randint(5, (37,)) * 2**40 - 2**30 + torch.arange(37) // 30
    replayed = torch.rand(37) < 0.4
    how = {"bank": bank, "include_own_teacher": own}
    expected = gradients(lambda h: dense_nspt(h, teacher, labels, replayed, **how), student)
    found = gradients(lambda h: nspt_loss(h, teacher.to(dtype), labels, replayed, **how), student.to(dtype))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("hard", [False, True])
def test_mm_equals_the_dense_formula(hard):
    torch.manual_seed(0)
    audio, text = (unit(torch.randn(37, 11, dtype=torch.float64)) for _ in range(2))
    labels, anchors = torch.randint(5, (37,)), torch.rand(37) < 0.6
    expected = gradients(lambda a, t: dense_mm(a, t, labels, anchors, hard=hard), audio, text)
    found = gradients(lambda a, t: mm_loss(a, t, labels, anchors, hard=hard), audio.float(), text.float())
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).norm() <= 1e-5 * theirs.norm()


def test_a_teacher_that_is_the_student_makes_supcon():
    rows = supcon_loss(STUDENT, LABELS, 10.0, reduction="none")[REPLAYED].mean()
    for bank in ("student", "mixed"):
        close(nspt_loss(STUDENT, STUDENT.clone(), LABELS, REPLAYED, bank=bank, include_own_teacher=False), rows)


def test_distinct_classes_have_their_own_teacher_alone():
    own = (STUDENT * TEACHER).sum(1) * 10
    others = (STUDENT @ STUDENT.T * 10).masked_fill(torch.eye(6, dtype=torch.bool), -math.inf)
    student = (others.logsumexp(1) - own)[REPLAYED].mean()
    mixed = (torch.cat([others, own[:, None]], 1).logsumexp(1) - own)[REPLAYED].mean()
    for bank, expected in (("student", student), ("mixed", mixed)):
        close(nspt_loss(STUDENT, TEACHER, torch.arange(6), REPLAYED, bank=bank), expected)


def test_distinct_classes_make_mm_twice_clip():
    close(mm_loss(AUDIO, TEXT, torch.arange(6)), 2 * clip_loss(AUDIO, TEXT, 10.0, reduction="sum"))


def test_where_gradients_flow():
    """None to the teacher; to an anchor from both parts, to others from the denominator alone."""
    _, student, teacher = gradients(lambda h, t: nspt_loss(h, t, LABELS, REPLAYED), STUDENT, TEACHER)
    assert not teacher.any() and student.any(1).all()
    leaf = STUDENT.clone().requires_grad_()
    logits = (leaf @ leaf.T * 10).masked_fill(torch.eye(6, dtype=torch.bool), -math.inf)
    (denominator,) = torch.autograd.grad(logits.logsumexp(1)[REPLAYED].mean(), leaf)
    torch.testing.assert_close(student[~REPLAYED], denominator[~REPLAYED])
    positives = (LABELS[:, None] == LABELS).double()
    numerator = 10 * (positives @ TEACHER) / positives.sum(1, keepdim=True) / 4
    torch.testing.assert_close(student[REPLAYED], (denominator - numerator)[REPLAYED])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bank", BANKS)
def test_what_has_no_anchor_positive_or_denominator_gives_zero(bank, dtype):
    student, teacher, one = STUDENT.to(dtype), TEACHER.to(dtype), torch.tensor([True])
    cases = [(slice(6), NONE, True)]  # nothing is replayed
    cases += [(slice(6), ~REPLAYED, False)]  # the classes of rows 4 and 5 are theirs alone
    cases += [(slice(1), one, False)]  # alone in the batch
    for rows, replayed, own in cases:
        how = {"bank": bank, "include_own_teacher": own}
        value, gradient = gradients(lambda h: nspt_loss(h, teacher[rows], LABELS[rows], replayed, **how), student[rows])  # noqa: B023
        assert value == 0 and not gradient.any()
    value, gradient = gradients(lambda h: nspt_loss(h, teacher[:1], LABELS[:1], one, bank="student"), student[:1])
    assert value == 0 and not gradient.any()
    everyone = torch.ones_like(REPLAYED)  # rows 4 and 5 are skipped, and not counted
    how = {"bank": bank, "include_own_teacher": False}
    four = dense_nspt(STUDENT, TEACHER, LABELS, everyone, **how)
    close(nspt_loss(student, teacher, LABELS, everyone, **how), four, atol=1e-5 if dtype == torch.float32 else 1e-8)


def test_mm_without_anchors_is_zero():
    for reduction in ("sum", "mean"):
        value, *found = gradients(lambda a, t: mm_loss(a, t, LABELS, NONE, reduction=reduction), AUDIO, TEXT)  # noqa: B023
        assert value == 0 and not any(g.any() for g in found)


def test_an_old_class_in_the_new_task_needs_its_teacher():
    labels = torch.tensor([0, 1, 0, 1, 0, 3])  # row 4 is new, and of class 0
    with_it = nspt_loss(STUDENT, TEACHER, labels, REPLAYED)
    close(with_it, dense_nspt(STUDENT, TEACHER, labels, REPLAYED))
    without = nspt_loss(STUDENT, TEACHER[:4], labels, REPLAYED)
    assert abs(without - with_it) > 0.1
    far = TEACHER.clone()
    far[4] = math.nan  # it must not be looked at
    close(nspt_loss(STUDENT, far[:4], labels, REPLAYED), without)


def test_it_may_be_negative():
    student = unit(torch.eye(6, dtype=torch.float64) + 0.01)
    assert nspt_loss(student, student.clone(), torch.arange(6), REPLAYED) < -5


@pytest.mark.parametrize(
    ("given", "message"),
    [({"bank": "both"}, "bank must be one of"),
     ({"labels": LABELS[:5]}, r"labels must be \[6\], got \[5\]"),
     ({"replayed": LABELS}, r"replayed must be bool \[6\], got torch.int64"),
     ({"teacher": TEACHER[:, :7]}, r"teacher must be \[N, 8\] to match student"),
     ({"teacher": TEACHER[:3]}, "teacher must have 6 or 4 rows, got 3"),
     ({"teacher": TEACHER[:4], "bank": "teacher"}, "teacher must have 6 rows, got 4"),
     ({"reduction": "max"}, "reduction must be one of")],
)  # fmt: skip
def test_what_does_not_fit_is_named(given, message):
    with pytest.raises(ValueError, match=f"nspt_loss: {message}"):
        nspt_loss(**{"student": STUDENT, "teacher": TEACHER, "labels": LABELS, "replayed": REPLAYED, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [({"labels": LABELS[:5]}, r"labels must be \[6\], got \[5\]"),
     ({"text": TEXT[:5]}, "text must have 6 rows like audio, got 5"),
     ({"text": TEXT[:, :7]}, r"text must be \[N, 8\] to match audio"),
     ({"anchors": LABELS}, r"anchors must be bool \[6\], got torch.int64"),
     ({"reduction": "max"}, "reduction must be one of")],
)  # fmt: skip
def test_what_does_not_fit_speech_is_named(given, message):
    with pytest.raises(ValueError, match=f"mm_loss: {message}"):
        mm_loss(**{"audio": AUDIO, "text": TEXT, "labels": LABELS, **given})


def whole(student, teacher, audio, text, labels, replayed):
    replayed = replayed.bool()
    banks = sum(nspt_loss(student, teacher, labels, replayed, bank=bank) for bank in BANKS)
    return banks + mm_loss(audio, text, labels, ~replayed)


def test_ranks_equal_one():
    """Unequal shares, the second without a new sample of its own."""
    rows = torch.tensor([4, 0, 5, 1, 2, 3])
    tensors = [STUDENT, TEACHER, AUDIO, TEXT, LABELS, REPLAYED.long()]
    assert_ranks_equal_one(whole, [x[rows] for x in tensors], (4, 2))


# ------------------------------------------------------------------------------------------------------------- the loop


def test_herding_is_greedy():
    x = unit(F(7, 5, 0.2))
    chosen = herd(x, 3).tolist()
    for k in range(3):
        distances = [(x.mean(0) - x[[*chosen[:k], i]].mean(0)).norm() if i not in chosen[:k] else math.inf
                     for i in range(7)]  # fmt: skip
        assert chosen[k] == min(range(7), key=lambda i: distances[i])
    assert sorted(herd(x, 7).tolist()) == [*range(7)]  # each once


@pytest.mark.parametrize("selection", ["random", "herding"])
def test_the_memory_holds_as_many_of_each_class(selection):
    memory, labels = Rehearsal(10, selection), torch.arange(20) % 3
    memory.add(torch.arange(100, 120), labels, 5, F(20, 4, 0))
    held = memory.held
    assert len(held) == 5 == len({*held.tolist()}) and labels[held - 100].bincount().tolist() == [2, 2, 1]
    memory.add(torch.arange(3), torch.tensor([7, 7, 8]), 4, F(3, 4, 0))  # of class 8 there is one alone
    assert len(memory.held) == 8 and torch.equal(memory.held[:5], held)
    drawn = memory.draw(6)
    assert len({*drawn.tolist()}) == 6 and {*drawn.tolist()} <= {*memory.held.tolist()}
    assert len(memory.draw(99)) == 8
    assert len({(*memory.draw(6).tolist(),) for _ in range(9)}) > 5
    with pytest.raises(ValueError, match=r"count must be at most 2, .* got 3"):
        memory.add(torch.arange(3), labels[:3], 3, F(3, 4, 0))
    with pytest.raises(ValueError, match="features must be given for herding"):
        Rehearsal(4, "herding").add(torch.arange(3), labels[:3], 3)
    with pytest.raises(ValueError, match="selection must be one of"):
        Rehearsal(4, "best")


def batch(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(9, 14, (count,), generator=generator)
    audio = [torch.randn(n, 40, generator=generator) for n in lengths.tolist()]
    said = torch.randint(1, 9, (count, 4), generator=generator)
    intent = torch.tensor([[3, 0, IGNORED], [4, 5, 0]])[torch.arange(count) % 2]
    return Batch(coconut_speech.padded(audio, 0.0), lengths, said, intent, LABELS[:count])


def made(**settings) -> Coconut:
    torch.manual_seed(0)
    return Coconut(SpeechToIntent(9), 8, mm_loss, nspt_loss, **settings)


def test_the_loss_is_the_sum_of_its_terms():
    ours, given = made(of_mm=0.2, of_nspt=0.3, of_written=0.4), batch()
    ours.end_task(given, torch.arange(6), 4)
    with torch.no_grad():
        for p in ours.model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model, teacher, old = ours.model, ours.teacher.module, given.of(REPLAYED)
    states, mean = model.listen(given.audio, given.lengths)
    target = teacher.speech(teacher.listen(old.audio, old.lengths)[1])
    expected = (
        model.writes(states, mean, given.intent)
        + 0.2 * mm_loss(model.speech(mean), model.text(given.said), LABELS, ~REPLAYED)
        + 0.3 * nspt_loss(model.speech(mean), target, LABELS, REPLAYED)
        + 0.4 * model.writes(states[REPLAYED], mean[REPLAYED], teacher.written(old, 3))
    )
    torch.testing.assert_close(ours(given, REPLAYED), expected)
    first = made(of_nspt=0.3)(given, NONE)  # in the first task nothing is replayed
    torch.testing.assert_close(first, made(of_nspt=0.0)(given, NONE))


def test_the_teacher_moves_at_the_end_of_a_task_alone():
    ours, given = made(), batch()
    ours.end_task(given, torch.arange(6), 4)
    then = {name: x.clone() for name, x in ours.model.state_dict().items()}
    optimizer = torch.optim.SGD(ours.model.parameters(), 0.1)
    ours(given, REPLAYED).backward()
    optimizer.step()
    assert all(p.grad is None for p in ours.teacher.parameters())
    torch.testing.assert_close(ours.teacher.module.state_dict(), then, rtol=0, atol=0)
    ours.end_task(given, torch.arange(6, 12), 4)
    torch.testing.assert_close(ours.teacher.module.state_dict(), ours.model.state_dict(), rtol=0, atol=0)


def test_resumes(one_thread):
    def step(ours, i):
        given = batch(seed=i)
        optimizer = torch.optim.SGD(ours.model.parameters(), 0.1)
        loss = ours(given, REPLAYED)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if i < 2:
            ours.end_task(given, torch.arange(6), 3)
        return loss.detach(), ours.memory.draw(3), ours(given, REPLAYED).detach()

    assert_resumes(lambda: made(selection="herding", of_written=0.1), step)


def test_padding_changes_nothing_and_writing_is_greedy():
    model, given = made().model, batch()
    states, mean = model.listen(given.audio, given.lengths)
    longer = given._replace(audio=pad(given.audio, (0, 0, 0, 9)), intent=pad(given.intent, (0, 2), value=IGNORED))
    other_states, other_mean = model.listen(longer.audio, longer.lengths)
    torch.testing.assert_close(other_mean, mean)
    torch.testing.assert_close(
        model.writes(other_states, other_mean, longer.intent), model.writes(states, mean, given.intent)
    )
    written = model.written(given, 5)
    assert written.shape == (6, 5)
    for row, (s, m) in zip(written.tolist(), zip(states, mean, strict=True), strict=True):
        tokens = [0]
        while len(tokens) < 6 and (len(tokens) == 1 or tokens[-1] != 0):
            x, _ = model.decode(torch.tensor([tokens]), model.first(m[None]), s[None])
            tokens.append(int((x[0, -1] @ model.words.weight.T).argmax()))
        assert row == tokens[1:] + [IGNORED] * (6 - len(tokens))


# ----------------------------------------------------------------------------------------------------------- the speech


def test_letters_sound_alike_from_one_speaker_and_not_from_another():
    one, again, other = (coconut_speech.spelled("read a file", speaker) for speaker in (3, 3, 4))
    assert one.shape[1] == 40 and 22 <= len(one) <= 33
    assert torch.equal(one, again)
    assert (one[:9] - other[:9]).abs().mean() > 0.5


def test_espeak_is_asked_where_it_is_installed(tmp_path, monkeypatch):
    """A stand-in: a second of a tone at 1 kHz, which the mel filterbank finds at its place."""
    tone = (torch.sin(torch.arange(22050) * 2 * math.pi * 1000 / 22050) * 2**14).short()
    with io.BytesIO() as file:
        with wave.open(file, "wb") as sound:
            sound.setparams((1, 2, 22050, 0, "NONE", ""))
            sound.writeframes(tone.numpy().tobytes())
        (tmp_path / "tone.wav").write_bytes(file.getvalue())
    program = tmp_path / "espeak-ng"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncat {tmp_path}/tone.wav\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert shutil.which("espeak-ng") == str(program)
    x = coconut_speech.spoken("read a file", 5)
    assert x.shape == (50, 40) and (tmp_path / "asked").read_text().endswith("--stdout read a file\n")
    close(torch.stack([x.mean(), x.std()]), 0, 1, atol=1e-5)
    mels = 2595 * math.log10(1 + 1000 / 700) / (2595 * math.log10(1 + 11025 / 700)) * 41 - 1
    assert (x[5:-5].argmax(1) - mels).abs().max() < 1


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(recipe, "MODELS", dict([*recipe.MODELS.items()][1:]))
    results = train_a_little("coconut", tmp_path, monkeypatch, BATCH=8, CLASSES=4, TASKS=2, EACH=10, KEPT=2)
    assert [*results["models"]] == ["COCONUT, teacher's text", "COCONUT"]
    assert len(results["intents"]) == 4 and results["spoken_by"] == "letters"
    for found in results["models"].values():
        assert len(found["losses"]) == 4 and "similarity_lse" in found["implementations"]
        assert [*found["metrics"]] == ["average accuracy, %", "all classes at the end, %", "the first task's, %"]
