"""Attention of k siblings over one prefix, as an attention function of transformers: grouped heads read the stored keys
and values in place, which the library would repeat for every head that shares them.

out[b, h, j] = softmax_t(s ⟨q_bhj, k_bgt⟩ + mask_bjt) · v_bgt,   g = h // (H / G)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "fastcontrast_siblings"
_lock = threading.Lock()
_in_use: dict[int, tuple[int, str]] = {}  # id of a configuration: how many use it, and what it said before


def sibling_attention(
    module: torch.nn.Module,
    query: Tensor,  # [B, H, k, D]
    key: Tensor,  # [B, G, T, D]
    value: Tensor,  # [B, G, T, D]
    attention_mask: Tensor | None,  # [B, 1, k, T]
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Heads that share keys are queries of one head. What is no step of siblings goes to the library's own function:
    another thread's, which runs the same model at the same time."""
    groups, ours = query.shape[1] // key.shape[1], attention_mask is not None and attention_mask.dtype == query.dtype
    others = any(options.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    if groups == 1 or query.shape[2] == 1 or not ours or attention_mask.shape[1] != 1 or others:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
    b, _, k, d = query.shape
    packed = query.reshape(b, key.shape[1], groups * k, d)
    mask = attention_mask.expand(b, groups, k, -1).reshape(b, 1, groups * k, -1)
    out = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(b, -1, k, value.shape[3]).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(NAME, sibling_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextmanager
def attending(config: Any) -> Iterator[None]:
    """Inside, the model of `config` attends with `sibling_attention`, if it attends with "sdpa" outside. The last of
    several threads puts back what was there before the first."""
    with _lock:
        count, before = _in_use.get(id(config), (0, config._attn_implementation))
        used = before == "sdpa"
        if used:
            _in_use[id(config)] = (count + 1, before)
            config._attn_implementation = NAME
    try:
        yield
    finally:
        if used:
            with _lock:
                count, before = _in_use.pop(id(config))
                if count > 1:
                    _in_use[id(config)] = (count - 1, before)
                else:
                    config._attn_implementation = before
