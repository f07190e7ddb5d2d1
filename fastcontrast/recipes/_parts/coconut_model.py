"""A small speech model: convolutions and a GRU listen, a GRU with attention writes the intent."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcontrast.ops import linear_cross_entropy

from .coconut_speech import BANDS, IGNORED, Batch

WIDTH, PROJECTED = 128, 64


class SpeechToIntent(nn.Module):
    """Speech [B, T, 40] → states [B, T/4, 2 · 128] → the intent's tokens; and unit features of speech and text.

    Args:
        vocabulary: tokens, of which 0 begins and ends what is written.
    """

    def __init__(self, vocabulary: int):
        super().__init__()
        self.hear = nn.ModuleList([nn.Conv1d(n, WIDTH, 5, stride=2, padding=2) for n in (BANDS, WIDTH)])
        self.follow = nn.GRU(WIDTH, WIDTH, batch_first=True, bidirectional=True)
        self.words = nn.Embedding(vocabulary, WIDTH)
        self.begin = nn.Linear(2 * WIDTH, WIDTH)
        self.write = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.attend = nn.Linear(WIDTH, 2 * WIDTH)
        self.join = nn.Linear(3 * WIDTH, WIDTH)
        self.of_speech, self.of_text = nn.Linear(2 * WIDTH, PROJECTED), nn.Linear(WIDTH, PROJECTED)

    def listen(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:  # [B, T, 40], [B]
        """States [B, T/4, 2 · 128], and the mean of each one's, [B, 2 · 128]; 0 where speech is over."""
        x = audio.mT
        for layer in self.hear:
            x, lengths = F.gelu(layer(x)), (lengths + 1) // 2
            x = x * (torch.arange(x.shape[2], device=x.device) < lengths[:, None])[:, None]
        packed = nn.utils.rnn.pack_padded_sequence(x.mT, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = nn.utils.rnn.pad_packed_sequence(self.follow(packed)[0], batch_first=True)
        return states, states.sum(1) / lengths[:, None]

    def speech(self, mean: Tensor) -> Tensor:  # [B, 2 · 128]
        """h and a: the projection of the mean state, of length 1."""
        return F.normalize(self.of_speech(mean), dim=1)

    def text(self, tokens: Tensor) -> Tensor:  # [B, S]
        """t: the projection of the mean of the decoder's input embeddings, of length 1."""
        there = (tokens != IGNORED)[..., None]
        mean = (self.words(tokens.clamp(min=0)) * there).sum(1) / there.sum(1)
        return F.normalize(self.of_text(mean), dim=1)

    def decode(self, inputs: Tensor, hidden: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:  # [B, L], [1, B, 128]
        """What the word vectors multiply, [B, L, 128], and the hidden state after the last token."""
        x, hidden = self.write(self.words(inputs), hidden)
        scores = self.attend(x) @ states.mT
        heard = scores.masked_fill(~states.any(2)[:, None], float("-inf")).softmax(2) @ states
        return self.join(torch.cat([x, heard], 2)), hidden

    def first(self, mean: Tensor) -> Tensor:
        return self.begin(mean).tanh()[None]

    def writes(self, states: Tensor, mean: Tensor, intent: Tensor) -> Tensor:  # [B, T/4, 256], [B, 256], [B, L]
        """The mean cross-entropy of the intent's tokens."""
        inputs = F.pad(intent, (1, -1)).clamp(min=0)
        return linear_cross_entropy(self.decode(inputs, self.first(mean), states)[0], self.words.weight, intent)

    @torch.no_grad()
    def written(self, batch: Batch, longest: int) -> Tensor:
        """What it writes greedily until a 0, `IGNORED` after it, [B, longest]."""
        states, mean = self.listen(batch.audio, batch.lengths)
        hidden, token = self.first(mean), torch.zeros(len(mean), 1, dtype=torch.int64, device=mean.device)
        tokens: list[Tensor] = []
        for _ in range(longest):
            x, hidden = self.decode(token, hidden, states)
            token = (x @ self.words.weight.T).argmax(2)
            tokens.append(token)
        found = torch.cat(tokens, 1)
        ends = (found == 0).long()
        return found.masked_fill(ends.cumsum(1) > ends, IGNORED)
