"""SuperEdit against its definition: golden values, the dense formula, invariants, edges, ranks, diffusion, command."""

import math

import pytest
import torch
import torch.nn.functional as F
from golden_decoding import F as waves
from recipes import assert_ranks_equal_one, close, gradients, train_a_little

from fastcontrast.recipes._parts.superedit_edits import instruction, word_pairs, wrong_instructions
from fastcontrast.recipes.superedit import (
    Schedule,
    UNet,
    both_branches,
    drop_conditions,
    guided,
    superedit_loss,
    triplet_mask,
    triplet_weight,
)

Y = waves(4, 16, 0).view(4, 4, 2, 2)
POSITIVE = Y + 0.3 * waves(4, 16, 0.5).view_as(Y)
NEGATIVE = Y + 0.3 * waves(4, 16, 2.0).view_as(Y)
TRIPLE = Y, POSITIVE, NEGATIVE
DROPPED, KEPT = (torch.tensor(x).bool() for x in ([1, 0, 1, 0], [1, 1, 0, 1]))
PLAIN = 0.044902070965  # mean of the four d⁺: what each golden total exceeds its triplet by


def dense(y, positive, negative, mask=None, weight=1.0, margin=5e-4, threshold=0.0, detach=False):
    """Sample by sample."""
    mask = [1.0] * len(y) if mask is None else mask.double().tolist()
    total = 0.0
    for b, m in enumerate(mask):
        near, far = ((x[b] - y[b]).square().mean() for x in (positive, negative))
        h = (near.detach() if detach else near) - far + margin
        total = total + (m * h if h > 0 and h >= threshold else 0.0 * h)
    return (positive - y).square().mean() + weight * total / max(sum(mask), 1)


@pytest.mark.parametrize(
    ("which", "triplet", "total"),
    [
        ("official", 0.001126652864, 0.046028723938),
        ("both_present", 0.001689979293, 0.046592050367),
        ("none", 0.002194440411, 0.047096511485),
    ],
)
def test_golden(which, triplet, total):
    mask = triplet_mask(DROPPED, KEPT, which)
    close(superedit_loss(*TRIPLE, mask), total)
    close(superedit_loss(*TRIPLE, mask) - superedit_loss(*TRIPLE, mask, weight=0.0), triplet)
    close(superedit_loss(*(x.float() for x in TRIPLE), mask), total, atol=1e-8)


def test_golden_distances_and_hinges():
    near = torch.tensor([0.047367556391, 0.046403112934, 0.043062486242, 0.042775128728], dtype=torch.float64)
    hinge = torch.tensor([0.005397803062, 0.003379958603, 0, 0], dtype=torch.float64)
    for b in range(4):
        one = [x[b : b + 1] for x in TRIPLE]
        close(superedit_loss(*one, weight=0.0), near[b])
        close(superedit_loss(*one), near[b] + hinge[b])
        far = superedit_loss(*one, margin=1.0) - 2 * near[b] - 1  # −d⁻
        close(-far, (0.042469753329, 0.043523154331, 0.047010455852, 0.047277471132)[b])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_dense_formula(dtype, tolerance):
    torch.manual_seed(0)
    triple = [torch.randn(7, 3, 5, 3, dtype=torch.float64) for _ in range(3)]
    mask = torch.arange(7) % 3 != 0
    # Some hinges are 0, some below the threshold, some above.
    for settings in ({}, {"threshold": 0.3, "margin": 0.2, "weight": 0.7}, {"stop_pos_grad": True}):
        theirs = {"detach" if name == "stop_pos_grad" else name: x for name, x in settings.items()}
        expected = gradients(lambda *x, kw=theirs: dense(triple[0], *x, mask, **kw), *triple[1:])
        leaves = [x.to(dtype) for x in triple]
        found = gradients(lambda *x, y=leaves[0], kw=settings: superedit_loss(y, *x, mask, **kw), *leaves[1:])
        for ours, truth in zip(found, expected, strict=True):
            assert ours.dtype == dtype and truth.norm() > 0
            assert (ours.double() - truth).norm() <= tolerance * truth.norm()


def test_gradients_are_those_of_the_formula():
    mask, n = torch.tensor([True, False, True, True]), Y[0].numel()
    plain = gradients(lambda p, q: superedit_loss(Y, p, q, mask, weight=0.0), *TRIPLE[1:])
    whole = gradients(lambda p, q: superedit_loss(Y, p, q, mask), *TRIPLE[1:])
    active = torch.tensor([1.0, 0, 0, 0]).double().view(4, 1, 1, 1)  # hinges above 0, and not masked
    torch.testing.assert_close(whole[1] - plain[1], 2 / n * (POSITIVE - Y) * active / 3)
    torch.testing.assert_close(whole[2], -2 / n * (NEGATIVE - Y) * active / 3)
    assert not plain[2].any()


