"""Losses of other packages behind one signature: `rival(...)` gives `loss(queries, keys, scale) -> Tensor`.

A factory raises ImportError with the package's name when it is not installed. Nothing here changes what a rival
computes; where one normalises its inputs, the benchmark normalises for the others.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from fastcontrast._torchvision import declare_torchvision_operators

SCALE = 1 / 0.07  # of the benchmark's batches
Loss = Callable[[Tensor, Tensor, "Tensor | float"], Tensor]


def need(module: str, package: str) -> ModuleType:
    """The module, or ImportError that says what to install."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise ImportError(f"{package} is not installed")
    declare_torchvision_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


@functools.cache
def _open_clip_loss() -> ModuleType:
    """open_clip/loss.py by its path: it needs torch alone, the package torchvision and timm."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("open_clip_torch is not installed")
    path = Path(spec.submodule_search_locations[0]) / "loss.py"
    loss = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(loss)
    loss.loader.exec_module(module)
    return module


def open_clip() -> Loss:
    """open_clip.ClipLoss on one process; its `logit_scale` comes exponentiated."""
    return _open_clip_loss().ClipLoss()


def open_clip_siglip() -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    return _open_clip_loss().SigLipLoss()


def lightly_nt_xent(scale: float) -> Loss:
    loss = need("lightly.loss.ntx_ent_loss", "lightly").NTXentLoss(temperature=1 / scale)
    return lambda view1, view2, _: loss(view1, view2)


def metric_learning_nt_xent(scale: float) -> Loss:
    """pytorch_metric_learning.losses.NTXentLoss with one label a pair, which makes it SimCLR's."""
    loss = need("pytorch_metric_learning.losses", "pytorch-metric-learning").NTXentLoss(temperature=1 / scale)

    def call(view1: Tensor, view2: Tensor, _: Tensor | float) -> Tensor:
        return loss(torch.cat([view1, view2]), torch.arange(view1.shape[0]).repeat(2))

    return call


def metric_learning_supcon(scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    return need("pytorch_metric_learning.losses", "pytorch-metric-learning").SupConLoss(temperature=1 / scale)


def sentence_transformers_cached(scale: float, mini_batch: int) -> Callable[[list[list[Tensor]]], Tensor]:
    """Loss stage of CachedMultipleNegativesRankingLoss: `stage([query chunks, document chunks])`, leaves of
    `mini_batch` rows, leaves its gradients in their `.grad`, as its trainer calls it."""
    losses = need("sentence_transformers.sentence_transformer.losses", "sentence-transformers")
    model = nn.Sequential(nn.Identity())  # asked only for the kind of its first module
    loss = losses.CachedMultipleNegativesRankingLoss(model, scale=scale, mini_batch_size=mini_batch)
    return lambda reps: loss.calculate_loss(reps, with_backward=True)


# Rivals on a GPU: `loss(queries, keys, scale, bias)`. Temperatures that they take as numbers are the benchmark's.


def memeff_clip() -> Callable[..., Tensor]:
    loss = need("memeff", "memeff").MemoryEfficientCLIPLoss(temperature=1 / SCALE, normalized_inputs=True, stable=False)
    return lambda queries, keys, scale, bias: loss(queries, keys)


def inf_cl() -> Callable[..., Tensor]:
    """Both directions, as its README adds them; its width must be a multiple of 256."""
    loss = need("inf_cl", "inf-cl").cal_inf_loss

    def call(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return (loss(SCALE * queries, keys) + loss(SCALE * keys, queries)) / 2

    return call


def cut_cross_entropy_clip() -> Callable[..., Tensor]:
    loss = need("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy

    def call(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        target = torch.arange(len(queries), device=queries.device)
        return (loss(SCALE * queries, keys, target) + loss(SCALE * keys, queries, target)) / 2

    return call


def siglip_kernel() -> Callable[..., Tensor]:
    loss = need("siglip_kernel", "siglip-kernel").fused_siglip_loss
    return lambda queries, keys, scale, bias: loss(queries, keys, scale.log(), bias)


def cut_cross_entropy() -> Callable[..., Tensor]:
    """`loss(hidden, weight, targets)`; no gradient is left out as small."""
    loss = need("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    return lambda hidden, weight, targets: loss(hidden, weight, targets, filter_eps=None)


def liger_cross_entropy() -> Callable[..., Tensor]:
    loss = need("liger_kernel.transformers", "liger-kernel").LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, targets: loss(weight, hidden, targets)


def liger_kl() -> Callable[..., Tensor]:
    """Of a student's head from probabilities that a teacher's head gives densely."""
    loss = need("liger_kernel.transformers", "liger-kernel").LigerFusedLinearKLDivLoss()

    def call(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        with torch.no_grad():
            taught = (teacher_hidden @ teacher_weight.T).float().softmax(1)
        return loss(hidden, weight, taught)

    return call


def compiled(loss: Callable) -> Callable:
    """Plain torch under its own compiler."""
    torch._dynamo.reset()
    torch._inductor.config.compile_threads = 1  # no pool of processes that would outlive the compilation
    return torch.compile(loss, dynamic=False)
