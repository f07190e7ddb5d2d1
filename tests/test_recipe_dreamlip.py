"""DreamLIP against its definition: golden values, the dense formula, invariants, edges, ranks, draws, the command."""

import math
import random
from functools import partial

import pytest
import torch
from recipes import assert_ranks_equal_one, assert_resumes, close, gradients, train_a_little, unit, waves
from torch.nn import functional as F

from fastcontrast import clip_loss
from fastcontrast.data import Pairs
from fastcontrast.recipes._parts import dreamlip_run
from fastcontrast.recipes._shared.icons import Icons
from fastcontrast.recipes._shared.pages import compose
from fastcontrast.recipes.dreamlip import (
    circle_loss,
    draw_sentences,
    dreamlip_loss,
    instance_loss,
    pool_patches,
    sentences,
)

SCALE = 1 / 0.07
RAW = waves(3, 6, 0), waves(6, 6, 1).view(3, 2, 6), waves(12, 6, 2).view(3, 4, 6)
IMAGE, TEXTS, PATCHES = (unit(x) for x in RAW)
LOCAL = {"lambda_mp": 0.0}  # L_S alone


def loss_of(*raw, scale=SCALE, local_scale=SCALE, **settings) -> torch.Tensor:
    return dreamlip_loss(*(unit(x) for x in raw), scale, local_scale, **settings)


# ------------------------------------------------------------------------------------- the definition, image by image


def dense_pool(texts, patches, sigma=0.0, norm="min_max", pick=0):
    """`pick`: which of equal minima and maxima gets the gradient, the first or (−1) the last."""
    threshold = 1 / patches.shape[1] if sigma < 0 else sigma
    pooled = []
    for sentence, p in ((t, p) for ts, p in zip(texts, patches, strict=True) for t in ts):
        s = p @ sentence
        low, high = (s[(s == extreme).nonzero()[pick, 0]] for extreme in (s.min(), s.max()))
        w = (s - low) / (high - low + 1e-10) if norm == "min_max" else s.exp() / s.exp().sum()
        w = torch.stack([x if x >= threshold else torch.zeros_like(x) for x in w])
        w = w / w.sum() if w.sum() > 0 else torch.full_like(w, 1 / len(w))
        pooled.append(unit(w @ p))
    return torch.stack(pooled).view_as(texts)


def dense_loss(image, texts, patches, scale, local_scale, *, sigma=0.0, norm="min_max", form="batch", same=None):
    b, k = texts.shape[:2]
    loss = 0.0
    for slot in range(k):
        logits = scale * image @ texts[:, slot].T
        loss = loss - (logits.log_softmax(0) + logits.log_softmax(1)).diagonal().mean() / (2 * k)
    g = dense_pool(texts, patches, sigma, norm).flatten(0, 1)
    logits, of_image = local_scale * texts.flatten(0, 1) @ g.T, torch.arange(b).repeat_interleave(k)
    mine = of_image[:, None] == of_image
    if same is not None:
        equal = mine & (same.flatten()[:, None] == same.flatten()) & ~torch.eye(b * k, dtype=torch.bool)
        logits = logits.masked_fill(equal, -math.inf)
    if form == "instance":
        return loss - logits.masked_fill(~mine, -math.inf).log_softmax(1).diagonal().mean()
    return loss - (logits.log_softmax(0) + logits.log_softmax(1)).diagonal().mean() / 2


def dense_circle(image, texts, margin=0.25, gamma=32.0):
    losses = []
    for i, row in enumerate(torch.einsum("be,nke->bnk", image, texts)):
        positive, negative = row[i], torch.cat([row[:i], row[i + 1 :]]).flatten()
        a_p, a_n = (1 + margin - positive).relu().detach(), (negative + margin).relu().detach()
        pull, push = -gamma * a_p * (positive - (1 - margin)), gamma * a_n * (negative - margin)
        losses.append(F.softplus(pull.logsumexp(0) + push.logsumexp(0)))
    return torch.stack(losses).mean()


def random_features(b=13, k=3, m=7, e=11):
    torch.manual_seed(0)
    return [unit(torch.randn(shape, dtype=torch.float64)) for shape in ((b, e), (b, k, e), (b, m, e))]


# --------------------------------------------------------------------------------------------------------------- tests


