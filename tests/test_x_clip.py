"""X-CLIP against its definition: golden values, the dense formula, its invariants, and transformers' own model."""

import random
from importlib.metadata import version

import pytest
import torch
import torch.nn.functional as F
from recipes import close, waves
from torch.autograd import gradcheck

from fastcontrast.ops import trace
from fastcontrast.recipes import x_clip
from fastcontrast.recipes.x_clip import Settings, XClip, x_clip_loss

SMALL = Settings(width=8, layers=2, heads=2, joint=8, joint_heads=2, image=4, patch=2, frames=3)


def set_linear(layer, *numbers: int) -> None:
    """Weights G(out, in, number) / √in, one block of rows a number; no bias."""
    outside, inside = layer.weight.shape
    with torch.no_grad():
        layer.weight.copy_(torch.cat([waves(outside // len(numbers), inside, c) / inside**0.5 for c in numbers]))
        if layer.bias is not None:
            layer.bias.zero_()


def set_block(block, attention: range, ffn: tuple[int, int]) -> None:
    set_linear(block.attention.qkv, *attention[:3])
    set_linear(block.attention.out, attention[3])
    set_linear(block.ffn[0], ffn[0])
    set_linear(block.ffn[2], ffn[1])


@pytest.fixture(scope="module")
def golden_z() -> tuple[torch.Tensor, torch.Tensor]:
    """m^ and z'' of one cross-frame block."""
    block = x_clip.CrossFrameBlock(8, 2).double()
    set_linear(block.message, 1)
    set_linear(block.message_attention.qkv, 2, 3, 4)
    set_linear(block.message_attention.out, 5)
    set_block(block, range(6, 10), (10, 11))
    z = waves(30, 8, 0).view(2, 3, 5, 8)
    with torch.no_grad():
        return block.messages(z), block(z)


@pytest.fixture(scope="module")
def golden_v(golden_z) -> torch.Tensor:
    mit = x_clip.MultiFrameIntegration(3, 8, 2).double()
    set_block(mit.blocks[0], range(13, 17), (17, 18))
    with torch.no_grad():
        mit.positions.copy_(waves(3, 8, 12))
        return mit(golden_z[1][:, :, 0])


def test_golden_block(golden_z):
    messages, z = golden_z
    close(messages[0, 0, :3], -0.57265422, 0.35175836, 0.18438607)
    close(z[0, 0, 0, :4], 1.15851683, -0.16395896, -0.91620472, 0.13479342)
    close(z[1, 2, 4, :4], 0.76999291, -0.15182151, -0.53766714, -0.75344445)
    close(z.square().sum()[None], 163.27984177)


def test_golden_integration(golden_v):
    close(golden_v[0, :4], 0.37741644, -1.41446586, -1.87953346, -0.24722029)


def test_golden_prompt_and_loss(golden_z, golden_v):
    prompt = x_clip.VideoPrompt(8, 2, layers=1, alpha=0.1).double()
    (layer,) = prompt.layers
    set_linear(layer.query, 20)
    set_linear(layer.key_value, 21, 22)
    set_linear(layer.out, 23)
    set_linear(layer.ffn[0], 24)
    set_linear(layer.ffn[2], 25)
    with torch.no_grad():
        prompt.alpha.fill_(0.1)  # the module made it of 0.1 in float32
        texts = prompt(waves(4, 8, 19), golden_z[1][:, :, 1:].mean(1))
        logits = 100 * torch.einsum("be,bce->bc", x_clip.unit(golden_v), x_clip.unit(texts))
    close(logits[0], -23.53281934, -13.08853927, -3.09023794, 28.98254646)
    close(logits[1], 68.6997759, 34.55414131, -11.18168101, -1.14998234)
    close(x_clip_loss(logits, torch.tensor([2, 1]))[None], 33.10920950)


# -------------------------------------------------------------------------------------------------------- definition


def model(seed: int = 0, **changes) -> XClip:
    torch.manual_seed(seed)
    return XClip(Settings(**{**vars(SMALL), **changes})).double()


def videos(count: int = 2, frames: int = 3) -> torch.Tensor:
    return torch.randn(count, frames, 3, 4, 4, dtype=torch.float64)


def dense_attention(attention, x, keep=None):
    """Multi-head attention over the tokens of x [..., L, D]; keys of which `keep` is False get weight 0."""
    q, k, v = (y.transpose(-2, -3) for y in attention.split(x))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    return attention.out((scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2))


def dense_block(block, z, with_message=True):
    """The six steps, [z, m^] formed."""
    m = block.message(z[:, :, 0])
    m = m + dense_attention(block.message_attention, block.message_norm(m))
    s = torch.cat([z, m[:, :, None]], 2)
    keep = torch.ones(s.shape[2], dtype=torch.bool)
    keep[-1] = with_message
    s = s + dense_attention(block.attention, block.norm1(s), keep)
    z = s[:, :, :-1]
    return z + block.ffn(block.norm2(z))


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_a_block_is_the_concatenating_one(frames):
    torch.manual_seed(frames)
    block = x_clip.CrossFrameBlock(12, 3).double()
    z = torch.randn(2, frames, 4, 12, dtype=torch.float64, requires_grad=True)
    with trace() as ran:
        ours = block(z)
    assert [choice.op for choice in ran] == ["temporal_attention", "frame_attention"]
    theirs = dense_block(block, z)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    weight = torch.randn_like(ours)
    leaves = [z, *block.parameters()]
    for a, b in zip(torch.autograd.grad((ours * weight).sum(), leaves),
                    torch.autograd.grad((theirs * weight).sum(), leaves), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_in_float32_it_is_the_definition_too():
    torch.manual_seed(0)
    block = x_clip.CrossFrameBlock(64, 4)
    z = torch.randn(3, 4, 10, 64)
    with torch.no_grad():
        torch.testing.assert_close(block(z), dense_block(block, z), rtol=0, atol=2e-5)


def test_without_its_key_a_message_says_nothing():
    talks, alone = model(), model(messages=False)
    alone.load_state_dict({k: v for k, v in talks.state_dict().items() if ".message" not in k})
    z = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    for block, plain in zip(talks.vision.blocks, alone.vision.blocks, strict=True):
        torch.testing.assert_close(plain(z), dense_block(block, z, with_message=False), rtol=0, atol=1e-12)
        assert (plain(z) - block(z)).abs().max() > 1e-3


def test_order_of_frames_is_known_to_positions_only():
    m, video, order = model(), videos(), torch.tensor([2, 0, 1])
    torch.testing.assert_close(m.vision(video[:, order]), m.vision(video)[:, order], rtol=0, atol=1e-12)
    v, patches = m.encode(video)
    v_ordered, patches_ordered = m.encode(video[:, order])
    torch.testing.assert_close(patches, patches_ordered, rtol=0, atol=1e-12)
    assert (v - v_ordered).abs().max() > 1e-5


def test_videos_do_not_mix_and_frames_of_one_do():
    m, video = model(), videos()
    changed = video.clone()
    changed[0, 1] += 1
    before, after = m.vision(video), m.vision(changed)
    assert torch.equal(before[1], after[1])
    moved = (before[0] - after[0]).abs().amax((1, 2))
    assert (moved > 1e-4).all()  # every frame heard of it


def test_alpha_zero_leaves_the_texts_alone():
    m, texts = model(alpha=0.0), torch.randn(5, 8, dtype=torch.float64)
    _, patches = m.encode(videos())
    assert torch.equal(m.prompt(texts, patches), texts.expand(2, 5, 8))


def test_integration_that_adds_nothing():
    mit, f = model().mit, torch.randn(2, 3, 8, dtype=torch.float64)
    for layer in (mit.blocks[0].attention.out, mit.blocks[0].ffn[2]):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    torch.testing.assert_close(mit(f), (2 * f + mit.positions).mean(1), rtol=0, atol=1e-12)


def test_a_single_frame_still_hears_itself():
    m = model(frames=1)
    block, z = m.vision.blocks[0], torch.randn(2, 1, 5, 8, dtype=torch.float64)
    message = block.message(z[:, :, 0])
    own = block.message_norm(message)
    expected = message + block.message_attention.out(block.message_attention.split(own)[2].flatten(-2))
    torch.testing.assert_close(block.messages(z), expected, rtol=0, atol=1e-12)
    assert m(videos(frames=1), torch.randn(4, 8, dtype=torch.float64)).isfinite().all()


def test_zero_vectors_have_zero_cosines_and_gradients():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    y = x_clip.unit(x)
    assert y.tolist() == [[0.0, 0.0], [0.6, 0.8]]
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.isfinite().all()


def test_classes_at_once_change_nothing():
    m, video, texts = model(), videos(), torch.randn(7, 8, dtype=torch.float64)
    labels = torch.tensor([6, 2])
    results = []
    for at_once in (None, 1, 3):
        logits = m(video, texts, at_once)
        results.append([logits, *torch.autograd.grad(x_clip_loss(logits, labels), [*m.parameters()])])
    for some in results[1:]:
        for a, b in zip(some, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_gradients_of_the_logits():
    m, texts = model(layers=1), torch.randn(2, 8, dtype=torch.float64)
    assert gradcheck(lambda video: m(video, texts), videos(1).requires_grad_(), fast_mode=True)


def test_wrong_inputs_are_named():
    m, texts = model(), torch.randn(4, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="must have the 3 frames that positions were learned for, got 2"):
        m(videos(frames=2), texts)
    with pytest.raises(ValueError, match=r"videos must be \[B, T, 3, 4, 4\], got \[3, 3, 4, 4\]"):
        m(videos()[0], texts)
    with pytest.raises(ValueError, match=r"texts must be \[C, 8\], got \[4, 7\]"):
        m(videos(), texts[:, :7])
    with pytest.raises(ValueError, match="3 heads must divide the width, got 8"):
        model(heads=3)
    with pytest.raises(ValueError, match=r"smoothing is for classes.*got 0.1"):
        x_clip_loss(torch.zeros(2, 4), torch.zeros(2, 4), 0.1)


# --------------------------------------------------------------------------------------------------------------- loop


def test_loss_is_its_formula():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5).double(), torch.tensor([0, 4, 2, 2, 1, 3])
    smoothed = torch.full((6, 5), 0.1 / 5).double()
    smoothed[range(6), labels] += 0.9
    expected = -(smoothed * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(x_clip_loss(logits, labels, 0.1), expected)
    torch.testing.assert_close(x_clip_loss(logits, smoothed), expected)


@pytest.mark.parametrize("switch", [0.0, 1.0])
def test_mixed_clips_and_targets_belong_together(switch):
    """Clips of one value each: the share of it that is left in a mixed clip is the share of its class."""
    video = torch.arange(4.0).double()[:, None, None, None, None].expand(4, 3, 2, 8, 8)
    for seed in range(20):
        mixed, target = x_clip.mix(video, torch.arange(4), 4, random.Random(seed), switch=switch, smoothing=0.0)
        torch.testing.assert_close(mixed.mean((1, 2, 3, 4)), target @ torch.arange(4.0).double())
        torch.testing.assert_close(target.sum(1), torch.ones(4).double())
        if switch:
            assert torch.equal(mixed[:, 0], mixed[:, 2])  # the same box of all frames
            assert set(mixed.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
    _, target = x_clip.mix(video, torch.arange(4), 4, random.Random(0), smoothing=0.1)
    assert target.min().item() == pytest.approx(0.1 / 4)


def test_new_parameters_learn_faster_and_some_do_not_decay():
    m = model()
    groups = x_clip.parameter_groups(m, 1e-3, 0.5)
    kinds = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    of = {name: kinds[id(p)] for name, p in m.named_parameters()}
    assert len(kinds) == len(of) == sum(len(g["params"]) for g in groups)
    assert of["vision.blocks.0.message.weight"] == of["mit.blocks.0.ffn.0.weight"] == (1e-2, 0.5)
    assert of["prompt_projection.weight"] == of["prompt.layers.1.query.weight"] == (1e-2, 0.5)
    assert of["mit.positions"] == of["vision.blocks.1.message_norm.weight"] == of["prompt.alpha"] == (1e-2, 0.0)
    assert of["vision.blocks.0.attention.qkv.weight"] == of["projection.weight"] == (1e-3, 0.5)
    assert of["vision.positions"] == of["vision.class_token"] == of["vision.norm_post.bias"] == (1e-3, 0.0)


def test_views_add_probabilities_not_logits():
    """One view that is sure of class 0 outweighs in logits, not in probabilities, two that lean to class 1."""
    views = [torch.tensor([[30.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 2.0]])]
    assert x_clip.add_views(views).argmax(1).tolist() == [1] and sum(views).argmax(1).tolist() == [0]
    assert x_clip.add_views(views).sum().item() == pytest.approx(3)


def test_scale_is_frozen():
    m = model()
    assert "log_scale" in m.state_dict() and "log_scale" not in dict(m.named_parameters())
    assert m.log_scale.exp().item() == pytest.approx(100)


def test_published_sizes():
    """Tokens a frame and head widths of the paper's table, on the meta device."""
    tokens = {}
    for name, settings in x_clip.SETTINGS.items():
        with torch.device("meta"):
            m = XClip(settings)
        tokens[name] = len(m.vision.positions)
        assert settings.width // settings.heads == settings.joint // settings.joint_heads == 64
    assert tokens == {"B/32": 50, "B/16": 197, "L/14": 257, "L/14@336": 577}


# ------------------------------------------------------------------------------------------------------- transformers


# transformers 4.57 takes softmaxes in float32 even of a float64 model.
EXACT = 1e-10 if version("transformers") >= "5" else 2e-6


@pytest.fixture
def double_default():
    """transformers 4.57 makes the text tower's mask in the default dtype, where float64's lowest number overflows."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def theirs():
    from transformers import XCLIPConfig, XCLIPModel

    torch.manual_seed(0)
    text = {
        "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": 50, "max_position_embeddings": 12,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_frames": 3, "image_size": 16, "patch_size": 8,
        "mit_hidden_size": 16, "mit_intermediate_size": 64, "mit_num_attention_heads": 2,
    }  # fmt: skip
    config = XCLIPConfig(
        text_config=text, vision_config=vision, projection_dim=16, prompt_num_attention_heads=2, prompt_layers=2
    )
    found = XCLIPModel(config)
    with torch.no_grad():  # biases and norms too: what a mapping of names may confuse
        for parameter in found.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return found.double().eval()


IDS = [[3, 9, 1, 49], [8, 49, 0, 0], [7, 7, 2, 49]]


def test_transformers_model_gives_the_same(theirs, double_default):
    torch.manual_seed(1)
    ids, video = torch.tensor(IDS), torch.randn(2, 3, 3, 16, 16, dtype=torch.float64)
    ours = x_clip.from_transformers(theirs)
    texts = x_clip.text_features(theirs, ids)
    assert not texts.requires_grad
    expected = theirs(input_ids=ids, pixel_values=video)
    torch.testing.assert_close(ours(video, texts), expected.logits_per_video, rtol=0, atol=EXACT)
    torch.testing.assert_close(x_clip.unit(ours.encode(video)[0]), expected.video_embeds, rtol=0, atol=EXACT)
    prompted = x_clip.unit(ours.prompt(texts, ours.encode(video)[1]))
    torch.testing.assert_close(prompted, expected.text_embeds, rtol=0, atol=EXACT)


def test_transformers_model_has_the_same_gradients(theirs, double_default):
    torch.manual_seed(2)
    ids, video = torch.tensor(IDS), torch.randn(2, 3, 3, 16, 16, dtype=torch.float64)
    labels = torch.tensor([1, 2])
    ours = x_clip.from_transformers(theirs)
    x_clip_loss(ours(video, x_clip.text_features(theirs, ids)), labels).backward()
    theirs.zero_grad()
    F.cross_entropy(theirs(input_ids=ids, pixel_values=video).logits_per_video, labels).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    expected = x_clip.our_weights(gradients)
    expected["mit.positions"] = expected["mit.positions"][0]
    expected["prompt_projection.weight"] = expected["prompt_projection.weight"].T
    assert expected.pop("log_scale").abs() > 0  # they train the scale
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected.pop(name), rtol=EXACT, atol=10 * EXACT)
    assert expected == {}


def test_transformers_model_in_float32(theirs):
    torch.manual_seed(3)
    ids, video = torch.tensor(IDS), torch.randn(2, 3, 3, 16, 16)
    single = type(theirs)(theirs.config).eval()
    single.load_state_dict(theirs.state_dict())
    ours = x_clip.from_transformers(single)
    with torch.no_grad():
        expected = single(input_ids=ids, pixel_values=video).logits_per_video
        ours = ours(video, x_clip.text_features(single, ids))
    assert (ours - expected).abs().max() <= 1e-5 * single.logit_scale.exp()


def test_transformers_model_of_another_kind_is_refused(theirs):
    from copy import deepcopy

    other = deepcopy(theirs)
    other.config.vision_config.hidden_act = "gelu"
    with pytest.raises(ValueError, match="expected quick_gelu and layer_norm_eps"):
        x_clip.from_transformers(other)
