"""The Triton kernels of both attentions across frames, in the interpreter, against the reference in float64. What only
temporal attention has to show is in test_kernels_temporal_attention.py."""

import interpreter  # noqa: F401 (leaves this file out where there is none)
import pytest
import torch
from fastcontrast.kernels import _frames, frame_attention, temporal_attention
from fastcontrast.kernels.frame_attention import Tile, Tiles
from frames import OPS, assert_right, evaluate, inputs, layouts, padding, truth, valid_of

from fastcontrast.ops import _attend, frame_rules, trace
from fastcontrast.testing import assert_as_good_as, relative_error

# Of numbers that a mask throws away; and of numpy's own, about scalars.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*scalar may lead.*"),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(frame_attention, "tiles_of", lambda *_: Tiles(*[Tile(16, 16, 4, 1)] * 3))
    monkeypatch.setattr(frame_attention, "ROWS", 16)
    monkeypatch.setattr(temporal_attention, "tile_of", lambda *_: (4, 16, 4))


def right(op: str, tensors: list[torch.Tensor], **options) -> None:
    assert_right(op, tensors, implementation="triton", **options)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("rule", "kind", "shape", "extra"),
    [
        ("first_previous", "lengths", (2, 3, 3, 1, 8), None),
        (frame_rules.frames("first", -1, 0), "none", (1, 3, 3, 2, 8), 2),
        ("causal", "mask", (2, 2, 3, 1, 8), (3, "shared")),
    ],
    ids=str,
)
def test_rules_and_padding(rule, kind, shape, extra, op):
    """A rule is a matrix here, of zeros or counts, of all clips or each. What padding holds, NaN, does not matter."""
    tensors, options = inputs(*shape, hk=1, extra=extra), padding(kind, *shape[:2])
    for x in tensors[:3]:
        x[~valid_of(options, *shape[:2])] = float("nan")
    right(op, tensors, rule=rule, **options)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (1, 2, 17, 1, 40), (1, 1, 5, 1, 72)], ids=str)
def test_sizes(shape, op):
    right(op, inputs(*shape, extra=1), rule="first_previous")


@pytest.mark.parametrize("s", [32, 37])
def test_tiles_and_keys_of_another_length(s):
    right("frame_attention", inputs(1, 1, 32, 1, 8, s=s, extra=(35, "shared")), rule="self")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("first", [0, 3])
def test_layouts(first, op):
    """q, k and v in three of the six."""
    tensors = inputs(2, 2, 3, 2, 8)
    views = [[*layouts(x).values()][first + i] for i, x in enumerate(tensors)]
    got = evaluate(op, views, rule="swap", implementation="triton")
    for x, want in zip(got, truth(op, tensors, rule="swap"), strict=True):
        assert relative_error(x, want) < 2e-5
    assert got[0].stride() == torch.empty_like(views[0]).stride()


@pytest.mark.parametrize("op", OPS)
def test_expanded_keys(op):
    q, k, v = inputs(2, 2, 2, 1, 8)
    assert_right(op, [q, k[:, :1].expand_as(q), v[:1].expand_as(q)], rule="all", implementation="triton")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("extra", [2, (1, "shared")], ids=str)
def test_packed_clips_are_each_clip_alone(extra, op):
    """With an empty one between them."""
    q, k, v, *more = inputs(1, 4, 3, 1, 8, extra=extra)
    more = [torch.cat([x, 2 * x, -x]) for x in more] if isinstance(extra, tuple) else [x[0] for x in more]
    tensors, cu = [q[0], k[0], v[0], *more], torch.tensor([0, 1, 1, 4])
    packed = evaluate(op, tensors, rule="first_previous", cu_frames=cu, implementation="triton")
    for got, want in zip(packed, truth(op, tensors, rule="first_previous", cu_frames=cu), strict=True):
        assert relative_error(got, want) < 2e-5


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_good_as_dense(dtype, op):
    """But for the interpreter, which cuts bfloat16 off instead of rounding it."""
    tensors = inputs(1, 3, 3, 1, 40, extra=2, dtype=dtype)
    ours = evaluate(op, tensors, rule="first_previous", implementation="triton")
    dense = evaluate(op, tensors, rule="first_previous", implementation="reference")
    for got, naive, want in zip(ours, dense, truth(op, tensors, rule="first_previous"), strict=True):
        assert got.dtype == naive.dtype
        assert_as_good_as(got, want, naive, factor=2 if dtype == torch.float16 else 4)


