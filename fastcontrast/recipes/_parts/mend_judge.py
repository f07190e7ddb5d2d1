"""How a frozen language model answers tasks, whatever stands before the query."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastcontrast.ops import linear_cross_entropy, linear_kl, similarity_topk

from .._shared.language import IGNORED, states
from .mend_distiller import Batch, collate
from .mend_tasks import World

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

TESTED = 256  # queries of each kind of task


@torch.no_grad()
def judge(
    model: LlamaForCausalLM, world: World, count: int, seed: int, answers: Callable[[Batch], Tensor]
) -> dict[str, float]:
    """Of the states [N, D] that `answers` gives of the queries' tokens: per cent of answers that are right to the last
    token, greedily; their mean cross-entropy; the divergence from the model that has read `count` demonstrations."""
    head, right, missed, apart = model.get_output_embeddings().weight, {}, 0.0, 0.0
    for kind in ("unseen", "seen"):
        draws = random.Random(seed + 1)
        batch = collate([world.example(getattr(world, kind), count, draws) for _ in range(TESTED)])
        student, teacher = answers(batch), states(model, batch.whole)[batch.whole_mask]
        targets = batch.targets[batch.mask]
        said = similarity_topk(student, head, 1)[1][:, 0]
        off = torch.zeros_like(batch.mask).masked_scatter(batch.mask, (said != targets) & (targets != IGNORED))
        right[f"right answers, {kind} tasks, %"] = 100 * (~off.any(1)).float().mean().item()
        missed += linear_cross_entropy(student, head, targets).item() / 2
        apart += linear_kl(student, head, teacher, head).item() / 2
    return right | {"loss of the answer": missed, "KL to demonstrations": apart}
