"""CCP against its definition: golden values, the dense formula, batch norm of two sides, banks, calibration, a run."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from golden_decoding import F as waves
from recipes import assert_ranks_equal_one, assert_resumes, close, gradients, train_a_little, unit
from torch import nn

from fastcontrast import info_nce
from fastcontrast.recipes._parts import ccp_data
from fastcontrast.recipes._parts.ccp_loop import OrdinaryBatchNorm
from fastcontrast.recipes.ccp import (
    AsymmetricBatchNorm,
    Banks,
    Calibration,
    Projection,
    ccp_loss,
    dpr_loss,
    mutual_pairs,
    procrustes,
    window_pairs,
)

SCALE = 1 / 0.07
CENTRE, CONTEXT, BANK = waves(4, 8, 0), waves(4, 8, 0.3), unit(waves(10, 8, 1.7))


def dense_loss(centre, context, bank, scale=SCALE, in_batch=False):
    """Cross entropies with label 0 over [positive, bank], or over [all of the batch, bank] with label i."""
    total = 0.0
    for a, b in ((centre, context), (context, centre)):
        own = scale * a @ b.T
        first = own if in_batch else own.diagonal()[:, None]
        logits = torch.cat([first, scale * a @ bank.T], 1)
        labels = torch.arange(len(a)) if in_batch else torch.zeros(len(a), dtype=torch.long)
        total = total + F.cross_entropy(logits, labels) / 2
    return total


def rows(n, d, seed, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def norm_of_golden(dtype=torch.float64):
    norm = AsymmetricBatchNorm(8, affine=False).to(dtype)
    norm.running_mean.fill_(0.1)
    norm.running_var.fill_(0.6)
    return norm


# ----------------------------------------------------------------------------------------------------------- objective


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-11), (torch.float32, 2e-6)])
def test_golden(dtype, atol):
    centre, context, bank = (x.to(dtype) for x in (CENTRE, CONTEXT, BANK))
    close(ccp_loss(unit(centre), unit(context), bank), 0.214113677096, atol=atol)
    sides = norm_of_golden(dtype)(centre, context)
    close(ccp_loss(*map(unit, sides), bank), 0.609678283014, atol=atol)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("in_batch", [False, True])
def test_equals_the_dense_formula(dtype, tolerance, in_batch):
    centre, context, bank = (unit(rows(n, 19, n)) for n in (37, 37, 301))
    context, scale = unit(centre + 0.3 * context), torch.tensor(9.0, dtype=torch.float64)
    leaves = centre, context, scale
    expected = gradients(lambda c, x, s: dense_loss(c, x, bank, s, in_batch), *leaves)
    bank = bank.to(dtype)
    found = gradients(lambda c, x, s: ccp_loss(c, x, bank, s, in_batch=in_batch), *(x.to(dtype) for x in leaves))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()
    of_bank = gradients(lambda c, m: ccp_loss(c, context, m), centre, bank.double())[2]
    assert of_bank.norm() == 0  # a constant


def test_invariants():
    centre, context = unit(CENTRE), unit(CONTEXT)
    both = {"directions": ("query_to_key", "key_to_query"), "joint": False}
    for bank in (None, BANK[:0]):  # without a bank: symmetric InfoNCE
        torch.testing.assert_close(
            ccp_loss(centre, context, bank, in_batch=True), info_nce(centre, context, SCALE, **both)
        )
    loss = ccp_loss(centre, context, BANK)
    torch.testing.assert_close(ccp_loss(centre, context, BANK.flip(0)), loss)
    torch.testing.assert_close(ccp_loss(context, centre, BANK), loss)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(ccp_loss(centre[order], context[order], BANK), loss)


def test_nothing_that_competes_is_a_loss_of_0_and_a_warning():
    for bank in (None, BANK[:0]):
        with pytest.warns(UserWarning, match="ccp_loss: the bank is empty"):
            value, *found = gradients(lambda c, x, bank=bank: ccp_loss(c, x, bank), unit(CENTRE), unit(CONTEXT))
        assert value == 0 and all(g.norm() == 0 for g in found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(ccp_loss(CENTRE[:0], CONTEXT[:0], BANK), 0)


def test_a_positive_met_before_can_be_left_out():
    centre, context = unit(CENTRE), unit(CONTEXT)
    bank = torch.cat([BANK, context[1:2], centre[2:3]])
    expected = 0.0
    for a, b in ((centre, context), (context, centre)):
        logits = torch.cat([(a * b).sum(1, keepdim=True), a @ bank.T], 1) * SCALE
        too_near = F.pad(b @ bank.T > 0.999, (1, 0))
        expected += F.cross_entropy(logits.masked_fill(too_near, -torch.inf), torch.zeros(4).long()) / 2
    torch.testing.assert_close(ccp_loss(centre, context, bank, limit=0.999), expected)
    assert ccp_loss(centre, context, bank) > expected + 0.1
    close(ccp_loss(centre, context, bank, limit=-2.0), 0)  # nothing is left


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"ccp_loss: context must be \[4, 8\] to match centre, got \[3, 8\]"):
        ccp_loss(CENTRE, CONTEXT[:3], BANK)
    with pytest.raises(ValueError, match=r"ccp_loss: bank must be \[N, 8\] to match centre, got \[10, 7\]"):
        ccp_loss(CENTRE, CONTEXT, BANK[:, :7])
    with pytest.raises(TypeError, match="ccp_loss: centre must be"):
        ccp_loss(CENTRE.long(), CONTEXT, BANK)


def test_half_precision_rounds_no_logit():
    halves = [unit(x).bfloat16() for x in (CENTRE, CONTEXT)]
    exact = ccp_loss(*(x.float() for x in halves), BANK.float())
    torch.testing.assert_close(ccp_loss(*halves, BANK.float()), exact, rtol=1e-6, atol=0)


def test_dpr():
    questions, contexts = rows(5, 16, 1), rows(15, 16, 2)
    positives = torch.arange(5) * 3  # each followed by its hard negatives
    expected = gradients(lambda q, p: F.cross_entropy(q @ p.T, positives), questions, contexts)
    found = gradients(lambda q, p: dpr_loss(q, p, positives), questions, contexts)
    torch.testing.assert_close(found, expected)


def whole(centre, context):
    """Heads' batch norm, and the batch's other pairs: all of what ranks share."""
    sides = AsymmetricBatchNorm(8).double()(centre, context)
    return ccp_loss(*map(unit, sides), BANK, in_batch=True)


def test_ranks_equal_one():
    assert_ranks_equal_one(whole, [rows(5, 8, 1), rows(5, 8, 2)], (3, 2))


# ---------------------------------------------------------------------------------------------------------- batch norm


def test_sides_take_turns_and_stored_statistics_move_once():
    norm, reference = AsymmetricBatchNorm(6).double(), nn.BatchNorm1d(6).double()
    for x in (norm, reference):
        nn.init.normal_(x.weight, generator=torch.Generator().manual_seed(1))
        nn.init.normal_(x.bias, generator=torch.Generator().manual_seed(2))
    for i in range(4):
        pair = rows(9, 6, i) * 2 + 1, rows(9, 6, 10 + i) - 3
        stored = nn.BatchNorm1d(6).double().eval()
        stored.load_state_dict(reference.state_dict())
        batch, other = pair[i % 2], pair[1 - i % 2]
        expected = [reference(batch), stored(other)]  # by what was stored before this step
        found = norm(*pair)
        torch.testing.assert_close([found[i % 2], found[1 - i % 2]], expected)
        torch.testing.assert_close(norm.state_dict(), reference.state_dict())
    norm.eval(), reference.eval()
    torch.testing.assert_close(norm(*pair), tuple(map(reference, pair)))


def test_gradients_of_batch_norm_are_of_the_statistics_before_the_step():
    norm, pair, weight = norm_of_golden(), (CENTRE, CONTEXT), rows(4, 8, 3)

    def dense(centre, context):
        batch = (centre - centre.mean(0)) / (centre.var(0, correction=0) + 1e-5).sqrt()
        return ((batch + (context - 0.1) / (0.6 + 1e-5) ** 0.5) * weight).square().sum()

    found = gradients(lambda c, x: (sum(norm(c, x)) * weight).square().sum(), *pair)
    torch.testing.assert_close(found, gradients(dense, *pair))


def test_equal_statistics_make_it_ordinary():
    norm, ordinary = (make(8, affine=False).double() for make in (AsymmetricBatchNorm, OrdinaryBatchNorm))
    norm.running_mean.copy_(CONTEXT.mean(0))
    norm.running_var.copy_(CONTEXT.var(0, correction=0))
    torch.testing.assert_close(norm(CENTRE, CONTEXT), ordinary(CENTRE, CONTEXT))


def test_a_single_row_has_no_statistics():
    norm = AsymmetricBatchNorm(8)
    with pytest.raises(ValueError, match="AsymmetricBatchNorm: in training a batch must have at least 2 rows, got 1"):
        norm(torch.ones(1, 8), torch.ones(1, 8))
    assert int(norm.num_batches_tracked) == 0 and norm.running_mean.norm() == 0
    norm.eval()(torch.ones(1, 8), torch.ones(1, 8))


def test_batch_norm_sums_halves_in_single_precision():
    pair = [(30 * rows(4096, 8, i, torch.float32) + 200).half() for i in range(2)]
    found, expected = (AsymmetricBatchNorm(8)(*x) for x in (pair, [x.float() for x in pair]))
    assert found[0].dtype == torch.float16
    torch.testing.assert_close(found[0].float(), expected[0].detach(), rtol=2e-3, atol=2e-3)


def test_the_projection():
    torch.manual_seed(0)
    head = Projection(6, 3, act=nn.Identity()).double()
    centre, context = rows(5, 6, 1), rows(5, 6, 2)
    hidden = head.first(centre)
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(head(centre, context)[0], unit(head.second(hidden)))
    relu = Projection(6, 3).double()
    relu.load_state_dict({**head.state_dict(), **{f"norm.{k}": v for k, v in relu.norm.state_dict().items()}})
    torch.testing.assert_close(relu(centre, context)[0], unit(head.second(hidden.relu())))


# ------------------------------------------------------------------------------------------------- documents and banks


def test_pairs_lie_in_one_window():
    found = window_pairs(torch.tensor([7, 3, 9, 5, 1]), 2)
    place = {7: 0, 3: 1, 9: 2, 5: 3, 1: 4}
    assert len(found) == len({tuple(pair) for pair in found.tolist()}) == 14
    assert all(1 <= abs(place[a] - place[b]) <= 2 for a, b in found.tolist())
    assert window_pairs(torch.tensor([4]), 2).shape == (0, 2) and len(window_pairs(torch.tensor([4, 5]), 3)) == 2
    with pytest.raises(ValueError, match="window_pairs: window must be at least 1, got 0"):
        window_pairs(torch.arange(3), 0)


def test_a_bank_holds_the_last_vectors_of_its_language():
    banks = Banks(5, 2)
    assert banks.of("de") is None
    pushed = torch.arange(16.0).view(4, 2, 2)
    banks.push("de", pushed[0], pushed[1])
    torch.testing.assert_close(banks.of("de"), torch.cat([pushed[0], pushed[1]]))  # centres first; part of it is filled
    banks.push("fr", pushed[0], pushed[1])
    banks.push("de", pushed[2].requires_grad_(), pushed[3])
    assert not banks.of("de").requires_grad
    held = {tuple(row) for row in banks.of("de").tolist()}
    assert held == {tuple(row) for row in pushed.detach().flatten(0, 1)[-5:].tolist()}
    torch.testing.assert_close(banks.of("fr"), torch.cat([pushed[0], pushed[1]]).detach())


class Loop(nn.Module):
    """What a step of the loop changes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.banks = Projection(6, 3), Banks(8, 3)


