"""The candidates of a step and the choice among them: reference, CPU path, ties, and what is no number."""

import pytest
import torch
from golden_decoding import F

from fastcontrast import ops
from fastcontrast.ops import contrastive_candidates, contrastive_select

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOTH = pytest.mark.parametrize("implementation", ["cpu", "reference"])
PROBABILITIES = torch.tensor([[0.421831853559, 0.379802470645, 0.099035746695, 0.054941656664]], dtype=torch.float64)
SCORES = torch.tensor([[-0.366860366032, -0.350305598987, -0.487552500426, -0.470477388869]], dtype=torch.float64)


def golden_step(dtype, implementation):
    valid = torch.ones(1, 6, dtype=torch.bool)
    valid[0, 0] = False
    p, tokens = contrastive_candidates((3 * F(1, 7, 0.3)).to(dtype), 4, implementation=implementation)
    hidden, context = F(4, 8, 0.6)[None].to(dtype), F(6, 8, 0)[None].to(dtype)
    return p, tokens, contrastive_select(p, hidden, context, valid, alpha=0.6, implementation=implementation)


@pytest.mark.parametrize(("dtype", "implementation"), [(torch.float64, "reference"), (torch.float32, "cpu")])
def test_golden_values(dtype, implementation):
    p, tokens, selection = golden_step(dtype, implementation)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-6
    assert tokens.tolist() == [[5, 0, 1, 6]] and selection.choice.tolist() == [1]
    torch.testing.assert_close(p.double(), PROBABILITIES, rtol=0, atol=tolerance)
    torch.testing.assert_close(selection.score.double(), SCORES, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "v", "k"), [(1, 1, 1), (1, 50257, 5), (3, 130, 8), (2, 9, 9), (4, 1030, 200)])
def test_candidates(b, v, k, dtype):
    logits = (4 * torch.randn(b, v, generator=torch.Generator().manual_seed(0))).to(dtype)
    p, tokens = contrastive_candidates(logits, k, implementation="cpu")
    want = logits.double().softmax(1)
    assert p.dtype == torch.float32 and tokens.shape == (b, k)
    order = torch.argsort(logits.double(), dim=1, descending=True, stable=True)[:, :k]
    assert torch.equal(tokens, order)
    torch.testing.assert_close(p.double(), want.gather(1, order), rtol=1e-5, atol=1e-9)


@BOTH
def test_candidates_in_order(implementation):
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0], [-inf, 0.0, -inf, -inf], [-inf] * 4, [0.0, nan, 1.0, nan]])
    p, tokens = contrastive_candidates(logits, 3, implementation=implementation)
    assert tokens.tolist() == [[1, 2, 0], [1, 0, 2], [0, 1, 2], [1, 3, 2]]
    assert p[1].tolist() == [1.0, 0.0, 0.0] and p[2].tolist() == [0.0] * 3 and p[3].isnan().all()
    strided = torch.randn(3, 20)[:, 3:17]
    got = contrastive_candidates(strided, 4, implementation=implementation)
    assert torch.equal(got[1], strided.topk(4).indices)
    assert contrastive_candidates(torch.zeros(0, 5), 2, implementation=implementation)[1].shape == (0, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "k", "t", "d"), [(1, 5, 130, 64), (3, 4, 33, 40), (2, 9, 5, 15)])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_selection(b, k, t, d, dtype, alpha):
    generator = torch.Generator().manual_seed(1)
    hidden, context = (torch.randn(b, n, d, generator=generator).to(dtype) for n in (k, t))
    p, valid = torch.rand(b, k, generator=generator), torch.rand(b, t, generator=generator) < 0.8
    got = contrastive_select(p, hidden, context, valid, alpha=alpha, implementation="cpu")
    want = contrastive_select(p.double(), hidden.double(), context.double(), valid, alpha=alpha)
    assert torch.equal(got.choice, want.choice)
    torch.testing.assert_close(got.score.double(), want.score, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.degeneration.double(), want.degeneration, rtol=0, atol=1e-6)


