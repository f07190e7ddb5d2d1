"""The primer's catalogue and CLESS against their definitions: golden values, dense forms, invariants, edges, ranks."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as N
from golden_decoding import F
from recipes import assert_ranks_equal_one, close, gradients, train_a_little, unit, waves

from fastcontrast import MemoryBank, info_nce, nt_xent_loss, siglip_loss, supcon_loss
from fastcontrast.recipes import primer
from fastcontrast.recipes._parts import primer_metric
from fastcontrast.recipes.primer import Lists

Q, P, NEGATIVE = (unit(F(4, 8, c)) for c in (0, 0.6, 0.9))
NOISE = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
SIX, LABELS = unit(F(6, 8, 0)), torch.tensor([0, 0, 1, 1, 2, 2])
Y = torch.tensor([1, 0, 1, 0])
BOTH = pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-8), (torch.float32, 2e-5)], ids=str)


@BOTH
def test_golden_values(dtype, atol):
    q, p, n, six, noise = (x.to(dtype) for x in (Q, P, NEGATIVE, SIX, NOISE))
    raw = [F(4, 8, c).to(dtype) for c in (0, 0.6)]
    found = {
        0.717268872353: info_nce(q, p, 10.0),
        0.523901191713: primer.ranking_nce(q, p, noise, 10.0),
        7.126343346378: primer.binary_nce(q, p, 10.0),
        1.781585836594: primer.binary_nce(q, p, 10.0, reduction="mean"),
        7.369800073181: primer.binary_nce(q, p, 10.0, noise=noise),  # K = 3 negatives in a row of four
        0.588337881565: primer.triplet_loss(q, p, n, 1.0),
        0.718527448785: primer.triplet_loss(q, p, n, 1.0, kind="euclidean"),
        0.658921733433: primer.n_pair_loss(*raw),
        0.085756109816: primer.pair_loss(q, p, Y, 0.5),
        0.236724399499: supcon_loss(six, LABELS, 10.0),
        3.177490883378: primer.lifted_structure_loss(six, LABELS, 1.0),
    }
    for expected, value in found.items():
        assert value.dtype == dtype
        close(value, expected, atol=atol)


# ------------------------------------------------------------------------------------------------------- dense formulas


def dense_distances(x, kind):
    squares = (x[:, None] - x).square().sum(2)
    return squares if kind == "squared" else torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)


def dense_triplets(x, labels, margin, mining, kind):
    """By loops over all triples."""
    d, terms = dense_distances(x, kind), []
    y, index = labels.tolist(), range(len(x))
    hinge = lambda i, p, n: (d[i, p] - d[i, n] + margin).relu()  # noqa: E731
    for i in index:
        near = [p for p in index if p != i and y[p] == y[i]]
        far = [n for n in index if y[n] != y[i]]
        if mining in ("all", "all_active"):
            terms += [hinge(i, p, n) for p, n in itertools.product(near, far)]
        elif mining == "hard" and near and far:
            terms.append(hinge(i, max(near, key=lambda p: d[i, p]), min(far, key=lambda n: d[i, n])))
        elif mining == "semi_hard":
            for p in near:
                inside = [n for n in far if d[i, p] < d[i, n] < d[i, p] + margin]
                terms += [hinge(i, p, min(inside, key=lambda n: d[i, n]))] if inside else []
    if mining == "all_active":
        terms = [term for term in terms if term > 0]
    return torch.stack(terms).mean()


def dense_pairs(x, labels, margin):
    d = dense_distances(x, "euclidean")
    other = ~torch.eye(len(x), dtype=torch.bool)
    terms = torch.where(labels[:, None] == labels, d.square(), (margin - d).relu().square())
    return terms[other].mean() / 2


def dense_lifted(x, labels, margin):
    d = dense_distances(x, "euclidean")
    push = (margin - d).masked_fill(labels[:, None] == labels, -math.inf)
    pairs = [(i, j) for i, j in itertools.permutations(range(len(x)), 2) if labels[i] == labels[j]]
    terms = [(torch.cat([push[i], push[j]]).logsumexp(0) + d[i, j]).relu().square() for i, j in pairs]
    return torch.stack(terms).sum() / (2 * len(pairs))


RULES = {
    f"{mining}, {kind}": (
        lambda x, y, mining=mining, kind=kind: primer.mined_triplet_loss(x, y, 0.4, mining=mining, kind=kind),
        lambda x, y, mining=mining, kind=kind: dense_triplets(x, y, 0.4, mining, kind),
    )
    for mining in primer_metric.MINING
    for kind in primer_metric.KINDS
}
RULES["pairs"] = (primer.labelled_pair_loss, lambda x, y: dense_pairs(x, y, 0.5))
RULES["lifted"] = (primer.lifted_structure_loss, lambda x, y: dense_lifted(x, y, 1.0))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_a_labelled_batch_equals_loops(rule, dtype, tolerance, monkeypatch):
    """In blocks of three rows of thirteen; classes of five sizes, one of a single sample."""
    monkeypatch.setattr(primer_metric, "TILE", 3 * 13)
    torch.manual_seed(1)
    x, labels = unit(torch.randn(13, 5, dtype=torch.float64)), torch.tensor([3, 1, 1, 2, 3, 3, 7, 1, 2, 3, 9, 9, 1])
    ours, dense = RULES[rule]
    expected = gradients(lambda x: 3 * dense(x, labels), x)
    found = gradients(lambda x: 3 * ours(x, labels), x.to(dtype))
    assert expected[0] > 0 and expected[1].any()
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and (a.double() - b).norm() <= tolerance * b.norm()


def test_aligned_pairs_and_triplets_equal_their_formulas():
    """At margins that some negatives are within."""
    y = torch.tensor([1.0, 0, 0, 0]).double()

    def pairs(a, b):
        d = ((a - b) ** 2).sum(1).sqrt()
        return (y * d**2 + (1 - y) * torch.clamp(1.2 - d, min=0) ** 2).mean() / 2

    assert 0 < pairs(Q, NEGATIVE) < 1
    found = gradients(lambda a, b: primer.pair_loss(a, b, y, 1.2), Q, NEGATIVE)
    torch.testing.assert_close(found, gradients(pairs, Q, NEGATIVE), rtol=1e-10, atol=1e-12)
    assert found[2][1:].any()  # from pairs that are none

    def triplets(a, p, n):
        return torch.clamp(((a - p) ** 2).sum(1).sqrt() - ((a - n) ** 2).sum(1).sqrt() + 0.3, min=0).mean()

    found = gradients(lambda *x: primer.triplet_loss(*x, 0.3, kind="euclidean"), Q, P, NEGATIVE)
    torch.testing.assert_close(found, gradients(triplets, Q, P, NEGATIVE), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("hardest", [False, True])
def test_vse_equals_loops(hardest, both):
    torch.manual_seed(2)
    q, k = unit(torch.randn(6, 5, dtype=torch.float64)), unit(torch.randn(6, 5, dtype=torch.float64))

    def dense(q, k):
        total = 0.0
        for s in (q @ k.T, k @ q.T)[: 1 + both]:
            hinges = [torch.stack([(0.6 - s[i, i] + s[i, j]).relu() for j in range(6) if j != i]) for i in range(6)]
            total = total + sum(h.max() if hardest else h.sum() for h in hinges) / 6
        return total

    found = gradients(lambda q, k: primer.vse_loss(q, k, 0.6, hardest=hardest, both=both), q, k)
    torch.testing.assert_close(found, gradients(dense, q, k), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_binary_nce_equals_bce_of_the_corrected_matrix(dtype, tolerance):
    torch.manual_seed(3)
    leaves = (unit(torch.randn(5, 4, dtype=torch.float64)), unit(torch.randn(7, 4, dtype=torch.float64)),
              torch.tensor(6.0, dtype=torch.float64))  # fmt: skip
    p_n, own = torch.rand(7, dtype=torch.float64) + 0.1, torch.tensor([6, 0, 0, 3, 5])
    y = N.one_hot(own, 7).double()

    def dense(q, k, scale):
        z = scale * q @ k.T - (2.5 * p_n).log()
        return N.binary_cross_entropy_with_logits(z, y, reduction="none").sum(1).mean()

    def ours(q, k, scale, **how):
        return primer.binary_nce(q, k, scale, noise=p_n.to(q), samples=2.5, **how)

    expected = gradients(dense, *leaves)
    for how in ({"positives": own}, {"query_labels": own, "key_labels": torch.arange(7)}, {"targets": y}):
        found = gradients(lambda q, k, s, how=how: ours(q, k, s, **how), *(x.to(dtype) for x in leaves))
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == dtype and (a.double() - b).norm() <= tolerance * b.norm()
    close(ours(*leaves, positives=own, reduction="sum"), 5 * expected[0])
    close(ours(*leaves, positives=own, reduction="mean"), expected[0] / 7)


NEAR, FAR = Lists.of([[1], [], [0, 2], [3]]), Lists.of([[0, 2, 3], [1], [3], []])


def test_lists_equal_loops():
    z = 10 * Q @ P.T - NOISE.log()
    rows = [(z[i, [*p]], z[i, [*n]]) for i, (p, n) in enumerate(
        [([1], [0, 2, 3]), ([], [1]), ([0, 2], [3]), ([3], [])])]  # fmt: skip
    losses = [N.softplus(torch.cat([-p, n])) for p, n in rows]
    sums, count = sum(x.sum() for x in losses), sum(len(x) for x in losses)
    expected = {"sum": sums, "mean": sums / count, "row_sum_mean": sums / 4,
                "row_mean_mean": sum(x.mean() for x in losses) / 4}  # fmt: skip
    bias = primer.noise_bias(NOISE)
    for reduction, value in expected.items():
        close(primer.listed_binary_nce(Q, P, NEAR, FAR, 10.0, key_bias=bias, reduction=reduction), value)
    ranked = [torch.stack([torch.cat([a[None], n]).logsumexp(0) - a for a in p]).mean() for p, n in rows if len(p)]
    close(primer.listed_ranking_nce(Q, P, NEAR, FAR, 10.0, key_bias=bias), sum(ranked) / 3)
    close(sum(ranked[2:]), 0)  # no negatives
    leaves = Q, P

    def ours(q, k):
        return primer.listed_ranking_nce(q, k, NEAR, FAR, 10.0)

    def loops(q, k):
        z = 10 * q @ k.T
        terms = [z[0].logsumexp(0) - z[0, 1], (z[2, [0, 3]].logsumexp(0) - z[2, 0]) / 2]
        return sum([*terms, (z[2, [2, 3]].logsumexp(0) - z[2, 2]) / 2]) / 3

    torch.testing.assert_close(gradients(ours, *leaves), gradients(loops, *leaves), rtol=1e-10, atol=1e-10)


def test_full_lists_are_the_batch():
    """Each row's own key against all others."""
    near, far = Lists.of([[i] for i in range(4)]), Lists.of([[j for j in range(4) if j != i] for i in range(4)])
    close(primer.listed_binary_nce(Q, P, near, far, 10.0), 7.126343346378)
    close(primer.listed_ranking_nce(Q, P, near, far, 10.0, key_bias=primer.noise_bias(NOISE)), 0.523901191713)
    close(primer.listed_ranking_nce(Q.float(), P.float(), near, far, 10.0), 0.717268872353, atol=1e-5)


