"""SaHa against its definition: golden clusters and loss, the sampler in plain loops, edges, ranks, resume, command."""

import copy

import pytest
import torch
from golden_decoding import F
from recipes import assert_ranks_equal_one, assert_resumes, close, gradients, train_a_little, unit

from fastcontrast import GradCache
from fastcontrast.recipes._parts import saha_clusters as sampler
from fastcontrast.recipes.saha import ClusterBatches, hierarchical_prompt, last_token, saha_clusters, saha_loss

RAW = F(8, 8, 0), F(8, 8, 0.6)
EIGHT = torch.arange(8)


def plain(queries, candidates, query_of, candidate_of, hard, multiplier, classification=False):
    """The sampler with its whole matrices, in the order of its definition."""
    asked, alike = queries @ candidates.T, queries @ queries.T
    rows = list(enumerate(zip(query_of.tolist(), candidate_of.tolist(), strict=True)))
    first, pool = hard * multiplier, 2 * hard * multiplier
    used, clusters = set(), ([], [])

    def cluster(row, q, own, taken, count):
        owners = []
        for c in sorted(range(len(candidates)), key=lambda c: (-asked[q, c].item(), c))[:pool]:
            free = {(q2, r) for r, (q2, c2) in rows if c2 == c and q2 not in taken and q2 != q}
            if c == own or not free or len(owners) == count:
                continue
            best = max({q2 for q2, _ in free}, key=lambda q2: alike[q, q2].item())
            if best not in [q2 for q2, _ in owners]:
                owners.append((best, min(r for q2, r in free if q2 == best)))
        if not classification:
            owners.sort(key=lambda owner: alike[q, owner[0]].item())
        return owners[:hard]

    for row, (q, own) in rows:
        if q not in used and (found := cluster(row, q, own, used, first)):
            used |= {q, *(q2 for q2, _ in found)}
            clusters[0].append([row, *(r for _, r in found)])
    done, reused = set(used), set()
    for row, (q, own) in rows:
        if q not in done and (found := cluster(row, q, own, reused, 2 * first)):
            done.add(q)
            reused |= {q2 for q2, _ in found}
            clusters[1].append([row, *(r for _, r in found)])
    return clusters


def problem(queries, candidates, rows, seed=0, width=6, dtype=torch.float64):
    """Distinct vectors, and rows that name each of them at least once, some pairs of several rows in common."""
    generator = torch.Generator().manual_seed(seed)
    vectors = [unit(torch.randn(n, width, generator=generator, dtype=torch.float64)) for n in (queries, candidates)]
    index = [
        torch.cat([torch.randperm(n, generator=generator), torch.randint(n, (rows - n,), generator=generator)])
        for n in (queries, candidates)
    ]
    return (*(x.to(dtype) for x in vectors), index[0], index[1])


GOLDEN = [
    (2, 2, False, [[0, 4, 6], [1, 3, 5], [2, 7]], []),
    (2, 2, True, [[0, 5, 6], [1, 7, 2], [3, 4]], []),
    (3, 2, False, [[0, 3, 4, 7], [1, 5, 6, 2]], []),
    (2, 1, False, [[0, 6, 5], [1, 7], [3, 2]], [[4, 2, 3]]),
    (2, 1, True, [[0, 5, 6], [1, 7], [3, 2]], [[4, 3, 5]]),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("hard", "multiplier", "classification", "first", "second"), GOLDEN)
def test_golden_clusters(hard, multiplier, classification, first, second, dtype):
    vectors = [unit(x).to(dtype) for x in RAW]
    found = saha_clusters(*vectors, EIGHT, EIGHT, hard, multiplier, classification=classification)
    assert found == (first, second)


def test_golden_loss():
    for dtype, atol in ((torch.float64, 1e-8), (torch.float32, 2e-5)):
        value, *found = gradients(lambda q, c: saha_loss(unit(q), unit(c)), *(x.to(dtype) for x in RAW))
        close(value, 1.78321707, atol=atol)
        close(found[0].norm(), 6.73168238, atol=atol)
        close(found[1].norm(), 6.43183634, atol=atol)


@pytest.mark.parametrize("classification", [False, True])
@pytest.mark.parametrize(("queries", "candidates", "rows"), [(60, 60, 60), (50, 40, 90), (40, 5, 45), (3, 30, 60)])
def test_clusters_equal_those_of_plain_loops(queries, candidates, rows, classification, monkeypatch):
    monkeypatch.setattr(sampler, "BLOCK", 7)  # several retrievals, each with queries that meanwhile are taken
    for seed, (hard, multiplier) in enumerate([(3, 2), (4, 1), (2, 3)]):
        given = problem(queries, candidates, rows, seed)
        expected = plain(*given, hard, multiplier, classification)
        assert saha_clusters(*given, hard, multiplier, classification=classification) == expected
        given = problem(queries, candidates, rows, seed, dtype=torch.float32)
        assert saha_clusters(*given, hard, multiplier, classification=classification) == expected


