"""What the papers on contrastive search report of representations and of texts: isotropy, repetition, diversity,
coherence, perplexity. Nothing here has gradients; numbers come out as Python floats."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALLEST_NORM = 1e-12  # of a vector of zeros, whose cosines then are 0


# --------------------------------------------------------------------------------------------------- representations


@torch.no_grad()
def isotropy(
    hidden: Tensor | Iterable[Tensor],  # [B, S, D], or an iterable of [S, D]
    lengths: Tensor | None = None,  # [B] integer
) -> float:
    """1 − Σ_b Σ_{i≠j} s_ij / Σ_b L_b (L_b − 1),   s_ij = cos(h_bi, h_bj).

    From Σ_{i≠j} s_ij = |Σ_i u_i|² − Σ_i |u_i|² in float64, so in one pass and without a matrix of pairs. It is a ratio
    over the corpus, in which long texts weigh more, not a mean of the texts' ratios.

    Args:
        hidden: states of the last layer; [B, S, D] or, a text at a time, any iterable (a generator, too) of [S, D].
        lengths: [B], the first L_b states of text b count. Only with [B, S, D].

    The paper takes the first 2,000 texts of at least two characters, cut to 256 tokens, and rounds to two digits.

    Raises: ValueError or TypeError naming what was expected and what came; ValueError if no text has two tokens.
    Source: Su and Collier 2022, "Contrastive Search Is What You Need For Neural Text Generation", equation 6.
    """
    cosines, pairs = 0.0, 0
    for text in _texts(hidden, lengths):
        unit = text.double()
        unit = unit / unit.norm(dim=1, keepdim=True).clamp(min=SMALLEST_NORM)
        cosines += float(unit.sum(0).square().sum() - unit.square().sum())
        pairs += text.shape[0] * (text.shape[0] - 1)
    if not pairs:
        raise ValueError("isotropy: hidden must have a text of at least two tokens, got none")
    return 1 - cosines / pairs


def _texts(hidden: Any, lengths: Any) -> Iterator[Tensor]:
    if isinstance(hidden, Tensor):
        if hidden.ndim != 3:
            raise ValueError(f"isotropy: hidden must be [B, S, D] or an iterable of [S, D], got {list(hidden.shape)}")
        b, s, _ = hidden.shape
        lengths = [s] * b if lengths is None else _lengths(lengths, b, s)
        yield from (text[:length] for text, length in zip(hidden, lengths, strict=True))
        return
    if lengths is not None:
        raise ValueError("isotropy: lengths go with hidden [B, S, D]; cut the texts of an iterable instead")
    for text in hidden:
        if not isinstance(text, Tensor) or text.ndim != 2:
            got = list(text.shape) if isinstance(text, Tensor) else type(text).__name__
            raise ValueError(f"isotropy: texts of an iterable must be [S, D], got {got}")
        yield text


def _lengths(lengths: Any, b: int, s: int) -> list[int]:
    values = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    if len(values) != b:
        raise ValueError(f"isotropy: lengths must be [{b}], got [{len(values)}]")
    if values and not 0 <= min(values) <= max(values) <= s:
        raise ValueError(f"isotropy: lengths must lie in [0, {s}], got values in [{min(values)}, {max(values)}]")
    return values


@torch.no_grad()
def coherence(
    prompts: Tensor,  # [N, D]
    continuations: Tensor,  # [N, D]
) -> float:
    """1/N Σ_n cos(prompts_n, continuations_n) of sentence features, as SimCTG measures it (with SimCSE's features).

    The later paper means something else by the word: the mean log-probability of a continuation under a scoring model,
    which is `-perplexity(model, ..., per_text=True).log().mean()`.

    Raises: ValueError naming what was expected and what came.
    Source: Su et al. 2022, "A Contrastive Framework for Neural Text Generation", section 5.
    """
    if prompts.ndim != 2 or not prompts.shape[0]:
        raise ValueError(f"coherence: prompts must be [N, D] with N at least 1, got {list(prompts.shape)}")
    if continuations.shape != prompts.shape:
        raise ValueError(
            f"coherence: continuations must be {list(prompts.shape)} like prompts, got {list(continuations.shape)}"
        )
    return float(F.cosine_similarity(prompts.double(), continuations.double(), dim=1, eps=SMALLEST_NORM).mean())


# --------------------------------------------------------------------------------------------------------------- texts


def rep_n(texts: Iterable[Sequence | Tensor | str], n: int, *, official: bool = False) -> float:
    """1 − Σ_t |distinct n-grams of t| / Σ_t |n-grams of t|: the fraction of n-grams that repeat one of their own text.

    Args:
        texts: sequences of token ids or of words, or 1-dimensional tensors; a `str` is split at white space.
        n: length of the n-grams. A text shorter than that has none; if all are, nothing repeats: 0.
        official: count as the papers' published code does, which drops the last n-gram of each text. For comparison
            with their figures; it also rounds to hundredths of a per cent before it multiplies, which is not done here.

    Raises: ValueError if n is not at least 1.
    Source: Welleck et al. 2020, "Neural Text Generation With Unlikelihood Training"; Su et al. 2022.
    """
    return _repetition([_words(text) for text in texts], n, official)


def diversity(
    texts: Iterable[Sequence | Tensor | str], n: Iterable[int] = (2, 3, 4), *, official: bool = False
) -> float:
    """Π_n (1 − rep_n), with `texts` and `official` as in `rep_n`."""
    words = [_words(text) for text in texts]
    return math.prod(1 - _repetition(words, size, official) for size in n)


def _words(text: Any) -> list:
    if isinstance(text, str):
        return text.split()
    return text.tolist() if isinstance(text, Tensor) else list(text)


def _repetition(texts: list[list], n: int, official: bool) -> float:
    if n < 1:
        raise ValueError(f"rep_n: n must be at least 1, got {n}")
    distinct = total = 0
    for text in texts:
        grams = [*zip(*(text[i:] for i in range(n)), strict=False)]
        if official:
            grams = grams[:-1]
        distinct, total = distinct + len(set(grams)), total + len(grams)
    return 1 - distinct / total if total else 0.0


@torch.no_grad()
def perplexity(
    model: nn.Module,
    input_ids: Tensor,  # [B, S] integer
    prompt_length: int | Tensor = 1,  # or [B] integer
    *,
    continuation: Tensor | None = None,  # [B, S] bool
    attention_mask: Tensor | None = None,  # [B, S]
    per_text: bool = False,
    batch_size: int = 8,
) -> float | Tensor:
    """exp(−1/N Σ log p(x_t | x_<t)) over the N tokens of the continuations.

    Args:
        model: a causal language model as Hugging Face has them: `model(input_ids=..., attention_mask=...).logits`. It
            is put into evaluation mode for the call.
        input_ids: [B, S], prompts and continuations in one.
        prompt_length: tokens of each text, padding not counted, that are given and not scored; one number or [B]. The
            first token has nothing before it and is never scored.
        continuation: [B, S], instead: True where a token is scored.
        attention_mask: [B, S], 0 at padding, on either side; None: no padding. Positions are counted from the first
            token that is none.
        per_text: the perplexity of each text [B], NaN for one without a scored token, instead of one over all tokens.
            What the paper on contrastive search calls coherence is the mean of its texts' mean log-probabilities:
            `-perplexity(..., per_text=True).log().mean()`, with a beginning-of-sequence token before each prompt.
        batch_size: texts in one call of the model, whose logits [batch_size, S, V] exist at a time.

    Returns a float (`per_text`: float64 [B]); NaN without a token to score. Log-probabilities are float32.
    Raises: ValueError naming what was expected and what came.
    """
    if input_ids.ndim != 2:
        raise ValueError(f"perplexity: input_ids must be [B, S], got {list(input_ids.shape)}")
    masks = {"continuation": continuation, "attention_mask": attention_mask}
    for name, mask in masks.items():
        if mask is not None and mask.shape != input_ids.shape:
            raise ValueError(f"perplexity: {name} must be {list(input_ids.shape)}, got {list(mask.shape)}")
    if isinstance(prompt_length, Tensor) and prompt_length.ndim and prompt_length.shape != input_ids.shape[:1]:
        expected = f"a number or [{input_ids.shape[0]}]"
        raise ValueError(f"perplexity: prompt_length must be {expected}, got {list(prompt_length.shape)}")
    if batch_size < 1:
        raise ValueError(f"perplexity: batch_size must be at least 1, got {batch_size}")
    token = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    position = token.cumsum(1) - 1
    scored = token & (position >= 1)
    if continuation is not None:
        scored &= continuation.bool()
    else:
        given = torch.as_tensor(prompt_length, device=input_ids.device)
        scored &= position >= (given[:, None] if given.ndim else given)
    forward = {"attention_mask": token.long()} if attention_mask is not None else {}
    # Models differ in whether they derive positions from the mask; those that can be told are.
    if forward and "position_ids" in inspect.signature(model.forward).parameters:
        forward["position_ids"] = position.clamp(min=0)
    sums = []
    with _evaluation(model):
        for rows in (slice(i, i + batch_size) for i in range(0, input_ids.shape[0], batch_size)):
            logits = model(input_ids=input_ids[rows], **{name: x[rows] for name, x in forward.items()}).logits
            targets = input_ids[rows].masked_fill(~scored[rows], -100)[:, 1:]
            losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none")
            sums.append(losses.view(targets.shape).sum(1, dtype=torch.float64))
    loss, count = torch.cat(sums) if sums else torch.zeros(0, dtype=torch.float64), scored.sum(1)
    if per_text:
        return (loss / count).exp()
    return float((loss.sum() / count.sum()).exp())


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Each module in evaluation mode, and afterwards in the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
