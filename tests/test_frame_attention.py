"""Attention across frames, both operations: the reference against published formulations, every implementation against
the reference in float64. What only one of the two has to show is at the end, or in test_temporal_attention.py."""

import pytest
import torch
from frames import OPS, PADDING, RULES, assert_right, evaluate, inputs, layouts, padding, rule_of, truth, valid_of
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastcontrast import ops
from fastcontrast.ops import _attend, frame_attention, frame_rules
from fastcontrast.testing import assert_as_good_as, relative_error

HALF = (torch.bfloat16, torch.float16)

# ---------------------------------------------------------------------------------------- the reference, by other means


def concatenated(q, k, v, entries):
    """What models do: gather the frames that each frame attends, concatenate, attend."""
    keys, values = (torch.cat([x[:, index] for index in entries], 2).flatten(0, 1).transpose(1, 2) for x in (k, v))
    out = F.scaled_dot_product_attention(q.flatten(0, 1).transpose(1, 2), keys, values)
    return out.transpose(1, 2).unflatten(0, q.shape[:2])


@pytest.mark.parametrize(
    ("rule", "entries"),
    [
        ("first", lambda f: [[0] * f]),
        ("previous", lambda f: [[max(i - 1, 0) for i in range(f)]]),
        ("first_previous", lambda f: [[0] * f, [max(i - 1, 0) for i in range(f)]]),
        (frame_rules.frames("first", -1, 0), lambda f: [[0] * f, [max(i - 1, 0) for i in range(f)], [*range(f)]]),
        ("all", lambda f: [[i] * f for i in range(f)]),
    ],
    ids=["first", "previous", "first_previous", "three", "all"],
)
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_it_equals_gathering_and_concatenating(frames, rule, entries):
    """Counts are a multiset: at frame 1, `frames("first", -1, 0)` weighs frame 0 twice."""
    tensors = [x.double().requires_grad_() for x in inputs(2, frames, 6, 2, 8)]
    ours, dense = frame_attention(*tensors, rule=rule), concatenated(*tensors, entries(frames))
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-12)
    up = torch.randn_like(dense)
    pairs = zip(torch.autograd.grad(ours, tensors, up), torch.autograd.grad(dense, tensors, up), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_message_is_one_key_more():
    q, k, v, message, value = (x.double() for x in inputs(2, 3, 5, 2, 8, extra=1))
    dense = [
        F.scaled_dot_product_attention(
            q[:, f].transpose(1, 2),
            torch.cat([k[:, f], message[:, f]], 1).transpose(1, 2),
            torch.cat([v[:, f], value[:, f]], 1).transpose(1, 2),
        ).transpose(1, 2)
        for f in range(3)
    ]
    ours = frame_attention(q, k, v, rule="self", extra=(message, value))
    torch.testing.assert_close(ours, torch.stack(dense, 1), rtol=0, atol=1e-12)


def test_lse_is_that_of_the_scores():
    q, k, v = (x.double() for x in inputs(1, 3, 4, 2, 8))
    _, lse = frame_attention(q, k, v, rule="causal", scale=0.7, return_lse=True)
    scores = torch.einsum("bthd,bguhd->bhtgu", q[:, 1], k[:, :2]).flatten(3) * 0.7
    torch.testing.assert_close(lse[:, 1], scores.logsumexp(3))


# ------------------------------------------------------------------------------------------ implementations against it


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", PADDING)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_rule_and_padding(rule, kind, op):
    for extra, hk in ((None, 4), (2, 2), ((3, "shared"), 1)):
        tensors = inputs(3, 5, 7, 4, 12, hk=hk, extra=extra)
        options = {"rule": rule_of(rule, 5), **padding(kind, 3, 5)}
        for got, want in zip(
            evaluate(op, tensors, implementation="cpu", **options), truth(op, tensors, **options), strict=True
        ):
            assert relative_error(got, want) < 2e-5


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 8), (2, 2, 1, 3, 64), (1, 4, 197, 1, 40), (1, 3, 33, 2, 72), (1, 2, 9, 2, 80), (1, 3, 16, 1, 88),
     (1, 2, 5, 1, 256), (1, 17, 3, 2, 160), (1, 40, 2, 1, 24), (1, 5, 140, 1, 5), (1, 70, 1, 2, 8)],
    ids=str,
)  # fmt: skip
def test_sizes(shape, op):
    tensors = inputs(*shape)
    for rule in ("all", "first_previous"):
        for got, want in zip(
            evaluate(op, tensors, rule=rule, implementation="cpu"), truth(op, tensors, rule=rule), strict=True
        ):
            assert relative_error(got, want) < 2e-5


