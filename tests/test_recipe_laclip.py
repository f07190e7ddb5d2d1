"""LaCLIP against its definition: golden values, the dense formula, missing versions, draws, ranks, the command."""

import pytest
import torch
from recipes import assert_ranks_equal_one, assert_resumes, close, gradients, train_a_little, unit, waves

from fastcontrast import clip_loss
from fastcontrast.ops import trace
from fastcontrast.recipes.laclip import Draw, enough_words, laclip_mt_loss

SCALE = 1 / 0.07
IMAGE, *TEXTS = (unit(waves(4, 6, c)) for c in range(4))
PER_VERSION = 18.04708434, 7.52505355, 4.97457602


def loss_of(image, *texts_and_valid) -> torch.Tensor:
    """Of features that are normalised here; a mask may come last."""
    *texts, valid = texts_and_valid if texts_and_valid[-1].dtype == torch.bool else (*texts_and_valid, None)
    return laclip_mt_loss(unit(image), [unit(x) for x in texts], SCALE, valid)


def loss_of_drawn(image, *texts) -> torch.Tensor:
    versions = torch.stack([unit(x) for x in texts], 1)
    drawn = Draw(3)(torch.ones(versions.shape[:2], dtype=torch.bool))
    return clip_loss(unit(image), versions[torch.arange(len(drawn)), drawn], SCALE)


def dense(image, texts, scale, valid):
    """Pair by pair, from the whole matrices."""
    total = 0.0
    for r, text in enumerate(texts):
        logits = (scale * image @ text.T).masked_fill(~(valid[:, r, None] & valid[:, r]), -1e9)
        for i in valid[:, r].nonzero()[:, 0]:
            pair = logits[i].log_softmax(0)[i] + logits[:, i].log_softmax(0)[i]
            total = total - pair / 2 / valid[i].sum() / len(image)
    return total


def some_missing(rows: int, versions: int) -> torch.Tensor:
    valid = torch.rand(rows, versions, generator=torch.Generator().manual_seed(1)) < 0.6
    valid[:, 0] |= ~valid.any(1)
    return valid


def test_golden_values():
    for text, expected in zip(TEXTS, PER_VERSION, strict=True):
        close(laclip_mt_loss(IMAGE, [text], SCALE), expected)
        close(laclip_mt_loss(IMAGE, [text] * 3, SCALE), expected)  # rewrites equal to the original: CLIP
    drawn = torch.stack(TEXTS)[torch.tensor([0, 2, 1, 2]), torch.arange(4)]
    close(clip_loss(IMAGE, drawn, SCALE), 3.88510496)
    value, gradient, *_ = gradients(loss_of, *(waves(4, 6, c) for c in range(4)))
    close(value, 10.18223797)
    close(gradient.norm(), 2.72704599)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_dense_formula(missing, dtype, tolerance):
    torch.manual_seed(0)
    image, *texts = (unit(torch.randn(37, 11, dtype=torch.float64)) for _ in range(6))
    valid = some_missing(37, 5) if missing else torch.ones(37, 5, dtype=torch.bool)
    leaves = (image, torch.tensor(SCALE, dtype=torch.float64), *texts)
    expected = gradients(lambda v, s, *t: 3 * dense(v, t, s, valid), *leaves)
    with trace() as ran:
        found = gradients(
            lambda v, s, *t: 3 * laclip_mt_loss(v, t, s, valid if missing else None), *(x.to(dtype) for x in leaves)
        )
    assert {x.implementation for x in ran} == {"reference" if dtype == torch.float64 else "cpu"}
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


def test_mt_is_the_mean_of_its_versions():
    value, of_image, *of_texts = gradients(lambda v, *t: laclip_mt_loss(v, t, SCALE), IMAGE, *TEXTS)
    alone = [gradients(lambda v, t: clip_loss(v, t, SCALE), IMAGE, text) for text in TEXTS]
    torch.testing.assert_close(value, sum(x[0] for x in alone) / 3)
    torch.testing.assert_close(of_image, sum(x[1] for x in alone) / 3)
    for found, (_, _, expected) in zip(of_texts, alone, strict=True):
        torch.testing.assert_close(found, expected / 3)


def test_missing_versions():
    full = torch.ones(4, 3, dtype=torch.bool)
    close(laclip_mt_loss(IMAGE, TEXTS, SCALE, full), 10.18223797)
    only_first = full & (torch.arange(3) == 0)
    broken = [TEXTS[0], torch.full((4, 6), torch.nan, dtype=torch.float64), TEXTS[2]]
    value, *found = gradients(lambda v, *t: laclip_mt_loss(v, t, SCALE, only_first), IMAGE, *broken)
    close(value, PER_VERSION[0])  # what nobody has is not looked at
    assert all(x.isfinite().all() for x in found) and not found[2].any() and not found[3].any()
    close(laclip_mt_loss(IMAGE[:0], [x[:0] for x in TEXTS], SCALE, full[:0]), 0)