def test_cloze_equals_its_formula():
    torch.manual_seed(4)
    energies, log_q = torch.randn(3, 5, dtype=torch.float64), -torch.rand(3, 5, dtype=torch.float64) - 0.1
    noised = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()

    def formula(energies):
        total = 0.0
        for e, q, y, v in zip(energies, log_q.exp(), noised, valid, strict=True):
            n, k = (v & ~y).sum(), (v & y).sum()
            clean = n * (-e).exp() / (n * (-e).exp() + k * q)
            total = total - torch.where(y, 1 - clean, clean)[v].log().sum()
        return total / 3

    found = gradients(lambda e: primer.cloze_nce(e, noised, log_q, valid=valid), energies)
    torch.testing.assert_close(found, gradients(formula, energies), rtol=1e-10, atol=1e-10)
    assert not found[1][2].any() and not found[1][1, 4]  # nothing noised; padding
    # k q = n everywhere: replaced-token detection
    one = noised[:1]
    even = torch.full((1, 5), math.log(3 / 2), dtype=torch.float64)
    plain = primer.cloze_nce(energies[:1], one)
    close(primer.cloze_nce(energies[:1], one, even), plain)
    close(plain / 5, N.binary_cross_entropy_with_logits(-energies[:1], (~one).double()))
    close(primer.cloze_nce(energies[:1], one, reduction="mean"), plain / 5)


