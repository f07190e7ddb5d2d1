"""Decoding from two distributions: extrapolate from the second to the first, and take the next token from that.

mixed = (1 + a) z₁ − a z₀, or on the tokens that z₁ finds plausible, z₁ − w z₀

AdaCAD, CAD, CFG: z₁ with a context or a condition, z₀ without, by one model in one batch. Contrastive decoding: z₁ by
an expert, z₀ by an amateur. DoLa: z₁ from the last layer, z₀ from an earlier one. All of them on `ops.two_logit_mix`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import two_logit_mix
from ..ops.two_logit_mix import Mix
from ._loop import CONTROL, Loop, accepts, check_config, check_prompt, decoder_layers, positions

# ------------------------------------------------------------------------------------------------------ what is read


class Reader:
    """A model and the texts it has read, in a cache of its own: `read(ids)` gives the logits of what comes next."""

    def __init__(self, model: Any, mask: Tensor | None, rows: int, capacity: int, inputs: dict[str, Any] | None = None):
        from ._cache import empty_cache

        self.model, self.mask, self.inputs = model, mask, inputs or {}
        self.seq2seq = bool(model.config.is_encoder_decoder)
        self.past, _ = empty_cache(model, capacity)
        self.positioned = not self.seq2seq and accepts(model, "position_ids")
        if accepts(model, "logits_to_keep"):
            self.inputs = {**self.inputs, "logits_to_keep": 1}
        self.next = torch.zeros(rows, 1, dtype=torch.long, device=model.device)  # position of the next token
        self.outputs: Any = None

    def read(self, ids: Tensor, loop: Loop, hidden: bool = False) -> Tensor:
        """Logits [R, V] after ids [R, n], which follow what was read."""
        inputs, first = dict(self.inputs), self.past.get_seq_length() == 0
        decoder = "decoder_" if self.seq2seq else ""
        ids = ids.to(self.model.device)
        if self.mask is not None and not first:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), ids.shape[1])], 1)
        if self.mask is not None or not self.seq2seq:
            inputs[f"{decoder}attention_mask"] = None if self.mask is None else self.mask.long()
        at = positions(self.mask if first else None, *ids.shape, ids.device) + (0 if first else self.next)
        self.next = at[:, -1:] + 1
        if self.positioned:
            inputs["position_ids"] = at
        asked = {"output_hidden_states": hidden or loop.keeps_hidden, "output_attentions": loop.keeps_attentions}
        self.outputs = self.model(
            **{f"{decoder}input_ids": ids}, **inputs, past_key_values=self.past, use_cache=True, return_dict=True,
            **{name: True for name, wanted in asked.items() if wanted},
        )  # fmt: skip
        return self.outputs.logits[:, -1]


def _extra(op: str, model_kwargs: dict[str, Any], allowed: Sequence[str] = ()) -> None:
    """Inputs that only fit the rows of `generate` are refused before the model runs."""
    others = sorted(name for name, x in model_kwargs.items() if x is not None and name not in CONTROL
                    and name not in allowed)  # fmt: skip
    if others:
        raise ValueError(f"{op}: the model's inputs must be text alone, got {', '.join(others)}")


def _unconditional(op: str, ids: Tensor | None, mask: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """The prompts without the context [R, L₀] and their padding."""
    rows = like.shape[0]
    if not isinstance(ids, Tensor):
        raise TypeError(
            f"{op}: unconditional_ids must be a tensor of the prompts without the context, got {type(ids).__name__}"
        )
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.shape[0] not in (1, rows) or ids.is_floating_point():
        raise ValueError(f"{op}: unconditional_ids must be token ids [{rows}, L], got {list(ids.shape)}")
    if ids.shape[1] == 0:
        raise ValueError(f"{op}: unconditional_ids must hold at least one token (a BOS), got {list(ids.shape)}")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"{op}: unconditional_mask must be {list(ids.shape)}, got {list(mask.shape)}")
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if not mask.any(1).all():
        raise ValueError(f"{op}: unconditional_mask must leave at least one token a row")
    return ids.expand(rows, -1).to(like.device), mask.expand(rows, -1).to(like.device)


class TwoContexts:
    """One model, one batch of 2R rows: R with the context, R without, padded on the left to one length."""

    def __init__(self, op: str, model: Any, loop: Loop, more: int, ids: Tensor | None, mask: Tensor | None,
                 model_kwargs: dict[str, Any]):  # fmt: skip
        self.loop, self.rows = loop, loop.ids.shape[0]
        seq2seq = bool(model.config.is_encoder_decoder)
        _extra(op, model_kwargs, ("encoder_outputs", "decoder_attention_mask") if seq2seq else ())
        if seq2seq:
            self._encode(op, model, loop, more, ids, mask, model_kwargs)
            return
        own = check_prompt(op, loop.ids, model_kwargs.get("attention_mask"))
        own = torch.ones_like(loop.ids, dtype=torch.bool) if own is None else own
        ids, mask = _unconditional(op, ids, mask, loop.ids)
        if not mask[:, -1].all():
            raise ValueError(f"{op}: unconditional_ids must be padded on the left, got rows that end in padding")
        length = max(loop.prompt, ids.shape[1])
        left = [torch.nn.functional.pad(x, (length - x.shape[1], 0)) for x in (loop.ids, ids, own, mask)]
        self.first, mask = torch.cat(left[:2]), torch.cat(left[2:])
        self.reader = Reader(model, None if mask.all() else mask, 2 * self.rows, length + more)

    def _encode(self, op, model, loop, more, ids, mask, model_kwargs) -> None:
        """Encoder-decoder: the contexts are the encoder's, both sides begin with the same tokens of the decoder."""
        with_context = model_kwargs["encoder_outputs"][0]
        ids, mask = _unconditional(op, ids, mask, loop.ids)
        without = model.get_encoder()(input_ids=ids, attention_mask=mask.long(), return_dict=True)[0]
        own = model_kwargs.get("attention_mask")
        own = with_context.new_ones(with_context.shape[:2], dtype=torch.bool) if own is None else own.bool()
        length = max(with_context.shape[1], without.shape[1])

        def pad(x: Tensor) -> Tensor:
            return torch.nn.functional.pad(x, (0, 0) * (x.ndim - 2) + (0, length - x.shape[1]))

        from transformers.modeling_outputs import BaseModelOutput

        inputs = {
            "encoder_outputs": BaseModelOutput(last_hidden_state=torch.cat([pad(with_context), pad(without)])),
            "attention_mask": torch.cat([pad(own), pad(mask)]).long(),
        }
        own = check_prompt(op, loop.ids, model_kwargs.get("decoder_attention_mask"))
        self.first = torch.cat([loop.ids, loop.ids])
        both = None if own is None else torch.cat([own, own])
        self.reader = Reader(model, both, 2 * self.rows, loop.prompt + more, inputs)

    def start(self) -> tuple[Tensor, Tensor]:
        return self._halves(self.reader.read(self.first, self.loop))

    def go_on(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self._halves(self.reader.read(torch.cat([tokens, tokens])[:, None], self.loop))

    def _halves(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        self.loop.record(self.reader.outputs, lambda x: x[: self.rows], lambda x: x[: self.rows])
        return logits[: self.rows], logits[self.rows :]

    def cache(self) -> Any:
        from ._cache import select_rows

        select_rows(self.reader.past, torch.arange(self.rows))
        return self.reader.past


class TwoModels:
    """An expert and an amateur that read the same text."""

    def __init__(self, op: str, model: Any, amateur: Any, loop: Loop, more: int, model_kwargs: dict[str, Any]):
        if amateur is None:
            raise ValueError(f"{op}: amateur must be a model of the same vocabulary, got None")
        if model.config.is_encoder_decoder or amateur.config.is_encoder_decoder:
            raise NotImplementedError(f"{op}: the models must be decoders alone, got an encoder-decoder")
        check_config(op, amateur, amateur.generation_config, {})
        _extra(op, model_kwargs)
        mask = check_prompt(op, loop.ids, model_kwargs.get("attention_mask"))
        capacity = loop.prompt + more
        self.op, self.loop = op, loop
        self.readers = [Reader(m, mask, len(loop.ids), capacity) for m in (model, amateur)]

    def start(self) -> tuple[Tensor, Tensor]:
        return self._read(self.loop.ids)

    def go_on(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self._read(tokens[:, None])

    def _read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        expert, amateur = (reader.read(ids, self.loop) for reader in self.readers)
        if expert.shape != amateur.shape:
            raise ValueError(
                f"{self.op}: amateur must have the expert's vocabulary of {expert.shape[1]}, got {amateur.shape[1]}"
            )
        self.loop.record(self.readers[0].outputs)
        return expert, amateur.to(expert.device, expert.dtype)

    def cache(self) -> Any:
        return self.readers[0].past


class TwoLayers:
    """The last layer, and of earlier ones the one whose distribution is farthest from it."""

    def __init__(self, op: str, model: Any, loop: Loop, more: int, layers: str | Sequence[int],
                 model_kwargs: dict[str, Any]):  # fmt: skip
        self.loop, self.head, self.layers = loop, model.get_output_embeddings(), candidate_layers(op, model, layers)
        self.seq2seq = bool(model.config.is_encoder_decoder)
        mask = check_prompt(
            op, loop.ids, model_kwargs.get("decoder_attention_mask" if self.seq2seq else "attention_mask")
        )
        allowed = ("encoder_outputs", "decoder_attention_mask") if self.seq2seq else ()
        _extra(op, model_kwargs, allowed)
        names = ("encoder_outputs", "attention_mask") if self.seq2seq else ()
        inputs = {name: model_kwargs[name] for name in names if name in model_kwargs}
        self.reader = Reader(model, mask, len(loop.ids), loop.prompt + more, inputs)
        self.chosen: list[int] = []

    def start(self) -> tuple[Tensor, Tensor]:
        return self._read(self.loop.ids)

    def go_on(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self._read(tokens[:, None])

    def _read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        last = self.reader.read(ids, self.loop, hidden=True)
        outputs = self.reader.outputs
        hidden = outputs.decoder_hidden_states if self.seq2seq else outputs.hidden_states
        self.loop.record(outputs)
        earlier = [self.head(hidden[j][:, -1].to(self.head.weight.device)).to(last.device) for j in self.layers]
        which = 0 if len(earlier) == 1 else farthest_layer(last, earlier)
        self.chosen.append(self.layers[which])
        return last, earlier[which]

    def cache(self) -> Any:
        return self.reader.past


def candidate_layers(op: str, model: Any, layers: str | Sequence[int]) -> list[int]:
    """Indices into the hidden states (0: the embeddings) of the layers that DoLa may contrast with."""
    config = model.config.get_text_config(decoder=True)
    n = decoder_layers(model.config)
    if isinstance(layers, str):
        first = 0 if not config.tie_word_embeddings else min(2, n - 1)
        ranges = {
            "low": range(first, n // 2 if n <= 40 else 20, 2),
            "high": range(n // 2 if n <= 40 else n - 20, n, 2),
        }
        if layers not in ranges:
            raise ValueError(f"{op}: layers must be 'low', 'high' or a list of layers, got {layers!r}")
        found = list(ranges[layers])
    else:
        found = [int(j) for j in layers]
    if not found or min(found) < 0 or max(found) >= n:
        raise ValueError(f"{op}: layers must lie in [0, {n}), below the last layer, got {found}")
    return found


def farthest_layer(last: Tensor, earlier: Sequence[Tensor]) -> int:
    """argmax_j ½ (KL(M_j ‖ P_N) + KL(M_j ‖ P_j)), M_j = (P_N + P_j) / 2, averaged over the batch."""
    log_n = last.float().log_softmax(-1)

    def divergence(z: Tensor) -> Tensor:
        log_j = z.float().log_softmax(-1)
        m = (log_n.exp() + log_j.exp()) / 2
        log_m = m.clamp(min=torch.finfo(m.dtype).tiny).log()
        return torch.where(m > 0, m * (2 * log_m - log_n - log_j), 0.0).mean() / 2

    return int(torch.stack([divergence(z) for z in earlier]).argmax())


# ------------------------------------------------------------------------------------------------------------ the loop


def _decode(op: str, model, input_ids, processors, criteria, config, sides: Callable[[Loop, int], Any],
            mix: Callable[[Tensor, Tensor], Mix], return_divergence: bool, stream_to, streamer, synced_gpus,
            model_kwargs: dict[str, Any]) -> Any:  # fmt: skip
    """Every method of this family: read both sides, mix, process, take a token, go on."""
    check_config(op, model, config, model_kwargs)
    if return_divergence and not config.return_dict_in_generate:
        raise ValueError(f"{op}: return_divergence needs return_dict_in_generate=True, got False")
    loop = Loop(op, model, input_ids, processors, criteria, config, stream_to, streamer, synced_gpus)
    weights, divergences = [], []
    with loop, torch.no_grad():
        pair = sides(loop, max(1, config.max_length - loop.prompt))
        logits = pair.start()
        while True:
            mixed = mix(*logits)
            weights.append(mixed.weight)
            divergences.append(mixed.divergence)
            scores = loop.process(mixed.log_probabilities)
            tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0] if config.do_sample else scores.argmax(-1)
            tokens = loop.append(tokens)
            if loop.done:
                break
            logits = pair.go_on(tokens)
        result = loop.result(pair.cache, model_kwargs.get("encoder_outputs"))
        if return_divergence:
            result["weights"], result["divergences"] = tuple(weights), tuple(divergences)
            if isinstance(pair, TwoLayers):
                result["layers"] = tuple(pair.chosen)
        return result


def adacad(
    model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, *,
    unconditional_ids: Tensor | None = None, unconditional_mask: Tensor | None = None, floor: float = 0.0,
    return_divergence: bool = False, stream_to: Any = None, streamer: Any = None, synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Any:  # fmt: skip
    """p ∝ softmax((1 + a) z₁ − a z₀), a = max(JSD(softmax z₁, softmax z₀), floor), anew in each step and row.

    z₁ are the logits of the prompt with its context document, z₀ those of the prompt without: the more the document
    contradicts what the model knows, the more it counts. For `generate(..., custom_generate=adacad, ...)` or
    `fastcontrast.generate(model, method="adacad", ...)`.

    Args:
        unconditional_ids: [R, L₀] or [L₀], the prompts without the context, padded on the left (for an encoder-decoder:
            what its encoder reads, padded on the right); at least one token.
        unconditional_mask: [R, L₀], 0 where that is padding.
        floor: the smallest a; 0 for answers, 0.3 for summaries.
        return_divergence: add `weights` and `divergences`, one tensor [R] a step, to the returned dictionary.
        stream_to: a streamer, as for `contrastive_search`.

    Both sides run in one batch. Greedy, or sampled under `do_sample=True`. Processors see log-probabilities of the mix.

    Raises: ValueError or TypeError naming the argument, what was expected and what came.

    Source: Wang et al., "AdaCAD: Adaptively Decoding to Balance Conflicts between Contextual and Parametric Knowledge"
    (2024).
    """
    without = unconditional_ids, unconditional_mask
    return _decode(
        "adacad", model, input_ids, logits_processor, stopping_criteria, generation_config,
        lambda loop, more: TwoContexts("adacad", model, loop, more, *without, model_kwargs),
        lambda z1, z0: two_logit_mix(z1, z0, floor=floor),
        return_divergence, stream_to, streamer, synced_gpus, model_kwargs,
    )  # fmt: skip


def cad(
    model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, *,
    unconditional_ids: Tensor | None = None, unconditional_mask: Tensor | None = None, weight: float = 0.5,
    return_divergence: bool = False, stream_to: Any = None, streamer: Any = None, synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Any:  # fmt: skip
    """p ∝ softmax((1 + weight) z₁ − weight z₀): context-aware decoding, `adacad` with one weight throughout.

    Args: as for `adacad`; weight: a, 0.5 for summaries, 1 for answers that contradict what the model knows.

    Source: Shi et al., "Trusting Your Evidence: Hallucinate Less with Context-aware Decoding" (2023).
    """
    without = unconditional_ids, unconditional_mask
    return _decode(
        "cad", model, input_ids, logits_processor, stopping_criteria, generation_config,
        lambda loop, more: TwoContexts("cad", model, loop, more, *without, model_kwargs),
        lambda z1, z0: two_logit_mix(z1, z0, weight, divergence=return_divergence),
        return_divergence, stream_to, streamer, synced_gpus, model_kwargs,
    )  # fmt: skip


def cfg(
    model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, *,
    unconditional_ids: Tensor | None = None, unconditional_mask: Tensor | None = None, guidance: float = 1.5,
    return_divergence: bool = False, stream_to: Any = None, streamer: Any = None, synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Any:  # fmt: skip
    """log p = log p₀ + guidance (log p₁ − log p₀) up to a constant: classifier-free guidance of text, `cad` with
    weight = guidance − 1.

    Args: as for `adacad`; unconditional_ids: None: the last token of each prompt, as `transformers` has it;
        guidance: 1 is no guidance.

    Source: Sanchez et al., "Stay on topic with Classifier-Free Guidance" (2023).
    """
    if unconditional_ids is None:
        if model.config.is_encoder_decoder:
            raise ValueError("cfg: unconditional_ids must be given for an encoder-decoder, got None")
        unconditional_ids = input_ids[:, -1:]
    without = unconditional_ids, unconditional_mask
    return _decode(
        "cfg", model, input_ids, logits_processor, stopping_criteria, generation_config,
        lambda loop, more: TwoContexts("cfg", model, loop, more, *without, model_kwargs),
        lambda z1, z0: two_logit_mix(z1, z0, guidance - 1.0, divergence=return_divergence),
        return_divergence, stream_to, streamer, synced_gpus, model_kwargs,
    )  # fmt: skip


def contrastive_decoding(
    model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, *,
    amateur: Any = None, plausibility: float = 0.1, amateur_weight: float = 1.0, amateur_temperature: float = 0.5,
    return_divergence: bool = False, stream_to: Any = None, streamer: Any = None, synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Any:  # fmt: skip
    """score = log p_expert − (amateur_weight / amateur_temperature) log p_amateur where p_expert ≥ plausibility · max
    p_expert, else −∞.

    Args:
        amateur: a smaller model of the same vocabulary.
        plausibility: β in [0, 1]; 1 is greedy search of the expert.
        amateur_weight, amateur_temperature: as in the authors' code, which divides the amateur's log-probabilities
            without normalising them anew.
        return_divergence, stream_to: as for `adacad`.

    Source: Li et al., "Contrastive Decoding: Open-ended Text Generation as Optimization" (2022).
    """
    op = "contrastive_decoding"
    if not amateur_temperature > 0:
        raise ValueError(f"{op}: amateur_temperature must be positive, got {amateur_temperature!r}")
    weight = amateur_weight / amateur_temperature
    return _decode(
        op, model, input_ids, logits_processor, stopping_criteria, generation_config,
        lambda loop, more: TwoModels(op, model, amateur, loop, more, model_kwargs),
        lambda z1, z0: two_logit_mix(z1, z0, weight, keep=1.0, plausibility=plausibility, divergence=return_divergence),
        return_divergence, stream_to, streamer, synced_gpus, model_kwargs,
    )  # fmt: skip


def dola(
    model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, *,
    layers: str | Sequence[int] = "high", plausibility: float = 0.1,
    return_divergence: bool = False, stream_to: Any = None, streamer: Any = None, synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Any:  # fmt: skip
    """score = log p_N − log p_j where p_N ≥ plausibility · max p_N, else −∞; j the layer farthest from the last, N.

    Args:
        layers: "low", "high" (every second layer of the lower, the upper half), or a list of indices into the hidden
            states, 0 being the embeddings. Of several, each step takes argmax_j ½ (KL(M_j ‖ p_N) + KL(M_j ‖ p_j)),
            M_j = (p_N + p_j) / 2, averaged over the batch.
        plausibility: β in [0, 1].
        return_divergence: also adds `layers`, the layer of each step.
        stream_to: as for `adacad`.

    Its authors advise a repetition penalty of 1.2. Where p_j = p_N on every plausible token the lowest token wins.

    Source: Chuang et al., "DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models" (2023).
    """
    return _decode(
        "dola", model, input_ids, logits_processor, stopping_criteria, generation_config,
        lambda loop, more: TwoLayers("dola", model, loop, more, layers, model_kwargs),
        lambda z1, z0: two_logit_mix(z1, z0, 1.0, keep=1.0, plausibility=plausibility, divergence=return_divergence),
        return_divergence, stream_to, streamer, synced_gpus, model_kwargs,
    )  # fmt: skip
