"""ProtoCLIP against its definition: golden values, the dense formula, invariants, edges, ranks, resume, the command."""

import math

import pytest
import torch
from recipes import assert_ranks_equal_one, assert_resumes, close, gradients, train_a_little, unit, waves
from torch.nn import functional as F

from fastcontrast import clip_loss
from fastcontrast.distributed._sums import own_parameter, share
from fastcontrast.kmeans import Clusters, kmeans, segment_mean
from fastcontrast.recipes._parts.protoclip_episode import Episode, soft_targets
from fastcontrast.recipes._parts.protoclip_features import linear_probe, principal
from fastcontrast.recipes.protoclip import ProtoClip, proto_loss, stage
from fastcontrast.testing import ranks

SCALE = 1 / 0.07
H, G = waves(5, 6, 0), waves(5, 6, 1)
MU = {"image": 0.5 * waves(3, 6, 2), "text": 0.5 * waves(3, 6, 3)}
LABELS = {"image": torch.tensor([0, 1, 2, 1, 0]), "text": torch.tensor([2, 2, 0, 1, 1])}
NU = {"image": segment_mean(unit(H), LABELS["text"], 3)[0], "text": segment_mean(unit(G), LABELS["image"], 3)[0]}


def both(h, g, tau, translate=True):
    """L_i2t and L_t2i of the fixture, of features that are normalised here."""
    losses = []
    for x, side, other in ((h, "image", "text"), (g, "text", "image")):
        teacher = MU[other].to(x.dtype)
        prototypes = NU[side].to(x.dtype) if translate else teacher
        targets = soft_targets(teacher, prototypes, tau) if tau > 0 else None
        losses.append(proto_loss(unit(x), prototypes, LABELS[other], SCALE, targets=targets))
    return torch.stack(losses)


def dense(features, prototypes, labels, scale, teacher=None, tau=-1.0, valid=None):
    """Over the matrix of logits, with targets a matrix as well."""
    k = len(prototypes)
    off = torch.zeros(k, dtype=torch.bool) if valid is None else ~valid
    kept = labels >= 0
    features, labels = features[kept], labels[kept]
    logp = (scale * features @ prototypes.T).masked_fill(off, -math.inf).log_softmax(1)
    q = F.one_hot(labels, k).double()
    if tau > 0:
        q = (teacher[labels] @ teacher.T / tau).masked_fill(off, -math.inf).softmax(1)
    return -(q * logp.masked_fill(off, 0.0)).sum() / max(1, len(features))


def drawn(rows=53, k=19, d=11, dtype=torch.float64):
    torch.manual_seed(0)
    f, s, c = unit(torch.randn(rows, d)), 0.7 * unit(torch.randn(k, d)), 0.9 * unit(torch.randn(k, 5))
    return f.to(dtype), s.to(dtype), c.to(dtype), torch.randint(k, (rows,))


@pytest.mark.parametrize(
    ("tau", "translate", "expected"),
    [
        (0.1, True, (0.40471510, 0.65635399, 0.53053455)),
        (0.1, False, (2.11815985, 10.25339460, 6.18577722)),
        (0.01, True, (0.00012541, 0.00711541, 0.00362041)),
        (0.0, True, (0.00012541, 0.00711523, 0.00362032)),
    ],
)
def test_golden_values(tau, translate, expected):
    losses = both(H, G, tau, translate)
    close(torch.cat([losses, losses.mean()[None]]), *expected)
    close(both(H.float(), G.float(), tau, translate), *expected[:2], atol=2e-5)


def test_golden_gradient_and_translated_rows():
    _, h, _ = gradients(lambda h, g: both(h, g, 0.1).mean(), H, G)
    close(h.norm(), 0.08220949)
    close(NU["image"].norm(dim=1), 1, 0.71593033, 0.66221352)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tau", [-1.0, 0.1, 0.01])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_equals_the_dense_formula(dtype, tolerance, tau, masked):
    f, s, c, labels = drawn()
    valid = torch.arange(19) % 4 != 3 if masked else None
    labels = labels.where(labels % 4 != 3, -1 if tau < 0 else 0) if masked else labels
    leaves = f, torch.tensor(SCALE, dtype=torch.float64)
    expected = gradients(lambda f, scale: dense(f, s, labels, scale, c, tau, valid), *leaves)

    def ours(f, scale, s, c):
        targets = soft_targets(c, s, tau, valid) if tau > 0 else None
        return proto_loss(f, s, labels, scale, targets=targets, valid=valid)

    found = gradients(ours, *(x.to(dtype) for x in (*leaves, s, c)))
    for x, y in zip(found, expected, strict=False):
        assert x.dtype == dtype and (x.double() - y).norm() <= tolerance * y.norm()
    assert not found[3].any() and not found[4].any()  # prototypes and what targets are made of are constants


