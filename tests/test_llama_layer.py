"""Whole layers of Llama's form for few rows: the C++ core against the layer itself in float64, and when it runs."""

from collections import Counter
from unittest import mock

import pytest
import torch
import transformers
from decoding import OPTIONS, make, prompts
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastcontrast import contrastive_search
from fastcontrast.decoding import _llama_layer
from fastcontrast.decoding._cache import PrefixCache
from fastcontrast.decoding._few_rows import MOST, StandIn, few_rows
from fastcontrast.decoding._siblings import attending
from fastcontrast.ops._dispatch import native

pytestmark = pytest.mark.skipif(native is None, reason="the C++ core is not built")

SIZES = {"hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
         "num_hidden_layers": 1, "vocab_size": 20}  # fmt: skip
FAMILIES = {"Llama": {"attention_bias": True, "mlp_bias": True}, "Mistral": {}, "Qwen2": {}}


def model_of(family: str, dtype=torch.float32, **changes) -> nn.Module:
    options = {**SIZES, **FAMILIES[family], **changes}
    width = options["head_dim"]
    config = getattr(transformers, f"{family}Config")(**options, attn_implementation="sdpa")
    config.head_dim = width  # Qwen2 takes it from there too
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}Model")(config).eval()
    for x in model.parameters():
        nn.init.normal_(x, std=0.3)
    return model.to(dtype)


def problem(model, b=1, k=4, t=30, padded=False):
    """A layer's inputs: siblings, their rotations and mask, and keys and values of t slots before them."""
    config, width = model.config, model.layers[0].self_attn.head_dim
    torch.manual_seed(b * t + k)
    x = torch.randn(b, k, config.hidden_size)
    prefix = torch.randn(2, b, config.num_key_value_heads, t, width)
    mask = torch.zeros(b, 1, k, t + k + 3)[..., : t + k]
    mask[..., t:] = torch.full((k, k), torch.finfo(mask.dtype).min).fill_diagonal_(0)
    if padded:
        mask[0, ..., : t // 2] = torch.finfo(mask.dtype).min
    positions = torch.arange(t, t + b)[:, None].expand(b, k)
    return x, prefix, mask, positions


def run(model, x, prefix, mask, positions):
    """What comes out, and the keys and values that were written, with the layer as it stands."""
    dtype = next(model.parameters()).dtype
    x, prefix, mask = x.to(dtype), prefix.to(dtype), mask.to(dtype)
    cache = PrefixCache(1, prefix.shape[3] + x.shape[1] + 5)
    cache.update(*prefix, 0)
    rotations = model.rotary_emb(x, positions)
    with attending(model.config):
        out = model.layers[0](x, attention_mask=mask, position_ids=positions, past_key_values=cache,
                              use_cache=True, position_embeddings=rotations)  # fmt: skip
    assert cache.layers[0].length == prefix.shape[3] + x.shape[1]
    return out, cache.layers[0].keys, cache.layers[0].values


class Counted:
    """The layer's core, its calls counted."""

    def __init__(self, core):
        self.core, self.calls = core, 0

    def run(self, *arguments):
        self.calls += 1
        self.core.run(*arguments)


@torch.no_grad()
def by_the_core(model, *inputs):
    with few_rows(model):
        kept, layer, core, *_ = model.layers[0].forward.func, *model.layers[0].forward.args
        counted = Counted(core)
        with mock.patch.dict(vars(layer), {"forward": lambda *a, **named: kept(layer, counted, *a, **named)}):
            return run(model, *inputs), counted.calls


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("b", "k"), [(1, 2), (1, 5), (1, 8), (2, 3), (4, 2)])
def test_values(family, b, k):
    model = model_of(family)
    for t, padded in ((1, False), (30, False), (133, True)):
        inputs = problem(model, b, k, t, padded)
        found, calls = by_the_core(model, *inputs)
        assert calls == 1
        with torch.no_grad():
            expected = run(model.double(), *inputs)
        model.float()
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def test_the_cache_grows_where_it_is_full():
    model = model_of("Llama")
    x, prefix, mask, positions = problem(model, k=4)
    cache = PrefixCache(1, 30)
    cache.update(*prefix, 0)
    with few_rows(model), attending(model.config), torch.no_grad():
        out = model.layers[0](x, attention_mask=mask, past_key_values=cache,
                              position_embeddings=model.rotary_emb(x, positions))  # fmt: skip
    expected, keys, values = run(model, x, prefix, mask, positions)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(cache.layers[0].keys, keys)
    torch.testing.assert_close(cache.layers[0].values, values)


def test_others_go_to_the_layer():
    """More rows or queries than the core takes, gradients, training, another mask: the layer computes what it does."""
    model = model_of("Llama")
    inputs = problem(model, k=MOST + 1)
    found, calls = by_the_core(model, *inputs)
    assert calls == 0
    torch.testing.assert_close(found[0], run(model, *inputs)[0])

    x, prefix, mask, positions = problem(model, b=2, k=3)
    for changed in (mask[..., :1, :].expand(-1, -1, 3, -1).mT.contiguous().mT, mask.expand(-1, 6, -1, -1)):
        assert by_the_core(model, x, prefix, changed, positions)[1] == 0
    assert by_the_core(model, x, prefix, mask[:1].expand(2, -1, -1, -1), positions)[1] == 1
    with few_rows(model):
        model.zero_grad()
        run(model, x, prefix, mask, positions)[0].sum().backward()
        assert model.layers[0].mlp.up_proj.weight.grad is not None
    model.train()
    assert by_the_core(model, x, prefix, mask, positions)[1] == 0

    many = model_of("Llama", num_attention_heads=10, hidden_size=40)
    assert by_the_core(many, *problem(many, k=6))[1] == 1  # 5 · 6 queries share keys
    assert by_the_core(many, *problem(many, k=7))[1] == 0