@pytest.mark.parametrize("multiplier", [1, 3])
def test_invariants(multiplier):
    queries, candidates, query_of, candidate_of = problem(70, 50, 110, seed=3)
    first, second = saha_clusters(queries, candidates, query_of, candidate_of, 4, multiplier)
    members = [query_of[row].item() for cluster in first for row in cluster]
    assert len(members) == len(set(members))  # no query in two clusters of phase 1
    anchors = {query_of[cluster[0]].item() for cluster in second}
    assert len(anchors) == len(second) and not anchors & set(members)
    assert {*members} | anchors == set(range(70))  # everybody found somebody here
    for cluster in first + second:
        assert 2 <= len(cluster) <= 5 and len({query_of[row].item() for row in cluster}) == len(cluster)
        anchor, others = cluster[0], cluster[1:]
        assert all(candidate_of[row] != candidate_of[anchor] for row in others)  # never its own positive


def test_with_multiplier_1_the_sort_only_reorders_phase_1():
    given = problem(60, 60, 60, seed=5)
    sorted_, plain_ = (saha_clusters(*given, 4, 1, classification=kind)[0] for kind in (False, True))
    assert [{*x} for x in sorted_] == [{*x} for x in plain_] and sorted_ != plain_


def one_hot(*index, width=6):
    return torch.nn.functional.one_hot(torch.tensor(index), width).double()


def test_a_query_does_not_meet_itself_through_another_positive():
    queries, candidates = one_hot(0, 1), one_hot(0, 0, 1)
    rows = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])  # query 0 has two positives, the nearest of all
    assert saha_clusters(queries, candidates, *rows, 2, 1) == ([[0, 2]], [])


def test_an_owner_reached_twice_is_one_member_with_its_first_row():
    queries = one_hot(0, 1, 2)
    candidates = torch.eye(6, dtype=torch.float64)[[0, 3, 3, 4]] + 0.1 * torch.eye(6, dtype=torch.float64)[0]
    rows = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 3])
    assert saha_clusters(queries, candidates, *rows, 2, 2) == ([[0, 1, 3]], [])  # equal products: the lower index first


def test_of_several_owners_the_one_most_alike():
    queries = unit(torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.float64))
    candidates = torch.eye(3, dtype=torch.float64)
    rows = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 1, 2])
    assert saha_clusters(queries, candidates, *rows, 1, 1)[0][0] == [0, 2]


def test_what_a_candidate_more_than_there_are_leaves():
    given = problem(4, 4, 4)
    assert saha_clusters(*given, 50, 3) == plain(*given, 50, 3)


def test_a_query_that_finds_nobody_has_no_cluster():
    alone = torch.ones(1, 3), torch.ones(1, 3), torch.tensor([0]), torch.tensor([0])
    assert saha_clusters(*alone) == ([], [])
    same = torch.eye(3), torch.eye(3)[:1], torch.arange(3), torch.zeros(3, dtype=torch.long)
    assert saha_clusters(*same) == ([], [])  # one answer for all: nothing is hard
    nothing = torch.zeros(0, 3), torch.zeros(0, 3), *(torch.zeros(0, dtype=torch.long) for _ in range(2))
    assert saha_clusters(*nothing) == ([], [])


def test_a_leftover_meets_only_queries_that_phase_1_took():
    """Another leftover among those it retrieves would have been free in phase 1, and its member then."""
    count = 0
    for seed in range(6):
        _, _, query_of, _ = given = problem(40, 40, 60, seed)
        _, second = saha_clusters(*given, 3, 1)
        anchors = {query_of[cluster[0]].item() for cluster in second}
        assert not anchors & {query_of[row].item() for cluster in second for row in cluster[1:]}
        count += len(anchors)
    assert count > 5


def test_only_some_queries_retrieve(monkeypatch):
    asked, topk = [], sampler.similarity_topk
    monkeypatch.setattr(sampler, "BLOCK", 8)

    def counted(queries, *rest):
        asked.append(len(queries))
        return topk(queries, *rest)

    monkeypatch.setattr(sampler, "similarity_topk", counted)
    saha_clusters(*problem(400, 400, 400, width=32, dtype=torch.float32), 7, 3)
    assert sum(asked) < 200


def test_duplicates_are_negatives_unless_ids_tell():
    q, c = (unit(x) for x in RAW)
    c = torch.cat([c[:7], c[:1]])
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0])
    logits = 50 * q @ c.T
    torch.testing.assert_close(saha_loss(q, c), -logits.log_softmax(1).diagonal().mean())
    logits[0, 7] = logits[7, 0] = -torch.inf
    torch.testing.assert_close(saha_loss(q, c, candidate_ids=ids), -logits.log_softmax(1).diagonal().mean())