def test_half_precision_is_only_in_the_features():
    f, s, c, labels = drawn(dtype=torch.float32)
    targets = soft_targets(c, s, 0.01)
    found, expected = (proto_loss(x, s, labels, SCALE, targets=targets) for x in (f.bfloat16(), f.bfloat16().float()))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_invariants():
    f, s, c, labels = drawn(k=8)
    eye = torch.eye(8, 11, dtype=torch.float64)
    close(proto_loss(f, s, labels, 9.0, targets=soft_targets(eye, s, 1e-3)), proto_loss(f, s, labels, 9.0))
    one = s[:1], torch.zeros(53, dtype=torch.int64), 9.0
    close(proto_loss(f, *one), 0)
    close(proto_loss(f, *one, targets=soft_targets(c[:1], s[:1], 0.1)), 0)
    order = torch.randperm(8)
    moved = proto_loss(f, s[order], order.argsort()[labels], 9.0, targets=soft_targets(c[order], s[order], 0.1))
    close(moved, proto_loss(f, s, labels, 9.0, targets=soft_targets(c, s, 0.1)))
    longer = torch.tensor([[0.1, 0.0], [0.9, 0.0]]).double()  # ⟨C_0, C_1⟩ > ⟨C_0, C_0⟩: not the one-hot of 0
    torch.testing.assert_close(soft_targets(longer, s[:2], 1e-4), s[[1, 1]])


def test_label_minus_one():
    f, s, c, labels = drawn()
    some = labels.clone()
    some[::3] = -1
    value, gradient = gradients(lambda f: proto_loss(f, s, some, SCALE), f)
    close(value, proto_loss(f[some >= 0], s, some[some >= 0], SCALE))
    assert not gradient[::3].any() and gradient[1].any()
    assert proto_loss(f, s, torch.full((53,), -1), SCALE) == 0
    with pytest.raises(ValueError, match=r"proto_loss: labels must lie in \[0, 19\), got values in \[-1"):
        proto_loss(f, s, some, SCALE, targets=soft_targets(c, s, 0.01))