@pytest.mark.parametrize("s", [1, 13, 140])
def test_keys_of_another_length(s):
    assert_right("frame_attention", inputs(2, 3, 9, 2, 16, s=s), rule=frame_rules.window(1, 0))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_is_as_good_as_dense(dtype, op):
    tensors = inputs(2, 6, 10, 2, 40, extra=2, dtype=dtype)
    for rule in ("all", "first_previous"):
        ours = evaluate(op, tensors, rule=rule, implementation="cpu")
        dense = evaluate(op, tensors, rule=rule, implementation="reference")
        for got, naive, want in zip(ours, dense, truth(op, tensors, rule=rule), strict=True):
            assert got.dtype == naive.dtype
            assert_as_good_as(got, want, naive, factor=2)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
def test_large_scores_do_not_overflow(dtype, op):
    q, k, v = inputs(1, 4, 8, 2, 16, dtype=dtype)
    q, k = (100 * x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    tensors = [q.to(dtype), k.to(dtype), v]
    got, want = (f(op, tensors, rule="all", scale=0.01) for f in (evaluate, truth))
    assert all(x.isfinite().all() for x in got)
    assert relative_error(got[0], want[0]) < (2e-5 if dtype == torch.float32 else 1e-2)


# -------------------------------------------------------------------------------------------------------------- layouts


class Allocations(TorchDispatchMode):
    """Elements of what operations return in memory of its own."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {
            x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor) and x.device.type != "meta"
        }
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.untyped_storage().data_ptr() not in given:
                self.sizes.append(x.numel())
        return out


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", layouts(torch.zeros(1, 1, 1, 1, 1)))
def test_every_layout_is_read_in_place(name, op):
    tensors = inputs(2, 5, 9, 2, 40)
    plain = evaluate(op, tensors, rule="first_previous")
    views = [layouts(x)[name] for x in tensors]
    for got, want in zip(evaluate(op, views, rule="first_previous"), plain, strict=True):
        assert torch.equal(got, want)
    views = [x.detach().requires_grad_() for x in views]
    numel = views[0].numel()
    with Allocations() as forward:
        out = OPS[op](*views, rule="first_previous")
    assert [n for n in forward.sizes if n >= numel // 2] == [numel]  # the output
    order = sorted(range(4), key=lambda i: -views[0].stride(i))
    assert sorted(range(4), key=lambda i: -out.stride(i)) == order  # has the order of dimensions that q has
    up = torch.randn_like(out)
    with Allocations() as backward:
        torch.autograd.grad(out, views, up)
    assert [n for n in backward.sizes if n >= numel // 2] == [numel] * 3  # the gradients


@pytest.mark.parametrize("op", OPS)
def test_expanded_inputs_have_dense_gradients(op):
    q, k, v = inputs(2, 4, 5, 2, 8)
    one = [x[:, :1].expand(-1, 4, -1, -1, -1) for x in (k, v)]
    got = evaluate(op, [q, *one], rule="causal")
    for a, b in zip(got, truth(op, [q, *one], rule="causal"), strict=True):
        assert relative_error(a, b) < 2e-5
    assert all(x.is_contiguous() for x in got[3:])
    gapped = [torch.randn(2, 4, 5, 2, 16)[..., ::2] for _ in range(3)]  # the only one that is copied
    assert_right(op, gapped, rule="all")


@pytest.mark.parametrize("op", OPS)
def test_offsets_have_64_bits(op):
    """Frames 2³¹ + 64 elements apart, in memory that is reserved but hardly touched."""
    apart = 2**31 + 64
    big = torch.empty(apart + 4096, dtype=torch.bfloat16)
    q = big.as_strided((1, 2, 3, 2, 8), (0, apart, 16, 8, 1))
    small = torch.randn(1, 2, 3, 2, 8).bfloat16()
    q.copy_(small)
    got, want = (OPS[op](x, x, x, rule="all", implementation="cpu") for x in (q, small))
    assert torch.equal(got, want)


@pytest.mark.parametrize("op", OPS)
def test_more_than_65535_problems(op):
    tensors = inputs(1, 2, 9000, 8, 4) if op == "temporal_attention" else inputs(9000, 8, 1, 1, 4)
    got, want = (OPS[op](*tensors, rule="all", implementation=name) for name in ("cpu", "reference"))
    torch.testing.assert_close(got, want)


# -------------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("rule", ["all", "first_previous", frame_rules.frames("last", "mid"), "causal"], ids=str)
def test_padded_and_packed_clips_are_each_clip_alone(rule, implementation, op):
    dtype = torch.float64 if implementation == "reference" else torch.float32
    lengths, tolerance = torch.tensor([4, 0, 2, 1]), 1e-6
    tensors = inputs(4, 4, 6, 2, 8, extra=(2, "shared"), dtype=dtype)
    options = {"rule": rule, "implementation": implementation}
    out, lse = OPS[op](*tensors[:3], extra=tensors[3:], lengths=lengths, return_lse=True, **options)
    valid = torch.arange(4) < lengths[:, None]
    packed = [x[valid] for x in tensors[:3]]
    cu = F.pad(lengths.cumsum(0), (1, 0))
    out_p, lse_p = OPS[op](*packed, extra=tensors[3:], cu_frames=cu, return_lse=True, **options)
    torch.testing.assert_close(out_p, out[valid], rtol=0, atol=tolerance)
    torch.testing.assert_close(lse_p, lse[valid], rtol=0, atol=tolerance)
    assert (out[~valid] == 0).all() and (lse[~valid] == -torch.inf).all()
    for b, length in enumerate(lengths.tolist()):
        alone = [x[b : b + 1, :length] for x in tensors[:3]], [x[b : b + 1] for x in tensors[3:]]
        torch.testing.assert_close(
            OPS[op](*alone[0], extra=alone[1], **options), out[b : b + 1, :length], rtol=0, atol=tolerance
        )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("extra", [2, (2, "shared")], ids=str)
def test_packed_gradients(extra, op):
    lengths = torch.tensor([3, 0, 2])
    padded = inputs(3, 3, 4, 2, 8, extra=extra)
    valid, cu = torch.arange(3) < lengths[:, None], F.pad(lengths.cumsum(0), (1, 0))
    own = not isinstance(extra, tuple)
    packed = [x[valid] if i < 3 or own else x for i, x in enumerate(padded)]
    assert_right(op, packed, rule="all", cu_frames=cu, max_frames=3)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ["lengths", "mask"])
def test_what_padding_holds_does_not_matter(kind, implementation, op):
    tensors, options = inputs(3, 5, 6, 2, 8, extra=1), {"rule": "first_previous", **padding(kind, 3, 5)}
    clean = evaluate(op, tensors, implementation=implementation, **options)
    valid = valid_of(options, 3, 5)
    poisoned = [x.masked_fill(~valid[:, :, None, None, None], torch.nan) for x in tensors[:3]] + tensors[3:]
    for got, want in zip(evaluate(op, poisoned, implementation=implementation, **options), clean, strict=True):
        assert torch.equal(got, want)
    assert all((g[~valid] == 0).all() for g in clean[2:5])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_queries_without_keys(implementation, op):
    tensors = inputs(2, 4, 3, 2, 8)
    mask = torch.tensor([[False, True, True, True], [True] * 4])
    out, lse, *gradients = evaluate(op, tensors, rule="first", frame_mask=mask, implementation=implementation)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all() and lse[1].isfinite().all()
    assert all((g[0] == 0).all() and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 2, 8), (2, 0, 4, 2, 8), (2, 3, 0, 2, 8), (2, 3, 4, 0, 8)], ids=str)
def test_nothing_to_do(shape, op):
    for implementation in ("cpu", "reference"):
        tensors = [torch.zeros(shape, requires_grad=True) for _ in range(3)]
        out = OPS[op](*tensors, rule="all", implementation=implementation)
        assert out.shape == shape
        assert all(g.shape == shape for g in torch.autograd.grad(out.sum(), tensors))


# ----------------------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("op", OPS)
def test_permutations(op):
    q, k, v = inputs(3, 4, 5, 2, 8)
    out = OPS[op](q, k, v, rule="causal")
    for at in (0, 3) if op == "frame_attention" else (0, 2, 3):
        order = torch.randperm(q.shape[at])
        permuted = OPS[op](*(x.index_select(at, order) for x in (q, k, v)), rule="causal")
        torch.testing.assert_close(permuted, out.index_select(at, order), rtol=0, atol=1e-6)


@pytest.mark.parametrize("op", OPS)
def test_rules_that_coincide(op):
    q, k, v = inputs(2, 5, 6, 2, 8)
    run = OPS[op]
    everything = run(q, k, v, rule="all")
    assert torch.equal(run(q, k, v, rule=frame_rules.window(5, 5)), everything)
    torch.testing.assert_close(run(q, k, v, rule="causal")[:, 4], everything[:, 4], rtol=0, atol=1e-6)
    assert torch.equal(run(q, k, v, rule=frame_rules.frames(-1, "first")), run(q, k, v, rule="first_previous"))
    one = [x[:, :1] for x in (q, k, v)]
    assert torch.equal(run(*one, rule="all"), run(*one, rule="self"))
    two = [x[:, :2] for x in (q, k, v)]
    torch.testing.assert_close(run(*two, rule="swap"), run(q=two[0], k=two[1].flip(1), v=two[2].flip(1), rule="self"))


@pytest.mark.parametrize("op", OPS)
def test_two_runs_have_the_same_bits_and_unread_frames_no_gradient(op):
    tensors = inputs(2, 6, 40, 4, 24, hk=2, extra=(2, "shared"))
    first, second = (evaluate(op, tensors, rule="first_previous") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert (first[3][:, 5] == 0).all() and (first[4][:, 5] == 0).all() and (first[3][:, 4] != 0).any()


def test_only_frame_0_is_read_of_two():
    q, k, v = inputs(1, 2, 3, 1, 8)
    clean = frame_attention(q, k, v, rule="first_previous")
    k[:, 1], v[:, 1] = torch.nan, torch.nan
    assert torch.equal(frame_attention(q, k, v, rule="first_previous", implementation="cpu"), clean)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_groups_fewer_than_threads_share_frames(threads):
    before = torch.get_num_threads()
    tensors = inputs(1, 5, 300, 2, 16, hk=1, extra=1)
    want = truth("frame_attention", tensors, rule="causal")
    try:
        torch.set_num_threads(threads)
        got = evaluate("frame_attention", tensors, rule="causal")
    finally:
        torch.set_num_threads(before)
    assert all(relative_error(a, b) < 2e-5 for a, b in zip(got, want, strict=True))


# ------------------------------------------------------------------------------------------- how it is called, and not


@pytest.mark.parametrize("op", OPS)
def test_registration_and_compilation(op):
    q, k, v, ek, ev = (x.requires_grad_() for x in inputs(2, 3, 4, 2, 8, extra=1))
    count = frame_rules.count_matrix("causal", 3)
    raw = (q, k, v, ek, ev, count, None, None, 0.3, True, "cpu")
    torch.library.opcheck(getattr(torch.ops.fastcontrast, op), raw)

    def step(*x):
        out, lse = OPS[op](*x[:3], extra=x[3:], rule="causal", lengths=torch.tensor([3, 1]), return_lse=True)
        return out.square().sum() + lse[:, 0].sum()

    eager = torch.autograd.grad(step(q, k, v, ek, ev), (q, k, v, ek, ev))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(q, k, v, ek, ev), (q, k, v, ek, ev)), eager, strict=True):
        torch.testing.assert_close(a, b)


VIEWS = {
    "wide heads": (inputs(1, 2, 5, 1, 160), {}),
    "strided": (tuple(x[..., :160] for x in inputs(1, 3, 5, 2, 480)), {}),
    "fast bfloat16": (tuple(x.bfloat16() for x in inputs(1, 2, 256, 1, 40)), {}),
}
NO_VIEWS = {
    "C++ is faster": (inputs(1, 2, 5, 1, 128), {}),
    "C++ is faster, but": (tuple(x.bfloat16() for x in inputs(1, 2, 255, 1, 40)), {}),
    "grouped heads": ((*inputs(1, 2, 5, 2, 160)[:1], *inputs(1, 2, 5, 1, 160)[1:]), {}),
    "no log-sum-exp": (inputs(1, 2, 5, 1, 160), {"return_lse": True}),
    "padded frames": (inputs(1, 2, 5, 1, 160), {"lengths": torch.tensor([1])}),
}


@pytest.mark.parametrize("rule", ["self", "first", "all"])
@pytest.mark.parametrize("name", VIEWS)
def test_plain_attention_on_a_view_where_it_is_faster(monkeypatch, name, rule):
    tensors, options = VIEWS[name]
    monkeypatch.setattr(_attend, "fast_bf16", lambda device: True)
    tensors = [x.detach().requires_grad_() for x in tensors]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    with ops.trace() as ran:
        out = frame_attention(*tensors, rule=rule, **options)
    expected = frame_attention(*exact, rule=rule, implementation="reference", **options)
    assert ran[0].implementation == "sdpa"
    upstream = torch.randn_like(out)
    tolerance = 2e-2 if out.dtype == torch.bfloat16 else 1e-6
    assert relative_error(out, expected) < tolerance
    gradients = torch.autograd.grad(out, tensors, upstream), torch.autograd.grad(expected, exact, upstream.double())
    for ours, theirs in zip(*gradients, strict=True):
        assert relative_error(ours, theirs) < tolerance


@pytest.mark.parametrize("name", NO_VIEWS)
def test_plain_attention_on_a_view_says_why_not(monkeypatch, name):
    tensors, options = NO_VIEWS[name]
    monkeypatch.setattr(_attend, "fast_bf16", lambda device: True)
    with ops.trace() as ran:
        frame_attention(*tensors, rule="all", **options)
    assert ran[0].implementation == "cpu" and name in ran[0].refused["sdpa"]


@pytest.mark.parametrize("op", OPS)
def test_what_ran_and_why(op):
    tensors = inputs(1, 2, 3, 1, 8)
    with ops.trace() as ran:
        OPS[op](*tensors, rule="all")
    assert ran[0].op == op and ran[0].implementation == "cpu" and {"triton", "sdpa"} == {*ran[0].refused}
    with pytest.raises(NotImplementedError, match=f"{op}: implementation 'sdpa' cannot run: .*on a CPU C"):
        OPS[op](*tensors, rule="all", implementation="sdpa")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(OPS[op](*tensors, rule="all"), OPS[op](*tensors, rule="all"), rtol=0, atol=0)
        reference = OPS[op](*tensors, rule="all", implementation="reference")
    assert relative_error(reference, OPS[op](*(x.double() for x in tensors), rule="all")) < 1e-6


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_gradients_are_the_references(op):
    tensors = [x.requires_grad_() for x in inputs(1, 2, 3, 1, 8)]
    out = OPS[op](*tensors, rule="all")
    with pytest.raises(NotImplementedError, match=f"{op}: no gradient of its gradient"):
        torch.autograd.grad(out.sum(), tensors, create_graph=True)
    out = OPS[op](*tensors, rule="all", implementation="reference")
    (g,) = torch.autograd.grad(out.square().sum(), tensors[:1], create_graph=True)
    assert torch.autograd.grad(g.sum(), tensors[1])[0].abs().sum() > 0


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": [1]}, TypeError, "q must be a tensor, got list"),
        ({"q": torch.zeros(2, 3, 4, 8)}, ValueError, r"q must be \[B, F, T, H, D\], got \[2, 3, 4, 8\]"),
        ({"q": torch.zeros(2, 3, 4, 4, 8).long()}, TypeError, "q must be float32, .* got int64"),
        ({"k": torch.zeros(2, 2, 4, 4, 8)}, ValueError, r"k must be \[2, 3, ., Hk, 8\] to match q, got \[2, 2"),
        ({"v": torch.zeros(2, 3, 4, 2, 8)}, ValueError, r"v must be \[2, 3, ., Hk, 8\] to match q and k"),
        ({"k": torch.zeros(2, 3, 4, 4, 8).half()}, TypeError, "k must be float32 like q, got float16"),
        ({"k": torch.zeros(2, 3, 4, 3, 8), "v": torch.zeros(2, 3, 4, 3, 8)}, ValueError, "3 heads of k must divide"),
        ({"rule": "next"}, ValueError, "rule must be one of 'self', .* got 'next'"),
        ({"rule": "swap"}, ValueError, "rule swap is for clips of 2 frames, got 3"),
        ({"rule": frame_rules.explicit(torch.ones(5, 3, 3).long())}, ValueError, r"rule explicit.* \[2, 3, 3\]"),
        ({"lengths": torch.tensor([4, 1])}, ValueError, r"lengths must lie in \[0, 4\), got values in \[1, 4\]"),
        ({"lengths": torch.tensor([1.0, 1])}, TypeError, "lengths must be an integer tensor, got float32"),
        ({"lengths": torch.tensor([1])}, ValueError, r"lengths must be \[2\], got \[1\]"),
        ({"frame_mask": torch.ones(2, 3)}, TypeError, "frame_mask must be a bool tensor, got float32"),
        ({"frame_mask": torch.ones(2, 2) > 0}, ValueError, r"frame_mask must be \[2, 3\] like q, got \[2, 2\]"),
        ({"frame_mask": torch.ones(2, 3) > 0, "lengths": torch.tensor([1, 1])}, ValueError, "lengths and frame_mask"),
        ({"max_frames": 3}, ValueError, "max_frames is for packed clips"),
        ({"extra": torch.zeros(1)}, TypeError, r"extra must be \(keys, values\), got Tensor"),
        ({"extra": (torch.zeros(2, 2, 1, 4, 8),) * 2}, ValueError, r"extra keys must be \[2, 1, E, 4, 8\] shared"),
        ({"scale": "1"}, TypeError, "scale must be a number or None, got str"),
        ({"implementation": "fast"}, ValueError, "implementation must be one of .* got 'fast'"),
    ],
)  # fmt: skip
def test_errors(change, error, message, op):
    x = torch.zeros(2, 3, 4, 4, 8)
    problem = {"q": x, "k": x, "v": x, "rule": "all", **change}
    with pytest.raises(error, match=f"{op}: (the |implementation )?{message}"):
        OPS[op](problem.pop("q"), problem.pop("k"), problem.pop("v"), **problem)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("cu", "message"),
    [
        (torch.tensor([0, 2, 5]), r"cu_frames must rise from 0 to the 3 frames of q, got \[0, 2, 5\]"),
        (torch.tensor([0, 2, 1, 3]), "cu_frames must rise"),
        (torch.tensor([0.0, 3.0]), r"cu_frames must be an integer tensor \[clips \+ 1\], got \[2\]"),
        (torch.tensor([0, 3]), "max_frames must be at least 3, the longest clip's, got 1"),
    ],
)
def test_errors_of_packed_clips(cu, message, op):
    x = torch.zeros(3, 4, 2, 8)
    with pytest.raises(ValueError, match=f"{op}: {message}"):
        OPS[op](x, x, x, rule="all", cu_frames=cu, max_frames=1 if "max" in message else None)


def test_views_of_library_attention():
    """What a GPU runs for plain attention; here only its views can be tried."""
    from fastcontrast.ops import _attend, _frames

    q, k, v = inputs(2, 4, 6, 4, 8, hk=2)
    for rule in ("self", "first", "all"):
        clips = _frames.checked("frame_attention", q, k, v, rule, *[None] * 6)
        assert _attend.refuse_view(clips, False, rule, False) is None
        got = _attend.attention_on_view(clips, False, rule)
        torch.testing.assert_close(got, frame_attention(q, k, v, rule=rule), rtol=1e-5, atol=1e-6)
        assert "no log-sum-exp" in _attend.refuse_view(clips, False, rule, True)
        inside = [layouts(x)["(b f) t (3 h d)"] for x in (q, k, v)]
        assert _attend.refuse_view(clips._replace(q=inside[0]), False, rule, False) is None
        mixed = clips._replace(q=q.permute(2, 1, 0, 3, 4).contiguous().permute(2, 1, 0, 3, 4))
        assert "do not join" in _attend.refuse_view(mixed, False, rule, False)
    assert "no view of plain attention" in _attend.refuse_view(clips, False, "first_previous", False)
    q, k, v = inputs(2, 4, 6, 2, 8)
    for rule in ("all", "causal", frame_rules.frames("first", -1, 0)):
        clips = _frames.checked("temporal_attention", q, k, v, rule, *[None] * 6)
        assert _attend.refuse_view(clips, True, str(rule), False) is None
        got = _attend.attention_on_view(clips, True, str(rule))
        torch.testing.assert_close(got, ops.temporal_attention(q, k, v, rule=rule), rtol=1e-5, atol=1e-6)
