"""The catalogue of text embeddings against its definitions: golden values, dense forms, edges, ranks, the command."""

import math
import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_decoding import F as fixture
from recipes import assert_ranks_equal_one, assert_resumes, close, gradients, train_a_little, unit, waves

from fastcontrast import GradCache
from fastcontrast.data import docstrings
from fastcontrast.recipes import text_embeddings as te

X, Y = fixture(4, 8, 0), fixture(4, 8, 0.6)
Q, D = unit(X), unit(Y)
NEGATIVES = torch.stack([unit(fixture(4, 8, c)) for c in (1.4, 2.2)], 1)
GUIDE = unit(fixture(4, 8, 0.1)), unit(fixture(4, 8, 0.55))
LABELS = torch.tensor([0.9, 0.1, 0.5, 0.5], dtype=torch.float64)
TEACHER = torch.tensor([[3, 1, 0.5], [2, 2, 0], [4, 1, 1], [1, 0, 2]], dtype=torch.float64)
LISTS = torch.stack([fixture(4, 8, c) for c in (0.6, 1.4, 2.2)], 1)
TOKENS = torch.stack([unit(fixture(5, 8, c)) for c in (0, 0.4, 0.8)])
DOCUMENTS = -torch.stack([unit(fixture(3, 8, c)) for c in (0.1, 0.5, 0.9)])
REAL = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
BOTH = pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-11), (torch.float32, 4e-6)])


def same(ours, dense, *leaves, tolerance=1e-12, float32=1e-5):
    """Value and gradients, on the reference's path and on the fast one."""
    expected = gradients(dense, *leaves)
    for dtype, limit in ((torch.float64, tolerance), (torch.float32, float32)):
        found = gradients(ours, *(x.to(dtype) for x in leaves))
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == dtype and (a.double() - b).norm() <= limit * b.norm().clamp(min=1e-3)


@BOTH
def test_golden_blocks(dtype, atol):
    q, d, negatives, *guide = (x.to(dtype) for x in (Q, D, NEGATIVES, *GUIDE))
    close(te.ranking_loss(q, d), 0.959068617420, atol=atol)
    close(te.gte_loss(q, d, 20.0), 1.757029089491, atol=atol)
    close(te.gte_loss(q, d, 20.0, count_positive_once=True), 1.563774647325, atol=atol)
    for margin, value in ((10, 0.960739064781), (0.1, 0.960739064781), (0, 0.003455961945), (-0.3, 0.002776250640)):
        close(te.masked_loss(q, d, 20.0, negatives=negatives, margin=margin), value, atol=atol)
    close(te.gist_loss(q, d, *guide, 20.0), 0.960736265573, atol=atol)
    close(te.gist_loss(q, d, *guide, 20.0, margin=0.1), 0.214681185625, atol=atol)
    close(te.gist_loss(q, d, *guide), 3.510473610238, atol=atol)


@BOTH
def test_golden_pairs_and_lists(dtype, atol):
    x, y, labels, lists, teacher = (z.to(dtype) for z in (X, Y, LABELS, LISTS, TEACHER))
    close(te.cosent_loss(x, y, labels), 1.824617226392, atol=atol)
    close(te.angle(x, y), 0.374905521069, 0.506450415088, 0.691342026288, 0.948017019619, atol=atol)
    close(te.angle_loss(x, y, labels), 11.468264481888, atol=atol)
    scores = te.list_scores(x, lists)
    close(te.margin_mse_loss(scores, teacher), 11.171094166340, atol=atol)
    close(te.list_kl_loss(scores, teacher), 1.098581726956, atol=atol)
    close(te.list_kl_loss(scores, teacher, 2.0), 1.465702833244, atol=atol)


@BOTH
def test_golden_prefixes(dtype, atol):
    x, y, values = X.to(dtype), Y.to(dtype), (0.959068617420, 2.245329167235, 2.717468452596)
    for width, value in zip((8, 4, 2), values, strict=True):
        close(te.matryoshka_loss(te.ranking_loss, x, y, dims=[width]), value, atol=atol)
    close(te.nested_info_nce(x, y, dims=[8, 4, 2]), sum(values), atol=atol)
    close(te.nested_info_nce(x, y, dims=[2, 8], weights=[0.5, 2]), 0.5 * values[2] + 2 * values[0], atol=atol)


