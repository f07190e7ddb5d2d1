"""transformers' own video models, patched and not: the same outputs and gradients, of weights that stay theirs."""

import copy
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers")

from copies import Copies  # noqa: E402

from fastcontrast.integrations.transformers import patch_video, runs_patched, unpatch_video  # noqa: E402
from fastcontrast.ops import trace  # noqa: E402

VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 8,
    "patch_size": 4, "num_frames": 3, "mit_hidden_size": 16, "mit_intermediate_size": 24, "mit_num_hidden_layers": 1,
    "mit_num_attention_heads": 2,
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20,
    "max_position_embeddings": 8,
}  # fmt: skip
TIMESFORMER = {
    "image_size": 8, "patch_size": 4, "num_frames": 3, "hidden_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 3, "intermediate_size": 32, "num_channels": 2,
}  # fmt: skip
VIVIT = {
    "image_size": 8, "num_frames": 4, "tubelet_size": [2, 4, 4], "num_channels": 2, "hidden_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32,
}  # fmt: skip
OLD = transformers.__version__ < "5"

pytestmark = pytest.mark.usefixtures("one_thread")


def shaken(model):
    """Weights large enough that attention is far from uniform, norms far from one."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.4)
    return model.eval()


def x_clip_vision(**changes):
    return shaken(transformers.XCLIPVisionModel(transformers.XCLIPVisionConfig(**{**VISION, **changes})))


def x_clip_whole():
    config = transformers.XCLIPConfig(
        text_config=TEXT, vision_config=VISION, projection_dim=16, prompt_layers=1, prompt_num_attention_heads=2,
        prompt_attention_dropout=0.0,
    )  # fmt: skip
    return shaken(transformers.XCLIPModel(config))


def timesformer(**changes):
    return shaken(transformers.TimesformerModel(transformers.TimesformerConfig(**{**TIMESFORMER, **changes})))


def vivit(**changes):
    return shaken(transformers.VivitModel(transformers.VivitConfig(**{**VIVIT, **changes})))


def timesformer_that_drops_paths():
    model = timesformer()
    for layer in layers(model):
        layer.drop_path = torch.nn.Dropout1d(0.5)  # of rows' channels: what matters is that it draws
    return model


def frames(*shape, dtype=torch.float32):
    torch.manual_seed(2)
    return torch.randn(*shape, dtype=dtype)


def last_hidden(model, pixels):
    return model(pixels).last_hidden_state


def logits(model, pixels):
    torch.manual_seed(3)
    return model(torch.randint(1, 20, (4, 5)), pixels).logits_per_video


CASES = {
    "x_clip_vision": (x_clip_vision, last_hidden, (6, 3, 8, 8), "temporal_attention", "frame_attention"),
    "x_clip": (x_clip_whole, logits, (2, 3, 3, 8, 8), "temporal_attention", "frame_attention"),
    "timesformer": (timesformer, last_hidden, (2, 3, 2, 8, 8), "temporal_attention", "frame_attention"),
    "timesformer_space": (
        lambda: timesformer(attention_type="space_only"), last_hidden, (2, 3, 2, 8, 8), "frame_attention",
    ),
    "timesformer_joint": (
        lambda: timesformer(attention_type="joint_space_time"), last_hidden, (2, 3, 2, 8, 8), "frame_attention",
    ),
    "vivit": (vivit, last_hidden, (2, 4, 2, 8, 8), "frame_attention"),
}  # fmt: skip
if OLD:
    del CASES["vivit"]
KINDS = [name for name in ("x_clip_vision", "timesformer", "vivit") if name in CASES]


def layers(model):
    names = "XCLIPVisionEncoderLayer", "TimesformerLayer", "VivitAttention"
    return [x for x in model.modules() if type(x).__name__ in names]


def tolerance(model, dtype):
    """X-CLIP's "eager" code, all that transformers 4 has, rounds the probabilities of float64 to float32."""
    rounds = model.config.model_type.startswith("x") and model.config._attn_implementation == "eager"
    return 2e-5 if dtype == torch.float32 else 1e-5 if rounds else 1e-10


