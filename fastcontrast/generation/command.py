"""`fastcontrast generate "prompt"`: SmolLM2-135M continues a text, token by token, by the way of decoding asked for.

The last line says how fast it went, the prompt's forward pass included, and what ran: for contrastive search which
look-ahead, and why not a better one. `--compare` decodes a few real prompts in several ways instead, and measures the
results: see `compare`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fastcontrast
from fastcontrast import data, smollm2
from fastcontrast.ops import trace

from .compare import TOKENS as COMPARED_TOKENS
from .compare import compare

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from fastcontrast.ops._dispatch import Choice

METHODS = ("greedy", "nucleus", "contrastive", "adacad", "cad", "cfg", "contrastive-decoding", "dola")
CONTEXT_METHODS = ("adacad", "cad")  # contrast an answer that has read a document with one that has not
TAKES_CONTEXT = (*CONTEXT_METHODS, "cfg")
DTYPES = ("float32", "bfloat16", "float16")
TOKENS = 128


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add = parser.add_argument
    add("prompt", nargs="?", default="", help="the text to continue")
    add("--method", choices=METHODS, default="contrastive", help="way of decoding (default: contrastive)")
    add("--max-new-tokens", type=int, help=f"tokens to write (default: {TOKENS}, with --compare {COMPARED_TOKENS})")
    add("--alpha", type=float, default=0.6, help="contrastive: weight of the degeneration penalty (default: 0.6)")
    add("--top-k", type=int, default=5, help="contrastive: candidates a token (default: 5)")
    add(
        "--context",
        metavar="TEXT",
        help="adacad, cad, cfg: a document put before the prompt; it is contrasted with the prompt alone",
    )
    add("--chat", action="store_true", help="the prompt is a user's message: apply the chat template")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--seed", type=int, default=0, help="of nucleus sampling")
    add("--compare", action="store_true", help="measure the ways of decoding on real prompts, instead of one prompt")
    add("--prompts", type=int, default=6, metavar="N", help="with --compare: how many prompts (default: 6)")
    add("--output", metavar="DIR", default="generate-output", help="with --compare: folder for picture and results")


def main(args: argparse.Namespace) -> int:
    """Runs the command. Returns the exit status: 2 if the options make no sense, 1 if data is missing."""
    try:
        check(args)
        tokens = args.max_new_tokens or (COMPARED_TOKENS if args.compare else TOKENS)
        model, tokenizer = smollm2.load(getattr(torch, args.dtype), progress=True)
        model = model.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if args.compare:
            compare(
                model, tokenizer, prompts=args.prompts, tokens=tokens,
                alpha=args.alpha, top_k=args.top_k, seed=args.seed, output=args.output,
            )  # fmt: skip
        else:
            write(model, tokenizer, args, tokens)
    except data.MissingDataError as error:
        print(f"fastcontrast generate: {error}", file=sys.stderr)
        return 1
    except WrongOptionError as error:
        print(f"fastcontrast generate: {error}", file=sys.stderr)
        return 2
    return 0


class WrongOptionError(ValueError):
    """Options that make no sense, alone or together."""


def check(args: argparse.Namespace) -> None:
    """Raises WrongOptionError before the model is loaded."""
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise WrongOptionError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    if args.top_k < 1:
        raise WrongOptionError(f"--top-k must be at least 1, got {args.top_k}")
    if not 0 <= args.alpha <= 1:
        raise WrongOptionError(f"--alpha must lie in [0, 1], got {args.alpha:g}")
    if args.compare:
        if args.prompt:
            raise WrongOptionError("--compare brings its own prompts; leave the prompt out")
        if args.prompts < 1:
            raise WrongOptionError(f"--prompts must be at least 1, got {args.prompts}")
        return
    if not args.prompt.strip():
        raise WrongOptionError('the prompt is empty; give the text to continue: fastcontrast generate "Once upon"')
    if args.method in CONTEXT_METHODS and not args.context:
        raise WrongOptionError(f"--method {args.method} contrasts a document with none; give it with --context TEXT")
    if args.context and args.method not in TAKES_CONTEXT:
        raise WrongOptionError(f"--context is for {', '.join(TAKES_CONTEXT)}, not for {args.method}")


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace, tokens: int) -> Tensor:
    """Continues the prompt on the terminal, then prints the line of figures. Returns the new tokens [n]."""
    from transformers import TextStreamer

    ids = encode(tokenizer, args.prompt, args.context, args.chat).to(model.device)
    alone = encode(tokenizer, args.prompt, None, args.chat).to(model.device)
    room = model.config.max_position_embeddings
    if ids.shape[1] + tokens > room:
        raise WrongOptionError(f"the prompt's {ids.shape[1]} tokens and {tokens} new ones exceed the model's {room}")
    torch.manual_seed(args.seed)
    if not args.chat:
        print(args.prompt, end="", flush=True)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    began = time.perf_counter()
    with trace() as ran:
        out = fastcontrast.generate(
            model, ids, attention_mask=torch.ones_like(ids), streamer=streamer, max_new_tokens=tokens,
            **settings(args, model, alone),
        )  # fmt: skip
    seconds = time.perf_counter() - began
    new = out[0, ids.shape[1] :]
    print(f"\n{len(new)} tokens in {seconds:.1f} s, {len(new) / seconds:.1f} tokens/s{what_ran(ran)}")
    return new


def settings(args: argparse.Namespace, model: PreTrainedModel, alone: Tensor) -> dict[str, Any]:
    """Keyword arguments of `fastcontrast.generate`; `alone` [1, L] is the prompt without the document."""
    if args.method == "nucleus":
        return {"method": "sample", "top_p": 0.95, "top_k": 0}
    if args.method == "contrastive":
        return {"method": "contrastive", "penalty_alpha": args.alpha, "top_k": args.top_k}
    if args.method in TAKES_CONTEXT:
        return {"method": args.method, "unconditional_ids": alone if args.context else None}
    if args.method == "contrastive-decoding":
        return {"method": "contrastive_decoding", "amateur": smollm2.early_exit(model)}
    if args.method == "dola":
        return {"method": "dola", "layers": "high"}
    return {"method": args.method}


def encode(tokenizer: PreTrainedTokenizerFast, prompt: str, context: str | None, chat: bool) -> Tensor:
    """Token ids [1, L] of the document, if there is one, and the prompt."""
    text = f"{context}\n\n{prompt}" if context else prompt
    if chat:  # as text first: what apply_chat_template returns otherwise changed between versions of transformers
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, return_tensors="pt").input_ids


def what_ran(ran: Iterable[Choice]) -> str:
    """Which implementation of each operation ran first. Of the look-ahead also why not a better one, since that depends
    on the model; `fastcontrast doctor` says it of the others.
    """
    first: dict[str, Choice] = {}
    for choice in ran:
        first.setdefault(choice.op, choice)
    text = ""
    if (look_ahead := first.pop("contrastive_search", None)) is not None:
        reasons = "".join(f", not {other}: {reason}" for other, reason in look_ahead.refused.items())
        text = f"; look-ahead: {look_ahead.implementation}{reasons}"
    return text + "".join(f"; {op}: {choice.implementation}" for op, choice in first.items())
