"""A teacher whose weights follow the student's: an exponential moving average."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from .ops import _check as check

HALF = (torch.bfloat16, torch.float16)


def cosine_momentum(step: int, start: float, steps: int) -> float:
    """1 − (1 − start) · (1 + cos(π · step / steps)) / 2: from `start` to 1 in `steps` updates, 1 ever after.

    `EMATeacher(student, functools.partial(cosine_momentum, start=0.996, steps=10_000))`. Source: Grill et al. 2020.
    """
    return 1 - (1 - start) * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2


class EMATeacher(AveragedModel):
    """θ* ← m · θ* + (1 − m) · θ   at each `update_parameters(student)`; at first θ* = θ.

        teacher = EMATeacher(student, 0.999)
        with torch.no_grad():                        # `teacher(x)` needs none, methods of `teacher.module` may
            keys = teacher.module.encode_image(x)
        ...
        optimizer.step()
        teacher.update_parameters(student)

    A copy of the student in its dtype and without gradient; the student may be wrapped by DistributedDataParallel or
    `torch.compile`. Weights in half precision are averaged in float32 copies that `state_dict` holds as well: a step of
    1 − m = 0.001 is below the rounding of bfloat16, which would stand still. So give the student its dtype before.

    `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn(m)` differs: its first update is a copy, it
    averages in the dtype of the weights, and waits for the GPU in each update. With a student in float32 each loads the
    other's `state_dict`.

    Ranks whose students are equal keep equal teachers, and nothing is sent. Of BatchNorm's running statistics each rank
    of DistributedDataParallel has its own until its next forward: use SyncBatchNorm where that matters.

    Args:
        student: the model to copy.
        momentum: m in [0, 1], or a function of the number of updates before this one (`cosine_momentum`).
        buffers: "copy" takes over the student's after each update; "average" also averages those in floating point;
            "own" leaves them to the teacher's forward (BYOL, MoCo: batch statistics, with eval_mode=False).
        eval_mode: the teacher stays in evaluation mode, also when a module that holds it goes to training. False: modes
            as in the student, and `train()` and `eval()` as usual.

    Raises: ValueError for a momentum outside [0, 1], another `buffers`, and a student with other parameters or buffers.
    Source: Tarvainen & Valpola 2017.
    """

    def __init__(
        self,
        student: nn.Module,
        momentum: float | Callable[[int], float] = 0.999,
        *,
        buffers: str = "copy",
        eval_mode: bool = True,
    ):
        check.one_of("EMATeacher", "buffers", buffers, ("copy", "average", "own"))
        if not callable(momentum):
            _check_momentum(momentum)
        super().__init__(_unwrapped(student))
        self.momentum, self.buffer_rule, self.eval_mode = momentum, buffers, eval_mode
        self.requires_grad_(False)
        self.masters = _Float32(self._averaged(self.module))
        first = next(chain(self.module.parameters(), self.module.buffers()), self.n_averaged)
        self.n_averaged = self.n_averaged.to(first.device)
        self._updates: int | None = None  # n_averaged, once the host knows it
        self.training = self.module.training
        if eval_mode:
            self.eval()

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)

    def train(self, mode: bool = True) -> EMATeacher:
        return super().train(mode and not self.eval_mode)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module, momentum: float | None = None) -> None:
        """One step towards the student `model`, after its optimizer's; `momentum` for this step alone."""
        if momentum is None:
            momentum = self.momentum(self._step()) if callable(self.momentum) else self.momentum
        _check_momentum(momentum)
        weights, followed = self._averaged(self.module), self._averaged(model)
        _check_like(weights, followed)
        precise = self.masters.instead_of(weights)
        _lerp(precise, followed, 1 - momentum)
        _copy([x for x, y in zip(weights, precise, strict=True) if x is not y], self.masters.buffers())
        if self.buffer_rule == "copy":
            buffers = list(model.buffers())
            _check_like(list(self.module.buffers()), buffers)
            _copy(self.module.buffers(), buffers)
        self.n_averaged += 1
        if self._updates is not None:
            self._updates += 1

    def _averaged(self, model: nn.Module) -> list[Tensor]:
        return [*model.parameters(), *(model.buffers() if self.buffer_rule == "average" else ())]

    def _step(self) -> int:
        if self._updates is None:
            self._updates = int(self.n_averaged)
        return self._updates

    def _load_from_state_dict(self, *args: Any) -> None:
        self._updates = None
        super()._load_from_state_dict(*args)


class _Float32(nn.Module):
    """float32 copies of those weights that are in half precision. Conversions move them, and change no dtype."""

    def __init__(self, weights: Iterable[Tensor]):
        super().__init__()
        for i, x in enumerate(weights):
            if x.dtype in HALF:
                self.register_buffer(str(i), x.detach().float())

    def instead_of(self, weights: list[Tensor]) -> list[Tensor]:
        """The weights, with the copies in the place of those that have one."""
        copies = dict(self.named_buffers())
        for i, x in enumerate(weights):
            if x.dtype in HALF and str(i) not in copies:
                raise ValueError(f"EMATeacher: weights were in float32 when it was made, and now are in {x.dtype}")
        return [copies.get(str(i), x) for i, x in enumerate(weights)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Float32:
        return super()._apply(lambda x: x.to(fn(x).device), recurse)


def _lerp(targets: list[Tensor], sources: list[Tensor], weight: float) -> None:
    """targets ← targets + weight · (sources − targets), in the targets' precision; integers are copied."""
    alike: tuple[list[Tensor], list[Tensor]] = [], []
    for x, y in zip(targets, sources, strict=True):
        if not x.is_floating_point() and not x.is_complex():
            x.copy_(y)
        elif x.dtype == y.dtype and x.device == y.device:
            alike[0].append(x)
            alike[1].append(y)
        else:  # one converted copy at a time
            x.lerp_(y.to(x), weight)
    if alike[0]:
        torch._foreach_lerp_(*alike, weight)


def _copy(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    for x, y in zip(targets, sources, strict=True):
        x.copy_(y)


def _check_like(mine: list[Tensor], students: list[Tensor]) -> None:
    shapes, came = [list(x.shape) for x in mine], [list(x.shape) for x in students]
    if len(shapes) != len(came):
        raise ValueError(f"EMATeacher: the student must have {len(shapes)} tensors as at first, got {len(came)}")
    for shape, other in zip(shapes, came, strict=True):
        if shape != other:
            raise ValueError(f"EMATeacher: the student's tensors must be as at first, {shape}, got {other}")


def _check_momentum(momentum: float) -> None:
    if not 0 <= momentum <= 1:
        raise ValueError(f"EMATeacher: momentum must lie in [0, 1], got {momentum}")


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):  # torch.compile's
            model = model._orig_mod
        else:
            return model
