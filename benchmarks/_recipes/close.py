"""CLOSE: the loss of T5-base's vocabulary behind 4 tokens, batch 128, texts of 32 tokens; all of the model learns."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast.recipes._shared.prefix import prefix_loss

from .._harness import OURS, Bar, Workload
from . import against_dense

Shape = tuple[int, int, int, int, int]  # B, S, T, D, V
END = 0


class Bare:
    """A language model whose body passes states on as they are: what is measured is the loss."""

    base_model = staticmethod(lambda inputs_embeds, use_cache: SimpleNamespace(last_hidden_state=inputs_embeds))

    def __init__(self, states: Tensor, weight: Tensor):  # [B, T − 1, D], [V, D]
        self.states, self.weight = states, weight

    def get_input_embeddings(self) -> Embeddings:
        return Embeddings(self.states)

    def get_output_embeddings(self) -> SimpleNamespace:
        return SimpleNamespace(weight=self.weight, bias=None)


class Embeddings:
    def __init__(self, states: Tensor):
        self.states, self.embedding_dim = states, states.shape[-1]

    def __call__(self, captions: Tensor) -> Tensor:
        return self.states


def inputs(shape: Shape, frozen: bool = False) -> tuple[Tensor, ...]:
    """Prefix, the states behind it, the head and captions of full length."""
    b, s, t, d, v = shape
    generator = torch.Generator().manual_seed(0)
    prefix, states = (torch.randn(b, n, d, generator=generator) for n in (s, t - 1))
    weight = torch.randn(v, d, generator=generator) / d**0.5
    captions = torch.randint(END + 1, v, (b, t), generator=generator)
    return prefix.requires_grad_(), states.requires_grad_(), weight.requires_grad_(not frozen), captions


def ours(prefix: Tensor, states: Tensor, weight: Tensor, captions: Tensor) -> Tensor:
    return prefix_loss(Bare(states, weight), prefix, captions, END)


def dense(prefix: Tensor, states: Tensor, weight: Tensor, captions: Tensor) -> Tensor:
    hidden = torch.cat([prefix[:, -1:], states], 1)
    return F.cross_entropy((hidden @ weight.T).flatten(0, 1), captions.flatten())


def workload(name: str, shape: Shape, products: int, quick: bool, frozen: bool = False) -> Workload:
    b, s, t, d, v = shape
    return against_dense(
        f"{name} {b}·{t} tokens × {d}, vocabulary {v}", shape, (2, s, 8, 32, 512), lambda shape: inputs(shape, frozen),
        ours, dense, products=[(b * t, v, d, products)], compile=not quick, needs=16 * b * t * v, reps=5,
        bars=() if quick else (
            Bar("dense torch", OURS, at_least=10, what="peak_extra_bytes"),
            Bar("dense torch", OURS, at_least=1.0),
            Bar(OURS, "products", at_most=1.25),
        ),
    )  # fmt: skip


def workloads(quick: bool) -> list[Workload]:
    shape = (8, 4, 16, 64, 4096) if quick else (128, 4, 32, 768, 32_128)
    return [workload("close", shape, 3, quick)]
