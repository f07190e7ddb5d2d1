"""ALIP against its definition: golden values, the dense formula, invariants, edges, ranks, resume, the command."""

import math

import pytest
import torch
from recipes import assert_ranks_equal_one, assert_resumes, close, gradients, train_a_little, unit, waves

from fastcontrast import clip_loss
from fastcontrast.recipes.alip import Gates, alip_loss

SCALE = 1 / 0.07
RAW = [waves(4, 6, c) for c in range(3)]
TRIPLE = [unit(x) for x in RAW]
MEANS = (-0.7, 0.1, -0.1)


def gates(means=MEANS, dtype=torch.float64, **settings) -> Gates:
    made = Gates(**settings).to(dtype)
    made.means.copy_(torch.tensor(means, dtype=dtype))
    return made


def loss_of(*raw, means=MEANS, dtype=torch.float64) -> torch.Tensor:
    """Of features that are normalised here, with weights inside the graph."""
    features = [unit(x) for x in raw]
    return alip_loss(*features, gates(means, dtype)(*features), SCALE)


def dense_weights(image, text, caption, means=MEANS, momentum=0.99, gamma_s=2.0, gamma_p=2.0):
    """Sample by sample, in plain numbers."""
    s_tc, s_xt, s_xc = ((a * b).sum(1).tolist() for a, b in ((text, caption), (image, text), (image, caption)))
    h_tc, h_xt, h_xc = (momentum * h + (1 - momentum) * sum(s) / len(s)
                        for h, s in zip(means, (s_tc, s_xt, s_xc), strict=True))  # fmt: skip
    pairs = []
    for tc, xt, xc in zip(s_tc, s_xt, s_xc, strict=True):
        w_s = math.exp(gamma_s * (tc - h_tc)) if tc <= h_tc else 1.0
        w_t, w_c = (math.exp(gamma_p * (xt - h_xt)), math.exp(gamma_p * (xc - h_xc))) if w_s < 1 else (1.0, 1.0)
        pairs.append((w_s * w_t, w_s * w_c))
    return torch.tensor(pairs, dtype=torch.float64).unbind(1)


def dense_loss(image, text, caption, of_text, of_caption, scale):
    total = 0.0
    for y, w in ((text, of_text), (caption, of_caption)):
        logits = scale * image @ y.T
        total = total - (w * (logits.log_softmax(1) + logits.log_softmax(0)).diagonal() / 2).mean()
    return total


def test_golden_weights_and_loss():
    x, t, c = TRIPLE
    ours = gates()
    of_text, of_caption = ours(x, t, c)
    close(ours.means, -0.69988367, 0.09314408, -0.09778696)
    w_s = torch.tensor([1, 0.68952427, 0.62511240, 1], dtype=torch.float64)
    close(of_text / w_s, 1, 0.27064664, 0.15697749, 1, atol=2e-8)  # both factors have eight digits
    close(of_caption / w_s, 1, 1.72319222, 4.09714781, 1, atol=5e-8)
    close(clip_loss(x, t, SCALE, weights=of_text), 9.20954986)
    close(clip_loss(x, c, SCALE, weights=of_caption), 7.80699015)
    value, image_gradient, *_ = gradients(loss_of, *RAW)
    close(value, 17.01654000)
    close(image_gradient.norm(), 3.96381890)


@pytest.mark.parametrize(("start", "expected"), [(1.0, 0.07092494), (0.0, 3.72053248)])
def test_golden_other_starts(start, expected):
    close(loss_of(*RAW, means=(start,) * 3), expected)


def test_a_fresh_gate_starts_at_one():
    consistent, _ = Gates(gamma_p=0.0).double()(*TRIPLE)
    close(consistent, 0.07702006, 0.02380753, 0.02158355, 0.03937595)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_dense_formula(dtype, tolerance):
    torch.manual_seed(0)
    triple = [unit(torch.randn(37, 11, dtype=torch.float64)) for _ in range(3)]
    settings = {"momentum": 0.8, "gamma_s": 1.5, "gamma_p": 3.0}
    weights = dense_weights(*triple, **settings)
    leaves = (*triple, torch.tensor(SCALE, dtype=torch.float64))
    expected = gradients(lambda x, t, c, s: dense_loss(x, t, c, *weights, s), *leaves)

    def ours(x, t, c, s):
        return alip_loss(x, t, c, gates(dtype=dtype, **settings)(x, t, c), s)

    found = gradients(ours, *(x.to(dtype) for x in leaves))
    for ours, theirs in zip(found, expected, strict=True):  # weights inside the graph: they add no gradient
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


