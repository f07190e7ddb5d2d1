"""uCLIP against its definition: golden values, the dense formulas, parts of a bank, edges, ranks, texts, a run."""

import pytest
import torch
from recipes import assert_ranks_equal_one, assert_resumes, close, gradients, train_a_little, unit, waves
from torch import nn

from fastcontrast.recipes._parts import uclip_data, uclip_retrieval
from fastcontrast.recipes._shared import icons
from fastcontrast.recipes._shared.django import phrases
from fastcontrast.recipes.uclip import Heads, look_up, merge, noisy, retrieve, uclip_loss

E, C = unit(waves(4, 6, 0)), unit(waves(4, 6, 1))
IMAGES, FOREIGN = unit(waves(7, 6, 2)), unit(waves(5, 6, 3))


def dense_retrieval(queries, bank, temperature=0.01):
    return unit((queries @ bank.T / temperature).softmax(1) @ bank)


def dense_loss(e, c, f, p, scale=100.0, text=1.0, pseudo=1.0, intra=0.1):
    def nce(a, b):
        logits = scale * a @ b.T
        return -(logits.log_softmax(1) + logits.log_softmax(0)).diagonal().mean() / 2

    apart = ((f - e + 1e-6).square().sum(1).sqrt() + (c - p + 1e-6).square().sum(1).sqrt()).mean() / 2
    return text * nce(e, c) + pseudo * nce(f, p) + intra * apart


def rows(n, width, seed, dtype=torch.float64):
    return unit(torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=dtype))


# ----------------------------------------------------------------------------------------------------------- retrieval


def test_golden_retrieval():
    p, f = retrieve(C, IMAGES), retrieve(E, FOREIGN)
    close(p[0], -0.33791634, -0.46861100, 0.38103054, 0.43355457, -0.42091940, -0.39482819)
    close(f[0], 0.45284395, 0.41952832, 0.42834739, 0.39337928, 0.39216495, 0.35623905)
    at_tenth = -0.32810565, -0.48372050, 0.37061096, 0.44369966, -0.40749463, -0.39760208
    close(retrieve(C, IMAGES, 0.1)[0], *at_tenth)


def test_golden_loss():
    z = E, C, retrieve(E, FOREIGN), retrieve(C, IMAGES)
    off = {"text": 0.0, "pseudo": 0.0, "intra": 0.0}
    close(uclip_loss(*z, **{**off, "text": 1.0}), 126.16959409)
    close(uclip_loss(*z, **{**off, "pseudo": 1.0}), 51.41954718)
    close(uclip_loss(*z, **{**off, "intra": 1.0}), 0.86153003)
    close(uclip_loss(*z), 177.67529427)
    close(uclip_loss(*z, 10.0, **{**off, "text": 1.0}), 12.67092290)
    close(uclip_loss(*z, 10.0, **{**off, "pseudo": 1.0}), 5.25306087)
    close(uclip_loss(*z, 10.0), 18.01013677)
    close(uclip_loss(*z, intra=0.0), 177.67529427 - 0.1 * 0.86153003, atol=2e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("count", "bank"), [(1, 1), (5, 1031), (37, 4099)])  # no multiple of a tile
def test_retrieval_equals_the_dense_formula(dtype, tolerance, count, bank):
    queries, stored = rows(count, 19, 1), rows(bank, 19, 2)
    found = retrieve(queries.to(dtype), stored.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), dense_retrieval(queries, stored), rtol=0, atol=10 * tolerance)


def test_parts_of_a_bank_merge_to_the_whole():
    queries, bank = rows(9, 12, 1), rows(101, 12, 2)
    expected = retrieve(queries, bank)
    for size in (1, 7, 100):
        parts = [look_up(queries, part) for part in bank.split(size)]
        for order in (parts, parts[::-1]):
            torch.testing.assert_close(merge(order), expected, rtol=0, atol=1e-12)
    order = torch.randperm(101)
    torch.testing.assert_close(retrieve(queries, bank[order]), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [16, 50, 1 << 14])
def test_a_bank_in_half_precision(chunk, monkeypatch):
    """All is exact but the stored rows; against a bank in float32, whose logits differ by 100 · 2⁻¹¹ at most."""
    monkeypatch.setattr(uclip_retrieval, "CHUNK", chunk)
    queries, bank = rows(9, 12, 1, torch.float32), rows(101, 12, 2, torch.float32)
    for dtype, tolerance in ((torch.float16, 1e-2), (torch.bfloat16, 1e-1)):
        found = retrieve(queries, bank.to(dtype))
        assert found.dtype == torch.float32
        exact = dense_retrieval(queries.double(), bank.to(dtype).double())
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)
        torch.testing.assert_close(found, retrieve(queries, bank), rtol=0, atol=tolerance)


