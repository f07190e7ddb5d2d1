"""token_contrast_margin against golden values and dense float64 autograd: ragged sequences, padding, tiles, ends.

Tiles are mostly shrunk to 16 tokens, so that sequences of a hundred cross every boundary of the real ones (512).
"""

import json
import math
import subprocess
import sys
from unittest import mock

import pytest
import torch
from similarity import generator
from torch.nn import functional as F

import fastcontrast
from fastcontrast.ops import _workspace, set_workspace, token_contrast_margin, trace
from fastcontrast.testing import assert_as_good_as, relative_error

MODULE = sys.modules["fastcontrast.ops.token_contrast_margin"]
MARGINS = (0.5, 0.9, 1.5, 2.5)


def tiles(edge: int, whole: bool = False):
    """Tiles of `edge` tokens; `whole`: with padding multiplied as on a GPU."""
    changed = {"CPU_EDGE": edge, "SMALLEST_EDGE": 1}
    if whole:
        changed["_windows"] = lambda hidden, valid: [(0, hidden.shape[1])] * hidden.shape[0]
    return mock.patch.multiple(MODULE, **changed)


def tokens(b: int, s: int, d: int = 16, seed: int = 1) -> torch.Tensor:
    """Tokens around a common direction, as those of an anisotropic model are: cosines on both sides of 1 − margin."""
    shared = torch.randn(b, 1, d, generator=generator(seed))
    return 2 * torch.randn(b, s, d, generator=generator(seed + 1)) + shared


def evaluate(hidden: torch.Tensor, *arguments, call=token_contrast_margin, upstream: float = 3.0, **options):
    hidden = hidden.clone().requires_grad_()
    loss = call(hidden, *arguments, **options)
    return loss.detach(), *torch.autograd.grad(upstream * loss, hidden)


def truth(hidden: torch.Tensor, *arguments, **options):
    return evaluate(hidden.double(), *arguments, **options, implementation="reference")


def check(hidden: torch.Tensor, *arguments, **options) -> None:
    actual, exact = evaluate(hidden, *arguments, **options), truth(hidden, *arguments, **options)
    assert actual[0].dtype == torch.float32 and actual[1].dtype == hidden.dtype
    for x, y in zip(actual, exact, strict=True):
        assert relative_error(x, y) <= 1e-5


def masks(b: int, s: int) -> dict[str, torch.Tensor]:
    position = torch.arange(s)
    lengths = torch.tensor([s, 0, 1, max(s - 1, 0), 2, s // 2] * b)[:b].clamp(max=s)[:, None]
    return {
        "right": position < lengths,
        "left": position >= s - lengths,
        "holes": torch.rand(b, s, generator=generator(3)) < 0.6,
        "none": torch.zeros(b, s, dtype=torch.bool),
    }


# -------------------------------------------------------------------------------------------------------- the reference


def golden(dtype: torch.dtype) -> torch.Tensor:
    i, k = torch.arange(5, dtype=torch.float64)[:, None], torch.arange(8, dtype=torch.float64)
    return torch.stack([torch.sin(1 + c + 0.7 * i + 1.3 * k + 0.11 * i * k) for c in (0.0, 0.6)]).to(dtype)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 2e-6)], ids=str)
@pytest.mark.parametrize(
    ("margin", "loss", "norm"), [(0.5, 0.005002332791, 0.063891079547), (0.9, 0.161718296952, 0.076309864956)]
)
def test_golden_values(dtype, limit, margin, loss, norm):
    found, gradient = evaluate(golden(dtype), torch.tensor([5, 3]), margin=margin, upstream=1.0)
    assert float(found) == pytest.approx(loss, rel=limit)
    assert float(gradient.norm()) == pytest.approx(norm, rel=limit)
    assert (gradient[1, 3:] == 0).all()


def test_reference_equals_scalar_loops():
    hidden, lengths, margin = tokens(3, 5).double(), (5, 2, 4), 0.8
    total, pairs = 0.0, 0
    for text, length in zip(hidden, lengths, strict=True):
        for i in range(length):
            for j in range(length):
                if i != j:
                    cosine = float(text[i] @ text[j] / (text[i].norm() * text[j].norm()))
                    total, pairs = total + max(0.0, margin - 1 + cosine), pairs + 1
    for reduction, expected in (("mean", total / pairs), ("sum", total)):
        found = token_contrast_margin(hidden, torch.tensor(lengths), margin=margin, reduction=reduction)
        assert float(found) == pytest.approx(expected, rel=1e-12)


