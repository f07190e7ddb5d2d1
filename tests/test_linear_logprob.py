"""linear_logprob against log_softmax of dense logits, for any upstream gradient."""

import pytest
import torch
from language import LEAVES, head, named, targets
from similarity import assert_accurate, evaluate, generator, one_sign, tiles

from fastcontrast.ops import linear_cross_entropy, linear_logprob, trace
from fastcontrast.testing import relative_error

call = named(linear_logprob)
SIZES = [(1, 1, 1), (1, 7, 3), (5, 1, 4), (13, 33, 7), (64, 65, 16), (67, 131, 61), (130, 257, 24)]
UPSTREAM = {
    "of one sign": one_sign,
    "of both signs": lambda i, shape: torch.randn(shape, generator=generator(i)),
    "mostly zero": lambda i, shape: (torch.arange(shape[0]) % 7 == i).float(),
    "expanded from a scalar": lambda i, shape: torch.tensor(1.0 / 3).expand(shape),
    "of the first output only": lambda i, shape: one_sign(i, shape) if i == 0 else None,
    "of the second output only": lambda i, shape: one_sign(i, shape) if i == 1 else None,
}


@pytest.mark.parametrize("return_lse", [False, True])
def test_reference_is_log_softmax_of_dense_logits(return_lse):
    inputs = {name: x.double() for name, x in head(20, 11, 6).items()}
    y = targets(20, 11)
    results = call(**inputs, targets=y, return_lse=return_lse, implementation="reference")
    logits = inputs["queries"] @ inputs["keys"].T + inputs["key_bias"]
    expected = logits.log_softmax(1).gather(1, y.clamp(min=0)[:, None])[:, 0].masked_fill(y < 0, 0.0)
    logprob, lse = results if return_lse else (results, None)
    torch.testing.assert_close(logprob, expected, rtol=1e-12, atol=1e-12)
    if return_lse:
        torch.testing.assert_close(lse, logits.logsumexp(1).masked_fill(y < 0, 0.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("workspace", [0, 4 * 257 * 20, None])
def test_values_and_every_gradient(shape, workspace):
    t, v, d = shape
    with tiles(16, 32):
        options = {"targets": targets(t, v), "return_lse": True, "workspace": workspace}
        assert_accurate(head(t, v, d), options, needs=LEAVES, call=call, magnitude=1.0)


@pytest.mark.parametrize("upstream", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("needs", [LEAVES, ("queries",)], ids=["all", "frozen vocabulary"])
def test_any_upstream_gradient(upstream, needs):
    options = {"targets": targets(67, 131), "return_lse": True}
    with tiles(16, 32):
        assert_accurate(head(67, 131, 16), options, needs=needs, call=call, upstream=upstream, magnitude=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_dense_fp32_logits(dtype):
    with tiles(16, 32):
        options = {"targets": targets(130, 257), "return_lse": True}
        assert_accurate(head(130, 257, 64, dtype), options, needs=LEAVES, call=call)


def test_is_what_cross_entropy_averages():
    inputs, y = head(40, 31, 8), targets(40, 31)
    logprob = call(**inputs, targets=y)
    assert (logprob[y < 0] == 0).all() and (logprob[y >= 0] < 0).all()
    named_loss = named(linear_cross_entropy)
    assert named_loss(**inputs, targets=y).item() == pytest.approx(-logprob.sum().item() / (y >= 0).sum().item())
    assert torch.equal(named_loss(**inputs, targets=y, reduction="none"), -logprob)


def test_any_leading_shape():
    inputs, y = head(24, 31, 8), targets(24, 31)
    flat = call(**inputs, targets=y, return_lse=True)
    h = inputs["queries"].view(2, 3, 4, 8)
    shaped = linear_logprob(h, inputs["keys"], y.view(2, 3, 4), bias=inputs["key_bias"], return_lse=True)
    for a, b in zip(shaped, flat, strict=True):
        assert torch.equal(a, b.view(2, 3, 4))


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_nothing_left_gives_zero_and_gradients_of_zero(implementation):
    inputs = {name: x.requires_grad_() for name, x in head(7, 5, 3).items()}
    values = call(**inputs, targets=torch.full((7,), -100), return_lse=True, implementation=implementation)
    assert all((x == 0).all() for x in values)
    for gradient in torch.autograd.grad(sum(x.sum() for x in values), inputs.values()):
        assert (gradient == 0).all()


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (4, 5, 0)], ids=str)
def test_empty_sizes(shape):
    t, v, d = shape
    inputs = {name: x.requires_grad_() for name, x in head(t, v, d).items()}
    logprob = call(**inputs, targets=torch.zeros(t).long() if v else torch.full((t,), -100))
    gradients = torch.autograd.grad(logprob.sum(), inputs.values())
    assert logprob.shape == (t,) and logprob.isfinite().all() and all(g.isfinite().all() for g in gradients)


def test_nan_comes_out_in_its_token_alone():
    inputs, y = head(20, 31, 8), targets(20, 31, ignored=0.0)
    inputs["queries"][3, 0] = float("nan")
    assert call(**inputs, targets=y).isnan().tolist() == [i == 3 for i in range(20)]
    y[3] = -100
    results = evaluate(inputs, {"targets": y}, needs=LEAVES, call=call)
    assert all(x.isfinite().all() for x in results.values())


def test_compiles_without_a_break():
    inputs, y = head(20, 31, 8), targets(20, 31)

    def step(queries, keys, key_bias):
        return call(queries, keys, key_bias, targets=y, return_lse=True)

    leaves = [x.requires_grad_() for x in inputs.values()]
    results = step(*leaves), torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    gradients = (torch.autograd.grad(a.sum() + b.square().sum(), leaves) for a, b in results)
    for a, b in zip(*gradients, strict=True):
        assert relative_error(a, b) < 1e-5


def test_autocast_rounds_nothing_and_runs_are_bit_identical():
    inputs, y = {name: x.requires_grad_() for name, x in head(20, 31, 8).items()}, targets(20, 31)
    results = []
    for enabled in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logprob = call(**inputs, targets=y)
            results.append((logprob, *torch.autograd.grad(logprob.sum(), inputs.values())))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_runs_through_similarity_lse():
    inputs = head(20, 31, 8)
    for implementation in ("cpu", "reference"):
        with trace() as ran:
            call(**inputs, targets=targets(20, 31), implementation=implementation)
        assert [(choice.op, choice.implementation) for choice in ran] == [("similarity_lse", implementation)]


H, W, Y = torch.zeros(2, 3, 8), torch.zeros(5, 8), torch.zeros(2, 3).long()
REFUSED = {
    "hidden": (ValueError, r"hidden must be \[..., width\], got \[8\]", {"hidden": H[0, 0]}),
    "weight: width": (ValueError, r"weight must be \[N, 8\] to match hidden, got \[5, 7\]", {"weight": W[:, :7]}),
    "weight: dtype": (TypeError, "weight must be float32 like hidden, got float16", {"weight": W.half()}),
    "bias": (ValueError, r"bias must be \[5\], got \[8\]", {"bias": torch.zeros(8)}),
    "targets: shape": (ValueError, r"targets must be \[2, 3\], one a token, got \[6\]", {"targets": Y.flatten()}),
    "targets: too large": (ValueError, r"targets must lie in \[0, 5\), got values in \[5, 5\]", {"targets": Y + 5}),
    "workspace": (TypeError, "workspace must be a number of bytes or None, got str", {"workspace": "1"}),
    "implementation": (ValueError, "implementation must be one of cpu.* got 'gpu'", {"implementation": "gpu"}),
}


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize(("error", "message", "changed"), REFUSED.values(), ids=REFUSED)
def test_refused_at_the_door(error, message, changed, implementation):
    with pytest.raises(error, match=f"^linear_logprob: .*{message}"):
        linear_logprob(**{"hidden": H, "weight": W, "targets": Y, "implementation": implementation, **changed})
