"""diffusers' own attentions, UNets and motion modules, with our processors and patches and without: the same outputs
and gradients, of weights that stay theirs."""

import copy
import importlib
import pickle

import pytest
import torch
import torch.nn.functional as F

diffusers = pytest.importorskip("diffusers")

from copies import Copies  # noqa: E402
from diffusers.models.attention import FreeNoiseTransformerBlock  # noqa: E402
from diffusers.models.attention_processor import (  # noqa: E402
    Attention,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
)
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D  # noqa: E402

from fastcontrast.integrations.diffusers import (  # noqa: E402
    FirstFrameProcessor,
    FirstPreviousProcessor,
    FrameProcessor,
    TemporalProcessor,
    patch_motion,
    set_processors,
)
from fastcontrast.ops import trace  # noqa: E402
from fastcontrast.ops.frame_rules import causal, window  # noqa: E402
from fastcontrast.testing.tolerance import assert_as_good_as  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
zero = importlib.import_module("diffusers.pipelines.deprecated.text_to_video_synthesis.pipeline_text_to_video_zero")

SMALL = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "cross_attention_dim": 6,
}  # fmt: skip


def peaked(model, seed=0):
    """Scores large enough that attention is far from uniform; nothing is zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            fan_in = weight[0].numel() if weight.ndim > 1 else 1
            weight.normal_(std=(3 if "to_q" in name or "to_k" in name else 1) * fan_in**-0.5)
    return model.eval()


def unet(**changes):
    torch.manual_seed(0)
    kinds = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
    }
    return peaked(diffusers.UNet2DConditionModel(**{**SMALL, **kinds, **changes}))


def motion_unet():
    torch.manual_seed(0)
    return peaked(
        diffusers.UNetMotionModel(
            **SMALL, down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), motion_num_attention_heads=2,
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), num_attention_heads=2,
        )
    )  # fmt: skip


def numbers(*shape, dtype=torch.float64, seed=2):
    torch.manual_seed(seed)
    return torch.randn(*shape, dtype=dtype)


def images(model, x):
    return model(x, 3, numbers(len(x), 5, 6, dtype=x.dtype, seed=3)).sample


def motion(model, x):
    text = numbers(len(x) * x.shape[2], 5, 6, dtype=x.dtype, seed=3)
    return model(x, 3, text).sample


def gradients(run, model, x):
    x = x.clone().requires_grad_()
    out = run(model, x)
    weight = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    return out, torch.autograd.grad((out * weight).sum(), [x, *model.parameters()], allow_unused=True)


def assert_same(ours, theirs, share=1e-10):
    for mine, yours in zip([ours[0], *ours[1]], [theirs[0], *theirs[1]], strict=True):
        assert (mine is None) == (yours is None)
        if mine is not None:
            assert mine.is_contiguous() == yours.is_contiguous()
            torch.testing.assert_close(mine, yours, rtol=0, atol=share * max(1.0, yours.abs().max().item()))


def assert_as_good(ours, theirs, exact):
    """Of float32: through a whole UNet, both roundings are far from zero."""
    for mine, yours, truth in zip(*([out, *rest] for out, rest in (ours, theirs, exact)), strict=True):
        assert (mine is None) == (yours is None)
        if mine is not None:
            assert_as_good_as(mine, truth, yours, factor=2)


def operations(ran):
    return {choice.op for choice in ran}


class SparseCausal:
    """What Tune-A-Video computes: keys of the first and the previous frame, side by side."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        if encoder_hidden_states is not None:
            return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask)
        frames = len(hidden_states) // 2
        previous = [max(f - 1, 0) for f in range(frames)]

        def two(x):
            x = x.unflatten(0, (2, frames))
            return torch.cat([x[:, [0] * frames], x[:, previous]], 2).flatten(0, 1)

        q = attn.to_q(hidden_states)
        k, v = two(attn.to_k(hidden_states)), two(attn.to_v(hidden_states))
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        mask = None if attention_mask is None else attention_mask.repeat(1, 1, 2)[:, None]
        out = F.scaled_dot_product_attention(q, k, v, mask)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