# ----------------------------------------------------------------------------------------------------- what equals what


def test_what_equals_what():
    constant = torch.full((4,), 0.25, dtype=torch.float64)
    close(primer.ranking_nce(Q, P, constant, 10.0), 0.717268872353)  # ranking NCE of even noise is InfoNCE
    raw = F(4, 8, 0), F(4, 8, 0.6)
    close(primer.n_pair_loss(*raw), info_nce(*raw, 1.0))
    norms = sum(x.square().sum(1).mean() for x in raw)
    close(primer.n_pair_loss(*raw, penalty=0.02), primer.n_pair_loss(*raw) + 0.02 * norms)
    two = (x[:2] for x in raw)  # one negative a row: K = 1
    a, b = two
    close(primer.jsd_loss(a, b, 0.5), primer.binary_nce(a, b, 0.5))
    s = 0.5 * raw[0] @ raw[1].T
    other = ~torch.eye(4, dtype=torch.bool)
    close(primer.jsd_loss(*raw, 0.5), N.softplus(-s.diagonal()).mean() + N.softplus(s)[other].mean())
    close(primer.residual_energy_loss(-s.diagonal(), -s[other]), primer.jsd_loss(*raw, 0.5))
    views = torch.cat([Q, P])
    close(supcon_loss(views, torch.arange(4).repeat(2), 10.0), nt_xent_loss(Q, P, 10.0))
    cosine = (2 - 2 * (Q * P).sum(1)) - (2 - 2 * (Q * NEGATIVE).sum(1)) + 1
    close(primer.triplet_loss(Q, P, NEGATIVE, 1.0), cosine.relu().mean())  # D = 2 − 2 cos on unit vectors
    close(primer.binary_nce(Q, P, 10.0), siglip_loss(Q, P, 10.0, 0.0))
    u = F(8, 5, 2)  # a bilinear score
    expected = N.cross_entropy(Q @ u @ F(4, 5, 1).T, torch.arange(4))
    close(info_nce(Q @ u, F(4, 5, 1), 1.0), expected)
    classes = torch.tensor([2, 0, 0, 1])  # prompts of classes are the rows of a classifier
    close(info_nce(Q, P[:3], 10.0, positives=classes), N.cross_entropy(10 * Q @ P[:3].T, classes))
    logits = F(6, 3, 5)
    ce = N.cross_entropy(logits, LABELS)
    close(primer.fine_tuning_loss(logits, SIX, LABELS), 0.1 * ce + 0.9 * supcon_loss(SIX, LABELS, 1 / 0.3))