@BOTH
def test_ties_go_to_the_first_and_probability_zero_loses(implementation):
    same, context = torch.ones(2, 3, 4), torch.ones(2, 5, 4)
    p = torch.tensor([[0.2, 0.2, 0.2], [0.0, 0.1, 0.0]])
    got = contrastive_select(p, same, context, alpha=1.0, implementation=implementation)
    assert got.choice.tolist() == [0, 1] and got.score[1, 0] == -torch.inf
    none = contrastive_select(torch.zeros(2, 3), same, context, alpha=0.5, implementation=implementation)
    assert none.choice.tolist() == [0, 0]


@BOTH
def test_a_row_without_context_has_no_penalty(implementation):
    hidden, context = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    valid = torch.tensor([[False] * 5, [True] * 5])
    p = torch.tensor([[0.1, 0.5, 0.2], [0.3, 0.2, 0.1]])
    got = contrastive_select(p, hidden, context, valid, alpha=0.6, implementation=implementation)
    assert got.choice[0] == 1 and got.degeneration[0].tolist() == [-torch.inf] * 3
    torch.testing.assert_close(got.score[0], 0.4 * p[0])


@BOTH
def test_nan_is_seen(implementation):
    hidden, context = torch.randn(1, 3, 4), torch.randn(1, 5, 4)
    hidden[0, 1] = torch.nan
    got = contrastive_select(torch.full((1, 3), 0.2), hidden, context, alpha=0.6, implementation=implementation)
    assert got.choice.tolist() == [1] and got.score[0].isnan().tolist() == [False, True, False]


def test_gradients_registration_and_compilation():
    p, hidden, context = torch.rand(2, 3), torch.randn(2, 3, 8), torch.randn(2, 7, 8)
    with ops.trace() as ran:
        contrastive_select(p, hidden.clone().requires_grad_(), context, alpha=0.5)
    assert ran[0].implementation == "reference"
    for args in ((torch.randn(2, 9), 3, "cpu"),):
        torch.library.opcheck(torch.ops.fastcontrast.contrastive_candidates, args)
    torch.library.opcheck(torch.ops.fastcontrast.contrastive_select, (p, hidden, context, None, 0.5, "cpu"))

    def step(logits):
        p, tokens = contrastive_candidates(logits, 3)
        chosen = contrastive_select(p, hidden, context, alpha=0.6).choice
        return tokens.gather(1, chosen[:, None])

    logits = torch.randn(2, 50)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(logits), step(logits))


HIDDEN, CONTEXT, P = torch.zeros(2, 3, 8), torch.zeros(2, 4, 8), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: contrastive_candidates(torch.zeros(5), 2), ValueError, r"logits must be \[B, V\], got \[5\]"),
        (lambda: contrastive_candidates(torch.zeros(1, 5), 6), ValueError, r"k must lie in \[1, 5\], the vocabulary"),
        (lambda: contrastive_candidates(torch.zeros(1, 5), 0), ValueError, r"k must lie in \[1, 5\]"),
        (lambda: contrastive_candidates(torch.zeros(1, 5), 1.0), TypeError, "k must be an integer, got float"),
        (lambda: contrastive_select(P, HIDDEN, CONTEXT, alpha=1.1), ValueError, r"alpha must lie in \[0, 1\], got 1.1"),
        (
            lambda: contrastive_select(P[:, :2], HIDDEN, CONTEXT, alpha=0.5),
            ValueError,
            r"probabilities must be \[2, 3\]",
        ),
        (lambda: contrastive_select(P[:, :0], HIDDEN[:, :0], CONTEXT, alpha=0.5), ValueError, "at least one a row"),
        (
            lambda: contrastive_select(P, HIDDEN, CONTEXT[..., :7], alpha=0.5),
            ValueError,
            r"context must be \[2, T, 8\]",
        ),
        (lambda: contrastive_select(P, HIDDEN, CONTEXT, CONTEXT, alpha=0.5), TypeError, "valid must be a bool tensor"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=f"contrastive_select: .*{message}"):
        call()
