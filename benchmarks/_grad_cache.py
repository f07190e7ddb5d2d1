"""What keeping K of C graphs saves: a step should cost (3 + (C − K)/C) / 4 of one that keeps none.

That line holds where backward costs two forwards. Wide square layers are that case: every product of the forward has
two of its size in the backward, and activations cost little beside them (at width 1024 the page faults of keeping
100 MB already cost 5 points).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcontrast import GradCache
from fastcontrast.testing.shapes import Shape

from ._harness import Bar, Provider, Step, Workload

DEPTH, CHUNKS, KEPT = 3, 8, (0, 2, 4, 6, 8)
POINTS = 0.05  # how far a ratio may lie above its line


class Encoder(NamedTuple):
    model: nn.Module
    inputs: Tensor  # [N, D], with gradient, so that the first layer's backward is two products as well

    @property
    def leaves(self) -> list[Tensor]:
        return [self.inputs, *self.model.parameters()]


def make_encoder(shape: Shape) -> Encoder:
    torch.manual_seed(0)
    width = shape.d
    # Smooth, since a ReLU that flips with the rounding of a product of another size makes an error of 1e-4.
    layers = [part for _ in range(DEPTH) for part in (nn.Linear(width, width, bias=False), nn.Tanh())]
    return Encoder(nn.Sequential(*layers[:-1]), torch.randn(shape.m, width, requires_grad=True))


def pairs_loss(reps: Tensor) -> Tensor:
    """Neighbouring rows are pairs. Small against the encoder, as it is in training."""
    q, k = F.normalize(reps, dim=-1).view(-1, 2, reps.shape[-1]).unbind(1)
    return F.cross_entropy(20.0 * q @ k.T, torch.arange(len(q)))


def whole_batch(encoder: Encoder) -> tuple[Tensor, ...]:
    return torch.autograd.grad(pairs_loss(encoder.model(encoder.inputs)), encoder.leaves)


def chunked(keep: int) -> Provider:
    def make(encoder: Encoder) -> Step:
        step = GradCache([encoder.model], len(encoder.inputs) // CHUNKS, pairs_loss, keep_graphs=keep)

        def run() -> tuple[Tensor, ...]:
            for leaf in encoder.leaves:
                leaf.grad = None
            step(encoder.inputs)
            return tuple(leaf.grad for leaf in encoder.leaves)

        return run

    return Provider(make)


def workload(quick: bool) -> Workload:
    """Every provider must give the gradients of the whole batch at once."""
    width = 1024 if quick else 2048
    shape = Shape(f"mlp_{width}", CHUNKS * 256, CHUNKS * 256, width)
    names = {keep: f"fastcontrast, {keep} of {CHUNKS} graphs kept" for keep in KEPT}
    lines = {keep: (3 + (CHUNKS - keep) / CHUNKS) / 4 for keep in KEPT[1:]}
    bars = tuple(Bar(names[keep], names[0], at_most=round(line + POINTS, 4)) for keep, line in lines.items())
    providers = {name: chunked(keep) for keep, name in names.items()}
    providers["whole batch at once"] = Provider(lambda encoder: lambda: whole_batch(encoder))
    tiny = Shape("tiny", 64, 64, 32)
    label = f"GradCache, MLP {DEPTH} × {width}"
    return Workload(label, shape, tiny, make_encoder, whole_batch, providers, {}, () if quick else bars)
