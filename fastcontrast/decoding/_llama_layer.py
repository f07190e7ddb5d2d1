"""A layer of Llama's form on a CPU, for the k rows of a step of look-ahead, in one call.

    y = x + o(attention(norm(x))),    out = y + down(silu(gate(norm(y))) · up(norm(y)))

For so few rows the library's some forty calls a layer take as long as reading the layer's weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops._dispatch import native
from ..ops._sweep import address
from ._cache import PrefixCache
from ._few_rows import StandIn, few, plain, untouched
from ._siblings import NAME

FAMILIES = ("Llama", "Mistral", "Qwen2")  # windows, in which they differ, come with the mask
SILU = ("SiLU", "SiLUActivation")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def forward(layer: nn.Module, core: Any, hidden_states: Tensor, **given: Any) -> Tensor:
    """A step of siblings by the core; the prompt, another thread's pass and whatever else by the layer itself."""
    step = _step(layer, hidden_states, given)
    if step is None:
        return type(layer).forward(layer, hidden_states, **given)
    stored, mask, (cos, sin) = step
    b, k, _ = hidden_states.shape
    start = stored.claim(k)
    keys, values = stored.store
    out = torch.empty_like(hidden_states)
    strides = (
        cos.stride(0) if cos.shape[0] > 1 else 0, keys.stride(0), keys.stride(1),
        mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(2),
    )  # fmt: skip
    tensors = (hidden_states, cos, sin, keys, values, mask, out)
    core.run(*(x.data_ptr() for x in tensors), (b, k, start), strides, torch.get_num_threads())
    return out


def _step(layer: nn.Module, x: Tensor, given: dict[str, Any]) -> tuple | None:
    """Cached layer, mask and rotations, if this is a step of k siblings for the core."""
    attention, past, mask = layer.self_attn, given.get("past_key_values"), given.get("attention_mask")
    if x.ndim != 3 or not few(x) or attention.config._attn_implementation != NAME or layer.training:
        return None
    if not isinstance(past, PrefixCache) or not isinstance(mask, Tensor) or given.get("output_attentions"):
        return None
    (b, k, _), stored = x.shape, past.layers[attention.layer_idx]
    if k * attention.num_key_value_groups > native.MOST_QUERIES or stored.store is None:
        return None
    rotations = given["position_embeddings"]
    shapes = mask.shape == (b, 1, k, stored.length + k) and stored.store[0].shape[0] == b
    alike = all(y.dtype == torch.float32 and y.device == x.device for y in (mask, stored.store[0], *rotations))
    lying = mask.stride(3) == 1 and all(y.is_contiguous() for y in (*rotations, *stored.store))
    turns = all(y.shape[1:] == (k, attention.head_dim) for y in rotations)
    return (stored, mask, rotations) if shapes and alike and lying and turns else None


def whole_layer(layer: nn.Module) -> StandIn | None:
    """`forward` for this layer; None where it is none of these families', or not as its family made it."""
    family = type(layer).__name__.removesuffix("DecoderLayer")
    if family not in FAMILIES or not type(layer).__module__.startswith("transformers.models."):
        return None
    attention, mlp = layer.self_attn, layer.mlp
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    linears = [getattr(x, name) for x, names in zip((attention, mlp), LINEARS, strict=True) for name in names]
    kinds = {attention: "Attention", mlp: "MLP", **dict.fromkeys(norms, "RMSNorm")}
    parts = [x for x in layer.modules() if x is not layer]
    whole = untouched(layer) and all(type(x).__name__ == f"{family}{kind}" for x, kind in kinds.items())
    whole = whole and all(type(x) is nn.Linear for x in linears) and type(mlp.act_fn).__name__ in SILU
    if not whole or not all(map(plain, (*linears, *norms))) or not all(map(_unwatched, parts)):
        return None
    hidden, inner = mlp.down_proj.weight.shape
    width = attention.head_dim
    core = native.LlamaLayer(
        [(x.weight.data_ptr(), address(x.bias)) for x in linears], [x.weight.data_ptr() for x in norms],
        [x.variance_epsilon for x in norms], attention.scaling,
        [hidden, inner, *(x.weight.shape[0] // width for x in (attention.q_proj, attention.k_proj)), width],
    )  # fmt: skip
    core.weights = [y.data for x in (*linears, *norms) for y in (x.weight, getattr(x, "bias", None)) if y is not None]
    return StandIn(forward, layer, core)


def _unwatched(layer: nn.Module) -> bool:
    """Nobody misses a call of the layer. The library's own hooks stay once hidden states were asked for; what they
    would take from a part of a layer are attention weights, which this attention has none of."""
    hooks = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
    return untouched(layer) and all(hook.__module__ == "transformers.utils.output_capturing" for hook in hooks)
