"""`fastcontrast.generate`: every decoding method by name, with streamers and stop strings that work."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .contrastive_search import contrastive_search
from .two_logits import adacad, cad, cfg, contrastive_decoding, dola

METHODS = {
    "contrastive": contrastive_search,
    "adacad": adacad,
    "cad": cad,
    "cfg": cfg,
    "contrastive_decoding": contrastive_decoding,
    "dola": dola,
}
LIBRARY = {"greedy": {"do_sample": False}, "sample": {"do_sample": True}}  # `generate`'s own


class _Ended:
    """A streamer that is ended once, whoever ends it."""

    def __init__(self, streamer: Any):
        self.streamer, self.ended = streamer, False

    def put(self, value: Tensor) -> None:
        self.streamer.put(value)

    def end(self) -> None:
        if not self.ended:
            self.ended = True
            self.streamer.end()


def generate(
    model: Any,
    inputs: Tensor | None = None,  # [B, L]
    *,
    method: str = "contrastive",
    streamer: Any = None,
    tokenizer: Any = None,
    stop_strings: str | list[str] | None = None,
    **kwargs: Any,
) -> Any:
    """`model.generate(inputs, custom_generate=method, ...)` for a model of `transformers` (4.56 or later).

    Args:
        method: "contrastive", "adacad", "cad", "cfg", "contrastive_decoding", "dola", or the library's own "greedy" and
            "sample". Each method's arguments are keywords: see `contrastive_search`, `adacad`, …
        streamer: gets the prompt, then each step's tokens, and is ended even if something fails, so that a thread that
            reads it never waits for ever.
        tokenizer, stop_strings: as in `model.generate`, which drops them for callables.
        kwargs: everything else that `model.generate` takes.

    Returns what `model.generate` returns: token ids, or a dictionary under `return_dict_in_generate=True`.

    Raises: ValueError for an unknown method; TypeError for a model without `generate`; and what the method raises.
    """
    if method not in METHODS and method not in LIBRARY:
        raise ValueError(f"generate: method must be one of {', '.join([*METHODS, *LIBRARY])}, got {method!r}")
    if not hasattr(model, "generate"):
        raise TypeError(f"generate: model must be one of transformers' generative models, got {type(model).__name__}")
    if stop_strings is not None:
        kwargs["stopping_criteria"] = _with_stop_strings(kwargs.get("stopping_criteria"), tokenizer, stop_strings)
    streamer = None if streamer is None else _Ended(streamer)
    if method in LIBRARY:
        options = {**LIBRARY[method], **({} if streamer is None else {"streamer": streamer})}
    else:
        options = {"custom_generate": METHODS[method], **({} if streamer is None else {"stream_to": streamer})}
    try:
        return model.generate(inputs, **options, **kwargs)
    finally:
        if streamer is not None:
            streamer.end()


def _with_stop_strings(criteria: Any, tokenizer: Any, stop_strings: str | list[str]) -> Any:
    from transformers.generation import StoppingCriteriaList, StopStringCriteria

    if tokenizer is None:
        raise ValueError("generate: stop_strings need the model's tokenizer, got tokenizer=None")
    return StoppingCriteriaList([*(criteria or ()), StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings)])
