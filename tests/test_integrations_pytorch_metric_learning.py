"""pytorch-metric-learning's losses against ours: the same values and gradients, in its wrappers, from its reducers."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("pytorch_metric_learning")

from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from pytorch_metric_learning.utils import distributed
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

import fastcontrast
from fastcontrast.integrations import pytorch_metric_learning as ours
from fastcontrast.ops import trace
from fastcontrast.testing import assert_as_good_as, ranks, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("NTXentLoss", "SupConLoss")
TOLERANCES = ((torch.float64, 1e-11), (torch.float32, 1e-5))


def normal(rows: int, width: int, seed: int) -> Tensor:
    """Of float32's precision, so that the truth is that of the same inputs."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).double()


def classes(rows: int, count: int, seed: int) -> Tensor:
    return torch.randint(0, count, (rows,), generator=torch.Generator().manual_seed(seed))


def assert_same(name: str, call, *inputs: Tensor, make=lambda kind: kind(), dtypes=TOLERANCES) -> list:
    """`call(loss, *inputs)` of our loss equals that of the original in float64, with gradients to all inputs. Returns
    our losses."""

    def evaluate(kind, dtype):
        loss = make(kind).to(dtype)
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        value = call(loss, *leaves)
        wanted = [*leaves, *loss.parameters()]
        return loss, value.detach(), torch.autograd.grad(value, wanted, materialize_grads=True)

    _, truth, truth_gradients = evaluate(getattr(losses, name), torch.float64)
    made = []
    for dtype, tolerance in dtypes:
        loss, value, gradients = evaluate(getattr(ours, name), dtype)
        assert value.dtype == dtype
        assert abs(value.double() - truth) <= tolerance * max(abs(truth.item()), 1e-3)
        for gradient, expected in zip(gradients, truth_gradients, strict=True):
            # gradients that are zero in truth leave rounding of the terms that cancel
            assert (gradient.double() - expected).norm() <= tolerance * max(expected.norm().item(), 1e-2)
        made.append(loss)
    return made


# -------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_original(name):
    """Duplicate labels, one class, only different ones, rows without positives, references of other sizes."""
    seeds = itertools.count()
    for rows, count, references in itertools.product((0, 1, 2, 3, 5, 13, 33), (1, 2, 5, 100), (None, 1, 4, 19)):
        seed = next(seeds)
        x, y = normal(rows, (3, 17)[seed % 2], seed), classes(rows, count, seed)
        settings = {"temperature": (0.07, 0.1, 0.5)[seed % 3]}
        if seed % 5 == 0:
            settings["distance"] = distances.DotProductSimilarity(normalize_embeddings=False)
            settings["temperature"] = 2.0  # within the −log(tiny) that limits the original's losses
        if seed % 2:
            settings["reducer"] = reducers.AvgNonZeroReducer() if name == "NTXentLoss" else reducers.MeanReducer()
        inputs, labels = [x], [y]
        if references:
            inputs.append(normal(references, x.shape[1], seed + 1000))
            labels.append(classes(references, count, seed + 1000).to(torch.int32))

        def call(loss, x, ref=None, labels=labels):
            return loss(x, labels[0], ref_emb=ref, ref_labels=None if ref is None else labels[1])

        for loss in assert_same(name, call, *inputs, make=lambda kind, settings=settings: kind(**settings)):
            assert loss.last_fallback is None


@pytest.mark.parametrize("name", NAMES)
def test_references_under_the_same_labels_are_not_compared_with_themselves(name):
    x, ref, y = normal(9, 4, 1), normal(9, 4, 2), classes(9, 3, 1)
    assert_same(name, lambda loss, x, ref: loss(x, y, ref_emb=ref), x, ref)
    assert_same(name, lambda loss, x, ref: loss(x, y, ref_emb=ref, ref_labels=y), x, ref)
    assert_same(name, lambda loss, x, ref: loss(x, y > 0, ref_emb=ref, ref_labels=y.clone() > 1), x, ref)