@BOTH
def test_golden_late_interaction(dtype, atol):
    q, d = TOKENS.to(dtype), DOCUMENTS.to(dtype)
    for masked, value in (("zero", 1.157565819705), ("neg_inf", 1.646828637582)):
        close(te.late_interaction_loss(q, d, document_mask=REAL, masked=masked), value, atol=atol)


def block_softmax(q, d, negatives, scale, keep, own_once=True):
    """−log of the share of the positive, row by row; `keep(kind, i, j)`: whether a candidate counts."""
    rows = []
    for i in range(len(q)):
        own = scale * (q[i] @ d[i])
        logits = [own] if own_once else [own, own]
        for j in range(len(q)):
            pairs = {"qd": (q[i], d[j]), "qq": (q[i], q[j]), "dd": (d[i], d[j]), "dq": (d[i], q[j])}
            logits += [scale * (a @ b) for kind, (a, b) in pairs.items() if j != i and keep(kind, i, j)]
            for k, n in enumerate(negatives[j] if negatives is not None else ()):
                pairs = {"own": (q[i], n)} if i == j else {"qn": (q[i], n), "dn": (d[i], n)}
                logits += [scale * (a @ b) for kind, (a, b) in pairs.items() if keep(kind, i, (j, k))]
        rows.append(torch.stack(logits).logsumexp(0) - own)
    return torch.stack(rows).mean()


def test_blocks_equal_their_dense_forms():
    def kinds(*names):
        return lambda kind, *_: kind in names

    for symmetric in (False, True):
        same(
            lambda q, d, n, s=symmetric: te.ranking_loss(q, d, negatives=n, symmetric=s),
            lambda q, d, n, s=symmetric: (
                block_softmax(q, d, n, 20, kinds("qd", "qn", "own")) + s * block_softmax(q, d, n, 20, kinds("dq"))
            ) / (1 + s),
            Q, D, NEGATIVES,
        )  # fmt: skip
    for once in (False, True):
        same(
            lambda q, d, n, o=once: te.gte_loss(q, d, 20.0, negatives=n, count_positive_once=o),
            lambda q, d, n, o=once: block_softmax(
                q, d, n, 20, kinds("qd", "qq", "dd", "dq", "own", "qn", "dn"), own_once=o
            ),
            Q, D, NEGATIVES,
        )  # fmt: skip


@pytest.mark.parametrize("everyone", [False, True])
@pytest.mark.parametrize("margin", [0.1, -0.1, -0.6])
def test_the_mask_looks_at_each_similarity(margin, everyone):
    """With two documents of equal text. The mask is constant: its dense form has no gradient either."""
    ids, limit = torch.tensor([7, 3, 3, 5]), (Q * D).sum(1) + margin
    sides = {"q": Q, "d": D, "n": NEGATIVES}

    def keep(kind, i, j):
        if kind == "dq" or (kind in ("qn", "dn") and not everyone):
            return False
        if kind == "own":
            return Q[i] @ NEGATIVES[j] <= limit[i]
        first = j if isinstance(j, int) else j[0]
        return ids[first] != ids[i] and sides[kind[0]][i] @ sides[kind[1]][j] <= limit[i]

    same(
        lambda q, d, n: te.masked_loss(q, d, 2.0, negatives=n, margin=margin, ids=ids, all_negatives=everyone),
        lambda q, d, n: block_softmax(q, d, n, 2, keep),
        Q, D, NEGATIVES,
    )  # fmt: skip


@pytest.mark.parametrize(("margin", "relative"), [(0.0, False), (0.1, False), (0.3, True), (9.0, False)])
def test_gist_equals_its_dense_form(margin, relative):
    of_guide = torch.stack([unit(fixture(4, 8, c)) for c in (0.2, 3.0)], 1)
    sides, own = {"q": GUIDE[0], "d": GUIDE[1], "n": of_guide}, (GUIDE[0] * GUIDE[1]).sum(1)
    limit = own * (1 - margin) if relative else own - margin

    def keep(kind, i, j):
        if kind in ("dq", "dn"):
            return False
        kind = "qn" if kind == "own" else kind
        j = (i, j[1]) if kind == "own" else j
        return sides[kind[0]][i] @ sides[kind[1]][j] <= limit[i]

    def ours(q, d, n):
        guides = [x.to(q.dtype) for x in (*GUIDE, of_guide)]
        settings = {"negatives": n, "guide_negatives": guides[2], "margin": margin, "relative": relative}
        return te.gist_loss(q, d, *guides[:2], 20.0, **settings)

    same(ours, lambda q, d, n: block_softmax(q, d, n, 20, keep), Q, D, NEGATIVES)