def test_invariants():
    close(superedit_loss(*TRIPLE, weight=0.0), F.mse_loss(POSITIVE, Y))
    close(superedit_loss(Y, POSITIVE, POSITIVE, margin=0.3), PLAIN + 0.3)
    shared = gradients(lambda x: superedit_loss(Y, x, x) - superedit_loss(Y, x, x, weight=0.0), POSITIVE)
    close(shared[1].abs().max(), 0.0, atol=1e-16)
    wide = gradients(lambda p, q: superedit_loss(Y, p, q, margin=100.0), *TRIPLE[1:])
    direct = gradients(lambda p, q: 2 * (p - Y).square().mean() - (q - Y).square().mean(), *TRIPLE[1:])
    torch.testing.assert_close(wide[1:], direct[1:])
    # d⁻ beyond d⁺ by the margin everywhere: nothing is left to push
    _, _, pushed = gradients(lambda p, q: superedit_loss(Y, p, q), POSITIVE, Y + 5 * (NEGATIVE - Y))
    assert not pushed.any()
    scaled = [Y + 3 * (x - Y) for x in TRIPLE]
    torch.testing.assert_close(superedit_loss(*scaled, margin=9 * 5e-4), 9 * superedit_loss(*TRIPLE))


def test_the_threshold_drops_small_hinges():
    close(superedit_loss(*TRIPLE, threshold=0.004), PLAIN + 0.005397803062 / 4)
    close(superedit_loss(*TRIPLE, threshold=0.01), PLAIN)


def test_stopping_the_positive_pushes_the_negative_alone():
    plain = gradients(lambda p, q: superedit_loss(Y, p, q, weight=0.0), *TRIPLE[1:])
    whole, stopped = (
        gradients(lambda p, q, s=s: superedit_loss(Y, p, q, stop_pos_grad=s), *TRIPLE[1:]) for s in (False, True)
    )
    assert whole[0] == stopped[0]
    torch.testing.assert_close(stopped[1], plain[1], rtol=0, atol=0)
    torch.testing.assert_close(stopped[2], whole[2], rtol=0, atol=0)
    assert (whole[1] != plain[1]).any()


def test_at_the_kink_there_is_no_gradient():
    y, p = torch.zeros(1, 2), torch.tensor([[1.0, 1.0]])
    q = torch.tensor([[1.5, 0.5]])  # d⁺ = 1, d⁻ = 1.25
    for margin, moves in ((0.25, False), (0.2500001, True)):
        *_, pushed = gradients(lambda p, q, m=margin: superedit_loss(y, p, q, margin=m), p, q)
        assert pushed.any() == moves


def test_an_empty_mask_gives_zero_with_a_graph():
    p, q = (x.clone().requires_grad_() for x in TRIPLE[1:])
    loss = superedit_loss(Y, p, q, torch.zeros(4).bool())
    close(loss, PLAIN)
    loss.backward()
    assert q.grad is not None and not q.grad.any()  # ranks that wait for a gradient get one
    nothing = [torch.empty(0, 4, 2, 2) for _ in range(3)]
    assert superedit_loss(*nothing) == 0


def test_half_precision_keeps_a_margin_below_its_rounding():
    """Two distances near 1 that differ by less than bfloat16 can say."""
    y = torch.zeros(1, 4096, dtype=torch.bfloat16)
    p, q = torch.ones_like(y), torch.ones_like(y)
    q[0, 0] = 1.5  # d⁻ = 1 + 1.25 / 4096
    close(superedit_loss(y, p, q) - superedit_loss(y, p, q, weight=0.0), 5e-4 - 1.25 / 4096, atol=1e-7)
    y = y.float() + 1e-3  # noise in float32, answers of a network under autocast
    close(superedit_loss(y, p, q), superedit_loss(y, p.float(), q.float()))


def test_one_uniform_drops_text_image_or_both():
    dropped, kept = drop_conditions(torch.tensor([0.0, 0.0499, 0.05, 0.0999, 0.1, 0.1499, 0.1501, 0.9]), 0.05)
    assert dropped.int().tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert kept.int().tolist() == [1, 1, 0, 0, 0, 0, 1, 1]


def test_masks():
    dropped, kept = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 0, 0, 1]).bool()
    expected = {"official": [0, 1, 1, 1], "both_present": [0, 0, 0, 1], "none": [1, 1, 1, 1]}
    for which, mask in expected.items():
        assert triplet_mask(dropped, kept, which).tolist() == [bool(x) for x in mask]
    with pytest.raises(ValueError, match=r"triplet_mask: which must be one of .*'official'"):
        triplet_mask(dropped, kept, "all")