def test_resumes():
    def step(loop, i):
        language = ("de", "fr")[i % 2]
        sides = loop.head(rows(4, 6, i, torch.float32), rows(4, 6, 10 + i, torch.float32))
        loop.banks.push(language, *sides)
        return *sides, loop.banks.of(language)

    assert_resumes(Loop, step)


# --------------------------------------------------------------------------------------------------------- calibration


def test_calibration():
    x = rows(40, 6, 0) * torch.tensor([1, 5, 0.1, 2, 3, 0.7]) + torch.arange(6)
    fitted = Calibration(6).double()
    torch.testing.assert_close(fitted(x), x)  # fresh, it changes nothing
    y = fitted.fit(x)(x)
    torch.testing.assert_close(y.mean(0), torch.zeros(6).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(y.square().mean(0), torch.ones(6).double())  # the divisor is n
    pivot = unit(rows(30, 6, 1))
    turned = fitted.turn_towards(x, pivot)(x)
    torch.testing.assert_close(fitted.rotation @ fitted.rotation.T, torch.eye(6).double())
    assert (turned - y).norm() > 0.1
    torch.testing.assert_close(unit(turned) @ unit(turned).T, unit(y) @ unit(y).T)  # rankings inside stay
    again = Calibration(6).double()
    again.load_state_dict(fitted.state_dict())
    torch.testing.assert_close(again(x), turned)


def test_a_dimension_that_does_not_vary_becomes_0():
    x = torch.cat([rows(9, 2, 0), 0.1 + 1e-9 * rows(9, 1, 1)], 1)  # but for rounding
    assert Calibration(3).double().fit(x)(x)[:, 2].norm() == 0
    with pytest.raises(ValueError, match=r"Calibration\.fit: x must be \[N, 4\]"):
        Calibration(4).fit(x)
    with pytest.raises(ValueError, match=r"Calibration\.fit: x must have at least 1 row, got 0"):
        Calibration(3).fit(x[:0])


def test_procrustes_finds_the_rotation():
    x, rotation = rows(20, 6, 0), torch.linalg.qr(rows(6, 6, 1))[0]
    torch.testing.assert_close(procrustes(x, x @ rotation.T), rotation)
    y = rows(20, 6, 2)
    best = (x @ procrustes(x, y).T - y).norm()
    for seed in range(20):
        assert (x @ torch.linalg.qr(rows(6, 6, 100 + seed))[0].T - y).norm() >= best
    with pytest.raises(ValueError, match=r"procrustes: y must be \[20, 6\] to match x, got \[19, 6\]"):
        procrustes(x, y[:19])


def test_mutual_pairs():
    x, y = rows(30, 6, 0), rows(25, 6, 1)
    similarity = unit(x) @ unit(y).T
    own, other = mutual_pairs(x, y)
    expected = [(i, j) for i in range(30) for j in range(25)
                if similarity[i].argmax() == j and similarity[:, j].argmax() == i]  # fmt: skip
    assert list(zip(own.tolist(), other.tolist(), strict=True)) == expected and expected


# ----------------------------------------------------------------------------------------------------------------- run


def test_texts_and_their_neighbours():
    world = ccp_data.load()
    for name, language in world.items():
        assert 500 < len(language.texts) == len(language.codes) and "" not in language.texts
        assert int(language.pairs.max()) < len(language.texts) and (language.pairs[:, 0] != language.pairs[:, 1]).all()
        assert language.texts["yes,no,maybe"] != "" and (name != "en" or language.texts["Home"] == "Home")
    assert world["de"].texts["Home"] == "Start" and world["fr"].texts["Home"] == "Accueil"
    english = [*world["en"].texts]
    near = {frozenset((english[a], english[b])) for a, b in world["en"].pairs.tolist()}
    assert frozenset(("Personal info", "Permissions")) in near and frozenset(("Personal info", "Afrikaans")) not in near


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    results = train_a_little("ccp", tmp_path, monkeypatch, BATCH=16, WIDTH=16, BANK=40)
    assert [*results["models"]] == ["untrained", "one bank for all", "ordinary batch norm", "CCP"]
    for label, found in results["models"].items():
        assert len(found["losses"]) == (0 if label == "untrained" else 2)
        assert next(iter(found["metrics"])) == "translation R@1, %" and len(found["metrics"]) == 5
    first = {label: found["losses"][0] for label, found in results["models"].items() if found["losses"]}
    assert len({*first.values()}) == 3 and "similarity_lse" in results["models"]["CCP"]["implementations"]
