"""CLIP-Refine against its definition: golden values, the dense formula, edges, ranks, resume, the command."""

import pytest
import torch
from recipes import assert_ranks_equal_one, assert_resumes, close, gradients, train_a_little, waves
from torch.nn import functional as F

from fastcontrast import clip_loss
from fastcontrast.recipes._parts import clip_refine_hycd
from fastcontrast.recipes.clip_refine import Noise, clip_refine_loss, hycd_loss, rafa_loss

X, T, X_STAR, T_STAR, Z = (waves(4, 6, c) for c in range(5))
FOUR = X, T, X_STAR, T_STAR


def dense_rows(x, t, x_star, t_star, alpha, temperature):
    """T² mean_i KL(q̂_i ‖ p_i), with all matrices."""
    q = (x_star @ t_star.T / temperature).softmax(1)
    blended = alpha * torch.eye(len(x), dtype=x.dtype) + (1 - alpha) * q
    log_p = (x @ t.T / temperature).log_softmax(1)
    return temperature**2 * (torch.xlogy(blended, blended) - blended * log_p).sum(1).mean()


def dense(x, t, x_star, t_star, alpha=0.5, temperature=1.0):
    ways = (x, t, x_star, t_star), (t, x, t_star, x_star)
    return sum(dense_rows(*four, alpha, temperature) for four in ways) / 2


def of_batch(x, t, x_star, t_star, clip=0.3):
    """All terms, with noise that the batch draws."""
    return clip_refine_loss(x, t, x_star, t_star, Noise(3, shared=False)(x), alpha=0.3, of_clip=clip, scale=0.9)


def unlike(found, expected):
    """The largest relative error."""
    pairs = zip(found, expected, strict=True)
    return max((a.double() - b.double()).norm() / b.double().norm() for a, b in pairs)


def test_golden_values():
    close(rafa_loss(X, T, (Z, Z)), 1.76897193)
    close(rafa_loss(X, T, (Z, Z), reduction="paper"), 5.30691580)
    golden = {(0.5, 1.0): 1.91315637, (0.0, 1.0): 1.22326359, (1.0, 1.0): 3.68754240, (0.5, 2.0): 3.51341605}
    for (alpha, temperature), expected in golden.items():
        close(hycd_loss(*FOUR, alpha=alpha, temperature=temperature), expected)
        close(hycd_loss(*(x.float() for x in FOUR), alpha=alpha, temperature=temperature), expected, atol=1e-6)
    value, gradient, _ = gradients(lambda x, t: clip_refine_loss(x, t, X_STAR, T_STAR, (Z, Z)), X, T)
    close(value, 3.68212830)
    close(gradient.norm(), 1.18708187)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_dense_formula(alpha, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(clip_refine_hycd, "ROWS", 16)
    monkeypatch.setattr(clip_refine_hycd, "COLUMNS", 10)  # 3 × 4 tiles, of which the diagonal crosses some
    torch.manual_seed(0)
    four = [torch.randn(37, 11, dtype=torch.float64) for _ in range(2)]
    four += [torch.randn(37, 7, dtype=torch.float64) for _ in range(2)]  # a teacher may be narrower
    settings = {"alpha": alpha, "temperature": 1.7}
    expected = gradients(lambda *four: dense(*four, **settings), *four)
    found = gradients(lambda *four: hycd_loss(*four, **settings), *(x.to(dtype) for x in four))
    assert all(x.dtype == dtype for x in found)
    assert unlike(found[:3], expected[:3]) < tolerance
    assert not any(x.any() for x in found[3:])  # nothing reaches the teacher, whose dense gradient is not 0
    assert alpha == 1 or all(x.any() for x in expected[3:])


def test_gradient_to_logits_is_that_of_the_definition():
    """dL/d⟨x_i, t_j⟩ = T/2N [(p − q̂)_ij + (p′ − q̂′)_ij], primes of columns."""
    alpha, temperature, eye = 0.5, 2.0, torch.eye(4, dtype=torch.float64)
    logits, of_teacher = X @ T.T / temperature, X_STAR @ T_STAR.T / temperature
    g = sum(logits.softmax(d) - alpha * eye - (1 - alpha) * of_teacher.softmax(d) for d in (0, 1)) * temperature / 8
    _, dx, dt, *_ = gradients(lambda *four: hycd_loss(*four, alpha=alpha, temperature=temperature), *FOUR)
    torch.testing.assert_close((dx, dt), (g @ T, g.T @ X), rtol=1e-10, atol=1e-12)


def test_invariants():
    close(hycd_loss(*FOUR, alpha=1.0), clip_loss(X, T, 1.0))
    value, dx, dt = gradients(lambda x, t: hycd_loss(x, t, X, T, alpha=0.0), X, T)
    assert abs(value) < 1e-14 and dx.abs().max() < 1e-14 and dt.abs().max() < 1e-14
    value, dx, dt = gradients(lambda x, t: rafa_loss(x, t, (Z, Z)), Z, Z)
    assert value == 0 and not dx.any() and not dt.any()
    torch.testing.assert_close(hycd_loss(T, X, T_STAR, X_STAR), hycd_loss(*FOUR))
    # A constant a row of logits, by one more feature: the half of the rows stays, that of the columns moves.
    wider = torch.cat([X, torch.arange(4.0).double()[:, None]], 1), torch.cat([T, torch.ones(4, 1).double()], 1)
    of_columns = [dense_rows(t, x, T_STAR, X_STAR, 0.5, 1.0) for x, t in ((X, T), wider)]
    moved = hycd_loss(*wider, X_STAR, T_STAR) - hycd_loss(*FOUR)
    torch.testing.assert_close(moved, (of_columns[1] - of_columns[0]) / 2)
    assert moved.abs() > 0.1


def test_terms_are_weighed():
    noise = Noise()(X)
    parts = rafa_loss(X, T, noise, reduction="paper"), hycd_loss(*FOUR, alpha=0.2), clip_loss(X, T, 3.0)
    weights = {"of_noise": 0.5, "of_teacher": 2.0, "of_clip": 0.1}
    found = clip_refine_loss(*FOUR, noise, alpha=0.2, scale=3.0, reduction="paper", **weights)
    torch.testing.assert_close(found, sum(w * x for w, x in zip(weights.values(), parts, strict=True)))


def test_long_features_stay_finite():
    torch.manual_seed(0)
    x = 10 * F.normalize(torch.randn(64, 32).double(), dim=1)
    four = [x, 10 * F.normalize(x + torch.randn(64, 32), dim=1)]
    four += [y + torch.randn(64, 32) for y in four]  # logits of a hundred
    expected = gradients(dense, *four)[:3]
    assert unlike(gradients(hycd_loss, *(y.float() for y in four))[:3], expected) < 1e-4
    assert not any(y.isnan().any() for y in gradients(hycd_loss, *(50 * y.float() for y in four)))


def test_edges():
    value, *found = gradients(hycd_loss, *(y[:1] for y in FOUR))
    assert value == 0 and not any(g.any() for g in found)
    nothing = [y[:0] for y in FOUR]
    assert clip_refine_loss(*nothing, Noise()(nothing[0])) == 0
    same = torch.cat([T[:1], T[:1], T[2:]])  # one caption twice: both are negatives of each other
    close(hycd_loss(X, same, X_STAR, T_STAR), dense(X, same, X_STAR, T_STAR))
    halves = [y.to(torch.bfloat16) for y in FOUR]
    noise = Noise()(halves[0])
    wide = clip_refine_loss(*(y.float() for y in halves), tuple(z.float() for z in noise))
    torch.testing.assert_close(clip_refine_loss(*halves, noise), wide)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": 1.5}, r"hycd_loss: alpha must lie in \[0, 1\], got 1.5"),
        ({"temperature": 0.0}, "hycd_loss: temperature must be positive, got 0.0"),
        ({"text": T[:, :5]}, r"hycd_loss: text must be .* got \[4, 5\]"),
        ({"text": T[:3]}, "hycd_loss: text must have the 4 rows of image, got 3"),
        ({"teacher_image": X[:3]}, "hycd_loss: teacher_image must have the 4 rows of image, got 3"),
        ({"teacher_text": T[:, :5]}, r"hycd_loss: teacher_text must be .* got \[4, 5\]"),
    ],
)
def test_what_does_not_fit_is_named(wrong, message):
    names = "image", "text", "teacher_image", "teacher_text"
    with pytest.raises(ValueError, match=message):
        hycd_loss(**{**dict(zip(names, FOUR, strict=True)), **wrong})


