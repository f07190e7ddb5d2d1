"""What the tests of prefixes share: language models so small that they can be checked by hand, and a tokenizer."""

from types import SimpleNamespace

import torch
from decoding import make
from recipes import waves
from torch import nn

END = 2


class _Body(nn.Module):
    def forward(self, inputs_embeds, use_cache):
        return SimpleNamespace(last_hidden_state=inputs_embeds.cumsum(1).tanh())


class Causal(nn.Module):
    """hidden_t = tanh(Σ_{s ≤ t} input_s), in float64, with the parts that transformers' models have."""

    def __init__(self, vocabulary: int = 11, width: int = 4):
        super().__init__()
        self.base_model, self.embedding = _Body(), nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, vocabulary)
        self.double()
        with torch.no_grad():
            for c, x in enumerate((self.embedding.weight, self.head.weight, self.head.bias[:, None])):
                x.copy_(waves(*x.shape, c))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


class Words:
    """A tokenizer of the 26 letters, after three special tokens; a quote ends a text."""

    def __call__(self, text):
        return SimpleNamespace(input_ids=[END if c == '"' else 3 + (ord(c) - ord("a")) % 26 for c in text])

    def decode(self, ids):
        return "".join(chr(ord("a") + i - 3) for i in ids if 3 <= i < 29)


def language_model():
    """Stands in for SmolLM2's first layers: a random Llama."""
    return make("llama"), Words()
