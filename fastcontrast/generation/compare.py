"""Ways of decoding side by side, on the same real prompts: what they write, and what it costs.

    diversity    share of distinct 2-, 3- and 4-grams, multiplied: 1 is no repetition
    perplexity   of the continuation under the model: what the model finds likely
    coherence    cosine of MiniLM's features of prompt and continuation
    tokens/s     new tokens over seconds, the prompt's forward pass included
    MiB          peak memory of the dearest prompt, beyond the weights and what else was there before

Greedy decoding repeats itself (low diversity, low perplexity), sampling wanders (high, high); contrastive search should
be diverse at a perplexity near greedy's. The texts' own continuations stand beside them, and `transformers` decodes
greedily too, as the reference for speed.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import functools
import gc
import json
import os
import platform
import re
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import fastcontrast
from fastcontrast import data
from fastcontrast.demo.loss_stage import peak_memory
from fastcontrast.minilm import minilm_features
from fastcontrast.ops import trace

from .picture import draw

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PROMPT, TOKENS = 32, 64  # tokens of a prompt, and new ones
TRUTH, REFERENCE = "the text itself", "greedy, transformers"


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    prompts: int = 6,
    tokens: int = TOKENS,
    alpha: float = 0.6,
    top_k: int = 5,
    seed: int = 0,
    output: str | os.PathLike = "generate-output",
) -> dict[str, Any]:
    """Decodes `prompts` texts in every way; prints table and samples, writes compare.json and compare.png.

    Every continuation has `tokens` tokens: the end of text is held back, so that the ways are compared at one length.
    Returns what the JSON file holds.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    texts = [tokenizer(text).input_ids for text in passages(prompts)]
    begins = [ids[:PROMPT] for ids in texts]
    ways = methods(model, alpha, top_k)
    written, costs = _decode(model, ways, begins, tokens, seed)
    written = {TRUTH: [ids[PROMPT : PROMPT + tokens] for ids in texts]} | written
    costs[TRUTH] = {"tokens_per_second": None, "peak_mib": None, "seconds": None}
    rows = {
        name: _quality(model, tokenizer, begins, new) | costs[name] | {"texts": tokenizer.batch_decode(new)}
        for name, new in written.items()
    }
    results = {
        "model": "SmolLM2-135M-Instruct, Q4_1", "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type, "threads": torch.get_num_threads(), "machine": platform.machine(),
        "prompts": tokenizer.batch_decode(begins), "prompt_tokens": PROMPT, "tokens": tokens,
        "alpha": alpha, "top_k": top_k, "top_p": 0.95, "seed": seed, "methods": rows,
        "same_as_transformers": written["greedy"] == written[REFERENCE], "versions": _versions(),
    }  # fmt: skip
    (folder / "compare.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(folder / "compare.png", results)
    _print(results)
    print(f"\n{folder / 'compare.png'}\n{folder / 'compare.json'}")
    return results


def passages(count: int) -> list[str]:
    """`count` paragraphs of prose, one a module, from the docstrings of Python's standard library: real text that is
    on every machine, about forty in all. The same on every run of one Python version.
    """
    found = _all_passages()
    if count > len(found):
        raise data.MissingDataError(
            f"compare: the standard library's docstrings hold {len(found)} passages, {count} asked for"
        )
    return [found[i * len(found) // count] for i in range(count)]


@functools.cache
def _all_passages() -> list[str]:
    found = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts = (ast.get_docstring(node) or "" for node in data.nodes_of(path) if isinstance(node, kinds))
        paragraphs = (" ".join(part.split()) for text in texts for part in re.split(r"\n\s*\n", text))
        if prose := next(filter(_is_prose, paragraphs), None):
            found.append(prose)
    return list(dict.fromkeys(found))  # abc.py and _py_abc.py share one


def _is_prose(paragraph: str) -> bool:
    """Words rather than code or tables, and enough of them for prompt and continuation (1.3 tokens a word)."""
    letters = sum(c.isalpha() or c in " ,.'" for c in paragraph)
    return paragraph[:1].isupper() and len(paragraph.split()) >= 75 and letters > 0.96 * len(paragraph)


def methods(model: PreTrainedModel, alpha: float, top_k: int) -> dict[str, Callable[..., Tensor]]:
    """name -> function of (ids [1, L], **usual settings) giving ids [1, L + n]."""

    def ours(**settings: Any) -> Callable[..., Tensor]:
        return lambda ids, **usual: fastcontrast.generate(model, ids, **settings, **usual)

    return {
        REFERENCE: lambda ids, **usual: model.generate(ids, do_sample=False, **usual),
        "greedy": ours(method="greedy"),
        "nucleus p=0.95": ours(method="sample", top_p=0.95, top_k=0),
        f"contrastive k={top_k} α={alpha:g}": ours(method="contrastive", penalty_alpha=alpha, top_k=top_k),
    }


def _decode(
    model: PreTrainedModel, ways: dict[str, Callable[..., Tensor]], begins: list[list[int]], tokens: int, seed: int
) -> tuple[dict[str, list[list[int]]], dict[str, dict[str, Any]]]:
    """For each way the continuations of all prompts, and what they cost. The ways take turns, prompt by prompt, so that
    what else the machine does falls on all of them.
    """
    from tqdm import tqdm

    device = model.device.type
    new: dict[str, list[list[int]]] = {name: [] for name in ways}
    costs: dict[str, dict[str, Any]] = {name: {"seconds": 0.0, "peak_mib": 0.0} for name in ways}

    def run(name: str, begin: list[int], count: int) -> list[int]:
        ids = torch.tensor([begin], device=model.device)
        torch.manual_seed(seed)
        out = ways[name](ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count)
        return out[0, len(begin) :].tolist()  # waits for a GPU

    with torch.random.fork_rng(), tqdm(total=len(ways) * len(begins), desc="decoding", leave=False) as bar:
        for name in ways:
            run(name, begins[0], 2)  # warm
        for begin in begins:
            for name in ways:
                cost, start = costs[name], _memory_now(device)
                with trace() as ran:
                    began = time.perf_counter()
                    new[name].append(run(name, begin, tokens))
                    cost["seconds"] += time.perf_counter() - began
                cost["peak_mib"] = max(cost["peak_mib"], peak_memory(device) - start)
                cost["look_ahead"] = next((c.implementation for c in ran if c.op == "contrastive_search"), None)
                bar.update()
    for name, cost in costs.items():
        cost["tokens_per_second"] = sum(map(len, new[name])) / cost["seconds"]
    return new, costs


def _quality(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, begins: list[list[int]], new: list[list[int]]
) -> dict[str, float]:
    from fastcontrast.decoding import measures

    whole = [torch.tensor(begin + more) for begin, more in zip(begins, new, strict=True)]
    real = [torch.ones_like(ids) for ids in whole]  # a passage may end before `tokens` more
    ids, mask = (pad_sequence(rows, batch_first=True).to(model.device) for rows in (whole, real))
    features = [minilm_features(tokenizer.batch_decode(x), cache=False, progress=False) for x in (begins, new)]
    return {
        "diversity": measures.diversity(new),
        "perplexity": measures.perplexity(model, ids, PROMPT, attention_mask=mask),
        "coherence": measures.coherence(*features),
    }


def _memory_now(device: str) -> float:
    """MiB that are in use now, from where `peak_memory` then counts.

    Memory that an earlier way freed goes back to the system first: the next one would use it again unseen.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc alone has it
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):  # Linux alone lets a process set its peak back to what is resident now
            Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(device)


def _versions() -> dict[str, str]:
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "fastcontrast": fastcontrast.__version__,
    }


def _print(results: dict[str, Any]) -> None:
    rows = results["methods"]
    width = 2 + max(map(len, rows))
    count = len(results["prompts"])
    heading = f"{count} prompts".ljust(width)
    print(f"\n{heading}{'diversity':>10}{'perplexity':>12}{'coherence':>11}{'tokens/s':>10}{'MiB':>7}")
    for name, row in rows.items():
        cost = "" if row["seconds"] is None else f"{row['tokens_per_second']:10.1f}{row['peak_mib']:7.0f}"
        print(f"{name:{width}}{row['diversity']:10.3f}{row['perplexity']:12.2f}{row['coherence']:11.3f}{cost}")
    for name, row in rows.items():
        if row.get("look_ahead"):
            print(f"{name}: look-ahead by {row['look_ahead']}")
    print("\n" + textwrap.fill(f"prompt: {results['prompts'][0]} …", 100))
    for name, row in rows.items():
        if name != REFERENCE or not results["same_as_transformers"]:
            text = " ".join(row["texts"][0].split())
            print("\n" + textwrap.fill(f"{name}: … {text}", 100, subsequent_indent="    "))
