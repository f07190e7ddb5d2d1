"""What every decoding method here shares: text, processors, stopping, streaming and what is returned."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# What `generate` hands to a callable beside the model's own inputs.
CONTROL = {"use_cache", "past_key_values", "logits_to_keep", "cache_position", "attention_mask", "position_ids",
           "output_attentions", "output_hidden_states", "return_dict", "synced_gpus", "streamer"}  # fmt: skip


class Loop:
    """The text of a batch, as it grows: `scores = loop.process(logits)`, then `loop.append(tokens)` until `loop.done`.

    Finished rows get the padding token. `streamer` receives the prompt (unless `generate` gave it already), then each
    step's tokens; `with loop:` ends it, whatever happens.
    """

    def __init__(self, op: str, model: Any, input_ids: Tensor, processors, criteria, config, stream_to, streamer,
                 synced_gpus: bool):  # fmt: skip
        self.model, self.ids, self.processors, self.criteria = model, input_ids, processors, criteria
        self.prompt = input_ids.shape[1]
        self.returns_dict = bool(config.return_dict_in_generate)
        self.keeps_scores = self.returns_dict and bool(config.output_scores)
        self.keeps_logits = self.returns_dict and bool(config.output_logits)
        self.keeps_hidden = self.returns_dict and bool(config.output_hidden_states)
        self.keeps_attentions = self.returns_dict and bool(config.output_attentions)
        self.scores, self.logits, self.hidden, self.attentions, self.cross = ([] for _ in range(5))
        self.synced, self.finished = bool(synced_gpus), False
        self.unfinished = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.pad = _pad_token(config) if ends else None
        if ends and self.pad is None:
            raise ValueError(f"{op}: pad_token_id must be set to fill finished rows, got None")
        self.streamer = streamer if stream_to is None else stream_to
        self.puts_prompt = stream_to is not None  # `generate` has put it into a streamer of its own

    def __enter__(self) -> Loop:
        if self.puts_prompt:
            try:
                self.streamer.put(self.ids.cpu())
            except BaseException:
                self.streamer.end()
                raise
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.streamer is not None:
            self.streamer.end()

    @property
    def done(self) -> bool:
        """Whether every row has ended; other processes may make this one go on."""
        if not self.synced:
            return self.finished
        return not self.model._has_unfinished_sequences(self.finished, True, device=self.ids.device)

    def process(self, logits: Tensor) -> Tensor:
        """float32 logits [B, V] after the processors."""
        logits = logits.to(device=self.ids.device, dtype=torch.float32)
        if self.keeps_logits:
            self.logits.append(logits.clone())
        scores = self.processors(self.ids, logits)
        if self.keeps_scores:
            self.scores.append(scores)
        return scores

    def record(self, outputs: Any, rows: Callable[[Tensor], Tensor] = lambda x: x,
               attended: Callable[[Tensor], Tensor] = lambda x: x) -> None:  # fmt: skip
        """Keeps hidden states and attentions of a step, where they were asked for."""
        decoder = "decoder_" if self.model.config.is_encoder_decoder else ""
        if self.keeps_hidden:
            self.hidden.append(tuple(rows(x) for x in getattr(outputs, f"{decoder}hidden_states")))
        if self.keeps_attentions:
            self.attentions.append(tuple(attended(x) for x in getattr(outputs, f"{decoder}attentions") or ()))
            if decoder:
                self.cross.append(tuple(rows(x) for x in outputs.cross_attentions or ()))

    def append(self, tokens: Tensor) -> Tensor:
        """The next token of each row [B]; what came of it, with padding for rows that had ended."""
        tokens = tokens.to(self.ids.device)
        if self.pad is not None:
            tokens = torch.where(self.unfinished, tokens, self.pad.to(tokens.device, tokens.dtype))
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())
        scores = tuple(self.scores) if self.keeps_scores else None
        self.unfinished = self.unfinished & ~self.criteria(self.ids, scores)
        self.finished = not bool(self.unfinished.any())
        return tokens

    def result(self, cache: Callable[[], Any], encoder_outputs: Any = None) -> Any:
        """Token ids, or under `return_dict_in_generate` what `generate` returns for this kind of model."""
        if not self.returns_dict:
            return self.ids
        from transformers.generation import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

        steps = self.ids.shape[1] - self.prompt

        def kept(wanted: bool, items: list) -> tuple | None:
            return tuple(items[:steps]) if wanted else None  # look-ahead has read the last token too

        common = {
            "sequences": self.ids,
            "scores": kept(self.keeps_scores, self.scores),
            "logits": kept(self.keeps_logits, self.logits),
            "past_key_values": cache(),
        }
        hidden, attentions = kept(self.keeps_hidden, self.hidden), kept(self.keeps_attentions, self.attentions)
        if not self.model.config.is_encoder_decoder:
            return GenerateDecoderOnlyOutput(**common, hidden_states=hidden, attentions=attentions)
        return GenerateEncoderDecoderOutput(
            **common,
            decoder_hidden_states=hidden,
            decoder_attentions=attentions,
            cross_attentions=kept(self.keeps_attentions, self.cross),
            encoder_hidden_states=encoder_outputs.get("hidden_states") if self.keeps_hidden else None,
            encoder_attentions=encoder_outputs.get("attentions") if self.keeps_attentions else None,
        )


def _pad_token(config: Any) -> Tensor | None:
    pad = getattr(config, "_pad_token_tensor", None)
    if pad is None and config.pad_token_id is not None:
        pad = torch.tensor(config.pad_token_id)
    return pad


class Tap:
    """Reads, and may replace, what reaches the model's output embeddings: the last hidden states, whatever the model.

    `with tap.reading(function): model(...)` calls function(hidden [B, S, D]); the head runs on what that returns. No
    other layer's states are kept, and positions that nobody asks logits of never meet the head.
    """

    def __init__(self, model: Any):
        self.head = model.get_output_embeddings()
        self.function: Callable[[Tensor], Tensor] | None = None
        self.fired = False

    @contextmanager
    def reading(self, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
        thread = threading.get_ident()  # the same model may generate in another thread

        def hook(module, inputs):
            if threading.get_ident() != thread:
                return None
            self.fired = True
            return (function(inputs[0]), *inputs[1:])

        self.fired = False
        handle = self.head.register_forward_pre_hook(hook) if isinstance(self.head, torch.nn.Module) else None
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()


# ---------------------------------------------------------------------------------------------------------- checks


def check_config(op: str, model: Any, config: Any, model_kwargs: dict[str, Any]) -> None:
    """What no method here can do is refused before the model runs."""
    if config.num_beams not in (None, 1):
        raise ValueError(f"{op}: num_beams must be 1, got {config.num_beams}")
    if model_kwargs.get("use_cache") is False:
        raise ValueError(f"{op}: use_cache must be True, got False: each step needs the keys and values before it")
    if getattr(model, "_is_stateful", False) or "cache_params" in model_kwargs:
        raise ValueError(
            f"{op}: the model must keep keys and values, {type(model).__name__} has a recurrent state, "
            "which cannot step back"
        )
    given = model_kwargs.get("past_key_values")
    if given is not None and given.get_seq_length() > 0:
        raise ValueError(
            f"{op}: past_key_values must be empty, got {given.get_seq_length()} positions: the prompt is read anew"
        )
    if config.cache_implementation not in (None, "dynamic", "dynamic_full", "static"):
        raise ValueError(
            f"{op}: cache_implementation must be dynamic or static, got {config.cache_implementation!r}: "
            "keys and values lie in a preallocated cache"
        )
    layers = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    if unknown := sorted(x for x in layers if "attention" not in x or x.startswith("linear")):
        raise ValueError(
            f"{op}: the model must keep keys and values, {type(model).__name__} has layers of {', '.join(unknown)}"
        )


def check_prompt(op: str, input_ids: Tensor, mask: Tensor | None, embeds: Tensor | None = None) -> Tensor | None:
    """The padding mask as bool, None where nothing is padded."""
    length = input_ids.shape[1] if embeds is None else embeds.shape[1]
    if not length or not input_ids.shape[0]:
        raise ValueError(f"{op}: input_ids must hold at least one token a row, got {list(input_ids.shape)}")
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape != (input_ids.shape[0], length):
        raise ValueError(f"{op}: attention_mask must be [{input_ids.shape[0]}, {length}], got {list(mask.shape)}")
    mask = mask.bool()
    if mask.all():
        return None
    if not mask[:, -1].all():
        raise ValueError(f"{op}: padding must be on the left (padding_side='left'), got rows that end in padding")
    return mask


def positions(valid: Tensor | None, rows: int, length: int, device: torch.device) -> Tensor:
    """Position of each token [rows, length], padding not counted."""
    if valid is None:
        return torch.arange(length, device=device).expand(rows, length)
    return (valid.long().cumsum(1) - 1).clamp(min=0)


def accepts(model: Any, name: str) -> bool:
    """Whether the model's forward pass has such an argument."""
    return name in inspect.signature(model.forward).parameters


def decoder_layers(config: Any) -> int:
    """How many layers write the text; an encoder-decoder's `num_hidden_layers` may be those of its encoder."""
    text = config.get_text_config(decoder=True)
    told = (getattr(c, name, None) for c in (config, text) for name in ("decoder_layers", "num_decoder_layers"))
    return next(filter(None, told), None) or text.num_hidden_layers
