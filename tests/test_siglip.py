"""SigLIP's loss against its dense formula, open_clip's own class, and its settings against each other."""

import pytest
import torch
from similarity import generator, unit
from torch.nn import functional as F

from fastcontrast import GradCache, SigLipLoss, siglip_loss
from fastcontrast.testing import relative_error

N, D = 40, 16


def inputs(m: int = N, n: int = N) -> list[torch.Tensor]:
    scale, bias = torch.tensor(12.0), torch.tensor(-8.0)
    return [x.requires_grad_() for x in (unit(m, D, 1), unit(n, D, 2), scale, bias)]


def dense(images, texts, scale, bias, y=None, keep=None) -> torch.Tensor:
    """Per image."""
    logits = scale * images.double() @ texts.double().t() + bias
    y = torch.eye(*logits.shape, dtype=torch.float64) if y is None else y.double()
    entries = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
    return (entries if keep is None else entries * keep).sum(1)


def assert_equal(loss, truth, leaves) -> None:
    assert relative_error(loss, truth) < 1e-5
    upstream = 0.5 + torch.rand(loss.shape, generator=generator(3))
    actual = torch.autograd.grad((loss * upstream).sum(), leaves)
    for a, b in zip(actual, torch.autograd.grad((truth * upstream).sum(), leaves), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_it_is_its_dense_formula(reduction):
    leaves = inputs()
    rows = dense(*leaves)
    truth = {"mean": rows.mean(), "sum": rows.sum(), "none": rows}[reduction]
    assert_equal(siglip_loss(*leaves, reduction=reduction), truth, leaves)
    # 1/n of the sum over pairs, as the paper's algorithm has it
    images, texts, scale, bias = leaves
    signs = 2 * torch.eye(N) - 1
    paper = -F.logsigmoid(signs * (scale * images @ texts.t() + bias)).sum() / N
    assert relative_error(siglip_loss(*leaves), paper) < 1e-6


def test_it_is_open_clips():
    rivals = pytest.importorskip("fastcontrast.benchmarks._rivals")
    try:
        theirs = rivals.open_clip_siglip()
    except ImportError as error:
        pytest.skip(str(error))
    leaves = inputs()
    assert_equal(siglip_loss(*leaves), theirs(*leaves), leaves)


def test_several_positives_and_soft_labels():
    leaves, labels, texts = inputs(N, 70), torch.arange(N) % 7, torch.arange(70) % 7
    y = labels[:, None] == texts
    by_label = siglip_loss(*leaves, image_labels=labels, text_labels=texts)
    assert_equal(by_label, dense(*leaves, y=y).mean(), leaves)
    assert_equal(siglip_loss(*leaves, targets=y), dense(*leaves, y=y).mean(), leaves)
    soft = torch.rand(N, 70, generator=generator(5))
    assert_equal(siglip_loss(*leaves, targets=soft), dense(*leaves, y=soft).mean(), leaves)


def test_label_smoothing_mixes_in_one_half():
    leaves = inputs()
    y = torch.eye(N) * 0.8 + 0.1
    assert_equal(siglip_loss(*leaves, label_smoothing=0.2), dense(*leaves, y=y).mean(), leaves)


def test_false_negatives_count_nothing_and_the_own_text_stays():
    leaves, ids = inputs(), torch.arange(N) // 2
    keep = (ids[:, None] != ids) | torch.eye(N, dtype=torch.bool)
    masked = siglip_loss(*leaves, image_ids=ids, text_ids=ids)
    assert_equal(masked, dense(*leaves, keep=keep).mean(), leaves)


def test_positions_of_the_own_text():
    leaves = inputs(N, 70)
    own = torch.randperm(70, generator=generator(6))[:N]
    y = F.one_hot(own, 70)
    assert_equal(siglip_loss(*leaves, positives=own), dense(*leaves, y=y).mean(), leaves)


@pytest.mark.parametrize("learned", [False, True])
def test_weights(learned):
    weights = torch.rand(N, generator=generator(7), requires_grad=learned)
    leaves = inputs()
    truth = (dense(*leaves) * weights).mean()
    assert_equal(siglip_loss(*leaves, weights=weights), truth, [*leaves, *([weights] if learned else [])])


def test_an_empty_batch_gives_zero():
    leaves = inputs(0, 0)
    loss = siglip_loss(*leaves)
    assert loss.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_gradient_once(dtype):
    images, texts, scale, bias = inputs()
    images, texts = (x.detach().to(dtype).requires_grad_() for x in (images, texts))
    actual = torch.autograd.grad(siglip_loss(images, texts, scale, bias), (images, texts))
    doubles = [x.detach().double().requires_grad_() for x in (images, texts)]
    truth = torch.autograd.grad(dense(*doubles, scale, bias).mean(), doubles)
    for a, b in zip(actual, truth, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, b) <= relative_error(b.to(dtype), b) * 1.01


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_it_compiles_into_one_graph(reduction):
    leaves = inputs()
    compiled = torch.compile(siglip_loss, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(*leaves, reduction=reduction), siglip_loss(*leaves, reduction=reduction), leaves)


def test_the_module_learns_scale_and_bias():
    loss_fn = SigLipLoss(learnable=True)
    assert dict(loss_fn.named_parameters()).keys() == {"log_scale", "bias"}
    assert loss_fn.scale.item() == pytest.approx(10.0)
    images, texts, *_ = inputs()
    loss = loss_fn(images, texts)
    assert relative_error(loss, dense(images, texts, 10.0, -10.0).mean()) < 1e-5
    loss.backward()
    assert loss_fn.log_scale.grad is not None
    assert loss_fn.bias.grad is not None
    fixed = SigLipLoss(5.0, -3.0, label_smoothing=0.1)
    assert list(fixed.parameters()) == []
    assert fixed.state_dict().keys() == {"log_scale", "bias"}
    expected = siglip_loss(images, texts, 5.0, -3.0, label_smoothing=0.1)
    assert relative_error(fixed(images, texts), expected) < 1e-6
    assert "bias=-3" in repr(fixed)


def test_under_grad_cache():
    """The sum over texts needs the whole batch: gradients of chunks equal those of the whole."""
    loss_fn, towers = SigLipLoss(learnable=True), [torch.nn.Linear(8, D) for _ in range(2)]
    x, y = (torch.randn(30, 8, generator=generator(i)) for i in (1, 2))
    parameters = [p for module in (*towers, loss_fn) for p in module.parameters()]
    truth = torch.autograd.grad(loss_fn(towers[0](x), towers[1](y)), parameters)
    GradCache(towers, chunk_sizes=7, loss_fn=loss_fn)(x, y)
    for p, g in zip(parameters, truth, strict=True):
        assert relative_error(p.grad, g) < 1e-5


X, Y = torch.zeros(4, 8), torch.zeros(6, 8)
REFUSED = {
    "width": (ValueError, r"text_features must be \[N, 8\] to match image_features", {"text_features": Y[:, :7]}),
    "more images": (ValueError, r"positives must be given.*\(4\) than texts \(3\)", {"text_features": Y[:3]}),
    "one label": (ValueError, "image_labels and text_labels go together", {"image_labels": torch.arange(4)}),
    "ids": (ValueError, r"text_ids must be \[6\]", {"image_ids": torch.arange(4), "text_ids": torch.arange(4)}),
    "reduction": (ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'max'", {"reduction": "max"}),
}


@pytest.mark.parametrize(("error", "message", "changed"), REFUSED.values(), ids=REFUSED)
def test_errors_name_what_came(error, message, changed):
    with pytest.raises(error, match=f"^siglip_loss: .*{message}"):
        siglip_loss(**{"image_features": X, "text_features": Y, **changed})