def gradients(model, run, pixels):
    """The output, and gradients of pixels and of all parameters that have any."""
    pixels = pixels.clone().requires_grad_()
    out = run(model, pixels)
    weight = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    weights = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((out * weight).sum(), [pixels, *weights], allow_unused=True)
    return out, found


def assert_same(ours, theirs, share):
    for mine, yours in zip([ours[0], *ours[1]], [theirs[0], *theirs[1]], strict=True):
        assert (mine is None) == (yours is None)
        if mine is not None:
            high = max(1.0, yours.abs().max().item())
            torch.testing.assert_close(mine, yours, rtol=0, atol=share * high)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_stay(case, dtype, training):
    make, run, shape, *operations = CASES[case]
    if case == "x_clip" and dtype == torch.float64 and OLD:
        pytest.skip("transformers 4 makes no mask for its text model in float64")
    model = make().to(dtype).train(training)
    pixels = frames(*shape, dtype=dtype)
    theirs = gradients(model, run, pixels)
    assert patch_video(model) is model
    with trace() as ran:
        ours = gradients(model, run, pixels)
    assert {choice.op for choice in ran} == set(operations)
    assert_same(ours, theirs, tolerance(model, dtype))
    unpatch_video(model)
    with trace() as ran:
        again = gradients(model, run, pixels)
    assert ran == []
    assert_same(again, theirs, 0.0)


@pytest.mark.parametrize("case", ["x_clip", *KINDS[1:]])
def test_a_patched_model_is_still_that_model(case, tmp_path):
    make, run, shape, *_ = CASES[case]
    model, pixels = make(), frames(*shape)
    names, classes = list(model.state_dict()), [type(x).__name__ for x in model.modules()]
    before = [type(x) for x in model.modules()]
    hooked = []
    layer = layers(model)[0]
    layer.register_forward_hook(lambda *_: hooked.append(1))
    patch_video(patch_video(model))
    assert list(model.state_dict()) == names
    assert [type(x).__name__ for x in model.modules()] == classes
    expected = run(model, pixels)
    assert len(hooked) == 1
    layer._forward_hooks.clear()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with trace() as ran:
            torch.testing.assert_close(run(twin, pixels), expected, rtol=0, atol=0)
        assert ran
    unpatch_video(model)
    assert [type(x) for x in model.modules()] == before
    assert not any("patched" in vars(x) for x in model.modules())


@pytest.mark.parametrize("case", KINDS)
def test_weights_that_are_asked_for_come_from_the_original_code(case):
    make, _, shape, *_ = CASES[case]
    model, pixels = make(), frames(*shape)
    if case != "timesformer":
        model.set_attn_implementation("eager")
    theirs = model(pixels, output_attentions=True, output_hidden_states=True)
    patch_video(model)
    with trace() as ran:
        ours = model(pixels, output_attentions=True, output_hidden_states=True)
    assert ran == [] and not any(map(runs_patched, layers(model)))
    assert len(ours.attentions) == len(theirs.attentions) == 2
    for mine, yours in zip(ours.attentions, theirs.attentions, strict=True):
        torch.testing.assert_close(mine, yours, rtol=0, atol=0)
    states = model(pixels, output_hidden_states=True).hidden_states
    assert all(map(runs_patched, layers(model)))
    for mine, yours in zip(states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(mine, yours, rtol=0, atol=2e-4)


def test_weights_asked_for_by_the_configuration():
    model = x_clip_vision()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    theirs = model(frames(6, 3, 8, 8)).attentions
    ours = patch_video(model)(frames(6, 3, 8, 8)).attentions
    assert len(ours) == 2
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: x_clip_vision(attention_dropout=0.5), (6, 3, 8, 8)),
        (lambda: timesformer(attention_probs_dropout_prob=0.5), (2, 3, 2, 8, 8)),
        (lambda: timesformer(hidden_dropout_prob=0.5), (2, 3, 2, 8, 8)),
        (timesformer_that_drops_paths, (2, 3, 2, 8, 8)),
        *([] if OLD else [(lambda: vivit(attention_probs_dropout_prob=0.5), (2, 4, 2, 8, 8))]),
    ],
)
def test_dropout_in_training_is_the_original_draw(make, shape):
    model, pixels = make().train(), frames(*shape)

    def run():
        torch.manual_seed(5)
        return last_hidden(model, pixels)

    theirs = run()
    patch_video(model)
    ours = run()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    assert not any(map(runs_patched, layers(model)))
    model.eval()
    run()
    assert all(map(runs_patched, layers(model)))


