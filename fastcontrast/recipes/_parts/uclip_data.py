"""What a run of uCLIP stands on: Django's texts, a small multilingual encoder, features of frozen models, a test."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcontrast import clip_loss
from fastcontrast.minilm import WIDTH, minilm_features
from fastcontrast.towers import HashedWords, encode, padded

from .._shared.django import phrases
from .._shared.icons import Icons, load_icons
from .._shared.report import train

LANGUAGES = ("cs", "fi", "hr", "hu", "ro")  # the paper's
BUCKETS, LIMIT = 1 << 15, 160
BATCH, RATE, SCALE = 512, 1e-2, 20.0
OTHER_SENSE = {"sun"}  # the weekday, short


@dataclass(frozen=True)
class World:
    """Features of length 1: of English texts by both encoders, of the banks, of all icons, of the questions."""

    icons: Icons
    names: int  # of the texts to train on, the first so many are names of icons, the others Django's
    e: Tensor  # [K, 384], English texts, by the multilingual encoder
    c: Tensor  # [K, D], the same by CLIP
    images: Tensor  # [M, D], a bank: icons of seen names
    foreign: Tensor  # [M', 384], a bank: texts in five languages
    gallery: Tensor  # [N, D], all icons
    questions: list[tuple[str, str, int]]  # language, text, index of the name that it translates
    asked: Tensor  # [Q, 384], the questions by the multilingual encoder
    asked_in_english: Tensor  # [Q, D], their names by CLIP

    def batch(self, size: int, generator: torch.Generator) -> Tensor:
        """Rows of English texts, of which a third are Django's: of those the foreign bank knows something near."""
        names, others = (torch.randint(*ends, (size,), generator=generator) for ends in
                         ((0, self.names), (self.names, len(self.e))))  # fmt: skip
        return torch.where(torch.rand(size, generator=generator) < 1 / 3, others, names)

    def scores(self, queries: Tensor, gallery: Tensor) -> dict[str, float]:  # [Q, D], [N, D]
        """recall@10 and @1 of an icon with the right name, per cent: the mean over languages."""
        own = self.icons.ids == torch.tensor([name for *_, name in self.questions])[:, None]  # [Q, N]
        similarity = queries @ gallery.T
        best = similarity.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        ahead = (similarity.masked_fill(own, -torch.inf) >= best).sum(1)
        spoken = torch.tensor([LANGUAGES.index(language) for language, *_ in self.questions])
        means = {k: [(ahead[spoken == i] < k).float().mean() for i in spoken.unique()] for k in (10, 1)}
        return {f"foreign → icon R@{k}, %": 100 * torch.stack(found).mean().item() for k, found in means.items()}


def load(limit: int | None, seed: int, steps: int) -> World:
    """Trains the multilingual encoder for `steps`, and takes all features."""
    icons = load_icons(limit)
    seen = (~icons.pairs.unseen).nonzero()[:, 0]
    names = [icons.names[i] for i in seen.tolist()]
    texts = [(language, *pair) for language in LANGUAGES for pair in phrases(language).items()]
    index = {name: i for i, name in enumerate(icons.names) if name not in OTHER_SENSE}
    questions = sorted({(lang, text, index[en.lower()]) for lang, en, text in texts if en.lower() in index})

    english = sorted({en for _, en, _ in texts})
    row = {text: i for i, text in enumerate(english)}
    of_english = minilm_features(english)
    said = [*names, *english, *(text for *_, text in texts)]
    taught = torch.cat([icons.texts[seen], of_english, of_english[[row[en] for _, en, _ in texts]]])
    encoder = multilingual_encoder(said, taught, steps, seed)

    clip = icons.clip(seed).eval()
    gallery, words = encode(clip.item_tower, icons.glyphs), encode(clip.name_tower, icons.texts)
    texts_of = [*names, *english], [text for *_, text in texts], [text for _, text, _ in questions]
    e, foreign, asked = (encode(encoder, pieces(x)) for x in texts_of)
    c = torch.cat([words[seen], encode(clip.name_tower, of_english)])
    in_english = words[[name for *_, name in questions]]
    images = gallery[icons.pairs.train]
    return World(icons, len(names), e, c, images, foreign, gallery, questions, asked, in_english)


def multilingual_encoder(texts: list[str], taught: Tensor, steps: int, seed: int) -> HashedWords:
    """An encoder of `pieces` whose features of `texts` resemble `taught` [N, 384], what MiniLM says of the English of
    each. After Reimers & Gurevych 2020, "Making Monolingual Sentence Embeddings Multilingual"."""
    torch.manual_seed(seed)
    model, codes, generator = HashedWords(BUCKETS, WIDTH), pieces(texts), torch.Generator().manual_seed(seed)
    same = torch.unique(taught, dim=0, return_inverse=True)[1]  # texts in six languages have one feature

    def step(_: int) -> Tensor:
        rows = torch.randint(len(texts), (BATCH,), generator=generator)
        return clip_loss(model(codes[rows]), taught[rows], SCALE, ids=same[rows])

    train("multilingual encoder", steps, model, step, rate=RATE)
    return model.eval()


def pieces(texts: list[str]) -> Tensor:
    """Codes int64 [B, T] of each text's words, marked at both ends, and of their parts of 3 to 5 letters; at most 160 a
    text, padded with 0."""
    rows = []
    for text in texts:
        words = [f"<{word}>" for word in re.findall(r"\w+", text.lower())]
        parts = [w[i : i + n] for w in words for n in (3, 4, 5) for i in range(len(w) - n + 1)]
        rows.append([zlib.crc32(part.encode()) % (BUCKETS - 1) + 1 for part in (*words, *parts)[:LIMIT]])
    return padded(rows)
