"""transformers' CLIP and SigLIP, patched and not: the same losses and gradients, without a matrix of logits."""

import copy
import inspect
import pickle
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from fastcontrast._torchvision import declare_torchvision_operators

declare_torchvision_operators()  # here too: ranks import this module, and no conftest
transformers = pytest.importorskip("transformers")

import fastcontrast.integrations.transformers as package  # noqa: E402
from fastcontrast.distributed import Shards  # noqa: E402
from fastcontrast.integrations.transformers import (  # noqa: E402
    patch_clip,
    patch_siglip,
    unpatch_clip,
    unpatch_siglip,
)
from fastcontrast.ops import _workspace, trace  # noqa: E402
from fastcontrast.testing import ranks  # noqa: E402

OLD = transformers.__version__ < "5"
TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20,
    "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 19, "pad_token_id": 1,
}  # fmt: skip
VISION = {
    "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
PROJECTED = {"projection_dim": 10, "logit_scale_init_value": 2.0}
SHARED = {"projection_size": 12, "hidden_size": 12}  # SigLIP's towers meet without projections
TYPES = {"type_vocab_size": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

CASES = {
    "CLIP": (patch_clip, TEXT, VISION, PROJECTED),
    "MetaClip2": (patch_clip, TEXT, VISION, PROJECTED),
    "AltCLIP": (patch_clip, {**TEXT, **TYPES, "project_dim": 10, "max_position_embeddings": 12}, VISION, PROJECTED),
    "ChineseCLIP": (patch_clip, {**TEXT, **TYPES}, VISION, PROJECTED),
    "Siglip": (patch_siglip, {**TEXT, **SHARED}, VISION, {}),
    "Siglip2": (patch_siglip, {**TEXT, **SHARED}, {**VISION, "num_patches": 4}, {}),
}
if OLD:
    del CASES["AltCLIP"], CASES["ChineseCLIP"], CASES["Siglip2"]
UNPATCH = {patch_clip: unpatch_clip, patch_siglip: unpatch_siglip}

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def _original(case, **changes):
    _, text, vision, whole = CASES[case]
    config = getattr(transformers, f"{case}Config")(
        text_config={**text, **changes}, vision_config={**vision, **changes}, **whole
    )
    torch.manual_seed(1)
    model = getattr(transformers, f"{case}Model")(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not name.startswith("logit"):
                weight.normal_(std=0.8)  # embeddings far apart: their rounding then leaves small gradients their digits
        model.logit_scale.fill_(2.0)
        if "Siglip" in case:
            model.logit_bias.fill_(-3.0)
    return model.train()


def original(case, **changes):
    return copy.deepcopy(_original(case, **changes))


def patch(case, model, **settings):
    return CASES[case][0](model, **settings)


def unpatch(case, model):
    return UNPATCH[CASES[case][0]](model)


def inputs(case, n, dtype=torch.float32, seed=2):
    torch.manual_seed(seed)
    words = torch.randint(2, 19, (n, 6))
    words[:, -1] = 19
    given = {"input_ids": words, "attention_mask": (torch.rand(n, 6) < 0.8).long()}
    given["attention_mask"][:, 0] = given["attention_mask"][:, -1] = 1
    if case == "Siglip2":
        return given | {
            "pixel_values": torch.randn(n, 4, 48, dtype=dtype),
            "pixel_attention_mask": torch.ones(n, 4, dtype=torch.long), "spatial_shapes": torch.full((n, 2), 2),
        }  # fmt: skip
    return given | {"pixel_values": torch.randn(n, 3, 8, 8, dtype=dtype)}


def step(model, given, **options):
    """The output, and gradients of all parameters by name."""
    model.zero_grad()
    out = model(**given, return_loss=True, **options)
    (out[0] * 1.7).backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(ours, theirs, tolerance, like=None):
    error = (ours.double() - theirs.double()).norm()
    assert error <= tolerance * (theirs.double().norm().clamp(min=1e-3) if like is None else like), error


def assert_same_step(ours, theirs, tolerance):
    """Errors as shares of the whole gradient: that of a key's bias is nothing but rounding, for softmax ignores it."""
    (out, found), (their_out, wanted) = ours, theirs
    assert_close(out.loss, their_out.loss, tolerance)
    assert list(found) == list(wanted) and {"logit_scale"} < {*wanted}
    whole = torch.stack([gradient.double().norm() for gradient in wanted.values()]).norm().clamp(min=0.01)
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, tolerance, whole)


def parts(model, out):
    """What the loss is made of: embeddings, log of the scale, and SigLIP's bias."""
    return [
        out.text_embeds,
        out.image_embeds,
        model.logit_scale,
        *(x for x in [getattr(model, "logit_bias", None)] if x is not None),
    ]


def dense(text, image, scale, bias=None):
    """The equations of both models, with all logits."""
    logits = text @ image.T * scale.exp()
    if bias is not None:
        signs = 2 * torch.eye(len(text), dtype=logits.dtype) - 1
        return -F.logsigmoid(signs * (logits + bias)).sum(1).mean()
    rows = torch.arange(len(text))
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2


@pytest.mark.parametrize("n", [1, 13, 67])
@pytest.mark.parametrize("case", ["CLIP", "Siglip"])
def test_loss_of_embeddings(case, n):
    model = patch(case, original(case))
    out = model(**inputs(case, n), return_loss=True)
    ours = torch.autograd.grad(out.loss, parts(model, out))
    exact = [x.detach().double().requires_grad_() for x in parts(model, out)]
    truth = dense(*exact)
    assert_close(out.loss, truth, 1e-5)
    for mine, gradient in zip(ours, torch.autograd.grad(truth, exact), strict=True):
        assert_close(mine, gradient, 1e-5)


@pytest.mark.parametrize("n", [1, 13])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_stay(case, dtype, n):
    if OLD and case != "Siglip" and dtype == torch.float64:
        pytest.skip("transformers 4 makes no mask for CLIP's text model in float64")
    model, given = original(case).to(dtype), inputs(case, n, dtype)
    theirs = step(model, given)
    assert patch(case, model) is model
    with trace() as ran:
        ours = step(model, given)
    assert ran
    assert_same_step(ours, theirs, 1e-5 if dtype == torch.float32 else 1e-10)
    out, their_out = ours[0], theirs[0]
    assert type(out) is type(their_out)
    assert out.logits_per_text is None and out.logits_per_image is None
    torch.testing.assert_close(out.image_embeds, their_out.image_embeds)
    torch.testing.assert_close(out.text_embeds, their_out.text_embeds)
    for tower in ("text_model_output", "vision_model_output"):
        assert type(out[tower]) is type(their_out[tower]) and list(out[tower]) == list(their_out[tower])
        torch.testing.assert_close(out[tower].pooler_output, their_out[tower].pooler_output)
    again = step(unpatch(case, model), given)
    torch.testing.assert_close(again[0].loss, their_out.loss, rtol=0, atol=0)


@pytest.mark.parametrize("case", ["CLIP", "Siglip"])
def test_no_matrix_of_logits_is_kept(case, monkeypatch):
    monkeypatch.setattr(_workspace, "_chosen", 0)
    n, largest = 1100, []
    model, given = original(case), inputs(case, n)

    def pack(x):
        largest[-1] = max(largest[-1], x.numel())
        return x

    for _ in range(2):
        largest.append(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(**given, return_loss=True).loss.backward()
        patch(case, model)
    assert largest[0] == n * n and largest[1] < n * n / 4


@pytest.mark.parametrize("case", CASES)
def test_logits_are_there_where_they_are_read(case):
    model, given = original(case), inputs(case, 5)
    theirs = model.eval()(**given, return_loss=True)
    patch(case, model)
    for training, setting in ((False, None), (True, True), (False, True)):
        out = patch(case, model.train(training), return_logits=setting)(**given, return_loss=True)
        for name in ("loss", "logits_per_text", "logits_per_image"):
            torch.testing.assert_close(out[name], theirs[name])
        assert list(out) == list(theirs)
    for training, setting in ((True, None), (True, False), (False, False)):
        out = patch(case, model.train(training), return_logits=setting)(**given, return_loss=True)
        assert list(out) == [name for name in theirs if not name.startswith("logits")]


@pytest.mark.parametrize("case", CASES)
def test_calls_without_a_loss_tuples_and_positions(case):
    model, given = original(case), inputs(case, 5)
    names = list(inspect.signature(model.forward).parameters)
    by_position = [given.get(name) for name in names[: names.index("return_loss")]]
    theirs, tuples = model(**given, output_hidden_states=True), model(**given, return_dict=False)
    patch(case, model, return_logits=True)
    assert list(inspect.signature(model.forward).parameters) == names
    ours = model(**given, output_hidden_states=True)
    for name in ("logits_per_text", "logits_per_image"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)
    assert ours.loss is None
    with_loss = model(*by_position, True, output_hidden_states=True)
    assert ("hidden_states" in theirs.text_model_output) == (not OLD or case != "Siglip")
    for tower in ("text_model_output", "vision_model_output"):
        assert list(with_loss[tower]) == list(theirs[tower])
        states = (x[tower].get("hidden_states", ()) for x in (with_loss, theirs))
        for mine, yours in zip(*states, strict=True):
            torch.testing.assert_close(mine, yours, rtol=0, atol=0)
    for options, more in (({}, 0), ({"return_loss": True}, 1)):
        as_tuple = model(**given, return_dict=False, **options)
        assert isinstance(as_tuple, tuple) and len(as_tuple) == len(tuples) + more
        torch.testing.assert_close(as_tuple[more], tuples[0])
    model.config.return_dict = False
    assert isinstance(model(**given, return_loss=True), tuple)
    with pytest.raises(TypeError, match="multiple values"):
        model(given["input_ids"], input_ids=given["input_ids"], return_loss=True)


@pytest.mark.parametrize("case", ["CLIP", "Siglip"])
def test_a_patched_model_is_still_that_model(case, tmp_path):
    model, given = original(case), inputs(case, 5)
    theirs, names, hooked = type(model), list(model.state_dict()), []
    holder = torch.nn.ModuleDict({"inside": model})
    model.register_forward_hook(lambda *_: hooked.append(1))
    patch(case, patch(case, holder))
    assert list(model.state_dict()) == names
    assert isinstance(model, theirs) and type(model).__name__ == theirs.__name__
    expected = model(**given, return_loss=True)
    assert hooked == [1] and expected.logits_per_text is None
    model._forward_hooks.clear()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        out = twin(**given, return_loss=True)
        assert torch.equal(out.loss, expected.loss) and out.logits_per_text is None
    model.save_pretrained(tmp_path)
    for kind in (theirs, transformers.AutoModel, type(model)):
        loaded = kind.from_pretrained(tmp_path).train()
        assert type(loaded) is (type(model) if kind is type(model) else theirs)
        assert loaded.config.architectures == [theirs.__name__]
        torch.testing.assert_close(loaded(**given, return_loss=True).loss, expected.loss)
    unpatch(case, holder)
    assert type(model) is theirs and "_contrast" not in vars(model)
    assert unpatch(case, model) is model


def test_what_is_refused():
    model = original("CLIP")
    with pytest.raises(
        ValueError, match=r"patch_siglip: expected a model that is or holds one of Siglip.*got CLIPModel"
    ):
        patch_siglip(model)
    with pytest.raises(ValueError, match=r"patch_clip: exchange must be None or one of .*got 'star'"):
        patch_clip(model, exchange="star")
    given = inputs("CLIP", 5)
    given["pixel_values"] = given["pixel_values"][:4]
    for case in ("CLIP", "Siglip"):
        with pytest.raises(ValueError, match="Model: return_loss needs as many texts as images, got 4 images and 5"):
            patch(case, original(case))(**given, return_loss=True)
    assert patch_clip(original("CLIP"))(**given).logits_per_text.shape == (5, 4)
    model.forward = lambda **_: None
    with pytest.raises(ValueError, match="patch_clip: CLIPModel has a forward that was put on it"):
        patch_clip(model)
    assert not type(model).__module__.startswith("fastcontrast")


@pytest.mark.parametrize("case", ["CLIP", "Siglip"])
def test_dropout_draws_as_before_and_checkpointing(case):
    model, given = original(case, attention_dropout=0.5), inputs(case, 6)

    def run():
        torch.manual_seed(5)
        return step(model, given)

    theirs = run()
    patch(case, model)
    assert_same_step(run(), theirs, 1e-5)
    name = "activation_checkpointing_enable"  # of transformers 5
    getattr(model, name, model.gradient_checkpointing_enable)({"use_reentrant": False})
    assert_same_step(run(), theirs, 1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", ["CLIP", "Siglip"])
def test_half_precision(case, autocast):
    """The loss of given embeddings is that of float32 logits, where the original rounds them."""
    model, given = original(case), inputs(case, 37)
    if not autocast:
        model, given = model.bfloat16(), {**given, "pixel_values": given["pixel_values"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs = model(**given, return_loss=True)
        ours = patch(case, model)(**given, return_loss=True)
    assert torch.equal(ours.text_embeds, theirs.text_embeds)
    truth = dense(*(x.detach().double() for x in parts(model, ours)))
    assert ours.loss.dtype == torch.float32
    assert abs(ours.loss - truth) <= 1e-5 * abs(truth) < abs(theirs.loss - truth)


def test_asking_for_a_name_imports_its_module_alone(monkeypatch):
    asked = []

    def load(name):
        asked.append(name.removeprefix("fastcontrast.integrations.transformers."))
        return SimpleNamespace(patch_video=1, patch_clip=2)

    monkeypatch.setattr(package, "import_module", load)
    assert (package.patch_video, package.patch_clip) == (1, 2)
    assert asked == ["video", "clip"]
    assert {"patch_clip", "unpatch_siglip", "patch_video", "runs_patched"} < {*package.__all__}
    with pytest.raises(AttributeError, match="has no attribute 'patch_everything'"):
        _ = package.patch_everything


# -------------------------------------------------------------------------------------------------------------- ranks

SIZES = 3, 1, 4
RUNS = [("CLIP", "gather"), ("CLIP", "ring"), ("Siglip", "gather"), ("Siglip", "ring")]


def _steps():
    held = Shards(SIZES, dist.get_rank())
    found = []
    for case, how in RUNS:
        given = {name: x[held.slices[held.rank]] for name, x in inputs(case, held.total, torch.float64).items()}
        model = patch(case, original(case).double(), exchange=how)
        out, gradients = step(model, given)
        found.append((out.loss.detach(), gradients))
    return found


@pytest.mark.skipif(OLD, reason="what ranks do does not depend on it")
def test_negatives_of_all_ranks():
    """The loss of all pairs on every rank. The mean over ranks of gradients, as data parallelism takes it, the whole's.

    One run of all, for every rank imports transformers.
    """
    results = ranks.run(len(SIZES), _steps)
    for (case, _), found in zip(RUNS, zip(*results, strict=True), strict=True):
        out, wanted = step(original(case).double(), inputs(case, sum(SIZES), torch.float64))
        for loss, _ in found:
            torch.testing.assert_close(loss, out.loss.detach(), rtol=1e-10, atol=0)
        for name, gradient in wanted.items():
            mean = torch.stack([gradients[name] for _, gradients in found]).mean(0)
            torch.testing.assert_close(mean, gradient, rtol=1e-8, atol=1e-10)