@torch.no_grad()
def test_other_calls_of_a_lent_layer():
    """A thread that reads a prompt, or has another cache, while somebody else searches."""
    model = model_of("Qwen2")
    ids = torch.arange(6)[None]
    expected = model(ids, use_cache=False).last_hidden_state
    with few_rows(model), attending(model.config):
        torch.testing.assert_close(model(ids, use_cache=False).last_hidden_state, expected)
        cached = model(ids[:, :3], use_cache=True)
        more = model(ids[:, 3:], past_key_values=cached.past_key_values).last_hidden_state
        torch.testing.assert_close(more, expected[:, 3:])


def stood_in(model) -> dict:
    with few_rows(model):
        found = Counter(type(x).__name__ for x in model.modules() if isinstance(vars(x).get("forward"), StandIn))
    assert not any(isinstance(vars(x).get("forward"), StandIn) for x in model.modules())
    return dict(found)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gemma", "gpt2"])
def test_which_layers_of_a_model(name):
    model = make(name)
    whole = {"llama": "LlamaDecoderLayer", "mistral": "MistralDecoderLayer", "qwen2": "Qwen2DecoderLayer"}.get(name)
    linears = Counter(type(x).__name__ for x in model.modules() if type(x) in (nn.Linear, Conv1D))
    assert stood_in(model) == {**linears, **({whole: 2} if whole else {})}


def test_a_layer_that_is_watched_or_changed_is_called():
    seen = []
    watched = [("self_attn", "register_forward_hook"), ("mlp.gate_proj", "register_forward_hook"),
               ("input_layernorm", "register_forward_pre_hook")]  # fmt: skip
    for part, register in watched:
        model = model_of("Llama")
        getattr(model.layers[0].get_submodule(part), register)(lambda *_: seen.append("hook"))
        assert "LlamaDecoderLayer" not in stood_in(model)
        with few_rows(model), torch.no_grad():
            run(model, *problem(model))
    assert len(seen) == len(watched)
    changes = {
        "forward of a part": lambda layer: setattr(layer.mlp, "forward", lambda x: x),
        "activation": lambda layer: setattr(layer.mlp, "act_fn", nn.GELU()),
        "adapter": lambda layer: setattr(layer.self_attn, "q_proj", nn.Sequential(layer.self_attn.q_proj)),
        "half precision": lambda layer: layer.mlp.up_proj.bfloat16(),
        "norm": lambda layer: setattr(layer, "input_layernorm", nn.LayerNorm(36)),
    }
    for what, make_change in changes.items():
        model = model_of("Llama")
        make_change(model.layers[0])
        assert "LlamaDecoderLayer" not in stood_in(model), what


@torch.no_grad()
def test_hooks_of_the_library_and_of_the_layer_as_a_whole():
    """Asking for hidden states leaves hooks of the library behind; a hook of the layer itself runs as ever."""
    model = make("llama")
    ids, _ = prompts(rows=1, padding=(0,))
    seen = []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append("hook"))
    expected = model(ids, output_hidden_states=True).hidden_states
    assert stood_in(model)["LlamaDecoderLayer"] == 2
    options = {"custom_generate": contrastive_search, "top_k": 3, **OPTIONS, "max_new_tokens": 4}
    out = model.generate(ids, **options, output_hidden_states=True, return_dict_in_generate=True)
    assert len(seen) == 1 + 1 + 4  # here, the prompt, the steps
    for ours, theirs in zip(out.hidden_states[0], expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    whole = model(out.sequences, output_hidden_states=True).hidden_states
    for step, states in enumerate(out.hidden_states[1:]):
        at = ids.shape[1] + step
        for ours, theirs in zip(states, whole, strict=True):
            torch.testing.assert_close(ours[:, 0], theirs[:, at], rtol=1e-4, atol=1e-4)


def test_weights_outlive_a_model_that_moves():
    """Addresses are taken once: what they point to stays, whatever becomes of the parameters meanwhile."""
    model = model_of("Llama")
    inputs = problem(model)
    expected = run(model, *inputs)[0]
    with few_rows(model):
        forward = model.layers[0].forward
        weights = forward.args[1].weights
        assert {x.data_ptr() for x in weights} == {x.data_ptr() for x in model.layers[0].parameters()}
        for x in model.layers[0].parameters():
            x.data = torch.zeros_like(x)
        with torch.no_grad():
            torch.testing.assert_close(run(model, *inputs)[0], expected)


def test_a_search_runs_on_it(monkeypatch):
    """Every step, both layers; and writes what it does without."""
    model = make("llama")
    ids, mask = prompts(rows=1, padding=(0,))
    calls = []
    step = _llama_layer._step

    def spy(*arguments):
        found = step(*arguments)
        calls.append(found is not None)
        return found

    monkeypatch.setattr(_llama_layer, "_step", spy)
    search = {"custom_generate": contrastive_search, "penalty_alpha": 0.6, "top_k": 4, "attention_mask": mask}
    text = model.generate(ids, **search, **OPTIONS)
    assert calls == [False] * 2 + [True] * 2 * 20
    monkeypatch.setattr(_llama_layer, "_step", lambda *_: None)
    assert torch.equal(text, model.generate(ids, **search, **OPTIONS))
