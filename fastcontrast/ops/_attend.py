"""Softmax attention across frames: the dense reference of both operations, their implementations and their autograd.

s = scale · ⟨q, k⟩ + log c[f, g],   out = Σ exp(s − lse) · v,   lse = log Σ exp(s), over the keys of `_frames.Clips`.

Backward, with P = exp(s − lse) and δ = ⟨dout, out⟩ − dlse: dS = P · (⟨dout, v⟩ − δ), dq = scale · Σ dS · k,
dk = scale · Σ dS · q, dv = Σ P · dout. Every dk and dv is summed by one owner, in a fixed order.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ._dispatch import native, note, select
from ._frames import Clips
from ._inference import CODES, last_contiguous, wide
from ._precision import fast_bf16, refuse_second_gradient, without_autocast
from ._sweep import address
from ._workspace import empty_like

LONGEST_TILE = 128  # frames that the Triton kernel of temporal attention holds at once
LARGEST_TILE = 16384  # and numbers of them, of half precision: some 160 KiB of shared memory; of float32 a quarter

# ----------------------------------------------------------------------------------------------------------- reference


@without_autocast
def reference(q: Tensor, clips: Clips, temporal: bool) -> tuple[Tensor, Tensor]:
    """out and lse by dense torch, in float32 (float64 for float64). `q` is that of `clips`, for its device."""
    if clips.starts is not None:
        return _reference_of_packed(clips, temporal)
    dtype = wide(q.dtype)
    q, k, v = clips.q.to(dtype), clips.k.to(dtype), clips.v.to(dtype)
    b, f, _, h, _ = q.shape
    if clips.valid is not None:
        padding = ~clips.valid[:, :, None, None, None]
        q, k, v = (x.masked_fill(padding, 0.0) for x in (q, k, v))
    k, v = (x.repeat_interleave(h // max(1, x.shape[3]), 3) for x in (k, v))
    scores = torch.einsum("bfthd,bgthd->bhftg" if temporal else "bfthd,bguhd->bhftgu", q, k) * clips.scale
    scores = scores if scores.ndim == 6 else scores[..., None]  # [B, H, F, T, F, S or 1]
    count = clips.count if clips.count.ndim == 3 else clips.count[None]
    scores = (scores + count.to(dtype).log()[:, None, :, None, :, None]).flatten(4)
    keys = scores.shape[4]
    if clips.extra_k is not None:
        extra_k, extra_v = (x.to(dtype).repeat_interleave(h // max(1, x.shape[3]), 3) for x in clips[3:5])
        extra_k, extra_v = (x.expand(b, f, *x.shape[2:]) for x in (extra_k, extra_v))
        scores = torch.cat([scores, torch.einsum("bfthd,bfehd->bhfte", q, extra_k) * clips.scale], 4)
    high = scores.detach().amax(4, keepdim=True).clamp(min=torch.finfo(dtype).min) if scores.shape[4] else 0.0
    weights = (scores - high).exp()
    total = weights.sum(4, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    p = weights / total
    if temporal:
        out = torch.einsum("bhftg,bgthd->bfthd", p[..., :keys], v)
    else:
        out = torch.einsum("bhftx,bxhd->bfthd", p[..., :keys], v.flatten(1, 2))
    if clips.extra_k is not None:
        out = out + torch.einsum("bhfte,bfehd->bfthd", p[..., keys:], extra_v)
    lse = (total.log() + high).masked_fill(empty, -torch.inf)[..., 0].transpose(1, 2)  # [B, F, H, T]
    if clips.valid is not None:
        out = out.masked_fill(padding, 0.0)
        lse = lse.masked_fill(padding[..., 0], -torch.inf)
    return out.to(clips.q.dtype), lse


def _reference_of_packed(clips: Clips, temporal: bool) -> tuple[Tensor, Tensor]:
    """Each clip in a row of its own, and back."""
    frame = torch.arange(clips.frames, device=clips.q.device)
    index = (clips.starts[:-1, None] + frame).clamp(max=max(clips.q.shape[1] - 1, 0)).where(clips.valid, 0)
    q, k, v = (x[0][index] for x in (clips.q, clips.k, clips.v))
    extra = clips.extra_k, clips.extra_v
    if clips.extra_k is not None and not clips.shared:
        extra = tuple(x[0][index] for x in extra)
    out, lse = reference(q, clips._replace(q=q, k=k, v=v, extra_k=extra[0], extra_v=extra[1], starts=None), temporal)
    return out[clips.valid][None], lse[clips.valid][None]


# -------------------------------------------------------------------------------------- library attention, on a view


def refuse_view(clips: Clips, temporal: bool, rule: str, return_lse: bool) -> str | None:
    """Why the problem is no view of torch's scaled_dot_product_attention, or None."""
    if return_lse:
        return "it gives no log-sum-exp"
    if clips.extra_k is not None:
        return "it takes no extra keys"
    if clips.starts is not None:
        return "it takes no packed clips"
    if temporal:
        if clips.q.shape[3] == clips.k.shape[3] and all(_joins(x, 2) for x in (clips.q, clips.k, clips.v)):
            return "padded frames would have to be zeroed" if clips.valid is not None else None
        return "positions and heads do not join into one dimension of q, k and v"
    if clips.valid is not None:
        return "padded frames would have to be zeroed"
    joined = {"self": (clips.q, clips.k, clips.v), "first": (clips.q,), "all": (clips.q, clips.k, clips.v)}.get(rule)
    if joined is None:
        return f"rule {rule} is no view of plain attention"
    at = 0 if rule == "self" else 1
    if not all(_joins(x, at) for x in joined):
        return f"{'clips and frames' if rule == 'self' else 'frames and tokens'} do not join into one dimension"
    return None


