"""Which frames a frame attends: a rule gives the count matrix c[f, g], how often query frame f attends key frame g.

Counts are a multiset, for published code concatenates clipped indices: under `frames("first", -1)` frame 1 attends
frame 0 twice, which changes its softmax as soon as other keys are there. With [P] = 1 where P holds, else 0, and L the
number of valid frames of the clip:

    "self"                       [g = f]
    "first"                      [g = 0]
    "previous"                   [g = max(f − 1, 0)]
    "first_previous"             [g = 0] + [g = max(f − 1, 0)]
    frames(e₁, e₂, …)            Σ_e [g = i_e(f)],  i of an integer r: clip(f + r, 0, L − 1), of "first",
                                 "mid", "last": 0, (L − 1) // 2, L − 1
    "all"                        1
    window(left, right)          [−left ≤ g − f ≤ right], nothing clipped
    "causal", causal(chunk)      [g // chunk ≤ f // chunk], both directions inside a chunk
    causal_window(left, sink)    [g ≤ f] · [f − g ≤ left or g < sink]
    "swap"                       [g = 1 − f], clips of two frames
    explicit(matrix)             any integers ≥ 0, [F, F] or [B, F, F]

A clip that is padded (`lengths`) behaves exactly like the clip alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# of f [F, 1], g [1, F] and L [B, 1, 1]: integers or truth values that broadcast to [B, F, F], [1, F, F] or [F, F]
Count = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rule:
    """A count matrix for any number of frames. `name` says it all, but for explicit matrices, which are their own."""

    name: str
    count: Count = field(compare=False, repr=False)
    matrix: Tensor | None = field(default=None, compare=False, repr=False)
    only: int | None = None  # the number of frames that it is for

    def __str__(self) -> str:
        return self.name


def _natural(rule: str, name: str, value: Any, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{rule}: {name} must be an integer of at least {least}, got {value!r}")
    return value


def frames(*entries: int | str) -> Rule:
    """The frames at these places, each as often as it is named: an integer r is f + r, clipped to the clip; "first",
    "mid" and "last" are frames of the clip."""
    if not entries:
        raise ValueError("frames: at least one entry is needed, got none")
    for entry in entries:
        if entry not in ("first", "mid", "last") and (isinstance(entry, bool) or not isinstance(entry, int)):
            raise ValueError(f"frames: entries must be integers, 'first', 'mid' or 'last', got {entry!r}")

    def count(f: Tensor, g: Tensor, length: Tensor) -> Tensor:
        last = length - 1
        places = {"first": torch.zeros_like(last), "mid": last.div(2, rounding_mode="floor"), "last": last}
        index = [places[e] if isinstance(e, str) else torch.minimum((f + e).clamp(min=0), last) for e in entries]
        return sum((g == i).int() for i in index)

    return Rule(f"frames({', '.join(map(repr, entries))})", count)


def window(left: int, right: int) -> Rule:
    """`left` frames before, the frame itself, `right` frames after; those outside the clip are dropped."""
    left, right = _natural("window", "left", left), _natural("window", "right", right)
    return Rule(f"window({left}, {right})", lambda f, g, length: (g - f >= -left) & (g - f <= right))


def causal(chunk: int = 1) -> Rule:
    """All frames up to the end of the frame's own chunk."""
    chunk = _natural("causal", "chunk", chunk, least=1)
    return Rule(f"causal({chunk})", lambda f, g, length: g // chunk <= f // chunk)


def causal_window(left: int, sink: int = 0) -> Rule:
    """The frame, `left` frames before it, and the first `sink` frames."""
    left, sink = _natural("causal_window", "left", left), _natural("causal_window", "sink", sink)
    return Rule(f"causal_window({left}, {sink})", lambda f, g, length: (g <= f) & ((f - g <= left) | (g < sink)))


def explicit(matrix: Tensor) -> Rule:
    """Counts as given: integers ≥ 0, [F, F] or, one for each clip, [B, F, F]."""
    if not isinstance(matrix, Tensor) or matrix.dtype.is_floating_point or matrix.dtype.is_complex:
        got = str(matrix.dtype).removeprefix("torch.") if isinstance(matrix, Tensor) else type(matrix).__name__
        raise TypeError(f"explicit: counts must be an integer tensor, got {got}")
    if matrix.ndim not in (2, 3) or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"explicit: counts must be [F, F] or [B, F, F], got {list(matrix.shape)}")
    if matrix.device.type == "cpu" and matrix.dtype != torch.bool and bool((matrix < 0).any()):
        raise ValueError(f"explicit: counts must be at least 0, got {int(matrix.min())}")
    return Rule(f"explicit({list(matrix.shape)})", lambda f, g, length: matrix, matrix)


NAMED = {
    "self": Rule("self", frames(0).count),
    "first": Rule("first", frames("first").count),
    "previous": Rule("previous", frames(-1).count),
    "first_previous": Rule("first_previous", frames("first", -1).count),
    "all": Rule("all", lambda f, g, length: torch.ones_like(g - f)),
    "causal": Rule("causal", causal().count),
    "swap": Rule("swap", lambda f, g, length: g == 1 - f, only=2),
}


def named(op: str, rule: Any) -> Rule:
    """A rule by its name, or itself."""
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, str) and rule in NAMED:
        return NAMED[rule]
    raise ValueError(
        f"{op}: rule must be one of {', '.join(map(repr, NAMED))} or made by frame_rules' frames, window, causal, "
        f"causal_window or explicit, got {rule!r}"
    )


_counts: dict[tuple, Tensor] = {}


def count_matrix(rule: Rule | str, frames: int, lengths: Tensor | None = None, device: Any = None) -> Tensor:
    """c [F, F] int32 of a clip of `frames` frames, or [B, F, F] of clips of which the first `lengths` [B] are valid.

    Only the places that index rules clip to depend on the lengths: what is attended in padding, or from there, has to
    be masked by whoever has any. Raises ValueError where a rule is for another number of frames.
    """
    rule = named("count_matrix", rule)
    if rule.only is not None and frames != rule.only:
        raise ValueError(f"rule {rule} is for clips of {rule.only} frames, got {frames}")
    if rule.matrix is not None and rule.matrix.shape[-1] != frames:
        raise ValueError(f"rule {rule} must be [{frames}, {frames}] for clips of {frames} frames")
    device = torch.device("cpu" if device is None else device) if lengths is None else lengths.device
    key = (rule.name, frames, device)
    constant = lengths is None and rule.matrix is None and not torch.compiler.is_compiling()
    if constant and key in _counts:
        return _counts[key]
    f = torch.arange(frames, device=device)
    length = torch.full((1, 1, 1), frames, device=device) if lengths is None else lengths.long()[:, None, None]
    count = rule.count(f[:, None], f[None], length).to(device=device, dtype=torch.int32)
    if lengths is not None:
        count = count.expand(len(lengths), frames, frames)
    elif count.ndim == 3 and len(count) == 1:
        count = count[0]
    count = count.expand(*count.shape[:-2], frames, frames).contiguous()
    if constant:
        _counts[key] = count
    return count
