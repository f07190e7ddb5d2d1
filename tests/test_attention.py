"""CrossFrameAttention against its definition, in every layout, and in parts against the whole."""

import copy

import pytest
import torch
import torch.nn.functional as F

import fastcontrast
from fastcontrast.attention import (
    CrossFrameAttention,
    frames_first,
    frames_last,
    positions_first,
    positions_last,
    split_heads,
)
from fastcontrast.ops import trace
from fastcontrast.ops.frame_rules import count_matrix, frames, window

B, N, T, C = 2, 3, 5, 12  # clips, frames, tokens, width


def clips(*shape, seed=0):
    torch.manual_seed(seed)
    return torch.randn(*(shape or (B, N, T, C)), dtype=torch.float64, requires_grad=True)


def made(*arguments, seed=1, **settings):
    torch.manual_seed(seed)
    return CrossFrameAttention(*arguments, **settings).double()


def dense(module, x, context=None, messages=None):
    """For each frame the keys of all frames, as often as the rule counts them; no padding."""
    y = x if context is None else context
    q, (k, v) = module.queries(x), module.keys_and_values(y)
    groups = module.heads // module.key_heads
    k, v = (part.repeat_interleave(groups, -2) for part in (k, v))
    scale = module.head_width**-0.5 if module.scale is None else module.scale
    count, found = count_matrix(module.rule, x.shape[1]), []
    for f in range(x.shape[1]):
        chosen = [g for g in range(x.shape[1]) for _ in range(count[f, g])]
        keys, values = ([part[:, g] for g in chosen] for part in (k, v))
        if module.temporal:  # [B, T, 1, H, D], [B, T, G, H, D]
            asks, keys, values = q[:, f, :, None], torch.stack(keys, 2), torch.stack(values, 2)
        else:
            asks, keys, values = q[:, f], torch.cat(keys, 1), torch.cat(values, 1)
        if messages is not None:
            more = [part.repeat_interleave(groups, -2) for part in module.keys_and_values(messages)]
            more = [part.expand(-1, x.shape[1], -1, -1, -1)[:, f] for part in more]
            if module.temporal:
                more = [part[:, None].expand(-1, x.shape[2], -1, -1, -1) for part in more]
            keys, values = torch.cat([keys, more[0]], -3), torch.cat([values, more[1]], -3)
        out = F.scaled_dot_product_attention(*(z.transpose(-2, -3) for z in (asks, keys, values)), scale=scale)
        out = out.transpose(-2, -3).flatten(-2)
        found.append(out[:, :, 0] if module.temporal else out)
    return module.out(torch.stack(found, 1))


SETTINGS = {
    "self": {},
    "first": {"rule": "first", "qkv_bias": True},
    "first_previous": {"rule": "first_previous", "out_bias": False},
    "list": {"rule": frames("first", -1, 0), "key_heads": 2},
    "packed": {"rule": "all", "packed": True, "qkv_bias": True},
    "packed_grouped": {"rule": "causal", "packed": True, "key_heads": 1},
    "wide": {"rule": "all", "head_width": 7, "scale": 0.3},
    "temporal": {"temporal": True},
    "temporal_window": {"temporal": True, "rule": window(1, 0), "packed": True, "key_heads": 2},
}


def same(ours, theirs, *leaves):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    weight = torch.randn_like(ours)
    gradients = [torch.autograd.grad((out * weight).sum(), leaves) for out in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-11)


@pytest.mark.parametrize("told", [None, 1, N])
@pytest.mark.parametrize("name", SETTINGS)
def test_it_is_the_concatenating_attention(name, told):
    module, x = made(C, 4, **SETTINGS[name]), clips()
    messages = None if told is None else clips(B, told, 2, C, seed=3)
    with trace() as ran:
        ours = module(x, messages=messages)
    assert [choice.op for choice in ran] == ["temporal_attention" if module.temporal else "frame_attention"]
    leaves = [x, *module.parameters()] + ([] if messages is None else [messages])
    same(ours, dense(module, x, messages=messages), *leaves)


@pytest.mark.parametrize("name", ["first_previous", "packed_grouped", "temporal"])
def test_layouts_are_views_of_the_same(name):
    module, x = made(C, 4, **SETTINGS[name]), clips()
    expected = module(x)
    torch.testing.assert_close(module(x.flatten(0, 1), frames=N), expected.flatten(0, 1), rtol=0, atol=1e-13)
    by_position = x.transpose(1, 2).flatten(0, 1)
    out = module(by_position, positions=T)
    torch.testing.assert_close(out, expected.transpose(1, 2).flatten(0, 1), rtol=0, atol=1e-13)