def test_gradients_repeat_and_half_precision_keeps_its_dtype():
    image, scale = IMAGE.float().requires_grad_(), torch.tensor(SCALE, requires_grad=True)
    value = laclip_mt_loss(image, [x.float() for x in TEXTS], scale)
    once, again = (torch.autograd.grad(value, [image, scale], retain_graph=True) for _ in range(2))
    torch.testing.assert_close(once, again, rtol=0, atol=0)
    halves = [x.to(torch.bfloat16) for x in (IMAGE, *TEXTS)]
    found, expected = (
        gradients(lambda v, *t: laclip_mt_loss(v, t, SCALE), *x) for x in (halves, [x.float() for x in halves])
    )
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1:], tuple(x.bfloat16() for x in expected[1:]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("texts", "valid", "said"),
    [
        ([], None, "at least one version, got none"),
        ([TEXTS[0], TEXTS[1][:3]], None, r"texts\[1\] must have a row an image, 4, got 3"),
        ([TEXTS[0], TEXTS[1][:, :5]], None, r"texts\[1\] must be \[N, 6\] to match image, got \[4, 5\]"),
        (TEXTS, torch.ones(4, 2, dtype=torch.bool), r"valid must be bool \[4, 3\], got torch.bool \[4, 2\]"),
        (TEXTS, torch.ones(4, 3), r"valid must be bool \[4, 3\], got torch.float32"),
        (TEXTS, torch.zeros(4, 3, dtype=torch.bool), "at least one version of each image, got an image with none"),
    ],
)
def test_what_does_not_fit_is_named(texts, valid, said):
    with pytest.raises(ValueError, match=f"laclip_mt_loss: .*{said}"):
        laclip_mt_loss(IMAGE, texts, SCALE, valid)


def test_draws_are_uniform_and_each_sample_and_visit_has_its_own():
    everything = torch.ones(400, 5, dtype=torch.bool)
    drawn = torch.stack([Draw(seed)(everything) for seed in range(50)])  # [50, 400], first visits
    share = drawn.flatten().bincount(minlength=5) / drawn.numel()
    assert (share - 0.2).abs().max() < 4 * (0.2 * 0.8 / drawn.numel()) ** 0.5
    draw = Draw(0)
    visits = torch.stack([draw(everything) for _ in range(50)])
    assert torch.equal(visits[0], drawn[0])
    for table in (drawn, drawn.T, visits, visits.T):  # neighbours agree as often as chance would have it
        agree = (table[1:] == table[:-1]).float().mean()
        assert abs(agree - 0.2) < 4 * (0.2 * 0.8 / drawn.numel()) ** 0.5
    assert not Draw(0)(everything[:, :1]).any()  # without rewrites plain CLIP


def test_short_rewrites_give_way_to_the_original():
    mask = enough_words([["dog", "a red car"], ["", "car, red"], ["a dog", "red"], ["two\tdogs", "  car "]])
    assert mask.tolist() == [[True, False, True, True], [True, True, False, False]]
    rows = mask.repeat(500, 1)
    drawn, without = Draw(4)(rows), Draw(4)(torch.ones_like(rows))
    kept = rows.gather(1, without[:, None])[:, 0]
    assert torch.equal(drawn, torch.where(kept, without, 0)) and not kept.all()
    with pytest.raises(ValueError, match=r"lists of as many texts, got \[2, 1\]"):
        enough_words([["a", "b"], ["a"]])


def test_draws_resume():
    assert_resumes(lambda: Draw(7), lambda draw, _: draw(torch.ones(50, 3, dtype=torch.bool)))


@pytest.mark.parametrize(("sizes", "how"), [((3, 2), "gather"), ((1, 4), "ring")])
def test_ranks_equal_one(sizes, how):
    raw, valid = [waves(5, 6, c) for c in range(4)], some_missing(5, 3)
    valid[:3, 2], valid[3:, 2] = False, True  # a version that no row of the first rank has
    assert_ranks_equal_one(loss_of, raw, sizes, how)
    assert_ranks_equal_one(loss_of, [*raw, valid], sizes, how)
    assert_ranks_equal_one(loss_of_drawn, raw, sizes, how)


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    results = train_a_little("laclip", tmp_path, monkeypatch, BATCH=64)
    assert set(results["models"]) == {"CLIP", "LaCLIP", "LaCLIP-MT"}
    for found in results["models"].values():
        assert len(found["losses"]) == 2 and set(found["implementations"]) == {"similarity_lse"}
        assert len(found["metrics"]) == 4 and next(iter(found["metrics"])) == "other words → icon R@1, %"
    assert len({found["losses"][0] for found in results["models"].values()}) == 3  # the same start, other texts