@pytest.mark.parametrize("name", NAMES)
def test_a_learned_temperature_gets_its_gradient(name):
    def make(kind):
        loss = kind()
        loss.temperature = nn.Parameter(torch.tensor(0.2))
        return loss

    y = classes(11, 4, 3)
    for indices in (
        None,
        (torch.tensor([0, 2, 2]), torch.tensor([1, 3, 4]), torch.tensor([2, 0]), torch.tensor([5, 6])),
    ):
        for loss in assert_same(name, lambda loss, x, i=indices: loss(x, y, i), normal(11, 5, 3), make=make):
            assert len(list(loss.parameters())) == 1


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_contrast_gives_zero_and_bad_input_is_refused(name):
    loss, x = getattr(ours, name)(), normal(4, 3, 1).float().requires_grad_()
    for y in (torch.zeros(4), torch.arange(4)):
        value = loss(x, y.long())
        assert value == 0 and torch.equal(*torch.autograd.grad(value, x), torch.zeros_like(x))
    one = torch.tensor([0])
    for pairs in ((one, one + 1, one, one + 2), (one, one + 1, one[:0], one[:0])):
        assert loss(x, None, pairs) == 0
    with pytest.raises(ValueError, match="cannot both be None"):
        loss(x)
    with pytest.raises(ValueError, match="Number of embeddings"):
        loss(x, torch.arange(3))
    if name == "SupConLoss":
        both = torch.tensor([0, 1]), torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([3, 2])
        for kind in (losses.SupConLoss, ours.SupConLoss):
            with pytest.raises(AssertionError, match="either be positive or negative"):
                kind()(x, torch.arange(4), both)


def test_well_separated_classes_keep_the_digits_of_their_loss():
    """Positives equal, negatives orthogonal: loss = log(1 + 30 e^(−1/τ)), 3e-8 here; in float32 the original's is 0."""
    x, y = torch.eye(16, 20).repeat(2, 1), torch.arange(16).repeat(2)
    expected = torch.log1p(30 * torch.exp(torch.tensor(-1 / 0.048, dtype=torch.float64)))
    for name, pairs in itertools.product(NAMES, (None, lmu.get_all_pairs_indices(y))):
        assert relative_error(getattr(ours, name)(temperature=0.048)(x, y, pairs), expected) < 1e-5
    assert losses.SupConLoss(temperature=0.048)(x, y) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_as_good_as_float32_logits(name, dtype):
    x, y = normal(37, 24, 1).to(dtype), classes(37, 6, 1)

    def evaluate(loss, of):
        leaf = x.clone().requires_grad_()
        value = loss(leaf.to(of), y)
        return value.detach(), *torch.autograd.grad(value, leaf)

    truth_leaf = x.double().requires_grad_()
    truth = getattr(losses, name)()(truth_leaf, y)
    truths = truth.detach(), *torch.autograd.grad(truth, truth_leaf)
    naive = evaluate(getattr(losses, name)(), torch.float32)
    plain = evaluate(getattr(ours, name)(), dtype)
    with torch.autocast("cpu", torch.bfloat16):
        cast = evaluate(getattr(ours, name)(), dtype)
    for results in (plain, cast):
        assert results[0].dtype == torch.float32 and results[1].dtype == dtype
        for actual, expected, dense in zip(results, truths, naive, strict=True):
            assert_as_good_as(actual, expected, dense)


# --------------------------------------------------------------------------------------------------------------- pairs


