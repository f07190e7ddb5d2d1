"""Tasks one after another, and how well the intents of all that came so far are written after each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._shared.encoder import batches
from .._shared.report import train
from .coconut_model import SpeechToIntent
from .coconut_speech import Speech


def learn(
    label: str, coconut: nn.Module, speech: Speech, tasks: list[Tensor], steps: int, kept: int, *,
    batch: int, replayed: int, rate: float, seed: int,
) -> tuple[list[float], dict[str, float]]:  # fmt: skip
    """`steps` for each of `tasks`, whose classes they are; `kept` samples of each stay. Losses and metrics."""
    losses, accuracies = [], []
    for task, classes in enumerate(tasks):
        rows = speech.rows(classes)
        order = batches(len(rows), batch, seed)

        def step(_: int, rows: Tensor = rows, order=order) -> Tensor:
            new, old = rows[next(order)], coconut.memory.draw(replayed)
            both = torch.cat([new, old])
            return coconut(speech.batch(both), torch.arange(len(both)) >= len(new))

        losses += train(f"{label}, task {task + 1}", steps, coconut.model, step, rate=rate, clip=1.0)
        coconut.end_task(speech.batch(rows), rows, kept)
        accuracies.append(accuracy(coconut.model, speech, torch.cat(tasks[: task + 1])))
    return losses, {
        "average accuracy, %": sum(accuracies) / len(accuracies),
        "all classes at the end, %": accuracies[-1],
        "the first task's, %": accuracy(coconut.model, speech, tasks[0]),
    }


def accuracy(model: SpeechToIntent, speech: Speech, classes: Tensor) -> float:
    """Per cent of the test's sentences of these classes whose intent is written without a fault."""
    batch = speech.batch(speech.rows(classes, test=True))
    right = (model.written(batch, batch.intent.shape[1]) == batch.intent).all(1)
    return 100 * right.float().mean().item()
