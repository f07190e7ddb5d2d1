"""The Triton kernels of two_logit_mix, in the interpreter, against float64 truth."""

import math

import interpreter  # noqa: F401 (leaves this file out where there is none)
import pytest
import torch
from fastcontrast.kernels import two_logit_mix as kernels
from similarity import generator

from fastcontrast.ops import trace, two_logit_mix
from fastcontrast.testing import relative_error

# Of numbers that a mask throws away.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF, NAN = float("inf"), float("nan")
SETTINGS = {
    "adacad": {},
    "floor": {"floor": 0.3, "plausibility": 0.1},
    "fixed": {"weight": 0.5},
    "fixed, with the divergence": {"weight": -0.5, "divergence": True},
    "contrastive decoding": {"weight": 0.8, "keep": 1.0, "plausibility": 0.1},
    "the likeliest": {"plausibility": 1.0},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 64)
    monkeypatch.setattr(kernels, "PROGRAMS", 5)


def problem(rows: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple((3 * torch.randn(rows, vocabulary, generator=generator(seed))).to(dtype) for seed in (1, 2))


def triton(*arguments, **options):
    return two_logit_mix(*arguments, **options, implementation="triton")


def assert_right(z1: torch.Tensor, z0: torch.Tensor, limit: float = 2e-6, **options):
    """NaN and infinities have to be at the same places too."""
    found = triton(z1, z0, **options)
    truth = two_logit_mix(z1.double(), z0.double(), **options, implementation="reference")
    for name, value, expected in zip(found._fields, found, truth, strict=True):
        assert (value is None) == (expected is None)
        if value is not None:
            assert value.dtype == torch.float32
            # A single token has log probability 0: what is off by a rounding error of its logits.
            assert relative_error(value + 1, expected + 1) < limit, name
    return found


@pytest.mark.parametrize("vocabulary", [1, 7, 130, 1030])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=[*SETTINGS])
def test_values(vocabulary, options):
    assert_right(*problem(2, vocabulary), **options)


@pytest.mark.parametrize("programs", [1, 6, 100])
@pytest.mark.parametrize("name", ["floor", "fixed"])
def test_one_split_and_splits_of_one_block(programs, name, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    assert_right(*problem(2, 700), **SETTINGS[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["floor", "contrastive decoding"])
def test_half_precision(dtype, name):
    assert_right(*problem(2, 300, dtype), **SETTINGS[name])


def test_a_weight_for_each_row():
    assert_right(*problem(3, 130), weight=torch.tensor([0.0, 2.0, -0.4]))
    assert_right(*problem(3, 130), weight=torch.tensor([0.0, NAN, -0.4]), divergence=True)


def test_any_strides():
    z1, z0 = problem(8, 200)
    for a, b in ((z1[::2, 31:171], z0[:4, :140]), (z1[:1].expand(3, 200), z0[:3]), (z1[:, :130], z0.T[:130].T)):
        assert_right(a, b)
        assert_right(a, b, weight=0.7)


@pytest.mark.parametrize("options", [{}, {"weight": 0.5, "divergence": True}], ids=str)
def test_minus_infinity(options):
    z1, z0 = problem(7, 200)
    z1[0, 3:150] = -INF  # stays
    z0[1, 3:150] = -INF  # counts as the smallest finite logit
    z1[2, :100] = z0[2, 50:150] = -INF
    z1[3] = -INF
    z0[4] = -INF
    z1[5] = z0[5] = -INF
    z1[6, 1:] = -INF
    found = assert_right(z1, z0, **options)
    assert (found.log_probabilities[[3, 5]] == -INF).all()
    assert found.divergence[5] == 0
    smallest = z0[1][z0[1] > -INF].min()
    filled = z0[1].where(z0[1] > -INF, smallest)
    alone = triton(z1[1:2], filled[None], weight=found.weight[1:2]).log_probabilities
    assert relative_error(found.log_probabilities[1:2], alone) < 1e-6


@pytest.mark.parametrize("name", ["adacad", "fixed, with the divergence", "contrastive decoding"])
def test_rows_of_special_values(name, monkeypatch):
    """Every rule of the reference for NaN and infinities, in rows that two splits share."""
    values = torch.tensor([-INF, -INF, -INF, 0.0, 1.5, -2.0, 0.0, NAN, INF])
    z1, z0 = (values[torch.randint(0, most, (25, 3), generator=generator(most))] for most in (8, 9))
    z1, z0 = (
        torch.nn.functional.pad(z, (0, 63), value=-INF)[:, torch.randperm(66, generator=generator(3))] for z in (z1, z0)
    )
    z1, z0 = torch.cat([z1, z0[:9]]), torch.cat([z0, z1[:9]])
    monkeypatch.setattr(kernels, "PROGRAMS", 512)
    assert_right(z1, z0, **SETTINGS[name])


def test_nan_stays_in_its_row():
    z1, z0 = problem(4, 130)
    z1[1, 100], z0[2, 7], z1[2, 7] = NAN, NAN, 20.0
    for options in SETTINGS.values():
        found = assert_right(z1, z0, **options)
        assert found.log_probabilities.isnan().all(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_rows_have_no_divergence(dtype, monkeypatch):
    z = problem(3, 330, dtype)[0]
    z[1, 5:300] = -INF
    z[2] = -INF
    other = torch.nn.functional.pad(z, (3, 4))[:, 3:-4]
    for programs in (1, 6, 512):
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        assert (triton(z, other).divergence == 0).all()


@pytest.mark.parametrize("distance", [1.0, 1e-1, 1e-2, 1e-3])
def test_near_rows_keep_the_digits_of_their_divergence(distance):
    z = problem(3, 500)[0]
    other = z + distance * torch.linspace(-1, 1, 1500).view(3, 500)
    found, truth = triton(z, other), two_logit_mix(z.double(), other.double())
    assert relative_error(found.divergence, truth.divergence) < 2e-6 + 1e-6 / distance


def test_rows_far_apart_reach_the_bound():
    z = torch.full((2, 100), -200.0)
    z[:, 3] = 0.0
    z[1] -= 1e4
    divergence = assert_right(z, z.roll(50, 1)).divergence
    assert relative_error(divergence, torch.full((2,), math.log(2))) < 1e-6


def test_no_rows():
    found = triton(*problem(0, 9))
    assert [x.shape for x in found] == [(0, 9), (0,), (0,)]


def test_trace_names_it_and_runs_are_bit_identical():
    inputs = problem(2, 1030)
    with trace() as ran:
        results = [triton(*inputs) for _ in range(2)]
    assert [(choice.op, choice.implementation) for choice in ran] == [("two_logit_mix", "triton")] * 2
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
