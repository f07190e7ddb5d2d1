"""Losses against dense formulas in float64, written here from their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastcontrast as fc

INF = float("inf")
ALL = ("query_to_key", "key_to_query", "query_to_query", "key_to_key")


def unit(rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1)


def golden(n: int, d: int, c: float) -> Tensor:
    i, k = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    return torch.sin(1 + c + 0.7 * i + 1.3 * k + 0.11 * i * k)


def check(loss, dense, *inputs: Tensor, **settings) -> None:
    """`loss` equals `dense`, value and every gradient, in float64 (reference) and float32 (fast path)."""
    truth_inputs = [x.clone().requires_grad_() for x in inputs]
    truth = dense(*truth_inputs)
    truth_gradients = torch.autograd.grad(truth, truth_inputs)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
        converted = {
            k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in settings.items()
        }
        if "guide" in converted:
            converted["guide"] = tuple(x.to(dtype) for x in settings["guide"])
        value = loss(*leaves, **converted)
        assert value.dtype == dtype
        gradients = torch.autograd.grad(value, leaves)
        assert abs(value.item() - truth.item()) <= tolerance * max(1.0, abs(truth.item()))
        for gradient, expected in zip(gradients, truth_gradients, strict=True):
            assert gradient.shape == expected.shape
            # gradients that are zero in truth leave rounding of the terms that cancel
            assert (gradient.double() - expected).norm() <= tolerance * max(expected.norm().item(), 1e-2)


def dense_info_nce(
    q, k, s, *, directions=("query_to_key",), joint=True, once=False, own=None, h=None, h_mask=None, queue=None,
    bias=None, q_ids=None, k_ids=None, queue_ids=None, guide=None, smoothing=0.0,
):  # fmt: skip
    """Row by row, candidate lists concatenated; returns the mean."""
    m, n = q.shape[0], k.shape[0]
    own = torch.arange(m) if own is None else own
    bias = torch.zeros(n, dtype=q.dtype) if bias is None else bias
    q_codes = torch.arange(m) if q_ids is None else q_ids
    k_codes = None if k_ids is None else k_ids
    logits = s * q @ k.T + bias
    masked = torch.zeros(m, n, dtype=torch.bool)
    if q_ids is not None:
        masked |= q_ids[:, None] == k_ids[None]
    qq_masked = q_codes[:, None] == q_codes[None]
    kk_masked = (
        (torch.arange(n)[own][:, None] == torch.arange(n)) if k_codes is None else k_codes[own][:, None] == k_codes
    )
    if guide is not None:
        gq, gk, limit = guide
        masked |= gq @ gk.T > limit[:, None]
        qq_masked = qq_masked | (gq @ gq.T > limit[:, None])
        kk_masked = kk_masked | (gk[own] @ gk.T > limit[:, None])
    masked[torch.arange(m), own] = False
    logits = logits.masked_fill(masked, -INF)
    losses = []
    for i in range(m):
        positive = logits[i, own[i]]
        blocks = {
            "query_to_key": logits[i],
            "key_to_query": logits[:, own[i]],
            "query_to_query": (s * q[i] @ q.T).masked_fill(qq_masked[i], -INF),
            "key_to_key": (s * k[own[i]] @ k.T).masked_fill(kk_masked[i], -INF),
        }
        extras = []
        if h is not None:
            extra = s * h[i] @ q[i]
            extras.append(extra if h_mask is None else extra.masked_fill(~h_mask[i], -INF))
        if queue is not None:
            extra = s * queue @ q[i]
            extras.append(extra if queue_ids is None else extra.masked_fill(queue_ids == q_ids[i], -INF))
        lists = [(name, blocks[name]) for name in ALL if name in directions]
        if joint:
            candidates = [block for _, block in lists]
            if once and {"query_to_key", "key_to_query"} <= set(directions):
                column = blocks["key_to_query"].clone()
                column[i] = -INF
                candidates[1] = column
            if not {"query_to_key", "key_to_query"} & set(directions):
                candidates.append(positive[None])
            candidates = [torch.cat([*candidates, *extras])]
        else:
            candidates = [
                torch.cat([block, *extras] if name in ALL[:2] else [block, positive[None], *extras])
                for name, block in lists
            ]
        total = 0.0
        for candidate in candidates:
            finite = candidate[~torch.isneginf(candidate)]
            log_z = torch.logsumexp(finite, 0)
            total = total + (1 - smoothing) * (log_z - positive) + smoothing * (log_z - finite.mean())
        losses.append(total / len(candidates))
    return torch.stack(losses).mean()


Q, K, H, QUEUE = unit(7, 12, 1), unit(11, 12, 2), unit(21, 12, 3).view(7, 3, 12), unit(9, 12, 4)
SCALE = torch.tensor(8.0, dtype=torch.float64)
Q_IDS, K_IDS = torch.tensor([0, 1, 1, 2, 3, 4, 4]), torch.tensor([0, 1, 1, 2, 3, 4, 4, 0, 9, 9, 2])
OWN = torch.tensor([3, 1, 10, 0, 7, 2, 5])
GUIDE = (unit(7, 5, 7), unit(11, 5, 8), torch.full((7,), 0.3, dtype=torch.float64))


def test_info_nce_is_cross_entropy():
    check(fc.info_nce, lambda q, k, s: F.cross_entropy(s * q @ k.T, torch.arange(7)), Q, K, SCALE)


@pytest.mark.parametrize(
    ("settings", "dense"),
    [
        ({"positives": OWN}, {"own": OWN}),
        ({"hard_negatives": H}, {"h": H}),
        ({"hard_negatives": H, "hard_negatives_mask": H[..., 0] > 0}, {"h": H, "h_mask": H[..., 0] > 0}),
        ({"queue": QUEUE}, {"queue": QUEUE}),
        (
            {"queue": QUEUE, "queue_ids": torch.arange(9) % 4, "query_ids": Q_IDS, "key_ids": K_IDS},
            {"queue": QUEUE, "queue_ids": torch.arange(9) % 4, "q_ids": Q_IDS, "k_ids": K_IDS},
        ),
        ({"query_ids": Q_IDS, "key_ids": K_IDS}, {"q_ids": Q_IDS, "k_ids": K_IDS}),
        ({"query_ids": Q_IDS, "key_ids": K_IDS, "positives": OWN}, {"q_ids": Q_IDS, "k_ids": K_IDS, "own": OWN}),
        ({"guide": GUIDE}, {"guide": GUIDE}),
        ({"key_bias": K[:, 0].clone()}, {"bias": K[:, 0].clone()}),
        ({"label_smoothing": 0.2}, {"smoothing": 0.2}),
        ({"label_smoothing": 0.2, "hard_negatives": H, "queue": QUEUE}, {"smoothing": 0.2, "h": H, "queue": QUEUE}),
        (
            {"label_smoothing": 0.2, "query_ids": Q_IDS, "key_ids": K_IDS, "key_bias": K[:, 0].clone()},
            {"smoothing": 0.2, "q_ids": Q_IDS, "k_ids": K_IDS, "bias": K[:, 0].clone()},
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("directions", [ALL[:1], ALL[:2], ALL, ALL[2:]], ids=["qk", "qk+kq", "all", "same side"])
@pytest.mark.parametrize("joint", [True, False], ids=["joint", "apart"])
def test_info_nce_is_its_dense_formula(settings, dense, directions, joint):
    if "label_smoothing" in settings and (not set(directions) <= set(ALL[:2]) or (joint and len(directions) > 1)):
        with pytest.raises(ValueError, match="label_smoothing needs"):
            fc.info_nce(Q, K, SCALE, directions=directions, joint=joint, **settings)
        return
    check(
        lambda q, k, s, **kw: fc.info_nce(q, k, s, directions=directions, joint=joint, **kw),
        lambda q, k, s: dense_info_nce(q, k, s, directions=directions, joint=joint, **dense),
        Q, K, SCALE, **settings,
    )  # fmt: skip


def test_gradients_of_bias_and_hard_negatives():
    bias = K[:, 0].clone()
    check(
        lambda q, h, b: fc.info_nce(q, K.to(q.dtype), 8.0, hard_negatives=h, key_bias=b),
        lambda q, h, b: dense_info_nce(q, K, 8.0, h=h, bias=b),
        Q, H, bias,
    )  # fmt: skip


def test_positive_counted_once():
    check(
        lambda q, k, s: fc.info_nce(q, k, s, directions=ALL, count_positive_once=True),
        lambda q, k, s: dense_info_nce(q, k, s, directions=ALL, once=True),
        Q, K, SCALE,
    )  # fmt: skip


def test_queue_takes_no_gradient():
    queue = QUEUE.clone().requires_grad_()
    fc.info_nce(Q.clone().requires_grad_(), K, 8.0, queue=queue).backward()
    assert queue.grad is None


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_clip_loss_is_two_cross_entropies(smoothing):
    def dense(image, text, s):
        logits, target = s * image @ text.T, torch.arange(7)
        return (
            F.cross_entropy(logits, target, label_smoothing=smoothing)
            + F.cross_entropy(logits.T, target, label_smoothing=smoothing)
        ) / 2

    check(fc.clip_loss, dense, Q, K[:7], SCALE, label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_clip_loss_with_ids(smoothing):
    check(
        lambda q, k, s: fc.clip_loss(q, k, s, ids=Q_IDS, label_smoothing=smoothing),
        lambda q, k, s: dense_info_nce(
            q, k, s, directions=ALL[:2], joint=False, q_ids=Q_IDS, k_ids=Q_IDS, smoothing=smoothing
        ),
        Q, K[:7], SCALE,
    )  # fmt: skip


def test_multi_positive_by_labels_and_by_index():
    q_labels, k_labels = torch.tensor([5, 5, 2, 2, 9, 7, 7]), torch.tensor([2, 5, 5, 7, 2, 2, 1, 1, 7, 0, 5])
    same = q_labels[:, None] == k_labels[None]
    positives = torch.full((7, 4), -1)
    for i in range(7):
        index = same[i].nonzero()[:, 0]
        positives[i, : len(index)] = index
    bias = K[:, 1].clone()

    def dense(q, k, s, b):
        log_p = (s * q @ k.T + b).log_softmax(1)
        valid = same.any(1)  # row 4 has no positive
        return -((log_p * same).sum(1)[valid] / same.sum(1)[valid]).mean()

    def by_labels(q, k, s, b):
        return fc.multi_positive_loss(q, k, s, query_labels=q_labels, key_labels=k_labels, key_bias=b)

    check(by_labels, dense, Q, K, SCALE, bias)
    check(lambda q, k, s, b: fc.multi_positive_loss(q, k, s, positives=positives, key_bias=b), dense, Q, K, SCALE, bias)
    none = fc.multi_positive_loss(Q, K, SCALE, query_labels=q_labels, key_labels=k_labels, reduction="none")
    assert none[4] == 0
    everyone = fc.multi_positive_loss(Q, K, SCALE, query_labels=q_labels, key_labels=k_labels, count_empty=True)
    torch.testing.assert_close(everyone, none.sum() / 7)


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2, 3], [4, 4, 4, 4, 4, 4, 4]])
def test_supcon_is_its_dense_formula(labels):
    labels = torch.tensor(labels)

    def dense(z, s):
        self_ = torch.eye(7, dtype=torch.bool)
        log_p = (s * z @ z.T).masked_fill(self_, -INF).log_softmax(1)
        positive = (labels[:, None] == labels) & ~self_
        valid = positive.any(1)
        return -(log_p.masked_fill(~positive, 0.0).sum(1)[valid] / positive.sum(1)[valid]).mean()

    check(lambda z, s: fc.supcon_loss(z, labels, s), dense, Q, SCALE)


@pytest.mark.parametrize("ids", [None, Q_IDS])
def test_nt_xent_is_its_dense_formula(ids):
    def dense(a, b, s):
        z, other = torch.cat([a, b]), (torch.arange(14) + 7) % 14
        masked = torch.eye(14, dtype=torch.bool)
        if ids is not None:
            masked = torch.cat([ids, ids])[:, None] == torch.cat([ids, ids])
            masked[torch.arange(14), other] = False
        return F.cross_entropy((s * z @ z.T).masked_fill(masked, -INF), other)

    check(lambda a, b, s: fc.nt_xent_loss(a, b, s, ids=ids), dense, Q, K[:7], SCALE)


def test_golden_values():
    q, d = F.normalize(golden(4, 8, 0), dim=1), F.normalize(golden(4, 8, 0.6), dim=1)
    noise = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    guides = F.normalize(golden(4, 8, 0.1), dim=1), F.normalize(golden(4, 8, 0.55), dim=1)
    own = (guides[0] * guides[1]).sum(1)
    gist = {"directions": ("query_to_key", "query_to_query", "key_to_key")}
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    for actual, expected in [
        (fc.info_nce(q, d, 10.0), 0.717268872353),
        (fc.info_nce(q, d, 10.0, key_bias=-noise.log()), 0.523901191713),  # ranking NCE
        (fc.info_nce(golden(4, 8, 0), golden(4, 8, 0.6), 1.0), 0.658921733433),  # N-pair
        (fc.supcon_loss(F.normalize(golden(6, 8, 0), dim=1), labels, 10.0), 0.236724399499),
        (fc.info_nce(q, d, 20.0), 0.959068617420),
        (fc.info_nce(q, d, 20.0, directions=ALL), 1.757029089491),  # GTE
        (fc.info_nce(q, d, 20.0, directions=ALL, count_positive_once=True), 1.563774647325),
        (fc.info_nce(q, d, 20.0, guide=(*guides, own), **gist), 0.960736265573),  # GIST
        (fc.info_nce(q, d, 20.0, guide=(*guides, own - 0.1), **gist), 0.214681185625),
        (fc.info_nce(q, d, 100.0, guide=(*guides, own), **gist), 3.510473610238),
    ]:
        assert abs(actual.item() - expected) < 1e-8 * max(1, expected)


def test_reductions_and_weights():
    weights = torch.linspace(0, 2, 7, dtype=torch.float64)
    rows = fc.info_nce(Q, K, 8.0, reduction="none")
    assert rows.shape == (7,)
    torch.testing.assert_close(fc.info_nce(Q, K, 8.0, reduction="sum"), rows.sum())
    torch.testing.assert_close(fc.info_nce(Q, K, 8.0, weights=weights), (rows * weights).mean())
    torch.testing.assert_close(fc.info_nce(Q, K, 8.0, weights=weights, reduction="none"), rows * weights)


def test_accuracy_comes_from_the_sweep():
    q, k = Q.float(), (0.3 * Q + K[:7]).float()
    logits = q @ k.T
    rows = (logits.argmax(1) == torch.arange(7)).float().mean()
    columns = (logits.argmax(0) == torch.arange(7)).float().mean()
    assert 0 < rows < 1 and 0 < columns < 1  # else the comparison below could not fail
    _, one = fc.info_nce(q, k, 8.0, return_accuracy=True)
    _, both = fc.clip_loss(q, k, 8.0, return_accuracy=True)
    assert one == rows and both == (rows + columns) / 2
    _, accuracy = fc.supcon_loss(q, torch.tensor([0, 0, 1, 1, 2, 2, 3]), 8.0, return_accuracy=True)
    near = (q @ q.T).fill_diagonal_(-INF).argmax(1)
    hits = torch.tensor([0, 0, 1, 1, 2, 2, 3])[near] == torch.tensor([0, 0, 1, 1, 2, 2, 3])
    torch.testing.assert_close(accuracy, hits[:6].float().mean())
    _, accuracy = fc.nt_xent_loss(q, k, 8.0, return_accuracy=True)
    z = torch.cat([q, k])
    near = (z @ z.T).fill_diagonal_(-INF).argmax(1)
    torch.testing.assert_close(accuracy, (near == (torch.arange(14) + 7) % 14).float().mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_gradient_once(dtype):
    """Aligned pairs: softmax term and positive nearly cancel, and must do so before rounding."""
    q, k = Q.to(dtype), (Q + 0.3 * K[:7]).to(dtype)

    def gradient(leaf: Tensor, other: Tensor, loss) -> Tensor:
        leaf = leaf.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf, other), leaf)[0].double()

    def dense(a, b):
        return F.cross_entropy(10 * a.to(b.dtype) @ b.T, torch.arange(7))

    truth = gradient(q.double(), k.double(), dense)
    naive = gradient(q.float(), k.float(), dense).float().to(dtype).double()
    ours = gradient(q, k, lambda a, b: fc.info_nce(a, b, 10.0))
    assert (ours - truth).norm() <= 1.2 * (naive - truth).norm() + 1e-7 * truth.norm()


def test_autocast_does_not_round_logits():
    q, k = Q.float().requires_grad_(), K.float()
    expected = torch.autograd.grad(fc.info_nce(q, k, 50.0, hard_negatives=H.float()), q)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fc.info_nce(q, k, 50.0, hard_negatives=H.float())
    actual = torch.autograd.grad(loss, q)[0]
    assert torch.equal(actual, expected)


def test_edges():
    one = torch.ones(1, 4, requires_grad=True)
    for loss in (
        fc.info_nce(one, one * 2, 5.0),
        fc.clip_loss(one, one * 2, 5.0),
        fc.nt_xent_loss(one, one * 2, 5.0),
        fc.supcon_loss(one, torch.tensor([3]), 5.0),
        fc.info_nce(one, one * 2, 5.0, directions=ALL, count_positive_once=True),
    ):
        gradient = torch.autograd.grad(loss, one)[0]
        assert abs(loss.item()) < 1e-6 and gradient.abs().max() < 1e-5
    empty = torch.empty(0, 4, requires_grad=True)
    for loss in (
        fc.info_nce(empty, empty * 1, 5.0),
        fc.clip_loss(empty, empty * 1, 5.0, return_accuracy=True)[0],
        fc.nt_xent_loss(empty, empty, 5.0, return_accuracy=True)[0],
        fc.supcon_loss(empty, torch.empty(0, dtype=torch.long), 5.0, return_accuracy=True)[0],
    ):
        assert loss.item() == 0
        loss.backward()
    # every other key is a duplicate: only the own one is left
    loss = fc.info_nce(Q, K, 5.0, query_ids=torch.zeros(7).long(), key_ids=torch.zeros(11).long())
    assert abs(loss.item()) < 1e-12
    # all hard negatives masked: as without them
    masked = fc.info_nce(Q, K, 5.0, hard_negatives=H, hard_negatives_mask=torch.zeros(7, 3, dtype=torch.bool))
    torch.testing.assert_close(masked, fc.info_nce(Q, K, 5.0))
    # a NaN sample makes the loss NaN, not an error
    broken = Q.clone()
    broken[2] = float("nan")
    rows = fc.info_nce(broken, K, 5.0, reduction="none")
    assert torch.isnan(rows).tolist() == [i == 2 for i in range(7)]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fc.info_nce(K, Q, 5.0), ValueError, r"positives must be given .* queries \(11\) than keys \(7\)"),
        (lambda: fc.info_nce(Q, K[:, :5], 5.0), ValueError, r"info_nce: keys must be \[N, 12\].*got \[11, 5\]"),
        (lambda: fc.info_nce(Q, K, "5"), TypeError, "scale must be a number"),
        (lambda: fc.info_nce(Q, K, 5.0, positives=OWN + 1), ValueError, r"positives must lie in \[0, 11\)"),
        (lambda: fc.info_nce(Q, K, 5.0, directions="query_to_key"), ValueError, "directions must be a non-empty"),
        (lambda: fc.info_nce(Q, K, 5.0, directions=["up"]), ValueError, "directions must be one of"),
        (lambda: fc.clip_loss(Q, Q, "5"), TypeError, "clip_loss: scale must be a number"),
        (lambda: fc.info_nce(Q, K, 5.0, hard_negatives=[1]), TypeError, "hard_negatives must be a tensor, got list"),
        (lambda: fc.info_nce(Q, K, 5.0, hard_negatives=H.to("meta")), ValueError, "hard_negatives must be on cpu"),
        (lambda: fc.info_nce(Q, K, 5.0, hard_negatives=K), ValueError, r"hard_negatives must be \[7, K, 12\]"),
        (lambda: fc.info_nce(Q, K, 5.0, hard_negatives_mask=H[..., 0] > 0), ValueError, "needs hard_negatives"),
        (lambda: fc.info_nce(Q, K, 5.0, queue_ids=Q_IDS), ValueError, "queue_ids needs"),
        (lambda: fc.info_nce(Q, K, 5.0, weights=K[:, 0]), ValueError, r"weights must be \[7\], got \[11\]"),
        (lambda: fc.info_nce(Q, K, 5.0, reduction="avg"), ValueError, "reduction must be one of"),
        (lambda: fc.info_nce(Q, K, 5.0, label_smoothing=1.0), ValueError, r"label_smoothing must lie in \[0, 1\)"),
        (lambda: fc.info_nce(Q, K, 5.0, label_smoothing=0.1, guide=GUIDE), ValueError, "cannot go with guide"),
        (lambda: fc.clip_loss(Q, K, 5.0), ValueError, "as many rows"),
        (lambda: fc.clip_loss(Q.tolist(), Q, 5.0), TypeError, "clip_loss: image_features must be a tensor, got list"),
        (lambda: fc.clip_loss(Q, Q.half(), 5.0), TypeError, "text_features must be float64 like image_features"),
        (lambda: fc.clip_loss(Q, Q, 5.0, ids=OWN[:3]), ValueError, r"clip_loss: ids must be \[7\], got \[3\]"),
        (lambda: fc.nt_xent_loss(Q, K[:7, :5], 5.0), ValueError, r"view2 must be \[N, 12\] to match view1"),
        (lambda: fc.supcon_loss(Q, SCALE.expand(7), 5.0), TypeError, "supcon_loss: labels must be an integer tensor"),
        (lambda: fc.supcon_loss(Q[0], OWN, 5.0), ValueError, r"embeddings must be a matrix .* got \[12\]"),
        (
            lambda: fc.multi_positive_loss(Q, K, 5.0, positives=torch.full((7, 2), 11)),
            ValueError,
            r"positives must lie in \[-1, 11\), got values in \[11, 11\]",
        ),
        (lambda: fc.nt_xent_loss(Q, K, 5.0), ValueError, "view2 must have 7 rows"),
        (lambda: fc.nt_xent_loss(Q, Q, "5"), TypeError, "nt_xent_loss: scale must be a number"),
        (
            lambda: fc.multi_positive_loss(Q, K, 5.0, query_labels=OWN, key_labels=OWN),
            ValueError,
            r"multi_positive_loss: key_labels must be \[11\], got \[7\]",
        ),
        (lambda: fc.multi_positive_loss(Q, K, 5.0), ValueError, "give either"),
        (lambda: fc.multi_positive_loss(Q, K, 5.0, positives=OWN), ValueError, r"positives must be integer \[7, P\]"),
        (lambda: fc.supcon_loss(Q, torch.arange(3), 5.0), ValueError, r"must be \[7\], got \[3\]"),
        (lambda: fc.InfoNCELoss(smoothing=0.1), TypeError, "settings must be among"),
        (lambda: fc.ClipLoss(scale=-1.0), ValueError, "scale must be positive"),
        (lambda: fc.ClipLoss(scale=200.0, learnable=True), ValueError, "at most max_scale"),
    ],
)
def test_errors_name_what_came(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_modules_hold_scale_and_settings():
    loss = fc.ClipLoss(scale=20.0, learnable=True, label_smoothing=0.1)
    q, k = Q.float().requires_grad_(), K[:7].float()
    value = loss(q, k)
    torch.testing.assert_close(value, fc.clip_loss(q, k, 20.0, label_smoothing=0.1))
    value.backward()
    assert loss.log_scale.grad is not None and loss.log_scale.grad != 0
    torch.testing.assert_close(loss(q, k, label_smoothing=0.0), fc.clip_loss(q, k, 20.0))
    with torch.no_grad():
        loss.log_scale.fill_(math.log(1e6))
    loss(q, k)
    assert abs(loss.scale.item() - 100) < 1e-3
    restored = fc.ClipLoss(learnable=True)
    restored.load_state_dict(loss.state_dict())
    assert restored.log_scale == loss.log_scale
    assert "label_smoothing=0.1" in repr(loss)
    for module, arguments in [
        (fc.InfoNCELoss(), (q, k)),
        (fc.NTXentLoss(), (q, k)),
        (fc.SupConLoss(), (q, Q_IDS)),
    ]:
        assert not list(module.parameters())
        module(*arguments).backward()
    fc.MultiPositiveLoss()(q, k, query_labels=Q_IDS, key_labels=Q_IDS).backward()


@pytest.mark.parametrize(
    "loss",
    [
        lambda q, k, s: fc.clip_loss(q, k, s, ids=Q_IDS, label_smoothing=0.1),
        lambda q, k, s: fc.info_nce(q, k, s, directions=ALL, hard_negatives=H.float(), queue=QUEUE.float()),
        lambda q, k, s: fc.supcon_loss(q, Q_IDS, s),
        lambda q, k, s: fc.nt_xent_loss(q, k, s),
    ],
    ids=["clip", "info_nce", "supcon", "nt_xent"],
)
def test_losses_compile_into_one_graph(loss):
    inputs = [Q.float().requires_grad_(), K[:7].float().requires_grad_(), SCALE.float().requires_grad_()]
    eager = loss(*inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(
        torch.autograd.grad(compiled, inputs, allow_unused=True),
        torch.autograd.grad(eager, inputs, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
