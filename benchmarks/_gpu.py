"""The same comparisons on a CUDA device, in bfloat16 unless said: `fastcontrast bench --gpu`.

A *product* is one matrix product of 2·M·N·D FLOP by the library, in the inputs' precision. Gradients go to both
features (and where ours computes them, scale and bias); nobody normalises. Truth is float64 on the inputs as rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcontrast import clip_loss, info_nce, siglip_loss
from fastcontrast.ops import similarity_lse
from fastcontrast.testing.shapes import Shape

from . import _gpu_attention as attention
from . import _gpu_decoding as decoding
from . import _language as language
from . import _rivals as rivals
from . import linear_cross_entropy, linear_kl, maxsim, triplet_distances
from ._harness import OURS, Bar, Floor, Provider, Row, Step, Workload
from ._pairs import Batch, make_batch, siglip_truth, truth

MIB = 1 << 20
TOLERANCE = 2e-2  # of bfloat16: features and gradients are rounded to 8 bits
CHUNK = 8192  # rows of the floors' logits
SIZES = (1024, 4096, 8192, 16384, 32768, 65536)


def shape(n: int, d: int) -> Shape:
    return Shape(f"batch_{n}", n, n, d)


def batch_on(device: str, dtype: torch.dtype, problem: Shape) -> Batch:
    return make_batch(problem, device, dtype)


# ------------------------------------------------------------------------------------------------------------- floors


def chunked(products: int, batch: Batch) -> Step:
    """4: logits twice, and both gradients; 3: logits once; 2: one gradient; 1: logits alone. By chunks of rows."""
    q, k = batch.queries.detach(), batch.keys.detach()
    n, dq, dk = len(q), torch.empty_like(q), torch.zeros_like(k)
    buffer = torch.empty(min(n, CHUNK), len(k), dtype=q.dtype, device=q.device)

    def step() -> None:
        for i in range(0, n, CHUNK):
            rows = slice(i, min(i + CHUNK, n))
            logits = buffer[: rows.stop - i]
            for _ in range(2 if products == 4 else 1):
                torch.mm(q[rows], k.T, out=logits)
            if products > 1:
                torch.mm(logits, k, out=dq[rows])
            if products > 2:
                dk.addmm_(logits.T, q[rows])

    return step


def floor(products: int) -> dict[str, Floor]:
    return {f"{products} products": Floor({f"chunks of {CHUNK} rows": partial(chunked, products)})}


# ----------------------------------------------------------------------------------------------------------- providers


def provider(loss: Callable[[], Callable], *gradients: str, forward_only: bool = False, **options) -> Provider:
    """`loss()(queries, keys, scale, bias)`, forward and backward; value and gradients to the named fields come out."""

    def make(batch: Batch) -> Step:
        function = loss()
        fields = ("queries", "keys", "scale", "bias")
        inputs = [x if name in gradients else x.detach() for name in fields for x in (getattr(batch, name),)]
        wanted = [getattr(batch, name) for name in gradients]

        def step() -> tuple[Tensor, ...]:
            with torch.set_grad_enabled(not forward_only):
                value = function(*inputs)
            return (value.detach(), *(torch.autograd.grad(value, wanted) if wanted else ()))

        return step

    return Provider(make, memory=True, **options)


PAIR = ("queries", "keys")


def dense_clip(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """What training code writes: logits in the features' precision, log-softmax in float32."""
    logits = (scale * (queries @ keys.T)).float()
    target = torch.arange(len(queries), device=queries.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def dense_info_nce(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    target = torch.arange(len(queries), device=queries.device)
    return F.cross_entropy((scale * (queries @ keys.T)).float(), target)


def dense_siglip(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = (scale * (queries @ keys.T) + bias).float()
    return F.softplus(logits).sum() / len(queries) - logits.diagonal().mean()


def lse_of_rows(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    r, own = similarity_lse(queries, keys, scale, return_positives=True)
    return (r - own).mean()


# ----------------------------------------------------------------------------------------------------------- workloads


def clip(device: str, n: int, d: int, dtype=torch.bfloat16, compile: bool = False, most_ms: float | None = None):
    logits = 4 * n * n
    rival = partial(provider, needs=6 * logits)
    providers = {
        "fastcontrast": provider(lambda: lambda q, k, s, b: clip_loss(q, k, s), *PAIR),
        "memeff": provider(rivals.memeff_clip, *PAIR),
        "inf-cl": provider(rivals.inf_cl, *PAIR, reps=3),
        "cut-cross-entropy": provider(rivals.cut_cross_entropy_clip, *PAIR),
        "dense torch": rival(lambda: dense_clip, *PAIR),
    }
    if compile:
        providers["dense torch, compiled"] = rival(lambda: rivals.compiled(dense_clip), *PAIR, compiles=True)
    bars = [Bar(name, "fastcontrast", at_least=1.0) for name in providers if name != "fastcontrast"]
    if most_ms is not None:
        bars.append(Bar("fastcontrast", at_most=most_ms / 1e3))
    if n >= 4096:
        memory = 2 * n * d * 2 + 8 * n * d + 64 * MIB + 512 * MIB  # with the default workspace
        bars.append(Bar("fastcontrast", at_most=memory, what="peak_extra_bytes"))
    exact = partial(truth, "clip", scale=False)
    return workload(f"clip {n} × {d}", device, n, d, dtype, exact, providers, floor(4), tuple(bars))


def frozen(device: str, n: int, d: int, most_ms: float | None = None):
    providers = {
        "fastcontrast": provider(lambda: lambda q, k, s, b: info_nce(q, k, s), "queries"),
        "dense torch": provider(lambda: dense_info_nce, "queries", needs=24 * n * n),
    }
    bars = [Bar("dense torch", "fastcontrast", at_least=1.0)]
    bars += [] if most_ms is None else [Bar("fastcontrast", at_most=most_ms / 1e3)]
    exact = partial(truth, "info_nce", scale=False, keys=False)
    label = f"info_nce, keys frozen {n} × {d}"
    return workload(label, device, n, d, torch.bfloat16, exact, providers, floor(2), tuple(bars))


def forward_alone(device: str, n: int, d: int, most_ms: float | None = None):
    providers = {"fastcontrast": provider(lambda: lse_of_rows, forward_only=True)}
    bars = () if most_ms is None else (Bar("fastcontrast", at_most=most_ms / 1e3),)

    def exact(batch: Batch) -> tuple[Tensor, ...]:
        return truth("info_nce", batch, scale=False, keys=False)[:1]

    return workload(f"rows, forward {n} × {d}", device, n, d, torch.bfloat16, exact, providers, floor(1), bars)


def siglip(device: str, n: int, d: int, compile: bool = False, most_ms: float | None = None):
    rival = partial(provider, needs=24 * n * n)
    everything = (*PAIR, "scale", "bias")
    providers = {
        "fastcontrast": provider(lambda: siglip_loss, *everything),
        "siglip-kernel": provider(rivals.siglip_kernel, *everything),
        "dense torch": rival(lambda: dense_siglip, *everything),
    }
    if compile:
        providers["dense torch, compiled"] = rival(lambda: rivals.compiled(dense_siglip), *everything, compiles=True)
    bars = [Bar(name, "fastcontrast", at_least=1.0) for name in providers if name != "fastcontrast"]
    bars += [] if most_ms is None else [Bar("fastcontrast", at_most=most_ms / 1e3)]
    return workload(f"siglip {n} × {d}", device, n, d, torch.bfloat16, siglip_truth, providers, floor(3), tuple(bars))


def head(name: str, device: str, shape: Shape, products: int, loss: Callable, providers: dict, rivals: tuple[str, ...]):
    """A language-model head, mean over tokens."""
    whole = language.workload(name, shape, loss, products, providers)
    bars = tuple(Bar(name, "fastcontrast", at_least=1.0) for name in rivals)
    return Workload(**{
        **vars(whole), "inputs": partial(tokens_on, device), "floors": floor(products), "bars": bars,
        "tolerance": TOLERANCE, "device": device, "reps": 5,
    })  # fmt: skip


def tokens_on(device: str, shape: Shape) -> language.Tokens:
    return language.make_tokens(shape, device, torch.bfloat16)


def cross_entropy(device: str, shape: Shape):
    def on_tokens(make: Callable[[], Callable]) -> Provider:
        def loss() -> Callable:
            function = make()
            return lambda tokens: function(tokens.hidden, tokens.weight, tokens.targets)

        return language.provider(loss)

    dense = language.provider(lambda: linear_cross_entropy.dense, needs=16 * shape.m * shape.n)
    others = {
        "cut-cross-entropy": on_tokens(rivals.cut_cross_entropy),
        "liger-kernel": on_tokens(rivals.liger_cross_entropy),
        "dense torch": dense,
    }
    providers = {"fastcontrast": language.provider(lambda: linear_cross_entropy.ours), **others}
    return head("cross entropy", device, shape, 3, language.cross_entropy, providers, tuple(others))


def divergence(device: str, shape: Shape):
    def liger() -> Callable:
        loss = rivals.liger_kl()
        return lambda tokens: loss(*linear_kl.heads(tokens))

    others = {
        "liger-kernel, teacher dense": language.provider(liger, needs=16 * shape.m * shape.n),
        "dense torch": language.provider(lambda: linear_kl.dense, needs=28 * shape.m * shape.n),
    }
    providers = {"fastcontrast": language.provider(lambda: linear_kl.ours), **others}
    return head("forward KL", device, shape, 4, language.forward_kl, providers, tuple(others))


def moved(device: str, dtype: torch.dtype, whole: Workload) -> Workload:
    """`whole`, a workload of the CPU, on the device: never slower than what torch does there."""

    def inputs(shape: object) -> tuple:
        problem = whole.inputs(shape)
        return type(problem)(*(x.to(device, dtype) for x in problem))

    bars = tuple(Bar(name, OURS, at_least=1.0) for name in whole.providers if name != OURS)
    tolerance = whole.tolerance if dtype == torch.float32 else TOLERANCE
    return replace(whole, inputs=inputs, bars=bars, tolerance=tolerance, device=device)


def workload(name, device, n, d, dtype, exact, providers, floors, bars) -> Workload:
    tolerance = TOLERANCE if dtype != torch.float32 else 1e-4
    return Workload(
        name, shape(n, d), shape(64, d), partial(batch_on, device, dtype), exact, providers, floors, bars,
        tolerance=tolerance, device=device, reps=7 if n < 32768 else 5,
    )  # fmt: skip


def workloads(op: str, quick: bool, device: str = "cuda") -> list[Workload]:
    """Of one operation, most telling first: a run that is cut short has them. [] if the operation has none."""
    most = {
        "similarity_lse": _lse, "similarity_softplus": _softplus, "linear_cross_entropy": _cross_entropy,
        "linear_kl": _kl,
    }  # fmt: skip
    if op in most:
        return most[op](quick, device)
    # In bfloat16 dense torch rounds scores before it takes their maximum: a tenth of its gradients go elsewhere.
    of_cpu = {"maxsim": (maxsim, torch.float32), "triplet_distances": (triplet_distances, torch.bfloat16)}
    if op in of_cpu:
        module, dtype = of_cpu[op]
        return [moved(device, dtype, whole) for whole in module.workloads(quick)]
    return decoding.workloads(op, quick, device) or attention.workloads(op, quick, device)


def measurements(op: str) -> dict[str, Callable[[bool, int | None], list[Row]]]:
    """What fits no workload, by name."""
    return decoding.measurements(op)


def _lse(quick: bool, device: str) -> list[Workload]:
    if quick:
        return [clip(device, 256, 64), frozen(device, 256, 64), forward_alone(device, 256, 64)]
    return [
        clip(device, 65536, 768, compile=True, most_ms=43),
        clip(device, 65536, 512, most_ms=30),
        clip(device, 65536, 1024, most_ms=56),
        forward_alone(device, 65536, 768, most_ms=12.5),
        frozen(device, 65536, 768, most_ms=22),
        clip(device, 1024, 512, compile=True),
        *(clip(device, n, 768) for n in SIZES[1:5]),
        clip(device, 8192, 512, dtype=torch.float32),
    ]


def _cross_entropy(quick: bool, device: str) -> list[Workload]:
    return [cross_entropy(device, shape) for shape in _heads(quick)]


def _kl(quick: bool, device: str) -> list[Workload]:
    return [divergence(device, shape) for shape in _heads(quick)]


def _heads(quick: bool) -> tuple[Shape, ...]:
    return (language.TINY,) if quick else (language.SMOLLM2, language.PINTS)


def _softplus(quick: bool, device: str) -> list[Workload]:
    if quick:
        return [siglip(device, 256, 64)]
    return [
        siglip(device, 65536, 768, compile=True, most_ms=33),
        siglip(device, 1024, 768, compile=True),
        *(siglip(device, n, 768) for n in SIZES[1:5]),
    ]
