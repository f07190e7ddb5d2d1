"""The one-node mean loss against its algebra on `similarity_lse`, in float64."""

import pytest
import torch
import torch.nn.functional as F

from fastcontrast.ops import similarity_cross_entropy, trace

SETTINGS = {
    "plain": {},
    "bias": {"key_bias": torch.linspace(-1, 1, 40)},
    "ids": {"query_ids": torch.arange(40) % 9, "key_ids": torch.arange(40) % 9},
    "guide": {"guide": (torch.eye(40), torch.ones(40, 40), torch.linspace(0, 2, 40))},
}


def features(dtype=torch.float32, aligned: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = F.normalize(torch.randn(40, 24, generator=generator, dtype=torch.float64), dim=1)
    k = F.normalize(torch.randn(40, 24, generator=generator, dtype=torch.float64) * 0.2 + aligned * q, dim=1)
    return [q.to(dtype), k.to(dtype), torch.tensor(20.0)]


def value_and_gradients(inputs, dtype, **settings):
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
    loss = similarity_cross_entropy(*leaves, **settings)
    return loss, torch.autograd.grad(3 * loss, leaves)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("workspace", [0, None])
def test_equals_its_algebra(settings, both, workspace):
    inputs = features(aligned=0.3)
    with trace() as ran:
        loss, gradients = value_and_gradients(inputs, torch.float32, both=both, workspace=workspace, **settings)
    assert [choice.implementation for choice in ran] == ["cpu"]
    truth, expected = value_and_gradients(inputs, torch.float64, both=both, **settings)
    assert abs(loss.item() - truth.item()) <= 1e-5 * truth.item()
    for gradient, exact in zip(gradients, expected, strict=True):
        assert (gradient - exact).norm() <= 1e-5 * exact.norm()


def test_a_solved_batch_keeps_the_digits_of_its_loss():
    """At scale 100 log-sum-exps are near 100, where float32 resolves 8e-6, and the loss is below 1e-3."""
    q, k, _ = features(aligned=1.1)
    inputs = [q, k, torch.tensor(100.0)]
    loss, _ = value_and_gradients(inputs, torch.float32, both=True)
    truth, _ = value_and_gradients(inputs, torch.float64, both=True)
    assert 1e-8 < truth < 1e-2
    assert abs(loss.item() - truth.item()) <= 1e-4 * truth.item()


@pytest.mark.parametrize("positives", [None, torch.randperm(40, generator=torch.Generator().manual_seed(1))])
@pytest.mark.parametrize("frozen", [False, True])
def test_one_direction_with_positives_and_frozen_keys(positives, frozen):
    q, k, scale = features(aligned=0.3)
    results = []
    for dtype in (torch.float32, torch.float64):
        a, b = q.to(dtype, copy=True).requires_grad_(), k.to(dtype, copy=True).requires_grad_(not frozen)
        loss = similarity_cross_entropy(a, b, scale, positives=positives)
        results.append(torch.autograd.grad(loss, [a] if frozen else [a, b]))
    for gradient, exact in zip(*results, strict=True):
        assert (gradient - exact).norm() <= 1e-5 * exact.norm()


def test_half_precision_gradients_are_rounded_once():
    q, k, scale = features(torch.bfloat16)
    _, gradients = value_and_gradients([q, k], torch.bfloat16, scale=scale, both=True)
    _, exact = value_and_gradients([q, k], torch.float64, scale=scale, both=True)
    for gradient, expected in zip(gradients, exact, strict=True):
        rounding = (expected.to(torch.bfloat16).double() - expected).norm()
        assert (gradient.double() - expected).norm() <= 1.2 * rounding


def test_compiles_and_refuses_a_second_gradient():
    inputs = [x.requires_grad_() for x in features(aligned=0.3)]
    loss = similarity_cross_entropy(*inputs, both=True)
    compiled = torch.compile(similarity_cross_entropy, fullgraph=True, backend="aot_eager")(*inputs, both=True)
    torch.testing.assert_close(compiled, loss)
    with pytest.raises(NotImplementedError, match="reference"):
        torch.autograd.grad(loss, inputs, create_graph=True)


@pytest.mark.parametrize("both", [False, True])
def test_refuses_rows_without_their_key(both):
    with pytest.raises(ValueError, match=r"every row needs its own key.* got 3 queries, 2 keys"):
        similarity_cross_entropy(torch.ones(3, 4), torch.ones(2, 4), both=both)
    with pytest.raises(ValueError, match="every row needs"):
        similarity_cross_entropy(torch.ones(0, 4), torch.ones(0, 4), both=both)