def simctg(hidden: torch.Tensor, lengths: torch.Tensor, margin: float) -> torch.Tensor:
    """The published loss, with the diagonal that it computes."""
    unit = hidden / hidden.norm(dim=2, keepdim=True)
    scores = unit @ unit.transpose(1, 2)
    losses = F.relu(margin - (scores.diagonal(dim1=1, dim2=2)[..., None] - scores))
    inside = torch.arange(hidden.shape[1]) < lengths[:, None]
    mask = (inside[:, None] & inside[:, :, None]).double() * (1 - torch.eye(hidden.shape[1]))
    return (losses * mask).sum() / mask.sum()


@pytest.mark.parametrize("margin", MARGINS)
def test_equals_the_published_loss(margin):
    hidden, lengths = tokens(4, 40).double(), torch.tensor([40, 3, 17, 0])
    expected = evaluate(hidden, lengths, margin, call=simctg)
    for implementation, dtype, limit in (("reference", torch.float64, 1e-12), ("torch", torch.float32, 1e-5)):
        actual = evaluate(hidden.to(dtype), lengths, margin=margin, implementation=implementation)
        for x, y in zip(actual, expected, strict=True):
            assert relative_error(x, y) <= limit


def test_reference_has_two_derivatives():
    def function(hidden):
        return token_contrast_margin(hidden, torch.tensor([4, 2]), margin=0.9, implementation="reference")

    inputs = tokens(2, 4, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


# ------------------------------------------------------------------------------------------- values and every gradient


@pytest.mark.parametrize("shape", [(1, 2), (3, 16), (2, 17), (7, 5), (2, 97), (30, 3), (1, 130)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ragged_shapes(shape, reduction):
    for edge in (16, 512):
        with tiles(edge):
            check(tokens(*shape), reduction=reduction, margin=0.8)


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("kind", ["right", "left", "holes", "none"])
@pytest.mark.parametrize("whole", [False, True])
def test_padding(kind, margin, whole):
    for shape in ((6, 5), (8, 61)):
        with tiles(16, whole):
            check(tokens(*shape), valid=masks(*shape)[kind], margin=margin)


def test_a_sequence_longer_than_a_real_tile():
    check(tokens(2, 1100), torch.tensor([1100, 530]), margin=0.7)


@pytest.mark.parametrize("width", [2, 3, 64, 4096])
def test_widths(width):
    with tiles(16):
        check(tokens(2, 33, width), margin=0.8)


def test_width_one_has_cosines_of_one_and_no_gradient():
    hidden = torch.tensor([2.0, -3.0, 1.0, 5.0]).view(1, 4, 1)
    loss, gradient = evaluate(hidden, margin=0.8)
    assert float(loss) == pytest.approx(0.8 * 6 / 12) and gradient.abs().max() < 1e-6
    assert evaluate(torch.ones(2, 4, 0))[0] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_dense_fp32_cosines(dtype):
    hidden = tokens(3, 97, 64).to(dtype)
    for margin in MARGINS:
        with tiles(16):
            actual = evaluate(hidden, margin=margin)
        naive = evaluate(hidden, margin=margin, implementation="reference")
        assert actual[1].dtype == dtype
        for ours, exact, theirs in zip(actual, truth(hidden, margin=margin), naive, strict=True):
            assert_as_good_as(ours, exact, theirs)


def test_lengths_are_a_mask_of_the_first():
    hidden, lengths = tokens(4, 33), torch.tensor([33, 1, 0, 12], dtype=torch.int32)
    both = [evaluate(hidden, lengths), evaluate(hidden, valid=torch.arange(33) < lengths[:, None])]
    assert all(torch.equal(x, y) for x, y in zip(*both, strict=True))


def test_permuted_tokens_and_scaled_vectors_change_nothing():
    hidden, order = tokens(2, 61), torch.randperm(61, generator=generator(4))
    factors = 0.1 + 10 * torch.rand(2, 61, 1, generator=generator(5))
    with tiles(16):
        loss, gradient = evaluate(hidden, margin=0.8)
        shuffled, moved = evaluate(hidden[:, order], margin=0.8)
        scaled, shrunk = evaluate(hidden * factors, margin=0.8)
    assert float(shuffled) == pytest.approx(float(loss), rel=1e-6)
    assert float(scaled) == pytest.approx(float(loss), rel=1e-6)
    assert relative_error(moved, gradient[:, order]) < 1e-5
    assert relative_error(shrunk * factors, gradient) < 1e-5
    assert float((hidden * gradient).sum(2).abs().max()) < 1e-6  # no gradient along the vector


# --------------------------------------------------------------------------------------------------- ends of the range


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_margin_zero_leaves_rounding(implementation):
    assert token_contrast_margin(tokens(3, 61), margin=0.0, implementation=implementation) == 0
    same = tokens(3, 1).expand(3, 61, 16)
    assert 0 <= token_contrast_margin(same, margin=0.0, implementation=implementation) < 1e-6


@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize("margin", MARGINS)
def test_identical_tokens_give_the_margin(implementation, margin):
    same = tokens(3, 1).expand(3, 61, 16)
    with tiles(16):
        loss = token_contrast_margin(same, torch.tensor([61, 2, 0]), margin=margin, implementation=implementation)
    assert float(loss) == pytest.approx(margin, rel=1e-6)


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 1, 4), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_without_a_pair_there_is_no_loss(shape, implementation):
    for reduction in ("mean", "sum"):
        hidden = torch.ones(shape)
        options = {"implementation": implementation, "reduction": reduction, "margin": 1.5}
        for more in ({}, {"lengths": torch.zeros(shape[0], dtype=torch.int64)}):
            loss, gradient = evaluate(hidden, **more, **options)
            assert loss == 0 and gradient.shape == shape and (gradient == 0).all()


def test_sequences_without_a_pair_do_not_count():
    hidden = tokens(4, 20)
    loss, gradient = evaluate(hidden, torch.tensor([20, 1, 0, 1]))
    alone, expected = evaluate(hidden[:1])
    assert torch.equal(loss, alone) and (gradient[1:] == 0).all()
    assert relative_error(gradient[:1], expected) < 1e-6


def test_vectors_without_a_direction():
    for size in (0.0, 1e-30, 1e-14):
        hidden = tokens(2, 33)
        hidden[:, 5] = size
        for margin in (0.5, 1.5):  # beyond 1 a cosine of 0 counts, and so does its gradient
            with tiles(16):
                check(hidden, margin=margin)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("edge", [16, 512])
def test_nan_stays_in_its_sequence(value, edge):
    hidden = tokens(3, 40)
    hidden[1, 30, 2] = value
    clean = evaluate(tokens(3, 40))[1]
    for implementation in ("torch", "reference"):
        with tiles(edge):
            loss, gradient = evaluate(hidden, implementation=implementation)
        assert loss.isnan()
        assert gradient[1].isnan().all() and relative_error(gradient[[0, 2]], clean[[0, 2]]) < 1e-5


@pytest.mark.parametrize("kind", ["right", "left", "holes"])
@pytest.mark.parametrize("whole", [False, True])
def test_nothing_is_read_from_padding(kind, whole):
    hidden, valid = tokens(6, 61), masks(6, 61)[kind]
    dirty = hidden.masked_fill(~valid[..., None], math.nan)
    for margin in (0.5, 1.5):
        for implementation in ("torch", "reference"):
            with tiles(16, whole):
                clean = evaluate(hidden, valid=valid, margin=margin, implementation=implementation)
                found = evaluate(dirty, valid=valid, margin=margin, implementation=implementation)
            assert all(torch.equal(x, y) for x, y in zip(clean, found, strict=True))
            assert (found[1][~valid] == 0).all()


def test_strided_and_expanded_inputs():
    hidden = tokens(3, 33)
    expected = evaluate(hidden)
    for strided in (
        hidden.mT.contiguous().mT,
        torch.cat([hidden] * 2, 2)[..., :16],
        hidden.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        for x, y in zip(evaluate(strided), expected, strict=True):
            assert relative_error(x, y) < 1e-6


def test_runs_are_bit_identical():
    hidden, lengths = tokens(5, 97), torch.tensor([97, 40, 96, 0, 3])
    with tiles(16):
        first, second = (evaluate(hidden, lengths) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


# ------------------------------------------------------------------------------------------------------ work and memory


def products(run) -> list[int]:
    """Multiplications of each product that `run` makes."""
    calls = []

    def counted(name):
        function = getattr(torch if name == "bmm" else torch.Tensor, name)

        def call(*arguments, **options):
            a, b = arguments[-2:]
            calls.append(a.numel() * b.shape[2])
            return function(*arguments, **options)

        return call

    with (
        mock.patch.object(torch, "bmm", counted("bmm")),
        mock.patch.object(torch.Tensor, "baddbmm_", counted("baddbmm_")),
    ):
        run()
    return calls


def test_tiles_below_the_diagonal_are_left_out():
    hidden, one = tokens(1, 64), 16 * 16 * 16
    with tiles(16):
        assert products(lambda: token_contrast_margin(hidden)) == [one] * 10
        assert products(lambda: evaluate(hidden)) == [one] * (10 + 16)
        assert products(lambda: token_contrast_margin(hidden.requires_grad_().detach())) == [one] * 10
    with tiles(20):  # 64 = 4 × 16, not 3 × 20 + 4
        assert products(lambda: token_contrast_margin(hidden.detach())) == [one] * 10


def test_short_sequences_share_a_product_and_padding_takes_none():
    with tiles(16):
        assert len(products(lambda: token_contrast_margin(tokens(16, 4)))) == 1
        assert len(products(lambda: token_contrast_margin(tokens(17, 4)))) == 2
        cut = products(lambda: token_contrast_margin(tokens(3, 64), torch.tensor([16, 1, 16])))
    assert cut == [16**3] * 2


@pytest.mark.parametrize("workspace", [0, 1 << 12, None])
def test_a_workspace_bounds_the_tile_and_changes_no_result(workspace):
    hidden, sizes = tokens(2, 300), []

    def noted(numel, device):
        sizes.append(numel)
        return torch.empty(numel, device=device)

    with mock.patch.object(MODULE, "_buffer", noted):
        actual = evaluate(hidden, workspace=workspace)
        set_workspace(workspace)
        try:
            again = evaluate(hidden)
        finally:
            set_workspace(None)
    assert sizes == [sizes[0], hidden.numel()] * 2
    assert sizes[0] <= (512**2 if workspace is None else 64**2)
    for x, y, exact in zip(actual, again, truth(hidden), strict=True):
        assert torch.equal(x, y) and relative_error(x, exact) < 1e-5


MEMORY = """
import json, torch
from fastcontrast.benchmarks._memory import peak_of
from fastcontrast.ops import token_contrast_margin

def step():
    return token_contrast_margin(hidden), *torch.autograd.grad(token_contrast_margin(hidden), hidden)

hidden = torch.randn(2, 600, 16, requires_grad=True)
step()
hidden = torch.randn(2, 4096, 16, requires_grad=True)
print(json.dumps(peak_of(step)[0]))
"""


def test_memory_is_that_of_a_tile():
    """4,096 tokens: one float32 matrix of the cosines of one sequence would be 64 MiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) < 8 << 20


# ----------------------------------------------------------------------------------------------- autograd and compilers


def test_a_second_backward_runs_again():
    hidden = tokens(2, 33).requires_grad_()
    loss = token_contrast_margin(hidden)
    first, second = (torch.autograd.grad(3 * loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert relative_error(first, second) == 0
    assert not token_contrast_margin(hidden.detach()).requires_grad
    with torch.no_grad():
        assert not token_contrast_margin(hidden).requires_grad


def test_a_second_derivative_is_refused():
    hidden = tokens(2, 9).requires_grad_()
    direct = torch.ops.fastcontrast.token_contrast_margin(hidden, None, 0.5, True, 0, True)[0]
    for loss in (token_contrast_margin(hidden), direct):
        with pytest.raises(NotImplementedError, match=r"^token_contrast_margin: .*implementation='reference' has one"):
            torch.autograd.grad(loss, hidden, create_graph=True)


def test_compiled_into_one_graph():
    hidden, lengths = tokens(3, 33), torch.tensor([33, 5, 0])
    compiled = torch.compile(token_contrast_margin, fullgraph=True, backend="aot_eager")
    evaluated, actual, expected = [], evaluate(hidden, lengths, call=compiled), evaluate(hidden, lengths)
    for x, y in zip(actual, expected, strict=True):
        assert relative_error(x, y) < 1e-6
    with torch.no_grad():
        assert len(products(lambda: evaluated.append(compiled(hidden, lengths)))) == 1  # no gradient
    assert float(evaluated[0]) == pytest.approx(float(expected[0]), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("need", [False, True])
def test_opcheck(need, dtype):
    hidden = tokens(3, 9).to(dtype).requires_grad_(need)
    for valid in (None, masks(3, 9)["right"]):
        arguments = (hidden, valid, 0.5, True, 1 << 20, need)
        torch.library.opcheck(torch.ops.fastcontrast.token_contrast_margin, arguments)


def test_autocast_does_not_round_cosines():
    hidden = tokens(3, 33)
    operation = torch.ops.fastcontrast.token_contrast_margin

    def results():
        dense = token_contrast_margin(hidden, implementation="reference")
        return *evaluate(hidden), operation(hidden, None, 0.5, True, 0, False)[0], dense

    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = results()
    assert all(torch.equal(x, y) for x, y in zip(actual, results(), strict=True))


def test_it_needs_no_native_core():
    hidden = tokens(2, 700)
    with mock.patch.object(MODULE, "native", None), mock.patch.object(_workspace, "native", None):
        actual = evaluate(hidden)
    assert all(torch.equal(x, y) for x, y in zip(actual, evaluate(hidden), strict=True))


def test_what_runs():
    with trace() as ran:
        token_contrast_margin(tokens(2, 3))
        token_contrast_margin(tokens(2, 3).double())
    assert [(choice.op, choice.implementation) for choice in ran] == [
        ("token_contrast_margin", "torch"),
        ("token_contrast_margin", "reference"),
    ]
    assert "float64" in ran[1].refused["torch"]
    with pytest.raises(
        NotImplementedError, match="'torch' cannot run: it takes float32, bfloat16 or float16, got float64"
    ):
        token_contrast_margin(tokens(2, 3).double(), implementation="torch")


# ------------------------------------------------------------------------------------------------- the module and doors


def test_the_module_is_the_function():
    hidden, lengths = tokens(2, 9), torch.tensor([9, 4])
    module = fastcontrast.TokenContrastLoss(margin=0.8, reduction="sum")
    expected = fastcontrast.token_contrast_margin(hidden, lengths, margin=0.8, reduction="sum")
    assert torch.equal(module(hidden, lengths), expected)
    assert torch.equal(module(hidden, valid=torch.arange(9) < lengths[:, None]), expected)
    assert repr(module) == "TokenContrastLoss(margin=0.8, reduction='sum')"
    assert fastcontrast.TokenContrastLoss().margin == 0.5
    with pytest.raises(TypeError, match=r"TokenContrastLoss: settings must be among .*, got scale"):
        fastcontrast.TokenContrastLoss(scale=1.0)


H = torch.zeros(4, 6, 8)
ALL = torch.ones(4, 6, dtype=torch.bool)
REFUSED = {
    "hidden: list": (TypeError, "hidden must be a tensor, got list", {"hidden": [1.0]}),
    "hidden: integers": (TypeError, "hidden must be float32.* got int64", {"hidden": H.long()}),
    "hidden: matrix": (ValueError, r"hidden must be \[B, S, D\], got \[6, 8\]", {"hidden": H[0]}),
    "lengths: list": (TypeError, "lengths must be a tensor, got list", {"lengths": [1, 2, 3, 4]}),
    "lengths: floating": (TypeError, "lengths must be an integer tensor, got float32", {"lengths": torch.ones(4)}),
    "lengths: number": (ValueError, r"lengths must be \[4\], got \[6\]", {"lengths": torch.arange(6)}),
    "lengths: too long": (ValueError, r"lengths must lie in \[0, 7\), got .*\[4, 7\]", {"lengths": torch.arange(4, 8)}),
    "lengths: negative": (ValueError, r"lengths must lie in \[0, 7\), got .*-1, 2", {"lengths": torch.arange(-1, 3)}),
    "valid: numbers": (TypeError, "valid must be a bool tensor, got int64", {"valid": ALL.long()}),
    "valid: list": (TypeError, "valid must be a bool tensor, got list", {"valid": [True]}),
    "valid: shape": (ValueError, r"valid must be \[4, 6\], got \[6, 4\]", {"valid": ALL.T}),
    "valid: device": (ValueError, "valid must be on cpu like hidden, got meta", {"valid": ALL.to("meta")}),
    "both": (ValueError, "lengths and valid cannot go together", {"valid": ALL, "lengths": torch.arange(4)}),
    "margin: text": (TypeError, "margin must be a number, got str", {"margin": "0.5"}),
    "margin: infinite": (ValueError, "margin must be finite, got inf", {"margin": math.inf}),
    "reduction": (ValueError, "reduction must be one of 'mean', 'sum', got 'none'", {"reduction": "none"}),
    "workspace": (ValueError, "workspace must be at least 0 bytes, got -1", {"workspace": -1}),
    "implementation": (ValueError, "implementation must be one of torch, reference.* 'cpu'", {"implementation": "cpu"}),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changed"), REFUSED.values(), ids=REFUSED)
def test_refused_at_the_door(error, message, changed):
    with pytest.raises(error, match=f"^token_contrast_margin: {message}"):
        token_contrast_margin(**{"hidden": H, **changed})