@pytest.mark.parametrize("packed", [False, True])
def test_keys_of_another_context(packed):
    width = C if packed else 8
    module = made(C, 4, rule="previous", packed=packed, context_width=width)
    x, context = clips(), clips(B, N, 4, width, seed=2)
    same(module(x, context), dense(module, x, context), x, context, *module.parameters())
    torch.testing.assert_close(
        module(x.flatten(0, 1), context.flatten(0, 1), frames=N), module(x, context).flatten(0, 1), rtol=0, atol=1e-13
    )


def test_padded_and_packed_clips_are_each_clip_alone():
    module, x = made(C, 4, rule="first_previous"), clips()
    alone = [module(x[:1, :2]), module(x[1:])]
    padded = module(x, lengths=torch.tensor([2, 3]))
    torch.testing.assert_close(padded[0, :2], alone[0][0], rtol=0, atol=1e-13)
    torch.testing.assert_close(padded[1], alone[1][0], rtol=0, atol=1e-13)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    torch.testing.assert_close(module(x, frame_mask=mask), padded, rtol=0, atol=1e-13)
    rows, shared = torch.cat([x[0, :2], x[1]]), clips(2, 1, 2, C, seed=5)
    together = module(rows, cu_frames=torch.tensor([0, 2, 5]), max_frames=3, messages=shared)
    expected = module(x[:1, :2], messages=shared[:1])[0], module(x[1:], messages=shared[1:])[0]
    torch.testing.assert_close(together, torch.cat(expected), rtol=0, atol=1e-13)


def test_packed_rows_are_queries_then_keys_then_values():
    apart, packed = (made(C, 4, rule="all", key_heads=2, qkv_bias=True, packed=x) for x in (False, True))
    parts = apart.query, apart.key, apart.value
    packed.load_state_dict(
        {
            "qkv.weight": torch.cat([x.weight for x in parts]),
            "qkv.bias": torch.cat([x.bias for x in parts]),
            **{f"out.{name}": x for name, x in apart.out.state_dict().items()},
        }
    )
    x, messages = clips(), clips(B, N, 1, C, seed=3)
    torch.testing.assert_close(packed(x, messages=messages), apart(x, messages=messages), rtol=0, atol=1e-13)


def test_views_copy_nothing_and_go_there_and_back():
    x = torch.randn(B * N, T, C)
    q = frames_first(split_heads(x, 4), N)
    assert q.shape == (B, N, T, 4, 3) and q.data_ptr() == x.data_ptr()
    back = frames_last(q)
    assert back.data_ptr() == x.data_ptr() and torch.equal(back, x)
    q = positions_first(split_heads(x, 4))
    assert q.shape == (1, T, B * N, 4, 3) and q.data_ptr() == x.data_ptr()
    back = positions_last(q)
    assert back.data_ptr() == x.data_ptr() and torch.equal(back, x)


def test_implementations_and_float32():
    module, x = made(C, 4, rule="first").float(), clips().float()
    with trace() as ran:
        chosen = module(x)
    reference = module(x, implementation="reference")
    assert ran[0].implementation in ("cpu", "reference")
    torch.testing.assert_close(chosen, reference, rtol=0, atol=1e-5)


def test_it_is_a_public_module_like_others():
    assert fastcontrast.CrossFrameAttention is CrossFrameAttention
    module, x = made(C, 4, rule="causal", key_heads=2), clips()
    torch.testing.assert_close(copy.deepcopy(module)(x), module(x), rtol=0, atol=0)
    assert sorted(module.state_dict()) == ["key.weight", "out.bias", "out.weight", "query.weight", "value.weight"]
    assert "frame, rule=causal, heads=4, key_heads=2, head_width=3" in repr(module)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: CrossFrameAttention(10, 4), "4 heads must divide width, got 10"),
        (lambda: CrossFrameAttention(12, 4, key_heads=3), "key_heads must divide the 4 heads, got 3"),
        (lambda: CrossFrameAttention(12, 4, packed=True, context_width=8), "a context of width 12, got 8"),
        (lambda: made(C, 4)(clips(B * N, T, C)), r"hidden must be .* got \[6, 5, 12\] with none"),
        (lambda: made(C, 4)(clips(), frames=N), r"hidden must be .* got \[2, 3, 5, 12\] with frames"),
        (
            lambda: made(C, 4)(clips(B * N, T, C), frames=N, cu_frames=torch.tensor([0, 6])),
            "hidden must be .* with frames and cu_frames",
        ),
        (lambda: made(C, 4)(clips(B * N, T, C), frames=4), "rows must be clips of 4 frames, got 6 rows"),
        (lambda: made(C, 4)(clips(B * T, N, C), positions=4), "rows must be clips of 4 positions, got 10 rows"),
        (lambda: made(C, 4, rule="next")(clips()), "frame_attention: rule must be one of"),
        (lambda: frames_first(torch.zeros(6, 2), 4), "frames_first: rows must be clips of 4 frames, got 6 rows"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