def test_golden_values():
    value, image, _, patches = gradients(partial(loss_of, lambda_s=0.0), *RAW)
    close(value, 4.47133819)
    close(image.norm(), 3.15854726)
    assert not patches.any()
    value, image, texts, patches = gradients(partial(loss_of, **LOCAL, sigma=-1.0), *RAW)
    close(torch.stack([value, patches.norm(), texts.norm()]), 2.91535159, 2.68896685, 2.72285419)
    assert not image.any()
    close(loss_of(*RAW, **LOCAL, sigma=0.25), 2.91535159)
    close(loss_of(*RAW, **LOCAL, norm="softmax"), 5.05450805)
    close(loss_of(*RAW, **LOCAL), 3.09485059)
    close(loss_of(*RAW, **LOCAL, sigma=-1.0, form="instance"), 0.18829202)
    pooled = pool_patches(TEXTS, PATCHES, sigma=-1.0)
    of_texts, of_pooled = instance_loss(TEXTS, pooled, SCALE), instance_loss(pooled, TEXTS, SCALE)
    close(torch.stack([of_texts, of_pooled, (of_texts + of_pooled) / 2]), 0.18829202, 0.53715214, 0.36272208)
    close(circle_loss(IMAGE, TEXTS), 45.79555898)
    close(loss_of(*RAW, lambda_circle=0.1), 4.47133819 + 3.09485059 + 4.579555898, atol=3e-8)
    close(loss_of(*RAW, lambda_mp=2.0, lambda_s=0.5, sigma=-1.0), 2 * 4.47133819 + 2.91535159 / 2, atol=3e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "settings",
    [
        {"sigma": 0.4},
        {"norm": "softmax", "sigma": -1.0},
        {"sigma": -1.0, "same": torch.tensor([[5, 0, 5], [1, 2, 3], *[[7, 7, 7]] * 11])},
        {"form": "instance"},
        {"form": "instance", "same": torch.tensor([[5, 0, 5], [1, 2, 3], *[[7, 7, 7]] * 11])},
    ],
    ids=["threshold", "softmax", "same", "instance", "instance, same"],
)
def test_equals_the_dense_formula(settings, dtype, tolerance):
    scales = (torch.tensor(x, dtype=torch.float64) for x in (SCALE, 9.0))
    leaves = (*random_features(), *scales)
    expected = gradients(partial(dense_loss, **settings), *leaves)
    found = gradients(partial(dreamlip_loss, **settings), *(x.to(dtype) for x in leaves))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_circle_equals_the_dense_formula(dtype, tolerance):
    image, texts, _ = random_features(b=300, k=2)  # several tiles
    expected = gradients(dense_circle, image, texts)
    found = gradients(circle_loss, image.to(dtype), texts.to(dtype))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


def test_one_image_has_no_negatives_in_the_circle():
    assert not any(x.any() or x.isnan().any() for x in gradients(circle_loss, IMAGE[:1], TEXTS[:1]))


def test_invariants():
    one = TEXTS[:, :1]
    close(dreamlip_loss(IMAGE, one, PATCHES, SCALE, SCALE, lambda_s=0.0), clip_loss(IMAGE, one[:, 0], SCALE).item())
    assert not any(x.any() for x in gradients(lambda t: instance_loss(t, pool_patches(t, PATCHES), SCALE), one))
    image, texts, patches = random_features()
    loss = partial(dreamlip_loss, scale=SCALE, local_scale=SCALE)
    torch.testing.assert_close(loss(image, texts[:, [0, 2, 1]], patches), loss(image, texts, patches))
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    pooled = pool_patches(texts, patches, sigma=0.4)
    torch.testing.assert_close(pool_patches(texts, patches[:, order], sigma=0.4), pooled)
    torch.testing.assert_close(pool_patches(texts, patches, sigma=1e-12), pool_patches(texts, patches))
    assert not torch.allclose(pooled, pool_patches(texts, patches))
    batch = torch.randperm(13)
    torch.testing.assert_close(loss(image[batch], texts[batch], patches[batch]), loss(image, texts, patches))
    assert loss(image[:0], texts[:0], patches[:0], lambda_circle=0.1) == 0


