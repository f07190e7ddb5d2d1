"""Tolerance is earned: an error is judged against float64 truth and against what plain dense code makes of the same."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 4 * torch.finfo(torch.float32).eps


def _split(actual: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Difference and truth in float64 where truth is finite; elsewhere the two must be equal, NaN for NaN."""
    if actual.shape != truth.shape:
        raise AssertionError(f"shape {list(actual.shape)}, expected {list(truth.shape)}")
    actual, truth = actual.detach().double(), truth.detach().double()
    finite = truth.isfinite()
    if finite.all() and actual.isfinite().all():  # the usual case, in which nothing has to be picked out
        return actual - truth, truth
    torch.testing.assert_close(
        actual[~finite], truth[~finite], rtol=0, atol=0, equal_nan=True, msg=lambda text: f"infinities and NaN: {text}"
    )
    if not actual[finite].isfinite().all():
        where = (finite & ~actual.isfinite()).nonzero()[0].tolist()
        raise AssertionError(f"{actual[tuple(where)].item()} at {where}, expected {truth[tuple(where)].item()}")
    return actual[finite] - truth[finite], truth[finite]


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """‖actual − truth‖ / ‖truth‖; infinities and NaN must agree exactly. A truth of zeros allows zeros only."""
    difference, truth = _split(actual, truth)
    error, size = float(difference.norm()), float(truth.norm())
    return error / size if size else (0.0 if error == 0.0 else float("inf"))


def assert_as_good_as(
    actual: Tensor, truth: Tensor, naive: Tensor, factor: float = 1.2, *, magnitude: float = 0.0
) -> None:
    """‖actual − truth‖ ≤ factor · ‖naive − truth‖ + floor, for `truth` the float64 computation and `naive` the plain
    dense one, with fp32 logits, on the same inputs.

    floor = 4 · 2⁻²³ · max(‖truth‖, magnitude): product, exponential, sum and logarithm each round once, so a result of
    few numbers that happens to be nearer than that is luck and sets no standard. It is a twentieth of the 1e-5 that
    float32 results are held to. `magnitude` is the size of what was summed, to be given where the sum cancels and
    ‖truth‖ says nothing about its terms.
    """
    ours, size = _split(actual, truth)
    theirs, _ = _split(naive, truth)
    error, allowed = float(ours.norm()), factor * float(theirs.norm()) + FLOOR * max(float(size.norm()), magnitude)
    if error > allowed:
        raise AssertionError(
            f"error {error:.3e} exceeds {allowed:.3e} = {factor} × {float(theirs.norm()):.3e} of the dense computation"
            f" + floor; ‖truth‖ = {float(size.norm()):.3e}"
        )
