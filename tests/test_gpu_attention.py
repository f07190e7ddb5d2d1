"""What only a CUDA device can show of attention across frames: `pytest -m gpu`, or `make gpu`.

Values and gradients are held against the reference in float64, on the device. A width, a type, a kind of padding or of
extra keys is a compilation of every kernel, numbers of frames and tokens and rules are almost none: the former are
paired, the latter crossed.
"""

import pytest
import torch
from fastcontrast.benchmarks._cuda import peak_of
from frames import OPS, PADDING, RULES, evaluate, inputs, layouts, padding, rule_of, truth

from fastcontrast import ops
from fastcontrast.ops import frame_attention, frame_rules, temporal_attention
from fastcontrast.testing import assert_as_good_as, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (8, 40, 64, 72, 80, 128, 160, 256)
SIZES = ((1, 1), (1, 50), (1, 197), (2, 1), (2, 197), (17, 1), (17, 50), (17, 197), (100, 1), (100, 50))  # F and T
PUBLIC = {**OPS}  # as they are
MIB = 1 << 20


def carried(op):
    """`op` on the device, whatever tensors come; out and lse come back. What lies on the device is taken as it lies."""

    def run(*tensors, extra=None, **options):
        q, k, v = (x.cuda() for x in tensors)
        extra = None if extra is None else tuple(x.cuda() for x in extra)
        options = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        return tuple(x.cpu() for x in op(q, k, v, extra=extra, **options))

    return run


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch):
    for name, op in PUBLIC.items():
        monkeypatch.setitem(OPS, name, carried(op))


def normal(*shape: int, dtype=torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def qkv(*shape: int, dtype=torch.bfloat16, seed: int = 0) -> list[torch.Tensor]:
    return [normal(*shape, dtype=dtype, seed=seed + i) for i in range(3)]


def assert_accurate(op: str, tensors: list[torch.Tensor], **options) -> None:
    """Float32 to 2e-5; half precision to twice the error that dense code of the same type makes."""
    got, want = evaluate(op, tensors, implementation="triton", **options), truth(op, tensors, **options)
    if tensors[0].dtype == torch.float32:
        assert all(relative_error(a, b) < 2e-5 for a, b in zip(got, want, strict=True))
        return
    dense = evaluate(op, tensors, implementation="reference", **options)
    for a, b, naive in zip(got, want, dense, strict=True):
        assert a.dtype == naive.dtype
        assert_as_good_as(a, b, naive, factor=2)


# ------------------------------------------------------------------------------------------------------ float64 truth


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_small_attention(dtype, op):
    tensors = inputs(2, 3, 7, 4, 40, hk=2, extra=2, dtype=dtype)
    assert_accurate(op, tensors, rule="first_previous", **padding("lengths", 2, 3))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("dtype", "kind", "extra", "hk"),
    [*((dtype, *case) for dtype in DTYPES[:2] for case in
       (("none", None, 4), ("lengths", 2, 2), ("mask", (3, "shared"), 1))),
     (torch.float16, "lengths", (3, "shared"), 2)],
    ids=str,
)  # fmt: skip
def test_every_rule_with_padding_extra_keys_and_grouped_heads(dtype, kind, extra, hk, op):
    tensors = inputs(3, 5, 37, 4, 40, hk=hk, extra=extra, dtype=dtype)
    for rule in RULES:
        assert_accurate(op, tensors, rule=rule_of(rule, 5), **padding(kind, 3, 5))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", PADDING)
def test_padding_alone(kind, op):
    """Neither extra keys nor groups: their kernels are others."""
    assert_accurate(op, inputs(3, 5, 37, 2, 64, dtype=torch.bfloat16), rule="causal", **padding(kind, 3, 5))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("width", "dtype"),
    [*((width, torch.bfloat16) for width in WIDTHS), *((width, torch.float32) for width in (80, 256)),
     (72, torch.float16)],
    ids=str,
)  # fmt: skip
def test_widths(width, dtype, op):
    assert_accurate(op, inputs(2, 3, 50, 2, width, dtype=dtype), rule="first_previous")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("frames", "tokens"), SIZES, ids=str)
def test_frames_and_tokens(frames, tokens, op):
    assert_accurate(op, inputs(1, frames, tokens, 2, 40, dtype=torch.bfloat16), rule=frame_rules.causal_window(3, 1))


@pytest.mark.parametrize("frames", [2, 17, 100])
def test_long_clips_in_float32(frames):
    assert_accurate("temporal_attention", inputs(2, frames, 3, 2, 32), rule="all")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 35000, 2, 8), (70000, 1, 1, 1, 8)], ids=str)
def test_more_problems_than_a_grid_has_in_its_other_dimensions(shape, dtype, op):
    """65,535 is where published kernels end. Of frame attention, clips: its scores of 35,000 tokens fit nowhere."""
    b, f, t, h, d = shape if op == "temporal_attention" or shape[2] == 1 else (35000, 2, 1, 2, 8)
    assert_accurate(op, inputs(b, f, t, h, d, extra=1, dtype=dtype), rule="all")


@pytest.mark.parametrize("op", OPS)
def test_layouts_are_the_contiguous_copy(op):
    """Each layout of all three, but for float32 sums whose order is that of the loads: few numbers round elsewhere."""
    tensors = [x.cuda() for x in inputs(2, 5, 37, 4, 40, dtype=torch.bfloat16)]
    want = evaluate(op, tensors, rule="first_previous", implementation="triton")
    views = [layouts(x) for x in tensors]
    for name in views[0]:
        got = evaluate(op, [x[name] for x in views], rule="first_previous", implementation="triton")
        for a, b in zip(got, want, strict=True):
            assert relative_error(a, b) < 1e-3, name
        out = PUBLIC[op](*(x[name] for x in views), rule="all", implementation="triton")
        assert out.stride() == torch.empty_like(views[0][name]).stride(), name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("extra", [2, (1, "shared")], ids=str)
