"""Contrastive search by `generate`: against greedy search of the same model, and against the form it used to have.

GPT-2 small with random weights, and SmolLM2-135M (its real weights where they are installed, else random ones of its
shape), batch 1, fp32, 128 new tokens after the prompt is read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcontrast import contrastive_search
from fastcontrast.testing.shapes import Shape

from . import _pytest
from ._harness import Bar, Provider, Step, Workload
from ._rivals import need

NEW, ALPHA = 128, 0.6


class Text(NamedTuple):
    model: Any
    ids: Tensor  # [1, L]
    k: int


@functools.cache
def gpt2() -> Any:
    library = transformers()
    torch.manual_seed(0)
    return library.GPT2LMHeadModel(library.GPT2Config(n_positions=2048)).eval()


@functools.cache
def smollm2() -> Any:
    from fastcontrast.data import MissingDataError

    try:
        from fastcontrast.smollm2 import load

        return load()[0]
    except MissingDataError:
        library = transformers()
        torch.manual_seed(0)
        config = library.LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
        )  # fmt: skip
        return library.LlamaForCausalLM(config).eval()


@functools.cache
def small() -> Any:
    library = transformers()
    torch.manual_seed(0)
    return library.GPT2LMHeadModel(library.GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=99)).eval()


def transformers() -> Any:
    return need("transformers", "transformers")


def maker(model: Callable[[], Any], device: str) -> Callable[[Shape], Text]:
    def make(shape: Shape) -> Text:
        """Prompt of n tokens, k = d candidates; of tiny size a tiny model."""
        chosen = small() if shape.name == "tiny" else model()
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 90, (1, shape.n), generator=random)
        return Text(chosen.to(device), ids.to(device), shape.d)

    return make


# ----------------------------------------------------------------------------------------------------------- providers


def generate(text: Text, **options: Any) -> Tensor:
    return text.model.generate(
        text.ids, attention_mask=torch.ones_like(text.ids), max_new_tokens=NEW, eos_token_id=None, pad_token_id=0,
        do_sample=False, **options,
    )  # fmt: skip


def ours(lookahead: str) -> Callable[[Text], Tensor]:
    def run(text: Text) -> Tensor:
        return generate(
            text, custom_generate=contrastive_search, penalty_alpha=ALPHA, top_k=text.k, lookahead=lookahead
        )

    return run


def greedy(text: Text) -> Tensor:
    return generate(text)


@torch.no_grad()
def repeated(text: Text) -> Tensor:
    """Contrastive search as `transformers` had it up to 4.55: in each step the cache k times over, one token appended
    to each copy, the winner's copy selected; all layers' hidden states kept, the context normalised anew."""
    from transformers.cache_utils import DynamicCache

    model, ids, k = text.model, text.ids, text.k
    cache = DynamicCache(config=model.config)
    out = model(ids, past_key_values=cache, use_cache=True, output_hidden_states=True)
    context, logits = out.hidden_states[-1], out.logits[:, -1].float()
    for _ in range(NEW):
        p, tokens = logits.softmax(-1).topk(k)
        cache.batch_repeat_interleave(k)
        at = torch.full((k, 1), ids.shape[1], device=ids.device)
        out = model(
            tokens.view(-1, 1), position_ids=at, past_key_values=cache, use_cache=True, output_hidden_states=True
        )
        ahead = out.hidden_states[-1]
        wide = context.repeat_interleave(k, 0)
        wide, unit = wide / wide.norm(dim=2, keepdim=True), ahead / ahead.norm(dim=2, keepdim=True)
        penalty = torch.matmul(wide, unit.transpose(1, 2)).squeeze(-1).amax(1)
        best = ((1 - ALPHA) * p[0] - ALPHA * penalty).argmax()
        tuple(torch.stack(layer.split(k))[:, best] for layer in out.hidden_states)
        cache.batch_select_indices(best[None])
        context = torch.cat([context, ahead[best][None]], 1)
        logits = out.logits[best, -1][None].float()
        ids = torch.cat([ids, tokens[:, best, None]], 1)
    return ids


def provider(run: Callable[[Text], Tensor], **options: Any) -> Provider:
    def make(text: Text) -> Step:
        return lambda: (run(text).double(),)

    return Provider(make, **options)


def tokens_of(run: Callable[[Text], Tensor]) -> Callable[[Text], tuple[Tensor, ...]]:
    return lambda text: (run(text).double(),)


def workload(name: str, model: Callable[[], Any], length: int, k: int, greedy_at_most: float | None,
             faster: float, device: str) -> Workload:  # fmt: skip
    """Right is what the repeated form writes, token for token; for greedy search, what it writes itself."""
    providers = {
        "fastcontrast, tree": provider(ours("tree"), memory=True),
        "fastcontrast, repeat": provider(ours("repeat"), reps=1),
        "greedy search, transformers": provider(greedy, truth=tokens_of(greedy)),
        "as transformers 4.55 did": provider(repeated, memory=True),
    }
    bars = [Bar("as transformers 4.55 did", "fastcontrast, tree", at_least=faster)]
    if greedy_at_most is not None:
        bars.append(Bar("fastcontrast, tree", "greedy search, transformers", at_most=greedy_at_most))
    shape, tiny = Shape("prompt", 1, length, k), Shape("tiny", 1, 8, 2)
    return Workload(f"{name}, context {length:,}, k = {k}", shape, tiny, maker(model, device), tokens_of(repeated),
                    providers, {}, tuple(bars), reps=3, device=device)  # fmt: skip


def workloads(quick: bool, device: str = "cpu") -> list[Workload]:
    if quick:
        return [workload("tiny GPT-2", small, 24, 3, None, 0.0, device)]
    return [
        workload("GPT-2 small", gpt2, 512, 5, 1.4, 2.0, device),
        workload("SmolLM2-135M", smollm2, 512, 5, 1.4, 2.0, device),
        workload("GPT-2 small", gpt2, 1024, 8, None, 4.0, device),
        workload("SmolLM2-135M", smollm2, 1024, 8, None, 4.0, device),
    ]


def pytest_generate_tests(metafunc) -> None:
    _pytest.parametrise(metafunc, workloads)


def test_speed(benchmark, case) -> None:
    _pytest.measure(benchmark, case)
