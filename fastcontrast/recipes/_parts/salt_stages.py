"""The weight of the teacher, step by step."""

from __future__ import annotations

from fastcontrast.ops import _check as check

OMEGA = 2 / 3


def omega_at(step: int, steps: int, omega: float = OMEGA, *, transition: str = "hard", window: int = 0) -> float:
    """ω of a step: `omega` in the first `steps` of stage 1, then 0, or on the way there for `window` more.

    transition: "hard" is 0 at once, "linear" has ω fall linearly, "ratio" ω / (1 − ω), which must be finite. steps = 0
    is plain training, steps ≥ all of them distillation to the end.
    """
    check.one_of("omega_at", "transition", transition, ("hard", "linear", "ratio"))
    if transition == "ratio" and omega >= 1:
        raise ValueError(f"omega_at: omega must be below 1 for a ratio, got {omega}")
    if step < steps:
        return omega
    if transition == "hard" or step >= steps + window:
        return 0.0
    left = 1 - (step - steps) / window
    if transition == "linear":
        return omega * left
    ratio = left * omega / (1 - omega)
    return ratio / (1 + ratio)