def test_packed_clips(extra, op):
    """With an empty one between them."""
    q, k, v, *more = inputs(1, 6, 37, 2, 40, extra=extra)
    more = [torch.cat([x, 2 * x, -x]) for x in more] if isinstance(extra, tuple) else [x[0] for x in more]
    cu = torch.tensor([0, 2, 2, 6])
    assert_accurate(op, [q[0], k[0], v[0], *more], rule="first_previous", cu_frames=cu, max_frames=4)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("extra", [2, (3, "shared")], ids=str)
def test_two_runs_give_the_same_bits(extra, op):
    tensors = [x.cuda() for x in inputs(2, 17, 197, 4, 64, hk=2, extra=extra, dtype=torch.bfloat16)]
    first, second = (evaluate(op, tensors, rule="causal", implementation="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ------------------------------------------------------------------------------------- memory, streams, graphs, choices


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("layout", ["(b f) t c", "(b t) f c", "b h (f t) d"])
def test_a_forward_allocates_its_results_alone(layout, return_lse, op):
    q, k, v = (layouts(x)[layout] for x in qkv(2, 16, 1024, 8, 40))

    def forward():
        results = PUBLIC[op](q, k, v, rule="first_previous", return_lse=return_lse, implementation="triton")
        return results if return_lse else (results,)

    forward()  # compiles, and makes the counts of the rule
    assert peak_of(forward) <= MIB


@pytest.mark.parametrize("op", OPS)
def test_nothing_waits_for_the_device(op):
    tensors = [x.requires_grad_() for x in qkv(2, 5, 37, 2, 40)]
    lengths = torch.tensor([5, 3], device="cuda")

    def step():
        out = PUBLIC[op](*tensors, rule="first_previous", lengths=lengths, implementation="triton")
        return torch.autograd.grad(out, tensors, torch.ones_like(out))

    want = step()  # compiles kernels, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("lengths", [None, ([5, 2], [3, 4])], ids=["whole", "padded"])
def test_a_graph_replays_on_new_inputs(lengths, op):
    given, other = (qkv(2, 5, 37, 2, 40, seed=seed) for seed in (0, 100))
    if lengths is not None:
        for tensors, length in zip((given, other), lengths, strict=True):
            tensors.append(torch.tensor(length, device="cuda"))

    def forward(q, k, v, lengths=None):
        return PUBLIC[op](
            q, k, v, rule="first_previous", lengths=lengths, return_lse=True, implementation="triton"
        )  # fmt: skip

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward(*given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward(*given)
    for target, source in zip(given, other, strict=True):
        target.copy_(source)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, forward(*other), strict=True))


@pytest.mark.parametrize(
    ("op", "rule", "wanted"),
    [(frame_attention, "self", "sdpa"), (frame_attention, "first", "sdpa"), (frame_attention, "all", "sdpa"),
     (frame_attention, "previous", "triton"), (frame_attention, "first_previous", "triton"),
     (frame_attention, "causal", "triton"), (temporal_attention, "all", "triton"),
     (temporal_attention, "causal", "triton")],
    ids=lambda x: getattr(x, "__name__", x),
)  # fmt: skip
def test_what_runs_by_default(op, rule, wanted):
    """Torch's attention where its view is the problem, and right there too; with extra keys or lse no longer."""
    q, k, v = qkv(2, 5, 37, 4, 64)
    want = op(*(x.double() for x in (q, k, v)), rule=rule, implementation="reference")
    with ops.trace() as ran:
        out = op(q, k, v, rule=rule)
        op(q, k, v, rule=rule, return_lse=True)
        op(q, k, v, rule=rule, extra=(k[:, :, :1], v[:, :, :1]))
    assert [choice.implementation for choice in ran] == [wanted, "triton", "triton"]
    assert relative_error(out, want) < 1e-2


def test_more_frames_than_the_kernel_holds():
    q, k, v = qkv(1, 150, 9, 2, 40)
    with ops.trace() as ran:
        out = temporal_attention(q, k, v)
    assert [choice.implementation for choice in ran] == ["sdpa"]
    want = temporal_attention(*(x.double() for x in (q, k, v)), implementation="reference")
    assert relative_error(out, want) < 1e-2


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize("op", OPS)
def test_compiled_into_one_graph(op):
    tensors, up = [x.requires_grad_() for x in qkv(2, 5, 37, 2, 40)], normal(2, 5, 37, 2, 40, seed=9)
    torch._dynamo.reset()

    def run(*tensors):
        return PUBLIC[op](*tensors, rule="first_previous", implementation="triton")

    compiled = torch.compile(run, fullgraph=True)
    results = [(out, *torch.autograd.grad(out, tensors, up)) for out in (compiled(*tensors), run(*tensors))]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_offsets_beyond_32_bits(op):
    """Frames more than 2³¹ elements apart."""
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of device memory")
    held = torch.empty(3, 1 << 31, dtype=torch.bfloat16, device="cuda")
    held[:, : 4 * 2 * 64] = normal(3, 4 * 2 * 64)
    apart = held[:, : 4 * 2 * 64].view(1, 3, 4, 2, 64)
    near = apart.contiguous()
    for rule in ("all", "first_previous"):
        far, want = (
            PUBLIC[op](near, keys, keys, rule=rule, return_lse=True, implementation="triton") for keys in (apart, near)
        )
        assert all(torch.equal(a, b) for a, b in zip(far, want, strict=True))
