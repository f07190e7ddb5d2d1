"""Count matrices: the table of rules, multisets, and what lengths change."""

import pytest
import torch

from fastcontrast.ops import frame_rules
from fastcontrast.ops.frame_rules import causal, causal_window, count_matrix, explicit, frames, window


@pytest.mark.parametrize(
    ("rule", "rows"),
    [
        ("self", ["1000", "0100", "0010", "0001"]),
        ("first", ["1000", "1000", "1000", "1000"]),
        ("previous", ["1000", "1000", "0100", "0010"]),
        ("first_previous", ["2000", "2000", "1100", "1010"]),
        ("all", ["1111"] * 4),
        ("causal", ["1000", "1100", "1110", "1111"]),
        (causal(2), ["1100", "1100", "1111", "1111"]),
        (causal(3), ["1110", "1110", "1110", "1111"]),
        (window(1, 0), ["1000", "1100", "0110", "0011"]),
        (window(0, 2), ["1110", "0111", "0011", "0001"]),
        (causal_window(1), ["1000", "1100", "0110", "0011"]),
        (causal_window(1, sink=1), ["1000", "1100", "1110", "1011"]),
        (frames(-1, "first"), ["2000", "2000", "1100", "1010"]),
        (frames("first", -1, 0), ["3000", "2100", "1110", "1011"]),
        (frames("mid", "last"), ["0101"] * 4),
        (frames(1, 9), ["0101", "0011", "0002", "0002"]),
    ],
    ids=str,
)
def test_the_table(rule, rows):
    count = count_matrix(rule, 4)
    assert count.dtype == torch.int32
    assert count.tolist() == [[int(c) for c in row] for row in rows]


def test_first_previous_as_published_code_gathers_it():
    for length in (1, 2, 5, 16):
        count = torch.zeros(length, length, dtype=torch.int32)
        for f in range(length):
            for g in (0, max(f - 1, 0)):
                count[f, g] += 1
        assert torch.equal(count_matrix("first_previous", length), count)


def test_swap():
    assert count_matrix("swap", 2).tolist() == [[0, 1], [1, 0]]
    with pytest.raises(ValueError, match="rule swap is for clips of 2 frames, got 3"):
        count_matrix("swap", 3)


@pytest.mark.parametrize("rule", [frames("mid", "last", 1), frames(2, -1), "first_previous", window(1, 1)], ids=str)
def test_a_padded_clip_is_the_clip_alone(rule):
    lengths = torch.tensor([4, 1, 3, 0])
    padded = count_matrix(rule, 4, lengths)
    assert padded.shape == (4, 4, 4)
    for count, length in zip(padded, lengths.tolist(), strict=True):
        assert torch.equal(count[:length, :length], count_matrix(rule, length))


def test_explicit():
    matrix = torch.tensor([[0, 2], [1, 1]])
    assert torch.equal(count_matrix(explicit(matrix), 2), matrix.int())
    assert count_matrix(explicit(matrix > 0), 2).tolist() == [[0, 1], [1, 1]]
    assert count_matrix(explicit(matrix.expand(3, 2, 2)), 2).shape == (3, 2, 2)
    with pytest.raises(ValueError, match=r"must be \[3, 3\] for clips of 3 frames"):
        count_matrix(explicit(matrix), 3)


def test_rules_are_values():
    assert window(1, 2) == window(1, 2) and window(1, 2) != window(2, 1)
    assert str(frames(-1, "first")) == "frames(-1, 'first')" and str(causal_window(4, 2)) == "causal_window(4, 2)"
    assert count_matrix(window(1, 2), 5) is count_matrix(window(1, 2), 5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: frames(), ValueError, "frames: at least one entry"),
        (lambda: frames(1.5), ValueError, "frames: entries must be integers, .* got 1.5"),
        (lambda: frames("second"), ValueError, "frames: entries .* got 'second'"),
        (lambda: window(-1, 0), ValueError, "window: left must be an integer of at least 0, got -1"),
        (lambda: causal(0), ValueError, "causal: chunk must be an integer of at least 1, got 0"),
        (lambda: causal_window(2, True), ValueError, "causal_window: sink must be an integer .* got True"),
        (lambda: explicit(torch.ones(2, 2)), TypeError, "explicit: counts must be an integer tensor, got float32"),
        (lambda: explicit(torch.ones(2, 3).long()), ValueError, r"explicit: counts must be \[F, F\] .* got \[2, 3\]"),
        (lambda: explicit(-torch.eye(2).long()), ValueError, "explicit: counts must be at least 0, got -1"),
        (lambda: frame_rules.named("op", "next"), ValueError, "op: rule must be one of 'self', .* got 'next'"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