def test_several_targets():
    q, c = unit(F(4, 5, 0)), unit(F(12, 5, 0.6))
    expected = torch.nn.functional.cross_entropy(50 * q @ c.T, torch.tensor([0, 3, 6, 9]))
    torch.testing.assert_close(saha_loss(q, c, targets=3), expected)
    ids = torch.arange(12)
    torch.testing.assert_close(saha_loss(q, c, targets=3, candidate_ids=ids), expected)


def test_what_does_not_fit_is_named():
    q, c = RAW
    for match, call in (
        ("saha_loss: candidates must be 1 for each of 8 queries, got 7", lambda: saha_loss(q, c[:7])),
        ("saha_loss: candidates must be .N, 8. to match queries", lambda: saha_loss(q, c[:, :5])),
        ("saha_loss: candidate_ids must be .8.", lambda: saha_loss(q, c, candidate_ids=EIGHT[:5])),
        ("saha_clusters: hard must be at least 1, got 0", lambda: saha_clusters(q, c, EIGHT, EIGHT, 0)),
        ("saha_clusters: query_of must lie in .0, 8.", lambda: saha_clusters(q, c, EIGHT + 1, EIGHT)),
        ("saha_clusters: candidate_of must be .8.", lambda: saha_clusters(q, c, EIGHT, EIGHT[:3])),
        ("ClusterBatches: a batch must hold 1 to 2 clusters", lambda: ClusterBatches([[0], [1]], 3, 0)),
        ("ClusterBatches: rank must lie in .0, 2.", lambda: ClusterBatches([[0], [1]], 1, 0, 2, 2)),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def of_raw(q, c):
    return saha_loss(unit(q), unit(c))


def test_ranks_with_unequal_batches_equal_one():
    assert_ranks_equal_one(of_raw, RAW, (5, 3))


def test_chunks_of_a_batch_equal_the_whole():
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4).double()
    other = copy.deepcopy(model)
    loss = saha_loss(*(unit(model(x)) for x in RAW))
    loss.backward()
    cached = GradCache([other, other], 4, lambda q, c: saha_loss(unit(q), unit(c)))(*RAW)
    torch.testing.assert_close(cached, loss.detach())
    torch.testing.assert_close(other.weight.grad, model.weight.grad)


CLUSTERS = [[0, 1, 2], [3, 4], [5], [6, 7, 8], [9, 10]]


def test_batches_are_whole_clusters_each_once_an_epoch():
    drawn = ClusterBatches(CLUSTERS, 2, seed=0)
    epochs = [[next(drawn).tolist() for _ in range(2)] for _ in range(20)]
    for epoch in epochs:
        rows = [row for batch in epoch for row in batch]
        assert len(rows) == len(set(rows)) and sum({*c} <= {*rows} for c in CLUSTERS) == 4
    assert len({str(epoch) for epoch in epochs}) > 10  # another order each time
    again = ClusterBatches(CLUSTERS, 2, seed=0)
    assert [next(again).tolist() for _ in range(2)] == epochs[0]


def test_ranks_share_the_clusters_of_a_batch():
    whole = ClusterBatches(CLUSTERS, 4, seed=1)
    parts = [ClusterBatches(CLUSTERS, 2, seed=1, rank=rank, world=2) for rank in (0, 1)]
    for _ in range(3):
        assert torch.equal(next(whole), torch.cat([next(part) for part in parts]))


def test_batches_resume():
    assert_resumes(lambda: ClusterBatches(CLUSTERS, 2, seed=7), lambda drawn, _: next(drawn))


def test_the_prompt_asks_twice_of_queries_and_once_of_candidates():
    system, user = hierarchical_prompt("def f(): pass", "Find the code.")
    assert system["role"] == "system" and user["role"] == "user"
    task, text, closing = user["content"].split("\n")
    assert (task, text) == ("Find the code.", "def f(): pass") and "one word" in closing
    assert "one word" in system["content"]
    candidate = hierarchical_prompt("def f(): pass", query=False)
    assert candidate == [system, {"role": "user", "content": "def f(): pass"}]
    own = hierarchical_prompt("x", role="R", closing="C")
    assert own == [{"role": "system", "content": "R"}, {"role": "user", "content": "x\nC"}]


def test_the_last_token_is_found_on_either_side_of_the_padding():
    states = torch.randn(2, 4, 3)
    right, left = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    torch.testing.assert_close(last_token(states, right.bool()), unit(torch.stack([states[0, 1], states[1, 3]])))
    torch.testing.assert_close(last_token(states, left), unit(states[:, 3]))


def test_the_command_trains_and_writes(tmp_path, monkeypatch, one_thread):
    results = train_a_little("saha", tmp_path, monkeypatch, CLUSTERS=2, UNSEEN=40)
    assert set(results["models"]) == {"before training", "random batches", "SaHa"}
    assert results["clusters"] > 10
    for label, found in results["models"].items():
        assert len(found["losses"]) == (0 if label == "before training" else 2)
        assert set(found["metrics"]) == {"docstring → code R@1, %", "code → docstring R@1, %"}