def test_the_temperature_goes_from_the_mean_to_the_nearest():
    torch.testing.assert_close(retrieve(C, IMAGES, 1e9), unit(IMAGES.mean(0, keepdim=True)).expand(4, -1))
    nearest = IMAGES[(C @ IMAGES.T).argmax(1)]
    torch.testing.assert_close(retrieve(C, IMAGES, 1e-5), nearest)
    torch.testing.assert_close(retrieve(IMAGES[:3], IMAGES, 1e-5), IMAGES[:3])  # a row of the bank finds itself


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_opposite_rows_cancel(dtype):
    row = torch.tensor([[1.0, 0, 0, 0]], dtype=dtype)
    across = torch.tensor([[0, 1.0, 0, 0]], dtype=dtype)
    close(retrieve(across, torch.cat([row, -row])), 0, 0, 0, 0)


def test_retrieval_has_no_gradient():
    leaves = [x.clone().requires_grad_() for x in (C, IMAGES)]
    assert not retrieve(*leaves).requires_grad
    with pytest.raises(ValueError, match=r"look_up: bank must be \[N, 6\] to match queries, got \[7, 5\]"):
        retrieve(C, IMAGES[:, :5])


# ------------------------------------------------------------------------------------------------------ loss and heads


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("weights", [(1, 1, 0.1), (0, 1, 0.5), (2, 0, 0), (0, 0, 1)])
def test_the_loss_equals_the_dense_formula(dtype, tolerance, weights):
    z = [rows(23, 9, seed) for seed in range(4)]
    terms = dict(zip(("text", "pseudo", "intra"), weights, strict=True))
    expected = gradients(lambda *z: dense_loss(*z, 30.0, **terms), *z)
    found = gradients(lambda *z: uclip_loss(*z, 30.0, **terms), *(x.to(dtype) for x in z))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


def test_equal_rows_have_a_gradient():
    found = gradients(lambda f: uclip_loss(E, C, f, C, text=0, pseudo=0), E)
    close(found[0], 0.1e-6 * 6**0.5)
    assert found[1].isfinite().all()
    close(uclip_loss(E[:1], C[:1], C[:1], E[:1], intra=0.0), 0)


def test_heads_sizes_and_statistics():
    with torch.device("meta"):
        assert sum(p.numel() for p in Heads(768, 512).parameters()) == 3_023_360
        assert sum(p.numel() for p in Heads(384, 512).parameters()) == 1_743_104
    torch.manual_seed(0)
    heads = Heads(6, 5, 3).double()
    e, f, c, p = rows(8, 6, 1), rows(9, 6, 2), rows(8, 5, 3), rows(9, 5, 4)
    found = heads(e, c, f, p)
    for head, x, z in ((heads.of_text, e, found[0]), (heads.of_clip, c, found[1]), (heads.of_text, f, found[2])):
        first, norm, _, last = head
        y = x @ first.weight.T + first.bias
        y = (y - y.mean(0)) / (y.var(0, correction=0) + norm.eps).sqrt()  # its own batch's, whatever came before
        torch.testing.assert_close(z, unit(y.relu() @ last.weight.T + last.bias))
    running = torch.zeros(12, dtype=torch.float64)
    for x in (e, f):
        running = 0.9 * running + 0.1 * heads.of_text[0](x).mean(0)
    torch.testing.assert_close(heads.of_text[1].running_mean, running)
    with pytest.raises(ValueError, match="Heads: in training a batch must have at least 2 rows, got 1"):
        heads(e[:1], c[:1], f[:1], p[:1])
    assert heads.eval().text(e[:1]).shape == (1, 3)  # one question is legal


def test_only_the_heads_learn():
    torch.manual_seed(0)
    heads, frozen = Heads(6, 6, 4).double(), [x.clone().requires_grad_() for x in (IMAGES, FOREIGN)]
    e, c = (nn.Linear(6, 6).double().requires_grad_(False)(x) for x in (E, C))
    uclip_loss(*heads(e, c, retrieve(e, frozen[1]), retrieve(c, frozen[0]))).backward()
    assert all(p.grad is not None for p in heads.parameters()) and all(x.grad is None for x in frozen)