ORIGINALS = {
    "first": (FirstFrameProcessor, lambda: zero.CrossFrameAttnProcessor2_0(batch_size=2)),
    "first, without torch's attention": (FirstFrameProcessor, lambda: zero.CrossFrameAttnProcessor(batch_size=2)),
    "first and previous": (FirstPreviousProcessor, SparseCausal),
}

# -------------------------------------------------------------------------------------------------------- processors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ORIGINALS)
def test_a_unet_of_frames(name, dtype):
    """Also: names of parameters stay; undone, all is as before."""
    ours, original = ORIGINALS[name]
    model, x = unet().to(dtype), numbers(6, 4, 8, 8, dtype=dtype)
    names, plain = list(model.state_dict()), images(model, x)
    model.set_attn_processor(original())
    theirs = gradients(images, model, x)
    model.set_attn_processor(AttnProcessor2_0())
    patch = set_processors(model, ours())
    assert len(patch) == sum("attn1" in key for key in model.attn_processors) > 0
    with trace() as ran:
        mine = gradients(images, model, x)
    assert operations(ran) == {"frame_attention"} and len(ran) == len(patch)
    if dtype == torch.float64:
        assert_same(mine, theirs)
    else:
        assert_as_good(mine, theirs, gradients(images, copy.deepcopy(model).double(), x.double()))
    assert (theirs[0] - plain).abs().max() > 1e-3  # frames did look at each other
    assert list(model.state_dict()) == names
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(images(twin, x), mine[0], rtol=0, atol=0)
    patch.undo()
    with trace() as ran:
        torch.testing.assert_close(images(model, x), plain, rtol=0, atol=0)
    assert ran == [] and len(patch) == 0


def test_on_all_attentions_like_the_pipelines_own():
    model, x = unet().double(), numbers(6, 4, 8, 8)
    model.set_attn_processor(zero.CrossFrameAttnProcessor2_0(batch_size=2))
    theirs = images(model, x)
    model.set_attn_processor(FirstFrameProcessor(batch_size=2))
    torch.testing.assert_close(images(model, x), theirs, rtol=0, atol=1e-10)


def test_a_with_statement_undoes():
    model = unet()
    before = list(model.attn_processors.values())
    with set_processors(model, FrameProcessor("all")):
        assert list(model.attn_processors.values()) != before
    assert list(model.attn_processors.values()) == before


SPATIAL = "spatial norm, of images"
ATTENTIONS = {
    "plain": {},
    "bias": {"bias": True, "out_bias": False},
    "group norm, residual, rescaled": {"norm_num_groups": 3, "residual_connection": True, "rescale_output_factor": 2.0},
    "norm of queries and keys": {"qk_norm": "layer_norm"},
    "upcast": {"upcast_attention": True, "upcast_softmax": True},
    "unscaled": {"scale_qk": False},
    "dropout": {"dropout": 0.5},
    SPATIAL: {"spatial_norm_dim": 5, "residual_connection": True},
}


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("square", [True, False])
def test_all_else_that_an_attention_does(name, square):
    """Each frame attending itself, or each row its frames, is diffusers' own processor."""
    channels = 96 if name == SPATIAL else 12  # its norm has 32 groups
    attn = peaked(Attention(channels, heads=3, dim_head=4, **ATTENTIONS[name])).double().train()
    x = numbers(6, channels, 2, 3) if square or name == SPATIAL else numbers(6, 5, channels)
    temb = numbers(6, 5, 2, 3, seed=4) if name == SPATIAL else None

    def run(attn, x):
        torch.manual_seed(6)
        return attn(x, temb=temb)

    theirs = gradients(run, attn, x)
    for processor, op in ((FrameProcessor("self"), "frame_attention"), (TemporalProcessor(), "temporal_attention")):
        attn.set_processor(processor)
        with trace() as ran:
            ours = gradients(run, attn, x)
        assert operations(ran) == {op}
        assert_same(ours, theirs, 1e-11)


