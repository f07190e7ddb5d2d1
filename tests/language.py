"""What the tests of language-model heads share: hidden states, a vocabulary and a bias, under the names that
`similarity.evaluate` knows (queries, keys, key_bias)."""

import torch
from similarity import generator

LEAVES = ("queries", "keys", "key_bias")


def head(tokens: int, vocabulary: int, width: int, dtype=torch.float32, seed: int = 0) -> dict:
    """Logits of a few units, as a head has them; every third token well predicted."""
    random = generator(seed)
    w = torch.randn(vocabulary, width, generator=random)
    h = torch.randn(tokens, width, generator=random) * 2 / max(width, 1) ** 0.5
    h[::3] *= 3
    bias = torch.randn(vocabulary, generator=random)
    return {"queries": h.to(dtype), "keys": w.to(dtype), "key_bias": bias}


def targets(tokens: int, vocabulary: int, ignored: float = 0.3, seed: int = 7, ignore_index: int = -100):
    random = generator(seed)
    chosen = torch.randint(0, max(vocabulary, 1), (tokens,), generator=random)
    return chosen.masked_fill(torch.rand(tokens, generator=random) < ignored, ignore_index)


def named(op):
    """`op` under the names of `similarity.evaluate`."""

    def call(queries, keys, key_bias=None, **options):
        return op(queries, keys, bias=key_bias, **options)

    return call


def waves(rows: int, width: int, shift: float) -> torch.Tensor:
    """F(n, d, c)[i, k] = sin(1 + c + 0.7 i + 1.3 k + 0.11 i k) in float64, of which golden values are known."""
    i, k = torch.arange(rows).double()[:, None], torch.arange(width).double()
    return torch.sin(1 + shift + 0.7 * i + 1.3 * k + 0.11 * i * k)
