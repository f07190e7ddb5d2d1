"""CLIMB's model: a masked language model with a head for each objective, and what it finds unlikely."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._shared.masked import MaskedHead, mask_tokens
from .climb_curricula import TAGS, Unit, check_plan

MASKED, OF_TAGS, OTHERS = 0.15, 0.4, 0.15  # share of tokens that are chosen: of all; of told parts of speech; of others


def trunk(
    vocabulary: int, longest: int, width: int = 256, layers: int = 8, heads: int = 8, hidden: int = 2048
) -> nn.Module:
    """An untrained RoBERTa with norms before its layers, without a head."""
    from fastcontrast._torchvision import declare_torchvision_operators

    declare_torchvision_operators()
    from transformers import RobertaPreLayerNormConfig, RobertaPreLayerNormModel

    config = RobertaPreLayerNormConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=hidden, max_position_embeddings=longest + 2, type_vocab_size=1, pad_token_id=0,
        layer_norm_eps=1e-5,
    )  # fmt: skip
    return RobertaPreLayerNormModel(config, add_pooling_layer=False)


class Climber(nn.Module):
    """A trunk, and a head for each unit of a plan: the loss of a step is the plain sum over its active units, each with
    its own masked input and its own pass through the trunk.

    Args:
        trunk: `trunk(input_ids=..., attention_mask=...).last_hidden_state` is [B, T, width].
        mask, special: the mask's id; the largest id that is never masked.
    """

    def __init__(
        self, trunk: nn.Module, plan: Sequence[Unit], *, width: int, vocabulary: int, mask: int, special: int,
        eps: float = 1e-5,
    ):  # fmt: skip
        super().__init__()
        self.trunk, self.plan = trunk, check_plan(plan)
        self.vocabulary, self.mask, self.special = vocabulary, mask, special
        classes = {unit.name: vocabulary if unit.tags is None else unit.classes for unit in self.plan}
        self.heads = nn.ModuleDict({name: MaskedHead(width, n, eps, tied=False) for name, n in classes.items()})

    def states(self, ids: Tensor) -> Tensor:  # [B, T]
        """[B, T, width]."""
        return self.trunk(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state

    def masked(self, unit: Unit, ids: Tensor, tags: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The unit's inputs and labels [B, T]: tokens, or classes of parts of speech, 0 for all that are not told."""
        plain = ids > self.special
        how = {"mask_id": self.mask, "vocabulary": self.vocabulary, "generator": generator}
        if unit.tags is None:
            return mask_tokens(ids, plain, probability=MASKED, hidden=0.9, random=0.1, **how)
        classes = torch.zeros(len(TAGS), dtype=torch.int64)
        classes[[TAGS.index(name) for name in unit.tags]] = torch.arange(1, unit.classes)
        classes = classes[tags]
        told = classes > 0
        inputs, targets = mask_tokens(ids, plain | told, probability=torch.where(told, OF_TAGS, OTHERS), **how)
        return inputs, classes.masked_fill(targets < 0, -100)

    def forward(
        self, ids: Tensor, tags: Tensor, step: int, total: int, generator: torch.Generator,
        restricted: Callable[[Tensor, Tensor], Tensor] = lambda ids, tags: ids,
    ) -> Tensor:  # fmt: skip
        """Loss of the units that are active at a step of `total`, of blocks and tags [B, T]. `restricted` maps inputs
        and labels of tokens; labels that are parts of speech are none."""
        loss = 0.0
        for unit in self.plan:
            if unit.active(step, total):
                inputs, labels = self.masked(unit, ids, tags, generator)
                labels = restricted(labels, tags) if unit.tags is None else labels
                loss = loss + self.heads[unit.name](self.states(restricted(inputs, tags)), None, labels)
        return loss

    @torch.no_grad()
    def log_probabilities(self, ids: Tensor, batch: int = 256) -> Tensor:  # [B, T] -> [B, T]
        """log P of each token with it alone masked. Of the B·T masked rows one position each goes through the head."""
        training = self.training
        self.eval()
        b, t = ids.shape
        places = torch.arange(t).repeat(b)
        rows = ids.repeat_interleave(t, 0)
        own = rows.gather(1, places[:, None])[:, 0]
        rows = rows.scatter(1, places[:, None], self.mask)
        (name,) = (unit.name for unit in self.plan if unit.tags is None)
        found = []
        for part, place, token in zip(rows.split(batch), places.split(batch), own.split(batch), strict=True):
            states = self.states(part)[torch.arange(len(part)), place]
            found.append(self.heads[name].logits(states).log_softmax(1).gather(1, token[:, None])[:, 0])
        self.train(training)
        return torch.cat(found).view(b, t) if found else ids.new_zeros(b, t, dtype=torch.float32)

    def pseudo_perplexity(self, ids: Tensor) -> Tensor:  # [B, T] -> [B]
        """exp(−Σ_i log P(x_i | all but x_i) / count), over the tokens that are not special; 1 where all are."""
        plain = ids > self.special
        total = self.log_probabilities(ids).masked_fill(~plain, 0.0).sum(1)
        return (-total / plain.sum(1).clamp(min=1)).exp()


class HeadOptimizers:
    """An AdamW for each head, whose rate rises over the first tenth of the unit's own steps and falls in a line to 0.

    `step` after the trunk's: it moves the heads of the units that were active, and clears their gradients.
    """

    def __init__(self, model: Climber, total: int, rate: float = 1e-3):
        self.model, self.total = model, total
        self.optimizers = {name: torch.optim.AdamW(head.parameters(), lr=rate) for name, head in model.heads.items()}
        self.schedules = {}
        for unit in model.plan:
            steps = max(1, sum(unit.active(i, total) for i in range(total)))

            def share(i: int, steps: int = steps) -> float:
                warm_up = max(1, steps // 10)
                return (i + 1) / warm_up if i < warm_up else max(0.0, (steps - i) / max(1, steps - warm_up))

            self.schedules[unit.name] = torch.optim.lr_scheduler.LambdaLR(self.optimizers[unit.name], share)

    def step(self, i: int) -> None:
        for unit in self.model.plan:
            if unit.active(i, self.total):
                self.optimizers[unit.name].step()
                self.schedules[unit.name].step()
                self.optimizers[unit.name].zero_grad()

    def state_dict(self) -> dict[str, Any]:
        both = {"optimizers": self.optimizers, "schedules": self.schedules}
        return {kind: {name: x.state_dict() for name, x in found.items()} for kind, found in both.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for kind, found in (("optimizers", self.optimizers), ("schedules", self.schedules)):
            for name, x in found.items():
                x.load_state_dict(state[kind][name])