def test_empty_clusters_count_unless_masked():
    f, s, _, _ = drawn(rows=4, k=3)
    s[2], labels = 0, torch.tensor([0, 1, 1, 0])
    valid = torch.tensor([True, True, False])
    logits = SCALE * f @ s.T
    close(proto_loss(f, s, labels, SCALE), F.cross_entropy(logits, labels))  # exp(0) in each denominator
    for x, rtol in ((f, 1e-12), (f.float(), 1e-5)):
        found = proto_loss(x, s.to(x.dtype), labels, SCALE, valid=valid)
        torch.testing.assert_close(found.double(), F.cross_entropy(logits[:, :2], labels), rtol=rtol, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prototypes": torch.ones(3, 5)}, r"proto_loss: prototypes must be \[N, 6\] to match features, got \[3, 5\]"),
        ({"targets": torch.ones(3, 5)}, r"proto_loss: targets must be \[N, 6\] to match features, got \[3, 5\]"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"proto_loss: labels must be \[5\], got \[4\]"),
        (
            {"labels": torch.tensor([0, 1, 2, 3, 0])},
            r"proto_loss: labels must lie in \[-1, 3\), got values in \[0, 3\]",
        ),
        ({"valid": torch.ones(4) > 0}, r"proto_loss: valid must be bool \[3\], got torch.bool \[4\]"),
        ({"valid": torch.tensor([True, True, False])}, "proto_loss: labels must be of valid clusters"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    fits = {"features": H, "prototypes": NU["image"], "labels": LABELS["text"], "scale": 1.0}
    with pytest.raises(ValueError, match=message):
        proto_loss(**{**fits, **change})


def test_other_refusals():
    for settings, message in (
        ({"k": 5}, r"Episode: k must lie in \[1, 4\], the samples of an episode, got 5"),
        ({"k": 2, "external": True, "translate": False}, "Episode: external=True needs translate=True"),
    ):
        with pytest.raises(ValueError, match=message):
            Episode(4, **settings)
    with pytest.raises(ValueError, match="soft_targets: tau must be positive, got 0"):
        soft_targets(H, H, 0)
    with pytest.raises(ValueError, match="soft_targets: teacher must have 3 rows like prototypes, got"):
        soft_targets(H, H[:3], 0.1)
    with pytest.raises(ValueError, match="Episode: image must have 4 rows"):
        Episode(4, 2, 6).cluster(H, G)
    with pytest.raises(ValueError, match="Episode: text must not be infinite"):
        Episode(4, 2, 3).cluster(torch.ones(4, 3), torch.full((4, 3), math.inf))
    with pytest.raises(ValueError, match="Episode: external features must be given if and only if external=True"):
        Episode(5, 2, 6).cluster(H, G, G)


# ------------------------------------------------------------------------------------------------------------- episodes


def test_an_episode_goes_once_through_its_samples():
    episode = Episode(10, 2, 6, seed=3)
    assert episode.take(3) is None
    rows = episode.draw(4)
    assert len(rows) == 10 and len(set(rows.tolist())) <= 4  # with replacement
    places = [episode.take(3) for _ in range(4)]
    assert torch.equal(torch.cat(places[:3]), torch.arange(9)) and places[3] is None
    assert not torch.equal(episode.draw(4), rows) and episode.number == 1
    assert torch.equal(Episode(10, 2, 6, seed=3).draw(4), rows)


@pytest.mark.parametrize("translate", [True, False])
@pytest.mark.parametrize("tau", [0.01, -1.0])
def test_what_an_episode_holds(translate, tau):
    h, g, x = unit(waves(40, 6, 0)), unit(waves(40, 6, 1)), waves(40, 9, 2)
    broken = h.clone()
    h[7], broken[7, 2] = h[7].clone().index_fill(0, torch.tensor([2]), 0.0), math.nan  # counts as 0
    settings = {"tau": tau, "translate": translate, "external": translate, "restarts": 2}
    episode = Episode(40, 5, 6, **settings).double()
    episode.draw(99)
    episode.cluster(broken, g, x if translate else None)
    for side, student, teacher in (("image", h, g), ("text", g, h)):
        centroids, labels, _ = kmeans(teacher, 5, restarts=2)
        task = episode.of_each_other[side]
        means = [student[labels == k].mean(0) for k in range(5)]
        expected = torch.stack(means) if translate else centroids
        torch.testing.assert_close(task.prototypes, expected)
        targets = soft_targets(centroids, expected, tau) if tau > 0 else expected
        torch.testing.assert_close(task.targets, targets)
        assert torch.equal(task.labels, labels)
        if translate:
            of_external = episode.of_external[side]
            labels = kmeans(x, 5, restarts=2).labels
            torch.testing.assert_close(of_external.prototypes, segment_mean(student, labels, 5)[0])
            assert torch.equal(of_external.targets, of_external.prototypes) and torch.equal(of_external.labels, labels)


def test_masked_clusters_are_the_empty_ones():
    episode = Episode(5, 4, 6, masked=True).double()
    task = episode.of_each_other["image"]
    task.fill(unit(H), Clusters(0.5 * waves(4, 6, 3), LABELS["text"], None))
    assert task.valid.tolist() == [True, True, True, False]
    torch.testing.assert_close(task.targets[:3], soft_targets(MU["text"], NU["image"], 0.01))


def objective(episode: Episode, weights=(1.0, 1.0, 1.0), dtype=torch.float64) -> ProtoClip:
    torch.manual_seed(1)
    return ProtoClip(episode, 7, hidden=16, width=6, weights=weights).to(dtype)


def test_the_objective_is_the_sum_of_its_parts():
    image, text = waves(40, 7, 4), waves(40, 7, 5)
    proto = objective(Episode(40, 5, 6, external=True), (0.5, 2.0, 3.0))
    for a, b in zip(proto.image_head.parameters(), proto.text_head.parameters(), strict=True):
        assert torch.equal(a, b) and a is not b
    proto.episode.draw(9)
    proto.episode.cluster(*proto.project(image, text).values(), waves(40, 3, 0))
    places = torch.arange(3, 20)
    image, text = image[places], text[places]
    with torch.no_grad():
        proto.proto_scale.log += 0.5
    close(proto.proto_scale(), SCALE * math.exp(0.5), atol=1e-5)
    expected = 0.5 * clip_loss(unit(image), unit(text), proto.scale())
    students, scale = proto.project(image, text), proto.proto_scale()
    for weight, tasks in ((2.0, proto.episode.of_each_other), (3.0, proto.episode.of_external)):
        for side, task in tasks.items():
            half = proto_loss(students[side], task.prototypes, task.labels[places], scale, targets=task.targets)
            expected = expected + weight * half / 2
    torch.testing.assert_close(proto(image, text, places), expected)
    alone = gradients(lambda x, y: clip_loss(unit(x), unit(y), proto.scale()), image, text)
    proto.weights = (1.0, 0.0, 0.0)
    torch.testing.assert_close(gradients(lambda x, y: proto(x, y, places), image, text), alone)
    torch.testing.assert_close(gradients(proto, image, text), alone)


def test_scales_are_clamped_and_statistics_follow_before_the_first_clusters():
    proto = objective(Episode(5, 2, 6))
    with torch.no_grad():
        proto.scale.log.fill_(9)
        proto.proto_scale.log.fill_(-9)
    proto.clamp()
    close(proto.scale(), 100, atol=1e-4)
    close(proto.proto_scale(), 1)
    loss = proto(waves(5, 7, 0), waves(5, 7, 1))
    assert proto.image_head[1].running_mean.any()
    loss.backward()
    assert proto.image_head[0].weight.grad is None and proto.proto_scale.log.grad is None


def test_stages():
    assert [stage(e, lit_start=4) for e in range(6)] == ["clip", "proto", "proto", "proto", "locked", "locked"]
    assert [stage(e, 9, infonce_warmup=2) for e in range(3)] == ["clip", "clip", "proto"]


def test_resumes_in_the_middle_of_an_episode():
    image, text = waves(9, 7, 0).float(), waves(9, 7, 1).float()

    def step(proto, i):
        """The third of three batches, and in it the next episode: its draws, clusters and first batch."""
        losses = []
        for _ in range(1 if i < 2 else 3):
            if (places := proto.episode.take(4)) is None:
                rows = proto.episode.draw(9)
                proto.episode.cluster(*proto.eval().project(image[rows], text[rows]).values())
                places = proto.train().episode.take(4)
            rows = proto.episode.indices[places]
            losses.append(proto(image[rows], text[rows], places).detach())
        return [*losses, proto.episode.indices.clone(), proto.episode.number.clone()]

    assert_resumes(lambda: objective(Episode(12, 3, 6), dtype=torch.float32), step)


# ---------------------------------------------------------------------------------------------------------------- ranks


def on_ranks(h, g, log_scales, of_text, of_image):
    """Both halves, one with hard labels that may be −1, of a learned scale that every rank holds: as a test of its
    gradient it is the mean of a row's number over all ranks."""
    scale = own_parameter(share(log_scales.sum(), len(log_scales)).exp())
    targets = soft_targets(MU["text"], NU["image"], 0.1)
    soft = proto_loss(unit(h), NU["image"], of_text, scale, targets=targets)
    return soft + proto_loss(unit(g), NU["text"], of_image, scale)


@pytest.mark.parametrize(("sizes", "how"), [((3, 2), "gather"), ((1, 4), "ring")])
def test_ranks_equal_one(sizes, how):
    hard = LABELS["image"].clone()
    hard[1] = -1
    tensors = [H, G, torch.linspace(1, 2, 5, dtype=torch.float64), LABELS["text"], hard]
    assert_ranks_equal_one(on_ranks, tensors, sizes, how)


def clusters_of_rank(features):
    episode = Episode(8, 3, 6)
    rows = episode.draw(50)
    noise = 0.1 * torch.distributed.get_rank()  # what two machines would round differently
    episode.cluster(features + noise, features.flip(0) + noise)
    return rows, episode.state_dict()


def test_clusters_are_those_of_rank_0():
    (rows, first), (again, second) = ranks.run(2, clusters_of_rank, waves(8, 6, 0).float())
    assert torch.equal(rows, again)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert first["of_each_other.text.prototypes"].any()


# -------------------------------------------------------------------------------------------------------------- the run


def test_probe_and_principal_components(one_thread):
    torch.manual_seed(0)
    labels = torch.randint(5, (200,))
    assert linear_probe(torch.randn(5, 8)[labels] + 0.05 * torch.randn(200, 8), labels, 0) == 100
    x = (torch.randn(50, 3) @ torch.randn(3, 9) + 4).double()
    three = principal(x, 3)  # all that there are: distances stay
    torch.testing.assert_close(torch.pdist(three), torch.pdist(x))


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    # three episodes of two steps: CLIP's loss, all, the image tower locked
    results = train_a_little("protoclip", tmp_path, monkeypatch, steps=6, EPISODE=64, BATCH=32)
    assert list(results["models"]) == ["CLIP", "ProtoCLIP", "ProtoCLIP, MiniLM"] and results["clusters"] == 8
    clip, proto, both = (results["models"][label]["losses"] for label in results["models"])
    assert clip[:2] == proto[:2] == both[:2] and clip[2] < proto[2] < both[2]  # one start, the same samples
    for label, found in results["models"].items():
        assert set(found["metrics"]) == {"linear probe, %", "icon → name R@1, %", "name → icon R@1, %"}
        used = {"similarity_lse"} if label == "CLIP" else {"similarity_lse", "similarity_mix", "similarity_topk"}
        assert set(found["implementations"]) == used
