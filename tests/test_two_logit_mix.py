"""Two distributions to one: the reference against the formulas, the CPU path against the reference in float64."""

import math

import pytest
import torch
from golden_decoding import F
from torch.nn import functional

from fastcontrast import ops
from fastcontrast.ops import two_logit_mix

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOTH = pytest.mark.parametrize("implementation", ["cpu", "reference"])
LN2 = math.log(2)
VARIANTS = {
    "adacad": {},
    "floor": {"floor": 0.3},
    "cad": {"weight": 0.5, "divergence": True},
    "negative": {"weight": -0.5},
    "contrastive decoding": {"weight": 2.0, "keep": 1.0, "plausibility": 0.1},
    "dola": {"weight": 1.0, "keep": 1.0, "plausibility": 0.1, "divergence": True},
}


def pair(rows, vocabulary, dtype=torch.float32, apart=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z1, noise = (torch.randn(rows, vocabulary, generator=generator) for _ in range(2))
    return (4 * z1).to(dtype), (4 * z1 + apart * noise).to(dtype)


def formula(z1, z0, weight=None, keep=None, floor=0.0, plausibility=0.0, divergence=False):
    """Straight from the equation, for finite logits."""
    p, q = z1.softmax(1), z0.softmax(1)
    m = ((p + q) / 2).log()
    jsd = (functional.kl_div(m, p, reduction="none").sum(1) + functional.kl_div(m, q, reduction="none").sum(1)) / 2
    a = jsd.clamp(min=floor) if weight is None else torch.full_like(jsd, weight)
    mixed = (1 + a if keep is None else torch.full_like(a, keep))[:, None] * z1 - a[:, None] * z0
    if plausibility:
        mixed = mixed.masked_fill(p < plausibility * p.amax(1, keepdim=True), -torch.inf)
    return mixed.log_softmax(1), a, jsd


@pytest.mark.parametrize(("dtype", "implementation"), [(torch.float64, "reference"), (torch.float32, "cpu")])
def test_golden_values(dtype, implementation):
    z1, z0 = (3 * F(2, 6, 0)).to(dtype), (3 * F(2, 6, 0.6)).to(dtype)
    close = {"rtol": 0, "atol": 1e-10 if dtype == torch.float64 else 3e-6}

    def same(got, want):
        torch.testing.assert_close(got.double(), torch.tensor(want, dtype=torch.float64), **close)

    mix = two_logit_mix(z1, z0, implementation=implementation)
    same(mix.divergence, [0.056153692381, 0.067399180094])
    row = [2.497778817057, 2.322433740100, -1.255282206987, -2.994006780025, -0.346504406115, 2.808627734527]
    same(mix.log_probabilities[0] + 3.688512185453, row)
    assert mix.log_probabilities.argmax(1).tolist() == [5, 0]
    raw = (1 + mix.weight[:, None]) * z1 - mix.weight[:, None] * z0
    same((raw - mix.log_probabilities)[:, 0], [3.688512185453, 3.755606793385])
    floored = two_logit_mix(z1, z0, floor=0.3, implementation=implementation)
    raw = 1.3 * z1 - 0.3 * z0
    same((raw - floored.log_probabilities)[:, 0], [3.754243818353, 3.899982962343])

    decoding = two_logit_mix(z1, z0, 2.0, keep=1.0, plausibility=0.1, implementation=implementation)
    plausible = decoding.log_probabilities > -torch.inf
    assert [row.nonzero()[:, 0].tolist() for row in plausible] == [[0, 1, 5], [0, 4, 5]]
    for i, scores in enumerate(
        ([0.463422463894, 4.738070788966, 0.931112192973], [1.763686069819, -0.102511739038, 4.688845030447])
    ):
        scores = torch.tensor(scores, dtype=torch.float64)
        same(decoding.log_probabilities[i][plausible[i]], scores.log_softmax(0).tolist())


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_reference_is_the_formula(variant):
    z1, z0 = pair(5, 300, torch.float64)
    mix, want = two_logit_mix(z1, z0, **variant, implementation="reference"), formula(z1, z0, **variant)
    torch.testing.assert_close(mix.log_probabilities, want[0])
    torch.testing.assert_close(mix.weight, want[1])
    if mix.divergence is not None:
        torch.testing.assert_close(mix.divergence, want[2])
    assert (mix.divergence is None) == ("weight" in variant and not variant.get("divergence"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (2, 7), (3, 64), (3, 1031), (1, 50257), (9, 130)])
def test_it_equals_the_reference(rows, vocabulary, variant, dtype):
    for apart in (0.01, 1.0, 10.0):
        z1, z0 = pair(rows, vocabulary, dtype, apart)
        mix = two_logit_mix(z1, z0, **variant, implementation="cpu")
        want = two_logit_mix(z1.double(), z0.double(), **variant)
        finite = want.log_probabilities > -torch.inf
        assert torch.equal(mix.log_probabilities > -torch.inf, finite)
        size = want.log_probabilities[finite].abs().amax().item() if finite.any() else 1.0
        got = mix.log_probabilities.double()
        torch.testing.assert_close(got[finite], want.log_probabilities[finite], rtol=0, atol=1e-6 * max(10.0, size))
        torch.testing.assert_close(mix.weight.double(), want.weight, rtol=1e-5, atol=1e-7)
        if want.divergence is not None:
            torch.testing.assert_close(mix.divergence.double(), want.divergence, rtol=1e-5, atol=1e-7)


@BOTH
def test_properties_of_the_divergence(implementation):
    z1, z0 = pair(4, 500)

    def jsd(a, b):
        return two_logit_mix(a, b, 0.0, divergence=True, implementation=implementation).divergence

    torch.testing.assert_close(jsd(z1, z0), jsd(z0, z1))
    torch.testing.assert_close(jsd(z1 + 3, z0 - 7), jsd(z1, z0), rtol=1e-4, atol=1e-7)
    assert jsd(z1, z1).tolist() == [0.0] * 4
    one = torch.full((1, 9), -100.0)
    other = one.clone()
    one[0, 2], other[0, 5] = 100.0, 100.0
    torch.testing.assert_close(jsd(one, other), torch.tensor([LN2]))
    assert (jsd(z1, z0) >= 0).all() and (jsd(z1, z0) <= LN2 + 1e-6).all()


@BOTH
def test_equal_rows_mix_to_themselves(implementation):
    z1, _ = pair(3, 200)
    mix = two_logit_mix(z1, z1.clone(), implementation=implementation)
    assert mix.weight.tolist() == [0.0] * 3
    torch.testing.assert_close(mix.log_probabilities, z1.log_softmax(1))
    constant = two_logit_mix(z1, torch.full_like(z1, 2.5), 1.5, implementation=implementation)
    torch.testing.assert_close(constant.log_probabilities, (2.5 * z1).log_softmax(1), rtol=1e-5, atol=1e-5)


@BOTH
@pytest.mark.parametrize("variant", [{}, {"weight": 0.7, "divergence": True}])
def test_banned_tokens(implementation, variant):
    """−inf in z₁ stays; −inf in z₀ alone counts as that row's smallest finite logit; and −inf in both is no NaN."""
    z1, z0 = pair(2, 12)
    z1[0, 3], z0[0, 3] = -torch.inf, -torch.inf
    z1[0, 4], z0[0, 5] = -torch.inf, -torch.inf
    mix = two_logit_mix(z1, z0, **variant, implementation=implementation)
    out = mix.log_probabilities
    assert (out[0] == -torch.inf).nonzero()[:, 0].tolist() == [3, 4] and not out.isnan().any()
    p, q = z1[:1].double().softmax(1), z0[:1].double().softmax(1)
    m = (p + q) / 2
    terms = [torch.where(x > 0, x * (x / m).log(), 0.0).nan_to_num() for x in (p, q)]
    torch.testing.assert_close(mix.divergence[:1].double(), (terms[0] + terms[1]).sum(1) / 2, rtol=1e-5, atol=1e-7)
    a = mix.weight[0].item()
    filled = z0[0].masked_fill(z0[0] == -torch.inf, z0[0][z0[0] > -torch.inf].min())
    want = ((1 + a) * z1[0].masked_fill(z1[0] == -torch.inf, 0) - a * filled).masked_fill(
        z1[0] == -torch.inf, -torch.inf
    )
    torch.testing.assert_close(out[0], want.log_softmax(0), rtol=1e-5, atol=1e-5)


@BOTH
def test_rows_without_a_finite_logit_and_nan(implementation):
    z1, z0 = pair(4, 9)
    z1[0], z0[1], z1[2, 4] = -torch.inf, -torch.inf, torch.nan
    mix = two_logit_mix(z1, z0, implementation=implementation)
    assert (mix.log_probabilities[0] == -torch.inf).all()
    assert not mix.log_probabilities[1].isnan().any() and not mix.log_probabilities[3].isnan().any()
    assert mix.log_probabilities[2].isnan().all() and mix.divergence[2].isnan()
    assert not mix.divergence[[0, 1, 3]].isnan().any()
    z1, z0 = pair(1, 9)
    z1[0, 2], z0[0, 2], z0[0, 5] = -torch.inf, torch.nan, -torch.inf  # what −inf counts as is no number either
    assert two_logit_mix(z1, z0, 0.5, implementation=implementation).log_probabilities.isnan().any()


@BOTH
def test_weights_of_rows_and_plausibility(implementation):
    z1, z0 = pair(3, 40)
    rows = torch.tensor([0.0, 0.5, 2.0])
    mix = two_logit_mix(z1, z0, rows, implementation=implementation)
    for i, a in enumerate(rows.tolist()):
        alone = two_logit_mix(z1[i : i + 1], z0[i : i + 1], a, implementation=implementation)
        torch.testing.assert_close(mix.log_probabilities[i], alone.log_probabilities[0])
    torch.testing.assert_close(mix.log_probabilities[0], z1[0].log_softmax(0))
    only = two_logit_mix(z1, z0, 1.0, plausibility=1.0, implementation=implementation).log_probabilities
    assert torch.equal((only > -torch.inf).int().argmax(1), z1.argmax(1)) and ((only == 0).sum(1) == 1).all()


def test_strides_and_determinism():
    z1, z0 = pair(4, 90)
    want = two_logit_mix(z1[::2, 5:77].contiguous(), z0[1::2, 5:77].contiguous())
    got = two_logit_mix(z1[::2, 5:77], z0[1::2, 5:77])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    columns = two_logit_mix(z1.t()[:4], z0.t()[:4])
    torch.testing.assert_close(columns.log_probabilities, two_logit_mix(z1.t()[:4].clone(), z0.t()[:4].clone())[0])
    big = pair(1, 100_003)
    first = two_logit_mix(*big)
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, two_logit_mix(*big), strict=True))
    assert two_logit_mix(z1[:0], z0[:0]).log_probabilities.shape == (0, 90)


