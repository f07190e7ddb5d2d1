"""The Triton kernels of contrastive_candidates and contrastive_select, in the interpreter, against float64 truth."""

from unittest import mock

import interpreter  # noqa: F401 (leaves this file out where there is none)
import pytest
import torch
from fastcontrast.kernels import contrastive_select as kernels
from similarity import generator

from fastcontrast.ops import contrastive_candidates, contrastive_select, trace
from fastcontrast.testing import relative_error

# Of numbers that a mask throws away.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 64)
    monkeypatch.setattr(kernels, "PARTS", 4)
    monkeypatch.setattr(kernels, "MANY", 32)
    monkeypatch.setattr(kernels, "BS", 2)


# ----------------------------------------------------------------------------------------------------------- candidates


def assert_candidates_right(logits: torch.Tensor, k: int, limit: float = 2e-6) -> tuple[torch.Tensor, torch.Tensor]:
    found = contrastive_candidates(logits, k, implementation="triton")
    probabilities, tokens = contrastive_candidates(logits.double(), k, implementation="reference")
    assert found[0].dtype == torch.float32 and found[1].dtype == torch.int64
    assert torch.equal(found[1], tokens)
    assert relative_error(found[0], probabilities) < limit
    return found


@pytest.mark.parametrize("vocabulary", [1, 7, 130, 1030])
@pytest.mark.parametrize("k", [1, 5, 9, 32, 33, 1030])
def test_the_k_likeliest(vocabulary, k):
    assert_candidates_right(4 * torch.randn(3, vocabulary, generator=generator()), min(k, vocabulary))


def test_keys_are_folded_until_a_block_holds_a_row():
    with mock.patch.object(kernels, "fold_launch", wraps=kernels.fold_launch) as folds:
        assert_candidates_right(torch.randn(2, 1030, generator=generator()), 20)
    blocks = [call.args[0].shape[1] for call in folds.call_args_list]
    assert blocks == [17, 6]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [6, 40])
def test_half_precision_with_its_many_equals(dtype, k):
    assert_candidates_right(torch.randn(2, 700, generator=generator()).to(dtype), k)


@pytest.mark.parametrize("k", [1, 5, 20, 50])
def test_equals_by_lower_token(k):
    logits = torch.randint(0, 3, (4, 300), generator=generator()).float()
    logits[1] = 0.0
    logits[1, ::2] = -0.0
    logits[2, :280] = -INF
    tokens = assert_candidates_right(logits, k)[1]
    assert tokens[1].tolist() == [*range(k)]


@pytest.mark.parametrize("k", [1, 4, 40])
def test_rows_without_a_finite_logit_and_infinities(k):
    logits = torch.randn(5, 200, generator=generator())
    logits[0] = -INF
    logits[1, 7], logits[2, 100:] = -INF, -INF
    logits[3] = -INF
    logits[3, 150] = 3.0
    logits[4, 20] = INF
    probabilities, tokens = assert_candidates_right(logits, k)
    assert (probabilities[0] == 0).all() and tokens[0].tolist() == [*range(k)]
    assert probabilities[3, 0] == 1 and tokens[3].tolist() == [150, *range(k - 1)]
    assert tokens[4, 0] == 20 and probabilities[4].isnan().all()


@pytest.mark.parametrize("k", [3, 40])
def test_nan_is_the_largest_and_stays_in_its_row(k):
    logits = torch.randn(3, 200, generator=generator())
    logits[1, 150] = logits[1, 3] = NAN
    logits[2] = -INF
    logits[2, 9] = NAN
    probabilities, tokens = assert_candidates_right(logits, k)
    assert tokens[1, :2].tolist() == [3, 150] and probabilities[1:].isnan().all()
    assert probabilities[0].isfinite().all()


def test_any_strides_of_rows_and_huge_logits():
    logits = torch.randn(6, 300, generator=generator())
    for rows in (logits[::2, 11:290], logits[:1].expand(3, 300), logits.T[:40].T, logits * 1e30, logits - 1e6):
        assert_candidates_right(rows, 5)


def test_no_rows():
    assert [x.shape for x in contrastive_candidates(torch.empty(0, 9), 4, implementation="triton")] == [(0, 4)] * 2