def _refuse_on_cpu(clips: Clips) -> str | None:
    """Where the C++ core beats torch's kernels for plain attention, by measurement."""
    q = clips.q
    if q.device.type != "cpu":
        return None
    if q.shape[3] != clips.k.shape[3]:
        return "on a CPU it would copy keys for grouped heads, and store all scores"
    long = q.dtype == torch.bfloat16 and clips.k.shape[2] >= 256 and fast_bf16(q.device)
    if long or q.shape[4] > 128 or native is None:
        return None
    return "on a CPU C++ is faster, but for heads wider than 128 and long frames of fast bfloat16"


def _joins(x: Tensor, at: int) -> bool:
    """Dimensions `at` and the next are one dimension of some stride."""
    return x.shape[at] <= 1 or x.shape[at + 1] <= 1 or x.stride(at) == x.shape[at + 1] * x.stride(at + 1)


def attention_on_view(clips: Clips, temporal: bool, rule: str) -> Tensor:
    q, k, v = clips.q, clips.k, clips.v
    b, f, t, h, d = q.shape
    if temporal:
        q, k, v = (x.flatten(2, 3).transpose(1, 2) for x in (q, k, v))  # [B, T·H, F, D]
        mask = None if rule == "all" else clips.count.float().log().to(q.dtype)
        mask = mask if mask is None or mask.ndim == 2 else mask[:, None]
        return F.scaled_dot_product_attention(q, k, v, mask, scale=clips.scale).transpose(1, 2).unflatten(2, (t, h))
    if rule == "first":
        q, k, v = q.flatten(1, 2), k[:, 0], v[:, 0]
    else:
        q, k, v = (x.flatten(*((0, 1) if rule == "self" else (1, 2))) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = h != clips.k.shape[3]
    out = F.scaled_dot_product_attention(q, k, v, scale=clips.scale, enable_gqa=grouped).transpose(1, 2)
    return out.reshape(b, f, t, h, d)


# ------------------------------------------------------------------------------------------------------------ C++ core


def _views(*tensors: Tensor | None) -> list[int]:
    """Of five-dimensional tensors, each: address and strides."""
    views = []
    for x in tensors:
        views += (0,) * 6 if x is None else (x.data_ptr(), *x.stride())
    return views


def _problem(clips: Clips):
    q, k, _, extra, _, count, valid, starts, scale = clips
    (b, f, t, h, d), (_, _, s, groups, _) = q.shape, k.shape
    b, f = (b, f) if starts is None else (clips.clips, clips.frames)
    return native.FrameAttention(
        _views(*clips[:5]), (b, f, t, s, h, groups, d, 0 if extra is None else extra.shape[2]), count.data_ptr(),
        f * f if count.ndim == 3 else 0, address(valid), address(starts), clips.shared or extra is None, scale,
        CODES[q.dtype],
    )  # fmt: skip


def _native_forward(op: str, clips: Clips, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    out, lse = empty_forward(clips, need_lse, empty_like)
    getattr(native, op)(_problem(clips), _views(out), address(lse), torch.get_num_threads())
    return out, lse


def _native_backward(op: str, clips: Clips, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None):
    gradients = empty_backward(clips, empty_like)
    run = getattr(native, f"{op}_backward")
    run(_problem(clips), _views(out, dout, *gradients), address(lse), address(dlse), torch.get_num_threads())
    return gradients


def empty_forward(
    clips: Clips, need_lse: bool, like: Callable[[Tensor], Tensor] = torch.empty_like
) -> tuple[Tensor, Tensor | None]:
    """`out`, which has the order of dimensions that q has in memory, and `lse` where it is needed."""
    if not need_lse:
        return like(clips.q), None
    b, f, t, h, _ = clips.q.shape
    return like(clips.q), clips.q.new_empty((b, f, h, t), dtype=wide(clips.q.dtype))


def empty_backward(clips: Clips, like: Callable[[Tensor], Tensor] = torch.empty_like) -> tuple[Tensor | None, ...]:
    """dq, dk, dv and the gradients of the extra keys: dense, also where the input is expanded."""
    tensors = (clips.q, clips.k, clips.v, clips.extra_k, clips.extra_v)
    return tuple(None if x is None else like(x) for x in tensors)


# -------------------------------------------------------------------------------------------- torch.library, autograd


def refuse_tile(clips: Clips) -> str | None:
    """Why the Triton kernel of temporal attention cannot hold all frames of a position, or None."""
    frames, width = clips.frames, clips.q.shape[4]
    if frames > LONGEST_TILE:
        return f"it holds {LONGEST_TILE} frames, these are {frames}"
    most = LARGEST_TILE if clips.q.dtype.itemsize == 2 else LARGEST_TILE // 4
    if max(16, 1 << (frames - 1).bit_length()) * width > most:
        return f"its tile of {most} numbers does not hold {frames} frames of width {width}"
    return None


def _triton(op: str):
    return importlib.import_module(f"fastcontrast.kernels.{op}")


def _run_forward(op: str, implementation: str, clips: Clips, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    if implementation == "triton":
        return _triton(op).forward(clips, need_lse)
    return _native_forward(op, clips, need_lse)


def _run_backward(op: str, implementation: str, clips: Clips, out, lse, dout, dlse) -> tuple[Tensor | None, ...]:
    dout = last_contiguous(dout)
    dlse = None if dlse is None else dlse.contiguous()
    if implementation == "triton":
        return _triton(op).backward(clips, out, lse, dout, dlse)
    return _native_backward(op, clips, out, lse, dout, dlse)


def _needs_lse(op: str) -> bool:
    """What a backward wants from the forward: temporal attention computes its small softmax again."""
    return op != "temporal_attention"


class _Attend(torch.autograd.Function):
    """Eager autograd: a third of the time that torch.library's takes, which a small problem would notice."""

    @staticmethod
    def forward(ctx, op, implementation, return_lse, q, k, v, extra_k, extra_v, count, valid, starts, scale):
        clips = Clips(q, k, v, extra_k, extra_v, count, valid, starts, scale)
        out, lse = _run_forward(op, implementation, clips, return_lse or _needs_lse(op))
        ctx.op, ctx.implementation, ctx.scale = op, implementation, scale
        kept = (out, lse) if _needs_lse(op) else (None, None)
        ctx.save_for_backward(q, k, v, extra_k, extra_v, count, valid, starts, *kept)
        ctx.set_materialize_grads(False)
        return out, lse if return_lse else None

    @staticmethod
    def backward(ctx, dout, dlse):
        refuse_second_gradient(ctx.op, reference=True)
        *tensors, out, lse = ctx.saved_tensors
        clips = Clips(*tensors, ctx.scale)
        if dout is None:
            dout = torch.zeros_like(clips.q)
        gradients = _run_backward(ctx.op, ctx.implementation, clips, out, lse, dout, dlse)
        return None, None, None, *gradients, None, None, None, None


_library = torch.library.Library("fastcontrast", "FRAGMENT")
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? extra_k, Tensor? extra_v, Tensor count, Tensor? valid, Tensor? starts,"
    " float scale"
)


def define(op: str) -> None:
    """The operation and its backward in torch.library, which torch.compile sees."""
    _library.define(f"{op}({_INPUTS}, bool need_lse, str implementation) -> (Tensor out, Tensor lse)")
    _library.define(
        f"{op}_backward({_INPUTS}, Tensor? out, Tensor? lse, Tensor dout, Tensor? dlse, str implementation)"
        " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dextra_k, Tensor dextra_v)"
    )

    def forward(*inputs):
        *tensors, need_lse, implementation = inputs
        clips = Clips(*tensors)
        return _dense(clips, _run_forward(op, implementation, clips, need_lse))

    def forward_fake(*inputs):
        clips = Clips(*inputs[:9])
        return _dense(clips, empty_forward(clips, inputs[9]))

    def backward(*inputs):
        clips, (out, lse, dout, dlse, implementation) = Clips(*inputs[:9]), inputs[9:]
        return _dense(clips, _run_backward(op, implementation, clips, out, lse, dout, dlse))

    def backward_fake(*inputs):
        clips = Clips(*inputs[:9])
        return _dense(clips, empty_backward(clips))

    def _dense(clips, tensors):
        """What is absent is empty: a schema knows no optional results."""
        return tuple(clips.q.new_empty(0) if x is None else x for x in tensors)

    def setup_context(ctx, inputs, output):
        *tensors, ctx.scale, ctx.need_lse, ctx.implementation = inputs
        kept = output if _needs_lse(op) else (None, None)
        ctx.save_for_backward(*tensors, *kept)

    def autograd(ctx, dout, dlse):
        *tensors, out, lse = ctx.saved_tensors
        run = getattr(torch.ops.fastcontrast, f"{op}_backward")
        gradients = run(*tensors, ctx.scale, out, lse, dout, dlse if ctx.need_lse else None, ctx.implementation)
        given = [g if x is not None else None for g, x in zip(gradients, tensors, strict=False)]
        return *given, None, None, None, None, None, None

    for name, run, fake in ((op, forward, forward_fake), (f"{op}_backward", backward, backward_fake)):
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastcontrast::{name}", fake, lib=_library)
    torch.library.register_autograd(f"fastcontrast::{op}", autograd, setup_context=setup_context, lib=_library)


# -------------------------------------------------------------------------------------------------------------- engine


def attend(
    op: str, clips: Clips, rule: str, return_lse: bool, implementation: str | None
) -> tuple[Tensor, Tensor | None]:
    """Picks an implementation and runs it."""
    temporal = op == "temporal_attention"

    def refuse(name: str) -> str | None:
        if name == "sdpa":
            return (None if temporal else _refuse_on_cpu(clips)) or refuse_view(clips, temporal, rule, return_lse)
        return refuse_tile(clips) if name == "triton" and temporal else None

    chosen = note(select(op, implementation, clips.q.device, clips.q.dtype, refuse))
    if chosen == "reference":
        return reference(clips.q, clips, temporal)
    if chosen == "sdpa":
        return attention_on_view(clips, temporal, rule), None
    tensors = [None if x is None else last_contiguous(x) for x in clips[:5]]
    if torch.compiler.is_compiling():
        run = getattr(torch.ops.fastcontrast, op)
        need = return_lse or (_needs_lse(op) and torch.is_grad_enabled())
        return run(*tensors, *clips[5:], need, chosen)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _Attend.apply(op, chosen, return_lse, *tensors, *clips[5:])
    return _run_forward(op, chosen, Clips(*tensors, *clips[5:]), return_lse)