def test_a_queue_is_momentum_contrast():
    bank = MemoryBank(6, 8)
    bank.enqueue(SIX.float())
    q, k = Q.float(), P.float()
    logits = 10 * torch.cat([(q * k).sum(1, keepdim=True), q @ SIX.float().T], 1)
    expected = N.cross_entropy(logits, torch.zeros(4, dtype=torch.int64))
    terms = [info_nce(q[i : i + 1], k[i : i + 1], 10.0, queue=bank.features) for i in range(4)]
    close(torch.stack(terms).mean(), expected, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- edges


def test_no_negative_and_no_positive():
    one, none = Q[:1], Q[:0]
    close(primer.binary_nce(one, P[:1], 10.0, noise=NOISE[:1]), N.softplus(-10 * (one @ P[:1].T) + NOISE[0].log()))
    for empty in (primer.binary_nce, primer.jsd_loss, primer.vse_loss, primer.n_pair_loss):
        close(empty(none, P[:0]), 0)
    for hardest in (False, True):
        close(primer.vse_loss(one, P[:1], 2.0, hardest=hardest), 0)
    no = Lists.of([[], [], [], []])
    for loss in (primer.listed_binary_nce, primer.listed_ranking_nce):
        found = gradients(lambda q, loss=loss: loss(q, P, no, no), Q)
        assert found[0] == 0 and not found[1].any()
    close(primer.listed_ranking_nce(Q, P, no, FAR), 0)
    for value in (primer.triplet_loss(none, none, none), primer.pair_loss(none, none, Y[:0].bool())):
        close(value, 0)
    close(primer.residual_energy_loss(torch.zeros(0), torch.zeros(2)), math.log(2), atol=1e-6)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [5, 5, 5, 5], []], ids=["apart", "one", "empty"])
