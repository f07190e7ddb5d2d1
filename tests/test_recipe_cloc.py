"""CLOC against its definition: golden values, the dense formulas, invariants, edges, ranks, the command."""

import pytest
import torch
from recipes import assert_ranks_equal_one, close, gradients, train_a_little, unit, waves
from torch import nn

from fastcontrast import clip_loss
from fastcontrast.recipes._parts import cloc_pages
from fastcontrast.recipes._parts.cloc_pages import choose_regions
from fastcontrast.recipes._parts.cloc_prompter import sinusoids
from fastcontrast.recipes.cloc import Prompter, cloc_loss, grounding_loss, region_text_loss

SCALE = 1 / 0.07
Z = waves(4, 6, 0)
Y = waves(4, 6, 1)
Y[3] = 1.02 * Y[0] + 0.02 * Y[1]


def raw_loss(z, y, threshold=0.9):
    return region_text_loss(unit(z), unit(y), SCALE, threshold)


def dense_loss(u, w, scale, threshold=0.9):
    """Two R × R matrices."""
    own = torch.eye(len(u), dtype=torch.bool)
    logits = (scale * u @ w.T).masked_fill((w @ w.T > threshold) & ~own, -torch.inf)
    return -(logits.log_softmax(1) + logits.log_softmax(0)).diagonal().mean() / 2


# -------------------------------------------------------------------------------------------------------- the losses


def test_golden_values():
    w = unit(Y)
    cosines = (w @ w.T).fill_diagonal_(0)
    assert cosines[0, 3] > 0.99 and (cosines > 0.9).sum() == 2
    close(raw_loss(Z, Y, threshold=2.0), 12.47780305)
    value, dz, dy = gradients(raw_loss, Z, Y)
    close(value, 10.72955171)
    close(dz.norm(), 4.77779431)
    close(dy.norm(), 2.90263079)
    close(grounding_loss(waves(4, 4, 2).abs(), waves(4, 4, 3).abs()), 0.13977773)
    close(clip_loss(unit(Z[::2]), unit(Y[::2]), SCALE), 8.41275622)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("rows", "threshold"), [(1, 0.9), (37, 0.9), (300, 0.5), (300, 2.0)])
