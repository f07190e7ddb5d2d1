"""open_clip's losses and these in their place: values, gradients, and what open_clip's own training makes of them."""

import importlib
import importlib.util
import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from fastcontrast.ops import trace
from fastcontrast.testing import assert_as_good_as, ranks, relative_error

if importlib.util.find_spec("open_clip") is None:
    pytest.skip("open_clip is not installed", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")


def modules() -> tuple[ModuleType, ModuleType]:
    return importlib.import_module("open_clip.loss"), importlib.import_module("fastcontrast.integrations.open_clip")


def modules_on_a_rank() -> tuple[ModuleType, ModuleType]:
    """Without open_clip's models, whose import would take each of these processes seconds."""
    package = ModuleType("open_clip")
    package.__path__ = list(importlib.util.find_spec("open_clip").submodule_search_locations)
    sys.modules["open_clip"] = package
    warnings.filterwarnings("ignore", r"`?torch\.distributed\..*\.all_.* deprecated", FutureWarning)  # its gathering
    return modules()


# Arguments by name; what `**model_out` brings each loss.
ARGUMENTS = {
    "ClipLoss": ("image_features", "text_features", "logit_scale"),
    "ClipLoss, bias": ("image_features", "text_features", "logit_scale", "logit_bias"),
    "SigLipLoss": ("image_features", "text_features", "logit_scale", "logit_bias"),
    "CoCaLoss": ("image_features", "text_features", "logits", "labels", "logit_scale"),
    "DistillClipLoss": (
        "image_features", "text_features", "logit_scale",
        "dist_image_features", "dist_text_features", "dist_logit_scale",
    ),
}  # fmt: skip
CONSTRUCTOR = {"CoCaLoss": {"caption_loss_weight": 2.0, "clip_loss_weight": 0.7}}
LEAVES = ("image_features", "text_features", "logit_scale", "logit_bias", "logits")


def batch(n: int, d: int, dtype=torch.float32, seed: int = 0, scale: float = 20.0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    image, text, *teacher = (F.normalize(torch.randn(n, w), dim=-1) for w in (d, d, d + 3, d + 3))
    text = F.normalize(text + image, dim=-1)
    inputs = {
        "image_features": image.to(dtype), "text_features": text.to(dtype), "logit_scale": torch.tensor(scale),
        "logit_bias": torch.tensor(-7.0), "logits": torch.randn(n, 3, 5), "labels": torch.randint(5, (n, 3)),
        "dist_image_features": teacher[0].to(dtype), "dist_text_features": teacher[1].to(dtype),
        "dist_logit_scale": torch.tensor(30.0),
    }  # fmt: skip
    return inputs


def build(module: ModuleType, name: str, **settings) -> torch.nn.Module:
    name = name.split(",")[0]
    return getattr(module, name)(**CONSTRUCTOR.get(name, {}), **settings)


def evaluate(loss, name: str, inputs: dict, dtype=None) -> dict[str, torch.Tensor]:
    """Terms of the loss and gradients of Σ weight · term by name; `dtype`: of features and scalars, default theirs."""
    leaves = {}
    for key in ARGUMENTS[name]:
        x = inputs[key].detach()
        leaves[key] = x.to(dtype or x.dtype) if x.is_floating_point() else x
        leaves[key].requires_grad_(key in LEAVES)
    terms = loss(**leaves, output_dict=True)
    sum(x * weight for x, weight in zip(terms.values(), (2.5, 0.5), strict=False) if x.requires_grad).backward()
    return {key: x.detach() for key, x in terms.items()} | {k: x.grad for k, x in leaves.items() if k in LEAVES}


def assert_equal(actual: dict, expected: dict, tolerance: float = 1e-5, where: object = "") -> None:
    assert actual.keys() == expected.keys()
    for key, truth in expected.items():
        if truth is None or (key == "logit_bias" and "SigLipLoss" not in str(where)):  # it cancels
            assert (actual[key] is None) == (truth is None), (where, key)
            assert truth is None or (float(actual[key]) == 0.0 and abs(float(truth)) < 1e-6), (where, key)
        else:
            assert actual[key].shape == truth.shape, (where, key)
            error = relative_error(actual[key], truth)
            assert error <= tolerance, f"{where}, {key}: {error}"


def assert_same(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    assert all(x is expected[key] or torch.equal(x, expected[key]) for key, x in actual.items())


# -------------------------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("name", ARGUMENTS)
def test_values_and_gradients_are_open_clips(name):
    theirs, ours = modules()
    for n, d, scale in ((1, 1, 3.0), (2, 15, 100.0), (67, 13, 1.0), (129, 40, 20.0)):
        inputs = batch(n, d, seed=n, scale=scale)
        truth = evaluate(build(theirs, name), name, inputs, torch.float64)
        assert_equal(evaluate(build(ours, name), name, inputs), truth, where=(name, n, d))
        inputs = {k: x.reshape(1) if x.ndim == 0 else x for k, x in inputs.items()}  # as FSDP has scalars
        truth = {k: x.reshape(1) if x is not None and k.startswith("logit_") else x for k, x in truth.items()}
        assert_equal(evaluate(build(ours, name), name, inputs), truth, where=(name, n, d))
    loss, terms = build(ours, name), {key: inputs[key] for key in ARGUMENTS[name]}
    expected = list(loss(**terms, output_dict=True).values())
    with trace() as ran, torch.no_grad():
        found = loss(*terms.values())
    found = list(found) if isinstance(found, tuple) else [found]
    assert list(map(float, found)) == list(map(float, expected))
    assert ran and {"open_clip"}.isdisjoint(choice.implementation for choice in ran)
    assert isinstance(loss, getattr(theirs, type(loss).__name__))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_half_precision_and_autocast(name):
    """The error is that of the features' rounding; inside autocast open_clip's own is larger, its logits are half."""
    theirs, ours = modules()
    for dtype in (torch.bfloat16, torch.float16):
        inputs = batch(67, 24, dtype)
        truth = evaluate(build(theirs, name), name, inputs, torch.float64)
        wide = {k: x.float() if x.is_floating_point() else x for k, x in inputs.items()}
        dense = evaluate(build(theirs, name), name, wide)
        plain = evaluate(build(ours, name), name, inputs)
        with torch.autocast("cpu", dtype=dtype):
            inside = evaluate(build(ours, name), name, inputs)
        for key, x in plain.items():
            if key in ("logits", "caption_loss", "logit_bias") and "SigLip" not in name:
                continue  # open_clip's own part, and a gradient of 0
            # The gradient of the scale is a difference of mean cosines.
            rounded, magnitude = dense[key].to(x.dtype), float(key == "logit_scale")
            for found in (x, inside[key]):
                assert_as_good_as(found, truth[key], rounded, magnitude=magnitude)


def test_coca_without_its_contrastive_term():
    theirs, ours = modules()
    inputs = {key: batch(5, 4)[key] for key in ARGUMENTS["CoCaLoss"]}
    found, expected = (module.CoCaLoss(2.0, 0, pad_id=1)(**inputs, output_dict=True) for module in (ours, theirs))
    assert found == expected
    assert found["contrastive_loss"].dtype == torch.int64


def test_newer_and_older_arguments_are_taken():
    _, ours = modules()
    for loss in (ours.ClipLoss(use_horovod=True), ours.DistillClipLoss(True, False, True, 2, 3, True)):
        assert loss.use_horovod
    assert (loss.local_loss, loss.cache_labels, loss.rank, loss.world_size) == (True, True, 2, 3)
    coca = ours.CoCaLoss(1.0, 2.0, 3, True, True, False, 1, 2, use_horovod=False)
    assert (coca.caption_loss_weight, coca.clip_loss_weight, coca.caption_loss.ignore_index) == (1.0, 2.0, 3)
    assert (coca.gather_with_grad, coca.rank, coca.world_size, coca.use_horovod) == (True, 1, 2, False)
    siglip = ours.SigLipLoss(dist_impl="gather", chunk_size=16)
    assert (siglip.dist_impl, siglip.chunk_size) == ("gather", 16)
    with pytest.raises(ValueError, match=r"ClipLoss: rank and world_size must be .*, 0 and 1, got 1 and 2"):
        ours.ClipLoss(rank=1, world_size=2, gather_with_grad=True)(torch.eye(3), torch.eye(3), torch.tensor(1.0))


# ------------------------------------------------------------------------------------------------- subclasses of users


def _louder(logits):
    return tuple(x * 1.1 for x in logits) if isinstance(logits, tuple) else logits * 1.1


def _louder_class(base):
    class Louder(base):
        def get_logits(self, *args, **kwargs):
            return _louder(super().get_logits(*args, **kwargs))

    return Louder


def _shifted_class(base):
    class Shifted(base):
        def get_ground_truth(self, *args, **kwargs):
            return super().get_ground_truth(*args, **kwargs).flip(0)

    return Shifted


def _hard_teacher_class(base):
    class HardTeacher(base):
        def dist_loss(self, teacher_logits, student_logits):
            return super().dist_loss(10 * teacher_logits, student_logits)

    return HardTeacher


@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_a_subclass_overrides_is_called(name):
    theirs, ours = modules()
    inputs, cls = batch(9, 6), name.split(",")[0]
    makers = {"get_logits": _louder_class, "get_ground_truth": _shifted_class}
    if cls == "DistillClipLoss":
        makers["dist_loss"] = _hard_teacher_class
    plain = evaluate(build(ours, name), name, inputs)
    for method, make in makers.items():
        overriding, original = (make(getattr(x, cls))(**CONSTRUCTOR.get(cls, {})) for x in (ours, theirs))
        with trace() as ran:
            found = evaluate(overriding, name, inputs)
        assert_same(found, evaluate(original, name, inputs))
        assert any(x is not None and not torch.allclose(x, plain[key]) for key, x in found.items())
        said = ran[0].implementation, ran[0].refused["fastcontrast"]
        assert said == ("open_clip", f"{type(overriding).__name__} has a {method} of its own")
    for loss in (patched := build(ours, name), original := build(theirs, name)):
        loss.get_logits = lambda *args, get=loss.get_logits, **kwargs: _louder(get(*args, **kwargs))
    assert_same(evaluate(patched, name, inputs), evaluate(original, name, inputs))


def test_what_no_sweep_computes_is_open_clips():
    theirs, ours = modules()
    image, text = (batch(6, 4)[key] for key in ("image_features", "text_features"))
    for scale, bias in ((torch.rand(6, 1), None), (torch.tensor(3.0), torch.rand(6))):
        with trace() as ran:
            found = ours.ClipLoss()(image, text, scale, bias)
        assert torch.equal(found, theirs.ClipLoss()(image, text, scale, bias))
        assert "not by one number" in ran[0].refused["fastcontrast"]
    teacher = [x.clone().requires_grad_() for x in (image, text)]
    with trace() as ran:
        ours.DistillClipLoss()(image, text, 3.0, *teacher, 4.0)[1].backward()
    assert ran[0].refused == {"fastcontrast": "the teacher requires a gradient"}
    assert teacher[0].grad.abs().sum() > 0


# ----------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize("name", ["ClipLoss, bias", "SigLipLoss", "DistillClipLoss"])
def test_it_compiles_into_one_graph(name):
    theirs, ours = modules()
    compiled = torch.compile(build(ours, name), fullgraph=True, backend="aot_eager")
    inputs = batch(21, 8)
    truth = evaluate(build(theirs, name), name, inputs, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # open_clip's forward would give an error of 2e-3
        assert_equal(evaluate(compiled, name, inputs), truth, where=name)


def test_a_loss_asked_for_again_is_computed_once():
    """As open_clip's loop asks for every chunk with --accum-freq."""
    theirs, ours = modules()
    for dtype in (torch.float32, torch.bfloat16):
        inputs = batch(12, 6, dtype)
        truth = evaluate(theirs.ClipLoss(), "ClipLoss", inputs, torch.float64)
        fresh = evaluate(ours.ClipLoss(), "ClipLoss", inputs)
        loss = ours.ClipLoss()
        loss.reuse = True
        with trace() as ran:
            for _ in range(4):
                found = evaluate(loss, "ClipLoss", inputs)
                if dtype == torch.float32:
                    assert_equal(found, truth)
                for name, x in fresh.items():
                    torch.testing.assert_close(found[name], x, rtol=1e-2 if x.dtype == dtype else 1e-5, atol=1e-6)
            assert len(ran) == 1
            for name in ("image_features", "text_features", "logit_scale"):
                changed = {**inputs, name: inputs[name] * 1.01}
                evaluated = evaluate(ours.ClipLoss(), "ClipLoss", changed)
                again = evaluate(loss, "ClipLoss", changed)
                assert relative_error(again["contrastive_loss"], evaluated["contrastive_loss"]) < 1e-5
            assert len(ran) == 1 + 2 * 3
        with torch.no_grad():
            assert torch.equal(loss(*(changed[x] for x in ARGUMENTS["ClipLoss"])), again["contrastive_loss"])


# -------------------------------------------------------------------------------------------------------------- ranks

N = 5


def _asked_again():
    """One rank finds other features: all must compute."""
    _, ours = modules_on_a_rank()
    rank, found = dist.get_rank(), []
    modes = {"gather_with_grad": True, "local_loss": True, "rank": rank, "world_size": 2}
    loss = ours.ClipLoss(**modes)
    loss.reuse = True
    for step in (0, 0, 1):
        inputs = batch(N, 7, seed=rank + (step if rank else 0))
        with trace() as ran:
            again = evaluate(loss, "ClipLoss", inputs)
        alone = evaluate(
            ours.ClipLoss(gather_with_grad=True, local_loss=True, rank=rank, world_size=2), "ClipLoss", inputs
        )
        assert_equal(again, alone)
        found.append(len(ran))
    return found


def test_ranks_agree_on_what_is_asked_again():
    assert ranks.run(2, _asked_again) == [[1, 0, 1]] * 2


MODES = [{"local_loss": local, "gather_with_grad": grad} for local in (False, True) for grad in (False, True)]
ROUTES = [{"dist_impl": impl} for impl in ("bidir", "shift", "reduce", "gather")]


def _on_a_rank(names):
    """Of each loss and mode, here and of open_clip in float64."""
    theirs, ours = modules_on_a_rank()
    place, results = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}, []
    inputs = batch(N, 7, seed=dist.get_rank())
    for name in names:
        for settings in ROUTES if name == "SigLipLoss" else MODES:
            truth = evaluate(build(theirs, name, **settings, **place), name, inputs, torch.float64)
            for how in ("gather", "ring") if name == "ClipLoss, bias" else ("gather",):
                loss = build(ours, name, **settings, **place)
                loss.exchange, loss.equal = how, how == "ring"
                results.append(((name, settings, how), evaluate(loss, name, inputs), truth))
    return results


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_mode_on_ranks(world):
    names = [name for name in ARGUMENTS if name != "ClipLoss"]
    for case in zip(*ranks.run(world, _on_a_rank, names), strict=True):
        where, truths = case[0][0], [truth for _, _, truth in case]
        if where[1] == {"local_loss": True, "gather_with_grad": True}:  # the ranks' mean, which DDP makes of either
            mean = torch.stack([truth["logit_scale"] for truth in truths]).mean()
            truths = [{**truth, "logit_scale": mean} for truth in truths]
        for rank, ((_, found, _), truth) in enumerate(zip(case, truths, strict=True)):
            assert_equal(found, truth, where=(*where, rank))


def _unequal(sizes, how):
    _, ours = modules_on_a_rank()
    rank, results = dist.get_rank(), []
    for settings in MODES:
        if settings == {"local_loss": True, "gather_with_grad": False}:
            continue  # open_clip's gather, of equal shards
        loss = ours.ClipLoss(**settings, rank=rank, world_size=len(sizes))
        loss.exchange = how
        inputs = batch(sum(sizes), 7)
        for name in ("image_features", "text_features"):
            inputs[name] = inputs[name].split(sizes)[rank]
        results.append((settings, evaluate(loss, "ClipLoss", inputs)))
    return results


@pytest.mark.parametrize("how", ["gather", "ring"])
def test_ranks_may_hold_different_numbers_of_rows(how):
    sizes = [3, 5, 1]
    owners = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    for case in zip(*ranks.run(3, _unequal, sizes, how), strict=True):
        leaves = [batch(9, 7)[name].double().requires_grad_() for name in ARGUMENTS["ClipLoss"]]
        logits, own = leaves[2] * leaves[0] @ leaves[1].t(), torch.arange(9)
        each = (F.cross_entropy(logits, own, reduction="none") + F.cross_entropy(logits.t(), own, reduction="none")) / 2
        local = case[0][0]["local_loss"]
        values = [each[owners == rank].mean() if local else each.mean() for rank in range(3)]
        # evaluate() weighs the loss by 2.5; without gather_with_grad features have one of the W equal shares
        gradients = list(torch.autograd.grad(2.5 * sum(values), leaves))
        gradients[2] = gradients[2] / 3
        if not case[0][0]["gather_with_grad"]:
            gradients[:2] = (x / 3 for x in gradients[:2])
        for rank, (settings, found) in enumerate(case):
            rows = (x.split(sizes)[rank] for x in gradients[:2])
            truth = dict(zip(ARGUMENTS["ClipLoss"], (*rows, gradients[2]), strict=True))
            truth = {"contrastive_loss": values[rank].detach(), **truth}
            assert_equal(found, truth, where=(settings, how, rank))


def _compiled_on_a_rank():
    theirs, ours = modules_on_a_rank()
    place, inputs = {"rank": dist.get_rank(), "world_size": 2}, batch(N, 7, seed=dist.get_rank())
    for settings in MODES[::2]:  # with gradients gathered only newer open_clips make one graph
        loss = torch.compile(ours.ClipLoss(**settings, **place), fullgraph=True, backend="eager")
        truth = evaluate(theirs.ClipLoss(**settings, **place), "ClipLoss", inputs, torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_equal(evaluate(loss, "ClipLoss", inputs), truth, where=settings)
    warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor", UserWarning)  # between graphs, dynamo asks
    loss = torch.compile(ours.ClipLoss(**MODES[1], **place), backend="eager")
    truth = evaluate(theirs.ClipLoss(**MODES[1], **place), "ClipLoss", inputs, torch.float64)
    assert_equal(evaluate(loss, "ClipLoss", inputs), truth, where=MODES[1])


def test_it_compiles_on_ranks_where_open_clip_does():
    ranks.run(2, _compiled_on_a_rank)


# ------------------------------------------------------------------------------------------------- open_clip's training

VISION = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 4, "image_size": 8}
TEXT = {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
CASES = {
    "clip": {},
    "clip, accumulated": {"accum_freq": 2},
    "clip, accumulated, reused": {"accum_freq": 2, "reuse": True},
    "clip, bfloat16": {"precision": "amp_bf16"},
    "clip, scaled gradients": {"scaler": True},
    "siglip, accumulated": {"siglip": True, "accum_freq": 2},
    "coca": {"model": "coca_tiny"},
    "coca, captions alone": {"model": "coca_tiny", "coca_contrastive_loss_weight": 0},
    "distill": {"distill": True},
}
DEFAULTS = {
    "accum_freq": 1, "precision": "fp32", "siglip": False, "distill": False, "model": "tiny", "scaler": False,
    "coca_caption_loss_weight": 2.0, "coca_contrastive_loss_weight": 1.0, "local_loss": False, "device": "cpu",
    "gather_with_grad": False, "rank": 0, "world_size": 1, "horovod": False, "loss_dist_impl": None, "local_rank": 0,
    "skip_scheduler": True, "grad_clip_norm": None, "log_every_n_steps": 1, "batch_size": 7, "wandb": False,
    "log_local": False, "distributed": False, "reuse": False,
}  # fmt: skip


def _model(args, seed: int):
    from open_clip.coca_model import CoCa
    from open_clip.model import CLIP

    torch.manual_seed(seed)
    if args.model.startswith("coca"):
        pooled = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4, "output_tokens": True}
        model = CoCa(16, TEXT, {**TEXT, "embed_cls": True, "output_tokens": True}, {**VISION, **pooled})
        torch.nn.init.normal_(model.text_decoder.text_projection)  # uninitialised memory, as of 3.3.0
        return model
    return CLIP(8, VISION, TEXT, init_logit_bias=-5.0 if args.siglip else None, output_dict=True)


def _weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([x.detach().flatten() for x in model.parameters()])


def _train(args) -> tuple[torch.Tensor, torch.nn.Module]:
    """What two steps of open_clip's own loop change, with the loss that its factory makes."""
    from open_clip.factory import create_loss
    from open_clip_train.train import train_one_epoch

    model, teacher = _model(args, 0), _model(args, 1)
    generator = torch.Generator().manual_seed(2)
    batches = [
        (torch.randn(7, 3, 8, 8, generator=generator), torch.randint(1, 20, (7, 6), generator=generator))
        for _ in range(2 * args.accum_freq)
    ]
    loader = type("Loader", (list,), {"num_batches": len(batches), "num_samples": 7 * len(batches)})(batches)
    data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu") if args.scaler else None
    loss = create_loss(args)
    train_one_epoch(model, data, loss, 0, optimizer, scaler, None, teacher if args.distill else None, args)
    return _weights(model) - _weights(_model(args, 0)), loss


@pytest.mark.parametrize("case", CASES)
def test_open_clips_training_ends_at_the_same_weights(case, monkeypatch):
    _, ours = modules()
    factory = importlib.import_module("open_clip.factory")
    args = SimpleNamespace(**{**DEFAULTS, **CASES[case]})
    expected, original = _train(args)
    for name in ("ClipLoss", "SigLipLoss", "CoCaLoss", "DistillClipLoss"):
        monkeypatch.setattr(factory, name, getattr(ours, name))
    monkeypatch.setattr(ours.ClipLoss, "reuse", args.reuse)
    with trace() as ran:
        found, loss = _train(args)
    assert type(loss) is getattr(ours, type(original).__name__)
    assert bool(ran) == (case != "coca, captions alone")
    if case.startswith("clip, accumulated"):
        assert len(ran) == (2 if args.reuse else 4), "of 2 steps, of which each asks 2 times"
    assert "open_clip" not in {choice.implementation for choice in ran}
    assert found.norm() > 0.01
    if args.precision == "fp32":
        assert relative_error(found, expected) < 1e-4
    else:  # nearer to open_clip's than open_clip's is to its own in float32: the towers round too
        exact, _ = _train(SimpleNamespace(**{**vars(args), "precision": "fp32"}))
        assert (found - expected).norm() < (exact - expected).norm()
