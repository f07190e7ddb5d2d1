"""similarity_mix with implementation="triton", in the interpreter; its schedule alone is in test_kernels_mix.py."""

import pytest
import torch
from interpreter import tiles
from similarity import biased, unit
from test_similarity_mix import ALL, accurate, measured, with_values

from fastcontrast.ops import similarity_mix, trace
from fastcontrast.testing import relative_error

TRITON = {"implementation": "triton"}
# Of numbers that a mask throws away.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("needs", [("values",), ("queries",), ("keys", "scale"), ("key_bias",), ALL], ids=" ".join)
def test_value_and_the_gradients_needed(needs):
    with tiles(), trace() as ran:
        accurate(with_values(biased(61, 97, 33), 16), {}, needs, strict=True, **TRITON)
    assert ran[0].implementation == "triton"


OPTIONS = {
    "ids": {"query_ids": torch.arange(61) % 3, "key_ids": torch.arange(97) % 2},
    "nothing left in some rows": {
        "query_ids": torch.arange(61) % 3,
        "key_ids": torch.zeros(97).long(),
        "positives": -1,
    },
    "guide": {"guide": (unit(61, 4, 7), unit(97, 4, 8), 0.3), "positives": torch.arange(61).flip(0)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_masks(options):
    with tiles():
        accurate(with_values(biased(61, 97, 33), 16), options, strict=True, **TRITON)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Weights round to 11 bits before a result rounds to its own 8 or 11."""
    inputs = with_values(biased(129, 97, 64, dtype), 33)
    with tiles():
        actual = measured(inputs, {}, **TRITON)
    truth = measured(inputs, {}, dtype=torch.float64, implementation="reference")
    for name, exact in truth.items():
        assert relative_error(actual[name], exact) < (2.0**-8 if dtype == torch.bfloat16 else 2.0**-10), name
        if name.startswith("d"):
            assert actual[name].dtype == inputs[name[1:]].dtype


def test_strides_and_autocast():
    inputs = with_values(biased(40, 50, 16), 16)
    with tiles():
        expected = measured(inputs, {}, **TRITON)
        with torch.autocast("cpu", torch.bfloat16):
            actual = measured(inputs, {}, **TRITON)
        assert all(torch.equal(actual[name], x) for name, x in expected.items())
        q, k, v = (torch.cat([inputs[name]] * 2, 1)[:, 16:] for name in ("queries", "keys", "values"))
        strided = similarity_mix(q, k, v, inputs["scale"], key_bias=inputs["key_bias"], **TRITON)
        spread = similarity_mix(q[:1].expand(40, 16), k[:1].expand(50, 16), v[:1].expand(50, 16), **TRITON)
    assert torch.equal(strided, expected["value 0"])
    assert relative_error(spread, v[:1].expand(40, 16)) < 1e-6


def test_empty_matrices():
    for m, n in ((3, 0), (0, 5)):
        with tiles():
            results = measured(with_values(biased(m, n, 4), 2), {}, **TRITON)
        assert all((x == 0).all() for name, x in results.items() if name != "value 1")


def test_a_second_derivative_is_refused():
    q, k, v = (unit(rows, 4, rows).requires_grad_() for rows in (7, 9, 9))
    with tiles():
        (gradient,) = torch.autograd.grad(similarity_mix(q, k, v, **TRITON).sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"^similarity_mix: .*reference"):
            gradient.square().sum().backward()
