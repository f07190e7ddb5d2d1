"""Contrastive search: of the k likeliest next tokens the one that is least like what was said already.

x_{t+1} = argmax_{v ∈ top-k p}  (1 − α) p(v | x) − α max_i cos(h_v, h_i)

h_v is the last hidden state of the text continued by v, h_i that of each token so far. The candidates are siblings over
one stored prefix: a step runs the model once and reads the prefix once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops import contrastive_candidates, contrastive_select
from ..ops._dispatch import Choice, note
from ._few_rows import few_rows
from ._loop import CONTROL, Loop, Tap, accepts, check_config, check_prompt, positions

OP = "contrastive_search"
ALPHA, TOP_K = 0.6, 4
LOOKAHEADS = ("tree", "repeat", "sequential")
Pick = Callable[[Tensor], Tensor]
LIBRARY_TOP_K = 50  # what a GenerationConfig says of top_k when nobody set it


def contrastive_search(
    model: Any,
    input_ids: Tensor,  # [B, L]
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    penalty_alpha: float | None = None,
    top_k: int | None = None,
    lookahead: str | None = None,
    stream_to: Any = None,
    streamer: Any = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Any:
    """x_{t+1} = argmax over the k likeliest v of (1 − α) p(v) − α max_i cos(h_v, h_i); nothing is sampled.

    For `model.generate(**inputs, custom_generate=contrastive_search, penalty_alpha=0.6, top_k=4)`, which prepares every
    argument, or through `fastcontrast.generate(model, ...)`.

    Args:
        penalty_alpha: α in [0, 1]; 0 is greedy search. None: the generation config's, else 0.6.
        top_k: k ≥ 1; 1 is greedy search; more than the vocabulary means all of it. None: the generation config's unless
            that is the library's own 50, else 4.
        lookahead: "tree": the k candidates are k queries over one prefix, kept apart by an explicit mask, in one
            forward pass; nothing but k slots of keys and values is added. "repeat": they are rows of the batch, and the
            prefix is held k times, copied once. "sequential": k forward passes, one slot more. None: "tree" where the
            model allows, else "repeat"; `fastcontrast.ops.trace()` says which ran, and why not the other.
        stream_to: a streamer. It gets the prompt, then each step's tokens, and is ended even if a step fails.
            (`generate` drops its own `streamer=` for callables; `fastcontrast.generate(streamer=...)` does not.)

    Prompts are padded on the left. Keys and values lie in one preallocated cache, whatever cache `generate` made; it is
    returned without the last token, as greedy search returns it. p is the softmax over the whole vocabulary after the
    processors; a token of probability 0 is not chosen. Norms, cosines and scores are float32. On a CPU in float32,
    where they meet few rows, the model's plain linear layers, its attention, and whole layers of Llama, Mistral and
    Qwen2 with nothing hooked into them run on the C++ core: the same formulas, rounded otherwise.

    Returns token ids [B, L + n], or under `return_dict_in_generate` what `generate` returns.

    Raises: ValueError for sampling, beams, `use_cache=False`, a cache that is not empty, models with a recurrent state,
    right padding, an empty prompt, and α, k or look-ahead out of range; NotImplementedError for a look-ahead that the
    model does not allow, with the reason.

    Source: Su et al., "A Contrastive Framework for Neural Text Generation" (2022); Su and Collier, "Contrastive Search
    Is What You Need For Neural Text Generation" (2022).
    """
    alpha, k = _settings(generation_config, penalty_alpha, top_k, model)
    check_config(OP, model, generation_config, model_kwargs)
    if generation_config.do_sample:
        raise ValueError(f"{OP}: do_sample must be False, got True: nothing is sampled")
    choice = choose_lookahead(model, lookahead, model_kwargs)
    loop = Loop(OP, model, input_ids, logits_processor, stopping_criteria, generation_config, stream_to, streamer,
                synced_gpus)  # fmt: skip
    with loop, few_rows(model), torch.no_grad():
        prefix = Prefix(model, loop, generation_config, model_kwargs, k)
        step = {"tree": prefix.tree, "repeat": prefix.repeat, "sequential": prefix.sequential}[note(choice)]
        logits = prefix.fill()
        while not loop.done:
            scores = loop.process(logits)
            probabilities, tokens = contrastive_candidates(scores, k)
            logits, chosen = step(tokens, probabilities, alpha)
            loop.append(tokens.gather(1, chosen.to(tokens.device)[:, None])[:, 0])
        return loop.result(prefix.finish, model_kwargs.get("encoder_outputs"))


def _settings(config: Any, alpha: float | None, k: int | None, model: Any) -> tuple[float, int]:
    alpha = config.penalty_alpha if alpha is None else alpha
    alpha = ALPHA if alpha is None else alpha
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ValueError(f"{OP}: penalty_alpha must lie in [0, 1], got {alpha!r}")
    if k is None:
        k = config.top_k if config.top_k not in (None, LIBRARY_TOP_K) else TOP_K
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"{OP}: top_k must be an integer of at least 1, got {k!r}")
    head = model.get_output_embeddings()
    vocabulary = head.weight.shape[0] if head is not None else model.config.get_text_config(decoder=True).vocab_size
    return float(alpha), min(k, vocabulary)


# ----------------------------------------------------------------------------------------------------- which look-ahead


def choose_lookahead(model: Any, asked: str | None, model_kwargs: dict[str, Any]) -> Choice:
    """Which look-ahead runs; why not "tree", where it could not."""
    if asked is not None and asked not in LOOKAHEADS:
        raise ValueError(f"{OP}: lookahead must be one of {', '.join(LOOKAHEADS)} or None, got {asked!r}")
    reason = refuse_tree(model, model_kwargs)
    if asked == "tree" and reason:
        raise NotImplementedError(f"{OP}: lookahead 'tree' cannot run: {reason}")
    return Choice(OP, asked or ("repeat" if reason else "tree"), {"tree": reason} if reason and asked is None else {})


def refuse_tree(model: Any, model_kwargs: dict[str, Any]) -> str | None:
    """Reason why k siblings cannot share a prefix in one forward pass of this model, or None."""
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or not accepts(model, "position_ids"):
        return "the model takes positions from slots of the cache, and siblings lie in different ones"
    if (given := model_kwargs.get("position_ids")) is not None and given.ndim != 2:
        return "the model has positions of several dimensions"
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager"):
        return f"{attention} takes no explicit mask"
    if getattr(config, "alibi", False) or getattr(config, "attention_types", None):
        return "the model's attention depends on slots of the cache"
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others:
        return f"the model has layers of {', '.join(sorted(others))}"
    return None


# --------------------------------------------------------------------------------------------------------- the prefix


class Prefix:
    """The text so far as the model keeps it: keys and values, last hidden states, padding."""

    def __init__(self, model: Any, loop: Loop, config: Any, model_kwargs: dict[str, Any], k: int):
        from ._cache import empty_cache

        self.model, self.loop, self.k = model, loop, k
        self.text = model.config.get_text_config(decoder=True)
        self.seq2seq = bool(model.config.is_encoder_decoder)
        embeds = model_kwargs.get("inputs_embeds")
        mask = model_kwargs.get("decoder_attention_mask" if self.seq2seq else "attention_mask")
        self.padding = check_prompt(OP, loop.ids, mask, embeds)
        self.rows, self.length = loop.ids.shape[0], loop.prompt if embeds is None else embeds.shape[1]
        more = max(1, config.max_length - loop.prompt)
        self.past, self.cache = empty_cache(model, self.length + more + k)
        self.positioned = not self.seq2seq and accepts(model, "position_ids")
        self.kwargs = {name: x for name, x in model_kwargs.items() if name not in CONTROL and x is not None}
        self.kwargs.pop("decoder_attention_mask", None)
        if self.seq2seq and model_kwargs.get("attention_mask") is not None:
            self.kwargs["attention_mask"] = model_kwargs["attention_mask"]
        self.tap = Tap(model)
        self.by_states = False  # the head was not seen to run: hidden states are asked for instead
        self.hidden: Tensor | None = None  # [B, capacity, D], of which `length` are in use
        self.valid: Tensor | None = None  # [B, capacity] bool, None where nothing is padded
        self.bias: list[Tensor] = []

    # ------------------------------------------------------------------------------------------------ forward passes

    def run(self, ids: Tensor, pick: Pick, take: Pick, **inputs: Any) -> Any:
        """One forward pass. `pick` sees the last hidden states and returns those of which logits are wanted; where the
        head cannot be tapped, `take` does the same to the logits of all."""
        loop, prefix = self.loop, "decoder_" if self.seq2seq else ""
        asked = {
            "output_hidden_states": loop.keeps_hidden or self.by_states,
            "output_attentions": loop.keeps_attentions,
        }
        with self.tap.reading(pick):
            outputs = self.model(
                **{f"{prefix}input_ids": ids}, **inputs, past_key_values=self.past, use_cache=True, return_dict=True,
                **{name: True for name, wanted in asked.items() if wanted},
            )  # fmt: skip
        if not self.tap.fired:
            if not self.by_states:
                return None
            pick(getattr(outputs, f"{prefix}hidden_states")[-1])
            outputs.logits = take(outputs.logits)
        return outputs

    def place(self, valid: Tensor | None, at: Tensor) -> dict[str, Any]:
        """Mask and positions for tokens that follow what is stored."""
        inputs: dict[str, Any] = {} if self.seq2seq else {"attention_mask": None}
        if valid is not None:
            inputs["decoder_attention_mask" if self.seq2seq else "attention_mask"] = valid.long()
        if self.positioned:
            inputs["position_ids"] = at
        return inputs

    def fill(self) -> Tensor:
        """Reads the prompt; the logits of what comes next [B, V]."""
        ids, capacity = self.loop.ids, self.cache.capacity
        seen: list[Tensor] = []

        def last(hidden: Tensor) -> Tensor:
            seen.append(hidden)
            return hidden[:, -1:]

        at = positions(self.padding, self.rows, self.length, ids.device)
        inputs = {**self.kwargs, **self.place(self.padding, at)}
        if "inputs_embeds" in inputs:
            ids = None
        outputs = self.run(ids, last, lambda logits: logits[:, -1:], **inputs)
        if outputs is None:
            self.by_states = True
            self.cache.rollback(self.length)
            outputs = self.run(ids, last, lambda logits: logits[:, -1:], **inputs)
        hidden = seen[-1]
        self.hidden = hidden.new_empty(self.rows, capacity, hidden.shape[2])
        self.hidden[:, : self.length] = hidden
        if self.padding is not None:
            self.valid = self.padding.new_ones(self.rows, capacity)
            self.valid[:, : self.length] = self.padding
        self.next_position = at[:, -1:] + 1
        for name in ("inputs_embeds", "token_type_ids", "pixel_values"):
            self.kwargs.pop(name, None)
        self.loop.record(outputs)
        return outputs.logits[:, -1]

    def select(self, hidden: Tensor, probabilities: Tensor, alpha: float) -> Tensor:
        """The chosen candidate of each row [B]; its hidden state [B, D] joins the context."""
        t = self.length
        valid = None if self.valid is None else self.valid[:, :t].to(hidden.device)
        chosen = contrastive_select(
            probabilities.to(hidden.device), hidden, self.hidden[:, :t], valid, alpha=alpha
        ).choice  # fmt: skip
        self.hidden[:, t] = hidden[torch.arange(self.rows, device=hidden.device), chosen]
        return chosen

    def advance(self) -> None:
        self.length += 1
        self.next_position = self.next_position + 1

    # ---------------------------------------------------------------------------------------------------- look-ahead

    def tree(self, tokens: Tensor, probabilities: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """Siblings are queries: one pass of [B, k] tokens of one position, each of which sees the prefix and itself."""
        start, rows, chosen = self.length, torch.arange(self.rows), None

        def pick(hidden: Tensor) -> Tensor:
            nonlocal chosen
            chosen = self.select(hidden, probabilities, alpha)
            return self.hidden[:, start, None]

        inputs = {"attention_mask": self.sibling_mask(), "position_ids": self.next_position.expand(-1, self.k)}
        from ._siblings import attending

        with attending(self.text):
            outputs = self.run(tokens, pick, lambda logits: logits[rows, chosen][:, None], **self.kwargs, **inputs)
        self.cache.commit_slot(start, chosen)
        if self.loop.keeps_hidden or self.loop.keeps_attentions:
            columns = torch.arange(start + 1).repeat(self.rows, 1)
            columns[:, start] += chosen.cpu()
            self.loop.record(
                outputs,
                lambda x: x[rows, chosen.cpu()][:, None],
                lambda x: x[rows[:, None], :, chosen.cpu()[:, None], columns].mT[:, :, None],
            )
        self.advance()
        return outputs.logits[:, -1], chosen

    def sibling_mask(self) -> Tensor | dict[str, Tensor]:
        """Additive mask [B, 1, k, t + k]: 0 on the valid prefix and on each sibling itself. Kept, and changed by one
        column a step; of layers with a window the columns that leave it are closed."""
        t, k, device = self.length, self.k, self.loop.ids.device
        types = set(getattr(self.text, "layer_types", None) or ())
        window = getattr(self.text, "sliding_window", None)
        sliding = window is not None and (
            "sliding_attention" in types or (not types and getattr(self.text, "use_sliding_window", True))
        )
        least = torch.finfo(self.hidden.dtype).min
        if not self.bias:
            full = torch.zeros(self.rows, 1, k, self.cache.capacity, dtype=self.hidden.dtype, device=device)
            if self.valid is not None:
                full.masked_fill_(~self.valid[:, None, None], least)
            self.bias = [full, full.clone()] if sliding else [full]
            self.siblings = torch.full((k, k), least, dtype=full.dtype, device=device).fill_diagonal_(0)
            if sliding and t > window:
                self.bias[1][..., : t - window] = least
        if sliding and t >= window:
            self.bias[1][..., t - window] = least
        for bias in self.bias:
            if t:
                bias[..., t - 1] = 0 if self.valid is None else bias[..., t - 1].masked_fill(
                    self.valid[:, None, None, t - 1], 0)  # fmt: skip
            bias[..., t : t + k] = self.siblings
        masks = [bias[..., : t + k] for bias in self.bias]
        if not sliding:
            return masks[0]
        return {"full_attention": masks[0], "sliding_attention": masks[1]} if types else masks[1]

    def repeat(self, tokens: Tensor, probabilities: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """Siblings are rows: one pass of [B · k, 1] tokens; the winner's slot is copied to its siblings."""
        start, k, rows, chosen = self.length, self.k, torch.arange(self.rows), None
        if self.cache.layers[0].store[0].shape[0] == self.rows and k > 1:
            self.widen()

        def pick(hidden: Tensor) -> Tensor:
            nonlocal chosen
            chosen = self.select(hidden.unflatten(0, (self.rows, k))[:, :, -1], probabilities, alpha)
            return self.hidden[:, start, None]

        valid = None if self.valid is None else self.valid[:, : start + 1].repeat_interleave(k, 0)
        inputs = self.place(valid, self.next_position.repeat_interleave(k, 0))
        outputs = self.run(tokens.reshape(-1, 1), pick, lambda logits: logits.unflatten(0, (-1, k))[rows, chosen],
                           **self.kwargs, **inputs)  # fmt: skip
        self.cache.commit_row(start, chosen, k)

        def winner(x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, k))[rows, chosen.cpu()]

        self.loop.record(outputs, winner, winner)
        self.advance()
        return outputs.logits[:, -1], chosen

    def widen(self) -> None:
        """k rows for each: keys and values, and what an encoder gave."""
        k = self.k
        self.cache.batch_repeat_interleave(k)

        def repeated(x: Tensor) -> Tensor:
            return x.expand(k, *x.shape[1:]) if self.rows == 1 else x.repeat_interleave(k, 0)

        if self.seq2seq:
            for layer in self.past.cross_attention_cache.layers:
                layer.keys, layer.values = repeated(layer.keys), repeated(layer.values)
            encoder = self.kwargs["encoder_outputs"]
            self.kwargs["encoder_outputs"] = type(encoder)(last_hidden_state=repeated(encoder[0]))
            if "attention_mask" in self.kwargs:
                self.kwargs["attention_mask"] = repeated(self.kwargs["attention_mask"])

    def sequential(self, tokens: Tensor, probabilities: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """Siblings one after another: k passes of [B, 1] tokens, of each of which one slot is kept."""
        start, rows = self.length, torch.arange(self.rows)
        hidden, logits, slots, states = [], [], [], []

        def keep(x: Tensor) -> Tensor:
            hidden.append(x[:, -1])
            return x[:, -1:]

        valid = None if self.valid is None else self.valid[:, : start + 1]
        inputs = self.place(valid, self.next_position)
        for j in range(self.k):
            outputs = self.run(tokens[:, j : j + 1], keep, lambda x: x[:, -1:], **self.kwargs, **inputs)
            logits.append(outputs.logits[:, -1])
            slots.append(self.cache.slots(start))
            states.append(outputs if self.loop.keeps_hidden or self.loop.keeps_attentions else None)
            self.cache.rollback(1)
        chosen = self.select(torch.stack(hidden, 1), probabilities, alpha)
        where = chosen.cpu()
        self.cache.write_slots(
            start, [torch.stack(x)[where, :, :, rows].permute(1, 2, 0, 3, 4) for x in zip(*slots, strict=True)]
        )
        if states[0] is not None:
            self.loop.record(_Stacked(states, where))
        self.advance()
        return torch.stack(logits, 1)[rows, where], chosen

    def finish(self) -> Any:
        """The cache, without the token that was appended last: greedy search has not read that one yet."""
        from ._cache import select_rows

        self.cache.rollback(1)
        if self.cache.layers[0].store[0].shape[0] != self.rows:  # "repeat": one row of each group of siblings
            select_rows(self.past, torch.arange(self.rows) * self.k)
        return self.past


class _Stacked:
    """Of several passes' outputs, each row's from the pass that was chosen for it."""

    def __init__(self, outputs: list[Any], chosen: Tensor):
        self._outputs, self._chosen = outputs, chosen

    def __getattr__(self, name: str) -> tuple[Tensor, ...]:
        layers = zip(*(getattr(output, name) for output in self._outputs), strict=True)
        rows = torch.arange(len(self._chosen))
        return tuple(torch.stack(layer)[self._chosen, rows] for layer in layers)