def test_where_all_others_are_filtered_the_loss_is_nothing():
    for loss in (
        lambda q, d, n: te.masked_loss(q, d, negatives=n, margin=-3.0),
        lambda q, d, n: te.gist_loss(q, d, *GUIDE, margin=3.0, negatives=n, guide_negatives=n.detach()),
    ):
        value, *moved = gradients(loss, Q, D, NEGATIVES)
        assert abs(value) < 1e-12 and all(x.abs().max() < 1e-12 for x in moved)
    close(te.gte_loss(Q[:1], D[:1]), math.log(2))


def test_a_duplicate_of_the_positive_stays_a_candidate_of_gist():
    """Its guide similarity is t_i itself; and the own side is left out even where t_i is above 1."""
    guide = unit(torch.randn(6, 384, generator=torch.Generator().manual_seed(0)))[[0, 0, 1, 1, 2, 2]]
    q, d = torch.eye(6), torch.eye(6)
    close(te.gist_loss(q, d, guide, guide, 1.0, blocks=("query_to_key",)), math.log(math.e + 5) - 1, atol=1e-6)
    close(te.gist_loss(q, d, guide, guide, 1.0, margin=-1.0), math.log(math.e + 15) - 1, atol=1e-6)


def test_half_precision_is_summed_in_float32():
    q, d = (x.to(torch.bfloat16) for x in (Q, D))
    for loss in (lambda a, b: te.ranking_loss(a, b, 100.0), te.gte_loss, te.masked_loss):
        assert loss(q, d).dtype == torch.float32
        torch.testing.assert_close(loss(q, d), loss(q.float(), d.float()), rtol=1e-6, atol=1e-6)
    scores = torch.tensor([9.0, -9.0, 0.0], dtype=torch.float16)
    close(te.order_loss(scores, torch.tensor([0, 2, 1]), 100.0), 1800.0, atol=1e-3)


def dense_order(scores, labels, scale=20.0):
    lower = labels[:, None] < labels
    above = (scale * (scores[:, None] - scores))[lower]
    return torch.cat([scores.new_zeros(1), above]).logsumexp(0)


def test_order_equals_all_pairs():
    torch.manual_seed(0)
    scores, labels = torch.randn(41, dtype=torch.float64), torch.randint(5, (41,))
    for scale in (0.1, 20.0, 300.0):
        same(lambda s, c=scale: te.order_loss(s, labels, c), lambda s, c=scale: dense_order(s, labels, c), scores)
    sorted_well = labels.double() + 0.01 * scores
    same(lambda s: te.order_loss(s, labels, 2.0), lambda s: dense_order(s, labels, 2.0), sorted_well)
    for labels in (torch.zeros(4), torch.zeros(4).long()):
        value, gradient = gradients(lambda s, y=labels: te.order_loss(s, y), X[:, 0])
        assert value == 0 and not gradient.any()
    assert te.order_loss(torch.zeros(0), torch.zeros(0)) == 0
    far = 500 + torch.arange(8, dtype=torch.float64) / 1024  # exact in float32, whose products with 20 are not
    same(te.order_loss, dense_order, far, torch.tensor([3.0, 0, 1, 2, 5, 4, 7, 6]).double())


def test_pair_losses_equal_their_definitions():
    def dense_angle(x, y):
        a, b = (torch.complex(*z.chunk(2, 1)) for z in (x, y))
        turned = a * b.conj()
        return (turned.real + turned.imag).sum(1).abs() / (x.norm(dim=1) * y.norm(dim=1))

    torch.testing.assert_close(te.angle(X, Y), dense_angle(X, Y))
    same(
        lambda x, y: te.angle_loss(x, y, LABELS.to(x.dtype), cosent=0.5, in_batch=2.0),
        lambda x, y: dense_order(dense_angle(x, y), LABELS)
        + 0.5 * dense_order(F.cosine_similarity(x, y), LABELS)
        + 2 * F.cross_entropy(20 * unit(x) @ unit(y).T, torch.arange(4)),
        X, Y,
    )  # fmt: skip
    same(
        lambda x, y: te.cosine_loss(x, y, LABELS.to(x.dtype)),
        lambda x, y: F.mse_loss(F.cosine_similarity(x, y), LABELS),
        X, Y,
    )  # fmt: skip
    assert te.angle_loss(X, torch.zeros_like(Y), LABELS).isfinite()