def test_invariants():
    x, t, c = TRIPLE
    two = clip_loss(x, t, SCALE) + clip_loss(x, c, SCALE)
    close(two, 18.04708434 + 7.52505355, atol=2e-8)
    for off in (gates(gamma_s=0.0, gamma_p=0.0), gates(gamma_s=0.0, gamma_p=9.0), gates((-1.0, 0.0, 0.0), momentum=1)):
        close(alip_loss(x, t, c, off(x, t, c), SCALE), two)  # the last: all above their mean
    weights = gates()(x, t, c)
    once, thrice = (
        gradients(lambda *triple, k=k: alip_loss(*triple, tuple(k * w for w in weights), SCALE), x, t, c)
        for k in (1, 3)
    )
    torch.testing.assert_close(thrice, tuple(3 * a for a in once))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(loss_of(*(a[order] for a in RAW)), loss_of(*RAW))


def test_a_sample_at_its_mean_weighs_one():
    x, t, c = TRIPLE
    at_mean = torch.linalg.vecdot(t, c)
    for i in range(4):
        of_text, of_caption = gates((at_mean[i].item(), 0.5, 0.5), momentum=1)(x, t, c)
        assert of_text[i] == of_caption[i] == 1


def test_half_precision_rounds_no_weight():
    halves = [x.to(torch.bfloat16) for x in TRIPLE]
    wide = [x.float() for x in halves]
    found, expected = (gates(dtype=torch.float32)(*x) for x in (halves, wide))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(alip_loss(*halves, found, SCALE), alip_loss(*wide, found, SCALE), rtol=0, atol=0)


def test_what_is_not_finite_raises_and_poisons_nothing():
    ours, broken = gates(), RAW[2].clone()
    broken[3, 1] = math.nan
    with pytest.raises(FloatingPointError, match="alip: features must be finite"):
        ours(*TRIPLE[:2], broken)
    close(ours.means, *MEANS)


@pytest.mark.parametrize(("rows", "columns"), [(slice(3), slice(None)), (slice(None), slice(5))])
@pytest.mark.parametrize("wrong", ["text", "caption"])
def test_what_does_not_fit_is_named(wrong, rows, columns):
    triple = dict(zip(("image", "text", "caption"), TRIPLE, strict=True))
    triple[wrong] = triple[wrong][rows, columns]
    for op, call in (
        ("alip_loss", lambda **x: alip_loss(**x, weights=gates()(*TRIPLE), scale=1.0)),
        ("Gates", gates()),
    ):
        with pytest.raises(ValueError, match=f"{op}: {wrong} must .* got"):
            call(**triple)


@pytest.mark.parametrize(("sizes", "how"), [((3, 2), "gather"), ((1, 4), "ring")])
def test_ranks_equal_one(sizes, how):
    assert_ranks_equal_one(loss_of, [waves(5, 6, c) for c in range(3)], sizes, how)


def test_resumes():
    assert_resumes(lambda: Gates(0.5), lambda ours, i: ours(*(unit(waves(4, 6, i + c)).float() for c in range(3))))


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    results = train_a_little("alip", tmp_path, monkeypatch, BATCH=64)
    assert set(results["models"]) == {"CLIP", "CLIP, two texts", "ALIP"} and results["wrong_texts"] > 100
    for found in results["models"].values():
        assert len(found["losses"]) == 2 and set(found["implementations"]) == {"similarity_lse"}
        assert set(found["metrics"]) == {"icon → name R@1, %", "name → icon R@1, %"}
    first = {label: found["losses"][0] for label, found in results["models"].items()}
    assert first["ALIP"] < first["CLIP, two texts"]  # the same start, where all weights are below 1