def test_equals_the_dense_formula(rows, threshold, dtype, tolerance):
    torch.manual_seed(rows)
    words = unit(torch.randn(max(1, rows // 3), 11, dtype=torch.float64))
    w = unit(words[torch.arange(rows) % len(words)] + 0.05 * torch.randn(rows, 11, dtype=torch.float64))
    u = unit(w + torch.randn(rows, 11, dtype=torch.float64))
    leaves = u, w, torch.tensor(SCALE, dtype=torch.float64)
    if rows > 1 and threshold < 1:
        distance = (w @ w.T - threshold).abs().min()
        assert ((w @ w.T) > threshold).sum() > 2 * rows and distance > 1e-6  # float32 must see the same pairs
    expected = gradients(lambda *x: dense_loss(*x, threshold), *leaves)
    found = gradients(lambda *x: region_text_loss(*x, threshold), *(x.to(dtype) for x in leaves))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm().clamp(min=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_cosine_at_the_threshold_stays(dtype):
    w = torch.tensor([[1, 0], [0.9, 0.19**0.5]], dtype=dtype)
    u = unit(torch.tensor([[1, 2], [3, -1]], dtype=dtype))
    at = w[1, 0].item()  # ⟨w_0, w_1⟩ without any rounding
    close(region_text_loss(u, w, SCALE, at), dense_loss(u, w, SCALE, 2.0), atol=2e-6)
    assert region_text_loss(u, w, SCALE, at - 1e-6) == 0
    assert region_text_loss(u, w, SCALE, at) > 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_row_without_negatives_costs_nothing(dtype):
    """Row 0's text is near both others, which are far from each other; and then captions that all are one."""
    angle = torch.tensor([0.0, 0.4, -0.4], dtype=dtype)
    w = torch.stack([angle.cos(), angle.sin()], 1)
    u = unit(torch.tensor([[1, 2], [3, -1], [-1, -1]], dtype=dtype))
    value, du, dw = gradients(lambda u, w: region_text_loss(u, w, SCALE), u, w)
    pair_value, pair_du, pair_dw = gradients(lambda u, w: region_text_loss(u, w, SCALE) * 2 / 3, u[1:], w[1:])
    rounding = 0 if dtype == torch.float64 else SCALE * torch.finfo(dtype).eps / 3  # of s / R, a row's weight
    assert max(x[0].abs().max() for x in (du, dw)) <= rounding and du[1:].any()
    torch.testing.assert_close((value, du[1:], dw[1:]), (pair_value, pair_du, pair_dw))
    same = w[:1].expand(3, 2).contiguous()
    value, *found = gradients(lambda u, w: region_text_loss(u, w, SCALE), u, same)
    assert value == 0 and max(x.abs().max() for x in found) <= rounding


def test_the_filter_has_no_gradient_and_keeps_every_positive():
    """The texts' gradient is that of the logits alone, with the mask as a constant."""
    mask = ((unit(Y) @ unit(Y).T) > 0.9) & ~torch.eye(4, dtype=torch.bool)

    def constant(z, y):
        logits = (SCALE * unit(z) @ unit(y).T).masked_fill(mask, -torch.inf)
        return -(logits.log_softmax(1) + logits.log_softmax(0)).diagonal().mean() / 2

    torch.testing.assert_close(gradients(raw_loss, Z, Y), gradients(constant, Z, Y), rtol=0, atol=1e-10)
    assert gradients(lambda z, y: raw_loss(z, y, -2.0), Z, Y)[0] == 0  # all but the positives removed


def test_half_precision_is_float32_of_the_rounded():
    halves = unit(Z).bfloat16(), unit(Y).bfloat16()
    wide = [x.float() for x in halves]
    torch.testing.assert_close(region_text_loss(*halves, SCALE), region_text_loss(*wide, SCALE), rtol=0, atol=0)
    close(region_text_loss(*wide, SCALE), dense_loss(*wide, SCALE), atol=1e-4)
    w = unit(torch.randn(200, 64, generator=torch.Generator().manual_seed(0)))
    off = (w @ w.T - w.bfloat16().float() @ w.bfloat16().float().T).abs().max()
    assert off < 2**-7  # as the docstring says


# ------------------------------------------------------------------------------------------------------------ all of it

THERE = torch.tensor([[True, False, True], [False, False, False], [False, True, False], [True, True, False]])


def whole_loss(image, caption, regions, texts, boxes, found, there, **settings):
    """Of rows [B, M, ...], also of slots without a region, whose numbers must not be looked at."""
    regions, texts = (unit(x[there]) for x in (regions, texts))
    return cloc_loss(unit(image), unit(caption), regions, texts, boxes[there], found[there], there, SCALE, **settings)


def problem(there=THERE, seed=0):
    torch.manual_seed(seed)
    count, most = there.shape
    shapes = (count, 6), (count, 6), (count, most, 6), (count, most, 6), (count, most, 4), (count, most, 4)
    made = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    made[3][there] = made[3][there] * 0.2 + torch.randn(2, 6, dtype=torch.float64).repeat(99, 1)[: int(there.sum())]
    return [*made, there]


def test_total_is_the_sum_of_its_parts_and_empty_slots_are_not_looked_at():
    *tensors, there = problem()
    image, caption, _, texts, *_ = tensors
    w = unit(texts[there])
    assert ((w @ w.T) > 0.9).sum() > len(w)

    def parts(image, caption, regions, texts, boxes, found):
        u, w = unit(regions[there]), unit(texts[there])
        local = dense_loss(u, w, SCALE) + (boxes[there] - found[there]).square().mean()
        return dense_loss(unit(image), unit(caption), SCALE, 2.0) + 3 / 4 * local

    expected = gradients(parts, *tensors)
    poisoned = [x.clone() for x in tensors]
    for x in poisoned[2:]:
        x[~there] = torch.nan
    ours = gradients(lambda *x: whole_loss(*x, there), *poisoned)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    close(whole_loss(*tensors, there, weight=0.0), clip_loss(unit(image), unit(caption), SCALE).item())
    turned = [x.clone() for x in (*tensors[2:], there)]
    for x in turned:
        x[0] = x[0].flip(0)
    close(whole_loss(image, caption, *turned), expected[0].item())  # regions of an image, in another order


def test_one_region_an_image_without_filter_is_clip():
    w = unit(Y)
    close(region_text_loss(unit(Z), w, SCALE, threshold=2.0), clip_loss(unit(Z), w, SCALE).item())
    same = w[:1].repeat(4, 1)  # cosines of 1, and what rounding adds: a threshold of 2 is above
    close(region_text_loss(unit(Z), same, SCALE, threshold=2.0), clip_loss(unit(Z), same, SCALE).item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("slots", [0, 2])
def test_no_regions(slots, dtype):
    image, caption = unit(Z).to(dtype), unit(Y).to(dtype)
    nothing, none = torch.empty(0, 6, dtype=dtype), torch.empty(0, 4, dtype=dtype)
    there = torch.zeros(4, slots, dtype=torch.bool)
    assert region_text_loss(nothing, nothing, SCALE) == 0 and grounding_loss(none, none) == 0

    def loss(image, caption, *regions):
        return cloc_loss(image, caption, *regions, there, SCALE)

    found = gradients(loss, image, caption, nothing, nothing, none, none)
    assert torch.equal(found[0], clip_loss(image, caption, SCALE))
    assert all(x.isfinite().all() for x in found)


def test_ranks_equal_one():
    tensors = problem(torch.tensor([[True, False], [True, True], [False, False], [False, True], [False, False]]))
    assert_ranks_equal_one(whole_loss, tensors, (3, 2), "gather")
    assert_ranks_equal_one(whole_loss, tensors, (2, 3), "ring")
    assert_ranks_equal_one(whole_loss, tensors, (4, 1), "gather")  # the second has no region at all
    assert_ranks_equal_one(whole_loss, problem(torch.zeros(5, 2, dtype=torch.bool)), (2, 3), "ring")


def test_what_does_not_fit_is_named():
    u, w, b = unit(Z), unit(Y), waves(4, 4, 2)
    there = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"region_text_loss: texts must be \[N, 6\] to match regions, got \[4, 5\]"):
        region_text_loss(u, w[:, :5], SCALE)
    with pytest.raises(ValueError, match="region_text_loss: texts must be as many as regions, 4, got 3"):
        region_text_loss(u, w[:3], SCALE)
    with pytest.raises(
        ValueError, match=r"grounding_loss: boxes and found must be \[R, 4\], got \[4, 4\] and \[4, 3\]"
    ):
        grounding_loss(b, b[:, :3])
    with pytest.raises(ValueError, match="cloc_loss: there says 4 regions, got 3 regions and 4 boxes"):
        cloc_loss(u[:2], w[:2], u[:3], w[:3], b, b, there, SCALE)
    with pytest.raises(ValueError, match=r"cloc_loss: there must be bool \[2, M\], got torch.bool \[3, 2\]"):
        cloc_loss(u[:2], w[:2], u, w, b, b, there[[0, 0, 1]], SCALE)
    prompter = Prompter(8, 6).double()
    with pytest.raises(ValueError, match=r"Prompter: prompts must be \[4, T, 8\], got \[3, 2, 8\]"):
        prompter.boxes(b[:3].abs(), torch.zeros(2, 5, 8, dtype=torch.float64), there)
    with pytest.raises(ValueError, match=r"Prompter: tokens must be \[B, P, 8\], got \[2, 5, 9\]"):
        prompter.boxes(b, torch.zeros(2, 5, 9, dtype=torch.float64), there)
    with pytest.raises(ValueError, match="Prompter: pool must be one of 'all', 'prompt', got 'mean'"):
        Prompter(8, 6, "mean")
    with pytest.raises(ValueError, match="sinusoids: width must be a multiple of 4, got 6"):
        sinusoids(b[:, :2], 6)


# --------------------------------------------------------------------------------------------------------- the prompter


def test_sinusoids_are_the_usual_ones():
    points = torch.tensor([[0.3, 0.8]], dtype=torch.float64)
    expected = []
    for x in (0.3, 0.8):
        angles = torch.tensor([6.283185307179586 * x / 10000 ** (k / 3) for k in range(3)], dtype=torch.float64)
        expected += [angles.sin(), angles.cos()]
    close(sinusoids(points, 12), *torch.cat(expected).tolist())


def plain_layer(prompter: Prompter) -> nn.TransformerEncoderLayer:
    """torch's own, with the prompter's weights."""
    d = prompter.width
    layer = nn.TransformerEncoderLayer(d, 1, 4 * d, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64)
    attention = layer.self_attn
    pairs = [
        (attention.in_proj_weight, prompter.qkv.weight), (attention.in_proj_bias, prompter.qkv.bias),
        (attention.out_proj, prompter.out), (layer.linear1, prompter.inner), (layer.linear2, prompter.outer),
        (layer.norm1, prompter.norm1), (layer.norm2, prompter.norm2),
    ]  # fmt: skip
    for theirs, ours in pairs:
        if isinstance(theirs, nn.Module):
            theirs.load_state_dict(ours.state_dict())
        else:
            theirs.data.copy_(ours.data)
    return layer


@pytest.fixture
def prompters():
    torch.manual_seed(0)
    made = {pool: Prompter(12, 5, pool).double() for pool in ("all", "prompt")}
    for prompter in made.values():
        for p in prompter.parameters():  # norms and biases too
            nn.init.normal_(p, std=0.4)
    return made


@pytest.mark.parametrize("pool", ["all", "prompt"])
@pytest.mark.parametrize("kind", ["boxes", "texts"])
def test_is_a_layer_over_prompt_and_tokens(prompters, pool, kind):
    """One region at a time, the tokens copied for each."""
    prompter = prompters[pool]
    tokens = torch.randn(4, 7, 12, dtype=torch.float64, requires_grad=True)
    given = torch.rand(5, 4 if kind == "boxes" else 5, dtype=torch.float64, requires_grad=True)
    layer, rows = plain_layer(prompter), []
    for image, x in zip(THERE.nonzero()[:, 0].tolist(), given, strict=True):
        prompt = sinusoids(x.view(2, 2), 12) if kind == "boxes" else prompter.lift(x)[None]
        out = layer(torch.cat([prompt, tokens[image]])[None])[0]
        rows.append(prompter.projection((out if pool == "all" else out[: len(prompt)]).mean(0)))
    ours, theirs = getattr(prompter, kind)(given, tokens, THERE), torch.stack(rows)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    weight = torch.randn_like(ours)
    found, expected = (torch.autograd.grad((x * weight).sum(), [tokens, given]) for x in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("pool", ["all", "prompt"])
def test_a_box_does_not_hear_of_others(prompters, pool):
    prompter, tokens = prompters[pool], torch.randn(4, 7, 12, dtype=torch.float64)
    boxes = torch.rand(5, 4, dtype=torch.float64)
    both = prompter.boxes(boxes, tokens, THERE)
    changed = boxes.clone()
    changed[0] += 0.3  # of the same image as 1
    moved = prompter.boxes(changed, tokens, THERE)
    torch.testing.assert_close(moved[1:], both[1:], rtol=0, atol=1e-13)
    assert (moved[0] - both[0]).abs().max() > 1e-3
    only = torch.zeros_like(THERE)
    only[3, 1] = True
    torch.testing.assert_close(prompter.boxes(boxes[4:], tokens, only)[0], both[4], rtol=0, atol=1e-13)


@pytest.mark.parametrize("pool", ["all", "prompt"])
def test_no_box_no_row(prompters, pool):
    tokens = torch.randn(4, 7, 12, dtype=torch.float64)
    for slots in (0, 3):
        none = torch.zeros(4, slots, dtype=torch.bool)
        assert prompters[pool].boxes(torch.empty(0, 4, dtype=torch.float64), tokens, none).shape == (0, 5)


# ------------------------------------------------------------------------------------------------------------- the loop


def test_regions_are_drawn_among_those_that_can_be_used():
    boxes = torch.tensor([0.1, 0.2, 0.6, 0.9]).repeat(3, 9, 1)
    boxes[0, 0, 2] = 0.1  # no area
    boxes[0, 1, 3] = 0.1  # upside down
    boxes[0, 2, 2] = 1.1
    boxes[0, 3, 0] = -0.1
    boxes[0, 4, 1] = torch.nan
    there = torch.ones(3, 9, dtype=torch.bool)
    there[0, 5] = False
    there[1] = False
    seen = set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        chosen, kept = choose_regions(boxes, there, 4, generator)
        assert kept.sum(1).tolist() == [3, 0, 4] and set(chosen[0][kept[0]].tolist()) == {6, 7, 8}
        assert len(set(chosen[2].tolist())) == 4
        seen |= set(chosen[2].tolist())
    assert seen == set(range(9))


def test_errors_of_boxes():
    boxes = torch.tensor([[0.0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]])
    found = torch.tensor([[0.0, 0, 0.5, 0.5], [0.0, 0, 0.5, 0.5]])
    assert list(cloc_pages.errors(boxes, found).values()) == pytest.approx([25, 50])
    found[1] = torch.tensor([0.75, 0.5, 1, 1])
    assert list(cloc_pages.errors(boxes, found).values()) == pytest.approx([100 * 0.25 / 8, 75])
    found[1] = torch.tensor([1, 1, 0.5, 0.5])  # inside out: no area
    assert cloc_pages.errors(boxes, found)["box IoU, %"] == pytest.approx(50)


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    models = train_a_little("cloc", tmp_path, monkeypatch, BATCH=16)["models"]
    recalls = {"region → name R@1, %", "name → region R@1, %", "page → caption R@1, %"}
    assert set(models["CLIP"]["metrics"]) == recalls
    assert set(models["CLOC"]["metrics"]) == recalls | {"box error, % of a side", "box IoU, %"}
    for found in models.values():
        assert len(found["losses"]) == 2 and set(found["implementations"]) == {"similarity_lse"}
    assert models["CLOC"]["losses"][0] > models["CLIP"]["losses"][0] + 1  # the same start, and the regions' loss
