"""What temporal attention alone has to show; the rest is with frame attention, in test_frame_attention.py."""

import pytest
import torch
from frames import assert_right, inputs, layouts
from torch.nn import functional as F

from fastcontrast.ops import temporal_attention


def rearranged(q, k, v):
    """What motion modules do: to `(b t) f c` and back."""
    b, f, t, h, d = q.shape
    q, k, v = (x.permute(0, 2, 3, 1, 4).reshape(b * t, h, f, d) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).view(b, t, h, f, d).permute(0, 3, 1, 2, 4)


def test_it_equals_rearranging():
    tensors = [x.double().requires_grad_() for x in inputs(2, 5, 7, 3, 8)]
    ours, dense = temporal_attention(*tensors), rearranged(*tensors)
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-12)
    up = torch.randn_like(dense)
    pairs = zip(torch.autograd.grad(ours, tensors, up), torch.autograd.grad(dense, tensors, up), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "frames"), [("(b f) t c", 5), ("(b f) t c", 33), ("(b f) t (3 h d)", 6)])
def test_frames_at_the_caches_period(name, frames):
    """Frames a multiple of 128 KiB apart go over a stage, several positions of all heads at a time."""
    tensors = [layouts(x)[name] for x in inputs(1, frames, 256, 2, 64)]
    assert tensors[0].stride(1) * 4 % (128 << 10) == 0
    assert_right("temporal_attention", tensors, lengths=torch.tensor([frames - 1]))


def test_positions_of_keys_are_those_of_queries():
    q, k, v = inputs(1, 2, 3, 1, 8, s=4)
    with pytest.raises(ValueError, match=r"temporal_attention: k must have the 3 positions of q, got 4"):
        temporal_attention(q, k, v)
