"""The one-node mean loss against its algebra on `similarity_lse`, in float64."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from similarity import assert_accurate, assert_same, evaluate

from fastcontrast.ops import _sweep, similarity_cross_entropy, trace
from fastcontrast.testing import relative_error

module = importlib.import_module("fastcontrast.ops.similarity_cross_entropy")

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


LABELS = {
    "a few classes": (torch.arange(40) % 7, torch.arange(40) % 5),
    "some rows without a positive": (torch.arange(40) % 7, torch.arange(40) % 7 + 4),
    "no positive at all": (torch.zeros(40).long(), torch.ones(40).long()),
    "one class": (torch.zeros(40).long(), torch.zeros(40).int()),
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("settings", [{}, SETTINGS["ids"], SETTINGS["bias"]], ids=["plain", "ids", "bias"])
@pytest.mark.parametrize("workspace", [0, None])
def test_labels_equal_the_mean_over_positives(labels, settings, workspace):
    named = {"query_labels": labels[0], "key_labels": labels[1], **settings}

    def dense(q, k, s):
        logits = s * q @ k.T + settings.get("key_bias", torch.zeros(40))
        if "query_ids" in settings:
            logits = logits.masked_fill(settings["query_ids"][:, None] == settings["key_ids"], -torch.inf)
        positive = (labels[0][:, None] == labels[1]) & ~logits.isneginf()
        valid = positive.any(1)
        if not valid.any():
            return (0 * q).sum() + (0 * k).sum() + 0 * s
        own = logits.masked_fill(~positive, 0.0).sum(1)[valid] / positive.sum(1)[valid]
        return (logits.logsumexp(1)[valid] - own).mean()

    inputs = features(aligned=0.3)
    loss, gradients = value_and_gradients(inputs, torch.float32, workspace=workspace, **named)
    exact, from_algebra = value_and_gradients(inputs, torch.float64, workspace=workspace, **named)
    leaves = [x.double().requires_grad_() for x in inputs]
    truth = dense(*leaves)
    assert abs(exact.item() - truth.item()) <= 1e-12 and abs(loss.item() - truth.item()) <= 1e-5 * truth.item()
    expected = torch.autograd.grad(3 * truth, leaves)
    for gradient, algebra, right in zip(gradients, from_algebra, expected, strict=True):
        assert (algebra - right).norm() <= 1e-12 * right.norm()
        assert (gradient - right).norm() <= 1e-5 * right.norm()


def symmetric_settings() -> dict[str, dict]:
    """One set against itself; what tells (i, j) from (j, i) must not be taken for symmetric."""
    index, pairs = torch.arange(40), torch.arange(40).roll(20)
    classes, coarse = index % 5, index % 3
    return {
        "pairs": {"query_ids": index, "key_ids": index, "positives": pairs},
        "pairs that share an id": {"query_ids": index % 20, "key_ids": index % 20, "positives": pairs},
        "pairs, no ids": {"positives": pairs},
        "no pairs": {"query_ids": classes, "key_ids": classes, "positives": index.roll(7)},
        "itself": {},
        "both": {"both": True},
        "labels": {"query_ids": index, "key_ids": index, "query_labels": classes, "key_labels": classes},
        "labels of two kinds": {"query_labels": classes, "key_labels": coarse},
        "ids of two kinds": {"query_ids": classes, "key_ids": coarse, "positives": pairs},
    }


@pytest.mark.parametrize("name", symmetric_settings())
@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("workspace", [0, None])
def test_one_set_against_itself(name, small, workspace, monkeypatch):
    settings = symmetric_settings()[name]
    for key in ("ids", "labels"):  # equal ones must be the same object
        if f"query_{key}" in settings and "two" not in name:
            settings[f"key_{key}"] = settings[f"query_{key}"]
    monkeypatch.setattr(module, "SMALL", module.SMALL if small else 0)
    monkeypatch.setattr(_sweep, "ROWS", 16)
    monkeypatch.setattr(_sweep, "MIN_KEPT_ROWS", 1)
    results = []
    for dtype in (torch.float32, torch.float64):
        z = features(dtype)[0].requires_grad_()
        scale = torch.tensor(4.0, dtype=dtype, requires_grad=True)
        loss = similarity_cross_entropy(z, z, scale, workspace=workspace, **settings)
        results.append((loss, *torch.autograd.grad(loss, [z, scale])))
    for actual, exact in zip(*results, strict=True):
        assert (actual - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("needs", ["queries", "keys", "scale"])
def test_only_what_is_needed_gets_a_gradient(needs):
    inputs = dict(zip(("queries", "keys", "scale"), features(aligned=0.3), strict=True))
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = {name: x.to(dtype, copy=True).requires_grad_(name == needs) for name, x in inputs.items()}
        results.append(torch.autograd.grad(similarity_cross_entropy(**leaves, both=True), leaves[needs])[0])
    assert (results[0] - results[1]).norm() <= 1e-5 * results[1].norm()


@pytest.mark.parametrize("small", [True, False])
def test_autocast_rounds_nothing_in_either_pass(small, monkeypatch):
    monkeypatch.setattr(module, "SMALL", module.SMALL if small else 0)
    expected = value_and_gradients(features(aligned=0.3), torch.float32, both=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = value_and_gradients(features(aligned=0.3), torch.float32, both=True)
    assert torch.equal(loss, expected[0])
    for gradient, exact in zip(gradients, expected[1], strict=True):
        assert torch.equal(gradient, exact)


def test_strided_features():
    q, k, scale = features(aligned=0.3)
    wide = [torch.cat([x, x], 1)[:, ::2] for x in (q, k)]
    for small in (wide, [x.clone() for x in wide]):
        loss, gradients = value_and_gradients([*small, scale], torch.float32)
        exact, expected = value_and_gradients([*small, scale], torch.float64)
        assert abs(loss.item() - exact.item()) <= 1e-5 * exact.item()
        for gradient, right in zip(gradients, expected, strict=True):
            assert (gradient - right).norm() <= 1e-5 * right.norm()


def test_nan_comes_out_and_nothing_crashes():
    q, k, scale = features(aligned=0.3)
    q[3, 0] = float("nan")
    q.requires_grad_()
    loss = similarity_cross_entropy(q, k, scale, query_ids=torch.arange(40) % 9, key_ids=torch.arange(40) % 9)
    assert loss.isnan() and torch.autograd.grad(loss, q)[0][3].isnan().all()


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


# ------------------------------------------------------------------- rows in chunks, gradients formed in the forward

CHUNK = {
    "one chunk": 1 << 20,
    "chunks of several blocks": 4 * 90 * 37,
    "chunks of less than a block": 4 * 90 * 11,
    "chunks of one row": 4 * 90,
}
LEAVES = ("queries", "keys", "scale", "key_bias")


def in_chunks(monkeypatch, smallest: int = 1) -> list:
    """Small tiles, and the rows of each sweep that formed gradients, as they run."""
    monkeypatch.setattr(module, "SMALL", 0)
    monkeypatch.setattr(module, "MIN_ROWS", smallest)
    monkeypatch.setattr(_sweep, "ROWS", 16)
    monkeypatch.setattr(_sweep, "COLUMNS", 32)
    swept, add = [], _sweep.add_softmax_gradients

    def noted(sweep, *rest):
        swept.append(sweep.m)
        return add(sweep, *rest)

    monkeypatch.setattr(_sweep, "add_softmax_gradients", noted)
    return swept


def rectangular(dtype=torch.float32, scale: float = 20.0) -> dict:
    generator = torch.Generator().manual_seed(3)
    q = F.normalize(torch.randn(83, 24, generator=generator), dim=1)
    k = F.normalize(torch.randn(90, 24, generator=generator), dim=1)
    k[:83] = F.normalize(0.4 * q + k[:83], dim=1)
    bias = torch.randn(90, generator=generator)
    return {"queries": q.to(dtype), "keys": k.to(dtype), "scale": torch.tensor(scale), "key_bias": bias}


def mean_of(inputs: dict, settings: dict, **how):
    return evaluate(inputs, settings, call=similarity_cross_entropy, **how)


@pytest.mark.parametrize("workspace", CHUNK.values(), ids=CHUNK)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_chunks_equal_the_reference(workspace, reduction, weighted, monkeypatch):
    swept = in_chunks(monkeypatch)
    weights = torch.linspace(-0.5, 2, 83).relu() if weighted else None  # some of them 0
    settings = {"reduction": reduction, "weights": weights, "positives": torch.arange(83).roll(5)}
    inputs = rectangular()
    results = mean_of(inputs, {**settings, "workspace": workspace}, needs=LEAVES)
    assert sum(swept) == 83 and max(swept) * 90 * 4 <= max(workspace, 83 * 90 * 4)
    assert len(swept) == {1 << 20: 1, 4 * 90 * 37: 3, 4 * 90 * 11: 8, 4 * 90: 83}[workspace]
    truth = mean_of(inputs, settings, needs=LEAVES, dtype=torch.float64, implementation="reference")
    logits = 20.0 * inputs["queries"].double() @ inputs["keys"].double().T + inputs["key_bias"]
    dense = F.cross_entropy(logits, settings["positives"], reduction="none")
    dense = dense if weights is None else dense * weights
    exact = dense.mean() if reduction == "mean" else dense.sum()
    assert abs(truth["value 0"] - exact) <= 1e-12 * exact
    assert_same(results, truth, 1e-5)


@pytest.mark.parametrize(
    "needs", [("keys",), ("key_bias",), ("keys", "scale"), ("scale", "key_bias"), ("queries", "key_bias")]
)
def test_chunks_form_only_what_is_needed(needs, monkeypatch):
    swept, inputs = in_chunks(monkeypatch), rectangular()
    results = mean_of(inputs, {"workspace": CHUNK["chunks of several blocks"]}, needs=needs)
    assert len(swept) == 3
    assert_same(results, mean_of(inputs, {}, needs=needs, dtype=torch.float64, implementation="reference"), 1e-5)


@pytest.mark.parametrize("settings", [SETTINGS["ids"], SETTINGS["guide"]], ids=["ids", "guide"])
def test_chunks_see_their_own_masks(settings, monkeypatch):
    swept = in_chunks(monkeypatch)
    inputs = dict(zip(("queries", "keys", "scale"), features(aligned=0.3), strict=True))
    guide = 4 * 16 * 32 if "guide" in settings else 0  # the tile of its products
    results = mean_of(inputs, {**settings, "workspace": guide + 4 * 40 * 13}, needs=LEAVES)
    assert swept == [10, 10, 10, 10]
    truth = mean_of(inputs, settings, needs=LEAVES, dtype=torch.float64, implementation="reference")
    assert_same(results, truth, 1e-5)


@pytest.mark.parametrize("scale", [0.0, -7.0, 1e-5, 300.0])  # of 300 the shares of early tiles become 0
def test_chunks_at_scales_that_no_loss_uses(scale, monkeypatch):
    swept, inputs = in_chunks(monkeypatch), rectangular(scale=scale)
    settings = {"workspace": CHUNK["chunks of several blocks"]}
    assert_accurate(inputs, settings, needs=LEAVES, call=similarity_cross_entropy, magnitude=1.0)
    assert swept


def test_chunks_of_nearly_solved_rows(monkeypatch):
    swept, generator = in_chunks(monkeypatch), torch.Generator().manual_seed(0)
    keys = F.normalize(torch.randn(40, 24, generator=generator), dim=1)
    inputs = {"queries": keys.clone(), "keys": keys, "scale": torch.tensor(20.0)}
    assert_accurate(inputs, {"workspace": 4 * 40 * 13}, needs=LEAVES[:3], call=similarity_cross_entropy)
    assert swept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunks_of_half_precision_accumulate_in_float32(dtype, monkeypatch):
    in_chunks(monkeypatch)
    settings = {"workspace": CHUNK["chunks of less than a block"]}
    assert_accurate(rectangular(dtype), settings, needs=LEAVES, call=similarity_cross_entropy)


def test_without_room_for_chunks_the_backward_computes_logits_again(monkeypatch):
    swept, inputs = in_chunks(monkeypatch, smallest=16), rectangular()
    for workspace, room in ((4 * 90 * 15, False), (4 * 90 * 16, True)):
        results = mean_of(inputs, {"workspace": workspace}, needs=LEAVES)
        assert bool(swept) == room
        swept.clear()
        truth = mean_of(inputs, {}, needs=LEAVES, dtype=torch.float64, implementation="reference")
        assert_same(results, truth, 1e-5)


def test_chunks_are_bit_identical_and_a_second_backward_is_right(monkeypatch):
    in_chunks(monkeypatch)
    inputs = {name: x.requires_grad_() for name, x in rectangular().items()}
    run = {"workspace": CHUNK["chunks of several blocks"]}
    losses = [similarity_cross_entropy(**inputs, **run) for _ in range(2)]
    assert torch.equal(*losses)
    first = torch.autograd.grad(losses[0], inputs.values(), retain_graph=True)
    again = torch.autograd.grad(losses[0], inputs.values())
    other = torch.autograd.grad(losses[1], inputs.values())
    for x, y, z in zip(first, again, other, strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


def test_a_row_of_weight_zero_counts_for_nothing_but_the_mean(monkeypatch):
    for workspace in (CHUNK["chunks of several blocks"], 0):
        in_chunks(monkeypatch, smallest=8)
        inputs, keep = rectangular(), torch.arange(83) % 3 > 0
        results = mean_of(inputs, {"weights": keep.float(), "workspace": workspace}, needs=("queries", "keys"))
        assert (results["dqueries"][~keep] == 0).all()
        rest = {**inputs, "queries": inputs["queries"][keep]}
        settings = {"positives": torch.arange(83)[keep], "reduction": "sum", "workspace": workspace}
        expected = mean_of(rest, settings, needs=("queries", "keys"))
        assert abs(results["value 0"] - expected["value 0"] / 83) <= 1e-6 * results["value 0"]
        assert relative_error(results["dkeys"], expected["dkeys"] / 83) < 1e-6


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_a_sum_over_no_rows_is_zero(implementation):
    q, k = torch.ones(0, 4, requires_grad=True), torch.ones(3, 4, requires_grad=True)
    loss = similarity_cross_entropy(q, k, reduction="sum", implementation=implementation)
    gradients = torch.autograd.grad(loss, [q, k])
    assert loss == 0 and gradients[0].shape == (0, 4) and (gradients[1] == 0).all()


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


def test_refuses_labels_that_do_not_fit():
    x, labels = torch.ones(3, 4), torch.arange(3)
    with pytest.raises(ValueError, match=r"^similarity_cross_entropy: .*go together, got no key_labels"):
        similarity_cross_entropy(x, x, query_labels=labels)
    with pytest.raises(ValueError, match=r"key_labels must be \[3\], got \[2\]"):
        similarity_cross_entropy(x, x, query_labels=labels, key_labels=labels[:2])
    for other in ({"both": True}, {"weights": torch.ones(3)}, {"reduction": "sum"}):
        with pytest.raises(ValueError, match="labels cannot go with both, positives, guide, weights or a sum"):
            similarity_cross_entropy(x, x, query_labels=labels, key_labels=labels, **other)
    with pytest.raises(ValueError, match=r"weights must be \[3\], got \[2\]"):
        similarity_cross_entropy(x, x, weights=torch.ones(2))
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', got 'none'"):
        similarity_cross_entropy(x, x, reduction="none")
