"""Language models small enough to train here: byte-pair vocabularies, packed blocks, a Llama, and its loss.

tokenizer = vocabulary(texts, 4096)
blocks = pack(tokenizer, texts, 128)                           # [N, 129]: inputs are all but the last token
model = llama(len_of(tokenizer), width=256, layers=4)
loss = next_token_loss(model, blocks)
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastcontrast.data import cache_folder, write_whole
from fastcontrast.ops import linear_cross_entropy, linear_logprob

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

END = "<|end|>"  # after every text; always id 0
IGNORED = -100


def vocabulary(texts: Sequence[str], size: int, special: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE tokenizer of `size` entries learned from texts, kept in `cache_folder()`. `END` is id 0, further
    special tokens follow. Numbers rise as tokens become rarer: they are in order of merging."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    key = hashlib.sha256(json.dumps([size, [*special], *texts]).encode()).hexdigest()[:24]
    path = cache_folder() / f"bpe-{key}.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=[END, *special], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    write_whole(path, lambda part: tokenizer.save(str(part)))
    return tokenizer


def pack(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> Tensor:
    """Texts one after another, `END` after each, cut into blocks [N, length + 1] that overlap by a token; what is left
    over is dropped."""
    ids = [i for one in tokenizer.encode_batch([text + END for text in texts]) for i in one.ids]
    count = max(0, len(ids) - 1) // length
    if not count:
        return torch.empty(0, length + 1, dtype=torch.int64)
    return torch.tensor(ids[: count * length + 1]).unfold(0, length + 1, length)


def llama(
    vocabulary: int, *, width: int = 256, layers: int = 4, heads: int = 4, kv_heads: int | None = None,
    hidden: int | None = None, longest: int = 512, tied: bool = True,
) -> LlamaForCausalLM:  # fmt: skip
    """An untrained Llama: RMSNorm, rotary embedding, gated SiLU (`hidden` wide, default 8/3 of the width), no bias."""
    from fastcontrast._torchvision import declare_torchvision_operators

    declare_torchvision_operators()
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=hidden or 8 * width // 24 * 8,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads or heads,
            max_position_embeddings=longest, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0,
            pad_token_id=None,
        )
    )  # fmt: skip


def states(model: LlamaForCausalLM, ids: Tensor) -> Tensor:  # [B, T] -> [B, T, D]
    """What the head multiplies: the last layer's states after the norm."""
    return model.model(input_ids=ids, use_cache=False).last_hidden_state


def next_token_loss(model: LlamaForCausalLM, blocks: Tensor) -> Tensor:  # [B, T + 1]
    """Mean cross-entropy of each token given those before it; the logits are never stored."""
    return linear_cross_entropy(states(model, blocks[:, :-1]), model.lm_head.weight, blocks[:, 1:])


def token_logprobs(model: LlamaForCausalLM, blocks: Tensor) -> Tensor:  # [B, T + 1] -> [B, T]
    """log p of each token but the first, given those before it."""
    return linear_logprob(states(model, blocks[:, :-1]), model.lm_head.weight, blocks[:, 1:])


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, blocks: Tensor, batch: int = 32) -> float:  # [N, T + 1]
    """exp of the mean cross-entropy, without dropout; the mode stays as it was."""
    training = model.training
    model.eval()
    total = sum(next_token_loss(model, part).item() * len(part) for part in blocks.split(batch))
    model.train(training)
    return math.exp(total / len(blocks))
