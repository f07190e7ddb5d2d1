"""Names of X-CLIP's weights in transformers, and here."""

from __future__ import annotations

import torch
from torch import Tensor

# Parts of names in transformers and here, replaced in this order.
NAMES = {
    "vision_model.embeddings.class_embedding": "vision.class_token",
    "vision_model.embeddings.patch_embedding": "vision.patches",
    "vision_model.embeddings.position_embedding.weight": "vision.positions",
    "vision_model.pre_layernorm": "vision.norm_pre",
    "vision_model.post_layernorm": "vision.norm_post",
    "vision_model.encoder.layers": "vision.blocks",
    "prompts_visual_layernorm": "prompt_norm",
    "prompts_visual_projection": "prompt_projection.weight",
    "visual_projection": "projection",
    "logit_scale": "log_scale",
    "mit.position_embedding": "mit.positions",
    "mit.encoder.layers": "mit.blocks",
    "prompts_generator.layernorm": "prompt.norm",
    "prompts_generator.decoder": "prompt.layers",
    "prompts_generator": "prompt",
    "message_fc": "message",
    "message_ln": "message_norm",
    "message_attn": "message_attention",
    "self_attn": "attention",
    "cross_attn.q_proj": "query",
    "cross_attn.kv_proj": "key_value",
    "cross_attn.proj": "out",
    "qkv_proj": "qkv",
    "out_proj": "out",
    "layer_norm": "norm",
    "norm3": "norm2",
    "mlp.fc1": "ffn.0",
    "mlp.fc2": "ffn.2",
    "mlp.0": "ffn.0",
    "mlp.3": "ffn.2",
}


def our_weights(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of `XClip` from that of `XCLIPModel`: products packed side by side, names changed, texts left out."""
    found = {}
    for name, value in theirs.items():
        if name.startswith("text_"):
            continue
        if ".k_proj." in name or ".v_proj." in name:
            continue  # with the queries, or with the keys
        if ".q_proj." in name:
            keys, values = (theirs[name.replace(".q_proj.", f".{part}_proj.")] for part in "kv")
            if "cross_attn" in name:
                found[our_name(name.replace("q_proj", "kv_proj"))] = torch.cat([keys, values])
            else:
                name, value = name.replace("q_proj", "qkv_proj"), torch.cat([value, keys, values])
        found[our_name(name)] = value
    return found


def our_name(name: str) -> str:
    for part, ours in NAMES.items():
        name = name.replace(part, ours)
    return name