def test_drop_path_of_messages_draws_as_before():
    model, pixels = x_clip_vision(drop_path_rate=0.5).train(), frames(6, 3, 8, 8)

    def run():
        torch.manual_seed(5)
        return last_hidden(model, pixels)

    theirs = run()
    patch_video(model)
    torch.testing.assert_close(run(), theirs, rtol=0, atol=2e-4)
    assert all(map(runs_patched, layers(model)))


@pytest.mark.parametrize("case", KINDS)
def test_gradient_checkpointing(case):
    make, run, shape, *_ = CASES[case]
    model = make().double().train()
    pixels = frames(*shape, dtype=torch.float64)
    theirs = gradients(model, run, pixels)
    patch_video(model)
    name = "activation_checkpointing_enable"  # of transformers 5
    getattr(model, name, model.gradient_checkpointing_enable)({"use_reentrant": False})
    with trace() as ran:
        ours = gradients(model, run, pixels)
    assert_same(ours, theirs, tolerance(model, torch.float64))
    with trace() as once:
        run(model.eval(), pixels)
    assert len(ran) == 2 * len(once)


@pytest.mark.parametrize("case, left", [("x_clip_vision", 0), ("timesformer", 2)])
def test_what_a_layer_copies(case, left):
    """TimeSformer's two: tokens behind the CLS token that did not attend with them."""
    model, masks = CASES[case][0](), 2 if OLD else 1
    if case == "timesformer":
        tokens, arguments = frames(2, 1 + 4 * 3, 24), ()
    else:
        tokens, arguments = frames(6, 5, 24), (None,) * masks
    layer = layers(model)[0]

    def copied():
        with torch.no_grad(), Copies(tokens.numel() // 2) as copies:
            layer(tokens, *arguments)
        return len(copies.names)

    assert copied() > left
    patch_video(model)
    assert copied() == left


def test_half_precision():
    model, pixels = x_clip_vision(), frames(6, 3, 8, 8)
    exact = last_hidden(copy.deepcopy(model).double(), pixels.double())
    half = model.bfloat16()
    theirs = (last_hidden(half, pixels.bfloat16()).double() - exact).abs().max()
    ours = (last_hidden(patch_video(half), pixels.bfloat16()).double() - exact).abs().max()
    assert ours <= 2 * theirs


@pytest.mark.parametrize("make", [lambda: torch.nn.Linear(2, 2), *([vivit] if OLD else [])])
def test_a_model_without_layers_to_patch_is_refused(make):
    model = make()
    with pytest.raises(ValueError, match=r"of TimeSformer, or \(of transformers 5\) of ViViT, got"):
        patch_video(model)
    assert unpatch_video(model) is model


def test_a_forward_that_something_else_put_on_a_layer_is_refused():
    model = timesformer()
    layer = layers(model)[1]
    layer.forward = lambda *inputs: inputs
    with pytest.raises(ValueError, match="patch_video: TimesformerLayer has a forward that was put on it"):
        patch_video(model)
    assert not any(type(x).__module__.startswith("fastcontrast") for x in model.modules())
