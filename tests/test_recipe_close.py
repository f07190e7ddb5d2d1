"""CLOSE against its definition: the noise, adapters and what they are fitted to, golden values, edges, the command."""

import math

import pytest
import torch
from prefix import END, Causal, language_model
from recipes import assert_ranks_equal_one, assert_resumes, close, train_a_little, unit, waves
from torch import nn

from fastcontrast.recipes._parts.close_adapters import covariance, least_squares
from fastcontrast.recipes._shared import namer
from fastcontrast.recipes._shared.noise import philox, seeded_normal
from fastcontrast.recipes._shared.prefix import Prefix, prefix_loss
from fastcontrast.recipes.close import Covariance, Linear, Noise, Shift, mean_of_groups

TEXT, EPS = unit(waves(3, 6, 0)), waves(3, 6, 1)
IMAGES, TEXTS = waves(9, 6, 4) + 0.5, waves(9, 6, 3)  # pairs, not of length 1
PI = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]


def words(*numbers: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([n]) for n in numbers)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (1 << 64) - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (PI, 0x299F31D0_A4093822, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ],
)
def test_philox_has_its_published_values(counter, key, expected):
    assert philox(words(*counter), key)[:, 0].tolist() == expected


def by_hand(seed: int, step: int, row: int, column: int) -> float:
    """One number of the noise, in Python's integers and its libm."""
    counter, key = [column // 4, row, step, 0], [seed % 2**32, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [b >> 32 ^ counter[1] ^ key[0], b % 2**32, a >> 32 ^ counter[3] ^ key[1], a % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    pair = column % 4 // 2
    radius = math.sqrt(-2 * math.log((counter[2 * pair] + 1) / 2**32))
    angle = 2 * math.pi * counter[2 * pair + 1] / 2**32
    return radius * (math.sin(angle) if column % 2 else math.cos(angle))


def test_the_noise_is_box_muller_of_philox():
    seed, step, first = 0xDEADBEEF_00C0FFEE, 4_000_000_000, 2**32 - 50
    found = seeded_normal(50, 23, seed, step, first, torch.float64)
    expected = [[by_hand(seed, step, first + i, j) for j in range(23)] for i in range(50)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_part_of_the_noise_is_the_same_bits(dtype):
    whole = seeded_normal(37, 30, 5, 2, dtype=dtype)
    for first, rows, columns in ((0, 37, 30), (5, 1, 30), (11, 26, 7), (36, 1, 1), (4, 0, 3), (4, 3, 0)):
        part = seeded_normal(rows, columns, 5, torch.tensor(2), first, dtype)
        assert part.dtype == dtype and torch.equal(part, whole[first : first + rows, :columns])
    others = seeded_normal(37, 30, 5, 3, dtype=dtype), seeded_normal(37, 30, 6, 2, dtype=dtype)
    assert all((other == whole).float().mean() < 0.1 for other in others)


def test_the_noise_is_normal():
    x = seeded_normal(2048, 512, 0, 0, dtype=torch.float64)
    close(x.mean(), 0.0, atol=4e-3)  # four standard errors of a million
    for power, moment, error in ((2, 1, 1.42e-3), (4, 3, 9.8e-3), (6, 15, 0.1)):
        close((x**power).mean(), moment, atol=4 * error)
    together = torch.cat([x[:, :64], seeded_normal(2048, 64, 0, 1, dtype=torch.float64)], 1)  # of two steps
    assert (together.T @ together / 2048 - torch.eye(128)).abs().max() < 0.15
    assert (x[1:] * x[:-1]).mean().abs() < 4e-3


@pytest.mark.parametrize(
    "wrong", [{"seed": 1 << 64}, {"step": -1}, {"first_row": 1 << 32}, {"rows": 2, "first_row": (1 << 32) - 1}]
)
def test_noise_beyond_its_range_is_refused(wrong):
    with pytest.raises(ValueError, match=f"seeded_normal: {next(iter(wrong))} must"):
        seeded_normal(**{"rows": 1, "columns": 1, "seed": 0, "step": 0, **wrong})


def golden_prefix() -> Prefix:
    prefix = Prefix(6, 4, tokens=2).double()
    with torch.no_grad():
        prefix.linear.weight.copy_(waves(8, 6, 3) / math.sqrt(6))
        prefix.linear.bias.zero_()
    return prefix


def test_golden_noise_shift_and_prefix():
    x = Noise()(7 * TEXT, EPS)  # of any length
    close(x[0], 0.52946874, -0.17142002, -0.57277043, -0.13096312, 0.45406147, 0.37267801)
    close((x * TEXT).sum(1), 0.99044361, 0.99241474, 0.99660422)
    shifted = Shift(0.3 * waves(1, 6, 2)[0])(TEXT, EPS)
    close(shifted[0], 0.35152887, -0.33971764, -0.31463115, -0.25447535, 0.23802048, 0.73526537)
    prefix = golden_prefix()
    first, second = prefix(x)[0]
    close(first, -0.09348919, 0.09445780, -0.17273641, -0.66769979)
    close(second, 0.16001521, -0.32558371, -0.12102652, 0.07420602)


def adapters(w: float = 0.08):
    eye, zero = torch.eye(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    return {
        "noise": Noise(w), "shift": Shift.of_pairs(IMAGES, TEXTS, w=w), "random": Shift.random(6, 0.5, w=w),
        "renormalised": Shift.of_pairs(IMAGES, TEXTS, 0.5, renormalise=True, w=w), "identity": Linear(eye, zero, w=w),
        "linear": Linear.of_pairs(IMAGES, TEXTS, w=w), "covariance": Covariance.of_pairs(IMAGES, TEXTS, w=w),
    }  # fmt: skip


def test_every_adapter_in_training_and_in_the_test():
    image, text = unit(IMAGES), unit(TEXTS)
    d = image.mean(0) - text.mean(0)
    matrix, bias = least_squares(IMAGES, TEXTS)
    random = adapters()["random"].shift.double()
    close(random.norm(), 0.5, atol=1e-7)
    moved = {
        "noise": TEXT, "shift": TEXT + d, "random": TEXT + random, "renormalised": unit(TEXT + d / 2), "identity": TEXT,
        "linear": unit(TEXT @ matrix.T + bias), "covariance": TEXT,
    }  # fmt: skip
    for w in (0.08, 0.0):
        for name, adapter in adapters(w).items():
            eps = torch.cat([EPS, waves(3, 6, 2)], 1) if name == "covariance" else EPS
            noise = w * EPS
            if name == "covariance":
                noise = noise + d + 3 * waves(3, 6, 2) @ adapter.factor.T
            torch.testing.assert_close(adapter(TEXT, eps), unit(moved[name] + noise))
            own = adapter(TEXT)
            torch.testing.assert_close(own.norm(dim=1), torch.ones(3).double())
            assert torch.equal(own, moved[name]) == (w == 0 and name in ("noise", "identity")) or torch.allclose(
                own, unit(moved[name])
            )
            torch.testing.assert_close(adapter.eval()(TEXT), moved[name])
            assert adapter.steps == 1  # not by a given noise, nor by the test


def test_noise_has_its_width_and_changes_with_every_step():
    adapter, text = Noise(0.3), unit(waves(2000, 16, 0))
    seen = []
    adapter.scatter = lambda x, eps: seen.append(0.3 * eps) or x + 0.3 * eps
    first, second = adapter(text), adapter(text)
    assert adapter.steps == 2 and (first - second).abs().min() > 0
    noise = torch.stack(seen)
    close(noise.mean(), 0, atol=5e-3)
    close(noise.var(), 0.09, atol=2e-3)


def test_fits_are_what_they_say():
    image, text = unit(IMAGES), unit(TEXTS)
    matrix, bias = least_squares(IMAGES, TEXTS)
    residue = text @ matrix.T + bias - image
    assert torch.cat([text, torch.ones(9, 1)], 1).T.mul(1).matmul(residue).abs().max() < 1e-12  # normal equations
    for rows in (9, 3):  # three pairs have a covariance of rank two, where Cholesky fails
        mean, factor = covariance(IMAGES[:rows], TEXTS[:rows])
        d = (image - text)[:rows]
        torch.testing.assert_close(mean, d.mean(0))
        torch.testing.assert_close(factor @ factor.T, (d - mean).T @ (d - mean) / (rows - 1))
    with pytest.raises(ValueError, match=r"least_squares: .* two pairs or more, got 3 and 2"):
        least_squares(IMAGES[:3], TEXTS[:2])
    with pytest.raises(ValueError, match=r"covariance: image must be \[N, 5\]"):
        covariance(IMAGES, TEXTS[:, :5])


def test_captions_of_a_group_are_averaged_as_they_are():
    groups = torch.tensor([2, 0, 1, 0, 2, 2, 1, 0, 0])
    expected = torch.stack([sum(TEXTS[i] for i in range(9) if groups[i] == g) / (groups == g).sum() for g in range(3)])
    torch.testing.assert_close(mean_of_groups(TEXTS, groups, 3), expected)
    for count in (2, 4):
        with pytest.raises(ValueError, match=rf"mean_of_groups: .*\[0, {count}\)"):
            mean_of_groups(TEXTS, groups, count)


def test_rows_of_zeros_and_of_half_precision():
    zeros = torch.zeros(2, 6)
    for adapter in adapters().values():
        assert adapter.float()(zeros).isfinite().all() and adapter.eval()(zeros).isfinite().all()
    halves = TEXT.half()
    assert torch.equal(Noise()(halves), Noise()(halves.float()))
    prefix = Prefix(6, 4, tokens=2)
    assert torch.equal(prefix(halves), prefix(halves.float()))


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"close: text must be a matrix"):
        Noise()(TEXT[0])
    with pytest.raises(ValueError, match=r"close: eps must be \[3, 12\], got \[3, 6\]"):
        adapters()["covariance"](TEXT, EPS)
    with pytest.raises(ValueError, match=r"Prefix: x must be \[B, 6\] or \[B, S, 6\], got \[3, 5\]"):
        Prefix(6, 4)(TEXT[:, :5])


def objective(text, prefix, captions):
    """The loss behind an adapter, in its second step; `prefix` takes the gradient, since text does not."""
    adapter = Noise(0.5)
    adapter(text)
    return prefix_loss(Causal(), golden_prefix()(adapter(text)) + prefix.unflatten(1, (2, 4)), captions, END)


@pytest.mark.parametrize(("sizes", "how"), [((3, 2), "gather"), ((0, 5), "ring")])
def test_ranks_draw_the_noise_of_the_whole_batch(sizes, how):
    captions = torch.tensor([[5, 7, END, END], [3, 4, 5, 6], [END] * 4, [9, END, END, END], [8, 8, END, END]])
    assert_ranks_equal_one(objective, [waves(5, 6, 0), waves(5, 8, 1), captions], sizes, how)


def test_no_gradient_reaches_the_text_vectors():
    text = TEXT.clone().requires_grad_()
    project = nn.Linear(6, 2).double()
    project(Noise()(text)).sum().backward()
    assert text.grad is None and project.weight.grad.abs().min() > 0


def test_resumes():
    assert_resumes(Noise, lambda adapter, _: adapter(TEXT))


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(namer, "language_model", language_model)
    results = train_a_little("close", tmp_path, monkeypatch)
    assert set(results["models"]) == {"no noise", "CLOSE", "on images"}
    for found in results["models"].values():
        assert len(found["losses"]) == 2 and set(found["implementations"]) == {"similarity_lse"}
        assert set(found["metrics"]) == {f"F1 of words, {kind} names, %" for kind in ("unseen", "seen")}
    firsts = {found["losses"][0] for found in results["models"].values()}
    assert len(firsts) == 3 and max(firsts) - min(firsts) < 1  # one start, three inputs