def test_only_pairs_out_of_order_count():
    """Distances 0.1, 0.6 of positives, 0.3, 0.8 of negatives: the first and the last are easy."""
    far = torch.tensor([0.1, 0.6, 0.3, 0.8], dtype=torch.float64)
    x = torch.tensor([[1.0, 0.0]]).double().expand(4, 2)
    y = torch.stack([1 - far, (1 - (1 - far) ** 2).sqrt()], 1)
    labels = torch.tensor([1, 1, 0, 0])
    value, gradient = gradients(lambda y: te.online_pair_loss(x, y, labels), y)
    close(value, 0.6**2 + 0.2**2)
    assert gradient.any(1).tolist() == [False, True, True, False]
    close(te.online_pair_loss(x, y, torch.ones(4)), far.square().sum())
    close(te.online_pair_loss(x, y, torch.zeros(4), margin=0.7), 0.6**2 + 0.1**2 + 0.4**2)


def test_list_losses_equal_their_definitions():
    def dense_kl(scores, t=1.0):
        return t * t * F.kl_div((scores / t).log_softmax(1), (TEACHER / t).softmax(1), reduction="batchmean")

    scores = torch.einsum("bd,bkd->bk", X, LISTS)
    same(lambda s: te.list_kl_loss(s, TEACHER.to(s.dtype), 3.0), lambda s: dense_kl(s, 3.0), scores)

    def stretched(scores):
        low = scores.amin(1, keepdim=True)
        return dense_kl((scores - low) / (scores.amax(1, keepdim=True) - low))

    same(lambda s: te.list_kl_loss(s, TEACHER.to(s.dtype), min_max=True), stretched, scores)
    assert te.list_kl_loss(torch.ones(4, 3), TEACHER, min_max=True).isfinite()
    same(
        lambda s: te.margin_mse_loss(s, TEACHER.to(s.dtype)),
        lambda s: ((s[:, :1] - s[:, 1:]) - (TEACHER[:, :1] - TEACHER[:, 1:])).square().mean(),
        scores,
    )
    same(
        lambda q, d: te.list_distillation_loss(q, d, TEACHER.to(q.dtype), alpha=0.3, scale=2.0),
        lambda q, d: dense_kl(torch.einsum("bd,bkd->bk", q, d))
        + 0.3 * block_softmax(q, d[:, 0], d[:, 1:], 2.0, lambda kind, *_: kind in ("qd", "own")),
        X, LISTS,
    )  # fmt: skip


@pytest.mark.parametrize("workspace", [None, 4096])
def test_one_pass_over_prefixes_equals_a_loss_each(workspace):
    torch.manual_seed(0)
    x, y = torch.randn(19, 12).double(), torch.randn(23, 12).double()
    dims, weights = [12, 3, 7, 1], [1.0, 0.5, 2.0, 0.1]
    same(
        lambda x, y: te.nested_info_nce(x, y, 5.0, dims=dims, weights=weights, workspace=workspace),
        lambda x, y: sum(
            w * F.cross_entropy(5.0 * F.normalize(x[:, :m], dim=1) @ F.normalize(y[:, :m], dim=1).T, torch.arange(19))
            for m, w in zip(dims, weights, strict=True)
        ),
        x, y,
    )  # fmt: skip
    assert te.nested_info_nce(x, y, dims=dims) == te.nested_info_nce(x.clone().requires_grad_(), y, dims=dims)


