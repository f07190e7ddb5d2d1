"""Spoken sentences, whose intent is the package that they come from: log filterbanks [T, 40].

With espeak-ng installed it speaks them, in a voice and a speed of each speaker's. Without it letters are sounds: each
has two peaks among the bands for two or three frames, and a speaker shifts the bands, tilts them, and adds noise.
"""

from __future__ import annotations

import io
import math
import random
import re
import shutil
import subprocess
import wave
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._shared.language import END, vocabulary
from .space2_dialogs import dialogs

BANDS, WORDS = 40, 8  # of a filterbank; of a sentence that is spoken
VOICES = ("en+m1", "en+m3", "en+m7", "en+f1", "en+f3", "en+f5")
VOCABULARY, SPEAKERS = 400, 4
IGNORED = -100


class Batch(NamedTuple):
    """Speech with its lengths; tokens of what is said and of the intent, `IGNORED` where there is none; classes."""

    audio: Tensor  # [B, T, 40]
    lengths: Tensor  # [B]
    said: Tensor  # [B, S]
    intent: Tensor  # [B, L]
    labels: Tensor  # [B]

    def of(self, rows: Tensor) -> Batch:  # [B] bool, or indices
        return Batch(*(x[rows] for x in self))


class Speech:
    """Sentences of the `classes` packages that have most, at most `each` of a package, each said by four speakers; one
    of them to test with: of commands the sentence is known, and the speaker is not."""

    def __init__(self, classes: int, each: int, limit: int | None, seed: int):
        texts = defaultdict(list)
        for one in dialogs(limit):
            words = re.findall(r"[a-z]+", one.text.lower())[:WORDS]
            if len(words) > 2:
                texts[one.domain].append(" ".join(words))
        self.names = sorted(texts, key=lambda name: (-len(texts[name]), name))[:classes]
        chosen = random.Random(seed)
        chosen.shuffle(self.names)  # the order in which they come
        found = {name: chosen.sample(texts[name], min(each, len(texts[name]))) for name in self.names}
        pairs = [(text, label) for label, some in enumerate(found.values()) for text in some for _ in range(SPEAKERS)]
        self.texts, self.labels = [text for text, _ in pairs], torch.tensor([label for _, label in pairs])
        self.test = torch.arange(len(pairs)) % SPEAKERS == 0
        self.spoken_by = "espeak-ng" if shutil.which("espeak-ng") else "letters"
        say = spoken if self.spoken_by == "espeak-ng" else spelled
        self.audio = [say(text, seed * len(pairs) + i) for i, text in enumerate(self.texts)]
        said = [f"{self.names[label]} {text}" for text, label in pairs]
        self.tokenizer = vocabulary(said, VOCABULARY)
        self.said = self._tokens(said)
        self.intent = self._tokens([self.names[i] + END for i in self.labels])

    def rows(self, classes: Sequence[int] | Tensor, test: bool = False) -> Tensor:
        """Of some classes, those to train on or to test with."""
        return (torch.isin(self.labels, torch.as_tensor(classes)) & (self.test == test)).nonzero()[:, 0]

    def batch(self, rows: Tensor) -> Batch:
        audio = [self.audio[i] for i in rows]
        lengths = torch.tensor([len(one) for one in audio])
        return Batch(padded(audio, 0.0), lengths, self.said[rows], self.intent[rows], self.labels[rows])

    def _tokens(self, texts: list[str]) -> Tensor:
        return padded([torch.tensor(one.ids) for one in self.tokenizer.encode_batch(texts)], IGNORED)


def padded(parts: list[Tensor], value: float) -> Tensor:
    return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)


def spelled(text: str, speaker: int) -> Tensor:
    """Letters as sounds, [T, 40]; see above."""
    generator = torch.Generator().manual_seed(speaker)
    shift, tilt = torch.randn(2, generator=generator)
    letters, bands = torch.tensor([*text.encode()])[:, None], torch.arange(BANDS)
    places = 3 + 7 * letters % 16, 20 + 11 * letters % 17  # of letters that follow each other far apart
    x = 3.0 * sum(torch.exp(-((bands - place - shift) ** 2) / 4) for place in places) * (letters != ord(" "))
    x = x.repeat_interleave(torch.randint(2, 4, (len(x),), generator=generator), 0) + tilt * (bands / BANDS - 0.5)
    return x + 0.3 * torch.randn(x.shape, generator=generator)


def spoken(text: str, speaker: int) -> Tensor:
    """By espeak-ng: log energies of 40 mel bands every 20 ms, [T, 40], of mean 0 and deviation 1."""
    chosen = random.Random(speaker)
    how = ["-v", chosen.choice(VOICES), "-s", str(chosen.randint(150, 220)), "-p", str(chosen.randint(30, 70))]
    answer = subprocess.run(["espeak-ng", *how, "--stdout", text], check=True, capture_output=True).stdout
    with wave.open(io.BytesIO(answer)) as file:
        rate, samples = file.getframerate(), file.readframes(file.getnframes())
    samples = samples[: len(samples) // 2 * 2]
    x = torch.frombuffer(bytearray(samples), dtype=torch.int16).float() / 2**15
    size = rate // 40  # 25 ms
    power = torch.stft(x, size, rate // 50, window=torch.hann_window(size), return_complex=True).abs().square()
    energies = (mel(rate, size // 2 + 1) @ power + 1e-6).log().T
    return (energies - energies.mean()) / energies.std()


def mel(rate: int, bins: int) -> Tensor:
    """Triangles that overlap by half, evenly spaced in mel up to half the rate, [40, bins]."""
    top = 2595 * math.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, BANDS + 2) / 2595) - 1)
    frequencies = torch.linspace(0, rate / 2, bins)
    rise = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rise, fall).clamp(min=0)