def test_guidance_and_cad_agree():
    """CAD with a is guidance with 1 + a, whose log-probabilities differ by a row's constant."""
    z1, z0 = pair(6, 300)
    guided = z0.log_softmax(1) + 1.8 * (z1.log_softmax(1) - z0.log_softmax(1))
    mix = two_logit_mix(z1, z0, 0.8).log_probabilities
    torch.testing.assert_close(mix, guided.log_softmax(1), rtol=1e-4, atol=1e-4)
    assert torch.equal(mix.argmax(1), guided.argmax(1))


def test_gradients_registration_and_compilation():
    z1, z0 = pair(2, 30)
    with ops.trace() as ran:
        out = two_logit_mix(z1.clone().requires_grad_(), z0)
    assert ran[0].implementation == "reference" and out.log_probabilities.requires_grad
    with pytest.raises(NotImplementedError, match="no backward"):
        two_logit_mix(z1.clone().requires_grad_(), z0, implementation="cpu")
    arguments = (z1, z0, torch.rand(2), math.nan, 0.0, -math.inf, True, "cpu")
    torch.library.opcheck(torch.ops.fastcontrast.two_logit_mix, arguments)
    compiled = torch.compile(lambda a, b: two_logit_mix(a, b).log_probabilities, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(z1, z0), two_logit_mix(z1, z0).log_probabilities)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(5)}, ValueError, r"logits must be \[R, V\], got \[5\]"),
        ({"contrast": torch.zeros(2, 6)}, ValueError, r"contrast must be \[2, 5\] like logits, of the same vocabulary"),
        (
            {"contrast": torch.zeros(2, 5).double()},
            ValueError,
            "contrast must be float32 on cpu like logits, got float64",
        ),
        ({"weight": "much"}, TypeError, r"weight must be a number, a tensor \[2\] or None, got str"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight must be a number or \[2\], got \[3\]"),
        ({"floor": -0.1}, ValueError, r"floor must lie in \[0, inf\], got -0.1"),
        ({"plausibility": 1.5}, ValueError, r"plausibility must lie in \[0, 1\], got 1.5"),
        ({"implementation": "triton"}, NotImplementedError, "'triton' cannot run"),
    ],
)
def test_errors(change, error, message):
    problem = {"logits": torch.zeros(2, 5), "contrast": torch.zeros(2, 5), **change}
    with pytest.raises(error, match=f"two_logit_mix: .*{message}"):
        two_logit_mix(**problem)
