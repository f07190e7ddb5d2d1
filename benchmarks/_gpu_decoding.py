"""Decoding on a CUDA device: its operations, whole searches, and what a step of search adds to the model's own work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastcontrast import contrastive_search

from . import contrastive_search as search
from . import contrastive_select, two_logit_mix
from ._harness import Bar, Row, Workload

MOST_SECONDS = 60e-6  # of the device, for everything in a step but the model


def workloads(op: str, quick: bool, device: str) -> list[Workload]:
    """Of one operation; [] if it is none of decoding."""
    if op == "contrastive_select":
        sizes = [(2, 5, 1000, 64, 64)] if quick else [(1, 5, 49152, 1024, 576), (1, 8, 128256, 4096, 4096)]
        return [moved(contrastive_select.workload(*size), device, torch.bfloat16, 2e-2) for size in sizes]
    if op == "two_logit_mix":
        mixes = [(2, 1000)] if quick else [(1, 128256), (16, 128256)]
        return [moved(two_logit_mix.adacad(*size), device, torch.float32, 1e-5) for size in mixes]
    if op == "contrastive_search":
        return search.workloads(quick, device)
    return []


def moved(workload: Workload, device: str, dtype: torch.dtype, tolerance: float) -> Workload:
    def inputs(shape: Any) -> Any:
        tensors = workload.inputs(shape)
        return type(tensors)(*(x.to(device, dtype) for x in tensors))

    return replace(workload, inputs=inputs, device=device, tolerance=tolerance)


# -------------------------------------------------------------------------------------------- a step beside the model


class Head(nn.Module):
    """The same logits [1, 1, V] whatever comes."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits, self.weight = logits, logits[0].T

    def forward(self, hidden: Tensor) -> Tensor:
        return self.logits


class Still(nn.Module):
    """A model whose forward pass costs the device nothing: hidden states are there, slots of the cache are claimed and
    after the prompt never written. What is left of a step is what search adds."""

    def __init__(self, config: Any, vocabulary: int, length: int, dtype: torch.dtype, device: str):
        super().__init__()
        random = torch.Generator(device).manual_seed(0)
        self.config, options = config, {"generator": random, "dtype": dtype, "device": device}
        self.hidden = torch.randn(1, length, config.hidden_size, **options)
        self.head = Head(torch.randn(1, 1, vocabulary, **options))
        self.state = torch.zeros(1, config.num_key_value_heads, length, config.head_dim, dtype=dtype, device=device)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, past_key_values: Any = None, **_: Any):
        count = input_ids.shape[1]
        for layer in past_key_values.layers:
            if layer.store is None:
                layer.update(self.state, self.state)
            else:
                layer.length += count
        return SimpleNamespace(logits=self.head(self.hidden[:, :count]))


def device_seconds(run: Callable[[], object], device: str) -> float:
    """Seconds that kernels ran, gaps between them not counted. Without a CUDA device: those of the CPU's operators."""
    from torch.autograd import DeviceType
    from torch.profiler import profile

    wanted = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    spent = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    with profile() as found:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    return sum(getattr(event, spent) for event in found.key_averages() if event.device_type == wanted) / 1e6


def step_beside_the_model(quick: bool, reps: int | None, device: str = "cuda") -> list[Row]:
    """Device seconds a token of a search over T = 4,096, d = 4,096, k = 8, V = 128,256, 32 layers of 8 × 128."""
    transformers = search.transformers()
    t, d, v, layers, heads, k, new = (64, 32, 1000, 2, 2, 3, 4) if quick else (4096, 4096, 128256, 32, 32, 8, 32)
    config = transformers.LlamaConfig(
        hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=min(8, heads),
        vocab_size=v,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model = Still(config, v, t, torch.bfloat16, device).eval()
    ids = torch.ones(1, t, dtype=torch.int64, device=device)

    def run(tokens: int) -> float:
        length = transformers.MaxLengthCriteria(max_length=t + tokens)
        generation = transformers.GenerationConfig(max_length=t + tokens, do_sample=False)
        criteria = transformers.StoppingCriteriaList([length])
        none = transformers.LogitsProcessorList()
        return device_seconds(
            lambda: contrastive_search(model, ids, none, criteria, generation, penalty_alpha=0.6, top_k=k), device
        )

    run(2)
    row = Row("contrastive_search", f"beside the model, T = {t:,}, d = {d:,}, k = {k}", "fastcontrast, tree")
    row.timed([(run(new + 1) - run(1)) / new for _ in range(reps or (2 if quick else 5))])
    row.note = "device time a token"
    row.judge(Bar("fastcontrast, tree", at_most=MOST_SECONDS), row.seconds)
    return [row]


def measurements(op: str) -> dict[str, Callable[[bool, int | None], list[Row]]]:
    return {"beside the model": step_beside_the_model} if op == "contrastive_search" else {}