@pytest.mark.parametrize("rule", RULES)
def test_batches_without_a_term(rule, labels):
    if rule == "pairs":
        return
    labels = torch.tensor(labels, dtype=torch.int64)
    found = gradients(lambda x: RULES[rule][0](x, labels), F(len(labels), 8, 0.0).reshape(-1, 8))
    assert found[0] == 0 and not found[1].any()  # not NaN


def test_supcon_without_a_partner():
    labels = torch.tensor([0, 0, 1, 1, 2, 3])
    rows = supcon_loss(SIX, labels, 10.0, reduction="none")
    assert (rows[4:] == 0).all()
    close(supcon_loss(SIX, labels, 10.0), rows.sum() / 4)
    close(supcon_loss(SIX, labels, 10.0, count_empty=True), rows.sum() / 6)


def test_equal_vectors_have_no_slope():
    """The root at 0: of a pair, of a triplet, in a batch."""
    same = Q[:1].expand(3, -1)
    found = gradients(lambda a, b: primer.pair_loss(a, b, Y[:3]), same, same)
    assert all(x.isfinite().all() for x in found) and not found[1].any()
    found = gradients(lambda a, b: primer.triplet_loss(a, b, a, 1.0, kind="euclidean"), same, same)
    close(found[0], 1)
    assert not found[1].any()
    twice = torch.cat([SIX[:3], SIX[:3]])
    for rule, (ours, _) in RULES.items():
        value, slope = gradients(lambda x, ours=ours: ours(x, LABELS), twice)
        assert value.isfinite() and slope.isfinite().all(), rule


def test_large_logits_and_half_precision():
    big = [100 * F(4, 8, c) for c in (0, 0.6)]
    logits = big[0] @ big[1].T
    close(primer.n_pair_loss(*big), N.cross_entropy(logits, torch.arange(4)), atol=1e-6)
    assert logits.max() > 1000  # whose exponentials overflow
    far = torch.tensor([60.0, -60.0], dtype=torch.float16)
    value = primer.logistic_loss(far, torch.tensor([False, True]), torch.tensor([0, 1]), 2)
    assert value == 60 and value.dtype == torch.float32  # log σ(−60) in half precision is −inf
    halves = [x.to(torch.bfloat16) for x in (Q, P, NEGATIVE, SIX)]
    q, p, n, six = (x.float() for x in halves)
    for loss, *wide in (
        (primer.binary_nce, q, p), (primer.jsd_loss, q, p), (primer.vse_loss, q, p), (primer.triplet_loss, q, p, n),
        (lambda x: primer.lifted_structure_loss(x, LABELS), six), (lambda x: primer.mined_triplet_loss(x, LABELS), six),
    ):  # fmt: skip
        torch.testing.assert_close(loss(*(x.to(torch.bfloat16) for x in wide)), loss(*wide), rtol=1e-6, atol=1e-6)