def test_of_equal_patches_the_first_gets_the_gradient():
    texts = torch.tensor([[[1.0, 0, 0]]], dtype=torch.float64)
    patches = torch.cat([torch.tensor([0.25, 0.25, 1, 1, 0.5])[:, None], waves(5, 2, 0)], 1)[None]
    upstream = waves(1, 3, 1)[None]
    found, first, last = (
        gradients(lambda t, p, pool=pool: (pool(t, p) * upstream).sum(), texts, patches)
        for pool in (pool_patches, dense_pool, partial(dense_pool, pick=-1))
    )
    torch.testing.assert_close(found, first)
    assert not torch.allclose(found[2], last[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("along", "settings"),
    [
        ([0.25] * 4, {}),  # all as similar as each other
        ([0.25] * 4, {"sigma": -1.0}),
        ([0, 1e-12, 2e-12, 3e-12], {"sigma": 0.5}),  # 3e-12 / 1e-10 is below it
        ([0, 0.1, 0.2, 0.3], {"norm": "softmax", "sigma": 0.5}),
    ],
)
def test_where_no_patch_is_left_all_count_alike(along, settings, dtype):
    texts = torch.tensor([[[1.0, 0, 0]]], dtype=dtype)
    patches = torch.cat([torch.tensor(along)[:, None], waves(4, 2, 0)], 1)[None].to(dtype)
    pooled = pool_patches(texts, patches, **settings)
    torch.testing.assert_close(pooled[0, 0], unit(patches[0].mean(0)))
    _, of_texts, of_patches = gradients(lambda t, p: pool_patches(t, p, **settings)[0, 0, 1], texts, patches)
    assert not of_texts.any()
    torch.testing.assert_close(of_patches, gradients(lambda p: unit(p[0].mean(0))[1], patches)[1])


def test_one_patch_is_its_own_pool():
    torch.testing.assert_close(pool_patches(TEXTS, PATCHES[:, :1]), PATCHES[:, :1].expand(3, 2, 6))


def test_equal_sentences_compete_unless_they_are_named():
    texts = TEXTS[:, [0, 1, 1]]
    same, other = torch.tensor([[0, 1, 1]] * 3), torch.tensor([[0, 1, 2]] * 3)
    loss = partial(dreamlip_loss, IMAGE, texts, PATCHES, SCALE, SCALE)
    for form in ("batch", "instance"):
        torch.testing.assert_close(loss(form=form, same=other), loss(form=form), rtol=1e-14, atol=0)
        assert loss(form=form, same=same) < loss(form=form)
    assert loss(same=same + torch.tensor([[0], [1], [0]])) == loss(same=same)  # only inside an image


def test_half_precision_is_not_used_inside():
    halves = [x.to(torch.bfloat16) for x in random_features()]
    wide = [x.float() for x in halves]
    for settings in ({"lambda_circle": 0.1, "sigma": -1.0}, {"form": "instance"}):
        loss = partial(dreamlip_loss, scale=SCALE, local_scale=SCALE, **settings)
        expected = loss(*wide)
        assert loss(*halves) == expected and expected.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert loss(*wide) == expected
    loss = partial(dreamlip_loss, scale=SCALE, local_scale=SCALE)
    expected = gradients(loss, *wide)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gradients(loss, *wide), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image": IMAGE[:2]},
            r"dreamlip_loss: image must be \[B, E\] of texts \[B, K, E\].* got \[2, 6\], \[3, 2, 6\]",
        ),
        ({"texts": TEXTS[:, :0]}, r"K > 0, got \[3, 6\], \[3, 0, 6\]"),
        ({"texts": TEXTS[:, 0]}, r"dreamlip_loss: texts must be \[B, K, E\], got \[3, 6\]"),
        ({"patches": PATCHES[:, 0]}, r"pool_patches: patches must be \[B, M, E\], got \[3, 6\]"),
        ({"patches": PATCHES[..., :5]}, r"pool_patches: patches must be \[3, M, 6\] to match texts.* got \[3, 4, 5\]"),
        ({"patches": PATCHES[:, :0]}, r"M > 0, got \[3, 0, 6\]"),
        ({"sigma": 1.5}, "pool_patches: sigma must be at most 1, .* got 1.5"),
        ({"sigma": math.nan}, "sigma must be at most 1, .* got nan"),
        ({"norm": "l2"}, "pool_patches: norm must be one of 'min_max', 'softmax', got 'l2'"),
        ({"form": "paper"}, "dreamlip_loss: form must be one of 'batch', 'instance', got 'paper'"),
        ({"same": torch.zeros(3, 3).long()}, r"dreamlip_loss: same must be \[3, 2\], got \[3, 3\]"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        dreamlip_loss(**{"image": IMAGE, "texts": TEXTS, "patches": PATCHES, **change}, scale=1.0, local_scale=1.0)


def all_terms(image, texts, patches, same):
    return loss_of(image, texts, patches, lambda_circle=0.1, sigma=-1.0, same=same)


def instance_form(image, texts, patches, same):
    return loss_of(image, texts, patches, form="instance", same=same)


@pytest.mark.parametrize(
    ("objective", "sizes", "how"),
    [(all_terms, (3, 2), "gather"), (all_terms, (1, 4), "ring"), (instance_form, (3, 2), "ring")],
)
def test_ranks_equal_one(objective, sizes, how):
    raw = waves(5, 6, 0), waves(15, 6, 1).view(5, 3, 6), waves(20, 6, 2).view(5, 4, 6)
    same = torch.tensor([[0, 1, 0], [1, 1, 1], [2, 3, 4], [0, 0, 1], [1, 2, 2]])
    assert_ranks_equal_one(objective, [*raw, same], sizes, how)


def test_sentences_of_all_captions():
    captions = ["A dog. It runs\nfast.", " ", "Grass</s>A dog.</s>"]
    assert sentences(captions) == ["A dog", "It runs", "fast", "Grass", "A dog"]
    assert sentences([]) == []


def test_draws_of_sentences():
    pool = list("abcdefg")
    seen = [draw_sentences(pool, 6, random.Random(i)) for i in range(50)]
    assert all(len(set(found)) == 6 for found in seen) and {x for found in seen for x in found} == set(pool)
    assert seen[0] == draw_sentences(pool, 6, random.Random(0)) and len({tuple(found) for found in seen}) > 40
    assert set(draw_sentences(pool, 6, random.Random(0), skip_last=True)) == set("abcdef")
    assert set(draw_sentences(pool, 200, random.Random(0), skip_last=True)) == set("abcdef")  # with replacement
    assert draw_sentences(["a"], 3, random.Random(0), skip_last=True) == ["a"] * 3
    assert set(draw_sentences(list("abc"), 3, random.Random(0), merged=2)) == {"a. b", "b. c", "c"}
    assert draw_sentences(pool, 0, random.Random(0)) == []
    for wrong in ({"pool": []}, {"count": -1}, {"merged": 0}):
        with pytest.raises(ValueError, match=r"draw_sentences: pool and merged must be at least 1, .* got"):
            draw_sentences(**{"pool": pool, "count": 2, "draw": random.Random(0), **wrong})


def test_two_scales_are_learned_clamped_and_kept():
    def step(model: dreamlip_run.PageModel, i: int):
        scales = model.scale(), model.local_scale()
        loss = dreamlip_loss(*(x.float() for x in (IMAGE, TEXTS, PATCHES)), *scales)
        for scale, g in zip((model.scale, model.local_scale), torch.autograd.grad(loss, scales), strict=True):
            assert g != 0
            scale.log.data -= 30 * g
        model.clamp()
        return scales[0].detach(), scales[1].detach()

    assert_resumes(dreamlip_run.PageModel, step)
    model = dreamlip_run.PageModel()
    close(torch.stack([model.scale(), model.local_scale()]), SCALE, SCALE, atol=1e-5)
    for value, kept in ((9.0, 100.0), (-3.0, 1.0)):
        model.scale.log.data.fill_(value)
        model.clamp()
        close(torch.stack([model.scale(), model.local_scale()]), kept, SCALE, atol=1e-4)


def test_pages_of_the_test_hold_unseen_names_once():
    names, ids = [str(i) for i in range(40)], torch.arange(120) % 40
    pairs = Pairs("icons", torch.zeros(120, 32, 32), names, ids, torch.arange(40) < 19)
    found = dreamlip_run.held_out(Icons(pairs, torch.zeros(40, 384)), torch.Generator().manual_seed(0))
    shown = ids[found[found >= 0]]
    assert found.shape == (3, 8) and len(shown.unique()) == len(shown) > 8 and shown.max() < 19


def test_pointing_and_retrieval_of_a_model_that_knows():
    """Features are one-hot: of an icon's name in its cell, of all of a page's names for the page."""
    names, pairs = [str(i) for i in range(20)], torch.arange(20)
    glyphs = torch.arange(1, 21, dtype=torch.uint8)[:, None, None].expand(20, 32, 32)  # an icon's colour is its name
    icons = Icons(Pairs("icons", glyphs, names, pairs, torch.arange(20) < 12), torch.eye(20))
    data = dreamlip_run.Data.__new__(dreamlip_run.Data)
    data.icons, generator = icons, torch.Generator().manual_seed(0)
    data.tests = [compose(glyphs, dreamlip_run.held_out(icons, generator), generator) for _ in range(3)]

    class Knows:
        def __init__(self, shift: int):
            self.shift = shift  # of the cells

        def __call__(self, images, own):
            cells = F.one_hot(images[:, 16::32, 16::32].flatten(1).long(), 21).float()[..., 1:]
            return cells.sum(1), cells.roll(self.shift, 1)

        def texts(self, features):
            return features

    assert [*data.evaluate(Knows(0), own=True).values()] == [100, 100, 100]
    assert [*data.evaluate(Knows(1), own=True).values()] == [0, 100, 100]


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(dreamlip_run, "BATCH", 16)
    monkeypatch.setattr(dreamlip_run, "PAGES", 40)
    results = train_a_little("dreamlip", tmp_path, monkeypatch)
    assert set(results["models"]) == {"CLIP", "L_MP alone", "DreamLIP"}
    for found in results["models"].values():
        assert len(found["losses"]) == 2 and set(found["implementations"]) == {"similarity_lse"}
        assert [*found["metrics"]] == ["name → its place, %", "page → name R@1, %", "name → page R@1, %"]
    first = {label: found["losses"][0] for label, found in results["models"].items()}
    assert first["DreamLIP"] > first["L_MP alone"] + 1  # the same start, and a term more