@pytest.mark.parametrize("op", OPS)
def test_queries_without_keys(op):
    tensors = inputs(1, 3, 2, 1, 8)
    nobody = frame_rules.explicit(torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 7]]))
    got = evaluate(op, tensors, rule=nobody, implementation="triton")
    assert (got[0][:, 1] == 0).all() and (got[1][:, 1] == -torch.inf).all() and (got[2][:, 1] == 0).all()
    for x, want in zip(got, truth(op, tensors, rule=nobody), strict=True):
        assert relative_error(x, want) < 2e-5


@pytest.mark.parametrize("op", OPS)
def test_large_scores(op):
    right(op, inputs(1, 2, 2, 1, 8), rule="all", scale=30.0, limit=1e-4)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 2, 8), (1, 0, 1, 1, 8), (2, 3, 0, 2, 8), (1, 1, 2, 1, 0)], ids=str)
def test_nothing_to_do(shape, op):
    got = evaluate(op, inputs(*shape, extra=(2, "shared")), rule="all", implementation="triton")
    assert all((x == 0).all() for x in got[2:])


@pytest.mark.parametrize("op", OPS)
def test_trace_names_it_and_two_runs_have_the_same_bits(op):
    tensors = inputs(1, 5, 2, 1, 8)
    with trace() as ran:
        first, second = (evaluate(op, tensors, rule="first", implementation="triton") for _ in range(2))
    assert {(choice.op, choice.implementation) for choice in ran} == {(op, "triton")}
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert (first[3][:, 1:] == 0).all() and (first[4][:, 1:] == 0).all()  # frames that no query reads
    for x, want in zip(first, truth(op, tensors, rule="first"), strict=True):  # of three shares
        assert relative_error(x, want) < 2e-5


# ---------------------------------------------------------------------------------------------------------- the launch


def clips_of(rule, frames: int) -> _attend.Clips:
    q, k, v = inputs(1, frames, 3, 1, 8)
    return _attend.Clips(q, k, v, None, None, frame_rules.count_matrix(rule, frames), None, None, 1.0)


@pytest.mark.parametrize("frames", [1, 9])
def test_the_plan_shares_out_every_frame_and_fits(frames):
    """No share is of more than twice the average; those of frames with several fit the parts."""
    for rule in ("first", "first_previous", "all", frame_rules.causal_window(0, sink=3)):
        clips = clips_of(rule, frames)
        launch, plan = frame_attention.plan_launch(clips)
        launch.run()
        attended = (clips.count > 0).sum(0)
        shares = plan.ends[0].diff(prepend=torch.zeros(1, dtype=torch.int32))
        assert torch.equal(shares, -(-attended // plan.chunk_of).int())
        assert plan.chunk_of <= 2 * attended.float().mean() + 1
        assert plan.ends[0, -1] <= frames + frames // 2
        assert plan.part_ends[0, -1] == shares[shares > 1].sum() <= frames


def test_widths_are_two_chunks_where_that_is_less():
    widths = {8: (16, 0), 40: (32, 16), 64: (64, 0), 72: (64, 16), 80: (64, 16), 88: (64, 32), 128: (128, 0)}
    assert {width: _frames.chunks(width) for width in (*widths, 160)} == {**widths, 160: (128, 32)}
    assert all(sum(_frames.chunks(width)) >= width for width in range(1, 257))


def test_views_know_their_alignment():
    q = torch.zeros(2, 3, 4, 5, 40)
    assert _frames.view(q)[1:] == tuple(2 * x for x in q.stride()[:4])
    assert _frames.view(q[:, :1])[1:] == (2 * q.stride(0), 0, 2 * q.stride(2), 80)
    assert _frames.alignment([_frames.view(q), _frames.View(None)], 40) == 8
    assert _frames.alignment([_frames.view(q[..., :32])], 32) == 8
    assert _frames.alignment([_frames.view(torch.zeros(2, 3, 4, 5, 48))], 48) == 16
    assert _frames.alignment([_frames.view(torch.zeros(2, 3, 4, 5, 41)[..., :40])], 40) == 1
