"""Attention of k siblings over one prefix, as an attention function of transformers: grouped heads read the stored keys
and values in place, which the library would repeat for every head that shares them.

out[b, h, j] = softmax_t(s ⟨q_bhj, k_bgt⟩ + mask_bjt) · v_bgt,   g = h // (H / G)
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..ops._dispatch import native
from ._lent import lent

NAME = "fastcontrast_siblings"


def sibling_attention(
    module: torch.nn.Module,
    query: Tensor,  # [B, H, k, D]
    key: Tensor,  # [B, G, T, D]
    value: Tensor,  # [B, G, T, Dv]
    attention_mask: Tensor | None,  # [B, 1, k, T]
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Heads that share keys are queries of one head. What is no step of siblings goes to the library's own function:
    another thread's, which runs the same model at the same time."""
    ours = attention_mask is not None and attention_mask.dtype == query.dtype and attention_mask.shape[1] == 1
    others = any(options.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    if query.shape[2] == 1 or not ours or others:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
    b, heads, k, d = query.shape
    sizes = (b, key.shape[1], heads // key.shape[1], k, *key.shape[2:], value.shape[3])
    tensors = (query, key, value, attention_mask)
    if _native(sizes, tensors):
        out = query.new_empty(b, k, heads, value.shape[3])
        strides = [x.stride(i) for x in (query, key, value) for i in range(3)]
        strides += [attention_mask.stride(0), attention_mask.stride(2)]
        native.sibling_attention(*(x.data_ptr() for x in tensors), out.data_ptr(), sizes, strides,
                                 d**-0.5 if scaling is None else scaling, torch.get_num_threads())  # fmt: skip
        return out, None
    packed = query.reshape(b, key.shape[1], -1, d)
    mask = attention_mask.expand(b, sizes[2], k, -1).reshape(b, 1, packed.shape[2], -1)
    out = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(b, -1, k, value.shape[3]).transpose(1, 2).contiguous(), None


def _native(sizes: tuple[int, ...], tensors: tuple[Tensor, ...]) -> bool:
    """On a CPU in float32, few queries a head: the library's function takes about twice as long."""
    plain = all(x.dtype == torch.float32 and x.device.type == "cpu" and x.stride(-1) == 1 for x in tensors)
    few = native is not None and sizes[2] * sizes[3] <= native.MOST_QUERIES
    return few and plain and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


ALL_ATTENTION_FUNCTIONS.register(NAME, sibling_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def attending(config: Any) -> AbstractContextManager:
    """Inside, the model of `config` attends with `sibling_attention`, if it attends with "sdpa" outside."""

    def attend_with(name: str, config: Any) -> None:
        config._attn_implementation = name

    suits = config._attn_implementation in ("sdpa", NAME)
    return lent(lambda: [config] if suits else [], partial(attend_with, NAME), partial(attend_with, "sdpa"))
