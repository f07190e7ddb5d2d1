"""`temporal_attention` on tensors as models have them, against torch on views and behind the copies that models make.

Float32, forward, and forward and backward with gradients to q, k and v. Rivals are `scaled_dot_product_attention` with
positions and heads as its heads, which copies nothing and is torch's best, and on `(b t) h f d`, to which models
rearrange. The floor reads q, k and v and writes out, once.

X-CLIP: attention of the frames' messages alone, without projections, and one whole layer of its vision model, as
`transformers` has it and after `patch_video`, at B/32's and B/16's number of tokens. A layer's backward has gradients
to its input and all parameters.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastcontrast.ops import temporal_attention
from fastcontrast.testing.shapes import Clips, video

from . import _pytest
from . import _rivals as rivals
from ._harness import OURS, Bar, Floor, Provider, Step, Workload
from ._video import TOLERANCE, Problem, copy_free, make_problem, provider, rearranged, temporal_truth, tiny

COPY_FREE, REARRANGED = "torch, copy-free", "torch, rearranged"
LARGE = 32 << 20  # elements of q from which a rival's step takes a second
SMALL = 4 << 20  # and up to which it takes some milliseconds, of which the median of a few is noise
PASS = "one pass over q, k, v and out"
SHAPES = (
    "xclip_message", "clip4clip", "timesformer", "timesformer_long", "animatediff_l0", "animatediff_l1",
    "animatediff_l2", "animatediff_mid", "svd_l0", "svd_l1", "opensora",
)  # fmt: skip


def ours(problem: Problem) -> Tensor:
    return temporal_attention(problem.q, problem.k, problem.v, **problem.options)


def one_pass(q: Tensor, k: Tensor, v: Tensor) -> Step:
    out = torch.empty_like(q)

    def step() -> None:
        torch.addcmul(q, k, v, out=out)

    return step


def pass_over(problem: Problem) -> Step:
    return one_pass(*(x.detach() for x in (problem.q, problem.k, problem.v)))


def workload(shape: Clips, backward: bool, bars: bool = True) -> Workload:
    # Torch has no rule for padded queries: under its mask of keys they are computed like others.
    truth = partial(temporal_truth, backward=backward)
    of_rivals = partial(truth, padded_queries=True) if shape.ragged else None
    needs = 64 * shape.elements  # results, their truth, and one of them compared in float64
    providers = {
        OURS: provider(ours, backward, needs=needs),
        COPY_FREE: provider(copy_free, backward, needs=needs, truth=of_rivals),
        REARRANGED: provider(rearranged, backward, needs=needs, truth=of_rivals),
    }
    claims = [Bar(COPY_FREE, OURS, at_least=1.0)]
    if not backward and shape.name.startswith(("animatediff", "timesformer")):
        claims.append(Bar(REARRANGED, OURS, at_least=2.5))
    return Workload(
        shape.name if backward else f"{shape.name}, forward",
        shape,
        tiny(shape),
        make_problem,
        truth,
        providers,
        {PASS: Floor({"addcmul": pass_over})},
        tuple(claims) if bars else (),
        reps=3 if shape.elements > LARGE else 7 if shape.elements > SMALL else 25,
        tolerance=TOLERANCE,
    )


# -------------------------------------------------------------------------------------------------------------- X-CLIP


class Tokens(NamedTuple):
    """What a layer of X-CLIP's vision model gets; of messages alone, one token a frame."""

    name: str
    b: int
    f: int
    tokens: int
    width: int
    heads: int


class Hidden(NamedTuple):
    x: Tensor  # [B · F, L, C]
    upstream: Tensor  # [B · F, L, C]
    shape: Tokens


def make_hidden(shape: Tokens) -> Hidden:
    random = torch.Generator().manual_seed(0)
    size = (shape.b * shape.f, shape.tokens, shape.width)
    x = torch.randn(size, generator=random).requires_grad_()
    return Hidden(x, torch.randn(size, generator=random), shape)