def test_noise_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="rafa_loss: reduction must be one of 'code', 'paper', got 'mean'"):
        rafa_loss(X, T, (Z, Z), reduction="mean")
    with pytest.raises(ValueError, match=r"rafa_loss: noise of texts must be \[4, 6\] like image, got \[3, 6\]"):
        rafa_loss(X, T, (Z, Z[:3]))


def test_noise():
    noise = Noise(seed=1, mean=2.0, std=0.5)
    image, text = noise(torch.empty(400, 50))
    assert torch.equal(image, text) and image.shape == (400, 50) and not image.requires_grad
    assert abs(image.mean() - 2) < 0.02 and abs(image.std() - 0.5) < 0.01
    again = noise(torch.empty(400, 50))[0]
    assert abs(torch.corrcoef(torch.stack([image.flatten(), again.flatten()]))[0, 1]) < 0.05
    assert not torch.equal(Noise(seed=1 + (1 << 32))(X)[0], Noise(seed=1)(X)[0])
    apart = Noise(shared=False)(X)
    assert not torch.equal(*apart) and apart[0].dtype == torch.float64
    assert torch.equal(apart[0], Noise()(X)[0])


@pytest.mark.parametrize(("sizes", "how"), [((3, 2), "gather"), ((1, 4), "ring"), ((5, 0), "gather")])
def test_ranks_equal_one(sizes, how):
    assert_ranks_equal_one(of_batch, [waves(5, 6, c) for c in range(4)], sizes, how)


def test_resumes():
    assert_resumes(lambda: Noise(5, shared=False), lambda noise, i: noise(torch.empty(3, 4)))


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    models = train_a_little("clip_refine", tmp_path, monkeypatch, BATCH=64)["models"]
    assert list(models) == ["CLIP, the start", "CLIP, trained on", "CLIP-Refine"]
    for found in models.values():
        assert set(found["metrics"]) == {"modality gap, %", "icon → name R@1, %", "name → icon R@1, %"}
    assert [len(found["losses"]) for found in models.values()] == [0, 2, 2]
    assert set(models["CLIP, trained on"]["implementations"]) == {"similarity_lse"}