@pytest.mark.parametrize("norm", [None, "layer_norm"])
@pytest.mark.parametrize("make", [lambda: FrameProcessor("all"), TemporalProcessor])
def test_cross_attention_is_the_original(make, norm):
    attn = peaked(Attention(12, 6, heads=3, dim_head=4, cross_attention_norm=norm)).double()
    x, text, mask = numbers(6, 5, 12), numbers(6, 4, 6), numbers(6, 1, 4)
    theirs = attn(x, encoder_hidden_states=text, attention_mask=mask)
    attn.set_processor(make())
    with trace() as ran:
        ours = attn(x, encoder_hidden_states=text, attention_mask=mask)
    assert ran == []
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", ORIGINALS)
def test_masks_of_tokens(name):
    ours, original = ORIGINALS[name]
    attn, x = peaked(Attention(12, heads=3, dim_head=4)).double(), numbers(6, 5, 12)
    mask = torch.zeros(6, 1, 5, dtype=torch.float64).masked_fill(numbers(6, 1, 5) > 0.5, -10000.0)
    attn.set_processor(original())
    theirs, unmasked = attn(x, attention_mask=mask), attn(x)
    attn.set_processor(ours())
    torch.testing.assert_close(attn(x, attention_mask=mask), theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(attn(x, attention_mask=mask == 0), theirs, rtol=0, atol=1e-12)
    assert (theirs - unmasked).abs().max() > 1e-3


def test_clips_by_their_number_or_by_their_frames():
    attn, x = peaked(Attention(12, heads=3, dim_head=4)).double(), numbers(6, 5, 12)
    attn.set_processor(FrameProcessor("first", batch_size=3))
    by_number = attn(x)
    attn.set_processor(FrameProcessor("first", frames=2))
    torch.testing.assert_close(attn(x), by_number, rtol=0, atol=0)
    attn.set_processor(FrameProcessor("first", frames=2))
    torch.testing.assert_close(attn(x[2:4]), by_number[2:4], rtol=0, atol=1e-13)
    attn.set_processor(FirstFrameProcessor(batch_size=4))  # a single row, without guidance, is a clip of one frame
    alone = attn(x[:1])
    attn.set_processor(AttnProcessor2_0())
    torch.testing.assert_close(alone, attn(x[:1]), rtol=0, atol=1e-13)


def test_no_keys_are_repeated():
    attn, x = peaked(Attention(12, heads=3, dim_head=4)), numbers(6, 5, 12, dtype=torch.float32)

    def copied(processor):
        attn.set_processor(processor)
        with torch.no_grad(), Copies(x.numel()) as copies:
            attn(x)
        return copies.names

    assert copied(zero.CrossFrameAttnProcessor2_0()).count("index") == 2
    assert copied(SparseCausal()).count("cat") == 2
    for processor in (FirstFrameProcessor(), FirstPreviousProcessor(), FrameProcessor("all")):
        assert copied(processor) == []


# --------------------------------------------------------------------------------------------------- temporal blocks


@pytest.mark.parametrize("rule", ["all", window(1, 0)])
def test_rules_of_rows_of_frames(rule):
    attn, x = peaked(Attention(12, heads=3, dim_head=4)).double(), numbers(7, 4, 12)
    f = torch.arange(4)
    allowed = torch.ones(4, 4, dtype=torch.bool) if rule == "all" else (f[:, None] - f).clamp(min=-1) // 2 == 0
    q, k, v = (product(x).unflatten(-1, (3, 4)).transpose(1, 2) for product in (attn.to_q, attn.to_k, attn.to_v))
    out = F.scaled_dot_product_attention(q, k, v, allowed)
    attn.set_processor(TemporalProcessor(rule))
    torch.testing.assert_close(attn(x), attn.to_out[0](out.transpose(1, 2).flatten(2)), rtol=0, atol=1e-12)


def unet_3d():
    torch.manual_seed(0)
    model = diffusers.UNet3DConditionModel(
        **SMALL, attention_head_dim=4, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip
    return peaked(model)


def unet_of_stable_video():
    torch.manual_seed(0)
    model = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8, in_channels=4, block_out_channels=(32, 64), layers_per_block=1, num_attention_heads=(2, 4),
        cross_attention_dim=6, addition_time_embed_dim=4, projection_class_embeddings_input_dim=12,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )  # fmt: skip
    return peaked(model)


def stable_video(model, x):  # [B, F, C, H, W]
    return model(x, 3, numbers(len(x), 1, 6, seed=3), added_time_ids=numbers(len(x), 3, seed=4)).sample


@pytest.mark.parametrize(
    "make, run, shape",
    [
        (motion_unet, motion, (2, 4, 3, 8, 8)),
        (unet_3d, images, (2, 4, 3, 8, 8)),
        (unet_of_stable_video, stable_video, (2, 3, 4, 8, 8)),
    ],
)
def test_temporal_attentions_of_unets(make, run, shape):
    model, x = make().double(), numbers(*shape)
    theirs = run(model, x)
    with set_processors(model, TemporalProcessor()) as patch, trace() as ran:
        ours = run(model, x)
        assert 0 < len(ran) <= len(patch)
    assert operations(ran) == {"temporal_attention"}
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10 * theirs.abs().max().item())
    with set_processors(model, TemporalProcessor("self")):
        assert (run(model, x) - theirs).abs().max() > 1e-3
    with set_processors(model, FirstFrameProcessor()), trace() as ran:
        run(model, x)
    assert operations(ran) == {"frame_attention"}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_unet_with_patched_motion(dtype, training):
    model, x = motion_unet().to(dtype).train(training), numbers(2, 4, 3, 8, 8, dtype=dtype)
    names, before = list(model.state_dict()), [type(x) for x in model.modules()]
    theirs = gradients(motion, model, x)
    patch = patch_motion(model)
    assert len(patch) == sum(kind is AnimateDiffTransformer3D for kind in before) > 0
    with trace() as ran:
        ours = gradients(motion, model, x)
    assert operations(ran) == {"temporal_attention"} and len(ran) == 2 * len(patch)
    if dtype == torch.float64:
        assert_same(ours, theirs)
    else:
        assert_as_good(ours, theirs, gradients(motion, copy.deepcopy(model).double(), x.double()))
    assert list(model.state_dict()) == names
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with trace() as ran:
            torch.testing.assert_close(motion(twin, x), ours[0], rtol=0, atol=0)
        assert ran
    assert len(patch_motion(model)) == 0  # it is already
    patch.undo()
    assert [type(x) for x in model.modules()] == before
    torch.testing.assert_close(motion(model, x), theirs[0], rtol=0, atol=0)