@functools.cache
def layer(shape: Tokens, attention: str) -> nn.Module:
    """Of random weights, the same for each kind of attention; ImportError without transformers."""
    x_clip = rivals.need("transformers.models.x_clip.modeling_x_clip", "transformers")
    config = x_clip.XCLIPVisionConfig(
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        num_attention_heads=shape.heads,
        num_frames=shape.f,
        attn_implementation=attention,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return x_clip.XCLIPVisionEncoderLayer(config).eval()


def message_theirs(attention: str) -> Provider:
    """The module that transformers has for it, its four projections replaced by nothing."""

    def make(hidden: Hidden) -> Step:
        module = copy.deepcopy(layer(hidden.shape, attention).message_attn)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(module, name, nn.Identity())
        messages = hidden.x.detach()[:, 0].unflatten(0, (-1, hidden.shape.f))

        @torch.no_grad()
        def step() -> tuple[Tensor, ...]:
            return (module(messages)[0],)

        return step

    return Provider(make)


def message_ours(hidden: Hidden) -> Step:
    messages, heads = hidden.x.detach()[:, 0].unflatten(0, (-1, hidden.shape.f)), hidden.shape.heads

    @torch.no_grad()
    def step() -> tuple[Tensor, ...]:
        q = messages.unflatten(2, (heads, -1))[:, :, None]
        return (temporal_attention(q, q, q).flatten(2),)

    return step


def message_truth(hidden: Hidden) -> tuple[Tensor, ...]:
    q = hidden.x.detach()[:, 0].double().unflatten(0, (-1, hidden.shape.f)).unflatten(2, (hidden.shape.heads, -1))
    q = q.transpose(1, 2)  # [B, H, F, D]
    out = (q @ q.mT * q.shape[3] ** -0.5).softmax(-1) @ q
    return (out.transpose(1, 2).flatten(2),)


def message_pass(hidden: Hidden) -> Step:
    messages = hidden.x.detach()[:, 0]
    return one_pass(messages, messages, messages)


def message(shape: Tokens, bars: bool = True) -> Workload:
    eager, mine = "transformers, eager", f"{OURS}, on views"
    providers = {
        mine: Provider(message_ours),
        eager: message_theirs("eager"),
        "transformers, sdpa": message_theirs("sdpa"),
    }
    return Workload(
        "X-CLIP message attention, forward",
        shape,
        shape._replace(b=1),
        make_hidden,
        message_truth,
        providers,
        {PASS: Floor({"addcmul": message_pass})},
        (Bar(eager, mine, at_least=3.0),) if bars else (),
        reps=25,
        tolerance=TOLERANCE,
    )


def run_layer(block: nn.Module, x: Tensor, upstream: Tensor, backward: bool) -> tuple[Tensor, ...]:
    """Out and the gradients to its input and parameters, of a key's bias apart: it is 0, and what comes is rounding."""
    names, weights = zip(*block.named_parameters(), strict=True)
    with torch.set_grad_enabled(backward):
        out = block(x, *(None for _ in range(masks())))
        out = out[0] if isinstance(out, tuple) else out
    if not backward:
        return (out,)
    dx, *gradients = torch.autograd.grad(out, (x, *weights), upstream)
    kept = (g for name, g in zip(names, gradients, strict=True) if not name.endswith("k_proj.bias"))
    return (out.detach(), dx, *kept)


@functools.cache
def masks() -> int:
    """A layer takes one, and before transformers 5 a causal one besides."""
    x_clip = rivals.need("transformers.models.x_clip.modeling_x_clip", "transformers")
    parameters = inspect.signature(x_clip.XCLIPVisionEncoderLayer.forward).parameters
    return sum(name.endswith("attention_mask") for name in parameters)


def block_provider(change: Callable[[nn.Module], nn.Module], backward: bool) -> Provider:
    def make(hidden: Hidden) -> Step:
        block = change(layer(hidden.shape, "sdpa"))
        return lambda: run_layer(block, hidden.x, hidden.upstream, backward)

    return Provider(make)


def patched(block: nn.Module) -> nn.Module:
    from fastcontrast.integrations.transformers import patch_video

    return patch_video(copy.deepcopy(block))


def block_truth(hidden: Hidden, backward: bool) -> tuple[Tensor, ...]:
    """Float64, a clip at a time; the gradients to parameters add up over clips."""
    block = copy.deepcopy(layer(hidden.shape, "eager")).double()
    parts = [x.detach().double().split(hidden.shape.f) for x in (hidden.x, hidden.upstream)]
    clips = [
        run_layer(block, x.requires_grad_(backward), upstream, backward) for x, upstream in zip(*parts, strict=True)
    ]
    of_tokens = 2 if backward else 1  # out and the gradient to the input
    outputs = enumerate(zip(*clips, strict=True))
    return tuple(torch.cat(x) if i < of_tokens else torch.stack(x).sum(0) for i, x in outputs)


def block(shape: Tokens, backward: bool, bars: bool = True) -> Workload:
    mine, theirs = f"{OURS}, patch_video", "transformers, sdpa"
    name = f"X-CLIP block {shape.name}"
    return Workload(
        name if backward else f"{name}, forward",
        shape,
        shape._replace(b=1),
        make_hidden,
        partial(block_truth, backward=backward),
        {mine: block_provider(patched, backward), theirs: block_provider(lambda block: block, backward)},
        {},
        (Bar(theirs, mine, at_least=1.0),) if bars else (),
        reps=25 if shape.tokens < 100 else 7,
        tolerance=TOLERANCE,
    )


def workloads(quick: bool) -> list[Workload]:
    if quick:
        shapes = [tiny(video(name)) for name in ("clip4clip", "timesformer", "animatediff_l0", "opensora")]
        small = Tokens("tiny", 2, 4, 5, 32, 2)
        ops = [workload(shape, backward, bars=False) for shape in shapes for backward in (False, True)]
        return [*ops, message(small, bars=False), *(block(small, backward, bars=False) for backward in (False, True))]
    blocks = [block(Tokens(name, 8, 8, n, 768, 12), backward) for name, n in (("B/32", 50), ("B/16", 197))
              for backward in (False, True)]  # fmt: skip
    ops = [workload(video(name), backward) for name in SHAPES for backward in (False, True)]
    return [message(Tokens("message", 8, 8, 1, 768, 12)), *blocks, *ops]


def pytest_generate_tests(metafunc) -> None:
    _pytest.parametrise(metafunc, workloads)


def test_speed(benchmark, case) -> None:
    _pytest.measure(benchmark, case)
