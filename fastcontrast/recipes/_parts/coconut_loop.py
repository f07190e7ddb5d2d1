"""What goes from task to task: a model, its frozen teacher, the memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastcontrast import EMATeacher

from .coconut_memory import Rehearsal
from .coconut_model import SpeechToIntent
from .coconut_speech import Batch

Loss = Callable[..., Tensor]


class Coconut(nn.Module):
    """A model, its teacher and the memory: L of a batch, and what a task leaves behind. All is in `state_dict`.

    Args:
        size: samples that fit in the memory. selection: see `Rehearsal`.
        mm, nspt: `mm_loss` and `nspt_loss`, or parts of them with other switches.
        of_mm, of_nspt: λ; with both 0 what remains is experience replay.
        of_written: weight of the cross-entropy of what the teacher writes for replayed speech (sequence-level
            distillation).
    """

    def __init__(
        self, model: SpeechToIntent, size: int, mm: Loss, nspt: Loss, *, of_mm: float = 0.1, of_nspt: float = 0.1,
        of_written: float = 0.0, selection: str = "random", seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.model, self.teacher = model, EMATeacher(model, 0.0)
        self.mm, self.nspt = mm, nspt
        self.memory = Rehearsal(size, selection, seed)
        self.of_mm, self.of_nspt, self.of_written = of_mm, of_nspt, of_written

    def forward(self, batch: Batch, replayed: Tensor) -> Tensor:  # [B] bool
        model, teacher = self.model, self.teacher.module
        states, mean = model.listen(batch.audio, batch.lengths)
        loss = model.writes(states, mean, batch.intent)
        audio = model.speech(mean)
        if self.of_mm:
            loss = loss + self.of_mm * self.mm(audio, model.text(batch.said), batch.labels, ~replayed)
        old = batch.of(replayed)
        if self.of_nspt and replayed.any():
            with torch.no_grad():
                target = teacher.speech(teacher.listen(old.audio, old.lengths)[1])
            loss = loss + self.of_nspt * self.nspt(audio, target, batch.labels, replayed)
        if self.of_written and replayed.any():
            target = teacher.written(old, batch.intent.shape[1])
            loss = loss + self.of_written * model.writes(states[replayed], mean[replayed], target)
        return loss

    @torch.no_grad()
    def end_task(self, batch: Batch, rows: Tensor, count: int) -> None:  # [n]
        """Freezes a copy as the teacher, and keeps `count` of the task's `rows`, which `batch` holds."""
        self.teacher.update_parameters(self.model)
        self.memory.add(rows, batch.labels, count, self.model.speech(self.model.listen(batch.audio, batch.lengths)[1]))