def test_the_triplet_sets_in_at_the_global_step():
    assert [triplet_weight(i, 2000, 0.5) for i in (0, 1999, 2000, 6000)] == [0, 0, 0.5, 0.5]


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"superedit_loss: mask must be bool \[4\], .*got \[3\]"):
        superedit_loss(*TRIPLE, torch.ones(3).bool())
    with pytest.raises(ValueError, match=r"superedit_loss: mask must be bool .*float32"):
        superedit_loss(*TRIPLE, torch.ones(4))
    with pytest.raises(ValueError, match=r"negative must be .*like target"):
        superedit_loss(Y, POSITIVE, NEGATIVE[:, :3])


def loss_of(y, positive, negative, kept):
    return superedit_loss(y, positive, negative, kept.bool(), margin=0.1)


def test_ranks_equal_one():
    """The first rank has no sample left."""
    kept = torch.tensor([0, 0, 1, 1, 0])
    y, p, q = (torch.sin(torch.arange(60.0).double() * c + 1).view(5, 12) for c in (0.7, 1.1, 1.9))
    assert_ranks_equal_one(loss_of, [y, p, q, kept], (2, 3))


def test_the_schedule_is_stable_diffusions():
    schedule = Schedule()
    close(schedule.kept[:2], 1 - 0.00085, (1 - 0.00085) * (1 - (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) / 999) ** 2))
    clean, noise, t = torch.ones(2, 3), 2 * torch.ones(2, 3), torch.tensor([0, 999])
    a = schedule.kept[t].sqrt().float(), (1 - schedule.kept[t]).sqrt().float()
    torch.testing.assert_close(schedule.add_noise(clean, noise, t)[:, 0], a[0] + 2 * a[1])
    torch.testing.assert_close(schedule.velocity(clean, noise, t)[:, 0], 2 * a[0] - a[1])


def test_sampling_finds_what_a_perfect_prediction_knows():
    schedule, truth = Schedule(), torch.rand(2, 1, 4, 4) * 2 - 1

    def predict(z, t):
        a = schedule.kept[t].view(-1, 1, 1, 1).float()
        return schedule.velocity(truth, (z - a.sqrt() * truth) / (1 - a).sqrt(), t)

    torch.testing.assert_close(schedule.sample(predict, torch.randn(2, 1, 4, 4), 5), truth, rtol=1e-4, atol=1e-4)


def test_guidance_weighs_three_branches_of_one_batch():
    def network(z, t, image, text):  # tells its branch
        assert len(z) == len(t) == 6
        return z + 10 * image.sum((1, 2, 3), keepdim=True) + 100 * text.sum(1)[:, None, None, None]

    z, image, text = torch.zeros(2, 1, 1, 1), torch.ones(2, 1, 1, 1), torch.ones(2, 1)
    found = guided(network, z, torch.zeros(2), image, text, 0 * text, text_scale=2.0, image_scale=1.5)
    assert found.flatten().tolist() == [0 + 1.5 * 10 + 2 * 100] * 2


def test_both_branches_share_all_but_the_text():
    torch.manual_seed(0)
    network = UNet(4, 6, width=8)
    torch.nn.init.normal_(network.leave[-1].weight)
    noisy, image, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    right, wrong = torch.randn(3, 6), torch.randn(3, 6)
    for found, text in zip(both_branches(network, noisy, t, image, right, wrong), (right, wrong), strict=True):
        torch.testing.assert_close(found, network(noisy, t, image, text), rtol=1e-4, atol=1e-4)
    assert not torch.equal(*both_branches(network, noisy, t, image, right, wrong))


def test_instructions_come_from_names():
    names = [("bell",), ("bell", "outline"), ("bell", "check"), ("bell", "check", "outline"), ("bell", "ring")]
    assert word_pairs(names) == [
        (names[0], names[1], "outline"), (names[0], names[2], "check"),
        (names[1], names[3], "check"), (names[2], names[3], "outline"),
    ]  # fmt: skip
    assert instruction("check") == "add the check" and instruction("outline") == "make it outline"
    wrong = wrong_instructions("check", adds=False)
    assert wrong[0] == "add the check" and all(text.startswith("remove the ") for text in wrong[1:])
    for word in ("check", "outline"):
        assert instruction(word) not in wrong_instructions(word) and len(set(wrong_instructions(word))) == 4


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    results = train_a_little("superedit", tmp_path, monkeypatch, BATCH=8)
    plain, ours = results["models"].values()
    assert set(results["models"]) == {"denoising alone", "SuperEdit"}
    assert ours["losses"][0] > plain["losses"][0]  # the same start, and from step ⌊2/3⌋ = 0 on the triplet
    for found in (plain, ours):
        assert list(found["metrics"]) == ["right instruction is better, %", "error"]
        assert all(math.isfinite(x) for x in found["metrics"].values())