def test_no_matrix_of_a_large_batch_is_kept(monkeypatch):
    monkeypatch.setattr(primer_metric, "TILE", 1 << 14)
    x = unit(waves(512, 8, 0)).float().requires_grad_()
    sizes = []
    batch = primer_metric._Batch("test", x, torch.arange(512) // 4, "squared")
    sizes = [d.numel() for _, d in batch.blocks(x.detach())]
    assert max(sizes) <= 1 << 14 and sum(sizes) == 512 * 512
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        primer.mined_triplet_loss(x, batch.labels)
        primer.lifted_structure_loss(x, batch.labels)
        primer.mined_triplet_loss(x, batch.labels, mining="hard")
    assert max(kept) <= 512 * 8


REFUSED = {
    "noise": (lambda: primer.ranking_nce(Q, P, NOISE - 0.1), "noise_bias: noise must be probabilities above 0"),
    "nce": (lambda: primer.binary_nce(Q, P, noise=NOISE[:3]), r"binary_nce: noise must be \[4\]"),
    "reduction": (lambda: primer.binary_nce(Q, P, reduction="none"), "binary_nce: reduction must be one of"),
    "jsd": (lambda: primer.jsd_loss(Q, P[:3]), r"jsd_loss: keys must be \[4, 8\] like queries, got \[3, 8\]"),
    "offsets": (lambda: primer.listed_binary_nce(Q, P, Lists.of([[0]]), FAR), "listed_binary_nce: positives.offs"),
    "indices": (lambda: primer.listed_binary_nce(Q, P, NEAR, Lists.of([[4], [], [], []])), "negatives.indices mus"),
    "cloze": (lambda: primer.cloze_nce(Q, Q[:3] > 0), r"cloze_nce: noised must be \[4, 8\] like energies"),
    "triplet": (lambda: primer.triplet_loss(Q, P, P[:3]), r"triplet_loss: negative must be \[4, 8\]"),
    "mining": (lambda: primer.mined_triplet_loss(SIX, LABELS, mining="none"), "mined_triplet_loss: mining must be"),
    "labels": (lambda: primer.lifted_structure_loss(SIX, LABELS[:5]), r"lifted_structure_loss: labels must be"),
    "kind": (lambda: primer.distances(Q, P, "cosine"), "distances: kind must be one of 'squared', 'euclidean'"),
    "vse": (lambda: primer.vse_loss(Q, P[:3]), r"vse_loss: keys must be \[4, 8\]"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------------------------------------------------- CLESS


def encoder_and_matcher(dtype=torch.float64):
    torch.manual_seed(0)
    return primer.WordEncoder(F(9, 6, 0), dropout=0.0).to(dtype), primer.Matcher(6, 16).to(dtype)


WORDS = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 7, 1], [0, 0, 0, 0, 0], [8, 8, 0, 0, 0]])


def test_cless_equals_loops_and_the_shared_table_learns_from_both_sides():
    encoder, matcher = encoder_and_matcher()
    labels = torch.tensor([[1, 2], [4, 0], [6, 7], [8, 0]])

    def loops(encoder, matcher):
        """Text by text, pair by pair, on concatenated vectors."""
        weight = torch.cat([matcher.of_text.weight, matcher.of_label.weight], 1)
        total = 0.0
        for i, (near, far) in enumerate(zip(([1], [], [0, 2], [3]), ([0, 2, 3], [1], [3], []), strict=True)):
            text = encoder.texts(WORDS[i : i + 1])[0]
            terms = []
            for j in (*near, *far):
                label = encoder.table.weight[[w for w in labels[j].tolist() if w]].mean(0)
                m = matcher.last(N.gelu(weight @ torch.cat([text, label]) + matcher.of_text.bias))[0]
                terms.append(torch.sigmoid(m).log() if j in near else (1 - torch.sigmoid(m)).log())
            total = total - torch.stack(terms).mean() / 4
        return total

    again = copy.deepcopy((encoder, matcher))
    expected = loops(*again)
    expected.backward()
    found = primer.cless_loss(matcher, encoder.texts(WORDS), encoder.labels(labels), NEAR, FAR)
    found.backward()
    close(found, expected.item())
    for ours, theirs in zip((encoder, matcher), again, strict=True):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)
    assert encoder.table.weight.grad[1].any() and not encoder.table.weight.grad[0].any()