# ------------------------------------------------------------------------------------------------------------ selection


def problem(b: int, k: int, t: int, d: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    candidates, context = (torch.randn(b, n, d, generator=generator(n)).to(dtype) for n in (k, t))
    logits = torch.randn(b, k, generator=generator(7))
    return [logits.softmax(1).sort(1, descending=True)[0], candidates, context]


def assert_selection_right(probabilities, candidates, context, valid=None, alpha: float = 0.6):
    found = contrastive_select(probabilities, candidates, context, valid, alpha=alpha, implementation="triton")
    wide = (x.double() for x in (probabilities, candidates, context))
    expected = contrastive_select(*wide, valid, alpha=alpha, implementation="reference")
    assert torch.equal(found.choice, expected.choice) and found.choice.dtype == torch.int64
    for name in ("score", "degeneration"):
        value = getattr(found, name)
        assert value.dtype == torch.float32 and relative_error(value, getattr(expected, name)) < 2e-6
    return found


@pytest.mark.parametrize("t", [1, 7, 130])
@pytest.mark.parametrize("k", [1, 5, 9, 40])
@pytest.mark.parametrize("with_valid", [False, True])
def test_choice_score_and_degeneration(t, k, with_valid):
    valid = torch.rand(3, t, generator=generator(1)) < 0.7 if with_valid else None
    assert_selection_right(*problem(3, k, t, 33), valid)


@pytest.mark.parametrize("alpha", [0, 0.1, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_alpha_and_dtypes(alpha, dtype):
    assert_selection_right(*problem(2, 6, 70, 40, dtype), alpha=alpha)


def test_probabilities_may_have_gaps_and_another_dtype():
    probabilities, candidates, context = problem(2, 6, 40, 16)
    assert_selection_right(probabilities.repeat_interleave(2, 1)[:, ::2], candidates, context)
    assert_selection_right(probabilities.half(), candidates, context)
    assert_selection_right(probabilities, candidates.half(), context.half()[:, 3:20])


def test_the_first_of_the_best():
    _, candidates, context = problem(2, 20, 40, 16)
    candidates = candidates[:, :1].expand(2, 20, 16)
    probabilities = torch.full((2, 20), 0.05)
    assert assert_selection_right(probabilities, candidates, context).choice.tolist() == [0, 0]
    probabilities[1, 17:] = 0.06
    assert assert_selection_right(probabilities, candidates, context).choice.tolist() == [0, 17]


def test_probability_zero_is_not_chosen_while_there_is_another():
    probabilities, candidates, context = problem(3, 5, 20, 8)
    probabilities[0] = 0.0
    probabilities[1, :4] = 0.0
    found = assert_selection_right(probabilities, candidates, context, alpha=1)
    assert found.choice[:2].tolist() == [0, 4] and (found.score[0] == -INF).all()


def test_no_context_and_no_penalty():
    probabilities, candidates, context = problem(2, 5, 20, 8)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1] = False
    found = assert_selection_right(probabilities, candidates, context, valid)
    assert (found.degeneration[1] == -INF).all() and found.choice[1] == 0
    assert (assert_selection_right(probabilities, candidates, context[:, :0]).degeneration == -INF).all()


def test_nan_comes_out_where_it_went_in():
    probabilities, candidates, context = problem(4, 5, 20, 8)
    probabilities[0, 3] = candidates[1, 2, 0] = context[2, 9, 1] = NAN
    found = assert_selection_right(probabilities, candidates, context)
    assert found.choice[:3].tolist() == [3, 2, 0]
    assert found.score.isnan().sum(1).tolist() == [1, 1, 5, 0]


def test_trace_names_it_and_runs_are_bit_identical():
    inputs, logits = problem(2, 5, 130, 40), torch.randn(2, 500, generator=generator())
    with trace() as ran:
        results = [
            (*contrastive_candidates(logits, 5, implementation="triton"),
             *contrastive_select(*inputs, alpha=0.6, implementation="triton"))
            for _ in range(2)
        ]  # fmt: skip
    assert {(choice.op, choice.implementation) for choice in ran} == {("contrastive_select", "triton")}
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
