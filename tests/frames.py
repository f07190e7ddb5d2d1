"""Problems of attention across frames: rules, layouts, padding, and what every implementation is held against."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcontrast.ops import frame_attention, frame_rules, temporal_attention
from fastcontrast.testing import relative_error

OPS = {"temporal_attention": temporal_attention, "frame_attention": frame_attention}
RULES = (
    "self", "first", "previous", "first_previous", "all", "causal", frame_rules.frames("first", -1, 0),
    frame_rules.frames("mid", "last", 2), frame_rules.window(1, 2), frame_rules.causal(2),
    frame_rules.causal_window(1, sink=1), "explicit",
)  # fmt: skip
PADDING = ("none", "lengths", "mask")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rule_of(rule, frames: int):
    """`explicit` becomes a matrix of 0, 1 and 2 in which no frame is without keys."""
    if rule != "explicit":
        return rule
    return frame_rules.explicit(torch.randint(0, 3, (frames, frames), generator=generator(5)).fill_diagonal_(1))


def inputs(b, f, t, h, d, *, s=None, hk=None, extra=None, dtype=torch.float32, seed=0) -> list[Tensor]:
    """q, k, v, and extra keys and values, `extra` of them: 3, or (3, "shared")."""
    g, hk, s = generator(seed), hk or h, s or t
    shapes = [(b, f, t, h, d), (b, f, s, hk, d), (b, f, s, hk, d)]
    if extra is not None:
        count, shared = extra if isinstance(extra, tuple) else (extra, "")
        shapes += [(b, 1 if shared else f, count, hk, d)] * 2
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def padding(kind: str, b: int, f: int) -> dict:
    if kind == "lengths":
        return {"lengths": torch.tensor([f, max(f - 2, 0), 0] * b)[:b]}
    if kind == "mask":
        mask = torch.rand(b, f, generator=generator(8)) < 0.7
        return {"frame_mask": mask}
    return {}


def valid_of(options: dict, b: int, f: int) -> Tensor:
    if "lengths" in options:
        return torch.arange(f) < options["lengths"][:, None]
    return options.get("frame_mask", torch.ones(b, f, dtype=torch.bool))


def evaluate(op: str, tensors: list[Tensor], *, seed: int = 1, **options) -> list[Tensor]:
    """out, lse and the gradients of random upstreams of both."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    extra = tuple(tensors[3:]) or None
    out, lse = OPS[op](*tensors[:3], extra=extra, return_lse=True, **options)
    up, up_lse = (torch.randn(x.shape, generator=generator(seed + i)) for i, x in enumerate((out, lse)))
    some = lse.isfinite()
    total = (out * up.to(out.dtype)).sum() + (lse[some] * up_lse[some].to(lse.dtype)).sum()
    gradients = torch.autograd.grad(total, tensors)
    return [out.detach(), lse.detach(), *gradients]


def truth(op: str, tensors: list[Tensor], **options) -> list[Tensor]:
    return evaluate(op, [x.double() for x in tensors], **{**options, "implementation": "reference"})


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same numbers [B, F, T, H, D] as models hold them."""
    b, f, t, h, d = x.shape
    cls = x.new_empty(b, t * f + 1, h * d)
    behind = cls[:, 1:].view(b, t, f, h, d)
    behind.copy_(x.transpose(1, 2))
    packed = x.new_empty(b, f, t, 3, h, d)
    packed[:, :, :, 1] = x
    heads = x.permute(0, 3, 1, 2, 4).contiguous()
    return {
        "(b f) t c": x.contiguous(),
        "(b t) f c": x.transpose(1, 2).contiguous().transpose(1, 2),
        "cls, t f c": behind.transpose(1, 2),
        "t (b f) c": x.permute(2, 0, 1, 3, 4).contiguous().permute(1, 2, 0, 3, 4),
        "(b f) t (3 h d)": packed[:, :, :, 1],
        "b h (f t) d": heads.permute(0, 2, 3, 1, 4),
    }


def assert_right(op: str, tensors: list[Tensor], *, limit: float = 2e-5, **options) -> None:
    """Value, lse and every gradient against the reference in float64."""
    for got, want in zip(evaluate(op, tensors, **options), truth(op, tensors, **options), strict=True):
        assert relative_error(got, want) < limit