@pytest.mark.parametrize("length", [0.0, 1e-14])
def test_a_prefix_without_length_is_as_normalize_has_it(length):
    """Below 1e-12 it is divided by that, and so is its gradient, which hides the others': it is looked at apart."""
    x, y = fixture(4, 6, 0.2), fixture(4, 6, 0.9)
    y[2, :3] = length * fixture(1, 3, 0.4)
    one_pass = gradients(lambda x, y: te.nested_info_nce(x, y, 5.0, dims=[6, 3]), x, y)
    each = gradients(lambda x, y: te.matryoshka_loss(lambda q, k: te.ranking_loss(q, k, 5.0), x, y, dims=[6, 3]), x, y)
    rest = torch.tensor([0, 1, 3])
    for a, b in zip((*one_pass, one_pass[2][rest], one_pass[2][2]), (*each, each[2][rest], each[2][2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_matryoshka_of_any_loss_and_of_some_dims():
    same(
        lambda x, y: te.matryoshka_loss(te.gte_loss, x, y, dims=[8, 3], weights=[1.0, 0.3]),
        lambda x, y: te.gte_loss(unit(x), unit(y)) + 0.3 * te.gte_loss(unit(x[:, :3]), unit(y[:, :3])),
        X, Y,
    )  # fmt: skip
    generator, single = (
        torch.Generator().manual_seed(0),
        [te.matryoshka_loss(te.gte_loss, X, Y, dims=[m]) for m in (8, 4)],
    )
    drawn = [te.matryoshka_loss(te.gte_loss, X, Y, dims=[8, 4], some=1, generator=generator) for _ in range(20)]
    assert {x.item() for x in drawn} == {x.item() for x in single}
    assert te.halves(768) == [768, 384, 192, 96, 48] and te.halves(100) == [100, 50]


def test_late_interaction_of_one_token_is_a_dot_product():
    torch.testing.assert_close(te.late_interaction_loss(X[:, None], Y[:, None]), te.ranking_loss(X, Y, 1.0))
    value, q, d = gradients(
        lambda q, d: te.late_interaction_loss(q, d, document_mask=REAL & (torch.arange(3) > 0)[:, None]),
        TOKENS,
        DOCUMENTS,
    )
    assert value.isinf() and not (q.isnan().any() or d.isnan().any() or d[0].any())


@pytest.mark.parametrize("k", [1, 4, 32])
def test_xtr_equals_its_definition(k):
    query_real = torch.tensor([[1, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0]]).bool()

    def dense(q, d):
        scores = torch.einsum("bid,cjd->bicj", q, d).masked_fill(~REAL, -math.inf)
        least = scores.flatten(2).sort(descending=True).values[..., min(k, 9) - 1][..., None, None]
        hits = (scores >= least) & REAL & query_real[:, :, None, None]
        best = scores.masked_fill(~hits, -math.inf).amax(3)
        found = hits.any(3)
        return (best.masked_fill(~found, 0.0).sum(1) / found.sum(1).clamp(min=1)).log_softmax(1).diagonal().mean().neg()

    masks = {"query_mask": query_real, "document_mask": REAL}
    same(lambda q, d: te.xtr_loss(q, d, k=k, **masks), dense, TOKENS, DOCUMENTS)


def test_word_weights_equal_the_dense_form():
    words, bias = fixture(7, 8, 0.2), fixture(1, 7, 0.3)[0]

    def dense(h, e, b):
        scores = (h @ e.T + b).relu().log1p().masked_fill(~REAL[..., None], 0.0)
        return (scores.amax(1) * torch.arange(1, 8)).sum()

    same(lambda h, e, b: (te.word_weights(h, e, b, REAL) * torch.arange(1, 8)).sum(), dense, 2 * DOCUMENTS, words, bias)
    assert not te.word_weights(DOCUMENTS, words, bias + 9, torch.zeros_like(REAL)).any()
    w, v = X.abs(), Y.abs()
    expected = (
        F.cross_entropy(w @ v.T, torch.arange(4)) + 0.1 * w.mean(0).square().sum() + 0.2 * v.mean(0).square().sum()
    )
    torch.testing.assert_close(te.lexical_loss(w, v, penalties=(0.1, 0.2)), expected)


def test_token_losses():
    states, weight = fixture(15, 8, 0.1).view(3, 5, 8), fixture(7, 8, 0.7)
    labels = torch.tensor([[1, -100, 6, 2, -100], [-100] * 5, [0, 3, 4, -100, 5]])

    def dense(h, w, shift):
        return F.cross_entropy((h @ w.T)[:, : 5 - shift].flatten(0, 1), labels[:, shift:].flatten())

    for before in (False, True):
        same(
            lambda h, w, b=before: te.token_loss(h, w, labels, before=b),
            lambda h, w, b=before: dense(h, w, int(b)), states, weight,
        )  # fmt: skip
    logits, replaced, mask = states[..., 0], labels > 2, labels >= 0
    expected = F.binary_cross_entropy_with_logits(logits[mask], replaced[mask].double())
    poisoned = logits.masked_fill(~mask, math.nan)
    torch.testing.assert_close(te.replaced_token_loss(poisoned, replaced, mask), expected)


def test_pooling_wherever_the_padding_is():
    states = fixture(6, 4, 0.5).view(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    torch.testing.assert_close(te.pool(states, mask), torch.stack([states[0, :2].mean(0), states[1, 1:].mean(0)]))
    torch.testing.assert_close(te.pool(states, mask, "first"), torch.stack([states[0, 0], states[1, 1]]))
    torch.testing.assert_close(te.pool(states, mask, "last"), torch.stack([states[0, 1], states[1, 2]]))
    assert not te.pool(states, torch.zeros_like(mask)).any()


def test_whitened_features_have_covariance_one():
    x = fixture(40, 6, 0.2) + fixture(40, 6, 1.7).square()
    x = torch.cat([x, x[:, :1]], 1)  # one direction has no variance
    mean, w = te.whitening(x, 6)
    torch.testing.assert_close(((x - mean) @ w).T.cov(correction=0), torch.eye(6).double(), atol=1e-8, rtol=0)
    mean, w = te.whitening(x)
    assert not w[:, 6].any()  # nor may a text that has something there be blown up
    covariance = ((x - mean) @ w).T.cov(correction=0)
    torch.testing.assert_close(covariance, torch.diag(torch.tensor([1.0] * 6 + [0.0])).double(), atol=1e-8, rtol=0)


def test_mined_negatives_keep_a_distance():
    q, d = (
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([[0.9, 0.1], [0.88, 0.1], [0.8, 0.1], [0.5, 0.1], [0.95, 0.1], [0.5, 0]]),
    )
    own = torch.tensor([0])
    assert te.mine(q, d, own, 3).tolist() == [[2, 3, 5]]  # at most 0.95 · 0.9
    assert te.mine(q, d, own, 2, skip=1).tolist() == [[3, 5]]
    assert te.mine(q, d, own, 4, margin=0.3).tolist() == [[3, 5, -1, -1]]
    assert te.mine(q, d, own, 2, share=None).tolist() == [[4, 1]]
    assert te.mine(q, d, own, 2, share=None, document_ids=torch.tensor([0, 1, 2, 3, 0, 4])).tolist() == [[1, 2]]
    assert te.mine(-q, d, own, 6).tolist() == [[4, -1, -1, -1, -1, -1]]  # −0.95 is below −0.945; −0.9 the own


def test_batches_have_one_task_and_no_text_twice():
    tasks, texts = torch.tensor([0] * 20 + [1] * 11), torch.arange(31) % 9
    batches = te.TaskBatches(tasks, texts, 4, seed=3)
    drawn = [next(batches) for _ in range(14)]
    for rows in drawn:
        assert len(rows) == 4 and len(texts[rows].unique()) == 4 and len(tasks[rows].unique()) == 1
    assert len(torch.cat(drawn[:7]).unique()) == 28  # an epoch: no row twice
    assert not torch.equal(torch.cat(drawn[:7]), torch.cat(drawn[7:]))
    assert_resumes(lambda: te.TaskBatches(tasks, texts, 4, seed=3), lambda ours, _: next(ours))
    with pytest.raises(ValueError, match="TaskBatches: batch must be at most the texts of a task, got 10"):
        te.TaskBatches(tasks, texts, 10)


def test_grad_cache_gives_the_gradients_of_the_whole_batch():
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 6).double()

    def loss(q, d):
        return te.matryoshka_loss(te.gte_loss, q, d, dims=[6, 2]) + te.cosent_loss(q, d, LABELS)

    loss(model(X), model(Y)).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    GradCache([model, model], 3, loss)(X, Y)
    torch.testing.assert_close([p.grad for p in model.parameters()], expected, rtol=1e-6, atol=1e-12)


def everything(x, y, negatives, labels):
    q, d, n = unit(x), unit(y), unit(negatives)
    tokens, documents = n, unit(n + y[:, None])
    real = labels[:, None] + torch.arange(3) > 1
    graded = labels.to(x.dtype) / 3
    return torch.stack([
        te.ranking_loss(q, d, negatives=n, symmetric=True),
        te.gte_loss(q, d, 5.0, negatives=n),
        te.masked_loss(q, d, 5.0, negatives=n, margin=-0.1, ids=labels, all_negatives=True),
        te.masked_loss(q, d, 5.0, negatives=n, margin=0.0),
        te.gist_loss(q, d, d.detach(), q.detach(), 5.0, negatives=n, guide_negatives=n.detach(), margin=0.1),
        te.cosent_loss(x, y, labels), te.angle_loss(x, y, labels, 5.0, cosent=1, in_batch=1),
        te.cosine_loss(x, y, graded), te.online_pair_loss(x, y, labels.clamp(max=1), 1.5),
        te.margin_mse_loss(te.list_scores(q, n), n[:, :, 0].detach()),
        te.list_distillation_loss(q, n, n[:, :, 0].detach()),
        te.late_interaction_loss(tokens, documents, document_mask=real, query_mask=real),
        te.xtr_loss(tokens, documents, k=4, document_mask=real, query_mask=real),
        te.nested_info_nce(x, y, 5.0, dims=[2, 6]),
        te.lexical_loss(x.abs(), y.abs(), penalties=(0.1, 0.2)),
        te.token_loss(n, x.new_tensor([[1.0] * 6, [0.5] * 6]), labels[:, None].clamp(max=1).expand(-1, 3)),
        te.replaced_token_loss(n[..., 0], n[..., 1] > 0, real),
    ]).sum()  # fmt: skip


def test_ranks_equal_one():
    labels = torch.tensor([2, 0, 1, 3, 1])
    assert_ranks_equal_one(everything, [waves(5, 6, 0), waves(5, 6, 1), waves(5, 18, 2).view(5, 3, 6), labels], (3, 2))


def test_what_does_not_fit_is_named():
    for call, message in (
        (lambda: te.ranking_loss(Q, D, negatives=NEGATIVES[:3]), r"ranking_loss: negatives must be \[4, K, 8\]"),
        (lambda: te.gte_loss(Q, D, negatives=NEGATIVES[..., :7]), r"gte_loss: negatives must be \[4, K, 8\]"),
        (lambda: te.gist_loss(Q, D, *GUIDE, negatives=NEGATIVES), "negatives and guide_negatives go together"),
        (lambda: te.cosent_loss(X, Y[:3], LABELS), r"cosent_loss: y must be \[4, 8\]"),
        (lambda: te.angle(X[:, :7], Y[:, :7]), "angle: rows must have an even width, got 7"),
        (lambda: te.order_loss(X[:, 0], LABELS[:3]), r"order_loss: labels must be \[4\]"),
        (lambda: te.list_scores(X, LISTS[:3]), r"list_scores: documents must be \[4, 1 \+ K, 8\]"),
        (lambda: te.list_kl_loss(X, TEACHER), "scores and teacher must both be"),
        (lambda: te.nested_info_nce(X, Y, dims=[9]), r"dims must be distinct numbers in \[1, 8\], got \[9\]"),
        (lambda: te.nested_info_nce(X, Y[:3], dims=[8]), "keys must be at least as many as queries, 4, got 3"),
        (lambda: te.matryoshka_loss(te.gte_loss, X, Y, dims=[8], weights=[1, 2]), "weights must be 1"),
        (lambda: te.late_interaction_loss(TOKENS, DOCUMENTS[:2]), "documents must be as many as queries, 3, got 2"),
        (lambda: te.pool(TOKENS, REAL, "max"), "how must be one of"),
        (lambda: te.mine(Q, D, torch.tensor([4, 0, 0, 0]), 1), r"positives must lie in \[0, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    some = partial(docstrings, folder=Path(os.__file__).parent / "email")  # all of the library take seconds to read
    monkeypatch.setattr(te, "docstrings", some)
    results = train_a_little("text_embeddings", tmp_path, monkeypatch, BATCH=64, BUCKETS=4096)
    assert list(results["models"]) == ["InfoNCE", "GTE", "masked", "GIST", "Matryoshka"]
    for found in results["models"].values():
        assert len(found["losses"]) == 2
        assert set(found["metrics"]) == {f"docstring → code R@1, first {width} numbers, %" for width in (16, 128)}
    assert results["models"]["GTE"]["losses"][0] > results["models"]["InfoNCE"]["losses"][0]
