"""A masked language model that answers prompts, and the three stages of PCP's loop with it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._shared.encoder import Encoder
from .._shared.masked import MaskedHead, mask_tokens
from .pcp_prompt import Prompted, Special

WORDPIECE = Special(first=101, last=102, mask=103, padding=0)  # BERT's own ids


class MaskedLM(nn.Module):
    """MiniLM's first layers with a head for masked tokens, tied to its embedding of words; the head starts untrained:
    h near the state, no bias. `soften` adds tokens that prompts learn anew.

    Args:
        texts: only tokens that occur in them are kept, of 30,522: so few sentences know 6,000, and learn faster.
    """

    def __init__(self, texts: Iterable[str], layers: int = 2, dropout: float = 0.1):
        super().__init__()
        self.encoder = Encoder(layers, dropout=dropout)
        self.tokenizer = self.encoder.tokenizer
        self.tokenizer.no_truncation()  # templates cut, and they pad
        self.tokenizer.no_padding()
        used = {i for one in self.tokenizer.encode_batch(list(texts)) for i in one.ids}
        kept = sorted(used | set(WORDPIECE))
        self.index = {old: new for new, old in enumerate(kept)}
        self.special = Special(*(self.index[i] for i in WORDPIECE))
        words = self.encoder.bert.embeddings.word_embeddings
        words.weight = nn.Parameter(words.weight.detach()[kept])
        self.head = MaskedHead(words.weight.shape[1], len(kept))
        nn.init.eye_(self.head.dense.weight)
        self.soft = nn.Parameter(words.weight.new_empty(0, words.weight.shape[1]))

    def pieces(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens; those that were not kept are left out."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [self.index[i] for i in ids if i in self.index]

    @property
    def weight(self) -> Tensor:
        """Embeddings of all tokens, [V, D]."""
        words = self.encoder.bert.embeddings.word_embeddings.weight
        return torch.cat([words, self.soft]) if len(self.soft) else words

    @torch.no_grad()
    def soften(self, ids: Tensor) -> Tensor:  # [S]
        """Ids of S new tokens that start as the given ones."""
        first = len(self.weight)
        self.soft = nn.Parameter(torch.cat([self.soft, self.weight[ids]]))
        self.head.bias = nn.Parameter(torch.cat([self.head.bias, self.head.bias[ids]]))
        return torch.arange(first, first + len(ids))

    def states(self, ids: Tensor, real: Tensor) -> Tensor:  # [B, T] -> [B, T, D]
        embedded = F.embedding(ids, self.weight)
        return self.encoder.bert(inputs_embeds=embedded, attention_mask=real.long()).last_hidden_state

    def at_word(self, prompts: Prompted) -> Tensor:
        """h where the word belongs, [B, D]."""
        states = self.states(prompts.ids, prompts.real)
        return self.head.hidden(states[torch.arange(len(states)), prompts.places])

    def masked_loss(self, prompts: Prompted, generator: torch.Generator, always: int | None = None) -> Tensor:
        """Masked language modelling of sentences, whose words of template and label are masked like any others."""
        how = {"mask_id": self.special.mask, "vocabulary": len(self.head.bias), "always": always}
        how["generator"] = generator
        inputs, targets = mask_tokens(prompts.ids, prompts.maskable, **how)
        return self.head(self.states(inputs, prompts.real), self.weight, targets)

    @torch.no_grad()
    def classes(self, prompts: Prompted, words: Tensor, batch: int = 256) -> Tensor:  # [C] -> [N]
        """argmax_c z_c of prompts with a masked word, without dropout: pseudo labels; the mode stays as it was."""
        training = self.training
        self.eval()
        rows, bias = self.weight[words], self.head.bias[words]
        parts = torch.arange(len(prompts.ids)).split(batch)
        found = [F.linear(self.at_word(prompts.take(part)), rows, bias).argmax(1) for part in parts]
        self.train(training)
        return torch.cat(found)