def test_noise():
    x = rows(2000, 32, 1)
    close(noisy(x, 0.0), *x.flatten().tolist())
    first, again = (noisy(x, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    close(first.norm(dim=1).mean(), 1)
    # ⟨x, N(x + σ ε)⟩ is about 1 / √(1 + σ² (D − 1))
    close((first * x).sum(1).mean(), (1 + 0.004 * 31) ** -0.5, atol=2e-3)


def test_shapes_are_checked():
    for i, name in enumerate("cfp", start=1):
        z = [E, E, E, E]
        z[i] = E[:3]
        with pytest.raises(ValueError, match=rf"uclip_loss: {name} must be \[4, 6\] to match e, got \[3, 6\]"):
            uclip_loss(*z)


def whole_loss(e, c):
    return uclip_loss(unit(e), unit(c), unit(c @ c.new_ones(6, 6).tril()), unit(e + c))


@pytest.mark.parametrize(("sizes", "how"), [((3, 2), "gather"), ((1, 4), "ring")])
def test_ranks_equal_one(sizes, how):
    assert_ranks_equal_one(whole_loss, [waves(5, 6, c) for c in range(2)], sizes, how)


def test_resumes():
    def make():
        torch.manual_seed(0)
        return Heads(6, 6, 4)

    def step(heads, i):
        x, y = unit(waves(5, 6, i)).float(), unit(waves(5, 6, i + 3)).float()
        loss = uclip_loss(*heads(x, y, y, x), 10.0)
        found = torch.autograd.grad(loss, list(heads.parameters()))
        with torch.no_grad():
            for p, g in zip(heads.parameters(), found, strict=True):
                p.sub_(0.01 * g)
        asked = Heads.clip(heads.eval(), y)
        heads.train()
        return torch.cat([loss.detach()[None], asked.flatten()])

    assert_resumes(make, step)


# ------------------------------------------------------------------------------------------------------- texts, the run


def test_texts_of_django():
    czech, finnish = phrases("cs"), phrases("fi")
    assert czech["Home"] == "Domů" and czech["Search"] == "Hledat" and finnish["Home"] == "Etusivu"
    assert len(czech) > 300
    for english, text in (czech | finnish).items():
        assert english and text and not set(english) & set("%{}<>&\n")
    assert not {"M", "S", "W"} & set(czech)  # letters that stand for days
    with pytest.raises(ValueError, match="phrases: language must be one of Django's locales, got 'xx'"):
        phrases("xx")


def test_pieces_of_words():
    codes = uclip_data.pieces(["Domů", "domů, domů", "", "x" * 400])
    assert codes.shape == (4, 160) and codes.max() < uclip_data.BUCKETS
    assert (codes[0] > 0).sum() == 1 + 4 + 3 + 2  # <domů> whole, and its parts of 3, 4 and 5 letters
    assert set(codes[1].tolist()) == set(codes[0].tolist())
    assert not codes[2].any() and codes[3].all()


def test_scores_are_means_over_languages():
    known = icons.Icons(icons.Pairs("icons", torch.zeros(4, 1), ["a", "b"], torch.tensor([0, 0, 1, 1]), None), None)
    questions = [("cs", "x", 0), ("cs", "y", 1), ("ro", "z", 1)]
    world = uclip_data.World(known, 0, *[None] * 5, questions, None, None)
    gallery = torch.eye(4)
    queries = torch.tensor([[0.0, 1, 0, 0], [1, 0, 0.5, 0.2], [1, 0, 0, 0]])  # first, second, and first of three equal
    found = world.scores(queries, gallery)
    close(found["foreign → icon R@1, %"], 25, atol=1e-5)
    close(found["foreign → icon R@10, %"], 100, atol=1e-5)


def test_batches_draw_names_and_other_texts():
    world = uclip_data.World(None, 6, torch.zeros(10, 1), *[None] * 7)
    rows = world.batch(3000, torch.Generator().manual_seed(0))
    assert set(rows.tolist()) == set(range(10))
    close((rows >= 6).double().mean(), 1 / 3, atol=0.03)


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(uclip_data, "BATCH", 32)
    results = train_a_little("uclip", tmp_path, monkeypatch, BATCH=32, ENCODER_STEPS=2)
    models = results["models"]
    assert list(models) == ["CLIP, asked in English", "first term alone", "uCLIP"]
    assert set(results["questions"]) == set(uclip_data.LANGUAGES)
    for label, found in models.items():
        assert list(found["metrics"]) == ["foreign → icon R@10, %", "foreign → icon R@1, %"]
        assert len(found["losses"]) == (0 if "English" in label else 2)
    assert models["uCLIP"]["implementations"].keys() == {"similarity_mix", "similarity_lse"}
    assert models["uCLIP"]["losses"][0] > models["first term alone"]["losses"][0]  # terms more