def module(**changes):
    settings = {
        "num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 8, "norm_num_groups": 4, "num_layers": 2,
        "positional_embeddings": "sinusoidal", "num_positional_embeddings": 16, **changes,
    }  # fmt: skip
    return peaked(AnimateDiffTransformer3D(**settings)).double()


def three_frames(model, x, **options):
    return model(x, num_frames=3, **options)


@pytest.mark.parametrize("changes", [{}, {"double_self_attention": False}, {"positional_embeddings": None}])
def test_a_motion_module(changes):
    model, x = module(**changes), numbers(6, 8, 4, 5)
    theirs = gradients(three_frames, model, x)
    patch_motion(model)
    with trace() as ran:
        ours = gradients(three_frames, model, x)
    assert len(ran) == (2 if "double_self_attention" in changes else 4)
    assert_same(ours, theirs, 1e-11)
    with torch.no_grad():
        torch.testing.assert_close(three_frames(model, x), theirs[0], rtol=0, atol=1e-11)
        last = x.to(memory_format=torch.channels_last)
        torch.testing.assert_close(three_frames(model, last), theirs[0], rtol=0, atol=1e-11)


def test_what_a_patched_module_copies():
    model, x = module().float(), numbers(6, 8, 4, 5, dtype=torch.float32)

    def copied(x):
        with torch.no_grad(), Copies(x.numel()) as copies:
            three_frames(model, x)
        return len(copies.names)

    assert copied(x) == 3
    patch_motion(model)
    assert copied(x) == 2
    assert copied(x.to(memory_format=torch.channels_last)) == 0


def test_a_patched_module_follows_the_processors_rule():
    model, x = module(), numbers(6, 8, 4, 5)
    everywhere = three_frames(model, x)
    set_processors(model, TemporalProcessor(causal()))
    theirs = three_frames(model, x)
    patch_motion(model)
    torch.testing.assert_close(three_frames(model, x), theirs, rtol=0, atol=1e-11)
    assert (theirs - everywhere).abs().max() > 1e-3


class Other(AttnProcessor):
    pass