def test_matching_all_pairs_is_matching_each():
    encoder, matcher = encoder_and_matcher(torch.float32)
    texts, labels = encoder.texts(WORDS), encoder.labels(torch.tensor([[1], [5], [8]]))
    rows, columns = torch.arange(4).repeat_interleave(3), torch.arange(3).repeat(4)
    torch.testing.assert_close(matcher(texts, labels).flatten(), matcher(texts, labels, (rows, columns)))
    longer = torch.cat([WORDS, torch.zeros(4, 7, dtype=torch.int64)], 1)
    torch.testing.assert_close(encoder.texts(longer), texts)  # padding says nothing


def test_cless_without_labels():
    encoder, matcher = encoder_and_matcher()
    no = Lists.of([[]] * 4)
    assert primer.cless_loss(matcher, encoder.texts(WORDS), F(3, 6, 1), no, no) == 0
    half = Lists.of([[0], [], [], []])
    value = primer.cless_loss(matcher, encoder.texts(WORDS), F(3, 6, 1), half, no)
    logit = matcher(encoder.texts(WORDS), F(3, 6, 1))[0, 0]
    close(value, N.softplus(-logit).item() / 4)  # the divisor is B
    with pytest.raises(ValueError, match=r"cless_loss: negatives\.indices must lie in \[0, 3\)"):
        primer.cless_loss(matcher, encoder.texts(WORDS), F(3, 6, 1), no, Lists.of([[3], [], [], []]))


def test_words_of_a_text_are_never_its_negatives():
    texts = [[5, 7, 7, 9], [7, 11], [], [5, 6, 8, 10, 12, 14]]
    generator = torch.Generator().manual_seed(0)
    counts = set()
    for _ in range(20):
        words, near, far = primer.pseudo_labels(texts, 3, 4, generator)
        for i, text in enumerate(texts):
            own, others = (
                {words[x].item() for x in lists.indices[lists.offsets[i] : lists.offsets[i + 1]]}
                for lists in (near, far)
            )
            assert own <= {*text} and len(own) == min(3, len({*text}))
            assert not others & {*text} and others <= {*words.tolist()} and 1 <= len(others) <= 4
            counts.add((i, tuple(sorted(own))))
    assert len(counts) > 8  # another draw each time
    words, near, far = primer.pseudo_labels([[], []], 3, 4, generator)
    assert len(words) == len(near.indices) == len(far.indices) == 0


# ------------------------------------------------------------------------------------------------------- ranks, command


def objective(q, k):
    """With noise that is the same of all, so that the batch can be cut."""
    p_n = torch.full((len(k),), 0.2, dtype=q.dtype)
    return primer.binary_nce(unit(q), unit(k), 10.0, noise=p_n, reduction="mean")


def test_ranks_equal_one():
    assert_ranks_equal_one(objective, [waves(5, 6, 0), waves(5, 6, 1)], (3, 2))


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(primer.primer_cless, "LEAST", 4)
    results = train_a_little("primer", tmp_path, monkeypatch, BATCH=16, SHOT_STEPS=2)
    assert list(results["models"]) == ["classifier", "ranking NCE", "CLESS"] and results["labels"] > 3
    for label, found in results["models"].items():
        assert len(found["losses"]) == 2
        assert ("zero-shot accuracy, %" in found["metrics"]) == (label != "classifier")
        assert 0 <= found["metrics"]["few-shot accuracy, %"] <= 100