def listed(rows: int, keys: int, number: int, seed: int) -> tuple[Tensor, ...]:
    """Random pairs, some twice; positives are those whose sum is even."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        torch.randint(0, rows, (number,), generator=generator),
        torch.randint(0, keys, (number,), generator=generator),
    )
    even = (a + b) % 2 == 0
    return a[even], b[even], a[~even], b[~even]


@pytest.mark.parametrize("name", NAMES)
def test_listed_pairs_and_triplets(name):
    for seed, (rows, keys, number) in enumerate([(2, 2, 8), (7, 7, 20), (7, 3, 60), (13, 29, 40), (5, 31, 400)]):
        x, ref, y = normal(rows, 5, seed), normal(keys, 5, seed + 50), classes(rows, 3, seed)
        pairs = listed(rows, keys, number, seed)
        for loss in assert_same(name, lambda loss, x, ref, p=pairs: loss(x, None, p, ref), x, ref):
            assert loss.last_fallback is None
        if rows == keys:
            assert_same(name, lambda loss, x, y=y, p=pairs: loss(x, y.float(), p), x)
    for miner in (miners.TripletMarginMiner(0.4), miners.MultiSimilarityMiner(0.3)):
        y = classes(24, 5, 9)
        pairs = miner(normal(24, 6, 9), y)
        assert len(pairs[0]) > 5
        assert_same(name, lambda loss, x, y=y, p=pairs: loss(x, y, p), normal(24, 6, 9))


@pytest.mark.parametrize("name", NAMES)
def test_all_negatives_listed_are_swept_and_any_fewer_gathered(name):
    y, ref_y = classes(17, 4, 1), classes(23, 5, 2)
    a, p, a2, n = lmu.get_all_pairs_indices(y, ref_y)
    turned = torch.arange(len(n)).roll(1)
    twice = torch.cat([torch.tensor([0]), torch.arange(len(n) - 1)])
    for pairs, swept in (
        ((a, p, a2, n), True),
        ((a[3:], p[3:], a2, n), True),
        ((a, p, a2[1:], n[1:]), False),
        ((a, p, a2[twice], n[twice]), False),
        ((a, p, a2[turned], n[turned]), name == "SupConLoss"),  # which sorts them
    ):
        with trace() as ran:
            assert_same(
                name,
                lambda loss, x, ref, pairs=pairs: loss(x, y, pairs, ref, ref_y),
                normal(17, 8, 1),
                normal(23, 8, 2),
            )
        assert [choice.op for choice in ran] == ["similarity_lse"] * 2 * swept


# ------------------------------------------------------------------------------------------ reducers, records, wrappers

REDUCERS = {
    "threshold": lambda: {"reducer": reducers.ThresholdReducer(low=0.5, high=2.5)},
    "anchor": lambda: {"reducer": reducers.PerAnchorReducer(reducers.AvgNonZeroReducer())},
    "weighted": lambda: {"reducer": reducers.ClassWeightedReducer(torch.tensor([0.5, 1.0, 2.0, 0.1]))},
    "regularized": lambda: {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.3},
    "regularized, threshold": lambda: {
        "reducer": reducers.ThresholdReducer(low=1.0),
        "embedding_regularizer": regularizers.LpRegularizer(p=1),
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_reducers_and_regularizers_get_what_they_got(name):
    y = classes(21, 4, 5)
    for settings in REDUCERS.values():
        assert_same(name, lambda loss, x: loss(x, y), normal(21, 6, 5), make=lambda kind, s=settings: kind(**s()))
    given, expected = (
        getattr(module, name)(reducer=reducers.DoNothingReducer())(normal(21, 6, 5), y)["loss"]
        for module in (ours, losses)
    )
    assert given.keys() == expected.keys() and given["reduction_type"] == expected["reduction_type"]
    assert relative_error(given["losses"], expected["losses"]) < 1e-12
    pairs = [x["indices"] if isinstance(x["indices"], tuple) else (x["indices"],) for x in (given, expected)]
    assert all(torch.equal(*both) for both in zip(*pairs, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_collected(name):
    def statistics(module):
        distance = distances.CosineSimilarity(collect_stats=True)
        loss = getattr(module, name)(distance=distance, collect_stats=True)
        loss.reducer = type(loss.reducer)(collect_stats=True)
        loss(normal(12, 6, 1), classes(12, 3, 1), ref_emb=normal(9, 6, 2), ref_labels=classes(9, 3, 2))
        parts = (loss, distance, loss.reducer)
        return {name: getattr(x, name) for x in parts for name in getattr(x, "_record_these_stats", [])}

    found, expected = statistics(ours), statistics(losses)
    assert len(found) >= 5 and found == expected


@pytest.mark.parametrize("name", NAMES)
def test_wrappers_give_what_they_gave(name):
    x, ref, y = normal(11, 7, 1), normal(11, 7, 2), classes(11, 3, 1)
    for symmetric in (True, False):
        assert_same(
            name, lambda loss, x, ref, s=symmetric: losses.SelfSupervisedLoss(loss, symmetric=s)(x, ref), x, ref
        )

    def several(loss, x):
        both = losses.MultipleLosses([loss, losses.ContrastiveLoss()], weights=[1.0, 0.5])
        return both(x, y)

    assert_same(name, several, x)

    def memory(loss, x, ref, miner=None, mask=None):
        """Five batches through a memory of 17 rows, which the fourth fills and wraps."""
        wrapped = losses.CrossBatchMemory(loss, embedding_size=7, memory_size=17, miner=miner)
        total = 0.0
        for i in range(5):
            batch, labels = (x if i % 2 else ref)[: 4 + i % 2] * (1 + i), classes(4 + i % 2, 3, 60 + i)
            total = total + wrapped(batch, labels, enqueue_mask=None if mask is None else mask[: len(batch)])
        return total

    with trace() as ran:
        assert_same(name, memory, x, ref)
    assert len(ran) >= 8  # the sweep, not pairs one by one; the first batch may hold nothing to contrast
    mask = torch.tensor([True, False, True, False, False])
    assert_same(name, lambda loss, x, ref: memory(loss, x, ref, mask=mask), x, ref)
    assert_same(name, lambda loss, x, ref: memory(loss, x, ref, miner=miners.MultiSimilarityMiner(0.5)), x, ref)


def _distributed(seed: int) -> list:
    rank, results = torch.distributed.get_rank(), []
    for name, module, efficient in itertools.product(NAMES, (losses, ours), (False, True)):
        x = normal(6, 5, seed + rank).requires_grad_()
        wrapped = distributed.DistributedLossWrapper(getattr(module, name)(), efficient=efficient)
        with trace() as ran:
            value = wrapped(x, classes(6, 3, seed + rank))
        results.append((value.item(), *torch.autograd.grad(value, x), len(ran)))
    return results


def test_ranks_give_what_they_gave():
    for results in ranks.run(2, _distributed, 5):
        assert [result[2] for result in results] == [0, 0, 1, 1] * 2
        for i in (0, 1, 4, 5):
            (value, gradient, _), (expected, expected_gradient, _) = results[i + 2], results[i]
            assert value == pytest.approx(expected, rel=1e-12) and expected > 0
            assert relative_error(gradient, expected_gradient) < 1e-12


# ------------------------------------------------------------------------------------------------- fallback, and memory


class Shifted(distances.CosineSimilarity):
    def compute_mat(self, query_emb, ref_emb):
        return super().compute_mat(query_emb, ref_emb) - 0.1


@pytest.mark.parametrize("name", NAMES)
def test_what_has_no_fast_path_runs_the_original_and_says_so(name):
    x, y = normal(12, 5, 1), classes(12, 4, 1)
    for settings, labels, reason in (
        ({"distance": distances.LpDistance()}, y, "LpDistance is not a dot product"),
        ({"distance": Shifted()}, y, "Shifted is not a dot product"),
        ({"distance": distances.CosineSimilarity(power=2)}, y, "CosineSimilarity has power 2"),
        ({}, y.double(), "labels are float64"),
    ):
        loss, original = getattr(ours, name)(**settings), getattr(losses, name)(**settings)
        with trace() as ran:
            assert torch.equal(loss(x, labels), original(x, labels))
        assert loss.last_fallback == reason and not ran
        loss.distance = distances.CosineSimilarity()
        loss(x, y)
        assert loss.last_fallback is None


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_rows_times_rows_is_formed(name):
    """Of 1,500 pairs the original NTXentLoss would form several times 3,000 · 3,000 · 2,998 numbers: 100 GiB each."""
    x, ref = (normal(1500, 8, seed).float().requires_grad_() for seed in (1, 2))
    fastcontrast.set_workspace(0)
    try:
        for symmetric in (True, False):
            with Largest() as largest:
                losses.SelfSupervisedLoss(getattr(ours, name)(), symmetric=symmetric)(x, ref).backward()
            assert largest.elements <= 3000 * 3000 / 4  # a tile
    finally:
        fastcontrast.set_workspace(None)