def with_free_noise():
    model = module()
    for i, block in enumerate(model.transformer_blocks):
        free = FreeNoiseTransformerBlock(
            8, 2, 4, activation_fn="geglu", double_self_attention=True, positional_embeddings="sinusoidal",
            num_positional_embeddings=16, context_length=2, context_stride=1,
        )  # fmt: skip
        free.load_state_dict(block.state_dict())
        model.transformer_blocks[i] = free.double().eval()
    return model


def with_chunks():
    model = module()
    for block in model.transformer_blocks:
        block.set_chunk_feed_forward(1, 1)
    return model


def with_a_processor_of_others():
    model = module()
    model.transformer_blocks[1].attn2.set_processor(Other())
    return model


@pytest.mark.parametrize(
    "make, options",
    [
        (with_free_noise, {}),
        (with_chunks, {}),
        (with_a_processor_of_others, {}),
        (lambda: module(dropout=0.5).train(), {}),
        (module, {"cross_attention_kwargs": {}}),
        (lambda: module(cross_attention_dim=6, double_self_attention=False), {"encoder_hidden_states": (40, 5, 6)}),
    ],
)
def test_what_a_patch_leaves_to_the_original_code(make, options):
    model, x = make(), numbers(6, 8, 4, 5)
    options = {name: numbers(*value) if isinstance(value, tuple) else value for name, value in options.items()}

    def run():
        torch.manual_seed(6)
        return three_frames(model, x, **options)

    theirs = run()
    patch_motion(model)
    with trace() as ran:
        torch.testing.assert_close(run(), theirs, rtol=0, atol=0)
    assert ran == []


def test_free_noise_attends_its_windows_by_processors():
    model, x = with_free_noise(), numbers(6, 8, 4, 5)
    theirs = three_frames(model, x)
    set_processors(model, TemporalProcessor())
    with trace() as ran:
        torch.testing.assert_close(three_frames(model, x), theirs, rtol=0, atol=1e-11)
    assert len(ran) == 2 * 2 * 2  # blocks, windows, attentions


# ------------------------------------------------------------------------------------------------------------- errors


def test_rows_that_are_no_clips():
    attn = Attention(12, heads=3, dim_head=4, processor=FirstFrameProcessor(batch_size=2))
    with pytest.raises(ValueError, match="FirstFrameProcessor: the rows must be 2 clips, got 5 rows"):
        attn(torch.zeros(5, 4, 12))
    attn.set_processor(FrameProcessor("all", frames=4))
    with pytest.raises(ValueError, match="FrameProcessor: the rows must be clips of 4 frames, got 6 rows"):
        attn(torch.zeros(6, 4, 12))


def test_masks_over_frames_are_refused():
    attn = Attention(12, heads=3, dim_head=4, processor=TemporalProcessor())
    with pytest.raises(NotImplementedError, match="TemporalProcessor: attention_mask must be None"):
        attn(torch.zeros(6, 4, 12), attention_mask=torch.zeros(6, 1, 4))


def test_added_projections_are_refused():
    attn = Attention(12, heads=3, dim_head=4, added_kv_proj_dim=6, processor=AttnAddedKVProcessor2_0())
    attn.set_processor(FrameProcessor("all"))
    with pytest.raises(NotImplementedError, match="FrameProcessor: expected an attention with its own keys"):
        attn(torch.zeros(6, 4, 12))


def test_models_and_processors_that_do_not_fit():
    with pytest.raises(ValueError, match="a model with attentions in temporal blocks, got UNet2DConditionModel"):
        set_processors(unet(), TemporalProcessor())
    with pytest.raises(ValueError, match="a model with self-attentions named attn1, got Linear"):
        set_processors(torch.nn.Linear(2, 2), FirstFrameProcessor())
    with pytest.raises(TypeError, match="must be a FrameProcessor or a TemporalProcessor, got AttnProcessor"):
        set_processors(unet(), AttnProcessor())
    with pytest.raises(ValueError, match="patch_motion: expected a model with motion modules, got UNet2DConditionM"):
        patch_motion(unet())
    model = module()
    model.forward = lambda *inputs: inputs
    with pytest.raises(ValueError, match="patch_motion: a motion module has a forward that was put on it"):
        patch_motion(model)
