"""What the Triton kernel of temporal attention alone has to show, in the interpreter; the rest is with frame
attention's, in test_kernels_frame_attention.py."""

import interpreter  # noqa: F401 (leaves this file out where there is none)
import pytest
import torch
from fastcontrast.kernels import temporal_attention
from frames import assert_right, inputs

from fastcontrast.ops import _attend, frame_rules

# Of numbers that a mask throws away; and of numpy's own, about scalars.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*scalar may lead.*"),
]


@pytest.mark.parametrize("frames", [17, 33])
def test_frames_up_to_a_tile(frames):
    tensors = inputs(1, frames, 3, 2, 8, hk=1)
    assert_right("temporal_attention", tensors, rule=frame_rules.window(4, 9), implementation="triton")


@pytest.mark.parametrize("extra", [1, (2, "shared")], ids=str)
def test_tiles_of_one_head_add_up_what_extra_keys_get(extra):
    tensors = inputs(1, 3, 3, 4, 8, hk=2, extra=extra)
    assert_right("temporal_attention", tensors, rule="causal", implementation="triton")


def test_it_refuses_more_frames_than_a_tile_holds():
    tensors = inputs(1, _attend.LONGEST_TILE + 1, 1, 1, 8)
    with pytest.raises(NotImplementedError, match="it holds 128 frames, these are 129"):
        assert_right("temporal_attention", tensors, implementation="triton")
    tensors = inputs(1, 17, 1, 1, 160)
    with pytest.raises(NotImplementedError, match="its tile of 4096 numbers does not hold 17 frames of width 160"):
        assert_right("temporal_attention", tensors, implementation="triton")


@pytest.mark.parametrize("backward", [False, True])
def test_a_tile_is_powers_of_two(backward):
    for frames in (1, 16, 17, 100, 128):
        for width in (8, 40, 72, 80, 160, 256):
            q = torch.empty(1, frames, 2, 1, width, dtype=torch.bfloat16, device="meta")
            clips = _attend.Clips(q, q, q, None, None, q.new_empty(frames, frames), None, None, 1.0)
            pos, bf, warps = temporal_attention.tile_of(clips, backward)
            assert bf >= max(16, frames) and pos <= warps <= 8
            assert all(x & (x - 1) == 0 for x in (pos, bf, warps))
